"""Bad input: one clear line, exit status 2 for wrong usage and 1 for the rest, nothing saved before is lost."""
import pickle
import re
import resource
import shutil
import subprocess
import sys

import packages

import pytest
import torch
from conftest import ROOT, digits_args

import models
import train_pbfgs
import train_psgd
import train_sgd
import utils
from dldr.errors import UserError
from dldr.files import save_tensors
from dldr.snapshots import read_snapshot

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
    (train_sgd, "--epochs -1", "--epochs: -1 is not a whole number from 0 to 1,000,000"),
    (train_psgd, "--params_end 9999999999999999999", "--params_end: 9999999999999999999 is not a whole number from"),
    (train_sgd, "--batch-size 0", "--batch-size: 0 is not"),
    (train_sgd, "--lr inf", "--lr"),
    (train_sgd, "--device tpu", "--device tpu: not one of auto, cpu, cuda, cuda:N"),
    (train_sgd, "--device cuda:99", "--device cuda:99"),
    (train_sgd, "--smalldatasets 0", "--smalldatasets 0"),
    (train_sgd, "--randomseed 5000000000", "--randomseed: 5000000000 is not"),
    (train_sgd, "--overwrite --resume auto", "--overwrite starts over, --resume does not"),
    (train_sgd, "--pretrained", "--pretrained: there are no weights for --datasets CIFAR10"),
    (train_psgd, "--allow-mismatch arch,lr", "--allow-mismatch: lr not in datasets, arch"),
    (train_psgd, "--basis nowhere.pt", "--basis nowhere.pt: not one of pca, spherical, random, snapshots, and"),
    (train_psgd, "--n_components 0.9 --basis random", "--n_components 0.9: a share of the variance goes with --basis"),
    (train_psgd, "--n_components 0", "--n_components: 0 is not a whole number from 1"),
    (train_psgd, "--n_components 1.5", "--n_components: 1.5 is not a whole number from 1, or a fraction"),
    (train_psgd, "--n_components 0.9 --params_end 1", "--n_components 0.9 needs at least 2 snapshots"),
    (train_psgd, "--basis random --shard-basis on", "--shard-basis on goes with --basis pca or spherical, not random"),
    (train_psgd, "--start middle", "--start: invalid choice: 'middle'"),
    (train_sgd, "--datasets folder", "and data of your own"),
    (train_psgd, "--wd 1e-4", "--wd"),  # an official flag that did nothing there, so it is not here
])
def test_wrong_usage_exits_with_status_2(script, flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse_args(flags.split())
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line and " error: " in line


@pytest.mark.parametrize("script", [train_psgd, train_pbfgs])
def test_missing_snapshots_are_all_named_before_any_work(sampled, tmp_path, script):
    argv = digits_args(sampled, "--output-dir", str(tmp_path / "out"), "--params_end", "9", "--n_components", "3")
    with pytest.raises(UserError, match="lacks 3 of the 9 snapshots of the window: 6.pt ... 8.pt; train_sgd"):
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


@pytest.mark.parametrize("save", [lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2)), torch.save])
def test_hostile_snapshots_run_no_code(sampled, tmp_path, save):
    directory, marker = copy_snapshots(sampled, tmp_path / "snapshots"), tmp_path / "executed"
    save({"conv1.weight": Payload(marker)}, directory / "3.pt")
    with pytest.raises(UserError, match=r"3\.pt (cannot be read: \S+|holds a pickled _?io.open; only tensors)"):
        train_psgd.main(train_psgd.parse_args(digits_args(directory, *WINDOW)))
    assert not marker.exists()


def test_hostile_checkpoint_is_refused(tmp_path, sampled):
    marker, path = tmp_path / "executed", tmp_path / "psgd_checkpoint.pt"
    torch.save({"method": "psgd", "model": Payload(marker)}, path)
    argv = digits_args(sampled, "--output-dir", str(tmp_path / "out"), *WINDOW, "--resume", str(path))
    for more in ([], ["--evaluate"]):
        with pytest.raises(UserError, match="psgd_checkpoint.pt holds a pickled _?io.open; only tensors"):
            train_psgd.main(train_psgd.parse_args([*argv, *more]))
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))  # the payload does what it is meant to
    assert marker.exists()


