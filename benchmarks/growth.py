"""How the cost of the method's own work grows with D parameters, n snapshots and k components.

Three sweeps: D over the networks of --dims (n 81, k 40), n over --snapshots (k 20) and k over --components (n 121), both
at the D of --base-dim. Measured at each point, in a process of its own: seconds and peak extra memory, on the host and
on the device, of `pca_basis` and of one P-SGD and one P-BFGS iteration without the network's passes: the trial loss is a
constant that the search accepts at once. The window is a random walk made in place, its making not timed; every single
time is kept, medians are shown. On CUDA no step is recorded as a graph, so that the launches of its kernels count.
Points that need more than 60% of the memory available are skipped, and listed as such. Run it on an idle machine.

Predicted beside them, from two rates measured in the same process (the best of five: `sum` of 512 MiB, on CUDA 2 GiB;
a float64 product of square matrices of 1024, on CUDA 4096, rows):

  basis, seconds    (2 n^2 D + 2 n k D) / float64 rate     Gram matrix, then P = coefficients (k, n) @ window (n, D)
  step, seconds     2 k D 4 bytes / memory bandwidth       P is read twice: P grad, then P^T times a k-vector
  basis, memory     n D 4 bytes                            the window
  step, memory      k D 4 bytes                            P

The predictions of memory leave out the copy of P (k D 4 bytes) by which the basis hands the window's other rows back,
its float64 chunks (tens of MB), and what stands beside P in a step: w, its gradient and one or two more vectors.
Where P fits in the largest cache a step may beat its prediction: such points are hollow in the figure and starred in
the table. Host memory beside a CUDA device is the process's growth, whatever the driver adds included.

Example:
  python benchmarks/growth.py --json results/cost-growth/growth.json --table results/cost-growth/table.md --figure results/cost-growth/figure.png
  python benchmarks/growth.py --from results/cost-growth/growth.json --figure results/cost-growth/figure.png
"""  # noqa: E501 (a command to copy)
import argparse
import contextlib
import ctypes
import gc
import io
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import models
import runs
import utils
from report import STYLES
from subspace import ProjectedBFGS, ProjectedSGD, pca_basis

SHARE = 0.6  # of the memory available that a point may need
FIXED = {"D": (81, 40), "n": 20, "k": 121}  # (n, k), k, n
AXES = {"D": "parameters D (n = {n}, k = {k})", "n": "snapshots n (D = {D:,}, k = {k})",
        "k": "components k (D = {D:,}, n = {n})"}
METHODS = {"basis": ("basis", "#009E73"), "psgd": STYLES["psgd"], "pbfgs": STYLES["pbfgs"]}


def parse_args(argv=None):
    description, example = __doc__.strip().split("\n\nExample", 1)
    parser = utils.Parser(
        description=description, epilog="example" + example, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dims", nargs="*", metavar="D", help="networks (10 classes) or numbers of parameters",
                        default=["resnet8", "resnet20", "resnet56", "mobilenet", "resnet18", "resnet50"])
    parser.add_argument("--snapshots", nargs="*", type=utils.count, metavar="N", help="numbers of snapshots, over 20",
                        default=[21, 41, 81, 121, 161, 241])
    parser.add_argument("--components", nargs="*", type=utils.count, metavar="K", help="dimensions, up to 120",
                        default=[10, 20, 40, 80, 120])
    parser.add_argument("--base-dim", default="resnet56", metavar="D",
                        help="network or number of parameters where n and k grow (default: resnet56)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", metavar="FILE", help="write everything measured here")
    output.add_argument("--from", dest="source", metavar="FILE",
                        help="measure nothing, make table and figure from such a file")
    parser.add_argument("--table", metavar="FILE", help="also write the Markdown table to this file")
    parser.add_argument("--figure", metavar="FILE", help="draw the figure to this file (.png, .svg or .pdf)")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)  # what the process of one point measures
    args = parser.parse_args(argv)
    if any(n <= FIXED["n"] for n in args.snapshots) or any(k >= FIXED["k"] for k in args.components):
        parser.error(f"--snapshots are more than {FIXED['n']}, --components fewer than {FIXED['k']}")
    return args


def parameters(dim):
    """(network or "", number of parameters) of a --dims value."""
    if dim.isdecimal():
        return "", int(dim)
    with torch.device("meta"):  # shapes only
        model = models.get_model(dim, 10)
    return dim, sum(p.numel() for p in model.parameters())


