"""The three scripts end to end on real digits, through main(parse_args([...])): files, numbers, resume, evaluation."""
import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
from runs import ROOT, SCRIPTS, digits_args, digits_run, log_of, run, same, state

import models
import report
import train_pbfgs
import train_psgd
import train_sgd
import utils
from dldr.checkpoint import Run
from dldr.errors import UserError
from dldr.snapshots import load_window

SUMMARY_KEYS = """method dataset arch seed corrupt parameters parameters_trained n_components snapshots epochs
test_accuracy_last test_accuracy_best best_epoch train_accuracy_last explained_variance seconds args versions hardware
git_revision finished""".split()
LOG_KEYS = """epoch lr train_loss train_accuracy test_loss test_accuracy best_accuracy best_epoch seconds
samples_per_second""".split()
SEARCH_KEYS = ["trials_per_step", "first_trial_accepted", "failed_searches", "skipped_updates"]
RESNET8 = ["--arch", "resnet8", "--smalldatasets", "0.1"]


@pytest.fixture(scope="module")
def resnet8(tmp_path_factory):
    """As `sampled`, of a published network."""
    directory = tmp_path_factory.mktemp("resnet8")
    digits_run("sgd", directory, *RESNET8, "--epochs", 5, "--lr", 0.05)
    return directory


def test_sgd_writes_snapshots_log_and_summary(resnet8):
    assert sorted(p.name for p in resnet8.glob("[0-9]*.pt")) == [f"{i}.pt" for i in range(6)]
    summary = json.loads((resnet8 / "sgd_summary.json").read_text())
    assert not set(SUMMARY_KEYS) - set(summary)
    assert summary["parameters"] == summary["parameters_trained"] == 75_290
    assert summary["n_components"] is None and summary["explained_variance"] is None and summary["snapshots"] == 6
    assert set(summary["seconds"]) == {"load", "basis", "train", "eval", "total"}
    lines = log_of(resnet8, "sgd")
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5] and set(lines[0]) == set(LOG_KEYS)
    best = max(lines, key=lambda line: line["test_accuracy"])
    assert summary["test_accuracy_best"] == best["test_accuracy"] == lines[-1]["best_accuracy"]
    assert summary["best_epoch"] == best["epoch"] and summary["test_accuracy_last"] == lines[-1]["test_accuracy"]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert same(resnet8 / "sgd_final.pt", resnet8 / "5.pt")
    assert json.loads((resnet8 / "sgd_args.json").read_text())["args"]["lr"] == 0.05
    # nothing else, and no temporary file left behind
    assert {p.name for p in resnet8.iterdir() if not p.stem.isdigit()} == {
        ".sgd.lock", "sgd_args.json", "sgd_log.jsonl", "sgd_checkpoint.pt", "sgd_final.pt", "sgd_summary.json",
        "sgd_snapshots.json"}


@pytest.mark.parametrize("method", ["psgd", "pbfgs"])
def test_subspace_scripts(resnet8, tmp_path, method, capsys):
    summary = digits_run(method, resnet8, *RESNET8, "--epochs", 3, output=tmp_path)
    out = capsys.readouterr().out
    assert not set(SUMMARY_KEYS) - set(summary) and summary["parameters_trained"] == summary["n_components"] == 4
    assert summary["snapshots"] == 6 and 0.9 < summary["explained_variance"]["total"] <= 1
    assert len(summary["explained_variance"]["per_component"]) == 4
    lines = log_of(tmp_path, method)
    assert set(lines[0]) == {"theta", *LOG_KEYS, *(SEARCH_KEYS if method == "pbfgs" else [])}
    assert len(lines[0]["theta"]) == 4 and lines[0]["theta"] != lines[-1]["theta"]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert out.index("basis: 4 components of 6 snapshots explain") < out.index("    1/3  ")
    (line,) = [line for line in out.splitlines() if line.startswith("summary ")]
    assert f"method={method}" in line and f"test_accuracy_last={summary['test_accuracy_last']:.2f}"[:-1] in line
    assert {p.name for p in tmp_path.iterdir()} == {
        f".{method}.lock",
        *(f"{method}_{name}" for name in ("args.json", "log.jsonl", "checkpoint.pt", "final.pt", "summary.json"))}
    # the final network lies in w_start + span of the window's differences
    paths = [*(resnet8 / f"{i}.pt" for i in range(6)), tmp_path / f"{method}_final.pt"]
    *steps, move = (X := load_window(paths, models.get_model("resnet8", 10)).double())[1:] - X[0]
    basis = torch.linalg.qr(torch.stack(steps).T)[0]
    assert (move - basis @ (basis.T @ move)).norm() <= 1e-5 * X[0].norm() < move.norm()