def test_no_loader_unpickles_freely():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[mdb]*/*.py")]:
        text = path.read_text()
        loads = text.count("torch.load(") + text.count("get_state_dict(")
        assert loads == text.count("weights_only=True") and 'weights="' not in text, path
        assert text.count("np.load(") == text.count("allow_pickle=False"), path
        assert "pickle.load" not in text


def test_snapshots_of_another_network_show_both_shapes(sampled, tmp_path):
    directory = copy_snapshots(sampled, tmp_path / "snapshots")
    small, large = models.get_model("resnet8", 10), models.get_model("resnet20", 10)  # whose tensors include small's
    for there, here, shapes in ((large, small, r"\(16,.*\), in the network missing"),
                                (small, large, r"missing, in the network \(16")):
        torch.save(there.state_dict(), tmp_path / "0.pt")
        with pytest.raises(UserError, match=rf"0\.pt is of another network: layer1\.1\.\S+ is {shapes}"):
            read_snapshot(tmp_path / "0.pt", here)
    state = torch.load(directory / "2.pt", weights_only=True)
    torch.save({**state, "linear.weight": torch.zeros(100, 32), "linear.bias": torch.zeros(100)}, directory / "2.pt")
    with pytest.raises(UserError, match=r"2\.pt .* linear.weight is \(100, 32\), in the network \(10, 32\) .*classes"):
        train_psgd.main(train_psgd.parse_args(digits_args(directory, *WINDOW)))


def test_a_window_without_variance_is_refused(sampled, tmp_path):
    directory = tmp_path / "same"
    directory.mkdir()
    for i in range(6):
        shutil.copy(sampled / "2.pt", directory / f"{i}.pt")
    with pytest.raises(UserError, match="differ in 0 directions"):
        train_pbfgs.main(train_pbfgs.parse_args(digits_args(directory, *WINDOW)))


@pytest.mark.parametrize("script, flag", [(train_sgd, "--save-dir"), (train_psgd, "--output-dir")])
def test_unwritable_directory(sampled, tmp_path, script, flag):
    (tmp_path / "file").write_text("in the way")
    argv = digits_args(sampled, *(WINDOW if script is train_psgd else []), flag, str(tmp_path / "file" / "run"))
    with pytest.raises(UserError, match=f"{flag} .*file/run cannot be written to: Not a directory"):
        script.main(script.parse_args(argv))
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("script, method, more, message", [
    (train_sgd, "sgd", [], r"training loss is (nan|inf) at iteration \d+"),
    (train_psgd, "psgd", WINDOW, r"training loss is (nan|inf) at iteration \d+"),
    (train_pbfgs, "pbfgs", [*WINDOW, "--alpha", "1e38"], r"training loss is (nan|inf) at iteration \d+"),
    (train_sgd, "sgd", ["--batch-size", "431"], r"test loss is (nan|inf) after the last iteration"),
])
def test_a_loss_that_is_not_finite_stops_before_the_step(sampled, tmp_path, script, method, more, message):
    """The first step is absurd, the next forward overflows: the run ends there, the epoch's start is saved."""
    directory = tmp_path / "run" if method == "sgd" else copy_snapshots(sampled, tmp_path / "run")
    argv = digits_args(directory, *more, "--epochs", "2", "--lr", "1" if method == "pbfgs" else "1e38")
    with pytest.raises(UserError, match=f"epoch 1: the {message}; .*smaller --lr"):
        script.main(script.parse_args(argv))
    saved = torch.load(directory / f"{method}_checkpoint.pt", weights_only=True)
    start = torch.load(directory / "0.pt", weights_only=True)
    assert saved["epoch"] == 0 and all(torch.equal(saved["model"][name], start[name]) for name in start)
    assert not (directory / f"{method}_final.pt").exists() and not (directory / f"{method}_log.jsonl").read_text()


def test_a_line_search_without_a_finite_trial_is_one_line_too(sampled, tmp_path):
    argv = digits_args(sampled, *WINDOW, "--output-dir", str(tmp_path), "--lr", "1e38")
    with pytest.raises(UserError, match=r"line search ended on a loss of (nan|inf) after 20 trials; .*smaller --lr"):
        train_pbfgs.main(train_pbfgs.parse_args(argv))


def test_a_write_that_fails_names_the_path_and_leaves_the_old_file(tmp_path):
    """A true failure of the kernel's: files may not grow beyond 20 kB (on a full disk only the reason differs)."""
    path = tmp_path / "3.pt"
    save_tensors(path, {"w": torch.ones(1000)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"3\.pt cannot be written \(4..,... bytes\): File too large"):
            save_tensors(path, {"w": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [path] and torch.load(path, weights_only=True)["w"].sum() == 1000


@pytest.mark.parametrize("content, message", [
    ({"method": "psgd", "format": 2}, "not a checkpoint"), ({"method": "psgd", "format": 2, "model": {}}, "not a che"),
    ({"method": "psgd", "format": 2, "args": None}, "not a checkpoint"), ({"method": "sgd", "model": {}}, "not a che"),
    ([1, 2], "holds a list"), (torch.zeros(3), "holds a Tensor"),
])
def test_files_that_are_no_checkpoints(sampled, tmp_path, content, message):
    path = tmp_path / "psgd_checkpoint.pt"
    torch.save(content, path)
    argv = digits_args(sampled, "--output-dir", str(tmp_path / "out"), *WINDOW, "--resume", str(path))
    with pytest.raises(UserError, match=message):
        train_psgd.main(train_psgd.parse_args(argv))


def test_messages_are_one_line(monkeypatch, capsys):
    def main(args):
        raise UserError("first\n  second\x1b[2J\x0cthird \udcff")

    monkeypatch.setattr(sys, "argv", ["train_sgd.py"])
    with pytest.raises(SystemExit) as stop:
        utils.run_script(lambda: None, main)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "train_sgd.py: error: first second\\x1b[2J third \\udcff\n"


def test_exit_statuses_and_single_lines_of_real_processes(tmp_path):
    commands = [["train_psgd.py", "--datasets", "digits", "--save-dir", str(tmp_path / "nothing")],
                ["report.py", str(tmp_path)], ["train_sgd.py", "--corrupt", "2"]]
    started = [subprocess.Popen([sys.executable, *command], cwd=ROOT, text=True, stderr=subprocess.PIPE)
               for command in commands]
    ended = [(process.communicate()[1].strip().splitlines(), process.returncode) for process in started]
    (lines, status), report, usage = ended
    assert status == 1 and len(lines) == 1 and lines[0].startswith(f"train_psgd.py: error: {tmp_path / 'nothing'}")
    assert "lacks 51 of the 51" in lines[0] and "0.pt ... 50.pt" in lines[0] and not (tmp_path / "nothing").exists()
    lines, status = report
    assert status == 1 and len(lines) == 1 and "summary.json" in lines[0]
    lines, status = usage
    assert status == 2 and len(lines) == 1 and "--corrupt" in lines[0]


SCRIPTS = ("train_sgd.py", "train_psgd.py", "train_pbfgs.py", "trajectory.py", "report.py")


@pytest.mark.parametrize("version, message", [
    (None, "torch not installed"), ("2.3.1+cu118", "torch 2.3.1+cu118 is too old, 2.4 or later is needed")])
def test_without_torch_or_with_an_old_one_scripts_end_in_one_line(tmp_path, version, message):
    if version:
        (tmp_path / "torch.py").write_text(f"__version__ = {version!r}")
    started = [subprocess.Popen([sys.executable, "-S", script], cwd=ROOT, env={"PYTHONPATH": str(tmp_path)}, text=True,
                                stderr=subprocess.PIPE) for script in SCRIPTS]
    for script, process in zip(SCRIPTS, started, strict=True):
        assert process.communicate()[1] == f"{script}: error: {message}: {sys.executable} -m pip install 'torch>=2.4'\n"
        assert process.returncode == 1


def test_a_package_that_is_missing_later_is_named_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        import sklearn  # noqa: F401
    packages.excepthook(caught.type, caught.value, caught.tb)
    command = f"{sys.executable} -m pip install 'scikit-learn>=1.3'"
    assert capsys.readouterr().err == f"test: error: scikit-learn not installed: {command}\n"
    packages.excepthook(NameError, NameError("name 'torch' is not defined", name="torch"), None)
    assert capsys.readouterr().err == "NameError: name 'torch' is not defined\n"


def test_what_is_wrong_with_packages_and_how_it_is_mended(monkeypatch):
    names = ["torch", "torchvision", "numpy", "tqdm"]
    assert packages.check(names) is None
    monkeypatch.setattr("numpy.__version__", "1.25.2")
    for name in ("torchvision", "tqdm"):
        monkeypatch.setitem(sys.modules, name, None)
    torch_stays = f"torch=={torch.__version__.split('+')[0]}"
    assert packages.check(names) == (
        "torchvision, tqdm not installed; numpy 1.25.2 is too old, 1.26 or later is needed: "
        f"{sys.executable} -m pip install 'torchvision>=0.19' 'numpy>=1.26' 'tqdm>=4.66' {torch_stays}")
    monkeypatch.setitem(packages.OLDEST, "requires-python", "4.2")
    assert re.fullmatch(r"Python 3\.\d+\.\d+ is too old, 4.2 or later is needed", packages.check(names))


def test_the_oldest_stack_is_the_lower_end_of_the_ranges():
    pins = re.findall(r"([\w-]+)==([\d.]+)", (ROOT / "tests" / "stacks.sh").read_text())
    pins = {name: packages.release(version) for name, version in pins}
    ranges = {name: packages.release(version) for name, version in packages.OLDEST.items()}
    assert len(pins) == 6 and pins.items() <= ranges.items()
    assert ranges["requires-python"] == (3, 10) and "python3.10" in (ROOT / "tests" / "stacks.sh").read_text()
