"""Runs that are killed, stopped, out of disk, or started twice: nothing is lost, and going on ends at the same bits."""
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import re
import signal
import subprocess
import sys
import time
from functools import partial

import crash
import pytest
import torch
from conftest import ROOT, digits_args
from torch import nn

import models
import runs
import train_psgd
import train_sgd
from models.resnet import Block, ResNet, basic
from models.stochasticdepth import StochasticBlock
from utils import InputError

WINDOW = ["--params_end", "6", "--n_components", "4"]
METHODS = {"sgd": ["--epochs", "3"], "psgd": [*WINDOW, "--epochs", "3"],
           "pbfgs": [*WINDOW, "--epochs", "3", "--alpha", "0.01"]}
KILLS = {"sgd": 8, "psgd": 6, "pbfgs": 6}  # at random moments
# at the n-th write to the disk; a file's is odd, its directory's even; the last file of a run is its summary
KILLED_WRITES = {"sgd": (1, 3, 6, 9, 11, 13, 15, 17, 19, 21), "psgd": (3, 5, 7, 9, 13), "pbfgs": (3, 5, 9, 11, 13)}


@pytest.fixture(scope="module")
def processes():
    """A context whose processes start in milliseconds: forked from a server that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")  # where the server looks for it
        context.set_forkserver_preload(["crash"])
        multiprocessing.forkserver.ensure_running()
    finish(context, time.sleep, 0)  # waits for the server's imports
    return context


def argv(method, sampled, output, *more):
    """A run of a quarter of a second: three batches an epoch, a checkpoint after every second one."""
    flags = digits_args(output if method == "sgd" else sampled, *METHODS[method], "--save-every", "2", *more)
    flags[flags.index("--smalldatasets") + 1] = "0.1"
    return flags if method == "sgd" else [*flags, "--output-dir", str(output)]


def result(method, directory):
    """Everything a run leaves that is not a clock's or a calendar's."""
    timed = {"seconds", "samples_per_second"}
    log = [json.loads(line) for line in (directory / f"{method}_log.jsonl").read_text().splitlines()]
    summary = json.loads((directory / f"{method}_summary.json").read_text())
    for key in ("seconds", "finished", "args", "command", "git_revision"):
        summary.pop(key)
    tensors = {path.name: runs.load_file(path, "file") for path in directory.glob("*.pt")}
    for checkpoint in tensors.values():
        for key in ("seconds", "args", "log"):
            checkpoint.pop(key, None)
    return [{key: value for key, value in line.items() if key not in timed} for line in log], summary, tensors


def assert_equal(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{i}")
    else:
        assert a == b, where


@pytest.fixture(scope="module")
def whole(sampled, tmp_path_factory, processes):
    """method -> (seconds, result) of a run that nobody disturbs, in a process of its own as the others."""
    references = {}
    for method in METHODS:
        directory = tmp_path_factory.mktemp(method)
        finish(processes, crash.run, method, argv(method, sampled, directory))
        seconds = json.loads((directory / f"{method}_summary.json").read_text())["seconds"]["total"]
        references[method] = seconds, result(method, directory)
    return references


def finish(processes, target, *args):
    process = processes.Process(target=target, args=args)
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize(("method", "kills"), [
    *KILLS.items(), *(pytest.param(method, 10 * kills, marks=pytest.mark.slow) for method, kills in KILLS.items())])
def test_killed_at_any_moment_a_run_goes_on_to_the_same_bits(sampled, tmp_path, processes, whole, method, kills):
    seconds, expected = whole[method]
    moments = random.Random(f"{method}{kills}")
    killed = 0
    for i in range(kills):
        flags = argv(method, sampled, tmp_path / str(i))
        process = processes.Process(target=crash.run, args=(method, flags))
        process.start()
        time.sleep(moments.uniform(0, 1) * seconds)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        finish(processes, crash.run, method, [*flags, "--resume", "auto"])
        assert_equal(result(method, tmp_path / str(i)), expected)
    assert killed >= kills // 2  # the moments were within the run


@pytest.mark.parametrize(("method", "n"), [(method, n) for method, writes in KILLED_WRITES.items() for n in writes])
def test_killed_inside_a_save_a_run_goes_on_to_the_same_bits(sampled, tmp_path, processes, whole, method, n):
    """A write that stops half way leaves no file under its final name, and nothing that disturbs the next run."""
    flags = argv(method, sampled, tmp_path)
    process = processes.Process(target=crash.run_and_die_in_write, args=(method, flags, n))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    for path in tmp_path.glob("*.pt"):
        runs.load_file(path, "file")  # whole, or not there
    for path in tmp_path.glob("*.json"):
        json.loads(path.read_text())
    finish(processes, crash.run, method, [*flags, "--resume", "auto"])
    assert_equal(result(method, tmp_path), whole[method][1])
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("n", [7, 11])
def test_a_signal_while_a_slow_disk_writes_waits_for_it(sampled, tmp_path, processes, whole, n):
    """In a snapshot and in a checkpoint: the file is whole, the run stops after it and goes on to the same bits."""
    flags = argv("sgd", sampled, tmp_path)
    process = processes.Process(target=crash.run_on_slow_disk, args=("sgd", flags, n))
    process.start()
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM and not list(tmp_path.glob(".*.tmp"))
    for path in tmp_path.glob("*.pt"):
        runs.load_file(path, "file")
    finish(processes, crash.run, "sgd", [*flags, "--resume", "auto"])
    assert_equal(result("sgd", tmp_path), whole["sgd"][1])


def test_auto_leaves_a_finished_run_alone_and_trains_a_longer_one_on(sampled, tmp_path, capsys, whole):
    def run(*more):
        return train_psgd.main(train_psgd.parse_args([*argv("psgd", sampled, tmp_path), "--resume", "auto", *more]))

    run("--epochs", "2")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    capsys.readouterr()
    summary = run("--epochs", "2")
    out = capsys.readouterr().out
    assert "finished before" in out and "\nsummary method=psgd" in out and summary["epochs"] == 2
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    run("--epochs", "3")
    assert_equal(result("psgd", tmp_path), whole["psgd"][1])
    with pytest.raises(InputError, match="is past --epochs 2: it has 3"):
        run("--epochs", "2")


def small_stochastic_network(block, num_classes):
    """Dropout and, of StochasticBlocks, ones that are skipped at random (steps of such are never recorded)."""
    stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    model = ResNet(stem, block, basic, (1, 1, 1), nn.AdaptiveAvgPool2d(1), num_classes, width=8)
    for block in model.blocks:
        block.survival = 0.5
    model.pool = nn.Sequential(model.pool, nn.Dropout(0.5))
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("device, block", [
    ("cpu", StochasticBlock), pytest.param("cuda", StochasticBlock, marks=pytest.mark.gpu),
    pytest.param("cuda", Block, marks=pytest.mark.gpu)])
def test_networks_that_draw_in_the_forward_pass_go_on_to_the_same_bits(tmp_path, monkeypatch, method, device, block):
    """Dropout and stochastic depth, in P-BFGS's trials too: what an epoch draws does not depend on what came before."""
    monkeypatch.setitem(models.SMALL, "small", partial(small_stochastic_network, block))
    script, results = crash.SCRIPTS[method], []
    for parts in ([3], [2, 3]):
        directory = tmp_path / str(len(parts))
        for run, epochs in [("sgd", [6]), (method, parts)][method == "sgd":]:
            for n in epochs:
                flags = argv(run, directory, directory, "--arch", "small", "--deterministic", "--device", device,
                             "--epochs", str(n), "--resume", "auto")
                torch.rand(n)  # whatever was drawn before must not matter
                (train_sgd if run == "sgd" else script).main(crash.SCRIPTS[run].parse_args(flags))
        results.append(result(method, directory)[::2])
    assert_equal(*results)