@pytest.mark.parametrize("loss", [1e-5, 2.3, 1e10, 1e38])
def test_lines_of_an_epoch_fit_100_columns_under_one_header(tmp_path, capsys, loss):
    args = {"save_dir": str(tmp_path), "epochs": 1000, "randomseed": 1, "save_every": 10}
    of_passes = {"loss": loss, "accuracy": 100.0, "top5": 100.0, "samples": 50_000}
    searches = {"trials_per_step": 20.0, "theta": [0.5]}
    for _ in range(2):  # a resumed run has a header of its own
        lines = Run("pbfgs", args, ())
        for epoch in (8, 999):
            lines.log_epoch(epoch, 1e-5, of_passes, of_passes, 12345.6, searches)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 3 and {len(line) for line in lines} == {max(map(len, lines))} and len(lines[0]) <= 100
        cells = dict(zip(re.split("  +", lines[0].strip()), lines[1].split(), strict=True))
        assert list(cells)[:4] == ["epoch", "lr", "train loss", "train %"] and cells["epoch"] == "9/1000"
        assert float(cells["test loss"]) == pytest.approx(loss) and cells["trials"] == "20.00" and cells["at"] == "9"


def test_a_stage_ends_with_where_its_files_are_and_a_next_command_that_works(sampled, tmp_path, capsys):
    def last_lines():
        *_, files, following = capsys.readouterr().out.splitlines()
        text, _, command = following.partition(": ")
        return files, text, shlex.split(command)

    digits_run("sgd", sampled, "--epochs", 5, "--lr", 0.05, "--resume", "auto")  # is finished
    files, text, (python, script, *flags) = last_lines()
    assert files == f"snapshots: {sampled}/0.pt ... 5.pt" and text == "next, or with train_pbfgs.py"
    assert (python, script) == ("python", "train_psgd.py") and train_pbfgs.parse_args(flags).n_components == 5
    output = tmp_path / "the run"
    run("psgd", [*flags, "--output-dir", str(output), "--epochs", "1", "--batch-size", "64"])
    files, text, command = last_lines()
    assert (files, text) == (f"files: {output}/psgd_*", "next")
    assert command == ["python", "report.py", str(output)]
    report.main(report.parse_args(command[2:]))
    assert "\nP-SGD " in capsys.readouterr().out


@pytest.mark.parametrize("seed", [1, 2])
def test_the_seed_decides_the_initial_weights(sampled, tmp_path, seed):
    digits_run("sgd", tmp_path, "--epochs", 0, "--randomseed", seed)
    assert same(sampled / "0.pt", tmp_path / "0.pt") == (seed == 1)


@pytest.mark.parametrize("method, more", [("sgd", ["--optimizer", "adam"]), ("psgd", ["--milestones", 2]),
                                          ("pbfgs", ["--alpha", 0.01])])
