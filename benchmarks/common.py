"""What the benchmarks share: flags, clock, peak memory, JSON with provenance."""
import contextlib
import ctypes
import gc
import re
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import utils
from dldr.checkpoint import command_line, provenance
from dldr.files import save_json


def parser(doc):
    parser = utils.Parser(doc)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--json", metavar="FILE", help="write everything measured to this file")
    parser.set_defaults(timeout=600)
    return parser


def save(path, device, result):
    """The measurements with command, versions, hardware and git revision; written, if there is a path."""
    result = {"command": command_line(), **result, **provenance(device)}
    if path:
        save_json(Path(path), result)
    return result


def seconds(device, function, *args, **options):
    """Wall-clock seconds of function(*args, **options), its work on the device included, and what it returned."""
    def now():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    result = function(*args, **options)
    return now() - start, result


def reset_peaks(device):
    """Return freed memory to the kernel and reset the peak counters; bytes now held on host and device."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library, or not permitted
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return peaks(device)


def peaks(device):
    """Bytes at most held since `reset_peaks`: of the host (resident), and by torch on the device."""
    host = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]
    return {"host": 1024 * int(host),
            "device": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0}