@pytest.mark.parametrize(("method", "number"), [("sgd", signal.SIGTERM), ("pbfgs", signal.SIGINT)])
def test_signals_save_a_checkpoint_and_say_how_to_go_on(sampled, tmp_path, processes, method, number):
    """A real script, told to stop after one of its lines; then told to go on, it ends where an untouched run does."""
    longer = ["--epochs", "9", "--save-every", "100"]
    flags = argv(method, sampled, tmp_path / "cut", *longer)
    process = subprocess.Popen([sys.executable, "-u", f"train_{method}.py", *flags], cwd=ROOT, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    for line in process.stdout:
        if line.startswith("epoch    3/"):
            process.send_signal(number)
            break
    _, errors = process.communicate()
    assert process.returncode == 128 + number
    (line,) = errors.strip().splitlines()
    assert re.search(f"stopped by {number.name} in epoch \\d+; .*{method}_checkpoint.pt; .*--resume auto", line)
    finish(processes, crash.run, method, [*flags, "--resume", "auto"])
    finish(processes, crash.run, method, argv(method, sampled, tmp_path / "whole", *longer))
    assert_equal(result(method, tmp_path / "cut"), result(method, tmp_path / "whole"))


def test_a_second_run_in_a_directory_is_refused_while_the_first_lives(sampled, tmp_path, processes):
    flags = argv("psgd", sampled, tmp_path)
    ready = processes.Event()
    first = processes.Process(target=crash.hold_lock, args=("psgd", flags, ready))
    first.start()
    assert ready.wait(60)
    with pytest.raises(InputError, match="another psgd run is at work in .*; choose another --output-dir or wait"):
        train_psgd.main(train_psgd.parse_args(flags))
    first.kill()  # no clean-up: the kernel gives the lock back
    first.join()
    train_psgd.main(train_psgd.parse_args(flags))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB; skips where mounting is not permitted."""
    directory = tmp_path / "disk"
    directory.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", directory], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield directory
    subprocess.run(["umount", "-l", directory], check=True)


def test_a_full_disk_names_file_and_bytes_and_keeps_what_was_saved(sampled, small_disk, capsys):
    """A snapshot of resnet8 has 0.3 MB: the fourth does not fit."""
    with pytest.raises(InputError, match=r"/3\.pt cannot be written \(3\d\d,\d{3} bytes\): No space left on device"):
        train_sgd.main(train_sgd.parse_args(argv("sgd", sampled, small_disk, "--save-every", "100")))
    assert re.search(r"warning: this run writes 3 MB, .* has 1 MB free", capsys.readouterr().err)
    assert sorted(path.name for path in small_disk.glob("*.pt")) == ["0.pt", "1.pt", "2.pt"]
    assert all(runs.load_file(path, "snapshot") for path in small_disk.glob("*.pt"))
    assert not list(small_disk.glob(".*.tmp"))


def test_a_read_only_disk_is_one_line(sampled, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(InputError, match="--save-dir .*disk cannot be written to: Read-only file system"):
        train_sgd.main(train_sgd.parse_args(argv("sgd", sampled, small_disk)))
