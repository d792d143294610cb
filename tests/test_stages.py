"""Stages, runs and files that belong together, and those that do not."""
import errno
import fcntl
import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from runs import digits_args, digits_run, network, same
from torch import nn

import train_psgd
import trajectory
from dldr import files
from dldr.errors import UserError


def sample(directory, *more, epochs=3):
    digits_run("sgd", directory, "--epochs", epochs, "--lr", 0.05, *more)


def in_subspace(shots, output, method="psgd"):
    digits_run(method, shots, "--params_end", 4, "--n_components", 2, "--epochs", 1, output=output)


def test_snapshots_from_elsewhere_are_used_with_notes(sampled, tmp_path, capsys):
    for i in range(4):
        shutil.copy(sampled / f"{i}.pt", tmp_path)
    in_subspace(tmp_path, tmp_path / "p")
    err = capsys.readouterr().err
    assert err.count("note:") == 2 and "no sgd_args.json" in err and "no sgd_snapshots.json" in err


def test_snapshots_of_another_run_in_the_window_are_refused(sampled, tmp_path):
    """A snapshot of another run beside those of this one, in both subspace scripts and trajectory.py."""
    sample(tmp_path / "run")
    sample(tmp_path / "other", "--randomseed", "2")
    shutil.copy(tmp_path / "other" / "3.pt", tmp_path / "run")
    for method in ("psgd", "pbfgs"):
        with pytest.raises(UserError, match=r"3\.pt not as sgd_snapshots.json of this run lists it"):
            in_subspace(tmp_path / "run", tmp_path / "p", method)
    with pytest.raises(UserError, match=r"3\.pt not as sgd_snapshots"):
        trajectory.main(trajectory.parse_args(digits_args(tmp_path / "run", "--params_end", 3, "--n_components", 2)))


def test_starting_over_removes_what_the_script_has_written_and_no_more(tmp_path):
    (tmp_path / "2024_best.pt").write_bytes(b"of somebody")
    sample(tmp_path, epochs=4)
    sample(tmp_path, "--overwrite", "--randomseed", "2", epochs=2)
    assert sorted(path.name for path in tmp_path.glob("[0-9]*.pt")) == ["0.pt", "1.pt", "2.pt", "2024_best.pt"]
    assert sorted(json.loads((tmp_path / "sgd_snapshots.json").read_text())) == ["0", "1", "2"]


def test_results_without_their_checkpoint_are_not_trained_over(tmp_path):
    """Somebody has removed the large file; more epochs would start from nothing."""
    sample(tmp_path, epochs=2)
    (tmp_path / "sgd_checkpoint.pt").unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="holds results of a sgd run, but no checkpoint to resume it from: start"):
        sample(tmp_path, "--resume", "auto", epochs=3)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    sample(tmp_path, "--resume", "auto", epochs=2)  # finished as it is


def test_a_snapshot_of_somebody_is_not_trained_over(tmp_path):
    (tmp_path / "2.pt").write_bytes(b"of somebody")
    with pytest.raises(UserError, match="holds a sgd run with other flags .unknown ones."):
        sample(tmp_path)
    assert (tmp_path / "2.pt").read_bytes() == b"of somebody"


def test_other_weights_in_the_pretrained_file_are_another_run(sampled, tmp_path):
    shutil.copy(sampled / "0.pt", tmp_path / "weights.pt")
    flags = ["--pretrained", tmp_path / "weights.pt", "--resume", "auto"]
    sample(tmp_path / "run", *flags, epochs=1)
    sample(tmp_path / "run", *flags, epochs=1)
    shutil.copy(sampled / "1.pt", tmp_path / "weights.pt")
    with pytest.raises(UserError, match="other flags .file_digests"):
        sample(tmp_path / "run", *flags, epochs=1)


def test_a_peculiar_network_trains_repeats_and_resumes(tmp_path):
    arch = ["--arch", network("peculiar"), "--smalldatasets", "0.05", "--batch-size", "32"]
    for number, name in enumerate("ab"):
        random.seed(number)
        np.random.seed(number)
        sample(tmp_path / name, *arch, epochs=3)
    assert same(tmp_path / "a" / "3.pt", tmp_path / "b" / "3.pt")
    sample(tmp_path / "a", *arch, "--resume", "auto", epochs=4)
    sample(tmp_path / "c", *arch, epochs=4)
    assert same(tmp_path / "a" / "4.pt", tmp_path / "c" / "4.pt")
    for method in ("psgd", "pbfgs"):
        digits_run(method, tmp_path / "c", *arch, "--params_end", 4, "--n_components", 2, "--epochs", 2)
        digits_run(method, tmp_path / "c", *arch, "--params_end", 4, "--n_components", 2, "--epochs", 3,
                   "--resume", "auto")


