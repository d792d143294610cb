"""The tables of docs/scale.md: what the method costs on 8 to 1,024 GPUs, on paper. Nothing is measured here.

For n 81, k 40, snapshots of b bytes a number and P sharded, from the data-sheet figures of ASSUMED and the rates
measured for a host (the medians over the points of one process in a JSON file like the one below).

Example:
  python benchmarks/scale.py results/scale/scale.json > results/scale/table.md
"""
import json
import math
import statistics
import sys

GPUS, DIMS = (8, 64, 256, 1024), (10**9, 10**10)
ASSUMED = {"gpu_bytes": 80e9, "hbm": 3.35e12, "float64": 67e12, "nvlink": 450e9, "infiniband": 50e9, "gpus_per_node": 8,
           "node_read": 10e9, "filesystem_read": 100e9, "bfloat16": 989e12, "efficiency": 0.4, "tokens": 8192}


def gpu_bytes(D, k, N, method="psgd", sharded=True):
    """Bytes on each of N GPUs in a step, activations left out: P and vectors of D numbers at the step's peak.

    P-SGD: w, the gradients, the same as a vector (sharded, also padded, unless N divides D). P-BFGS: the first three, w
    before the step, the direction. P+-BFGS: its momentum, a second lifted vector, the residual, too.
    """
    vectors = {"psgd": 3 + sharded, "pbfgs": 5, "pbfgs+": 8}[method]
    return 4 * (vectors * D + (k + 1) * math.ceil(D / N) if sharded else vectors * D + k * D)


def step_bytes(D, k, N, method="psgd", sharded=True):
    """Bytes that each of N GPUs sends in a step, collectives being rings: (N - 1) / N of a vector is sent per phase.

    Sharded: reduce-scatter and all-gather of D float32, all-reduce (two phases) of k. Whole: the all-reduce only.
    P+-BFGS all-reduces the gradient first and gathers a second lifted vector. Losses of trials are left out.
    """
    vectors = 2 * sharded + (method == "pbfgs+") * (2 + sharded)
    return 4 * (N - 1) / N * (vectors * D + 2 * k)


def plan(D, N, host, b=4, n=81, k=40, memory=2**31, a=ASSUMED):
    """One column of a table: its lines by title."""
    nodes, part, disk = math.ceil(N / a["gpus_per_node"]), math.ceil(D / N), n * b * D
    loaded = 4 * n * part <= memory
    share = min(a["node_read"] / min(N, a["gpus_per_node"]), a["filesystem_read"] / N)  # bytes per second and process
    checking = min(a["node_read"], a["filesystem_read"] / nodes) if loaded else share
    blocks, sent = math.ceil(part / (memory // (16 * n))), step_bytes(D, k, N)
    checked = n if loaded or N == 1 else 1 + math.ceil((n - 1) / N)  # of the busiest process: its share and the first
    return {
        "on disk, TB": disk / 1e12,
        "window at `--basis-memory 2`": "loaded" if loaded else "in files",
        "files checked by each process": checked,
        "check, read from the file system, TB": (nodes * disk if loaded else disk + (nodes - 1) * b * D) / 1e12,
        "basis, read from the file system, TB": 0 if loaded else 2 * disk / 1e12,
        "check, s": checked * (
            b * D * (1 / checking + 1 / host["checksum"] + 1 / host["read_warm"]) + D / host["finite"]),
        "basis, reading, s": 0 if loaded else 2 * (n * b * part / min(share, host["mapped_warm"])
                                                   + blocks * n / host["open"]),
        "basis, arithmetic, s": (2 * n * n + 2 * n * k) * D / N / a["float64"] + 2 * n * part * 24 / a["hbm"],
        "host memory per process, one file read or mapped, GB": (b * D + (4 * n * part if loaded else 0)) / 1e9,
        "per GPU: P-BFGS (P-SGD: 4 D less), GB": gpu_bytes(D, k, N, "pbfgs") / 1e9,
        "per GPU: P+-BFGS, GB": gpu_bytes(D, k, N, "pbfgs+") / 1e9,
        "per GPU with P whole, P-SGD, GB": gpu_bytes(D, k, N, sharded=False) / 1e9,
        "per GPU if w were sharded too (it is not), GB": (20 * D + 4 * k * D) / N / 1e9,
        "sent by each GPU per step, GB": sent / 1e9,
        "step: network, ms": 1e3 * sent / (a["nvlink"] if N <= a["gpus_per_node"] else a["infiniband"]),
        # P twice; gather the gradients 8, pad 8, scatter 4, all-gather 4, add 12, zero 4
        "step: GPU memory traffic, ms": 1e3 * (8 * k * part + 40 * D) / a["hbm"],
        "the network's own passes, ms": 1e3 * 6 * D * a["tokens"] / (a["bfloat16"] * a["efficiency"])}


def table(measured):
    """All tables, Markdown."""
    ones = [one["rates"] for row in measured["points"] if row["processes"] == 1 for one in row["streamed"]]
    host, lines = {key: statistics.median(rates[key] for rates in ones) for key in ones[0]}, []
    for D, (b, dtype) in ((D, kind) for D in DIMS for kind in ((4, "float32"), (2, "bfloat16"))):
        plans = [plan(D, N, host, b) for N in GPUS]
        lines += [f"| D = {D:.0e}, {dtype} snapshots | " + " | ".join(f"{N:,} GPUs" for N in GPUS) + " |",
                  "| --- |" + " --: |" * len(GPUS)]
        for title in plans[0]:
            cells = [one[title] if isinstance(one[title], str) else f"{one[title]:.3g}" + r"\*" * (
                "per GPU" in title and one[title] > ASSUMED["gpu_bytes"] / 1e9) for one in plans]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [r"\* over a GPU's 80 GB.", "", "| GPUs | largest D, P sharded | largest D, P whole |", "|--:|--:|--:|"]
    for N in GPUS:  # the D at which P-SGD's step fills a GPU, without any activation
        sizes = (ASSUMED["gpu_bytes"] * 10**9 / gpu_bytes(10**9, 40, N, sharded=sharded) for sharded in (True, False))
        lines.append(f"| {N:,} | " + " | ".join(f"{D:.3g}" for D in sizes) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(json.load(open(sys.argv[1]))), end="")
