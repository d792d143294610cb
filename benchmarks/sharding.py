"""What a whole and a sharded basis cost in a step of several processes: P-SGD without the network's passes.

For each D and k: seconds per step with P whole in each process (k numbers are reduced) and with its columns shared out
(the gradient is reduce-scattered, k numbers are reduced, the step is gathered), in turn, medians; the bytes of P that a
process holds; and, alone, an all-reduce, reduce-scatter and all-gather of D numbers. On an otherwise idle machine.

Example:
  torchrun --nproc_per_node=2 benchmarks/sharding.py --json results/sharding/sharding.json
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import distributed
import runs
import utils
from subspace import ProjectedSGD


def parse_args(argv=None):
    description, example = __doc__.strip().split("\n\nExample", 1)
    parser = utils.Parser(
        description=description, epilog="example" + example, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dims", nargs="*", type=int, default=[272_474, 11_689_512], metavar="D", help="parameters")
    parser.add_argument("--components", nargs="*", type=utils.count, default=[10, 40, 120], metavar="K",
                        help="dimensions")
    parser.add_argument("--repeats", type=utils.count, default=7, help="of each side (default: 7)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--json", metavar="FILE", help="write everything measured here")
    parser.set_defaults(timeout=600)
    return parser.parse_args(argv)


def seconds(call, device):
    """Seconds of one call, of the slowest process."""
    distributed.total(torch.zeros(1, device=device))  # start together
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return distributed.maximum(round(1e9 * (time.perf_counter() - start))) / 1e9


def measure(D, k, repeats, device):
    """Lists of seconds per step and per collective, and bytes of P."""
    P = torch.randn(k, D, generator=torch.Generator().manual_seed(k)).div_(D**0.5).to(device)
    part = P[:, distributed.columns(D)].contiguous()
    w, vector = torch.zeros(D, device=device), torch.ones(D, device=device)
    w.grad = torch.ones(D, device=device)
    mine = vector[distributed.columns(D)].clone()
    sides = {"whole": ProjectedSGD(w, P).step, "sharded": ProjectedSGD(w, part).step,
             "all-reduce": lambda: distributed.total(vector),
             "reduce-scatter": lambda: distributed.scatter_mean(vector),
             "all-gather": lambda: distributed.gather(mine, D)}
    times = {name: [] for name in sides}
    for i in range(repeats + 1):
        for name, call in sides.items():
            taken = seconds(call, device)
            if i:  # the first is a warm-up
                times[name].append(taken)
    return {"D": D, "k": k, "seconds": times, "bytes_whole": P.nbytes, "bytes_sharded": part.nbytes}


def main(args):
    device = utils.pick_device(args.device)
    if distributed.launched() == 1:
        raise utils.InputError("start it through torchrun with --nproc_per_node=2 or more")
    distributed.start(device, args.timeout)
    points = []
    print("| D | k | whole P, s | sharded P, s | ratio | P per process, MB: whole, sharded | all-reduce, s | "
          "reduce-scatter, s | all-gather, s |\n|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for D in args.dims:
        for k in args.components:
            point = measure(D, k, args.repeats, device)
            points.append(point)
            m = {name: statistics.median(values) for name, values in point["seconds"].items()}
            print(f"| {D:,} | {k} | {m['whole']:.4f} | {m['sharded']:.4f} | {m['whole'] / m['sharded']:.2f} | "
                  f"{point['bytes_whole'] / 1e6:.0f}, {point['bytes_sharded'] / 1e6:.0f} | {m['all-reduce']:.4f} | "
                  f"{m['reduce-scatter']:.4f} | {m['all-gather']:.4f} |", flush=True)
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        runs.save_json(Path(args.json), {"points": points, "command": runs.command_line(), "versions": runs.versions(),
                                         "hardware": runs.hardware(device), "git_revision": runs.git_revision()})


if __name__ == "__main__":
    utils.run_script(parse_args, main)
