"""Runs of the three scripts in the test's own process, and what they leave behind."""
import json
from pathlib import Path

import cheap  # noqa: F401
import numpy as np
import torch
from PIL import Image

import datasets
import train_pbfgs
import train_psgd
import train_sgd

ROOT = Path(__file__).parent.parent
SCRIPTS = {"sgd": train_sgd, "psgd": train_psgd, "pbfgs": train_pbfgs}
WINDOW = ["--params_end", "6", "--n_components", "4"]  # of the snapshots in `sampled`


def network(name):
    """One of small_networks.py for --arch."""
    return f"{ROOT / 'tests' / 'small_networks.py'}:{name}"


def digits_args(directory, *more):
    """Flags of a run of less than a second: 30% of the digits, a small network, batches of 64."""
    return ["--datasets", "digits", "--arch", network("small"), "--smalldatasets", "0.3", "--batch-size", "64",
            "--device", "cpu", "--save-dir", str(directory), *map(str, more)]


def run(method, argv):
    """A script's stage; returns its summary."""
    return SCRIPTS[method].main(SCRIPTS[method].parse_args(argv))


def digits_run(method, snapshots, *more, output=None):
    """`run` with `digits_args`; a subspace run in WINDOW writes to `output`, by default beside its snapshots."""
    window = [] if method == "sgd" else [*WINDOW, "--output-dir", output or snapshots]
    return run(method, digits_args(snapshots, *window, *more))


def state(path):
    """A file of tensors."""
    return torch.load(path, weights_only=True)


def same(a, b):
    """Whether two state dicts, or files of such, are bitwise the same."""
    a, b = (value if isinstance(value, dict) else state(value) for value in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log_of(directory, method, *without):
    """The lines of a run's log."""
    lines = map(json.loads, (directory / f"{method}_log.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in without} for line in lines]


def load(name, root="none", **options):
    """A data set, or data of one's own, in mini-batches of 8."""
    return datasets.load(str(name), root, **{"batch_size": 8, "device": "cpu", "seed": 1, "workers": 0, **options})


def epoch(batches, number=0):
    """All x and all y of an epoch."""
    return tuple(map(torch.cat, zip(*batches.epoch(number), strict=True)))


def draw(path, pixels=None):
    """An image file of these pixels (H, W) or (H, W, 3), or of 40 x 48 random ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(str(path).encode()))
    Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8) if pixels is None else pixels).save(path)
    return path
