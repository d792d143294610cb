"""The device, and how torch computes on it."""
import contextlib
import ctypes
import os
import random
import re
import warnings
from glob import glob

import numpy as np
import torch

from dldr import distributed
from dldr.errors import UserError


def pick_device(name):
    """torch.device for --device; raises UserError for one that this machine does not have or that torch cannot use."""
    try:
        device = torch.device("cuda" if name == "auto" else name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: not one of auto, cpu, cuda, cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    index = device.index or 0
    if distributed.launched() > 1:
        if device.index is not None:
            raise UserError(f"--device {name}: each process of several has a GPU of its own; use auto or cuda")
        index = int(os.environ.get("LOCAL_RANK", 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of several lines
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0  # else it counts unusable ones too
        if found and index >= found:
            raise UserError(f"--device {name}: no device {index}, {found} found; use --device auto or fewer processes")
        reason = unusable(index)
    if reason:
        raise UserError(f"--device {name}: torch {torch.__version__} cannot use the GPU of this machine: {reason}; "
                        "install a build of torch that can (docs/install.md), or use --device cpu")
    if not found and name != "auto":
        raise UserError(f"--device {name}: no CUDA device found; use --device cpu")
    return torch.device("cuda", index) if found else torch.device("cpu")


def unusable(index):
    """Why torch cannot use GPU `index` of this machine, in a few words; None if it can, or if there is none to use."""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(index)
        built = re.findall(r"\b(sm|compute)_(\d+)(\d)", " ".join(torch.cuda.get_arch_list()))  # none: ROCm
        runs = [(kind, a, b) for kind, a, b in built  # PTX runs on what is newer, a binary on its own generation
                if (int(a), int(b)) <= (major, minor) and (kind == "compute" or int(a) == major)]
        return f"it is of compute capability {major}.{minor}, not in this build" if built and not runs else None
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1", "NoDevFiles")
    if hidden or not any(os.access(path, os.R_OK | os.W_OK) for path in glob("/dev/nvidia[0-9]*")):
        return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # the driver is too old, a build without CUDA, ...
        return re.split(r"\.\s", str(error))[0]


def set_up(device="auto", seed=1, *, deterministic=False, conv_tf32=False, timeout=600):
    """Seed torch, numpy and Python for the initial weights, set TF32, cuDNN and determinism flags; returns the device.

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
    np.random.seed(seed)
    random.seed(seed)
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
