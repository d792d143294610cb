"""recipes.py: commands that the scripts take, and the published ones; run.sh, with a stand-in for python."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from runs import ROOT

import recipes
import report
import train_pbfgs
import train_psgd
import train_sgd
import trajectory
import utils

SCRIPTS = {f"{module.__name__}.py": module for module in (train_sgd, train_pbfgs, train_psgd, trajectory, report)}
VARIABLES = ("SCALE", "SEEDS", "CORRUPT", "MODELS", "FLAGS", "PRETRAINED", "SAVE_ROOT", "FORCE", "NPROC")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def parsed(table, scale="full"):
    """(script, its arguments as it parses them, its directory) of the runs of a table."""
    made = recipes.planned_runs(table, scale)
    return [(run.command[0], SCRIPTS[run.command[0]].parse_args(run.command[1:]), str(run.directory)) for run in made]


def has(args, **values):
    return {name: getattr(args, name) for name in values} == values


EVERY = list(dict.fromkeys((row[0], scale) for row in recipes.TABLES for scale in row[2].split()))


@pytest.mark.parametrize("table, scale", EVERY)
def test_every_command_is_valid(table, scale):
    """Its script takes it; its window is of snapshots that an earlier command samples, with the same data and seed."""
    sampled, directories = {}, []
    for script, args, directory in parsed(table, scale):
        if script == "train_sgd.py":
            sampled[args.save_dir] = args
        before = sampled[args.save_dir]
        if script != "train_sgd.py":
            assert utils.window_indices(vars(args))[-1] <= before.epochs * before.samples_per_epoch
        for name in ("datasets", "arch", "corrupt", "randomseed", "smalldatasets"):
            assert getattr(args, name) == getattr(before, name) or (table, name) == ("transfer", "smalldatasets")
        assert directory == (getattr(args, "output_dir", None) or args.save_dir) or script == "trajectory.py"
        assert table in recipes.ONE_DIRECTORY or f"{args.arch}_c{args.corrupt:g}_seed{args.randomseed}" in directory
        directories.append((directory, script))
    assert len(directories) == len(set(directories))
    *_, (script, *argv) = recipes.commands(table, scale)
    assert script == "report.py" and report.parse_args(argv).figures == argv[0] and table in recipes.ABOUT


def test_demo_is_the_published_one(monkeypatch):
    (_, sgd, _), (_, pbfgs, _), (_, psgd, _) = parsed("demo")
    for args in (sgd, pbfgs, psgd):
        assert has(args, datasets="CIFAR10", corrupt=0.2, arch="resnet20", save_dir="save_labelnoise0.2_resnet20")
    assert has(sgd, epochs=150, lr=0.1, batch_size=128, milestones=[100, 150], randomseed=1)
    assert has(pbfgs, epochs=20, batch_size=1024, lr=1, n_components=40, params_start=0, params_end=81, output_dir=None)
    assert has(psgd, epochs=40, batch_size=128, lr=1, n_components=40, params_start=0, params_end=81, output_dir=None)
    monkeypatch.setenv("CORRUPT", "0")
    monkeypatch.setenv("MODELS", "resnet20 resnet32")
    monkeypatch.setenv("SEEDS", "1 2")
    assert [args.save_dir for _, args, _ in parsed("demo")[::3]] == [
        f"save_labelnoise0_{arch}{seed}" for seed in ("", "_seed2") for arch in ("resnet20", "resnet32")]


def test_zoo_is_eleven_networks_on_cifar100():
    runs = [args for _, args, _ in parsed("zoo")]
    assert len({args.arch for args in runs}) == 11
    assert all(has(args, datasets="CIFAR100", epochs=200, milestones=[150]) for args in runs[::3])
    assert all(has(args, params_start=0, params_end=101, n_components=40) for args in runs[1::3] + runs[2::3])


@pytest.mark.parametrize("weights", [None, "the weights.pt"])
def test_imagenet_and_finetune_are_the_published_recipes(monkeypatch, weights):
    monkeypatch.setenv("FLAGS", "--half --workers 8")
    if weights:
        monkeypatch.setenv("PRETRAINED", weights)
    (_, sgd, _), (_, pbfgs, _) = parsed("imagenet")
    assert has(sgd, datasets="ImageNet", arch="resnet18", epochs=90, batch_size=256, lr=0.1, milestones=[30, 60],
               samples_per_epoch=6, half=True, workers=8, pretrained=False)
    assert has(pbfgs, epochs=4, batch_size=256, n_components=120, half=True)
    assert utils.window_indices(vars(pbfgs)) == range(0, 241, 2)
    (_, sgd, _), *windows = parsed("finetune")
    assert has(sgd, lr=0.005, epochs=15, samples_per_epoch=6, pretrained=weights or True, milestones=[30, 60])
    assert [(utils.window_indices(vars(args)), args.n_components) for _, args, _ in windows] == [
        (range(1, 31, 2), 14), (range(1, 61, 2), 29), (range(1, 91, 2), 30)]
    assert all(has(args, epochs=1, batch_size=256) for _, args, _ in windows)


def test_transfer_trains_on_ten_times_the_samples():
    runs = [args for _, args, _ in parsed("transfer")]
    assert [args.randomseed for args in runs] == [1, 1, 2, 2, 3, 3]
    assert all(has(args, arch="resnet8", epochs=30, smalldatasets=0.1) for args in runs[::2])
    assert all(has(args, arch="resnet8", epochs=3, smalldatasets=None, allow_mismatch=["smalldatasets"],
                   n_components=15) for args in runs[1::2])


def test_tenth_is_the_papers_schedule():
    runs = {(script, args.corrupt, vars(args).get("optimizer") or args.n_components, vars(args).get("basis", "pca"),
             args.randomseed): args
            for table, scale in EVERY if scale == "tenth" for script, args, _ in parsed(table, scale)}
    seeds = [(0, 1), (0, 2), (0, 3), (0.2, 1), (0.4, 1), (0.4, 2), (0.4, 3)]
    assert runs.keys() == {
        *((script, c, what, "pca", seed) for c, seed in seeds for script, what in (
            ("train_sgd.py", "sgd"), ("train_psgd.py", 40), ("train_pbfgs.py", 40))),
        ("train_sgd.py", 0, "adam", "pca", 1), *(("train_psgd.py", 0, k, "pca", 1) for k in (3, 5, 15, 25)),
        *(("train_psgd.py", 0, k, "spherical", 1) for k in (3, 15, 40)),
        *(("train_psgd.py", 0, 40, basis, 1) for basis in ("random", "snapshots"))}
    for (script, *_), args in runs.items():
        assert has(args, arch="resnet20", smalldatasets=0.1, datasets="CIFAR10")
        assert has(args, **{"train_sgd.py": {"epochs": 150, "milestones": [100, 150]},
                            "train_psgd.py": {"epochs": 40, "batch_size": 128, "params_end": 81},
                            "train_pbfgs.py": {"epochs": 98, "batch_size": 512, "params_end": 81}}[script])


@pytest.mark.parametrize(("folder", "scale", "tables", "besides"), [  # flags that results/README.md says are others
    ("trajectory-cpu", "cpu", ["trajectory"], ()), ("transfer", "full", ["transfer"], ()),
    ("noise-full", "full", ["noise"], ["half"]), ("dims-full", "full", ["dims", "noise"], ["allow_mismatch"]),
    ("noise-tenth", "tenth", ["noise"], ()), ("noise-tenth-h100", "tenth", ["noise", "cifar10"], ()),
    ("basis-tenth", "tenth", ["dims", "basis"], ())])
def test_committed_results_are_of_these_recipes(folder, scale, tables, besides, monkeypatch):
    monkeypatch.setenv("SEEDS", "1 2 3")  # a folder may have more than its table
    runs = {directory: vars(args) for table in tables for script, args, directory in parsed(table, scale)
            if script != "trajectory.py"}
    made = list((ROOT / "results" / folder).rglob("*_args.json"))
    assert len(made) >= 5
    for path in made:
        now, then = runs["/".join(["runs", scale, *path.parts[-3:-1]])], json.loads(path.read_text())["args"]
        flags = now.keys() & then.keys() - {"save_dir", "conv_tf32", *utils.changeable_flags(), *besides}  # a CPU's too
        assert len(flags) > 15 and {name: now[name] for name in flags} == {name: then[name] for name in flags}


@pytest.fixture
def shell(tmp_path):
    """run(argv, fail=None, **environment) -> (status, the stages that were called, as lists of arguments, stderr)."""
    calls, stub, root = tmp_path / "calls", tmp_path / "python", tmp_path / "the runs"
    stub.write_text(f"""#!/bin/bash
        [[ $1 == recipes.py ]] && exec "{sys.executable}" "$@"
        (IFS=$'\t'; echo "$*" >> "{calls}")
        [[ $1 == packages.py ]] && exit 0
        [[ $2 == recipes.py ]] && exec "{sys.executable}" "$@"
        [[ $2 == "$FAIL" ]] && exit 7
        while (($# > 1)); do
            [[ $1 != --output-dir && $1 != --save-dir ]] || out=$2
            [[ $1 != --json ]] || touch "$2"
            shift
        done
        [[ -z $out ]] || {{ mkdir -p "$out"; touch "$out/a.json" "$out/a.jsonl" "$out/0.pt"; }}
    """)
    stub.chmod(0o755)

    def run(*argv, start=(ROOT / "run.sh",), fail="none", **environment):
        calls.unlink(missing_ok=True)
        env = {**os.environ, "PYTHON": str(stub), "SAVE_ROOT": str(root), "FAIL": fail, **environment}
        done = subprocess.run([*start, *argv], env=env, cwd=tmp_path, capture_output=True, text=True)
        lines = [line.split("\t") for line in calls.read_text().splitlines()] if calls.exists() else []
        return done.returncode, [line[1:] for line in lines if line[0] == "-u"], done.stderr

    return run


@pytest.mark.parametrize("argv", [["fast"], ["table"], ["table", "cifr10"], ["table", "zoo"], ["table-noise"]])
def test_a_name_that_does_not_exist_is_answered_in_one_line_at_once(shell, tmp_path, argv):
    status, calls, err = shell(*argv, SCALE="cpu")
    assert status == 2 and "error: " in err and err.count("\n") == 1 and not (tmp_path / "calls").exists()


def test_stages_run_in_order_resume_unless_forced_and_go_through_torchrun(shell, tmp_path):
    stages = [list(command) for command in recipes.commands("quick", "full")]
    stages = [[word.replace("runs/quick", f"{tmp_path}/the runs/quick") for word in stage] for stage in stages]
    assert shell("quick")[:2] == (0, [stage + ["--resume", "auto"] for stage in stages[:3]] + stages[3:])
    assert shell("quick", FORCE="1")[:2] == (0, [stage + ["--overwrite"] for stage in stages[:3]] + stages[3:])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=gpu"]
    assert [call[:5] for call in shell("quick", NPROC="gpu")[1][:3]] == [[*launch, stage[0]] for stage in stages[:3]]
    assert shell(CORRUPT="0")[1][0][-3].endswith("/the runs/save_labelnoise0_resnet20")
    assert (tmp_path / "the runs" / "log_resnet20").read_text().startswith("+ python train_sgd.py --datasets CIFAR10")


def test_a_table_is_published_without_weights(shell, tmp_path):
    status, calls, _ = shell("table", "trajectory", SCALE="cpu", SEEDS="1 2")
    assert status == 0 and len(calls) == 2 * 4 + 2 and calls[-2] == ["recipes.py", "publish", "trajectory"]
    published = tmp_path / "the runs" / "cpu" / "tables" / "trajectory"
    files = {str(path.relative_to(published)) for path in published.rglob("*") if path.is_file()}
    of_runs = [f"{run}/a.{kind}" for run in ("sgd", "psgd_k15", "pbfgs_k15") for kind in ("json", "jsonl")]
    assert files == {f"CIFAR10_resnet8_c0_seed{seed}/{file}" for seed in (1, 2)
                     for file in ("trajectory.json", "log_resnet8", *of_runs)}


@pytest.mark.parametrize("stage, before", [("train_sgd.py", 0), ("train_pbfgs.py", 1), ("report.py", 3)])
def test_a_failing_stage_stops_the_script_with_its_status(shell, stage, before):
    status, calls, _ = shell("quick", fail=stage)
    assert status == 7 and len(calls) == before + 1 and calls[-1][0] == stage


def heed_signals():
    """Where the tests run in the background or under nohup these are ignored, and no shell can trap them then."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("name, to", [("TERM", os.kill), ("TERM", os.killpg), ("INT", os.killpg), ("HUP", os.kill)])
def test_a_signal_reaches_the_script_once_and_its_last_words_are_kept(tmp_path, name, to):
    """Sent to the shell alone (a scheduler) or to its process group (a terminal): not an orphan that trains on."""
    stub = tmp_path / "python"
    stub.write_text("""#!/bin/bash
        [[ $1 == packages.py ]] && exit 0
        [[ $1 == recipes.py ]] && exec python3 "$@"
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
                             start_new_session=True, preexec_fn=heed_signals)
    assert shell.stdout.readline().startswith("+ python train_sgd.py") and shell.stdout.readline() == "ready\n"
    to(shell.pid, getattr(signal, f"SIG{name}"))
    out, _ = shell.communicate(timeout=30)
    got = "INT" if name == "INT" else "TERM"
    assert shell.returncode == 77 and out.split("\n") == [f"got {got}", f"last words after {got}", ""]
    assert out in (tmp_path / "log_resnet8").read_text()


def test_it_runs_by_sh_through_a_link_and_from_a_clone_with_crlf(shell, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "first").symlink_to(ROOT / "run.sh")
    (tmp_path / "second").symlink_to("bin/first")
    (clone := tmp_path / "clone").mkdir()
    for name in ("run.sh", "recipes.py", ".gitattributes"):
        shutil.copy(ROOT / name, clone)
    for git in ("init -q", "add .", "config core.autocrlf true", "checkout-index -a --prefix=crlf/"):
        subprocess.run(["git", "-C", clone, *git.split()], check=True)
    for start in (["sh"], ["bash", "--posix"]):
        assert shell("quick", start=[*start, ROOT / "run.sh"])[0] == 0
    for start in (tmp_path / "second", clone / "crlf" / "run.sh"):
        assert shell("quick", start=[start])[0] == 0
    assert b"\r" not in (clone / "crlf" / "run.sh").read_bytes()


def test_help_says_what_each_table_needs_by_the_standard_library_alone(tmp_path):
    (tmp_path / "python").write_text(f'#!/bin/bash\nexec "{sys.executable}" -I -S "$@"\n')
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run([ROOT / "run.sh", "--help"], env={**os.environ, "PYTHON": str(tmp_path / "python")},
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "./run.sh table NAME" in done.stdout
    assert all(text in done.stdout for text in recipes.ABOUT.values()) and recipes.NEEDS in done.stdout


def test_other_systems_are_refused_in_one_line(shell, tmp_path):
    (tmp_path / "uname").write_text("#!/bin/sh\necho MINGW64_NT-10.0\n")
    (tmp_path / "uname").chmod(0o755)
    status, calls, err = shell("quick", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert status == 1 and not calls and err.count("\n") == 1 and "Linux and macOS only" in err


PYTHON = f"""#!/bin/bash
# without packages; its venv module and pip leave in the log what they are asked, and $BROKEN fails
echo "python $*" >> log
[[ $1 == packages.py && -e ${{0%/*}}/../packages ]] && exit 0
[[ $1 == *.py ]] && exec "{sys.executable}" -S "$@"
[[ $1 == -c ]] && exit "${{TOO_OLD:-0}}" # for the pinned versions
[[ -z $BROKEN || $2 != "$BROKEN" ]] || {{ echo "WARNING: slow"; echo "ERROR: No space left on device"; exit 1; }}
if [[ $2 == venv ]]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; else touch .venv/packages; fi
"""
UV = """#!/bin/bash
echo "uv $*" >> log
if [[ $1 == venv ]]; then mkdir -p .venv/bin && cp bin/python .venv/bin; else touch .venv/packages; fi
"""


@pytest.fixture
def bare(tmp_path):
    """run(**environment) of `lint` with a python without packages -> (status, lines of stderr, lines of the log)."""
    (tmp_path / "bin").mkdir()
    for name in "bash cp dirname grep mkdir rm tail touch uname".split():  # and no uv
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    for name in ("run.sh", "recipes.py", "packages.py", "pyproject.toml", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name, text in (("python", PYTHON), ("uv.off", UV)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(**environment):
        (tmp_path / "log").unlink(missing_ok=True)
        env = {"PATH": f"{tmp_path}/bin", "PYTHON": "bin/python", **environment}
        done = subprocess.run(["./run.sh", "lint"], env=env, cwd=tmp_path, capture_output=True, text=True)
        log = [line for line in (tmp_path / "log").read_text().splitlines() if "packages.py" not in line]
        return done.returncode, done.stderr.splitlines(), log

    return run


RUFF = "python -m ruff check ."


@pytest.mark.parametrize("uv, commands", [
    ("uv.off", ["python -m venv .venv", "python -m pip install --disable-pip-version-check --quiet"]),
    ("uv", ["uv venv --allow-existing --python HERE/bin/python .venv", "uv pip install --python .venv/bin/python"])])
def test_packages_are_installed_once_after_saying_what_is_missing(bare, tmp_path, uv, commands):
    (tmp_path / "bin" / "uv.off").rename(tmp_path / "bin" / uv)
    status, (problem, plan), (_, *log) = bare()
    assert status == 0 and plan.startswith("run.sh: ") and "into .venv instead, once: about 5 GB" in plan
    assert problem.endswith(f"ruff not installed: {sys.executable} -m pip install ruff")
    venv, install = commands
    assert log == [venv.replace("HERE", str(tmp_path)), f"{install} -r requirements-dev.txt", RUFF]
    assert not (tmp_path / ".venv" / "unfinished").exists()
    status, (line,), log = bare()
    assert status == 0 and "using .venv" in line and log == [RUFF]


@pytest.mark.parametrize("trouble, reason", [
    ({"BROKEN": "venv"}, "the installation failed: .*apt install python3-venv"),
    ({"BROKEN": "pip"}, "the installation failed: .*No space left on device"),
    ({"TOO_OLD": "1"}, "-m pip install ruff; or set PYTHON to Python 3.11 or later"),  # for the pinned versions
])
def test_a_failed_installation_ends_in_one_line_and_is_made_anew(bare, tmp_path, trouble, reason):
    status, (*_, line), _ = bare(**trouble)
    assert status == 1 and re.match(f"run.sh: error: .*{reason}", line)
    assert not (tmp_path / ".venv").exists()
    assert bare()[0] == 0


def test_an_installation_that_was_killed_is_made_anew_and_one_under_way_is_left_alone(bare, tmp_path):
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "half").touch()
    (tmp_path / ".venv" / "unfinished").write_text(str(os.getpid()))
    status, (line,), log = bare()
    assert status == 1 and "another run.sh is installing" in line and (tmp_path / ".venv" / "half").exists()
    (tmp_path / ".venv" / "unfinished").write_text("99999999")
    assert bare()[0] == 0 and not (tmp_path / ".venv" / "half").exists()


def test_an_environment_of_the_users_is_not_written_to(bare, tmp_path):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(tmp_path / "bin" / "python", tmp_path / ".venv" / "bin")
    status, (line,), log = bare()
    assert status == 1 and "and .venv is no better: ruff not installed: " in line and log == []
    assert list((tmp_path / ".venv").iterdir()) == [tmp_path / ".venv" / "bin"]


def test_test_passes_arguments_to_pytest(shell, tmp_path):
    assert shell("test", "-k", "basis")[0] == 0
    called = (tmp_path / "calls").read_text().splitlines()[-1]
    assert called.split("\t") == [*"-m pytest --numprocesses auto --dist loadfile".split(), "-k", "basis"]
