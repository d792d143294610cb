"""Stages, runs and files that belong together, and those that do not."""
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, digits_args
from torch import nn

import datasets
import train_pbfgs
import train_psgd
import train_sgd
import trajectory
from dldr import files
from dldr.errors import UserError

WINDOW = ["--params_end", "4", "--n_components", "2", "--epochs", "1"]


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """Snapshots 0 to 3 with 40% label noise; read only."""
    directory = tmp_path_factory.mktemp("noisy")
    sample(directory, "--corrupt", "0.4")
    return directory


def sample(directory, *more, epochs=3):
    train_sgd.main(train_sgd.parse_args(digits_args(directory, "--epochs", str(epochs), "--lr", "0.05", *more)))


def in_subspace(script, shots, output, *more):
    argv = digits_args(shots, "--output-dir", str(output), *WINDOW, *more)
    return script.main(script.parse_args(argv))


@pytest.mark.parametrize("script", [train_psgd, train_pbfgs])
@pytest.mark.parametrize(("flags", "named"), [
    ([], ["corrupt 0.4, here 0.0 (--corrupt)"]),
    (["--corrupt", "0.4", "--smalldatasets", "0.2"], ["smalldatasets 0.3, here 0.2 (--smalldatasets)"]),
    (["--corrupt", "0.2", "--smalldatasets", "0.2"], ["corrupt 0.4, here 0.2", "smalldatasets 0.3, here 0.2"]),
    (["--corrupt", "0.4", "--arch", "resnet20"], ["arch resnet8, here resnet20 (--arch)"]),
    (["--corrupt", "0.4", "--randomseed", "2"], ["labels ", "(--randomseed draws other noisy labels)"]),
])
def test_flags_of_another_sampling_run_are_refused_by_name(noisy, tmp_path, script, flags, named):
    with pytest.raises(UserError, match="were sampled otherwise: .*--allow-mismatch") as error:
        in_subspace(script, noisy, tmp_path, *flags)
    assert all(text in str(error.value) for text in named)


def test_what_is_meant_to_differ_is_named_and_kept(noisy, sampled, tmp_path):
    summary = in_subspace(train_psgd, noisy, tmp_path / "a", "--allow-mismatch", "corrupt,smalldatasets",
                          "--smalldatasets", "0.2")
    assert summary["args"]["allow_mismatch"] == ["corrupt", "smalldatasets"]
    with pytest.raises(UserError, match="corrupt 0.4, here 0.0"):
        in_subspace(train_psgd, noisy, tmp_path / "b", "--allow-mismatch", "smalldatasets")
    in_subspace(train_psgd, sampled, tmp_path / "c", "--randomseed", "2")  # without noise the labels are the same
    with pytest.raises(SystemExit):
        train_psgd.parse_args(["--allow-mismatch", "lr"])


def test_other_data_under_the_same_name_are_refused(sampled, tmp_path, monkeypatch):
    """In a subspace of it, on resuming, and where a run is finished."""
    own = tmp_path / "own"
    sample(own, epochs=2)
    record = json.loads((sampled / "sgd_args.json").read_text())
    assert record["data"]["content"] == json.loads((own / "sgd_summary.json").read_text())["data"]["content"]
    source = datasets.SOURCES["digits"]

    def changed(root):
        x_train, *rest = source.read(root)
        x_train = x_train.copy()
        x_train[0, 0, 0, 0] ^= 1
        return x_train, *rest

    monkeypatch.setitem(datasets.SOURCES, "digits", source._replace(read=changed))
    with pytest.raises(UserError, match="content .*--data holds other data"):
        in_subspace(train_psgd, sampled, tmp_path / "p")
    for flags in (["--epochs", "3"], ["--epochs", "2", "--data", str(tmp_path)]):
        with pytest.raises(UserError, match="is of other data than --datasets digits --data .*: content"):
            train_sgd.main(train_sgd.parse_args([*digits_args(own, "--lr", "0.05", "--resume", "auto"), *flags]))


def test_snapshots_from_elsewhere_are_used_with_notes(sampled, tmp_path, capsys):
    for i in range(4):
        shutil.copy(sampled / f"{i}.pt", tmp_path)
    in_subspace(train_psgd, tmp_path, tmp_path / "p")
    err = capsys.readouterr().err
    assert err.count("note:") == 2 and "no sgd_args.json" in err and "no sgd_snapshots.json" in err