def test_overwriting_with_flags_that_are_refused_removes_nothing(sampled, tmp_path):
    shutil.copytree(sampled, tmp_path / "run")
    in_subspace(sampled, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match="an epoch has"):
        sample(tmp_path / "run", "--overwrite", "--samples-per-epoch", 500)
    with pytest.raises(UserError, match="--cuda-graphs on"):
        sample(tmp_path / "run", "--overwrite", "--arch", network("stochastic_depth"), "--cuda-graphs", "on")
    with pytest.raises(UserError, match="were sampled otherwise"):
        digits_run("psgd", sampled, "--params_end", 4, "--n_components", 2, "--corrupt", 0.5, "--overwrite",
                   output=tmp_path / "run")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()
            if path.name in before} == before


def test_what_differs_on_purpose_from_the_sampling_run_is_recorded(sampled, tmp_path):
    """So that a subspace of little data, or one for several seeds, is a row of its own in the tables."""
    flags = "--params_end 4 --n_components 2 --epochs 0 --randomseed 5 --smalldatasets 0.2 --allow-mismatch".split()
    summary = digits_run("psgd", sampled, *flags, "smalldatasets,content,labels", output=tmp_path)
    made = json.loads((sampled / "sgd_args.json").read_text())
    assert summary["sampling"]["smalldatasets"] == made["args"]["smalldatasets"] != 0.2
    assert summary["sampling"]["randomseed"] == made["args"]["randomseed"] != 5
    assert "corrupt" not in summary["sampling"] and "labels" not in summary["sampling"]


# ------------------------------------------------------------------------------------------------------ environment


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of(code, tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    sample(tmp_path, epochs=1)
    assert "has no locks" in capsys.readouterr().err and (tmp_path / "sgd_summary.json").is_file()


def test_directories_that_cannot_be_flushed_are_passed_over(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    assert files.save_json(tmp_path / "a.json", {"b": 1}).read_text() == '{\n "b": 1\n}\n'


def test_a_tilde_is_the_home_directory_and_a_final_slash_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = train_psgd.parse_args(["--save-dir=~/x", "--output-dir=~/y/", "--data=~/z"])
    assert (args.save_dir, args.output_dir, args.data) == tuple(str(tmp_path / name) for name in "xyz")


# ------------------------------------------------------------------------------------------------------ files


class Wrapped(nn.Module):
    """Its own child is called `module`."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(2, 2)


@pytest.mark.parametrize("around", [
    lambda state: state, lambda state: {"state_dict": state, "epoch": 3}, lambda state: {"model": state},
    lambda state: {"model_state_dict": state, "loss": 0.1}, lambda state: {"net": state, "acc": torch.ones(1)},
])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
def test_state_dicts_as_people_save_them(around, prefix):
    for model in (nn.Linear(2, 2), Wrapped()):
        state = {prefix + name: value for name, value in model.state_dict().items()}
        for reader in (model, nn.DataParallel(model)):
            keys = list(reader.state_dict())
            found = files.state_dict_in(around(state), keys)
            assert set(found) == set(keys) and all(
                torch.equal(found[name], value) for name, value in reader.state_dict().items())


def test_a_pickled_model_is_refused_by_its_name(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(UserError, match="holds a pickled torch.nn.modules.linear.Linear") as error:
        files.load_file(tmp_path / "model.pt", "state dict")
    assert "truncated" not in str(error.value)


def test_snapshots_left_behind_by_a_killed_run_are_not_of_the_resumed_one(tmp_path):
    """After epoch 2's checkpoint; 3.pt of the run before is removed, and written again later."""
    sample(tmp_path, epochs=2)
    shutil.copy(tmp_path / "1.pt", tmp_path / "3.pt")
    index = tmp_path / "sgd_snapshots.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "3": files.checksum(tmp_path / "3.pt")}))
    (tmp_path / "sgd_summary.json").unlink()
    sample(tmp_path, "--resume", "auto", epochs=2)  # nothing to train, but the run is taken up again
    assert {path.name for path in tmp_path.glob("[0-9]*.pt")} == {"0.pt", "1.pt", "2.pt"}


def test_a_finished_run_is_not_replaced_by_a_checkpoint_from_elsewhere(tmp_path):
    sample(tmp_path / "a", epochs=1)
    sample(tmp_path / "b", epochs=1)
    with pytest.raises(UserError, match="finished sgd run .*; keep it with --resume auto"):
        sample(tmp_path / "a", "--resume", str(tmp_path / "b" / "sgd_checkpoint.pt"), epochs=1)
    assert (tmp_path / "a" / "sgd_summary.json").is_file()
