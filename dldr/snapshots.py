"""State-dict files as a snapshot matrix, in memory or streamed from disk, and the bases made from it."""
import math
import zipfile
from collections.abc import Iterator
from itertools import groupby, zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn

from dldr import distributed
from dldr.errors import UserError
from dldr.files import load_file, load_model, save_tensors, state_dict_in
from dldr.subspace import column_chunks, flat_parameters, pca_basis, trainable


def snapshot_paths(directory: str | Path, indices: range) -> list[Path]:
    """The snapshot files of a window; raises UserError that names the missing ones, as ranges."""
    paths = [Path(directory) / f"{i}.pt" for i in indices]
    missing = [i for i, path in zip(indices, paths, strict=True) if not path.is_file()]
    if missing:
        neighbours = groupby(enumerate(missing), lambda pair: pair[1] - pair[0] * indices.step)
        ranges = [[i for _, i in group] for _, group in neighbours]
        names = [f"{r[0]}.pt" if len(r) == 1 else f"{r[0]}.pt ... {r[-1]}.pt" for r in ranges[:100]]
        raise UserError(f"{directory} lacks {len(missing)} of the {len(paths)} snapshots of the window: "
                        f"{', '.join(names)}; train_sgd.py writes them")
    return paths


def is_finite(x: Tensor) -> bool:
    """Whether all of x (N,) is finite; many times faster than torch.isfinite(x).all()."""
    return x.numel() == 0 or bool(torch.stack(torch.aminmax(x.float())).isfinite().all())


def matched(state: dict[str, Tensor], keys: list[str]) -> dict[str, Tensor]:
    """`state` with the names `keys`, by position if it has others."""
    state = state_dict_in(state, keys)
    return state if state.keys() == set(keys) else dict(zip(keys, state.values(), strict=True))


def read_snapshot(path: Path, model: nn.Module, mmap: bool = False) -> tuple[dict[str, Tensor], bool]:
    """A state dict that fits `model`, on the CPU (or, with `mmap`, in its file), from us or the official release.

    Names that differ from the model's are matched by position, if all shapes agree in order; returns the state and
    whether that was so. Raises UserError with file, tensor and reason for anything that does not fit.
    """
    expected = model.state_dict()
    state = state_dict_in(load_file(path, "snapshot", mmap), list(expected))
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"snapshot {path} is not a state dict of tensors")
    by_position = state.keys() != expected.keys()
    if by_position and [v.shape for v in state.values()] == [v.shape for v in expected.values()]:
        state = matched(state, list(expected))
    for name in [*expected, *state]:
        there, here = (tuple(d[name].shape) if name in d else "missing" for d in (state, expected))
        if there != here:
            raise UserError(f"snapshot {path} is of another network: {name} is {there}, in the network {here} (another "
                            "--arch, or number of classes)")
    for name in expected:
        finite = state[name].layout == torch.strided and all(
            is_finite(part) for part in state[name].reshape(-1).split(2**22))  # in parts, for little memory
        if not finite and is_finite(expected[name]):  # a mask may hold -inf
            raise UserError(f"snapshot {path}: {name} holds NaN or infinite values, or is no plain float32 tensor")
    return state, by_position


def flat_columns(values: list[Tensor], columns: slice) -> Tensor:
    """The part `columns` of the vector (D,), float32, that the tensors `values` make up."""
    parts, first = [], 0
    for value in values:
        low, high = max(0, columns.start - first), min(value.numel(), columns.stop - first)
        if low < high:
            parts.append(value.reshape(-1)[low:high].float())
        first += value.numel()
    return torch.cat(parts) if parts else torch.empty(0)


class SnapshotFiles:
    """Memory-mapped snapshot matrix (n, d), read in column blocks."""

    def __init__(self, paths: list[Path], keys: list[str], names: list[str], columns: slice,
                 device: torch.device | str, memory: int):
        """State dicts of the entries `keys`, parameters `names` in order; a block takes a quarter of `memory` bytes."""
        for path in paths:
            if not zipfile.is_zipfile(path):
                load_file(path, "snapshot")  # a truncated file says so
                raise UserError(f"{path} is in torch's older format, which cannot be read in parts; raise "
                                "--basis-memory, so that the window is loaded, or save it again")
        self.paths, self.keys, self.names, self.columns, self.device = paths, keys, names, columns, device
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
                state = matched(torch.load(path, map_location="cpu", weights_only=True, mmap=True), self.keys)
                row.copy_(flat_columns([state[name] for name in self.names], part))
                del state
            yield block


