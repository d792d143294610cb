"""How far SGD strays from the subspace of its first epochs, and the paths through it over the loss surface.

Reads the snapshots of --save-dir (all that there are), takes the basis of the window as train_psgd.py does, and
measures for each snapshot its distance from the starting point and from the subspace. The last snapshot is also
projected into the subspace and evaluated there: with the batch-norm statistics it had, and with those of the projected
network.
It also measures the loss over the first two components, and the paths there of SGD and of the P-SGD and P-BFGS runs in
--runs (their logs hold theta). --figure draws it all; from the file of --json, report.py draws it again.

Example:
  python trajectory.py --datasets digits --arch resnet8 --save-dir runs/quick --params_end 46 --n_components 15 \
      --runs runs/quick --json runs/quick/trajectory.json --figure runs/quick/trajectory.png
"""
import json
from itertools import count
from pathlib import Path

import packages  # noqa: F401 - first: it says what is missing

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import models
import utils
from dldr import engine
from dldr.checkpoint import command_line, load_json, provenance, save_json, write_atomically
from dldr.errors import UserError
from dldr.snapshots import load_window, read_snapshot, snapshot_paths
from dldr.subspace import flat_parameters, pca_basis
from report import image, plane

GRID = 25  # points a side of the loss surface


def parse_args(argv=None):
    parser = utils.Parser(__doc__)
    parser.add_argument("--runs", nargs="*", default=[], metavar="DIR", help="directories of P-SGD and P-BFGS runs")
    parser.add_argument("--samples", type=utils.count, default=2000, metavar="N",
                        help="training samples of the loss surface")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to this file")
    parser.add_argument("--figure", metavar="FILE", help="draw the figure to this file (.png)")
    parser.add_argument("--save-dir", required=True, metavar="DIR", help="where the snapshots lie")
    for flag, kind, default in (("--datasets", str, "CIFAR10"), ("--data", str, "data/"), ("--arch", str, "resnet32"),
                                ("--smalldatasets", utils.fraction, None), ("--corrupt", utils.fraction, 0.0),
                                ("--randomseed", utils.seed, 1), ("--batch-size", utils.count, 128),
                                ("--n_components", utils.count, 40), ("--params_start", utils.natural, 0),
                                ("--params_end", utils.natural, 51), ("--params_step", utils.count, 1),
                                ("--device", str, "auto")):
        parser.add_argument(flag, type=kind, default=default, metavar="X", help="as in train_psgd.py")
    args = parser.parse_args(argv)
    utils.check_names(parser, args)
    utils.check_window(parser, args)
    return args


def flat(state, model):
    """The trainable parameters of a state dict as one vector (D,), on the CPU, in the order of `flat_parameters`."""
    return torch.cat([state[name].reshape(-1).float() for name, p in model.named_parameters() if p.requires_grad])


@torch.no_grad()
def surface(model, w, at, P, axes, batches):
    """Losses (len(axes[1]), len(axes[0])) in train mode over the plane of the first two components that holds `at`."""
    model.train()
    losses = torch.zeros(len(axes[1]), len(axes[0]), dtype=torch.float64)
    origin = at - P[:2].T @ (P[:2] @ at)  # the plane's point at coordinates 0, 0, but for where training starts
    for i, b in enumerate(tqdm(axes[1], "loss surface", leave=False, disable=None)):
        for j, a in enumerate(axes[0]):
            w.copy_(origin + a * P[0] + b * P[1])
            losses[i, j] = sum(float(F.cross_entropy(model(x), y)) * len(y) for x, y in batches)
    return losses / sum(len(y) for _, y in batches)


