"""run.sh with a stand-in for python that notes its arguments: stages, their order, and how a failure ends it."""
import os
import shlex
import signal
import subprocess

import pytest
from conftest import ROOT

import train_pbfgs
import train_psgd
import train_sgd
import trajectory
import utils


@pytest.fixture
def shell(tmp_path):
    """run(argv, fail=None, **environment) -> (status, the stages that were called, as lists of arguments)."""
    calls = tmp_path / "calls"
    stub = tmp_path / "python"
    stub.write_text(
        '#!/bin/bash\n[[ $1 == -c ]] && exit 0\n'
        f'echo "${{@:2}}" >> {shlex.quote(str(calls))}\n'
        '[[ $2 == "$FAIL" ]] && exit 7\n'
        'while [[ $# -gt 1 ]]; do\n'
        '  [[ $1 != --output-dir && $1 != --save-dir ]] || out=$2; [[ $1 != --json ]] || touch "$2"; shift\n'
        'done\n'
        '[[ -z $out ]] || { mkdir -p "$out"; touch "$out/a.json" "$out/a.jsonl" "$out/0.pt"; }\n'
    )
    stub.chmod(0o755)

    def run(*argv, fail="none", **environment):
        calls.unlink(missing_ok=True)
        others = ("DATASETS", "MODELS", "CORRUPT", "SEED", "FORCE", "NPROC", "FLAGS", "PRETRAINED")
        env = {k: v for k, v in os.environ.items() if k not in others}
        env = {**env, "PYTHON": str(stub), "SAVE_ROOT": str(tmp_path / "runs"), "FAIL": fail, **environment}
        done = subprocess.run([ROOT / "run.sh", *argv], env=env, capture_output=True, text=True)
        return done.returncode, [line.split() for line in calls.read_text().splitlines()] if calls.exists() else []

    return run


def test_syntax():
    assert subprocess.run(["bash", "-n", ROOT / "run.sh"]).returncode == 0


def test_demo_is_the_published_one(shell, tmp_path):
    status, (sgd, pbfgs, psgd, report) = shell(CORRUPT="0.2")
    assert status == 0 and [call[0] for call in (sgd, pbfgs, psgd, report)] == [
        "train_sgd.py", "train_pbfgs.py", "train_psgd.py", "report.py"]
    args = train_sgd.parse_args(sgd[1:])
    assert (args.epochs, args.lr, args.corrupt, args.arch, args.datasets) == (150, 0.1, 0.2, "resnet20", "CIFAR10")
    assert args.save_dir == str(tmp_path / "runs" / "save_labelnoise0.2_resnet20")
    args = train_pbfgs.parse_args(pbfgs[1:])
    assert (args.epochs, args.batch_size, args.n_components) == (20, 1024, 40)
    assert (args.params_start, args.params_end) == (0, 81)
    args = train_psgd.parse_args(psgd[1:])
    assert (args.epochs, args.batch_size, args.lr, args.params_end, args.corrupt) == (40, 128, 1, 81, 0.2)


def test_demo_loops_over_models_and_knows_cifar100(shell):
    status, calls = shell(DATASETS="CIFAR100", MODELS="resnet20 resnet32")
    assert status == 0 and len(calls) == 8
    archs = [train_sgd.parse_args(call[1:]) for call in calls[::4]]
    assert [(a.arch, a.epochs, a.milestones) for a in archs] == [("resnet20", 200, [150]), ("resnet32", 200, [150])]
    assert train_psgd.parse_args(calls[2][1:]).params_end == 101