def test_snapshots_of_another_run_in_the_window_are_refused(sampled, tmp_path):
    """A snapshot of another run beside those of this one, in both subspace scripts and trajectory.py."""
    sample(tmp_path / "run")
    sample(tmp_path / "other", "--randomseed", "2")
    shutil.copy(tmp_path / "other" / "3.pt", tmp_path / "run")
    for script in (train_psgd, train_pbfgs):
        with pytest.raises(UserError, match=r"3\.pt not as sgd_snapshots.json of this run lists it"):
            in_subspace(script, tmp_path / "run", tmp_path / "p")
    flags = ["--datasets", "digits", "--arch", "resnet8", "--smalldatasets", "0.3", "--params_end", "3",
             "--n_components", "2", "--save-dir", str(tmp_path / "run"), "--device", "cpu"]
    with pytest.raises(UserError, match=r"3\.pt not as sgd_snapshots"):
        trajectory.main(trajectory.parse_args(flags))


def test_starting_over_leaves_no_snapshot_of_before(tmp_path):
    sample(tmp_path, epochs=4)
    sample(tmp_path, "--overwrite", "--randomseed", "2", epochs=2)
    assert sorted(path.name for path in tmp_path.glob("[0-9]*.pt")) == ["0.pt", "1.pt", "2.pt"]
    assert sorted(json.loads((tmp_path / "sgd_snapshots.json").read_text())) == ["0", "1", "2"]


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


@pytest.mark.parametrize("environment", [
    {"WORLD_SIZE": "4"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "four"}, {"WORLD_SIZE": "2", "RANK": "x"},
    {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"},
])
def test_a_leftover_environment_is_one_line(environment, tmp_path):
    command = [sys.executable, "train_sgd.py", *digits_args(tmp_path, "--epochs", "1")]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode in (1, 2) and done.stderr.count("\n") == 1 and "WORLD_SIZE" in done.stderr


def test_a_tilde_is_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = train_psgd.parse_args(["--save-dir=~/x", "--output-dir=~/y", "--data=~/z"])
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


@pytest.mark.parametrize("components", ["1", "2"])
def test_trajectory_of_one_component_and_into_new_folders(sampled, tmp_path, components, monkeypatch):
    monkeypatch.setattr(trajectory, "GRID", 3)
    in_subspace(train_psgd, sampled, tmp_path / "p", "--n_components", components)
    flags = ["--datasets", "digits", "--arch", "resnet8", "--smalldatasets", "0.3", "--params_end", "4", "--samples",
             "8", "--n_components", components, "--save-dir", str(sampled), "--device", "cpu", "--runs",
             str(tmp_path / "p"), "--json", str(tmp_path / "new" / "t.json"), "--figure",
             str(tmp_path / "fig" / "t.png")]
    result = trajectory.main(trajectory.parse_args(flags))
    assert (tmp_path / "new" / "t.json").is_file() and (tmp_path / "fig" / "t.png").is_file()
    assert all(len(point) == 2 for lines in result["paths"].values() for line in lines for point in line)


def test_snapshots_left_behind_by_a_killed_run_are_not_of_the_resumed_one(tmp_path):
    """After epoch 2's checkpoint; 3.pt of the run before is refused until it is written again."""
    sample(tmp_path, epochs=2)
    shutil.copy(tmp_path / "1.pt", tmp_path / "3.pt")
    index = tmp_path / "sgd_snapshots.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "3": files.checksum(tmp_path / "3.pt")}))
    args = train_sgd.parse_args(digits_args(tmp_path, "--epochs", "2", "--lr", "0.05", "--resume", "auto", "--data",
                                            str(tmp_path)))
    train_sgd.main(args)  # nothing to train, but the run is taken up again
    with pytest.raises(UserError, match=r"3\.pt not as"):
        in_subspace(train_psgd, tmp_path, tmp_path / "p")


def test_overwrite_removes_what_the_script_writes_and_no_more(tmp_path):
    (tmp_path / "2024_best.pt").write_bytes(b"of somebody")
    sample(tmp_path, epochs=2)
    sample(tmp_path, "--overwrite", epochs=1)
    assert (tmp_path / "2024_best.pt").read_bytes() == b"of somebody" and not (tmp_path / "2.pt").exists()


def test_a_finished_run_is_not_replaced_by_a_checkpoint_from_elsewhere(tmp_path):
    sample(tmp_path / "a", epochs=1)
    sample(tmp_path / "b", epochs=1)
    with pytest.raises(UserError, match="finished sgd run .*; keep it with --resume auto"):
        sample(tmp_path / "a", "--resume", str(tmp_path / "b" / "sgd_checkpoint.pt"), epochs=1)
    assert (tmp_path / "a" / "sgd_summary.json").is_file()


def test_a_final_slash_is_the_same_folder_and_another_name_of_the_network_no_excuse_for_other_labels(noisy, tmp_path):
    assert train_psgd.parse_args(["--save-dir", "a/"]).save_dir == train_psgd.parse_args(["--save-dir", "a"]).save_dir
    with pytest.raises(UserError, match="labels"):
        in_subspace(train_psgd, noisy, tmp_path, "--corrupt", "0.4", "--randomseed", "2", "--allow-mismatch", "arch",
                    "--arch", "resnet20")
