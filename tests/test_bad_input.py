"""Bad input: one clear line, exit status 2 for wrong usage and 1 for the rest, nothing saved before is lost."""
import pickle
import re
import resource
import shutil
import subprocess
import sys
from functools import partial

import packages

import pytest
import torch
from runs import ROOT, SCRIPTS, digits_run, log_of, same, state
from torch import nn

import utils
from dldr.errors import UserError
from dldr.files import load_file, save_tensors


@pytest.mark.parametrize("method, flags, message", [
    ("psgd", "--params_end 41 --n_components 41", "--n_components 41 needs at least 42 snapshots"),
    ("pbfgs", "--params_end 81 --params_step 2 --n_components 41", "--params_step 2 are 41"),
    ("psgd", "--params_start 5 --params_end 5", "--params_end 5 must be larger than --params_start 5"),
    ("sgd", "--corrupt 1.5", "--corrupt: 1.5 is not in [0, 1]"),
    ("sgd", "--corrupt nan", "--corrupt: nan is not in [0, 1]"),
    ("pbfgs", "--datasets cifar1O", "did you mean CIFAR10"),
    ("sgd", "--arch resnet21", "resnet20"),
    ("sgd", "--datasets ImageNet --arch resnet19", "resnet18"),
    ("sgd", "--epochs -1", "--epochs: -1 is not a whole number from 0 to 1,000,000"),
    ("psgd", "--params_end 9999999999999999999", "--params_end: 9999999999999999999 is not a whole number from"),
    ("sgd", "--batch-size 0", "--batch-size: 0 is not"),
    ("sgd", "--lr inf", "--lr"),
    ("sgd", "--device tpu", "--device tpu: not one of auto, cpu, cuda, cuda:N"),
    ("sgd", "--device cuda:99", "--device cuda:99"),
    ("sgd", "--smalldatasets 0", "--smalldatasets 0"),
    ("sgd", "--randomseed 5000000000", "--randomseed: 5000000000 is not"),
    ("sgd", "--start-epoch 3 --epochs 3", "--start-epoch 3 leaves none of --epochs 3"),
    ("sgd", "--overwrite --resume auto", "--overwrite starts over, --resume does not"),
    ("sgd", "--pretrained", "--pretrained: there are no weights for --datasets CIFAR10"),
    ("psgd", "--allow-mismatch arch,lr", "--allow-mismatch: lr not in datasets, arch"),
    ("psgd", "--basis nowhere.pt", "--basis nowhere.pt: not one of pca, spherical, random, snapshots, and"),
    ("psgd", f"--basis {__file__} --save-basis {__file__}", "would replace the file of --basis"),
    ("psgd", "--save-basis run/40.pt", "--save-basis run/40.pt: snapshots and the runs' own files have such names"),
    ("pbfgs", "--save-basis psgd_final.pt", "--save-basis psgd_final.pt: snapshots and the runs' own files"),
    ("psgd", "--n_components 0.9 --basis random", "--n_components 0.9: a share of the variance goes with --basis"),
    ("psgd", "--n_components 0", "--n_components: 0 is not a whole number from 1"),
    ("psgd", "--n_components 1.5", "--n_components: 1.5 is not a whole number from 1, or a fraction"),
    ("psgd", "--n_components 0.9 --params_end 1", "--n_components 0.9 needs at least 2 snapshots"),
    ("psgd", "--basis random --shard-basis on", "--shard-basis on goes with --basis pca or spherical, not random"),
    ("psgd", "--start middle", "--start: invalid choice: 'middle'"),
    ("sgd", "--datasets folder", "and data of your own"),
    ("psgd", "--wd 1e-4", "--wd"),  # an official flag that did nothing there, so it is not here
])
def test_wrong_usage_exits_with_status_2(method, flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[method].parse_args(flags.split())
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line and " error: " in line


@pytest.mark.parametrize("method", ["psgd", "pbfgs"])
def test_missing_snapshots_are_all_named_before_any_work(sampled, tmp_path, method):
    with pytest.raises(UserError, match="lacks 3 of the 9 snapshots of the window: 6.pt ... 8.pt; train_sgd"):
        digits_run(method, sampled, "--params_end", 9, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def copied(sampled, tmp_path):
    """A directory with nothing but snapshots, to be changed."""
    (directory := tmp_path / "snapshots").mkdir()
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
def test_hostile_snapshots_run_no_code(copied, tmp_path, save):
    save({"conv1.weight": Payload(tmp_path / "executed")}, copied / "3.pt")
    with pytest.raises(UserError, match=r"3\.pt (cannot be read: \S+|holds a pickled _?io.open; only tensors)"):
        digits_run("psgd", copied)
    assert not (tmp_path / "executed").exists()


def test_a_snapshot_damaged_where_its_checksums_are_is_named(sampled, copied, tmp_path):
    digits_run("psgd", copied, "--epochs", 1, output=tmp_path)
    data = bytearray((copied / "3.pt").read_bytes())
    data[data.rindex(b"PK\1\2") + 1] ^= 1
    (copied / "3.pt").write_bytes(data)
    for more in ([], ["--resume", "auto"]):
        with pytest.raises(UserError, match=r"3\.pt cannot be read: Bad magic number for central directory"):
            digits_run("psgd", copied, "--epochs", 1, *more, output=tmp_path)


def test_hostile_checkpoint_is_refused(tmp_path, sampled):
    marker, path = tmp_path / "executed", tmp_path / "psgd_checkpoint.pt"
    torch.save({"method": "psgd", "model": Payload(marker)}, path)
    for more in ([], ["--evaluate"]):
        with pytest.raises(UserError, match="psgd_checkpoint.pt holds a pickled _?io.open; only tensors"):
            digits_run("psgd", sampled, "--resume", path, *more, output=tmp_path / "out")
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


def test_a_window_without_variance_is_refused(copied):
    for i in range(1, 6):
        shutil.copy(copied / "0.pt", copied / f"{i}.pt")
    with pytest.raises(UserError, match="differ in 0 directions.*--n_components"):
        digits_run("pbfgs", copied)


@pytest.mark.parametrize("method, flag", [("sgd", "--save-dir"), ("psgd", "--output-dir")])
def test_unwritable_directory(sampled, tmp_path, method, flag):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=f"{flag} .*file/run cannot be written to: Not a directory"):
        digits_run(method, sampled, flag, tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("method, more, message", [
    ("sgd", ["--lr", 1e38], r"training loss is (nan|inf) at iteration \d+"),
    ("psgd", ["--lr", 1e38], r"training loss is (nan|inf) at iteration \d+"),
    ("pbfgs", ["--alpha", 1e38], r"training loss is (nan|inf) at iteration \d+"),
    ("sgd", ["--lr", 1e38, "--batch-size", 431], r"test loss is (nan|inf) after the last iteration"),
])
def test_a_loss_that_is_not_finite_stops_before_the_step(copied, tmp_path, method, more, message):
    """The first step is absurd, the next forward overflows: the run ends there, the epoch's start is saved."""
    directory = tmp_path / "run" if method == "sgd" else copied
    with pytest.raises(UserError, match=f"epoch 1: the {message}; .*smaller --lr"):
        digits_run(method, directory, "--epochs", 2, *more)
    saved = state(directory / f"{method}_checkpoint.pt")
    assert saved["epoch"] == 0 and same(saved["model"], directory / "0.pt")
    assert not (directory / f"{method}_final.pt").exists() and not log_of(directory, method)


def test_a_line_search_without_a_finite_trial_is_one_line_too(sampled, tmp_path):
    with pytest.raises(UserError, match=r"line search ended on a loss of (nan|inf) after 20 trials; .*smaller --lr"):
        digits_run("pbfgs", sampled, "--lr", 1e38, output=tmp_path)


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
    assert list(tmp_path.iterdir()) == [path] and state(path)["w"].sum() == 1000


@pytest.mark.parametrize("content, message", [
    ({"method": "psgd", "format": 2}, "not a checkpoint"), ({"method": "psgd", "format": 2, "model": {}}, "not a che"),
    ({"method": "psgd", "format": 2, "args": None}, "not a checkpoint"), ({"method": "sgd", "model": {}}, "not a che"),
    ([1, 2], "holds a list"), (torch.zeros(3), "holds a Tensor"),
])
def test_files_that_are_no_checkpoints(sampled, tmp_path, content, message):
    path = tmp_path / "psgd_checkpoint.pt"
    torch.save(content, path)
    with pytest.raises(UserError, match=message):
        digits_run("psgd", sampled, "--resume", path, output=tmp_path / "out")


def test_a_checkpoint_of_another_format_is_refused(sampled, tmp_path):
    torch.save({**state(sampled / "sgd_checkpoint.pt"), "format": 1}, path := tmp_path / "sgd_checkpoint.pt")
    with pytest.raises(UserError, match="sgd_checkpoint.pt is not a checkpoint of this script and version"):
        digits_run("sgd", tmp_path / "run", "--epochs", 5, "--lr", 0.05, "--resume", path)


def test_messages_are_one_line(monkeypatch, capsys):
    def main(args):
        raise UserError("first\n  second\x1b[2J\x0cthird \udcff")

    monkeypatch.setattr(sys, "argv", ["train_sgd.py"])
    with pytest.raises(SystemExit) as stop:
        utils.run_script(lambda: None, main)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "train_sgd.py: error: first second\\x1b[2J third \\udcff\n"


def test_a_mini_batch_of_one_sample_is_one_line(monkeypatch, capsys):
    def main(args):
        nn.BatchNorm1d(3)(torch.zeros(1, 3))

    monkeypatch.setattr(sys, "argv", ["train_sgd.py"])
    with pytest.raises(SystemExit):
        utils.run_script(lambda: None, main)
    err = capsys.readouterr().err
    assert err.startswith("train_sgd.py: error: batch norm cannot normalise a mini-batch") and err.count("\n") == 1


def test_a_closed_pipe_costs_no_epoch_but_the_last(sampled, tmp_path, monkeypatch):
    """What cannot be printed any more has been trained; checkpoints are due every ten epochs."""
    monkeypatch.setattr("builtins.print", partial(pipe_that_closes, print, "3/5"))
    with pytest.raises(BrokenPipeError):
        digits_run("psgd", sampled, "--epochs", 5, output=tmp_path)
    monkeypatch.undo()
    assert load_file(tmp_path / "psgd_checkpoint.pt", "checkpoint")["epoch"] == 2
    assert digits_run("psgd", sampled, "--epochs", 5, "--resume", "auto", output=tmp_path)["epochs"] == 5


def pipe_that_closes(write, at, *words, **options):
    if any(at in str(word) for word in words):
        raise BrokenPipeError
    write(*words, **options)


def ended(*commands, **options):
    """(exit status, stderr) of each of the commands, which run at once."""
    started = [subprocess.Popen([sys.executable, *command], cwd=ROOT, text=True, stderr=subprocess.PIPE, **options)
               for command in commands]
    return [(process.communicate()[1], process.returncode)[::-1] for process in started]


def test_exit_statuses_and_single_lines_of_real_processes(tmp_path):
    nothing = tmp_path / "nothing"
    (status, line), report, usage = ended(["train_psgd.py", "--datasets", "digits", "--save-dir", nothing],
                                          ["report.py", tmp_path], ["train_sgd.py", "--corrupt", "2"])
    assert status == 1 and line.startswith(f"train_psgd.py: error: {nothing} lacks 51 of the 51")
    assert "0.pt ... 50.pt" in line and not nothing.exists()
    assert report[0] == 1 and "summary.json" in report[1] and usage[0] == 2 and "--corrupt" in usage[1]
    assert all(text.count("\n") == 1 for text in (line, report[1], usage[1]))


@pytest.mark.parametrize("version, message", [
    (None, "torch not installed"), ("2.3.1+cu118", "torch 2.3.1+cu118 is too old, 2.4 or later is needed")])
def test_without_torch_or_with_an_old_one_scripts_end_in_one_line(tmp_path, version, message):
    if version:
        (tmp_path / "torch.py").write_text(f"__version__ = {version!r}")
    scripts = ("train_sgd.py", "train_psgd.py", "train_pbfgs.py", "trajectory.py", "report.py")
    for script, end in zip(scripts, ended(*(["-S", script] for script in scripts), env={"PYTHONPATH": str(tmp_path)}),
                           strict=True):
        assert end == (1, f"{script}: error: {message}: {sys.executable} -m pip install 'torch>=2.4'\n")


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
