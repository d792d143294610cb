"""Train a network inside the low-dimensional subspace its own trajectory spans (DLDR; arXiv 2103.11154).

    window = load_window(paths, model)          # (n, D): the parameters of n snapshots; model is now the first one
    P, explained = pca_basis(window, k)         # (k, D): orthonormal rows, the k principal directions
    w = flat_parameters(model)                  # (D,): all parameters as one vector, w.grad (D,) their gradient
    ProjectedSGD(w, P, lr=1).step()             # after each backward pass, or
    ProjectedBFGS(w, P).step(loss, trial_loss)  # where trial_loss() is the loss at the current w

Letters as in the paper: D parameters, n snapshots, k components, P the basis, g = P grad the projected gradient,
s the step taken in the subspace, y the change of g, B the approximate inverse Hessian (k x k), rho and sigma the
line search's shrink factor and sufficient decrease. Both algorithms move in w_start + span(P), so they depend on
the span alone: another orthonormal basis of it gives the same networks.

Precision: the basis is computed in float64, products with P run in the parameters' own float32 (never TF32 or
bfloat16), and the k-dimensional algebra in float64 on the host, where a 40 x 40 update costs microseconds and the
line search needs its numbers anyway.
"""
import contextlib
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from runs import load_file
from utils import InputError

# ------------------------------------------------------------------------------------------ parameters as a vector


def flat_parameters(model: nn.Module) -> Tensor:
    """All of `model.parameters()`, in order, as one vector w (D,), with its gradient as w.grad (D,).

    The parameters and their gradients become views into the two buffers: a step on w is a step of the model, a
    backward pass adds to w.grad, and any torch optimiser takes w as its only parameter. Zero w.grad in place
    (`w.grad.zero_()`); move the model to its device first. Batch-norm statistics are buffers, not part of w.
    """
    parameters = list(model.parameters())
    sizes = [p.numel() for p in parameters]
    w = torch.cat([p.detach().reshape(-1) for p in parameters])
    w.grad = torch.zeros_like(w)
    for p, values, gradient in zip(parameters, w.split(sizes), w.grad.split(sizes), strict=True):
        p.data, p.grad = values.view_as(p), gradient.view_as(p)
    return w


# --------------------------------------------------------------------------------------------- snapshots to a basis


def snapshot_paths(directory: str | Path, indices: range) -> list[Path]:
    """The snapshot files of a window; raises InputError that names the missing ones, up to 1000."""
    paths = [Path(directory) / f"{i}.pt" for i in indices]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise InputError(
            f"--save-dir {directory} lacks {len(missing)} of the {len(paths)} snapshots of the window "
            f"(--params_start, --params_end, --params_step): {' '.join(missing[:1000])}; train_sgd.py writes them"
        )
    return paths


def read_snapshot(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """A state dict that fits `model`, on the CPU, from a file of ours or of the official release.

    Key prefixes left by DataParallel (`module.`) or torch.compile (`_orig_mod.`) are removed.
    Raises InputError with file, tensor and reason for anything else.
    """
    state = load_file(path, "snapshot")
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"snapshot {path} is not a state dict of tensors")
    state = {re.sub(r"^((module|_orig_mod)\.)+", "", str(key)): value for key, value in state.items()}
    expected = model.state_dict()
    if state.keys() != expected.keys():
        name = min(state.keys() ^ expected.keys())
        there, here = (tuple(d[name].shape) if name in d else "missing" for d in (state, expected))
        raise InputError(f"snapshot {path} is of another --arch: {name} is {there}, in the network {here}")
    for name in expected:
        if state[name].shape != expected[name].shape:
            there, here = tuple(state[name].shape), tuple(expected[name].shape)
            raise InputError(
                f"snapshot {path} is of another --arch or number of classes: {name} is {there}, the network's {here}"
            )
        if state[name].layout != torch.strided or not torch.isfinite(state[name].float()).all():
            raise InputError(f"snapshot {path}: {name} holds NaN or infinite values, or is no plain float32 tensor")
    return state


def load_window(paths: list[Path], model: nn.Module, device: torch.device | str = "cpu") -> Tensor:
    """Snapshots as a matrix (n, D) of flat parameters on `device`; `model` ends in the full state of the first one.

    Row i holds `model.parameters()` of paths[i] in order, as `flat_parameters` lays them out.
    """
    window = torch.empty(len(paths), sum(p.numel() for p in model.parameters()), device=device)
    for i, path in enumerate(paths):
        state = read_snapshot(path, model)
        other = {str(state[name].dtype) for name, _ in model.named_parameters()} - {"torch.float32"}
        if other:
            print(f"note: {path} holds {', '.join(sorted(other))}; converted to torch.float32", file=sys.stderr)
        window[i] = torch.cat([state[name].reshape(-1).float() for name, _ in model.named_parameters()])
        if i == 0:
            model.load_state_dict(state)
    return window


