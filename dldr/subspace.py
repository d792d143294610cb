"""Train a network inside the low-dimensional subspace its own trajectory spans (DLDR; arXiv 2103.11154).

    w = flat_parameters(model)                  # (D,): the trainable parameters as one vector
    snapshots = [w.clone(), ...]                # kept while training in any way
    P, explained = pca_basis(torch.stack(snapshots), k)     # (k, D): orthonormal rows, the k principal directions
    optimizer = ProjectedSGD(model, P, lr=1.0)  # zero_grad, backward, step
    optimizer = ProjectedBFGS(model, P)         # loss = optimizer.step(lambda: loss_fn(model(x), y))

Letters as in the paper: D parameters, n snapshots, k components, P the basis, g = P grad the projected gradient,
s the step taken in the subspace, y the change of g, B the approximate inverse Hessian (k x k), rho and sigma the
line search's shrink factor and sufficient decrease. Both algorithms move in w_start + span(P), so they depend on
the span alone: another orthonormal basis of it gives the same networks.

Precision: the basis is computed in float64; products with P use the parameters' own dtype (disable TF32:
torch.set_float32_matmul_precision("highest")); the k-dimensional algebra of P-BFGS is in float64 on the CPU, where a
40 x 40 update costs microseconds and the line search needs its numbers anyway.
"""
import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------ parameters as a vector


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that w consists of, in order: those with requires_grad, tied ones once."""
    return [p for p in model.parameters() if p.requires_grad and p.numel()]


def flat_parameters(model: nn.Module) -> Tensor:
    """All trainable parameters of `model`, in order, as one vector w (D,), of which they become views.

    A step of any optimiser on the model changes w, and a change of w changes the model. Buffers (batch-norm
    statistics) are not part of w. Calling it again returns the same vector. Move the model to its device first.
    Raises ValueError unless all are float32, or all float64, on one device, each in memory of its own.
    """
    parameters = trainable(model)
    kinds = {(str(p.dtype), str(p.device)) for p in parameters}
    if len(kinds) != 1 or parameters[0].dtype not in (torch.float32, torch.float64):
        found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds)) or "none"
        raise ValueError(f"the trainable parameters must all be float32 (or float64) on one device, not {found}; "
                         "call model.float().to(device), and use torch.autocast for half-precision passes")
    sizes = [p.numel() for p in parameters]
    first, storage = parameters[0], parameters[0].untyped_storage().data_ptr()
    if all(p.untyped_storage().data_ptr() == storage for p in parameters) and are_views(parameters, first):
        return first.data.as_strided((sum(sizes),), (1,))
    spans = sorted((p.data_ptr(), p.data_ptr() + p.numel() * p.element_size()) for p in parameters)
    if any(start < end for (_, end), (start, _) in pairwise(spans)):
        raise ValueError("two trainable parameters share memory: to tie them, use one nn.Parameter in both places")
    w = torch.cat([p.detach().reshape(-1) for p in parameters])
    for p, values in zip(parameters, w.split(sizes), strict=True):
        p.data = values.view_as(p)
    return w


def are_views(parameters: list[nn.Parameter], w: Tensor) -> bool:
    """Whether the parameters lie one after the other from where w begins."""
    address = w.data_ptr()
    for p in parameters:
        if p.data_ptr() != address or not p.is_contiguous():
            return False
        address += p.numel() * p.element_size()
    return True


# --------------------------------------------------------------------------------------------- snapshots to a basis


def column_chunks(window: Tensor, chunk_bytes: int | None = None) -> Iterator[Tensor]:
    """The matrix `window` (n, D) in chunks of columns (n, c), whose float64 copies have `chunk_bytes`.

    By default 8 MiB on a CPU, whose cache holds them; 256 MiB on a GPU, for few launches. A window that does not fit
    in memory is an object with `shape`, `device` and `blocks()`, which yields its columns in order, (n, c) each.
    """
    blocks = [window] if isinstance(window, Tensor) else window.blocks()
    chunk_bytes = chunk_bytes or (2**23 if torch.device(window.device).type == "cpu" else 2**28)
    for block in blocks:
        yield from block.split(max(1, chunk_bytes // (8 * len(block))), dim=1)


def blocks_of_differences(window: Tensor, chunk_bytes: int | None = None,
                          scale: Tensor | None = None) -> Iterator[Tensor]:
    """The rows of `window` (n, D), times `scale` (n,) if given, minus the first row, in float64, in column chunks."""
    for part in column_chunks(window, chunk_bytes):
        if scale is None:
            yield (part - part[0]).double()
        else:
            part = part.double() * scale[:, None]
            yield part - part[0]


@torch.no_grad()
def pca_basis(window: Tensor, k: int | float, *, spherical: bool = False, group=None,
              chunk_bytes: int | None = None) -> tuple[Tensor, list[float]]:
    """First k principal directions of the rows of `window` (n, D), exactly: P (k, D) with orthonormal rows.

    0 < k < 1: as many as explain more than this share of the variance, as scikit-learn's PCA(n_components=k).
    `spherical`: of the rows divided by their norms. Returns P and the share of the total variance that each of its rows
    explains (floats, descending; the sum over all n - 1 components would be 1). The window is left as it is. Each row's
    sign is such that its largest coefficient in the snapshots is positive.

    P holds the first k right singular vectors of the centred window, by way of the n x n Gram matrix of differences
    to the first row, accumulated and decomposed in float64; the same matrix in float32 loses half the digits.
    `group`: with the columns sharded over processes (window (n, d), P (k, d)), an object whose all_reduce and
    broadcast work in place (`dldr.distributed`).
    Raises ValueError if k > n - 1 (the rank of n centred rows), if the rows span fewer than k directions, or if they
    are not of finite floating point numbers.
    """
    (n, D), dtype = window.shape, getattr(window, "dtype", torch.float32)
    if not (1 <= k <= n - 1 and k == int(k) or 0 < k < 1 < n):
        raise ValueError(f"{n} snapshots have 1 to {n - 1} principal components, not {k}")
    if not dtype.is_floating_point:
        raise ValueError(f"the window is of {dtype}: directions need floating point")
    scale = None
    if spherical:
        squares = sum(part.double().square().sum(1) for part in column_chunks(window, chunk_bytes))
        scale = (group.all_reduce(squares) if group else squares).rsqrt()
        if not scale.isfinite().all():
            raise ValueError("a snapshot is zero everywhere: spherical PCA divides by its norm")
    gram = torch.zeros(n, n, dtype=torch.float64, device=window.device)
    for X in blocks_of_differences(window, chunk_bytes, scale):
        gram += X @ X.T
    if group:
        group.all_reduce(gram)
    if not gram.isfinite().all():
        raise ValueError("the snapshots hold NaN or infinite values")
    centre = torch.eye(n, dtype=torch.float64, device="cpu") - 1 / n
    variance, U = torch.linalg.eigh(centre @ gram.cpu() @ centre)  # ascending; U (n, n)
    variance = variance.flip(0).clamp(min=0)
    rank = int((variance > 1e-11 * variance[0]).sum()) if variance[0] > 0 else 0  # below, rounding skews the rows
    shares = variance / variance.sum()
    if k < 1:
        k = min(int((shares.cumsum(0) <= k).sum()) + 1, n - 1)
    k = int(k)
    if rank < k:
        raise ValueError(f"the {n} snapshots differ in {rank} directions only, {k} components are asked for: "
                         "are some repeated, or of a vector that the model no longer uses?")
    U = U.flip(1)[:, :k]
    U = U * U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
    coefficients = (centre @ U / variance[:k].sqrt()).T.contiguous()  # (k, n)
    if group:
        group.broadcast(coefficients)
    coefficients = coefficients.to(window.device)
    P, first = torch.empty(k, D, dtype=dtype, device=window.device), 0
    for X in blocks_of_differences(window, chunk_bytes, scale):
        P[:, first : first + X.shape[1]] = coefficients @ X
        first += X.shape[1]
    return P, shares[:k].tolist()


class Basis:
    """P (k, D), orthonormal rows, as the optimisers use it; an object with the same methods may stand for it."""

    def __init__(self, P: Tensor):
        self.P = P

    def project(self, gradient: Tensor) -> Tensor:
        """P grad (k,)."""
        return self.P @ gradient

    def lift(self, s: Tensor) -> Tensor:
        """P^T s (D,)."""
        return self.P.T @ s

    def residual(self, gradient: Tensor, g: Tensor) -> Tensor:
        """(I - P^T P) grad (D,), with g = P grad (k,): what P+-BFGS follows outside the subspace."""
        return gradient - self.lift(g)


# --------------------------------------------------------------------------------------------------- the optimisers


class ProjectedOptimizer(torch.optim.Optimizer):
    """What P-SGD and P-BFGS share: w (D,), the basis, the gradient (D,), and the state by name instead of parameter."""

    def __init__(self, model: nn.Module, P, **defaults):
        self.model, self.w = model, flat_parameters(model)
        if isinstance(P, Tensor):
            w, P = self.w, Basis(P)
            if P.P.ndim != 2 or P.P.shape[1] != len(w) or P.P.dtype != w.dtype or P.P.device != w.device:
                raise ValueError(f"P must be (k, {len(w)}) {w.dtype} on {w.device}, as the model's trainable "
                                 f"parameters; it is {tuple(P.P.shape)} {P.P.dtype} on {P.P.device}")
            c = torch.linspace(1, 2, len(P.P), dtype=w.dtype, device=w.device)
            if not (P.project(P.lift(c)) - c).abs().max() < 0.01:
                raise ValueError("the rows of P are not orthonormal: take torch.linalg.qr(P.T).Q.T")
        self.basis, self.k = P, len(P.project(self.w))
        super().__init__(trainable(model), {"foreach": True, **defaults})  # foreach: zero_grad in one launch

    def add_param_group(self, param_group: dict) -> None:
        if self.param_groups:
            raise ValueError("one parameter group only: w is all trainable parameters of the model")
        super().add_param_group(param_group)

    @property
    def options(self) -> dict:
        """The parameter group: lr and the like, which a scheduler may change."""
        return self.param_groups[0]

    @property
    def theta(self) -> Tensor:
        """(k,): coordinates in the subspace, w = w_start + P^T theta."""
        return self.state["theta"]

    def gradient(self) -> Tensor:
        """The parameters' gradients as a new vector (D,), zeros for those that have none.

        Raises RuntimeError if all are missing, or if the model does not use w any more.
        """
        parameters, now = self.options["params"], trainable(self.model)
        if len(now) != len(parameters) or any(p is not q for p, q in zip(now, parameters, strict=True)) \
                or not are_views(parameters, self.w):
            raise RuntimeError("the model's trainable parameters are not those this optimiser was made for: they were "
                               "moved, converted, replaced (load_state_dict with assign=True) or frozen; "
                               "make a new optimiser after that")
        if all(p.grad is None for p in parameters):
            raise RuntimeError("no parameter has a gradient: call loss.backward() before step()")
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad.to_dense()).reshape(-1)
                          for p in parameters])

    def in_own_precision(self) -> contextlib.AbstractContextManager:
        """Inside, products with P are in the parameters' dtype, also where step() is called in torch.autocast."""
        kind = self.w.device.type
        return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()

    def state_dict(self) -> dict:
        """As torch's, but a copy."""
        return copy.deepcopy(super().state_dict())

    def load_state_dict(self, state_dict: dict) -> None:
        """Copy the state; raises ValueError if it is of another method or number of dimensions."""
        here = dict(self.state)
        shapes = [{name: value.shape for name, value in state.items() if isinstance(value, Tensor)}
                  for state in (here, state_dict["state"])]
        if shapes[0] != shapes[1]:
            raise ValueError(f"a state of other shapes: {shapes[1]}, not {shapes[0]}")
        super().load_state_dict(copy.deepcopy(state_dict))
        for name, value in here.items():
            self.state[name] = self.state[name].to(value)


