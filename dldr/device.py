"""The device, and how torch computes on it."""
import contextlib
import ctypes
import os

import torch

from dldr import distributed
from dldr.errors import UserError


def pick_device(name):
    """torch.device for --device; raises UserError for one that this machine does not have."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: not one of auto, cpu, cuda, cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    if device.index is not None and distributed.launched() > 1:
        raise UserError(f"--device {name}: each process of a distributed run has a GPU of its own; use auto or cuda")
    index = distributed.local_rank() if device.index is None else device.index
    found = torch.cuda.device_count()
    if index >= found:
        raise UserError(f"--device {name}: no CUDA device found; use --device cpu" if not found else
                        f"--device {name}: no device {index}, {found} found; use --device auto or fewer processes")
    return torch.device("cuda", index)


def set_up(device="auto", seed=1, *, deterministic=False, conv_tf32=False, timeout=600):
    """Seed torch for the initial weights, set TF32, cuDNN and determinism flags; returns the device.

    device: "auto", "cpu", "cuda" or "cuda:N"; timeout: of the process group (s).
    """
    torch.set_float32_matmul_precision("highest")  # products with P: TF32 would cost 4e-4 relative error
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # NaN into every new tensor doubles the kernels
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.benchmark_limit = 3  # of some 40 plans, which take 3 to 15 s
    torch.backends.cudnn.allow_tf32 = conv_tf32
    torch.manual_seed(seed)
    device = pick_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init(device, timeout)
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # graphs are not captured on the default stream
    else:
        keep_freed_memory()
    return device


def keep_freed_memory():
    """Let glibc keep the activations that a step frees for the next one, in place of returning them to the kernel.

    Faulting them in again took half of a step: ResNet-20 at batch 1024 on two cores, 2.4 s, and 1.2 s without it.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: whose top is never given back