def test_imagenet_is_the_published_recipe(shell):
    status, (sgd, pbfgs, _) = shell("imagenet", FLAGS="--half --workers 8")
    assert status == 0
    args = train_sgd.parse_args(sgd[1:])
    assert (args.datasets, args.arch, args.epochs, args.batch_size, args.lr) == ("ImageNet", "resnet18", 90, 256, 0.1)
    assert (args.milestones, args.samples_per_epoch, args.half, args.workers) == ([30, 60], 6, True, 8)
    args = train_pbfgs.parse_args(pbfgs[1:])
    assert (args.epochs, args.batch_size, args.n_components, args.half) == (4, 256, 120, True)
    assert len(utils.window_indices(args)) == 121 and args.save_dir == train_sgd.parse_args(sgd[1:]).save_dir


@pytest.mark.parametrize("weights", [None, "weights.pt"])
def test_finetune_has_windows_for_its_components(shell, weights):
    status, calls = shell("finetune", **({"PRETRAINED": weights} if weights else {}))
    assert status == 0
    args = train_sgd.parse_args(calls[0][1:])
    assert (args.lr, args.epochs, args.samples_per_epoch, args.pretrained) == (0.005, 15, 6, weights or True)
    windows = [train_pbfgs.parse_args(call[1:]) for call in calls[1:4]]  # which refuses k > n - 1
    assert [(a.params_start, a.params_end, a.n_components) for a in windows] == [(1, 31, 29), (1, 61, 30), (1, 91, 30)]
    assert all(a.epochs == 1 and a.batch_size == 256 for a in windows)


def test_nproc_trains_through_torchrun(shell):
    status, calls = shell("quick", NPROC="gpu")
    assert status == 0
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=gpu"]
    assert [call[:4] == launch for call in calls] == [True, True, True, False]
    assert [call[4] for call in calls[:3]] == ["train_sgd.py", "train_pbfgs.py", "train_psgd.py"]


def test_cifar100_is_the_published_list_into_one_table(shell, tmp_path):
    status, calls = shell("cifar100")
    assert status == 0 and len(calls) == 11 * 4 + 1
    names = [train_sgd.parse_args(call[1:]).arch for call in calls[:-1:4]]
    assert names == ("vgg11 densenet121 efficientnet googlenet inceptionv3 mobilenet nasnet seresnet18 shufflenetv2 "
                     "squeezenet xception").split()
    args = train_sgd.parse_args(calls[0][1:])
    assert (args.datasets, args.epochs, args.milestones) == ("CIFAR100", 200, [150])
    for call, script in zip(calls[1:3], (train_pbfgs, train_psgd), strict=True):
        args = script.parse_args(call[1:])
        assert (args.params_start, args.params_end, args.n_components, args.arch) == (0, 101, 40, "vgg11")
    directories = [train_sgd.parse_args(call[1:]).save_dir for call in calls[:-1:4]]
    assert calls[-1] == ["report.py", *directories, "--table", str(tmp_path / "runs" / "cifar100.md")]
    _, calls = shell("cifar100", MODELS="mobilenet")
    assert len(calls) == 5


def test_quick_is_digits_in_15_dimensions(shell):
    status, calls = shell("quick")
    scripts = [call[0] for call in calls]
    assert status == 0 and scripts == ["train_sgd.py", "train_pbfgs.py", "train_psgd.py", "report.py"]
    for script, call in zip((train_pbfgs, train_psgd), calls[1:3], strict=True):
        args = script.parse_args(call[1:])
        assert (args.datasets, args.arch, args.n_components) == ("digits", "resnet8", 15)


@pytest.mark.parametrize("stage, before", [("train_sgd.py", 0), ("train_pbfgs.py", 1), ("report.py", 3)])
def test_a_failing_stage_stops_the_script_with_its_status(shell, stage, before):
    """Through `tee`: without pipefail the status would be tee's, 0, and the next stages would run."""
    status, calls = shell("quick", fail=stage)
    assert status == 7 and len(calls) == before + 1 and calls[-1][0] == stage


def test_stages_go_on_where_they_stopped_unless_forced(shell):
    _, calls = shell("quick")
    assert [call[-2:] == ["--resume", "auto"] for call in calls] == [True, True, True, False]
    _, calls = shell("quick", FORCE="1")
    assert not any("--resume" in call for call in calls)