def load_window(paths: list[Path], model: nn.Module, device: torch.device | str = "cpu", *, memory: float = math.inf,
                sharded: bool = False, start: str = "first") -> Tensor | SnapshotFiles:
    """Snapshots as a matrix (n, D) of flat parameters on `device`; `model` ends in the full state of one of them.

    Row i holds the trainable parameters of paths[i], as `flat_parameters` lays them out. `sharded`: only this
    process's columns of it. A matrix of more than `memory` bytes is not loaded but streamed from its (checked) files.
    `start`: the model's state is that of the "first" or "last" snapshot, or has the "mean" of their parameters; buffers
    (batch norm's statistics) are then the last one's, the nearest to it, and follow training as always.
    """
    parameters = set(trainable(model))
    names = [name for name, p in model.named_parameters() if p in parameters]
    D = sum(p.numel() for p in parameters)
    columns = distributed.columns(D) if sharded else slice(0, D)
    loads = 4 * len(paths) * (columns.stop - columns.start) <= memory
    window = (torch.empty(len(paths), columns.stop - columns.start, device=device) if loads
              else SnapshotFiles(paths, list(model.state_dict()), names, columns, device, int(memory)))
    begin = 0 if start == "first" else len(paths) - 1
    notes = {}  # text -> the first file it holds for
    for i, path in enumerate(paths):
        if not loads and i != begin and i % distributed.world_size() != distributed.rank():
            continue  # each file is checked by one process
        state, by_position = read_snapshot(path, model, mmap=not loads)
        if by_position:
            notes.setdefault("other names than the network; its tensors, all of the same shapes, are matched by "
                             "position", path)
        for name in names:
            if state[name].dtype != torch.float32:
                notes.setdefault(f"{state[name].dtype}; converted to torch.float32", path)
        if loads:
            window[i] = flat_columns([state[name] for name in names], columns)
        if i == begin:
            load_model(model, state, path)
        del state  # before the next one is there
    for text, path in notes.items():
        distributed.note(f"{path} holds {text}")
    if start == "mean":
        mean = torch.cat([part.mean(0, dtype=torch.float64).float() for part in column_chunks(window)])
        flat_parameters(model).copy_(distributed.all_gather(mean, D) if sharded else mean)
    return window


BASES = ("pca", "spherical", "random", "snapshots")


def make_basis(window: Tensor | SnapshotFiles, k: int | float, kind: str = "pca", seed: int = 1, sharded: bool = False,
               model: nn.Module | None = None) -> tuple[Tensor, list[float]]:
    """A basis P (k, D) with orthonormal rows, and the share of the window's variance that each row explains.

    "pca" and "spherical": `pca_basis`. Others, for a window (n, D) in memory: "random", k random directions drawn from
    the seed, which know nothing of training; "snapshots", the span of k evenly spaced snapshots as seen from the first;
    else a file by `save_basis`, for the `model`. Raises ValueError if the snapshots do not span k dimensions.
    """
    if kind in ("pca", "spherical"):
        return pca_basis(window, k, spherical=kind == "spherical", group=distributed if sharded else None)
    n, D = window.shape
    if kind not in BASES:
        P = load_basis(Path(kind), model, k, window.device)
    else:
        if kind == "random":
            rows = torch.randn(k, D, generator=torch.Generator().manual_seed(seed)).to(window.device)
        else:
            rows = window[torch.linspace(1, n - 1, k).round().long()] - window[0]
        Q, R = torch.linalg.qr(rows.T)
        if R.diagonal().abs().min() <= 1e-5 * R.diagonal().abs().max():
            raise ValueError(f"the {n} snapshots do not span {k} dimensions: are some repeated?")
        P = Q.T.contiguous()
    centred = window - window.mean(0)
    return P, ((P @ centred.T).square().sum(1) / centred.square().sum()).nan_to_num().tolist()  # no variance: zeros


def save_basis(path: Path, model: nn.Module, P: Tensor, explained: list[float], made: dict) -> None:
    """Write P (k, D), the names and shapes of the parameters it is of, the shares it explains, and how it was `made`.

    Raises UserError if the file cannot be written.
    """
    save_tensors(path, {"P": P, "parameters": named_shapes(model), "explained_variance": explained, "made": made})


def load_basis(path: Path, model: nn.Module, k: int, device: torch.device | str) -> Tensor:
    """The first k rows (k, D) of a file by `save_basis`; UserError if it is damaged, of another network, or smaller."""
    saved = load_file(path, "basis")
    P, shapes, here = saved.get("P"), saved.get("parameters"), named_shapes(model)
    if not (isinstance(P, Tensor) and isinstance(shapes, dict) and P.ndim == 2 and P.dtype == torch.float32
            and is_finite(P) and ((P @ P.T) - torch.eye(len(P))).abs().max() < 0.01):
        raise UserError(f"--basis {path} is not a basis that --save-basis has written")
    for there, ours in zip_longest(shapes.items(), here.items(), fillvalue=("nothing", "")):
        if there != ours:
            raise UserError(f"--basis {path} is of another network: it has {there[0]} {there[1]} where this one has "
                            f"{ours[0]} {ours[1]}")
    if not 1 <= k <= len(P):
        raise UserError(f"--basis {path} has {len(P)} components, --n_components asks for {k}")
    return P[:k].to(device)


def named_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Name -> shape of the trainable parameters, in order."""
    parameters = set(trainable(model))
    return {name: list(p.shape) for name, p in model.named_parameters() if p in parameters}
