"""Seconds and peak memory of a training step's forward and backward pass, for every network for 32 x 32 images.

Random images, 100 classes, float32, after one pass to warm up; on CUDA the peak is what torch's allocator held. A
network that does not fit is listed as such. Prints a line per network and writes JSON.

Example:
  python benchmarks/zoo.py --device cuda --json results/zoo-h200/passes.json
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from run import seconds

import models
import runs
import utils


def parse_args(argv=None):
    description, example = __doc__.strip().split("\n\nExample", 1)
    parser = argparse.ArgumentParser(
        description=description, epilog="example" + example, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=models.list_models(), metavar="NAME", help="default: all")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    parser.add_argument("--json", metavar="FILE", help="write the results here")
    return parser.parse_args(argv)


def measure(name, batch_size, device):
    """Seconds and peak memory (MB, None on a CPU) of one forward and backward pass, or what went wrong."""
    x = torch.randn(batch_size, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.arange(batch_size, device=device) % 100
    try:
        model = models.get_model(name, 100).to(device).train()

        def step():
            F.cross_entropy(model(x), y).backward()

        step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        time, _ = seconds(device, step)
    except torch.OutOfMemoryError as error:
        return {"error": str(error).split("\n")[0]}
    memory = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None
    return {"seconds": time, "peak_megabytes": memory, "finite": all(p.grad is None or bool(p.grad.isfinite().all())
                                                                      for p in model.parameters())}


def main(args):
    device = utils.pick_device(args.device)
    utils.keep_freed_memory()
    torch.manual_seed(1)
    rows = {}
    for name in args.models:
        rows[name] = measure(name, args.batch_size, device)
        print(name, *(f"{key}={value}" for key, value in rows[name].items()), flush=True)
        if args.json:
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)
            runs.save_json(Path(args.json), {
                "command": runs.command_line(), "batch_size": args.batch_size, "networks": rows,
                "versions": runs.versions(), "hardware": runs.hardware(device), "git_revision": runs.git_revision()})


if __name__ == "__main__":
    utils.run_script(parse_args, main)
