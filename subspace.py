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
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import distributed
from runs import load_file, without_prefixes
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


def is_finite(x: Tensor) -> bool:
    """Whether all of x (N,) is finite; many times faster than torch.isfinite(x).all()."""
    return x.numel() == 0 or bool(torch.stack(torch.aminmax(x.float())).isfinite().all())


def read_snapshot(path: Path, model: nn.Module, mmap: bool = False) -> dict[str, Tensor]:
    """A state dict that fits `model`, on the CPU (or, with `mmap`, in its file), from us or the official release.

    Raises InputError with file, tensor and reason for anything else.
    """
    state = load_file(path, "snapshot", mmap)
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"snapshot {path} is not a state dict of tensors")
    state = without_prefixes(state)
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
        if state[name].layout != torch.strided or not all(
                is_finite(part) for part in state[name].reshape(-1).split(2**22)):  # in parts, for little memory
            raise InputError(f"snapshot {path}: {name} holds NaN or infinite values, or is no plain float32 tensor")
    return state


def flat_columns(state: dict[str, Tensor], names: list[str], columns: slice) -> Tensor:
    """The part `columns` of the flat parameters (D,), float32, that the tensors `names` of a state dict make up."""
    parts, first = [], 0
    for name in names:
        values = state[name].reshape(-1)
        low, high = max(0, columns.start - first), min(len(values), columns.stop - first)
        if low < high:
            parts.append(values[low:high].float())
        first += len(values)
    return torch.cat(parts) if parts else torch.empty(0)


