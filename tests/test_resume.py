"""Runs that are killed, stopped, out of disk, or started twice: nothing is lost, resumed runs have the same bits."""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import crash
import pytest
import torch
from conftest import ROOT, digits_args, network
from processes import context, finish, run, start

from dldr.errors import UserError
from dldr.files import load_file

WINDOW = ["--params_end", "6", "--n_components", "4"]
METHODS = {"sgd": ["--epochs", "3"], "psgd": [*WINDOW, "--epochs", "3"],
           "pbfgs": [*WINDOW, "--epochs", "3", "--alpha", "0.01"]}
KILLS = {"sgd": 8, "psgd": 6, "pbfgs": 6}  # at random moments
# at the n-th write to the disk; a file's is odd, its directory's even; the last file of a run is its summary
KILLED_WRITES = {"sgd": (1, 3, 6, 9, 11, 13, 15, 19, 27, 31), "psgd": (3, 5, 7, 9, 13), "pbfgs": (3, 5, 9, 11, 13)}


def argv(method, sampled, output, *more):
    """A run of a quarter of a second: three batches an epoch, a checkpoint after every second one."""
    flags = digits_args(output if method == "sgd" else sampled, *METHODS[method], "--save-every", "2", *more)
    flags[flags.index("--smalldatasets") + 1] = "0.1"
    return flags if method == "sgd" else [*flags, "--output-dir", str(output), "--allow-mismatch", "smalldatasets"]


def result(method, directory):
    """Everything a run leaves that is not a clock's or a calendar's."""
    timed = {"seconds", "samples_per_second"}
    log = [json.loads(line) for line in (directory / f"{method}_log.jsonl").read_text().splitlines()]
    summary = json.loads((directory / f"{method}_summary.json").read_text())
    for key in ("seconds", "finished", "args", "command", "git_revision"):
        summary.pop(key)
    tensors = {path.name: load_file(path, "file") for path in directory.glob("*.pt")}
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
def whole(sampled, tmp_path_factory):
    """method -> (seconds, result) of a run that nobody disturbs, in a process of its own as the others."""
    references = {}
    for method in METHODS:
        directory = tmp_path_factory.mktemp(method)
        finish(run, method, argv(method, sampled, directory))
        seconds = json.loads((directory / f"{method}_summary.json").read_text())["seconds"]["total"]
        references[method] = seconds, result(method, directory)
    return references


@pytest.mark.parametrize(("method", "kills"), [
    *KILLS.items(), *(pytest.param(method, 10 * kills, marks=pytest.mark.slow) for method, kills in KILLS.items())])
def test_killed_at_any_moment_a_run_goes_on_to_the_same_bits(sampled, tmp_path, whole, method, kills):
    seconds, expected = whole[method]
    moments = random.Random(f"{method}{kills}")
    tried = killed = 0
    while killed < kills:
        flags = argv(method, sampled, tmp_path / str(tried))
        process = start(run, method, flags)
        time.sleep(moments.uniform(0, 1) * seconds)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            killed += 1
        else:  # had ended: the machine is faster now
            seconds *= 0.8
        finish(run, method, [*flags, "--resume", "auto"])
        assert_equal(result(method, tmp_path / str(tried)), expected)
        tried += 1


@pytest.mark.parametrize(("method", "n"), [(method, n) for method, writes in KILLED_WRITES.items() for n in writes])
def test_killed_inside_a_save_a_run_goes_on_to_the_same_bits(sampled, tmp_path, whole, method, n):
    """A write that stops half way leaves no file under its final name, and nothing that disturbs the next run."""
    flags = argv(method, sampled, tmp_path)
    process = start(crash.run_and_die_in_write, method, flags, n)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    for path in tmp_path.glob("*.pt"):
        load_file(path, "file")  # whole, or not there
    for path in tmp_path.glob("*.json"):
        json.loads(path.read_text())
    finish(run, method, [*flags, "--resume", "auto"])
    assert_equal(result(method, tmp_path), whole[method][1])
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("n", [11, 19])
def test_a_signal_while_a_slow_disk_writes_waits_for_it(sampled, tmp_path, whole, n):
    """In a snapshot and in a checkpoint: the file is whole, the run stops after it and goes on to the same bits."""
    flags = argv("sgd", sampled, tmp_path)
    process = start(crash.run_on_slow_disk, "sgd", flags, n)
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM and not list(tmp_path.glob(".*.tmp"))
    for path in tmp_path.glob("*.pt"):
        load_file(path, "file")
    finish(run, "sgd", [*flags, "--resume", "auto"])
    assert_equal(result("sgd", tmp_path), whole["sgd"][1])


