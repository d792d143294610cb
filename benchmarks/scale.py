"""What the method costs past one machine, on paper, and whether the formulae behind it hold where they can be measured.

Measured, at each of --points in processes of their own: snapshots that stay in their files are checked by
`load_window` and read twice by `pca_basis`; seconds and peak memory of both. Snapshots are a random walk written to
--scratch (deleted afterwards). Files are dropped from the page cache before either, so the check and the first pass
read from the disk, or from whatever a virtual machine's host keeps of it. Where it fits, the same window is taken in
memory too, and the largest principal angle between the two spans is computed; the points of several processes (gloo)
are compared with the same point of one.

Predicted beside them, from rates measured in the same process before and after (the mean time counts), with b bytes a
number in the files, d = D / processes:

  check, s      files here (n b D: read from the disk, again from the page cache, checksummed; D compared with inf)
  pass 1, s     n b d / rate of mapped files + opening n files per block + 2 n^2 d / float64 rate + n d / to float64
  pass 2, s     the same with 2 n k d, + 4 k d / rate of memory touched for the first time
  check, bytes  b D, one file's tensors, mapped
  basis, bytes  4 k d (P) + --basis-memory / 4, the block, + the float64 chunk and its neighbours

On paper (`plan`): D of --dims, n 81, k 40 on --gpus, from the figures of ASSUMED and the rates measured for the host.

Example:
  python benchmarks/scale.py --scratch /tmp/scale --json results/scale/scale.json --table results/scale/table.md
"""
import argparse
import contextlib
import json
import math
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

import torch
from growth import host_memory, peaks, random_walk, reset_peaks, timed
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import distributed
import runs
import utils
from subspace import SnapshotFiles, is_finite, load_window, pca_basis

CPU = torch.device("cpu")
SHARE = 0.8  # of the memory available that a window in memory may need
PIECE = 2**24  # parameters per tensor of the synthetic network, at most
CHUNK = 2**23  # bytes of a float64 chunk of `differences` on a CPU
# D,n,k,dtype,processes,--basis-memory in GiB; those with the same snapshots follow each other
POINTS = ["1000000,81,40,float32,1,0.25", "11689512,121,40,float32,1,2", "11689512,121,120,float32,4,0.5",
          "25000000,81,40,float32,1,2"]
ASSUMED = {"gpu_bytes": 80e9, "hbm": 3.35e12, "float64": 67e12, "nvlink": 450e9, "infiniband": 50e9, "gpus_per_node": 8,
           "node_read": 10e9, "filesystem_read": 100e9, "bfloat16": 989e12, "efficiency": 0.4, "tokens": 8192}


def point(text):
    """A point of --points."""
    try:
        D, n, k, dtype, processes, memory = text.split(",")
        row = {"D": int(D), "n": int(n), "k": int(k), "dtype": {"float32": "float32", "bfloat16": "bfloat16"}[dtype],
               "processes": int(processes), "memory": int(float(memory) * 2**30)}
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is not D,n,k,float32|bfloat16,processes,GiB") from None
    if not 1 <= row["k"] < row["n"] or 4 * row["n"] * row["D"] <= row["memory"] * row["processes"]:
        raise argparse.ArgumentTypeError(f"{text!r}: k is 1 to n - 1, and the window larger than the memory")
    return row


def parse_args(argv=None):
    description, example = __doc__.strip().split("\n\nExample", 1)
    parser = utils.Parser(description=description, epilog="example" + example,
                          formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", nargs="*", type=point, default=[point(text) for text in POINTS],
                        metavar="D,n,k,DTYPE,PROCESSES,GIB", help=f"what to measure (default: {' '.join(POINTS)})")
    parser.add_argument("--dims", nargs="*", type=int, default=[10**9, 10**10], metavar="D", help="on paper")
    parser.add_argument("--gpus", nargs="*", type=utils.count, default=[8, 64, 256, 1024], metavar="N", help="on paper")
    parser.add_argument("--scratch", default=tempfile.gettempdir(), metavar="DIR", help="where snapshots are written")
    parser.add_argument("--threads", type=utils.count, default=1, metavar="T", help="of each process (default: 1)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", metavar="FILE", help="write everything measured here")
    output.add_argument("--from", dest="source", metavar="FILE", help="measure nothing, make tables from such a file")
    parser.add_argument("--table", metavar="FILE", help="also write the Markdown tables to this file")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)  # what one process of a point does
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------ snapshots


