"""Random pairs of runs: in a subspace after a sampling run, and in the directory of another run.

Two different experiments never pass for one: what differs is refused in one line that names it, may differ, or is
named in --allow-mismatch and kept in the summary. A run that ends well leaves what it does in an empty directory.
"""
import json
import re
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import network
from test_fuzz import cases, often, outcome
from test_resume import result

import datasets
import train_pbfgs
import train_psgd
import train_sgd
import utils

STAGES, DIRECTORIES = 100, 150

# Settings and their values, the usual one first. "images" and "shots": what lies at the path of --data and --save-dir.
DATA = {"images": ["these", "a pixel", "a label", "a test pixel"], "--data": ["here", "moved"],
        "--datasets": ["CIFAR10", "CIFAR100"], "--arch": ["small", "no_batch_norm"],
        "--smalldatasets": ["1", None, "0.5"], "--corrupt": ["0", "0.5"], "--randomseed": ["1", "2"]}
RUN = {name: DATA[name] for name in ("images", "--data", "--smalldatasets", "--corrupt", "--randomseed")} | {
    "--epochs": ["2", "3"], "--start-epoch": ["0", "1"], "--batch-size": ["10", "8"], "--lr": ["0.05", "0.1"],
    "--accumulate": ["1", "2"], "--half": [None, ""], "--save-every": ["10", "1"], "--print-freq": ["50", "1"],
    "--workers": ["4", "1"]}
WINDOW = {"shots": ["these", "others"], "--n_components": ["2", "1"], "--params_start": ["0", "1"],
          "--params_end": ["4", "5"], "--basis": ["pca", "spherical", "random", "snapshots"],
          "--start": ["first", "mean"]}
SETTINGS = {
    train_sgd: {**RUN, "--arch": DATA["--arch"], "--optimizer": ["sgd", "adam"], "--momentum": ["0.9", "0.5"],
                "--weight-decay": ["1e-4", "0.01"], "--milestones": ["100", "1"], "--samples-per-epoch": ["1", "2"],
                "--snapshot-dtype": ["float32", "bfloat16"]},
    train_psgd: {**RUN, **WINDOW, "--momentum": ["0.9", "0.5"], "--milestones": ["30", "1"]},
    train_pbfgs: {**RUN, **WINDOW, "--alpha": ["0", "0.01"], "--gamma": ["0.9", "0.5"]},
}
MAY_DIFFER = {"--data", "--save-every", "--print-freq", "--workers", "--epochs"}


@st.composite
def pairs(draw, table):
    """Two runs' settings: mostly the usual ones, and mostly the same."""
    def change(settings):
        changes = draw(st.lists(st.sampled_from([(name, value) for name, values in table.items() for value in values]),
                                max_size=2))
        return {**settings, **dict(changes)}

    then = change({name: values[0] for name, values in table.items()})
    now = change(then)
    return then, {**now, "--epochs": draw(st.sampled_from(["2", "3"]))} if "--epochs" in table else now