def test_resume_ends_where_an_uninterrupted_run_does(sampled, tmp_path, method, more):
    """From a named checkpoint, to more epochs; bitwise the same network and log (how runs are cut: test_resume.py)."""
    def start(name, epochs, *resume):
        return digits_run(method, tmp_path / name if method == "sgd" else sampled, *more, "--accumulate", 2, "--epochs",
                          epochs, *resume, output=tmp_path / name)

    start("cut", 2)
    summaries = [start("whole", 3), start("cut", 3, "--resume", tmp_path / "cut" / f"{method}_checkpoint.pt")]
    assert same(*(tmp_path / name / f"{method}_final.pt" for name in ("whole", "cut")))
    logs = [log_of(tmp_path / name, method, "seconds", "samples_per_second") for name in ("whole", "cut")]
    assert logs[0] == logs[1] and len(logs[0]) == 3
    assert len({summary["test_accuracy_best"] for summary in summaries}) == 1
    trained = 4 if method == "psgd" else summaries[0]["parameters"]  # P+-BFGS moves all of them
    assert [summary["parameters_trained"] for summary in summaries] == [trained, trained]


@pytest.mark.parametrize("k", ["4", "0.9"])
def test_resume_refuses_another_window(k, sampled, tmp_path):
    """The same flags, but the snapshots (in torch's older format) are of another run: theta would mean other ones."""
    (other := tmp_path / "other").mkdir()

    def change(factor):
        for i in range(6):
            values = state(sampled / f"{i}.pt")
            values["conv1.weight"] = values["conv1.weight"] * (1 + factor * i)
            torch.save(values, other / f"{i}.pt", _use_new_zipfile_serialization=False)

    def start(epochs, snapshots=other):
        return digits_run("psgd", snapshots, "--resume", "auto", "--epochs", epochs, "--n_components", k,
                          output=tmp_path / "out")

    change(0)
    start(1)
    finished = (tmp_path / "out" / "psgd_summary.json").stat().st_mtime_ns
    change(10)  # a share of the variance is then that of another number of directions
    for epochs in (1, 2):  # neither finished, nor to be resumed
        with pytest.raises(UserError, match="was made with different snapshots"):
            start(epochs)
    assert finished == (tmp_path / "out" / "psgd_summary.json").stat().st_mtime_ns  # and nothing lost
    with pytest.raises(UserError, match="other flags .save_dir"):
        start(2, sampled)


def cuda(monkeypatch, *, available, capability=(8, 6), architectures=("sm_75", "sm_86"), count=2):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)  # which counts GPUs that cannot be used, too
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(architectures))


def test_device_names(monkeypatch):
    cuda(monkeypatch, available=True)
    names = {name: str(utils.pick_device(name)) for name in ("auto", "cuda", "cuda:1", "cpu")}
    assert names == {"auto": "cuda:0", "cuda": "cuda:0", "cuda:1": "cuda:1", "cpu": "cpu"}
    with pytest.raises(UserError, match="--device cuda:2: no device 2, 2 found"):
        utils.pick_device("cuda:2")
    cuda(monkeypatch, available=False)
    assert utils.pick_device("auto").type == "cpu"
    with pytest.raises(UserError, match="--device cuda: no CUDA device found; use --device cpu"):
        utils.pick_device("cuda")


@pytest.mark.parametrize("capability, architectures, runs", [
    ((7, 0), ["sm_75", "sm_80", "sm_90"], False), ((8, 9), ["sm_75", "sm_86"], True), ((8, 0), ["sm_86"], False),
    ((12, 0), ["sm_90", "compute_90"], True), ((12, 0), ["sm_90"], False), ((10, 3), ["sm_90a", "sm_100"], True),
    ((9, 0), ["gfx90a"], True), ((9, 0), [], True),
])
def test_a_gpu_whose_architecture_is_not_in_the_build_is_refused(monkeypatch, capability, architectures, runs):
    cuda(monkeypatch, available=True, capability=capability, architectures=architectures)
    if runs:
        assert utils.pick_device("auto").type == "cuda"
    else:
        with pytest.raises(UserError, match=rf"GPU .*compute capability {capability[0]}\.{capability[1]}, not in this "
                                            r"build; .*docs/install.md\), or use --device cpu$"):
            utils.pick_device("auto")


