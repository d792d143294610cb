"""One run over several processes that torchrun has started: one for each GPU (NCCL), or on CPUs (gloo).

    torchrun --nproc_per_node=4 train_sgd.py ...

In a process of its own, without torchrun, nothing here does anything: there is one process, its number is 0, and sums
and means over the processes are the tensors themselves.

What is split: each mini-batch (`share`), the snapshots' columns and with them the basis (`columns`). What every process
has whole: the network, its parameters as a vector, everything k-dimensional. All of them take the same steps, since the
numbers that decide are reduced over the processes first and come out of that as the same bits everywhere.
"""
import contextlib
import datetime
import functools
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def world() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This one's number, from 0, before they have met too; number 0 writes the files and speaks."""
    return int(os.environ.get("RANK", 0)) if launched() > 1 else 0


def launched() -> int:
    """How many processes torchrun has started, which need not have met yet; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def start(device: torch.device, timeout: float) -> None:
    """Meet the other processes, if torchrun started several; who waits longer than `timeout` seconds for them gives up.

    Tensors on a CPU go by gloo, those on a GPU by NCCL. What other processes than number 0 print, errors aside, is
    dropped.
    """
    if launched() == 1 or dist.is_initialized():
        return
    cuda = device.type == "cuda"
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store(), world_size=launched(),
                            rank=int(os.environ["RANK"]), timeout=datetime.timedelta(seconds=timeout),
                            device_id=device if cuda else None)
    if rank():
        sys.stdout = open(os.devnull, "w")


def stop() -> None:
    """Part from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


@functools.cache
def store() -> dist.Store:
    """Where the processes meet: torchrun's, which outlives each of them."""
    return next(iter(dist.rendezvous("env://")))[0]


def first_to_fail() -> bool:
    """Whether no other process has called this before: one line for an error, from the process it began in."""
    if launched() == 1:
        return True
    try:
        return store().add("failed", 1) == 1
    except RuntimeError:  # it went with torchrun
        return True


# ------------------------------------------------------------------------------------------------------- collectives


def total(x: Tensor) -> Tensor:
    """x, in place the sum over the processes' x."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def mean(x: Tensor) -> Tensor:
    """x, in place the mean over the processes' x."""
    return total(x).div_(world()) if world() > 1 else x


def maximum(number: int) -> int:
    """The largest of the processes' numbers."""
    if world() == 1:
        return number
    x = torch.tensor(number)
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return int(x)


def from_first(x: Tensor) -> Tensor:
    """x, in place that of process 0."""
    if world() > 1:
        dist.broadcast(x, 0)
    return x


@contextlib.contextmanager
def first_before_others():
    """In here process 0 is alone, and the others follow when it is through: what it downloads is there for them."""
    if rank():
        maximum(0)
    yield
    if rank() == 0:
        maximum(0)


def share(first: int, last: int) -> tuple[int, int]:
    """This process's part of the range first ... last - 1; the parts of all processes are disjoint and make it up."""
    size = last - first
    return first + size * rank() // world(), first + size * (rank() + 1) // world()


def part(D: int) -> int:
    """Length of a process's part of a vector (D,); the last ones may be shorter, or empty."""
    return -(-D // world())


def columns(D: int) -> slice:
    """This process's part of a vector (D,), or of the columns of a matrix."""
    return slice(min(D, rank() * part(D)), min(D, (rank() + 1) * part(D)))


def padded(x: Tensor, length: int) -> Tensor:
    """x with zeros up to `length`; x itself if it is that long."""
    return x if len(x) == length else F.pad(x, (0, length - len(x)))


def scatter_mean(x: Tensor) -> Tensor:
    """This process's `columns` of the mean over the processes' vectors x (D,)."""
    D, d = len(x), part(len(x))
    mine = x.new_empty(d)
    dist.reduce_scatter_tensor(mine, padded(x, world() * d))
    return mine[: len(range(D)[columns(D)])].div_(world())


def gather(mine: Tensor, D: int) -> Tensor:
    """The vector (D,) whose `columns` the processes hold."""
    whole = mine.new_empty(world() * part(D))
    dist.all_gather_into_tensor(whole, padded(mine, part(D)))
    return whole[:D]


# ------------------------------------------------------------------------------------------------------- the network


def data_parallel(model: nn.Module) -> nn.Module:
    """The network whose backward pass leaves the mean gradient over the processes; with one process, `model` itself.

    `utils.fit` keeps batch norm's statistics together, so they are not sent around in each forward pass.
    """
    if world() == 1:
        return model
    drawn = any(getattr(module, "draws_on_host", False) for module in model.modules())  # blocks without a gradient
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=drawn)


def share_statistics(model: nn.Module) -> None:
    """Give every process the batch-norm statistics of process 0, which are those of its parts of the mini-batches."""
    for buffer in model.buffers():
        from_first(buffer)