class World:
    """Data sets of 40 + 10 images, and runs on them, each trained once."""

    def __init__(self, root):
        self.root, self.runs = root, {}
        rng = np.random.default_rng(0)
        arrays = {"x_train": rng.integers(0, 256, (40, 32, 32, 3), np.uint8), "y_train": rng.integers(0, 10, 40),
                  "x_test": rng.integers(0, 256, (10, 32, 32, 3), np.uint8), "y_test": rng.integers(0, 10, 10)}
        for images, name in zip(DATA["images"], (None, "x_train", "y_train", "x_test"), strict=True):
            changed = {key: value.copy() for key, value in arrays.items()}
            if name:
                changed[name].reshape(-1)[0] = (changed[name].reshape(-1)[0] + 1) % 10
            (root / images).mkdir()
            for classes in (10, 100):
                np.savez(root / images / f"cifar{classes}.npz", **changed)
        for seed, shots in enumerate(WINDOW["shots"]):
            usual = {name: values[0] for name, values in SETTINGS[train_sgd].items()}
            ran = self.alone(train_sgd, {**usual, "--epochs": "4", "--randomseed": str(seed)})
            shutil.copytree(ran, root / f"shots of {shots}")

    def start(self, script, settings, *more):
        """Run a script, after what it reads was put in place; its exit status and the lines of its error."""
        data = self.root / settings["--data"]
        shutil.copytree(self.root / settings["images"], data, dirs_exist_ok=True)
        if "shots" in settings:
            shutil.copytree(self.root / f"shots of {settings['shots']}", self.root / "shots", dirs_exist_ok=True)
            more = ["--save-dir", str(self.root / "shots"), *more]
        flags = {name: value for name, value in settings.items() if name[0] == "-" and value is not None}
        flags["--data"], flags["--arch"] = str(data), network(settings.get("--arch", "small"))
        return outcome(script, ["--device", "cpu", "--datasets", "CIFAR10", *more,
                                *(word for flag in flags.items() for word in flag if word)])

    def alone(self, script, settings):
        """The directory of a run that was started in an empty one."""
        key, directory = (script, *settings.items()), self.root / f"run{len(self.runs)}"
        if key not in self.runs:
            assert self.start(script, settings, *output(script, directory)) == (0, [])
            self.runs[key] = directory
        return self.runs[key]

    def data(self, settings):
        """What a run trains on."""
        part = settings["--smalldatasets"]
        return datasets.load(settings["--datasets"], self.root / settings["images"], batch_size=20, device="cpu",
                             seed=int(settings["--randomseed"]), corrupt=float(settings["--corrupt"]),
                             part=part and float(part))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def output(script, directory):
    """Where to write; a subspace run may differ from its sampling run, which is another test's matter."""
    if script is train_sgd:
        return ["--save-dir", str(directory)]
    return ["--output-dir", str(directory), "--allow-mismatch", "smalldatasets,corrupt,labels,content"]


@often(STAGES)
def test_a_subspace_run_is_of_the_data_and_network_of_its_snapshots(world, tmp_path, n):
    ends = []

    @cases(n, STAGES)
    @given(pairs(DATA), st.lists(st.sampled_from(utils.MISMATCHES), max_size=3, unique=True),
           st.sampled_from([train_psgd, train_pbfgs]))
    def check(pair, allowed, script):
        then, now = ({**settings, "--smalldatasets": settings["--smalldatasets"] or "1"} for settings in pair)
        a, b = world.data(then), world.data(now)
        differ = {name for name in ("datasets", "arch", "smalldatasets", "corrupt")
                  if then[f"--{name}"] != now[f"--{name}"]}
        if not differ & {"datasets", "smalldatasets", "corrupt"} and a.train.labels.tolist() != b.train.labels.tolist():
            differ.add("labels")
        if then["images"] != now["images"]:
            differ.add("content")
        shots = world.alone(train_sgd, pair[0] | {"--epochs": "2"})
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        status, lines = world.start(script, pair[1], "--save-dir", str(shots), "--output-dir", str(tmp_path / "out"),
                                    "--params_end", "3", "--n_components", "1", "--epochs", "1",
                                    *(["--allow-mismatch", ",".join(allowed)] if allowed else []))
        ends.append(status)
        summary = tmp_path / "out" / f"{script.__name__.removeprefix('train_')}_summary.json"
        if wrong := differ - set(allowed):
            (line,) = lines
            named = {name for name in utils.MISMATCHES if re.search(f"[:;] {name} ", line)}
            assert (status, named) == (1, wrong) and "--allow-mismatch" in line and not summary.exists()
            for name in wrong & {"smalldatasets", "corrupt"}:
                a, b = (float(settings[f"--{name}"]) for settings in (then, now))
                assert f"{name} {a}, here {b} (--{name})" in line
        elif differ & {"arch", "datasets"}:  # allowed, but the shapes differ
            assert status == 1 and "is of another network" in lines[0]
        else:
            assert status == 0 and json.loads(summary.read_text())["args"]["allow_mismatch"] == allowed
            assert differ or all(x.images.equal(y.images) and x.labels.equal(y.labels)
                                 for x, y in ((a.train, b.train), (a.test, b.test)))

    check()
    assert set(ends) == {0, 1}