@pytest.mark.parametrize("error, reason", [
    (RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update it"),
     r"too old \(found version 11040\);"),
    (AssertionError("Torch not compiled with CUDA enabled"), "Torch not compiled with CUDA enabled;"),
])
def test_a_gpu_that_torch_cannot_use_is_not_passed_over_for_the_cpu(monkeypatch, tmp_path, capsys, error, reason):
    def init():
        raise error

    (tmp_path / "nvidia0").touch()
    cuda(monkeypatch, available=False)
    monkeypatch.setattr("dldr.device.glob", lambda pattern: [tmp_path / "nvidia0"])
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in ("auto", "cuda"):
        with pytest.raises(SystemExit, match="2"):
            train_sgd.parse_args(["--device", name])
        (line,) = capsys.readouterr().err.splitlines()
        assert f"--device {name}: torch {torch.__version__} cannot use the GPU of this" in line
        assert re.search(reason, line)
    assert utils.pick_device("cpu").type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert utils.pick_device("auto").type == "cpu"


def test_evaluate_reads_the_final_network_and_writes_nothing(sampled, capsys):
    before = {path: path.stat().st_mtime_ns for path in sampled.iterdir()}
    test = digits_run("sgd", sampled, "--evaluate")
    assert test["accuracy"] == log_of(sampled, "sgd")[-1]["test_accuracy"]
    assert "test accuracy" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in sampled.iterdir()}
    for method, file in (("sgd", "sgd_checkpoint.pt"), ("psgd", "5.pt")):  # and no window is needed for it
        assert run(method, digits_args(sampled, "--evaluate", "--resume", sampled / file)) == test
    with pytest.raises(UserError, match="psgd_final.pt: there is no final network"):
        digits_run("psgd", sampled, "--evaluate")


@pytest.mark.parametrize("method", SCRIPTS)
def test_half_trains(sampled, tmp_path, method):
    """--half changes the rounding of the network's passes, not the kind of any stored value."""
    digits_run(method, tmp_path if method == "sgd" else sampled, "--epochs", 2, "--half", output=tmp_path)
    lines = log_of(tmp_path, method)
    assert lines[1]["train_loss"] < lines[0]["train_loss"]
    assert {value.dtype for value in state(tmp_path / f"{method}_final.pt").values()} == {torch.float32, torch.int64}