def pca_basis(window: Tensor, k: int, chunk_bytes: int | None = None) -> tuple[Tensor, list[float]]:
    """First k principal directions of the rows of `window` (n, D), exactly: P (k, D) with orthonormal rows.

    Returns P and the share of the total variance that each of its rows explains (k floats, descending; the sum over
    all n - 1 components would be 1). `window`, which must own its memory, is used up: it becomes P, and beside it only
    P's size is needed, while the rest is handed back. Each row's sign is such that its largest coefficient in the
    snapshots is positive.

    P holds the first k right singular vectors of the centred window, by way of the n x n Gram matrix of differences
    to the first row, accumulated and decomposed in float64 in column chunks of `chunk_bytes` (8 MiB on a CPU, which its
    cache holds; 256 MiB on a GPU, for few launches); the same matrix in float32 loses half the digits. Each chunk is
    read alone, twice: a window on disk could be streamed through here.
    Raises InputError if k > n - 1 (the rank of n centred rows) or if the rows span fewer than k directions.
    """
    n, D = window.shape
    if not 1 <= k <= n - 1:
        raise InputError(f"--n_components {k}: {n} snapshots have 1 to {n - 1} principal components")
    chunk_bytes = chunk_bytes or (2**23 if window.device.type == "cpu" else 2**28)
    columns = max(1, chunk_bytes // (8 * n))
    reference = window[0].clone()
    gram = torch.zeros(n, n, dtype=torch.float64, device=window.device)
    for part, ref in zip(window.split(columns, dim=1), reference.split(columns), strict=True):
        part -= ref
        X = part.double()
        gram += X @ X.T
    centre = torch.eye(n, dtype=torch.float64) - 1 / n
    variance, U = torch.linalg.eigh(centre @ gram.cpu() @ centre)  # ascending; U (n, n)
    variance, U = variance.flip(0).clamp(min=0), U.flip(1)[:, :k]
    rank = int((variance > 1e-13 * variance[0]).sum()) if variance[0] > 0 else 0
    if rank < k:
        raise InputError(
            f"the {n} snapshots of the window differ in {rank} directions only, --n_components asks for {k}: "
            "are snapshots repeated, or did training not move?"
        )
    U = U * U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
    coefficients = (centre @ U / variance[:k].sqrt()).T.to(window.device)  # (k, n): P = coefficients @ window
    for part in window.split(columns, dim=1):
        part[:k] = coefficients @ part.double()
    storage = window.untyped_storage()
    storage.resize_(k * D * window.element_size())  # hand back the rows that P does not need
    return window.set_(storage, 0, (k, D), (D, 1)), (variance[:k] / variance.sum()).tolist()


def make_basis(window: Tensor, k: int, kind: str = "pca", seed: int = 1) -> tuple[Tensor, list[float]]:
    """A basis P (k, D) with orthonormal rows, and the share of the window's variance that each row explains.

    "pca": `pca_basis`. Two others to compare it with: "random", k random directions drawn from the seed, which know
    nothing of training; "snapshots", what k snapshots, evenly spaced over the window (n, D), span as seen from the
    first. The window is used up. Raises InputError if the snapshots do not span k dimensions.
    """
    if kind == "pca":
        return pca_basis(window, k)
    n, D = window.shape
    if kind == "random":
        rows = torch.randn(k, D, generator=torch.Generator().manual_seed(seed)).to(window.device)
    else:
        rows = window[torch.linspace(1, n - 1, k).round().long()] - window[0]
    Q, R = torch.linalg.qr(rows.T)
    if R.diagonal().abs().min() <= 1e-5 * R.diagonal().abs().max():
        raise InputError(f"the snapshots of the window do not span --n_components {k} dimensions: are some repeated?")
    P = Q.T.contiguous()
    window -= window.mean(0)
    return P, ((P @ window.T).square().sum(1) / window.square().sum()).tolist()


# ------------------------------------------------------------------------------------------------- projected SGD


class ProjectedSGD:
    """P-SGD: momentum SGD on theta (k,), where w = w_start + P^T theta and so dw/dtheta gives P grad."""

    def __init__(self, w: Tensor, P: Tensor, lr: float = 1.0, momentum: float = 0.9):
        """w (D,) from `flat_parameters` at its starting point, P (k, D) with orthonormal rows."""
        self.w, self.P, self.start = w, P, w.clone()
        self.theta = P.new_zeros(len(P))
        self.optimizer = torch.optim.SGD([self.theta], lr=lr, momentum=momentum)

    @torch.no_grad()
    def step(self) -> None:
        """One step from the gradient in w.grad."""
        self.theta.grad = self.P @ self.w.grad
        self.optimizer.step()
        torch.addmv(self.start, self.P.T, self.theta, out=self.w)

    def statistics(self) -> dict:
        """theta, for the log."""
        return {"theta": self.theta.tolist()}

    @property
    def param_groups(self) -> list[dict]:
        """Those of the optimiser on theta: where a schedule sets the lr."""
        return self.optimizer.param_groups

    def state_dict(self) -> dict:
        return {"start": self.start, "theta": self.theta, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.start.copy_(state["start"])
        self.theta.copy_(state["theta"])
        self.optimizer.load_state_dict(state["optimizer"])


# ------------------------------------------------------------------------------------------------ projected BFGS


def bfgs_update(B: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """BFGS update of the inverse Hessian B (k, k): the nearest symmetric matrix with B y = s. Needs y^T s > 0."""
    ys = y @ s
    V = torch.eye(len(s), dtype=B.dtype) - torch.outer(s, y) / ys
    return V @ B @ V.T + torch.outer(s, s) / ys


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


class ProjectedBFGS:
    """P-BFGS: BFGS on theta (k,) with w = w_start + P^T theta, from gradients of different mini-batches.

    With alpha > 0 also P+-BFGS: momentum gradient descent of rate alpha on what the subspace leaves out of grad.
    """

    def __init__(self, w: Tensor, P: Tensor, *, lr: float = 1.0, rho: float = 0.4, sigma: float = 0.4,
                 max_trials: int = 20, alpha: float = 0.0, gamma: float = 0.9):
        """w (D,) from `flat_parameters`, P (k, D) with orthonormal rows; `lr` is the first trial's step length."""
        self.w, self.P = w, P
        self.search = {"first": lr, "rho": rho, "sigma": sigma, "max_trials": max_trials}
        self.alpha, self.gamma = alpha, gamma
        self.B = torch.eye(len(P), dtype=torch.float64)  # (k, k), on the host like g and s
        self.g: Tensor | None = None  # (k,) projected gradient of the previous iteration
        self.s: Tensor | None = None  # (k,) step taken in it
        self.theta = torch.zeros(len(P), dtype=torch.float64)  # (k,) where all the steps have led
        self.v = torch.zeros_like(w) if alpha else None  # (D,) residual momentum
        self.before = torch.empty_like(w)  # (D,) parameters at the start of the iteration
        self.steps = self.trials = self.accepted_at_once = self.failed = self.skipped = 0

    @torch.no_grad()
    def step(self, f: float, trial_loss: Callable[[], Tensor]) -> Search:
        """One iteration from w.grad, the gradient of the loss f at w.

        trial_loss() evaluates the same mini-batch's loss at the current w, a scalar; it must leave w.grad and the
        batch-norm statistics alone (see `frozen_statistics`). Raises FloatingPointError, with w as it was, if
        the search ends on a loss that is not finite.
        """
        g_device = self.P @ self.w.grad
        g = g_device.double().cpu()
        if self.s is not None:
            y = g - self.g
            if y @ self.s > 1e-20:
                self.B = bfgs_update(self.B, self.s, y)
            else:
                self.skipped += 1
        d = -self.B @ g
        direction = self.P.T @ d.to(self.P)
        self.before.copy_(self.w)

        def loss_at(t: float) -> float:
            torch.add(self.before, direction, alpha=t, out=self.w)
            return float(trial_loss())  # the one host synchronisation of a trial

        search = armijo(loss_at, f, float(g @ d), **self.search)
        if not math.isfinite(search.loss):
            self.w.copy_(self.before)
            raise FloatingPointError(f"the line search ended on a loss of {search.loss} after {search.trials} trials")
        self.g, self.s = g, search.t * d
        self.theta += self.s
        if self.alpha:
            self.v.mul_(self.gamma).add_(self.w.grad).sub_(self.P.T @ g_device)
            self.w.sub_(self.v, alpha=self.alpha)
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

    def state_dict(self) -> dict:
        return {"B": self.B, "g": self.g, "s": self.s, "theta": self.theta, "v": self.v}

    def load_state_dict(self, state: dict) -> None:
        self.B, self.g, self.s, self.theta = state["B"], state["g"], state["s"], state["theta"]
        if self.alpha:
            self.v.copy_(state["v"])


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Forward passes in here normalise with batch statistics but leave batch norm's running statistics untouched."""
    tracking = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True
