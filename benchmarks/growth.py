"""How the cost of the method's own work grows with D parameters, n snapshots and k components.

Measured at each of --points NETWORK,n,k (or D,n,k): seconds and peak extra memory of `pca_basis` and of one P-SGD and
one P-BFGS iteration without the network's passes (the search accepts a constant loss at once), nothing captured as a
CUDA graph. The window is a random walk. With NETWORK,n,k,GIB it is streamed from files under that --basis-memory. Under
torchrun (N processes) P and window are sharded, and rank 0 is shown. Predicted beside them, from two rates measured
just before, with d = D / N:

  basis, seconds    (2 n^2 d + 2 n k d) / float64 rate     Gram matrix, then P = coefficients (k, n) @ window (n, d)
  step, seconds     2 k d 4 bytes / memory bandwidth       P is read twice: P grad, then P^T times a k-vector
  basis, memory     n d 4 bytes                            the window; streamed, a block of GIB / 4 instead
  step, memory      k d 4 bytes                            P

The predictions of memory leave out P beside the window (k d 4 bytes), float64 chunks (tens of MB), and in a step w, its
gradients and a few vectors more. Where P fits in the largest cache (starred) a step may beat its prediction.

Example:
  python benchmarks/growth.py --json results/cost-growth/growth.json > results/cost-growth/table.md
"""
import atexit
import json
import sys
import tempfile
from pathlib import Path
from statistics import median

import common
import torch
from common import seconds

import models
import utils
from dldr import distributed
from dldr.snapshots import load_window
from dldr.subspace import ProjectedBFGS, ProjectedSGD, pca_basis

POINTS = [*(f"{name},81,40" for name in ("resnet8", "resnet20", "resnet56", "mobilenet", "resnet18", "resnet50")),
          *(f"resnet56,{n},20" for n in (21, 41, 81, 121, 161, 241)), *(f"resnet56,121,{k}" for k in (10, 40, 80, 120))]
METHODS = {"basis": 1, "psgd": 1e3, "pbfgs": 1e3}  # s, ms, ms


def point(text):
    network, n, k, gib = (text + ",0" * (text.count(",") == 2)).split(",")
    with torch.device("meta"):  # shapes only
        D = int(network) if network.isdecimal() else sum(p.numel() for p in models.get_model(network, 10).parameters())
    return {"network": network, "D": D, "n": int(n), "k": int(k), "gib": float(gib)}


def parse_args(argv=None):
    parser = common.parser(__doc__)
    parser.add_argument("--points", nargs="*", type=point, default=list(map(point, POINTS)), help="what to measure")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="only print the table of such a file")
    return parser.parse_args(argv)