def test_schedules():
    factor = utils.drops([100, 150])
    assert [factor(e) for e in (0, 99, 100, 149, 150)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    warm = utils.drops([100], warm_up=True)
    assert [warm(e) for e in (0, 1, 100)] == pytest.approx([0.1, 1, 0.1])
    assert train_sgd.parse_args(["--optimizer", "adam"]).lr == 0.001
    assert train_sgd.parse_args(["--datasets", "CIFAR100"]).milestones == [150]
    default, imagenet = train_sgd.parse_args([]), train_sgd.parse_args(["--datasets", "ImageNet", "-a", "resnet18"])
    assert (default.milestones, default.epochs, default.batch_size) == ([100, 150], 200, 128)
    assert (imagenet.milestones, imagenet.epochs, imagenet.batch_size) == ([30, 60], 90, 256)
    assert (default.samples_per_epoch, imagenet.samples_per_epoch) == (1, 6)
    assert train_psgd.parse_args([]).milestones == [30, 50]
    assert train_sgd.sampling_iterations(5005, 6) == [1, 1001, 2001, 3001, 4001, 5001]  # after iterations 0, 1000, ...
    assert train_sgd.sampling_iterations(391, 1) == [391]
    with pytest.raises(UserError, match="--samples-per-epoch"):
        train_sgd.sampling_iterations(5, 6)


def test_start_epoch_numbers_epochs_and_snapshots(tmp_path):
    summary = digits_run("sgd", tmp_path, "--start-epoch", 3, "--epochs", 4)
    assert sorted(p.name for p in tmp_path.glob("[0-9]*.pt")) == ["3.pt", "4.pt"]
    assert [line["epoch"] for line in log_of(tmp_path, "sgd")] == [4] and summary["snapshots"] == 2


def test_help_imports_no_network_and_writes_nothing(tmp_path):
    started = [subprocess.Popen([sys.executable, "-X", "importtime", ROOT / script, "--help"], text=True, cwd=tmp_path,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
               for script in ("train_sgd.py", "train_psgd.py", "train_pbfgs.py", "report.py", "trajectory.py")]
    for process in started:
        out, errors = process.communicate()
        lines = errors.splitlines()
        assert process.returncode == 0 and "example" in out.lower()
        assert all(line.startswith("import time:") for line in lines)
        imported = {line.rpartition("|")[2].strip() for line in lines}
        assert "models" in imported or "report.py" in process.args[3].name
        assert not [name for name in imported if name.startswith(("models.", "torchvision", "sklearn", "matplotlib"))]
    assert not any(tmp_path.iterdir())


def test_official_commands_parse():
    """The published command lines, flag for flag."""
    base = "--datasets CIFAR10 --corrupt 0.2 --arch=resnet20 --save-dir=save_labelnoise0.2_resnet20".split()
    sgd = train_sgd.parse_args([*base, "--lr", "0.1", "--epochs=150"])
    assert (sgd.batch_size, sgd.momentum, sgd.weight_decay, sgd.randomseed) == (128, 0.9, 1e-4, 1)
    window = "--params_start 0 --params_end 81 --n_components 40".split()
    pbfgs = train_pbfgs.parse_args([*base, *window, *"--epochs 20 --batch-size 1024".split()])
    assert (pbfgs.lr, pbfgs.alpha, pbfgs.gamma, pbfgs.accumulate) == (1, 0, 0.9, 1)
    psgd = train_psgd.parse_args([*base, *window, *"--epochs 40 --lr 1 --batch-size 128".split()])
    assert (psgd.momentum, psgd.output_dir) == (0.9, None)
    short = train_sgd.parse_args("-a resnet20 -j 2 -b 64 -p 10 --wd 5e-4 --start-epoch 1 --resume x -e --half".split())
    assert (short.arch, short.workers, short.batch_size, short.print_freq) == ("resnet20", 2, 64, 10)
    assert short.weight_decay == 5e-4 and short.evaluate and short.half


@pytest.mark.gpu
def test_runs_on_cuda(tmp_path):
    """Deterministic ones are bitwise equal; from a CPU's initial weights, batches and augmentation, and after one epoch
    at a small lr equal to a run there up to rounding."""
    for name, device in (("a", "cuda"), ("b", "cuda"), ("c", "cpu")):
        digits_run("sgd", tmp_path / name, "--epochs", 1, "--lr", 0.001, "--deterministic", "--device", device)
    for i, other in enumerate("cb"):
        assert same(tmp_path / "a" / f"{i}.pt", tmp_path / other / f"{i}.pt")
    gpu, cpu = (state(tmp_path / name / "1.pt") for name in "ac")
    for name in cpu:
        torch.testing.assert_close(cpu[name], gpu[name], rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["psgd", "pbfgs"])
def test_subspace_scripts_on_cuda(sampled, tmp_path, method):
    """The basis explains the same shares as on the CPU, and training in it goes down."""
    shares = []
    for device in ("cpu", "cuda"):
        summary = digits_run(method, sampled, "--epochs", 2, "--device", device, output=tmp_path / device)
        shares.append(summary["explained_variance"]["per_component"])
        lines = log_of(tmp_path / device, method)
        assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert shares[0] == pytest.approx(shares[1], rel=1e-4)
