"""Training on several processes that torchrun has started: one for each GPU (NCCL), or on CPUs (gloo).

    torchrun --nproc_per_node=4 train_sgd.py ...

Without torchrun every function is a no-op: the world size is 1, the rank 0, and a reduced tensor the tensor itself.

Each mini-batch is split (`share`), and with it the gradient, a sum over samples; the columns of the snapshots and of
the basis may be sharded (`columns`). The network, its parameters as a vector and everything k-dimensional are
replicated: all ranks take the same steps, since what decides them is reduced first and has the same bits everywhere.
"""
import contextlib
import datetime
import inspect
import os
import sys
import zlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dldr.errors import UserError
from dldr.subspace import Basis, ProjectedBFGS

# -------------------------------------------------------------------------------------------------- process group


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Rank (also before `init`); rank 0 writes the files and prints."""
    return int(os.environ.get("RANK", 0)) if launched() > 1 else 0


def launched() -> int:
    """Number of processes torchrun has started, whose group need not be initialised yet; 1 without it.

    Raises UserError if the environment is not as torchrun leaves it.
    """
    size, rank, port = (os.environ.get(*pair) for pair in (("WORLD_SIZE", "1"), ("RANK", ""), ("MASTER_PORT", "")))
    if size == "1":
        return 1
    numbers = [size, rank, port, os.environ.get("LOCAL_RANK", "0")]
    if not (all(x.isdecimal() and len(x) < 10 for x in numbers) and int(rank) < int(size) and 0 < int(port) < 2**16
            and os.environ.get("MASTER_ADDR")):
        raise UserError(f"the environment has WORLD_SIZE={size} without a valid RANK, LOCAL_RANK, MASTER_ADDR and "
                        "MASTER_PORT: start with torchrun, or unset it")
    return int(size)


def note(text: str, kind: str = "note") -> None:
    """Print a line to standard error, on rank 0."""
    if rank() == 0:
        print(f"{kind}: {text}", file=sys.stderr, flush=True)


def init(device: torch.device, timeout: float) -> None:
    """Initialise the process group, if torchrun started several processes, with this timeout in seconds.

    Standard output of ranks other than 0 is dropped.
    """
    if launched() == 1 or dist.is_initialized():
        return
    cuda = device.type == "cuda"
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store(timeout), world_size=launched(),
                            rank=int(os.environ["RANK"]), timeout=datetime.timedelta(seconds=timeout),
                            device_id=device if cuda else None)
    if rank():
        sys.stdout = open(os.devnull, "w")


def destroy() -> None:
    if dist.is_initialized():
        dist.barrier()  # without it torch 2.4 hangs in the next line now and then (gloo)
        dist.destroy_process_group()


STORE = []  # one, or None, once it has been looked for


def store(timeout: float = 5) -> dist.Store | None:
    """torchrun's store, which outlives each of its processes; the first call waits for it so many seconds.

    Raises RuntimeError if it does not come; later calls return None.
    """
    if not STORE:
        STORE.append(None)
        STORE[0] = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=timeout)))[0]
    return STORE[0]


def first_to_fail() -> bool:
    """Whether no other process has called this before, so that an error is printed once, where it began."""
    try:
        return launched() == 1 or (found := store()) is None or found.add("failed", 1) == 1
    except (UserError, RuntimeError):  # an odd environment; or the store has gone with torchrun
        return True


@contextlib.contextmanager
def rank0_first():
    """Run on rank 0 first, then on the others: what it downloads is there for them."""
    if rank():
        all_reduce_max(0)
    yield
    if rank() == 0:
        all_reduce_max(0)


# ------------------------------------------------------------------------------------------------------- collectives


def all_reduce(x: Tensor) -> Tensor:
    """x, in place the sum over the ranks."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_reduce_max(number: int) -> int:
    """The largest number of all ranks."""
    if world_size() == 1:
        return number
    x = torch.tensor(number)
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return int(x)


def agree(value) -> bool:
    """Whether `value`, numbers and strings in dicts or lists, is the same on all ranks."""
    number = zlib.crc32(repr(value).encode())
    return all_reduce_max(number) == -all_reduce_max(-number)


def broadcast(x: Tensor) -> Tensor:
    """x, in place that of rank 0."""
    if world_size() > 1:
        dist.broadcast(x, 0)
    return x