def contents(directory):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.iterdir()}


def test_overwrite_in_the_directory_of_the_snapshots_leaves_them(sampled, tmp_path):
    shutil.copytree(sampled, tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path)
    for more in ([], ["--overwrite", "--epochs", "1"]):
        run("psgd", [*argv("psgd", tmp_path, tmp_path), *more])
    after = contents(tmp_path)
    assert before == {name: after[name] for name in before}


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    run("sgd", argv("sgd", None, tmp_path))
    path = tmp_path / "sgd_checkpoint.pt"
    torch.save({**load_file(path, "checkpoint"), "format": 1}, path)
    with pytest.raises(UserError, match="sgd_checkpoint.pt is not a checkpoint of this script and version"):
        run("sgd", argv("sgd", None, tmp_path, "--resume", "auto", "--epochs", "4"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("device, name", [
    ("cpu", "stochastic_depth"), pytest.param("cuda", "stochastic_depth", marks=pytest.mark.gpu),
    pytest.param("cuda", "dropout", marks=pytest.mark.gpu)])
def test_networks_that_draw_in_the_forward_pass_resume_to_the_same_bits(tmp_path, method, device, name):
    """Dropout and stochastic depth, in P-BFGS's trials too: what an epoch draws does not depend on what came before."""
    arch, results = network(name), []
    for parts in ([3], [2, 3]):
        directory = tmp_path / str(len(parts))
        for stage, epochs in [("sgd", [6]), (method, parts)][method == "sgd":]:
            for n in epochs:
                torch.rand(n)  # whatever was drawn before must not matter
                run(stage, argv(stage, directory, directory, "--arch", arch, "--deterministic", "--device", device,
                                "--epochs", str(n), "--resume", "auto"))
        results.append(result(method, directory)[::2])
    assert_equal(*results)


@pytest.mark.parametrize(("method", "number"), [("sgd", signal.SIGTERM), ("pbfgs", signal.SIGINT)])
def test_signals_save_a_checkpoint_and_say_how_to_go_on(sampled, tmp_path, method, number):
    """A real script, told to stop after one of its lines; then told to go on, it ends where an untouched run does."""
    longer = ["--epochs", "60", "--save-every", "100"]
    flags = argv(method, sampled, tmp_path / "cut", *longer)
    process = subprocess.Popen([sys.executable, "-u", f"train_{method}.py", *flags], cwd=ROOT, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    for line in process.stdout:
        if line.startswith("     3/60 "):
            process.send_signal(number)
            break
    _, errors = process.communicate()
    assert process.returncode == 128 + number
    (line,) = errors.strip().splitlines()
    assert re.search(f"stopped by {number.name} in epoch \\d+; .*{method}_checkpoint.pt; .*--resume auto", line)
    finish(run, method, [*flags, "--resume", "auto"])
    finish(run, method, argv(method, sampled, tmp_path / "whole", *longer))
    assert_equal(result(method, tmp_path / "cut"), result(method, tmp_path / "whole"))


def test_a_second_run_in_a_directory_is_refused_while_the_first_lives(sampled, tmp_path):
    flags = argv("psgd", sampled, tmp_path)
    ready = context.Event()
    first = start(crash.hold_lock, "psgd", flags, ready)
    assert ready.wait(60)
    with pytest.raises(UserError, match="another psgd process is writing to .*; choose another --output-dir or wait"):
        run("psgd", flags)
    first.kill()  # no clean-up: the kernel gives the lock back
    first.join()
    run("psgd", flags)


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
    with pytest.raises(UserError, match=r"/3\.pt cannot be written \(3\d\d,\d{3} bytes\): No space left on device"):
        run("sgd", argv("sgd", sampled, small_disk, "--save-every", "100", "--arch", "resnet8"))
    assert re.search(r"warning: this run writes 3 MB, .* has 1 MB free", capsys.readouterr().err)
    assert sorted(path.name for path in small_disk.glob("*.pt")) == ["0.pt", "1.pt", "2.pt"]
    assert all(load_file(path, "snapshot") for path in small_disk.glob("*.pt"))
    assert not list(small_disk.glob(".*.tmp"))


def test_a_read_only_disk_is_one_line(sampled, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match="--save-dir .*disk cannot be written to: Read-only file system"):
        run("sgd", argv("sgd", sampled, small_disk))