class SnapshotFiles:
    """A window (n, d) that is too large for the memory: it stays in its files, and is read in blocks of columns."""

    def __init__(self, paths: list[Path], names: list[str], columns: slice, device: torch.device | str, memory: int):
        """The `columns` of the flat parameters `names`, in blocks of about a quarter of `memory` bytes."""
        for path in paths:
            if not zipfile.is_zipfile(path):
                load_file(path, "snapshot")  # a truncated file says so
                raise InputError(f"{path} is in torch's older format, which cannot be read in parts; raise "
                                 "--basis-memory, so that the window is loaded, or save it again")
        self.paths, self.names, self.columns, self.device = paths, names, columns, device
        self.shape = len(paths), columns.stop - columns.start
        self.width = max(1, memory // (4 * 4 * len(paths)))

    def blocks(self) -> Iterator[Tensor]:
        """The columns in order, as matrices (n, up to self.width), each in the memory of the one before it.

        The files are mapped for one block at a time.
        """
        memory = torch.empty(len(self.paths), min(self.width, self.shape[1]), device=self.device)
        for first in range(self.columns.start, self.columns.stop, self.width):
            part = slice(first, min(self.columns.stop, first + self.width))
            block = memory[:, : part.stop - first]
            for row, path in zip(block, self.paths, strict=True):
                state = without_prefixes(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
                row.copy_(flat_columns(state, self.names, part))
                del state
            yield block


def load_window(paths: list[Path], model: nn.Module, device: torch.device | str = "cpu", *, memory: float = math.inf,
                sharded: bool = False) -> Tensor | SnapshotFiles:
    """Snapshots as a matrix (n, D) of flat parameters on `device`; `model` ends in the full state of the first one.

    Row i holds `model.parameters()` of paths[i] in order, as `flat_parameters` lays them out. `sharded`: only this
    process's columns of it. A matrix of more than `memory` bytes is not loaded, but left in its (checked) files.
    """
    names = [name for name, _ in model.named_parameters()]
    D = sum(p.numel() for p in model.parameters())
    columns = distributed.columns(D) if sharded else slice(0, D)
    loads = 4 * len(paths) * (columns.stop - columns.start) <= memory
    window = (torch.empty(len(paths), columns.stop - columns.start, device=device) if loads
              else SnapshotFiles(paths, names, columns, device, int(memory)))
    dtypes = {}  # other than float32 -> the first file with it
    for i, path in enumerate(paths):
        if not loads and i and i % distributed.world() != distributed.rank():
            continue  # each file is checked by one process
        state = read_snapshot(path, model, mmap=not loads)
        for name in names:
            dtypes.setdefault(str(state[name].dtype), path)
        if loads:
            window[i] = flat_columns(state, names, columns)
        if i == 0:
            model.load_state_dict(state)
        del state  # before the next one is there
    for dtype in sorted(dtypes.keys() - {"torch.float32"}) if distributed.rank() == 0 else ():
        print(f"note: {dtypes[dtype]} holds {dtype}; converted to torch.float32", file=sys.stderr)
    return window


def differences(window: Tensor | SnapshotFiles, chunk_bytes: int | None = None) -> Iterator[Tensor]:
    """The rows of `window` (n, d) minus its first row, in order of columns and in chunks (n, c) of chunk_bytes.

    The chunks (8 MiB in float64 on a CPU, whose cache holds them; 256 MiB on a GPU, for few launches) are subtracted
    from in place: those of a matrix are parts of it, those of files are read anew each time.
    """
    files = isinstance(window, SnapshotFiles)
    device = torch.device(window.device)
    chunk_bytes = chunk_bytes or (2**23 if device.type == "cpu" else 2**28)
    for block in window.blocks() if files else [window]:
        for part in block.split(max(1, chunk_bytes // (8 * len(block))), dim=1):
            part -= part[0].clone()
            yield part


def pca_basis(window: Tensor | SnapshotFiles, k: int, chunk_bytes: int | None = None,
              sharded: bool = False) -> tuple[Tensor, list[float]]:
    """First k principal directions of the rows of `window` (n, D), exactly: P (k, D) with orthonormal rows.

    Returns P and the share of the total variance that each of its rows explains (k floats, descending; the sum over
    all n - 1 components would be 1). A matrix, which must own its memory, is used up: it becomes P, and beside it only
    P's size is needed, while the rest is handed back. Files are read twice in blocks, and beside P only a block is
    needed. `sharded`: each process holds the columns (n, d) of one window and gets those of P (k, d). Each row's sign
    is such that its largest coefficient in the snapshots is positive.

    P holds the first k right singular vectors of the centred window, by way of the n x n Gram matrix of differences
    to the first row, accumulated and decomposed in float64; the same matrix in float32 loses half the digits.
    Raises InputError if k > n - 1 (the rank of n centred rows) or if the rows span fewer than k directions.
    """
    n, d = window.shape
    if not 1 <= k <= n - 1:
        raise InputError(f"--n_components {k}: {n} snapshots have 1 to {n - 1} principal components")
    gram = torch.zeros(n, n, dtype=torch.float64, device=window.device)
    for part in differences(window, chunk_bytes):
        X = part.double()
        gram += X @ X.T
    del part  # with it goes the block that it is in
    if sharded:
        distributed.total(gram)
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
    coefficients = distributed.from_first((centre @ U / variance[:k].sqrt()).T.contiguous()).to(window.device)  # (k, n)
    files = isinstance(window, SnapshotFiles)
    P = torch.empty(k, d, device=window.device) if files else window[:k]  # = coefficients @ window
    first = 0
    for part in differences(window, chunk_bytes):
        P[:, first : first + part.shape[1]] = coefficients @ part.double()
        first += part.shape[1]
    if not files:
        storage = window.untyped_storage()
        storage.resize_(k * d * window.element_size())  # hand back the rows that P does not need
        P = window.set_(storage, 0, (k, d), (d, 1))
    return P, (variance[:k] / variance.sum()).tolist()


def make_basis(window: Tensor | SnapshotFiles, k: int, kind: str = "pca", seed: int = 1,
               sharded: bool = False) -> tuple[Tensor, list[float]]:
    """A basis P (k, D) with orthonormal rows, and the share of the window's variance that each row explains.

    "pca": `pca_basis`. Two others to compare it with: "random", k random directions drawn from the seed, which know
    nothing of training; "snapshots", what k snapshots, evenly spaced over the window (n, D), span as seen from the
    first; these two want the whole window in memory. It is used up. Raises InputError if the snapshots do not span k
    dimensions.
    """
    if kind == "pca":
        return pca_basis(window, k, sharded=sharded)
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


# ------------------------------------------------------------------------------------------ into the subspace and out
#
# With several processes w.grad (D,) is that of this process's part of the mini-batch, and P is either whole in each
# (k, D), or this process's columns (k, d): memory and reading of P shrink by their number, but a gradient's and a
# step's D numbers go over the network, where otherwise k do.


def project(P: Tensor, gradient: Tensor) -> Tensor:
    """P grad (k,), of the mean of the processes' gradients (D,)."""
    if distributed.world() == 1 or P.shape[1] == len(gradient):
        return distributed.mean(P @ gradient)
    return distributed.total(P @ distributed.scatter_mean(gradient))


def lift(P: Tensor, s: Tensor, D: int) -> Tensor:
    """P^T s (D,) for s (k,)."""
    part = P.T @ s
    return part if len(part) == D else distributed.gather(part, D)


# ------------------------------------------------------------------------------------------------- projected SGD


class ProjectedSGD:
    """P-SGD: momentum SGD on theta (k,), where w = w_start + P^T theta and so dw/dtheta gives P grad."""

    def __init__(self, w: Tensor, P: Tensor, lr: float = 1.0, momentum: float = 0.9):
        """w (D,) from `flat_parameters` at its starting point, P (k, D) with orthonormal rows, or its columns here."""
        self.w, self.P, self.start = w, P, w.clone()
        self.theta = P.new_zeros(len(P))
        self.optimizer = torch.optim.SGD([self.theta], lr=lr, momentum=momentum)

    @torch.no_grad()
    def step(self) -> None:
        """One step from the gradient in w.grad."""
        self.theta.grad = project(self.P, self.w.grad)
        self.optimizer.step()
        if self.P.shape[1] == len(self.w):
            torch.addmv(self.start, self.P.T, self.theta, out=self.w)
        else:
            torch.add(self.start, lift(self.P, self.theta, len(self.w)), out=self.w)

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
        """w (D,) from `flat_parameters`, P (k, D) with orthonormal rows, or its columns here; `lr` is the first trial's
        step length."""
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

        trial_loss() evaluates the same mini-batch's loss at the current w, a scalar (with several processes that of
        all of them, like f); it must leave w.grad and the batch-norm statistics alone (see `frozen_statistics`).
        Raises FloatingPointError, with w as it was, if the search ends on a loss that is not finite.
        """
        if self.alpha:
            distributed.mean(self.w.grad)  # whose part outside the subspace every process needs
        g_device = project(self.P, self.w.grad)
        g = g_device.double().cpu()
        if self.s is not None:
            y = g - self.g
            if y @ self.s > 1e-20:
                self.B = bfgs_update(self.B, self.s, y)
            else:
                self.skipped += 1
        d = -self.B @ g
        # those of process 0 everywhere, however other processors round
        d, slope = distributed.from_first(torch.cat([d, (g @ d)[None]])).split(len(d))
        direction = lift(self.P, d.to(self.P), len(self.w))
        self.before.copy_(self.w)

        def loss_at(t: float) -> float:
            torch.add(self.before, direction, alpha=t, out=self.w)
            return float(trial_loss())  # the one host synchronisation of a trial

        search = armijo(loss_at, f, float(slope), **self.search)
        if not math.isfinite(search.loss):
            self.w.copy_(self.before)
            raise FloatingPointError(f"the line search ended on a loss of {search.loss} after {search.trials} trials")
        self.g, self.s = g, search.t * d
        self.theta += self.s
        if self.alpha:
            self.v.mul_(self.gamma).add_(self.w.grad).sub_(lift(self.P, g_device, len(self.w)))
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