def reduce_scatter(x: Tensor) -> Tensor:
    """This rank's `columns` of the sum over the ranks' vectors x (D,)."""
    D, d = len(x), columns_per_rank(len(x))
    mine = x.new_empty(d)
    dist.reduce_scatter_tensor(mine, padded(x, world_size() * d))
    return mine[: len(range(D)[columns(D)])]


def all_gather(mine: Tensor, D: int) -> Tensor:
    """The vector (D,) whose `columns` the ranks hold."""
    d = columns_per_rank(D)
    whole = mine.new_empty(world_size() * d)
    dist.all_gather_into_tensor(whole, padded(mine, d))
    return whole[:D]


def padded(x: Tensor, length: int) -> Tensor:
    """x with zeros up to `length`; x itself, not a copy as of F.pad, if it is that long."""
    return x if len(x) == length else F.pad(x, (0, length - len(x)))


def share(first: int, last: int) -> tuple[int, int]:
    """This rank's part of the range first ... last - 1; the parts of all ranks are disjoint and make it up."""
    size = last - first
    return first + size * rank() // world_size(), first + size * (rank() + 1) // world_size()


def columns_per_rank(D: int) -> int:
    """Length of a rank's part of a vector (D,); the last ones may be shorter, or empty."""
    return -(-D // world_size())


def columns(D: int) -> slice:
    """This rank's part of a vector (D,), or of the columns of a matrix."""
    return slice(min(D, rank() * columns_per_rank(D)), min(D, (rank() + 1) * columns_per_rank(D)))


# ------------------------------------------------------------------------------------------------------- the network


def data_parallel(model: nn.Module) -> nn.Module:
    """DistributedDataParallel whose gradients are summed over the ranks (not averaged); one process: `model` itself.

    Buffers are not sent around in each forward pass: `broadcast_buffers` does it once an epoch.
    """
    if world_size() == 1:
        return model
    partly_used = any(getattr(module, "draws_on_host", False) or getattr(module, "unused_parameters", False)
                      for module in model.modules())
    ddp = nn.parallel.DistributedDataParallel
    newer = "forward_sync_buffers" in inspect.signature(ddp).parameters  # its name from torch 2.15 on, or before
    network = ddp(model, find_unused_parameters=partly_used,
                  **{"forward_sync_buffers" if newer else "broadcast_buffers": False})
    network.register_comm_hook(None, sum_gradients)
    return network


def sum_gradients(_, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda future: future.value()[0])


def broadcast_buffers(model: nn.Module) -> None:
    """Give all ranks the batch-norm statistics of rank 0, which are those of its parts of the mini-batches."""
    for buffer in model.buffers():
        broadcast(buffer)


# --------------------------------------------------------------------------------------------------------- the bases
#
# The parameters' gradients are those of a rank's own part of the mini-batch. P is replicated (a step reduces k numbers)
# or sharded (memory and reading of P shrink by the world size, but a step also reduce-scatters a gradient and
# all-gathers a step of D numbers).


class ReplicatedBasis(Basis):
    """P (k, D) whole on every rank."""

    def project(self, gradient: Tensor) -> Tensor:
        return all_reduce(self.P @ gradient)

    def residual(self, gradient: Tensor, g: Tensor) -> Tensor:
        return all_reduce(gradient) - self.lift(g)


class ShardedBasis(ReplicatedBasis):
    """P (k, d): this rank's `columns` of a basis of D parameters."""

    def __init__(self, P: Tensor, D: int):
        super().__init__(P)
        self.D = D

    def project(self, gradient: Tensor) -> Tensor:
        return all_reduce(self.P @ reduce_scatter(gradient))

    def lift(self, s: Tensor) -> Tensor:
        return all_gather(self.P.T @ s, self.D)


def distribute(P: Tensor, D: int, sharded: bool) -> Tensor | Basis:
    """P (k, D), or if sharded this rank's columns of it, as the optimisers take it; P itself on one process."""
    if world_size() == 1:
        return P
    return ShardedBasis(P, D) if sharded else ReplicatedBasis(P)


class DistributedBFGS(ProjectedBFGS):
    """P-BFGS with the direction of rank 0 on all ranks: different CPUs may round the algebra of B differently."""

    def direction(self, g: Tensor) -> tuple[Tensor, float]:
        d, slope = super().direction(g)
        broadcast(message := torch.cat([d, d.new_tensor([slope])]))
        return message[:-1], float(message[-1])
