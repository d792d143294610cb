"""Bad input: one clear line, exit status 2 for wrong usage and 1 for the rest, nothing saved before is lost."""
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, digits_args

import train_pbfgs
import train_psgd
import train_sgd
from utils import InputError

WINDOW = ["--params_end", "6", "--n_components", "4"]


@pytest.mark.parametrize("script, flags, message", [
    (train_psgd, "--params_end 41 --n_components 41", "--n_components 41 needs at least 42 snapshots"),
    (train_pbfgs, "--params_end 81 --params_step 2 --n_components 41", "--params_step 2 are 41"),
    (train_psgd, "--params_start 5 --params_end 5", "--params_end 5 must be larger than --params_start 5"),
    (train_sgd, "--corrupt 1.5", "--corrupt: 1.5 is not in [0, 1]"),
    (train_sgd, "--corrupt nan", "--corrupt: nan is not in [0, 1]"),
    (train_pbfgs, "--datasets cifar1O", "did you mean CIFAR10"),
    (train_sgd, "--arch resnet21", "resnet20"),
    (train_sgd, "--datasets ImageNet --arch resnet19", "resnet18"),
    (train_sgd, "--epochs -1", "--epochs: -1 is not a whole number of at least 0"),
    (train_sgd, "--batch-size 0", "--batch-size: 0 is not"),
    (train_sgd, "--lr inf", "--lr"),
    (train_sgd, "--device tpu", "--device tpu: not one of auto, cpu, cuda, cuda:N"),
    (train_sgd, "--device cuda:99", "--device cuda:99"),
    (train_sgd, "--smalldatasets 0", "--smalldatasets 0"),
    (train_psgd, "--wd 1e-4", "--wd"),  # an official flag that did nothing there, so it is not here
])
def test_wrong_usage_exits_with_status_2(script, flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse_args(flags.split())
    assert stop.value.code == 2
    *usage, line = capsys.readouterr().err.strip().splitlines()
    assert message in line and " error: " in line


@pytest.mark.parametrize("script", [train_psgd, train_pbfgs])
def test_missing_snapshots_are_all_named_before_any_work(sampled, tmp_path, script):
    argv = digits_args(sampled, "--output-dir", str(tmp_path / "out"), "--params_end", "9", "--n_components", "3")
    with pytest.raises(InputError, match="lacks 3 of the 9 snapshots .*: 6.pt 7.pt 8.pt"):
        script.main(script.parse_args(argv))
    assert not (tmp_path / "out").exists()


def copy_snapshots(sampled, directory):
    directory.mkdir()
    for i in range(6):
        shutil.copy(sampled / f"{i}.pt", directory)
    return directory


class Payload:
    """What a hostile pickle does when it is loaded: call any function."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def bad_snapshot(kind, path, marker):
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:20_000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "foreign":
        path.write_text("not a tensor file\n")
    elif kind == "hostile pickle":
        path.write_bytes(pickle.dumps({"conv1.weight": Payload(marker)}, protocol=2))
    elif kind == "hostile torch file":
        torch.save({"conv1.weight": Payload(marker)}, path)


@pytest.mark.parametrize("kind", ["truncated", "empty", "foreign", "hostile pickle", "hostile torch file"])
def test_unreadable_snapshots_name_the_file_and_run_no_code(sampled, tmp_path, kind):
    directory = copy_snapshots(sampled, tmp_path / "snapshots")
    marker = tmp_path / "executed"
    bad_snapshot(kind, directory / "3.pt", marker)
    with pytest.raises(InputError, match=r"3\.pt cannot be read: \S+"):
        train_psgd.main(train_psgd.parse_args(digits_args(directory, *WINDOW)))
    assert not marker.exists()


def test_hostile_checkpoint_is_refused(tmp_path, sampled):
    marker, path = tmp_path / "executed", tmp_path / "psgd_checkpoint.pt"
    torch.save({"method": "psgd", "model": Payload(marker)}, path)
    argv = digits_args(sampled, "--output-dir", str(tmp_path), *WINDOW, "--resume", str(path))
    for more in ([], ["--evaluate"]):
        with pytest.raises(InputError, match="cannot be read"):
            train_psgd.main(train_psgd.parse_args([*argv, *more]))
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))  # the payload does what it is meant to
    assert marker.exists()


def test_no_loader_unpickles_freely():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("models/*.py"), *ROOT.glob("datasets/*.py")]:
        text = path.read_text()
        assert text.count("torch.load(") == text.count("weights_only=True"), path
        assert text.count("np.load(") == text.count("allow_pickle=False"), path
        assert "pickle.load" not in text


def test_snapshots_of_another_network_show_both_shapes(sampled, tmp_path):
    other = digits_args(sampled, *WINDOW, "--output-dir", str(tmp_path))
    other[other.index("resnet8")] = "resnet20"
    with pytest.raises(InputError, match=r"5\.pt has no tensor 'layer1\.1\.conv1\.weight'"):
        train_psgd.main(train_psgd.parse_args(other))
    directory = copy_snapshots(sampled, tmp_path / "classes")
    state = torch.load(directory / "2.pt", weights_only=True)
    torch.save({**state, "linear.weight": torch.zeros(100, 64), "linear.bias": torch.zeros(100)}, directory / "2.pt")
    with pytest.raises(InputError, match=r"2\.pt: linear.weight has shape \(100, 64\), the network \(10, 64\)"):
        train_psgd.main(train_psgd.parse_args(digits_args(directory, *WINDOW)))


def test_a_window_without_variance_is_refused(sampled, tmp_path):
    directory = tmp_path / "same"
    directory.mkdir()
    for i in range(6):
        shutil.copy(sampled / "2.pt", directory / f"{i}.pt")
    with pytest.raises(InputError, match="differ in 0 directions"):
        train_pbfgs.main(train_pbfgs.parse_args(digits_args(directory, *WINDOW)))


@pytest.mark.parametrize("script, flag", [(train_sgd, "--save-dir"), (train_psgd, "--output-dir")])
def test_unwritable_directory(sampled, tmp_path, script, flag):
    (tmp_path / "file").write_text("in the way")
    argv = digits_args(sampled, *(WINDOW if script is train_psgd else []), flag, str(tmp_path / "file" / "run"))
    with pytest.raises(InputError, match=f"{flag} .*file/run cannot be made: Not a directory"):
        script.main(script.parse_args(argv))
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("script, method, more", [
    (train_sgd, "sgd", []), (train_psgd, "psgd", WINDOW)])
def test_a_loss_that_is_not_finite_stops_before_the_step(sampled, tmp_path, script, method, more):
    """The first step is absurd, the second forward overflows: the run ends there, the epoch's start is saved."""
    directory = copy_snapshots(sampled, tmp_path / "run")
    argv = digits_args(directory, *more, "--epochs", "2", "--lr", "1e38")
    with pytest.raises(InputError, match=r"epoch 1: the training loss is (nan|inf) at iteration \d+; .*smaller --lr"):
        script.main(script.parse_args(argv))
    saved = torch.load(directory / f"{method}_checkpoint.pt", weights_only=True)
    start = torch.load(directory / "0.pt", weights_only=True)
    assert saved["epoch"] == 0 and all(torch.equal(saved["model"][name], start[name]) for name in start)
    assert not (directory / f"{method}_final.pt").exists()


def test_exit_statuses_and_single_lines_of_real_processes(tmp_path):
    def run(*argv):
        done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True)
        return done.returncode, done.stderr.strip().splitlines()

    status, lines = run("train_psgd.py", "--datasets", "digits", "--save-dir", str(tmp_path / "nothing"))
    assert status == 1 and len(lines) == 1 and lines[0].startswith("train_psgd.py: error: --save-dir")
    assert "0.pt 1.pt" in lines[0] and "50.pt" in lines[0] and not (tmp_path / "nothing").exists()
    status, lines = run("report.py", str(tmp_path))
    assert status == 1 and len(lines) == 1 and "summary.json" in lines[0]
    status, lines = run("train_sgd.py", "--corrupt", "2")
    assert status == 2 and "--corrupt" in lines[-1]