class Flat(nn.Module):
    """A network of D parameters and no layers."""

    def __init__(self, D):
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(torch.zeros(min(PIECE, D - first)), requires_grad=False)
                                      for first in range(0, D, PIECE))


def write_snapshots(directory, D, n, dtype):
    """n state dicts, each a standard normal step from the one before; on the disk when this returns."""
    model, generator = Flat(D), torch.Generator().manual_seed(1)
    paths = [directory / f"{i}.pt" for i in range(n)]
    for path in paths:
        for p in model.parameters():
            p += torch.empty_like(p).normal_(generator=generator)
        with open(path, "wb") as file:
            torch.save({name: p.to(getattr(torch, dtype)) for name, p in model.state_dict().items()}, file)
            file.flush()
            os.fsync(file.fileno())
    return paths


def forget(paths):
    """Drop files from the page cache."""
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ----------------------------------------------------------------------------------------- one process of a point


def rates(paths, D, n, k, dtype):
    """Per second: what this process does of each kind of work behind the predictions (medians of five if not cold)."""
    def median(function, *args):
        return statistics.median(timed(CPU, function, *args)[0] for _ in range(5))

    path = paths[0]
    size, dtype, count = path.stat().st_size, getattr(torch, dtype), min(D, PIECE)
    sample, row = paths[: max(1, 2**28 // size)], torch.zeros(count)

    def read():
        buffer = bytearray(2**22)
        for path in sample:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    def read_mapped():
        for path in sample:
            row.copy_(torch.cat([torch.from_file(str(path), shared=False, size=count, dtype=dtype).float()]))

    found = {}
    for kind, function, amount in (("read", read, size * len(sample)),
                                   ("mapped", read_mapped, count * dtype.itemsize * len(sample))):
        forget(sample)
        found[f"{kind}_cold"] = amount / timed(CPU, function)[0]
        found[f"{kind}_warm"] = amount / median(function)
    values, data = row.to(dtype), bytes(2**25)
    found["checksum"] = len(data) / median(zlib.crc32, data)
    found["finite"] = count / median(lambda: is_finite(values))
    found["open"] = 1 / median(lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    width = CHUNK // (8 * n)
    X, C, block = torch.randn(n, width).double(), torch.randn(k, n).double(), torch.randn(n, 8 * width)
    found["gram"] = 2 * n * n * width / median(lambda: X @ X.T)
    found["lift"] = 2 * n * k * width / median(lambda: C @ X)

    def to_float64():
        for part in block.split(width, dim=1):
            part -= part[0].clone()
            part.double()
    found["to_float64"] = block.numel() / median(to_float64)
    reset_peaks(CPU)
    found["first_touch"] = 2**28 / timed(CPU, lambda: torch.empty(2**26).zero_())[0]
    return found


def watch(files):
    """Lets the passes over `files` be timed: a list of seconds spent reading, and in all, one pair per pass."""
    passes, blocks = [], files.blocks

    def timed_blocks():
        iterator, start, reading = blocks(), time.perf_counter(), 0.0
        while True:
            taken, block = timed(CPU, next, iterator, None)
            reading += taken
            if block is None:
                break
            yield block
        passes.append({"reading": reading, "seconds": time.perf_counter() - start})
    files.blocks = timed_blocks
    return passes


@contextlib.contextmanager
def anonymous_peak():
    """Yields a list that ends with the largest RssAnon seen (memory but mapped files), 50 times a second."""
    peak, end = [0], threading.Event()

    def sample():
        while not end.wait(0.02):
            peak[0] = max(peak[0], host_memory("RssAnon"))
    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        end.set()
        thread.join()


def largest_angle(P, Q, width=2**20):
    """Largest principal angle between the spans of the rows of P and Q (k, d), all processes' columns together."""
    k, d = P.shape
    PP, QQ, PQ = torch.zeros(3, k, k, dtype=torch.float64)
    for p, q in zip(P.split(width, dim=1), Q.split(width, dim=1), strict=True):
        p, q = p.double(), q.double()
        PP += p @ p.T
        QQ += q @ q.T
        PQ += p @ q.T
    PP, QQ, PQ = distributed.total(torch.stack([PP, QQ, PQ]))
    outside = torch.linalg.solve(torch.linalg.cholesky(QQ), QQ - PQ.T @ torch.linalg.solve(PP, PQ))
    outside = torch.linalg.solve(torch.linalg.cholesky(QQ), outside.T)  # of Q's orthonormal rows, beside span(P)
    return math.asin(min(1.0, float(torch.linalg.eigvalsh(outside)[-1].clamp(min=0)) ** 0.5))


def measure(directory, D, n, k, dtype, processes, memory, threads, P_file, save):
    """Seconds, peaks of this process; in memory if `memory` is None. P_file: where P is saved, or compared with."""
    torch.set_num_threads(threads)
    utils.keep_freed_memory()  # as the training scripts do
    distributed.start(CPU, 600)
    directory = Path(directory)
    paths = [directory / f"{i}.pt" for i in range(n)]
    model = Flat(D)
    pca_basis(random_walk(n, 4 * n, CPU), k)  # warm-up
    around = [rates(paths[distributed.rank() :], D, n, k, dtype)]
    row = {"seconds": {}, "memory": {}}

    def phase(name, function, *args, **options):
        if distributed.rank() == 0:
            forget(paths)
        distributed.total(torch.zeros(1))  # all begin together
        before = reset_peaks(CPU)
        with anonymous_peak() as anonymous:
            row["seconds"][name], result = timed(CPU, lambda: function(*args, **options))
        row["memory"][name] = {"before": before["host"], "anonymous": anonymous[0],
                               "whole": peaks(CPU, before)["in_all"]["host"]}
        return result

    row["file_bytes"] = paths[0].stat().st_size
    window = phase("check", load_window, paths, model, memory=memory or math.inf, sharded=processes > 1)
    row["cache_available"] = host_memory("MemAvailable", "/proc/meminfo")
    row["passes"] = watch(window) if isinstance(window, SnapshotFiles) else []
    P, _ = phase("basis", pca_basis, window, k, sharded=processes > 1)
    row["P_bytes"] = P.nbytes
    around.append(rates(paths[distributed.rank() :], D, n, k, dtype))
    row["rates"] = {key: 2 / (1 / around[0][key] + 1 / around[1][key]) for key in around[0]}
    if save:
        torch.save({"P": P}, P_file)
    elif P_file:
        whole = torch.load(P_file, weights_only=True, mmap=True)["P"]
        row["angle"] = largest_angle(whole[:, distributed.columns(D) if processes > 1 else slice(0, D)], P)
    Path(directory / f"row{distributed.rank()}.json").write_text(json.dumps(row))
    distributed.stop()


def in_own_processes(directory, spec, **more):
    """What `measure` finds in each of the point's processes, a list; None if one was killed for want of memory."""
    N = spec["processes"]
    request = json.dumps({**spec, **more, "directory": str(directory), "threads": torch.get_num_threads()})
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    try:
        for rank in range(N):
            env = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(N),
                                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
            children.append(subprocess.Popen([sys.executable, __file__, "--child", request], env=env,
                                             stderr=subprocess.PIPE, text=True))
        for child in children:
            errors = child.communicate()[1]
            if child.returncode:
                raise utils.InputError(f"{spec}: status {child.returncode}, {errors.strip()[-500:]}")
    finally:
        for child in children:
            child.kill()
            child.wait()
    return [json.loads((directory / f"row{rank}.json").read_text()) for rank in range(N)]


def measure_all(specs, scratch):
    """The row of each point in turn."""
    written, saved, before = None, {}, []
    with tempfile.TemporaryDirectory(dir=scratch, prefix="scale-") as folder:
        for spec in specs:
            window = {key: spec[key] for key in ("D", "n", "dtype")}
            directory = Path(folder) / "snapshots"
            if window != written:
                shutil.rmtree(directory, ignore_errors=True)
                directory.mkdir()
                taken, _ = timed(CPU, lambda: write_snapshots(directory, **window))  # noqa: B023 (called here)
                written, saved = window, {}
                print(f"{window}: written in {taken:.3g} s", flush=True)
            file, alone = directory / f"P{spec['k']}", spec["processes"] == 1
            keep = alone and 4 * spec["k"] * spec["D"] < shutil.disk_usage(folder).free / 2
            row = {**spec, "streamed": in_own_processes(directory, spec, P_file=str(file) if keep or spec["k"] in saved
                                                        else None, save=keep)}
            if keep:
                saved[spec["k"]] = file
            need = 4 * spec["D"] * (spec["n"] + spec["k"] + 1)
            done = any(spec | {"memory": 0} == other | {"memory": 0} for other in before)
            before.append(spec)
            if not done and need < SHARE * host_memory("MemAvailable", "/proc/meminfo"):
                row["loaded"] = in_own_processes(directory, {**spec, "memory": None}, save=False,
                                                 P_file=str(file) if spec["k"] in saved else None)
            print(measured_line(row), flush=True)
            yield row


# ------------------------------------------------------------------------------------------------ formulae


def files_checked(n, processes, loaded):
    """Files that the busiest process checks: all if it loads the window, otherwise its share and the first."""
    return n if loaded or processes == 1 else 1 + math.ceil((n - 1) / processes)


def predicted(row, one):
    """Seconds and whole peaks of one process (the formulae above), from its rates and what it held before."""
    D, n, k, rate, file = row["D"], row["n"], row["k"], one["rates"], one["file_bytes"]
    d, b = math.ceil(D / row["processes"]), 2 if row["dtype"] == "bfloat16" else 4
    width = row["memory"] // (16 * n)
    check = files_checked(n, row["processes"], False) * (
        file / rate["read_cold"] + file / rate["read_warm"] + file / rate["checksum"] + D / rate["finite"])
    opening = math.ceil(d / width) * n / rate["open"]
    cached = n * file < one["cache_available"] - 4 * k * d * row["processes"]
    reading = [n * b * d / rate["mapped_cold"] + opening,
               n * b * d / rate["mapped_warm" if cached else "mapped_cold"] + opening]
    arithmetic = [2 * n * n * d / rate["gram"] + n * d / rate["to_float64"],
                  2 * n * k * d / rate["lift"] + n * d / rate["to_float64"] + 4 * k * d / rate["first_touch"]]
    before = {name: one["memory"][name]["before"] for name in ("check", "basis")}
    return {"check": check, "reading": reading, "arithmetic": arithmetic,
            "basis": sum(reading) + sum(arithmetic), "check_bytes": before["check"] + b * D,
            "basis_bytes": before["basis"] + 4 * k * d + 4 * n * min(d, width) + 3 * CHUNK}


def gpu_bytes(D, k, N, method="psgd", sharded=True):
    """Bytes on each of N GPUs in a step, activations left out: w, its gradient, a copy of w, P, and passing vectors.

    The copy is w_start (P-SGD) or w before the step (P-BFGS). Passing: the padded gradient or the gathered step (D),
    and a part of it; P+-BFGS ("pbfgs+") has its momentum, and beside the direction a second lifted vector.
    """
    part = math.ceil(D / N)
    vectors = 3 + (method != "psgd" or sharded) + 2 * (method == "pbfgs+")
    return 4 * (vectors * D + k * (part if sharded else D) + (part if sharded else 0))


def largest_D(k, N, limit=ASSUMED["gpu_bytes"], sharded=True):
    """The D at which P-SGD's step fills a GPU, without any activation."""
    return limit / (gpu_bytes(10**9, k, N, sharded=sharded) / 10**9)


def step_bytes(D, k, N, method="psgd", sharded=True):
    """Bytes that each of N GPUs sends in a step, collectives being rings: (N - 1) / N of a vector is sent per phase.

    Sharded: reduce-scatter and all-gather of D float32, all-reduce (two phases) of k. Whole: the all-reduce only.
    P+-BFGS all-reduces the gradient first and gathers a second lifted vector. Losses of trials are left out.
    """
    vectors = 2 * sharded + (method == "pbfgs+") * (2 + sharded)
    return 4 * (N - 1) / N * (vectors * D + 2 * k)


def plan(D, n, k, N, b=4, memory=2**31, host=None, a=ASSUMED):
    """One column of the table on paper; `host`: rates of a process for checksums, comparison, mapped files."""
    nodes, part = math.ceil(N / a["gpus_per_node"]), math.ceil(D / N)
    loaded, disk = 4 * n * part <= memory, n * b * D
    share = min(a["node_read"] / min(N, a["gpus_per_node"]), a["filesystem_read"] / N)  # bytes per second and process
    found = {"disk": disk, "loaded": loaded, "files_checked": files_checked(n, N, loaded),
             "check_read": nodes * disk if loaded else disk + (nodes - 1) * b * D,
             "basis_read": 0 if loaded else 2 * disk,
             "gram_flops": 2 * n * n * D + 2 * n * k * D,
             "host_bytes": b * D + (4 * n * part if loaded else 0),
             "gpu": gpu_bytes(D, k, N), "gpu_plus": gpu_bytes(D, k, N, "pbfgs+"),
             "gpu_whole_P": gpu_bytes(D, k, N, sharded=False),
             "sharded_w": (16 * D + 4 * k * D) / N,
             "step_bytes": step_bytes(D, k, N)}
    found["arithmetic_s"] = found["gram_flops"] / N / a["float64"] + 2 * n * part * 24 / a["hbm"]
    found["step_memory_s"] = (8 * k * part + 32 * D) / a["hbm"]  # P twice; pad 8, scatter 4, gather 4, add 12, zero 4
    found["step_network_s"] = found["step_bytes"] / (a["nvlink"] if N <= a["gpus_per_node"] else a["infiniband"])
    found["passes_s"] = 6 * D * a["tokens"] / (a["bfloat16"] * a["efficiency"])
    if host:
        found["check_s"] = found["files_checked"] * (
            b * D / (share if not loaded else min(a["node_read"], a["filesystem_read"] / nodes))
            + b * D * (1 / host["checksum"] + 1 / host["read_warm"]) + D / host["finite"])
        found["basis_io_s"] = 0 if loaded else 2 * (n * b * part / min(share, host["mapped_warm"])
                                                    + math.ceil(part / (memory // (16 * n))) * n / host["open"])
    return found


# ------------------------------------------------------------------------------------------------ tables


def worst(rows, *keys):
    """The largest of the processes' values at a path of keys."""
    values = []
    for row in rows:
        for key in keys:
            row = row[key]
        values.append(row)
    return max(values)


def measured_line(row):
    """One row of the table of what was measured: measured / predicted."""
    ones = row["streamed"]
    expected = [predicted(row, one) for one in ones]
    cells = [f"{row['D']:,}", row["n"], row["k"], row["dtype"], row["processes"], f"{row['memory'] / 2**30:.3g}"]

    def pair(measured, wanted, unit=1):
        return f"{measured / unit:.3g} / {wanted / unit:.3g} = {measured / wanted:.2f}"
    cells.append(pair(worst(ones, "seconds", "check"), worst(expected, "check")))
    for i in (0, 1):
        cells.append(pair(worst(ones, "passes", i, "seconds"),
                          max(one["reading"][i] + one["arithmetic"][i] for one in expected)))
    for name in ("check", "basis"):
        cells.append(pair(worst(ones, "memory", name, "whole"), worst(expected, f"{name}_bytes"), 2**30))
    cells.append(f"{(worst(ones, 'memory', 'basis', 'whole') - worst(ones, 'P_bytes')) / 2**30:.2f}")
    loaded = row.get("loaded", [])
    cells += [", ".join(f"{value:.3g}" for value in (
                  worst(loaded, "seconds", "check"), worst(loaded, "seconds", "basis"),
                  worst(loaded, "memory", "basis", "whole") / 2**30)) if loaded else "",
              f"{worst(loaded or ones, 'angle'):.1e}" if "angle" in (loaded or ones)[0] else ""]
    return "| " + " | ".join(map(str, cells)) + " |"


def host_rates(result):
    """Medians over the one-process points' rates."""
    found = [one["rates"] for row in result["points"] if row["processes"] == 1 for one in row["streamed"]]
    return {key: statistics.median(rate[key] for rate in found) for key in found[0]} if found else None


def paper(D, b, gpus, host):
    """The table on paper of one D."""
    plans = [plan(D, 81, 40, N, b, host=host) for N in gpus]
    lines = [f"D = {D:.0e}, {'float32' if b == 4 else 'bfloat16'} snapshots | "
             + " | ".join(f"{N:,} GPUs" for N in gpus)]

    def add(text, value):
        lines.append(text + " | " + " | ".join(value(one) for one in plans))
    add("on disk, TB", lambda p: f"{p['disk'] / 1e12:.3g}")
    add("window at `--basis-memory 2`", lambda p: "loaded" if p["loaded"] else "in files")
    add("files checked by each process", lambda p: f"{p['files_checked']}")
    add("read from the file system: check + basis, TB", lambda p: f"{p['check_read'] / 1e12:.3g} + "
                                                                  f"{p['basis_read'] / 1e12:.3g}")
    if host:
        add("check, s", lambda p: f"{p['check_s']:.3g}")
        add("basis, reading, s", lambda p: f"{p['basis_io_s']:.3g}")
    add("basis, arithmetic, s", lambda p: f"{p['arithmetic_s']:.3g}")
    add("host memory per process, one file read or mapped, GB", lambda p: f"{p['host_bytes'] / 1e9:.3g}")
    add("per GPU: P-SGD or P-BFGS, GB", lambda p: f"{p['gpu'] / 1e9:.3g}" + fits(p["gpu"]))
    add("per GPU: P+-BFGS, GB", lambda p: f"{p['gpu_plus'] / 1e9:.3g}" + fits(p["gpu_plus"]))
    add("per GPU with P whole, P-SGD, GB", lambda p: f"{p['gpu_whole_P'] / 1e9:.3g}" + fits(p["gpu_whole_P"]))
    add("per GPU if w were sharded too (it is not), GB", lambda p: f"{p['sharded_w'] / 1e9:.3g}" + fits(p["sharded_w"]))
    add("sent by each GPU per step, GB", lambda p: f"{p['step_bytes'] / 1e9:.3g}")
    add("step: network, ms", lambda p: f"{1e3 * p['step_network_s']:.3g}")
    add("step: GPU memory traffic, ms", lambda p: f"{1e3 * p['step_memory_s']:.3g}")
    add("the network's own passes, ms", lambda p: f"{1e3 * p['passes_s']:.3g}")
    lines.insert(1, "--- | " + " | ".join(["--:"] * len(gpus)))
    return "\n".join(f"| {line} |" for line in lines)


def fits(size):
    return r"\*" if size > ASSUMED["gpu_bytes"] else ""


def table(result, dims, gpus):
    """All tables, Markdown."""
    lines = ["| D | n | k | snapshots | processes | basis memory, GiB | check, s | pass 1, s | pass 2, s "
             "| check, peak GiB | basis, peak GiB | without P | in memory: load s, basis s, peak GiB | angle |",
             "|--:|--:|--:|---|" + "--:|" * 10, *map(measured_line, result["points"]), "",
             "Measured / predicted = ratio; peaks are the whole process's (its resident set at most, the network and "
             "mapped pages of files included), of the worst process."]
    host = host_rates(result)
    if host:
        lines += ["", "Rates of one process, medians over the points of one process: " + ", ".join(
            f"{key.replace('_', ' ')} {value / (1 if key == 'open' else 1e9):.3g}{'' if key == 'open' else ' G'}/s"
            for key, value in host.items()) + "."]
    hardware = result["hardware"]
    lines += ["", f"{hardware['cpu']}, {hardware['cores']} cores, threads per process: {hardware['threads']}, "
              f"torch {result['versions']['torch']}."]
    for D in dims:
        for b in (4, 2):
            lines += ["", paper(D, b, gpus, host)]
    lines += ["", r"\* over a GPU's 80 GB.", "", "| GPUs | largest D, P sharded | largest D, P whole |",
              "|--:|--:|--:|"]
    lines += [f"| {N:,} | {largest_D(40, N):.3g} | {largest_D(40, N, sharded=False):.3g} |" for N in gpus]
    return "\n".join(lines) + "\n"


def main(args):
    if args.child:
        measure(**args.child)
        return
    for path in (args.scratch, *(Path(path).parent for path in (args.json, args.table) if path)):
        Path(path).mkdir(parents=True, exist_ok=True)
    if args.source:
        if (result := runs.load_json(Path(args.source))) is None:
            raise utils.InputError(f"--from {args.source}: there is no such file")
    else:
        torch.set_num_threads(args.threads)
        result = {"command": runs.command_line(), "points": [], "assumed": ASSUMED, "versions": runs.versions(),
                  "hardware": runs.hardware(CPU), "git_revision": runs.git_revision()}
        for row in measure_all(args.points, args.scratch):
            result["points"].append(row)
            if args.json:  # after each, lest a later one should fail
                runs.save_json(Path(args.json), result)
    text = table(result, args.dims, args.gpus)
    print(text, end="")
    if args.table:
        runs.write_atomically(Path(args.table), text.encode())


if __name__ == "__main__":
    utils.run_script(parse_args, main)