def rates(device):
    """Bytes read per second, float64 operations of a product per second, and the size of the largest cache."""
    cuda = device.type == "cuda"
    buffer = torch.ones(2**29 if cuda else 2**27, device=device)
    A = torch.randn(*[4096 if cuda else 1024] * 2, dtype=torch.float64, device=device)
    caches = [int(path.read_text().strip().removesuffix("K")) * 1024
              for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return {"bytes_per_second": buffer.nbytes / min(seconds(device, buffer.sum)[0] for _ in range(5)),
            "float64_per_second": 2 * len(A) ** 3 / min(seconds(device, torch.mm, A, A)[0] for _ in range(5)),
            "cache_bytes": torch.cuda.get_device_properties(device).L2_cache_size if cuda else max(caches, default=0)}


def measure(device, D, n, k, gib, **_):
    """All that is measured at one point."""
    pca_basis(torch.randn(n, 4 * n, device=device), k)  # warm-up
    row, times, sharded = {**rates(device), "seconds": {}, "memory": {}}, [], distributed.world_size() > 1
    model = torch.nn.ParameterList([torch.zeros(D, device=device)])
    paths = [Path(tempfile.gettempdir(), f"growth{i}.pt") for i in range(n)]  # on rank 0's machine, TMPDIR moves them

    def clear():
        for path in paths if distributed.rank() == 0 else ():
            path.unlink(missing_ok=True)

    atexit.register(clear)
    for path in paths if gib and distributed.rank() == 0 else ():
        model[0].data += torch.randn_like(model[0])
        torch.save(model.state_dict(), path)
    distributed.all_reduce_max(0)  # the files are there

    def extra():
        return {place: max(0, peak - before[place]) for place, peak in common.peaks(device).items()}

    def make_window():
        if gib:
            return load_window(paths, model, device, memory=2**30 * gib, sharded=sharded)
        window = torch.empty(n, len(range(D)[distributed.columns(D)]), device=device).normal_()
        for i in range(1, n):
            window[i] += window[i - 1]
        return window

    before = common.reset_peaks(device)
    while len(times) < 5 and sum(times) < 2:
        window = P = None  # of the time before
        row["seconds"]["window"], window = seconds(device, make_window)
        taken, (P, _) = seconds(device, pca_basis, window, k, group=distributed if sharded else None)
        row["memory"].setdefault("basis", extra())
        times.append(distributed.all_reduce_max(round(1e9 * taken)) / 1e9)
    row["seconds"]["basis"], window = times, None
    accept = torch.tensor(-1e30, device=device)  # below any Armijo bound
    for method, make in (("psgd", ProjectedSGD), ("pbfgs", ProjectedBFGS)):
        optimizer, times = None, []  # the one before is freed, with its vectors
        model[0].grad = torch.randn(D, device=device)
        common.reset_peaks(device)
        optimizer = make(model, distributed.distribute(P, D, sharded))
        for _ in range(9):
            step = (optimizer.step,) if method == "psgd" else (optimizer.search, 0.0, lambda: accept)
            times.append(seconds(device, *step)[0])
            model[0].grad.mul_(0.5)  # y^T s > 0 (y = -g / 2, s = -B g), so P-BFGS skips no update
        row["seconds"][method] = times[2:]  # P-BFGS updates B from its second step on
        row["memory"][method] = extra()
    clear()
    return row


def predicted(row, N=1):
    """Seconds and bytes of basis and step (the formulae above)."""
    d, n, k = row["D"] / N, row["n"], row["k"]
    step = {"seconds": 2 * k * d * 4 / row["bytes_per_second"], "bytes": k * d * 4}
    basis = {"seconds": (2 * n * n * d + 2 * n * k * d) / row["float64_per_second"],
             "bytes": row.get("gib", 0) * 2**28 or n * d * 4}
    return {"basis": basis, "psgd": step, "pbfgs": step}


def table(result):
    """A Markdown table, one row per point, with notes on rates and machine."""
    machine, rows = result["hardware"], result["points"]
    where = "device" if machine["device"] == "cuda" else "host"
    lines = [f"| network | D | n | k | basis, s | P-SGD step, ms | P-BFGS step, ms | basis, {where} GB "
             f"| P-SGD, {where} GB | P-BFGS, {where} GB |", "|---" + "|--:" * 9 + "|"]
    for row in rows:
        expected, streamed = predicted(row, machine.get("processes", 1)), row.get("gib", 0)
        star = r"\*" * (expected["psgd"]["bytes"] < row["cache_bytes"])
        cells = [row["network"] + f", streamed under {streamed:g} GiB" * (streamed > 0), f"{row['D']:,}", row["n"],
                 row["k"], *(f"{median(row['seconds'][name]) * unit:.3g} / {expected[name]['seconds'] * unit:.3g}"
                             + star * (name != "basis") for name, unit in METHODS.items()),
                 *(f"{row['memory'][name][where] / 1e9:.3g} / {expected[name]['bytes'] / 1e9:.3g}" for name in METHODS)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    read, float64 = (f"{min(rates) / 1e9:.3g} to {max(rates) / 1e9:.3g}" for rates in zip(*(
        (row["bytes_per_second"], row["float64_per_second"]) for row in rows), strict=True))
    return "\n".join([
        *lines, "", "Measured (median) / predicted; memory is the peak beyond what the process held before.",
        f"Rates behind the predictions: {read} GB/s read, {float64} GFLOP/s in float64.",
        f"\\* P fits in the largest cache ({rows[0]['cache_bytes'] / 2**20:g} MiB).",
        f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, torch {result['versions']['torch']}.", ""])


def main(args):
    result = json.loads(args.source.read_text()) if args.source else {"points": []}
    device = None if args.source else utils.set_up(args.device)
    for point in [] if args.source else args.points:
        row = point | measure(device, **point)
        result = common.save(args.json, device, {"points": [*result["points"], row]})
        print(f"{point}: done", file=sys.stderr, flush=True)
    print(table(result), end="")


if __name__ == "__main__":
    utils.run_script(parse_args, main)