@pytest.mark.parametrize("name, to", [("TERM", os.kill), ("TERM", os.killpg), ("INT", os.killpg), ("HUP", os.kill)])
def test_a_signal_reaches_the_script_once_and_its_last_words_are_kept(tmp_path, name, to):
    """Sent to the shell alone (a scheduler) or to its process group (a terminal): not an orphan that trains on."""
    stub = tmp_path / "python"
    stub.write_text("""#!/bin/bash
        [[ $1 == -c ]] && exit 0
        noted() { echo "got $1"; got+=$1; }
        trap 'noted TERM' TERM; trap 'noted INT' INT
        echo ready
        for i in {1..100}; do sleep 0.05; [[ -z $got ]] || break; done
        sleep 0.3
        echo "last words after $got"; exit 77
    """)
    stub.chmod(0o755)
    env = {**os.environ, "PYTHON": str(stub), "SAVE_ROOT": str(tmp_path)}
    shell = subprocess.Popen([ROOT / "run.sh", "quick"], env=env, stdout=subprocess.PIPE, text=True,
                             start_new_session=True)
    assert shell.stdout.readline().startswith("+ python train_sgd.py") and shell.stdout.readline() == "ready\n"
    to(shell.pid, getattr(signal, f"SIG{name}"))
    out, _ = shell.communicate(timeout=30)
    got = "INT" if name == "INT" else "TERM"
    assert shell.returncode == 77 and out.split("\n") == [f"got {got}", f"last words after {got}", ""]
    assert out in (tmp_path / "quick" / "log").read_text()


SCRIPTS = {f"{script.__name__}.py": script for script in (train_sgd, train_pbfgs, train_psgd)}


@pytest.mark.parametrize("scale", ["full", "cpu"])
@pytest.mark.parametrize("table, runs", [
    ("cifar10", {"full": 4, "cpu": 4}), ("cifar100", {"full": 4, "cpu": 4}), ("noise", {"full": 24, "cpu": 9}),
    ("dims", {"full": 10, "cpu": 6}), ("basis", {"full": 4, "cpu": 4}), ("sampling", {"full": 9, "cpu": 7})])
def test_tables_run_each_setting_for_each_seed(shell, tmp_path, scale, table, runs):
    """All stages have valid arguments, a directory of their own beside their SGD run's, and a place in the table."""
    status, calls = shell(f"table-{table}", SCALE=scale, SEEDS="1 2")
    assert status == 0 and len(calls) == 2 * runs[scale] + 1
    directories = set()
    for name, *argv in calls[:-1]:
        args = SCRIPTS[name].parse_args(argv)
        assert args.smalldatasets == {"full": None, "cpu": 0.2}[scale]
        assert args.datasets == ("CIFAR100" if table == "cifar100" else "CIFAR10")
        directory = getattr(args, "output_dir", args.save_dir)
        assert f"_c{args.corrupt:g}_seed{args.randomseed}/" in directory
        assert directory.rsplit("/", 1)[0] == args.save_dir.rsplit("/", 1)[0]
        if table != "sampling" and name != "train_sgd.py":
            end = {"full": 101 if table == "cifar100" else 81, "cpu": 21}[scale]
            assert (args.params_start, args.params_end) == (0, end)
        directories.add(directory)
    assert len(directories) == 2 * runs[scale]
    published = tmp_path / "runs" / scale / "tables" / table
    assert calls[-1][:2] == ["report.py", str(published)]
    copied = {str(path.parent.relative_to(published)) for path in published.rglob("*.json")}
    assert copied == {"/".join(directory.split("/")[-2:]) for directory in directories}
    assert not list(published.rglob("*.pt"))