def left(script, directory):
    """The results of a run, and those of its snapshots that its index lists."""
    method = script.__name__.removeprefix("train_")
    log, summary, tensors = result(method, directory)
    index = directory / f"{method}_snapshots.json"
    named = {f"{i}.pt" for i in json.loads(index.read_text())} if index.exists() else set()
    return log, summary, {name: value for name, value in tensors.items() if name in named or not name[0].isdigit()}


@often(DIRECTORIES)
def test_a_run_in_the_directory_of_another_is_that_run_or_refused(world, tmp_path, n):
    """Of one that is finished, was killed after a checkpoint, or before; or that starts from the other's checkpoint."""
    ends = []

    @cases(n, DIRECTORIES)
    @given(st.sampled_from(list(SETTINGS)).flatmap(lambda script: st.tuples(st.just(script), pairs(SETTINGS[script]))),
           st.sampled_from(["finished", "finished", "killed", "killed early"]),
           st.sampled_from(["", "auto", "auto", "auto", "path", "overwrite"]))
    def check(runs, state, how):
        script, (then, now) = runs
        method, there = script.__name__.removeprefix("train_"), tmp_path / "run"
        shutil.rmtree(there, ignore_errors=True)
        shutil.copytree(world.alone(script, then), there)
        for name in {"finished": [], "killed": ["summary.json", "final.pt"],
                     "killed early": ["summary.json", "final.pt", "checkpoint.pt"]}[state]:
            (there / f"{method}_{name}").unlink()
        if how == "path":
            shutil.rmtree(tmp_path / "other", ignore_errors=True)
            there = there.rename(tmp_path / "other")
            more = [*output(script, tmp_path / "run"), "--resume", str(there / f"{method}_checkpoint.pt")]
        else:
            more = [*output(script, there), *{"": [], "auto": ["--resume", "auto"], "overwrite": ["--overwrite"]}[how]]
        before = {path.name: path.read_bytes() for path in there.iterdir()}
        status, lines = world.start(script, now, *more)
        differ = {name for name in now if now[name] != then[name]}
        flags = [name[2:].replace("-", "_") for name in differ - MAY_DIFFER - {"images", "shots"}]
        known = not differ & {"images", "shots"} and int(now["--epochs"]) >= int(then["--epochs"])
        ends.append((how, "resumed" if status == 0 and now["--epochs"] > then["--epochs"] else status))
        trains = {"": False, "overwrite": True, "auto": not flags and (known or state == "killed early"),
                  "path": not flags and known and state != "killed early"}[how]
        assert status == (0 if trains else 1) and len(lines) == status
        if trains:
            ours, alone = left(script, tmp_path / "run"), left(script, world.alone(script, now))
            if how == "path":  # the snapshots before are where they were
                alone = *alone[:2], {name: value for name, value in alone[2].items() if name in ours[2]}
            assert ours == alone
        if not trains or how == "auto" and state == "finished" and now["--epochs"] == then["--epochs"]:
            assert before == {path.name: path.read_bytes() for path in there.iterdir()}
        if not trains:
            if how == "path" and state == "killed early":
                words = ["there is no checkpoint"]
            elif flags:
                words = [f"{name} " for name in flags]
            elif how == "":
                done = state == "finished" and now["--epochs"] == then["--epochs"] and "shots" not in differ
                words = [f"{'keep' if done else 'resume'} it with --resume auto", "start over with --overwrite"]
            else:
                words = ["is past --epochs 2" if now["--epochs"] < then["--epochs"] else
                         "is of other data than --datasets" if "images" in differ else "made with different snapshots"]
            assert all(word in lines[0] for word in words)

    check()
    assert set(ends) >= {("", 1), ("auto", 0), ("auto", "resumed"), ("auto", 1), ("path", "resumed"), ("path", 1),
                         ("overwrite", 0)}
