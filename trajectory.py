"""How far SGD strays from the subspace of its first epochs, and the paths through it over the loss surface.

Reads the snapshots of --save-dir (all that there are: 0.pt, 1.pt, ... of train_sgd.py, or state dicts of --arch under
other names, counted in the order of the numbers in them), takes the basis of the window as train_psgd.py does, and
measures for each snapshot its distance from the starting point and from the subspace. The last snapshot is also
projected into the subspace and evaluated there: with the batch-norm statistics it had, and with those of the projected
network.
It also measures the loss over the first two components, and the paths there of SGD and of the P-SGD and P-BFGS runs in
--runs (their logs hold theta). --figure draws it all; from the file of --json, report.py draws it again.

Example:
  python trajectory.py --datasets digits --arch resnet8 --save-dir runs/quick --params_end 46 --n_components 15 \\
      --runs runs/quick --json runs/quick/trajectory.json --figure runs/quick/trajectory.png
"""
import json
import math
import re
from itertools import count, islice, takewhile
from pathlib import Path

import packages  # noqa: F401 - first: it says what is missing

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import plots
import utils
from dldr import distributed, engine
from dldr.checkpoint import command_line, provenance
from dldr.errors import UserError
from dldr.files import checksum, load_json, load_model, save_json, write_atomically
from dldr.snapshots import load_window, read_snapshot, snapshot_paths
from dldr.subspace import flat_parameters, pca_basis

GRID = 25  # points a side of the loss surface
WINDOW = ("arch", "params_start", "params_end", "params_step")


def parse_args(argv=None):
    parser = utils.Parser(__doc__)
    same = parser.add_argument_group("data, network, basis and device").add_argument
    for flag, kind, default in (
            ("--n_components", utils.components, 40), ("--params_start", utils.natural, 0),
            ("--params_end", utils.natural, 51), ("--params_step", utils.count, 1), ("--datasets", str, "CIFAR10"),
            ("--data", utils.folder, utils.data_directory()), ("--arch", str, "resnet32"),
            ("--smalldatasets", utils.fraction, None), ("--corrupt", utils.fraction, 0.0),
            ("--randomseed", utils.seed, 1), ("--batch-size", utils.count, 128), ("--device", str, "auto")):
        same(flag, type=kind, default=default, metavar="X", help="as in train_psgd.py")
    output = parser.add_argument_group("what is measured and written").add_argument
    output("--save-dir", type=utils.folder, required=True, metavar="DIR", help="where the snapshots lie")
    output("--runs", nargs="*", default=[], metavar="DIR", help="directories of P-SGD and P-BFGS runs")
    output("--samples", type=utils.count, default=2000, metavar="N", help="training samples of the loss surface")
    output("--json", type=utils.folder, metavar="FILE", help="write the numbers to this file")
    output("--figure", type=utils.folder, metavar="FILE", help="draw the figure to this file, .png or .svg")
    args = parser.parse_args(argv)
    if args.figure and Path(args.figure).suffix not in (".png", ".svg"):
        parser.error(f"--figure {args.figure}: the name must end in .png or .svg")
    utils.check_names(parser, args)
    utils.check_window(parser, args)
    return args


def snapshots(args):
    """The snapshots of the window, and all from --params_start on, in order."""
    directory, window = Path(args.save_dir), utils.window_indices(vars(args))
    files = [path for path in directory.glob("*") if path.suffix in (".pt", ".pth")
             and not path.name.startswith(("sgd_", "psgd_", "pbfgs_"))]
    numbers = sorted(int(path.stem) for path in files if path.name == f"{path.stem}.pt" and path.stem.isdigit())
    consecutive = numbers and numbers[-1] - numbers[0] == len(numbers) - 1
    if consecutive or not files or (directory / "sgd_snapshots.json").is_file():
        paths = snapshot_paths(directory, window)
        every = list(takewhile(Path.is_file, (directory / f"{i}.pt" for i in count(window.start))))
        if (missing := window.start + len(every)) < numbers[-1]:
            raise UserError(f"--save-dir {directory} has {numbers[-1]}.pt but no {missing}.pt: all from --params_start "
                            f"{window.start} on are measured")
        return paths, every
    files.sort(key=lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.stem)])
    distributed.note(f"{directory} holds {len(files)} state dicts, 0 to {len(files) - 1} in this order: "
                     f"{files[0].name} ... {files[-1].name}")
    if window.stop > len(files):
        raise UserError(f"--params_end {window.stop}: --save-dir {directory} holds {len(files)} state dicts")
    return [files[i] for i in window], files[window.start:]


@torch.no_grad()
def surface(model, w, start, at, plane, axes, batches):
    """Losses (len(axes[1]), len(axes[0])) in train mode over the plane (2, D) that holds `at`, as seen from `start`."""
    model.train()
    losses = np.zeros((len(axes[1]), len(axes[0])))
    origin = at - plane.T @ (plane @ (at - start))
    for i, b in enumerate(tqdm(axes[1], "loss surface", leave=False, disable=None)):
        for j, a in enumerate(axes[0]):
            w.copy_(origin + a * plane[0] + b * plane[1])
            losses[i, j] = sum(float(F.cross_entropy(model(x), y)) * len(y) for x, y in batches)
    return losses / sum(len(y) for _, y in batches)