def test_trajectory_draws_the_runs_it_made(shell, tmp_path):
    status, calls = shell("trajectory", SCALE="cpu")
    assert status == 0 and [call[0] for call in calls] == [
        "train_sgd.py", "train_psgd.py", "train_pbfgs.py", "trajectory.py", "report.py"]
    args = trajectory.parse_args(calls[3][1:])
    assert args.runs == [SCRIPTS[call[0]].parse_args(call[1:]).output_dir for call in calls[1:3]]
    assert (args.save_dir, args.n_components, args.params_end) == (
        train_sgd.parse_args(calls[0][1:]).save_dir, 15, 21)


def test_driver_runs_all_tables_once_and_stops_in_time(tmp_path):
    """A stub that takes its time in one stage and saves nothing when it is stopped: the next call goes on there."""
    stub, calls = tmp_path / "python", tmp_path / "calls"
    stub.write_text(f"""#!/bin/bash
        [[ $1 == -c ]] && exit 0
        echo "${{@:2}}" >> {shlex.quote(str(calls))}
        trap 'echo stopped; exit 143' TERM
        [[ $* != *"$SLOW"* ]] || for i in {{1..200}}; do sleep 0.05; done
        [[ $* != *"$FAIL"* ]] || exit 7
        name=${{2#train_}}
        while (($# > 1)); do
            [[ $1 != --output-dir && $1 != --save-dir ]] || out=$2; [[ $1 != --json ]] || touch "$2"; shift
        done
        [[ -z $out || $name == trajectory.py ]] || {{
            mkdir -p "$out"; touch "$out/${{name%.py}}_summary.json" "$out/${{name%.py}}_log.jsonl"; }}
    """)
    stub.chmod(0o755)

    def drive(slow="none", fail="none", **more):
        calls.unlink(missing_ok=True)
        env = {k: v for k, v in os.environ.items() if k != "FORCE"} | {
            "PYTHON": str(stub), "SAVE_ROOT": str(tmp_path / "runs"), "SCALE": "cpu", "SEEDS": "1 2", "SLOW": slow,
            "FAIL": fail, "LIMIT": "60"} | more
        done = subprocess.run([ROOT / "run.sh", "evidence"], env=env, capture_output=True, text=True, timeout=100)
        return done, calls.read_text().splitlines() if calls.exists() else []

    done, first = drive(slow="--optimizer adam", LIMIT="2")
    assert done.returncode == 75 and "stopped" in done.stdout and "call it again" in done.stdout
    assert [call.split()[0] for call in first] == ["train_sgd.py", "train_sgd.py"]
    done, failed = drive(fail="train_pbfgs.py")
    assert done.returncode == 7 and failed[0] == first[1] and failed[-1].startswith("train_pbfgs.py")
    done, rest = drive()
    assert done.returncode == 0 and rest[0] == failed[-1]
    runs = [call for call in first[:1] + failed[:-1] + rest if call.startswith("train_")]
    assert len(runs) == len(set(runs))  # nothing twice
    reports = [call.split()[1].rsplit("/", 1)[1] for call in rest if call.startswith("report.py")]
    assert reports == ["cifar10", "cifar100", "noise", "cifar10", "cifar100", "noise", "basis", "dims", "sampling",
                       "trajectory"]
    assert not any("randomseed 2" in call for call in rest[: next(
        i for i, call in enumerate(rest) if call.startswith("report.py") and "noise" in call.split()[1])])
    assert len(list((tmp_path / "runs/cpu/tables/trajectory").rglob("trajectory.json"))) == 2
    assert drive()[1] == []
    assert drive(FORCE="1")[0].returncode == drive(LIMIT="soon")[0].returncode == 2


def test_a_table_that_does_not_exist(shell):
    assert shell("table-imagenet") == (2, []) and shell("table-noise", SCALE="huge") == (2, [])


def test_unknown_command_is_usage(shell):
    status, calls = shell("fast")
    assert status == 2 and not calls


def test_test_passes_arguments_to_pytest(shell):
    assert shell("test", "-k", "basis") == (0, [["pytest", "-k", "basis"]])