def points(args):
    """The rows to measure: network, D, n, k and the sweeps they belong to; a point of two sweeps once."""
    base = parameters(args.base_dim)
    sweeps = {"D": [(*parameters(dim), *FIXED["D"]) for dim in args.dims],
              "n": [(*base, n, FIXED["n"]) for n in args.snapshots],
              "k": [(*base, FIXED["k"], k) for k in args.components]}
    found = {}
    for sweep, members in sweeps.items():
        for point in members:
            found.setdefault(point, []).append(sweep)
    return [{"network": network, "D": D, "n": n, "k": k, "sweeps": names}
            for (network, D, n, k), names in found.items()]


# ------------------------------------------------------------------------------------- in the process of one point


def host_memory(field, file="/proc/self/status"):
    """Bytes: VmRSS, held by this process now; VmHWM, at most since `reset_peaks`; MemAvailable of /proc/meminfo.

    getrusage's ru_maxrss will not do: a process starts with its parent's, and it cannot be reset.
    """
    return 1024 * int(re.search(rf"^{field}:\s+(\d+)", Path(file).read_text(), re.MULTILINE)[1])


def reset_peaks(device):
    """Give freed memory back to the kernel, let peaks count from here; bytes now held on host and device."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # not permitted: the peak is the whole process's
        Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return {"host": host_memory("VmRSS"),
            "device": torch.cuda.memory_allocated(device) if device.type == "cuda" else 0}


def peaks(device, before):
    """Bytes at most held since `reset_peaks`, beyond `before` and in all: of the host, and by torch on the device."""
    peak = {"host": host_memory("VmHWM"),
            "device": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0}
    return {**{place: max(0, peak[place] - before[place]) for place in peak}, "in_all": peak}


def timed(device, function, *args):
    """Wall-clock seconds of function(*args), its work on the device included, and what it returned."""
    def now():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    result = function(*args)
    return now() - start, result


def rates(device):
    """Bytes per second that are read from memory, and float64 operations per second of a matrix product."""
    buffer = torch.ones(2**29 if device.type == "cuda" else 2**27, device=device)
    A = torch.randn(*[4096 if device.type == "cuda" else 1024] * 2, dtype=torch.float64, device=device)
    return {"bytes_per_second": buffer.nbytes / min(timed(device, buffer.sum)[0] for _ in range(5)),
            "float64_per_second": 2 * len(A) ** 3 / min(timed(device, torch.mm, A, A)[0] for _ in range(5))}


def cache_bytes(device):
    """Size of the largest cache; None if the machine does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.strip().removesuffix("K")) * 1024 for size in sizes), default=None)


def random_walk(n, D, device):
    """A window (n, D), float32: each row a standard normal step from the one before. Nothing as large beside it."""
    window = torch.empty(n, D, device=device).normal_(generator=torch.Generator(device).manual_seed(1))
    for i in range(1, n):
        window[i] += window[i - 1]
    return window


def measure_steps(optimizer, arguments, device, repeats=7):
    """Seconds of each optimizer.step(*arguments). Two are not counted: P-BFGS updates B from the second on.

    Halving the gradient in between keeps y^T s > 0 (y = -g / 2, s = -B g), so no update is skipped.
    """
    times = []
    for _ in range(2 + repeats):
        times.append(timed(device, optimizer.step, *arguments)[0])
        optimizer.w.grad.mul_(0.5)
    return times[2:]


def measure(D, n, k, device, threads):
    """All that is measured at one point, or {"skipped": why}."""
    torch.set_num_threads(threads)
    device = utils.pick_device(device)
    if device.type == "cpu":
        utils.keep_freed_memory()  # as the training scripts do
    need = 4 * D * (n + k + 4)
    available = (torch.cuda.mem_get_info(device)[0] if device.type == "cuda"
                 else host_memory("MemAvailable", "/proc/meminfo"))
    if need > SHARE * available:
        return {"skipped": f"needs {need / 1e9:.1f} GB, over {SHARE:.0%} of the {available / 1e9:.1f} GB available"}
    pca_basis(random_walk(n, 4 * n, device), k)  # warm-up
    row = {**rates(device), "cache_bytes": cache_bytes(device), "seconds": {}, "memory": {}}

    before, times = reset_peaks(device), []
    while len(times) < 5 and sum(times) < 2:
        P = None  # of the time before
        window = random_walk(n, D, device)
        taken, (P, _) = timed(device, pca_basis, window, k)
        del window
        if not times:
            row["memory"]["basis"] = peaks(device, before)
        times.append(taken)
    row["seconds"]["basis"] = times

    w, accept = torch.zeros(D, device=device), torch.tensor(-1e30, device=device)  # below any Armijo bound
    for method, make, arguments in (("psgd", ProjectedSGD, ()), ("pbfgs", ProjectedBFGS, (0.0, lambda: accept))):
        optimizer = None  # the one before, with its vectors
        w.grad = torch.randn(D, device=device, generator=torch.Generator(device).manual_seed(2))
        reset_peaks(device)
        optimizer = make(w, P)
        row["seconds"][method] = measure_steps(optimizer, arguments, device)
        row["memory"][method] = peaks(device, before)
    row["search"] = {key: value for key, value in optimizer.statistics().items() if key != "theta"}
    return row