def main(args):
    window = utils.window_indices(args)
    snapshot_paths(args.save_dir, window)
    last = next(i for i in count(args.params_start) if not (Path(args.save_dir) / f"{i + 1}.pt").is_file())
    device = utils.set_up(args.device, args.randomseed)
    data = utils.load_data(args, device)
    model = models.get_model(args.arch, data.classes, args.datasets).to(device)
    utils.check_sampling(args, data)
    utils.check_snapshots(snapshot_paths(args.save_dir, range(args.params_start, last + 1)))
    k = args.n_components
    if len(window) < 3:
        raise UserError("--params_end: a window of 3 snapshots at least, for a plane to draw the loss surface over")
    wide, explained = pca_basis(load_window(snapshot_paths(args.save_dir, window), model, device), max(2, k))
    P, explained = wide[:k], explained[:k]
    w = flat_parameters(model)
    start = w.clone()

    path, distances = [], []  # theta (k,) of each snapshot; how far it is from the start, and from the subspace
    for i in tqdm(range(args.params_start, last + 1), "snapshots", leave=False, disable=None):
        state, _ = read_snapshot(Path(args.save_dir) / f"{i}.pt", model)
        step = flat(state, model).to(device) - start
        path.append(wide @ step)
        distances.append((float(step.norm()), float((step - P.T @ path[-1][:k]).norm())))
    model.load_state_dict(state)
    accuracy = {"last_snapshot": engine.evaluate(model, data.test.epoch(0))["accuracy"]}
    w.copy_(start + P.T @ path[-1][:k])
    accuracy["projected"] = engine.evaluate(model, data.test.epoch(0))["accuracy"]
    update_bn(data.train.epoch(0), model)
    accuracy["projected_own_statistics"] = engine.evaluate(model, data.test.epoch(0))["accuracy"]

    result = {"snapshots": [args.params_start, last], "explained_variance": sum(explained), "accuracy": accuracy,
              "distance_from_start": [d for d, _ in distances], "distance_from_subspace": [d for _, d in distances],
              "args": vars(args), "command": command_line(), **provenance(device)}
    far, outside = distances[-1]
    print(f"snapshot {last} is {far:.2f} from the start and {outside:.2f} from the {k} dimensions "
          f"({100 * outside / far:.0f}%)")
    print(f"test accuracy: {accuracy['last_snapshot']:.2f}%; projected {accuracy['projected']:.2f}%, with its own "
          f"batch-norm statistics {accuracy['projected_own_statistics']:.2f}%")
    lines = {"sgd": [[theta[:2].tolist() for theta in path]]}
    for method in ("psgd", "pbfgs"):
        lines[method] = [read_path(file) for directory in args.runs
                         for file in sorted(Path(directory).rglob(f"{method}_log.jsonl"))]
    xy = torch.tensor([point for group in lines.values() for line in group for point in line])
    margin = 0.15 * (xy.amax(0) - xy.amin(0)) + 1e-6
    axes = [torch.linspace(float(xy[:, i].min() - margin[i]), float(xy[:, i].max() + margin[i]), GRID) for i in (0, 1)]
    losses = surface(model, w, start + P.T @ path[-1][:k], wide,
                     [axis + float(wide[i] @ start) for i, axis in enumerate(axes)],
                     held(data.train.epoch(0), args.samples))
    result |= {"paths": lines, "axes": [axis.tolist() for axis in axes], "losses": losses.tolist()}
    if args.json:
        save_json(Path(args.json), result)
    if args.figure:
        write_atomically(Path(args.figure), image(plane(result)))
        print(f"figure: {args.figure}")
    return result


def read_path(file):
    """The first two coordinates of theta along a run, from its log; the start is (0, 0)."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    if not all("theta" in line for line in lines) or load_json(file.with_name(file.name.replace(
            "_log.jsonl", "_args.json"))).get("args", {}).get("basis", "pca") != "pca":
        raise UserError(f"--runs: {file} has no theta in the principal directions")
    return [[0.0, 0.0], *([*line["theta"], 0.0][:2] for line in lines)]


def held(batches, samples):
    """The first batches, together at least `samples` images."""
    kept, total = [], 0
    for x, y in batches:
        kept.append((x, y))
        total += len(y)
        if total >= samples:
            break
    return kept


if __name__ == "__main__":
    utils.run_script(parse_args, main)