class ProjectedSGD(ProjectedOptimizer):
    """P-SGD: momentum SGD on theta (k,), where w = w_start + P^T theta and so dw/dtheta gives P grad.

    A step moves w from where it is, as torch's optimisers do: weights that are loaded in between are kept. Rounding in
    float32 takes w out of the subspace by 2e-6 of its length in 4,000 steps.
    """

    def __init__(self, model: nn.Module, P, lr: float = 1.0, momentum: float = 0.9):
        """P (k, D) with orthonormal rows, D trainable parameters, or an object with project and lift (`Basis`)."""
        super().__init__(model, P, lr=lr, momentum=momentum)
        self.state.update(theta=self.w.new_zeros(self.k), velocity=self.w.new_zeros(self.k))

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Tensor | None:
        """One step from the parameters' gradients; a closure is called first, as torch.optim.SGD does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        velocity, lr = self.state["velocity"], self.options["lr"]
        with self.in_own_precision():
            velocity.mul_(self.options["momentum"]).add_(self.basis.project(self.gradient()))
            self.theta.add_(velocity, alpha=-lr)
            self.w.add_(self.basis.lift(velocity), alpha=-lr)
        return loss

    def statistics(self) -> dict:
        """theta, for the log."""
        return {"theta": self.theta.tolist()}


def bfgs_update(B: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """BFGS update of the inverse Hessian B (k, k): the nearest symmetric matrix with B y = s. Needs y^T s > 0."""
    ys = y @ s
    V = torch.eye(len(s), dtype=B.dtype, device=B.device) - torch.outer(s, y) / ys
    return V @ B @ V.T + torch.outer(s, s) / ys


def keep_buffers(model: nn.Module) -> Callable[[], None]:
    """A function that restores all buffers to their present values: batch-norm statistics and the like."""
    owners = [(module._buffers, name, buffer) for module in model.modules()
              for name, buffer in module._buffers.items() if buffer is not None]
    groups = {}
    for _, _, buffer in owners:
        expanded = buffer.layout != torch.strided or any(
            step == 0 and size > 1 for step, size in zip(buffer.stride(), buffer.shape, strict=True))
        if not expanded:  # or sparse: nothing can write these in place
            groups.setdefault((buffer.dtype, buffer.device), []).append(buffer)
    kept = []  # one copy for each dtype, since a GPU waits for the launches of many small ones
    for buffers in groups.values():
        flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
        values = flat.split([buffer.numel() for buffer in buffers])
        kept.append((buffers, [value.view_as(buffer) for value, buffer in zip(values, buffers, strict=True)]))

    def restore():
        for buffers, values in kept:
            torch._foreach_copy_(buffers, values)
        for slots, name, buffer in owners:
            slots[name] = buffer

    return restore


class Search(NamedTuple):
    t: float  # step length of the last trial
    loss: float  # its loss
    trials: int
    accepted: bool


def armijo(loss_at: Callable[[float], float], f: float, slope: float, *, first: float = 1.0, rho: float = 0.4,
           sigma: float = 0.4, max_trials: int = 20) -> Search:
    """Backtracking: the first t = first * rho^m, m = 0, 1, ... with loss_at(t) < f + sigma t slope.

    f is the loss at t = 0 and slope its derivative in t. A loss that is not finite is not accepted. After max_trials
    the search ends unaccepted at the last, tiny t.
    """
    for m in range(max_trials):
        t = first * rho**m
        loss = loss_at(t)
        if math.isfinite(loss) and loss < f + sigma * t * slope:
            return Search(t, loss, m + 1, True)
    return Search(t, loss, max_trials, False)


def as_float(loss: Tensor | float) -> float:
    return loss.item() if isinstance(loss, Tensor) else float(loss)


class ProjectedBFGS(ProjectedOptimizer):
    """P-BFGS: BFGS on theta (k,) with w = w_start + P^T theta, from gradients of different mini-batches.

    With alpha > 0 also P+-BFGS: momentum SGD of learning rate alpha and momentum gamma on the residual
    (I - P^T P) grad. On several processes the closures must give the same loss and gradients in all: average them.
    """

    def __init__(self, model: nn.Module, P, lr: float = 1.0, *, rho: float = 0.4, sigma: float = 0.4,
                 max_trials: int = 20, alpha: float = 0.0, gamma: float = 0.9):
        """P as in `ProjectedSGD`; `lr` is the first trial's step length along -B g.

        Raises ValueError for a model in DistributedDataParallel, whose processes would search on a loss of their own.
        """
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError("ProjectedBFGS would search on each process's own loss: give it model.module, and "
                             "closures that average loss and gradients over the processes")
        super().__init__(model, P, lr=lr, rho=rho, sigma=sigma, max_trials=max_trials, alpha=alpha, gamma=gamma)
        zeros = torch.zeros(self.k, dtype=torch.float64, device="cpu")
        self.state.update(B=torch.eye(self.k, dtype=torch.float64, device="cpu"), theta=zeros.clone(),
                          g=zeros.clone(), s=zeros.clone())  # projected gradient and step of the previous iteration
        if alpha:
            self.state["v"] = torch.zeros_like(self.w)  # (D,) momentum of the residual
        self.before = torch.empty_like(self.w)  # (D,) parameters at the start of the iteration
        self.steps = self.trials = self.accepted_at_once = self.failed = self.skipped = 0

    @torch.no_grad()
    def step(self, closure: Callable | Sequence[Callable]) -> Tensor:
        """One iteration on a mini-batch; closure() returns its loss, and may call zero_grad and backward itself.

        It is called once with gradient, then once for each trial of the line search (without gradient, unless it
        calls backward). Of a sequence of closures the gradients are averaged, and the search uses the last one.
        Returns the (last) loss before the step. Raises as `search` does.
        """
        closures = closure if isinstance(closure, Sequence) else [closure]
        if not closures or not all(map(callable, closures)):
            raise TypeError("ProjectedBFGS.step needs a closure that returns the loss of a mini-batch")
        gradient = torch.zeros_like(self.w)
        for evaluate in closures:
            self.zero_grad()
            with torch.enable_grad():
                loss = evaluate()
                calls_backward = any(p.grad is not None for p in self.options["params"])
                if not calls_backward:
                    loss.backward()
            gradient += self.gradient()

        def trial_loss():
            with torch.set_grad_enabled(calls_backward):
                return evaluate()

        self.search(as_float(loss), trial_loss, gradient.div_(len(closures)))
        return loss.detach() if isinstance(loss, Tensor) else loss

    def direction(self, g: Tensor) -> tuple[Tensor, float]:
        """Update B with the step before; returns d = -B g (k,) and the slope g^T d along it."""
        s, y = self.state["s"], g - self.state["g"]
        if y @ s > 1e-20:
            self.state["B"] = bfgs_update(self.state["B"], s, y)
        elif s.any():  # all zeros before the first iteration
            self.skipped += 1
        d = -self.state["B"] @ g
        return d, float(g @ d)

    @torch.no_grad()
    def search(self, f: float | None, trial_loss: Callable[[], Tensor], gradient: Tensor | None = None) -> Search:
        """One iteration from the loss f at w (None: evaluate it too) and its gradient (D,), by default the parameters'.

        trial_loss() evaluates the same mini-batch's loss at the current w, a scalar. Trials leave no trace in the
        model's buffers. Raises FloatingPointError, with w as it was, if the search ends on a loss that is not finite.
        """
        if gradient is None:
            gradient = self.gradient()
        options = self.options
        with self.in_own_precision():
            projected = self.basis.project(gradient)
            g = projected.double().cpu()
            d, slope = self.direction(g)
            direction = self.basis.lift(d.to(projected))
        self.before.copy_(self.w)
        restore = keep_buffers(self.model)

        def loss_at(t):
            torch.add(self.before, direction, alpha=t, out=self.w)
            torch.clear_autocast_cache()  # of copies of other weights, where step() is called in torch.autocast
            loss = as_float(trial_loss())  # the one host synchronisation of a trial
            restore()
            return loss

        if f is None:
            f = loss_at(0)
        search = armijo(loss_at, f, slope, first=options["lr"], rho=options["rho"], sigma=options["sigma"],
                        max_trials=options["max_trials"])
        if not math.isfinite(search.loss):
            self.w.copy_(self.before)
            raise FloatingPointError(f"the line search ended on a loss of {search.loss} after {search.trials} trials")
        self.state.update(g=g, s=search.t * d, theta=self.theta + search.t * d)
        if options["alpha"]:
            v = self.state["v"]
            with self.in_own_precision():
                v.mul_(options["gamma"]).add_(self.basis.residual(gradient, projected))
            self.w.sub_(v, alpha=options["alpha"])
        self.steps += 1
        self.trials += search.trials
        self.accepted_at_once += search.accepted and search.trials == 1
        self.failed += not search.accepted
        return search

    def statistics(self) -> dict:
        """theta, and the searches since the last call; first_trial_accepted is a share of the steps in percent."""
        statistics = {
            "theta": self.theta.tolist(),
            "trials_per_step": self.trials / max(1, self.steps),
            "first_trial_accepted": 100 * self.accepted_at_once / max(1, self.steps),
            "failed_searches": self.failed,
            "skipped_updates": self.skipped,
        }
        self.steps = self.trials = self.accepted_at_once = self.failed = self.skipped = 0
        return statistics