def in_own_process(row, device):
    """The row with what a fresh process measures there added."""
    request = {key: row[key] for key in ("D", "n", "k")} | {"device": str(device), "threads": torch.get_num_threads()}
    child = subprocess.run([sys.executable, __file__, "--point", json.dumps(request)], capture_output=True, text=True)
    if child.returncode == -9:
        return {**row, "skipped": "killed by the kernel, for want of memory"}
    if child.returncode:
        raise utils.InputError(f"D {row['D']}, n {row['n']}, k {row['k']}: status {child.returncode}, "
                               f"{child.stderr.strip()[-500:]}")
    return row | json.loads(child.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------------ table and figure


def predicted(row):
    """Seconds and bytes of basis and step (the formulae above)."""
    D, n, k = row["D"], row["n"], row["k"]
    step = {"seconds": 2 * k * D * 4 / row["bytes_per_second"], "bytes": k * D * 4}
    basis = {"seconds": (2 * n * n * D + 2 * n * k * D) / row["float64_per_second"], "bytes": n * D * 4}
    return {"basis": basis, "psgd": step, "pbfgs": step}


def in_cache(row):
    return 4 * row["k"] * row["D"] < (row["cache_bytes"] or 0)


def table(result):
    """A Markdown table, one row per point, with notes on rates, cache and what was skipped."""
    where = "device" if result["hardware"]["device"] == "cuda" else "host"
    lines = [f"| network | D | n | k | basis, s | P-SGD step, ms | P-BFGS step, ms | basis, {where} GB "
             f"| P-SGD, {where} GB | P-BFGS, {where} GB |" + (" basis, host GB |" if where == "device" else ""),
             "|---" + "|--:" * (10 if where == "device" else 9) + "|"]
    done = [row for row in result["points"] if "skipped" not in row]
    for row in done:
        expected, cells = predicted(row), []
        for method, unit in (("basis", 1), ("psgd", 1e-3), ("pbfgs", 1e-3)):
            star = r"\*" if in_cache(row) and method != "basis" else ""
            cells.append(f"{statistics.median(row['seconds'][method]) / unit:.3g} / "
                         f"{expected[method]['seconds'] / unit:.3g}{star}")
        cells += [f"{row['memory'][method][where] / 1e9:.3g} / {expected[method]['bytes'] / 1e9:.3g}"
                  for method in METHODS]
        if where == "device":
            cells.append(f"{row['memory']['basis']['host'] / 1e9:.3g}")
        lines.append(f"| {row['network']} | {row['D']:,} | {row['n']} | {row['k']} | " + " | ".join(cells) + " |")
    lines += ["", "Measured (median) / predicted; memory is the peak beyond what the process held before."]
    if done:
        read, float64 = ("{:.3g} to {:.3g}".format(*(end(row[key] for row in done) / 1e9 for end in (min, max)))
                         for key in ("bytes_per_second", "float64_per_second"))
        lines.append(f"Rates behind the predictions: {read} GB/s read, {float64} GFLOP/s in float64.")
    if any(in_cache(row) for row in done):
        lines.append(f"\\* P fits in the largest cache ({done[0]['cache_bytes'] / 2**20:g} MiB).")
    lines += [f"Skipped: D {row['D']:,}, n {row['n']}, k {row['k']}: {row['skipped']}."
              for row in result["points"] if "skipped" in row]
    return "\n".join([*lines, f"{machine(result)}, torch {result['versions']['torch']}."]) + "\n"


def machine(result):
    """Processor or GPU, and threads, as text."""
    hardware = result["hardware"]
    return f"{hardware['gpu'] or hardware['cpu']}, {hardware['threads']} thread{'s' * (hardware['threads'] > 1)}"


def figure(result, path):
    """Seconds (above) and peak extra memory (below) against D, n and k: measured solid, predicted dashed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    cuda = result["hardware"]["device"] == "cuda"
    where = "device" if cuda else "host"
    done = [row for row in result["points"] if "skipped" not in row]
    sweeps = [sweep for sweep in AXES if any(sweep in row["sweeps"] for row in done)]
    fig = Figure(figsize=(9, 5.8), layout="constrained")
    panels = fig.subplots(2, max(1, len(sweeps)), sharex="col", sharey="row", squeeze=False)
    for sweep, (above, below) in zip(sweeps, panels.T, strict=False):
        rows = sorted((row for row in done if sweep in row["sweeps"]), key=lambda row: row[sweep])
        x, expected = [row[sweep] for row in rows], [predicted(row) for row in rows]
        cached = [i for i, row in enumerate(rows) if in_cache(row)]
        for method, (text, colour) in METHODS.items():
            taken = [statistics.median(row["seconds"][method]) for row in rows]
            memory = [row["memory"][method][where] / 1e9 for row in rows]
            above.plot(x, taken, color=colour, marker="o", markersize=4, label=text)
            below.plot(x, memory, color=colour, marker="o", markersize=4)
            if method != "basis":
                above.plot([x[i] for i in cached], [taken[i] for i in cached], "o", color=colour, markersize=4,
                           markerfacecolor="white")
            if method != "psgd":  # both methods' steps have one prediction
                style = {"color": colour if method == "basis" else "#000000", "linestyle": "--", "linewidth": 1.2}
                text = f"{text if method == 'basis' else 'step'}, predicted"
                above.plot(x, [value[method]["seconds"] for value in expected], label=text, **style)
                below.plot(x, [value[method]["bytes"] / 1e9 for value in expected], **style)
        if cuda:
            below.plot(x, [row["memory"]["basis"]["host"] / 1e9 for row in rows], color="#999999", marker=".",
                       label="basis, host")
        below.set_xlabel(AXES[sweep].format(**rows[0]), fontsize=9)
        for axes in (above, below):
            axes.set(xscale="log", yscale="log")
            axes.grid(alpha=0.3)
            axes.tick_params(labelsize=8)
            if sweep != "D":
                axes.set_xticks(x, [str(value) for value in x])
                axes.xaxis.set_minor_locator(NullLocator())
    panels[0, 0].set_ylabel("seconds", fontsize=9)
    panels[1, 0].set_ylabel(f"peak extra memory, {where} (GB)", fontsize=9)
    handles = {text: handle for axes in panels[:, 0]
               for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    if any(in_cache(row) for row in done):
        handles["P fits in the cache"] = panels[0, 0].plot([], [], "o", color="#000000", markerfacecolor="white",
                                                           markersize=4)[0]
    fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    fig.suptitle(machine(result), fontsize=10)
    image = io.BytesIO()
    fig.savefig(image, dpi=150, format=Path(path).suffix[1:] or None)
    runs.write_atomically(Path(path), image.getbuffer())


def main(args):
    if args.point:
        print(json.dumps(measure(**args.point)))
        return
    if args.source:
        if (result := runs.load_json(Path(args.source))) is None:
            raise utils.InputError(f"--from {args.source}: there is no such file")
    else:
        device, rows = utils.pick_device(args.device), []
        for point in points(args):
            row = in_own_process(point, device)
            rows.append(row)
            took = {METHODS[name][0]: f"{statistics.median(times):.4g} s" for name, times in
                    row.get("seconds", {}).items()}
            print(f"D {row['D']:,}, n {row['n']}, k {row['k']}:", row.get("skipped", took), flush=True)
        result = {"command": runs.command_line(), "points": rows, "versions": runs.versions(),
                  "hardware": runs.hardware(device), "git_revision": runs.git_revision()}
    for path in (args.json, args.table, args.figure):
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
    if args.json:
        runs.save_json(Path(args.json), result)
    text = table(result)
    print(text, end="")
    if args.table:
        runs.write_atomically(Path(args.table), text.encode())
    if args.figure:
        figure(result, args.figure)


if __name__ == "__main__":
    utils.run_script(parse_args, main)