def main(args):
    utils.add_digests(args)
    paths, every = snapshots(args)
    last = args.params_start + len(every) - 1
    if len(paths) < 3:
        raise UserError("--params_end: a window of 3 snapshots at least, for a plane to draw the loss surface over")
    device = utils.set_up(args.device, args.randomseed)
    data = utils.load_data(args, device)
    model = utils.make_network(args, data).to(device)
    utils.check_sampling(args, data)
    utils.check_snapshots(every)
    window = load_window(paths, model, device)
    try:
        P, explained = pca_basis(window, args.n_components)
        plane = P[:2] if len(P) > 1 else pca_basis(window, 2)[0]
    except ValueError as error:
        raise UserError(f"{error} (--n_components, --params_start, --params_end, --params_step)") from error
    k = len(P)
    w = flat_parameters(model)
    start = w.clone()

    path, from_start, from_subspace = [], [], []
    for file in tqdm(every, "snapshots", leave=False, disable=None):
        load_model(model, read_snapshot(file, model)[0], file)
        step = w - start
        inside = P.T @ (P @ step)
        path.append((plane @ step).tolist())
        from_start.append(float(step.norm()))
        from_subspace.append(float((step - inside).norm()))

    def accuracy():
        return engine.evaluate(model, data.test.epoch(0))["accuracy"]

    accuracies = {"last_snapshot": accuracy()}
    w.copy_(start + inside)
    accuracies["projected"] = accuracy()
    update_bn(data.train.epoch(0), model)
    accuracies["projected_own_statistics"] = accuracy()
    print(f"snapshot {last} is {from_start[-1]:.2f} from the start and {from_subspace[-1]:.2f} from the {k} dimensions "
          f"({100 * from_subspace[-1] / from_start[-1]:.0f}%)")
    print(f"test accuracy: {accuracies['last_snapshot']:.2f}%; projected {accuracies['projected']:.2f}%, with its own "
          f"batch-norm statistics {accuracies['projected_own_statistics']:.2f}%")

    lines, identity = {"sgd": [path]}, checksum(*paths)
    for method in ("psgd", "pbfgs"):
        lines[method] = [read_path(file, args, identity) for file in utils.files_below(args.runs)
                         if file.name == f"{method}_log.jsonl"]
    points = np.array([point for group in lines.values() for line in group for point in line])
    low, high = points.min(axis=0), points.max(axis=0)
    margin = 0.15 * (high - low) + 1e-6
    axes = np.linspace(low - margin, high + margin, GRID, axis=1).tolist()
    batches = list(islice(data.train.epoch(0), math.ceil(args.samples / args.batch_size)))
    losses = surface(model, w, start, start + inside, plane, axes, batches)
    result = {"snapshots": [args.params_start, last], "k": k, "explained_variance": sum(explained),
              "accuracy": accuracies, "distance_from_start": from_start, "distance_from_subspace": from_subspace,
              "args": vars(args), "command": command_line(), **provenance(device),
              "paths": lines, "axes": axes, "losses": losses.tolist()}
    if args.json:
        save_json(Path(args.json), result)
    if args.figure:
        write_atomically(Path(args.figure), plots.image(plots.plane(result), Path(args.figure).suffix[1:]))
        print(f"figure: {args.figure}")
    return result


def read_path(file, args, identity):
    """The first two coordinates of theta along the run of a log; the start is (0, 0).

    Raises UserError unless they are in the basis that `args` name, of the snapshots with the checksum `identity`.
    """
    beside = [file.with_name(file.name.replace("log.jsonl", name)) for name in ("args.json", "summary.json")]
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        record, summary = load_json(beside[0]), load_json(beside[1]) or {}
        theirs, snapshots = record["args"], (summary | record).get("snapshots_checksum")
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"--runs: {file}, or {beside[0].name} beside it, is missing or damaged: {error}") from error
    ours = {"basis": "pca", "start": "first"} | {flag: getattr(args, flag) for flag in WINDOW}
    differ = [f"--{flag} {theirs[flag]}, here {value}" for flag, value in ours.items()
              if theirs.get(flag, value) != value]
    if not differ and snapshots != identity:
        differ = [f"of {'other snapshots than' if snapshots else 'a run that has not recorded whether its were'} those "
                  "in --save-dir"]
    if differ or not all("theta" in line for line in lines):
        raise UserError(f"--runs: {file} has no theta in this basis ({'; '.join(differ) or 'none in the log'})")
    return [[0.0, 0.0], *([*line["theta"], 0.0][:2] for line in lines)]


if __name__ == "__main__":
    utils.run_script(parse_args, main)
