"""README and docs: flags, links and commands that exist, figures of the runs in results/, pages made from the code."""
import importlib.util
import json
import math
import re
import shlex

import matplotlib
import numpy
import pytest
from conftest import ROOT
from matplotlib.image import imread
from test_zoo import on_meta

import models
import recipes
import report
import train_pbfgs
import train_psgd
import train_sgd
import trajectory

README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
SCRIPTS = {"train_sgd.py": train_sgd, "train_pbfgs.py": train_pbfgs, "train_psgd.py": train_psgd, "report.py": report,
           "trajectory.py": trajectory}
OTHERS = {"--help", "--nproc_per_node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--nodes",
          "--ntasks-per-node", "--gpus-per-node", "--signal", "--requeue", "--no-index", "--find-links",
          "--index-url", "--torch-backend", "--dest"}
FLAG = r"(?<![\w-])--[a-z][\w-]*"


def make():
    spec = importlib.util.spec_from_file_location("make", ROOT / "docs" / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150 and len(README.split()) <= 1400


def test_the_page_of_flags_is_that_of_the_parsers():
    assert DOCS["flags.md"] == make().flags()


def test_every_flag_that_is_named_exists():
    benchmarks = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    known = set(re.findall(FLAG, DOCS["flags.md"])) | OTHERS | set(re.findall(FLAG, benchmarks))
    assert len(known) > 50
    for name, page in {"README.md": README, **DOCS}.items():
        assert not set(re.findall(FLAG, page)) - known, name


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "results" / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


def commands():
    """Every line of README and docs that starts one of the scripts."""
    for name, page in {"README.md": README, **DOCS}.items():
        for line in re.sub(r"\\\n\s*", "", page).splitlines():
            found = re.search(r"(?:python (?:-u )?|torchrun .*?)(\w+\.py) (--[^#`|]*)", line)
            if found and found[1] in SCRIPTS and "..." not in line:
                yield pytest.param(SCRIPTS[found[1]], shlex.split(found[2].replace("$", "")), id=f"{name}: {line[:60]}")


@pytest.mark.parametrize(("script", "argv"), list(commands()))
def test_every_command_is_understood(script, argv):
    script.parse_args(argv)


def test_every_table_exists():
    for page in (README, *DOCS.values()):
        assert set(re.findall(r"run\.sh table ([a-z]\w*)", page)) <= set(recipes.ABOUT)
        assert set(re.findall(r"run\.sh ([a-z]\w*)", page)) <= {"quick", "test", "lint", "table"}


def test_the_headline_is_that_of_the_runs():
    expected = []
    for folder, noise, setting in (
            ("noise-full", 0.2, "all images, 20% label noise"), ("noise-full", 0, "all images, no noise"),
            ("noise-tenth", 0.4, "a tenth, 40% label noise"), ("noise-tenth", 0, "a tenth, no noise")):
        runs = [run for run in report.find_runs([ROOT / "results" / folder]) if run["corrupt"] == noise]
        rows = report.rows(runs)[0]
        assert len(rows) == 3
        for first, row in zip((f" {setting} ", " ", " "), rows, strict=True):
            expected.append(f"|{first}| " + " | ".join((
                row["method"], str(row["seeds"].count(",") + 1), row["parameters trained"], row["epochs (+ sampling)"],
                row["test accuracy, last (%)"], row["best (%)"])) + " |")
    assert "\n".join(expected) in README


FAULTS = """
resume.KILLS
resume.test_killed_inside
resume.test_networks_that_draw
resume.test_signals run_sh.test_a_signal
resume.test_a_full resume.test_a_read_only resume.test_a_signal bad_input.test_a_write_that_fails
fuzz.COMMAND_LINES
fuzz.FOLDERS
fuzz.ENVIRONMENTS
fuzz.SNAPSHOTS 50
fuzz.ARRAYS
fuzz_pairs.STAGES
fuzz_pairs.DIRECTORIES stages.test_a_finished_run
stages.test_snapshots_of stages.test_starting stages.test_snapshots_left stages.test_over scripts.test_resume_refuses
folders.test_a_part folders.test_noise
folders.test_16 folders.test_other_depths folders.test_npz folders.test_hidden folders.test_class
folders.test_an folders.test_a_killed folders.test_a_small folders.test_a_low folders.test_a_limit folders.test_the
report.test_a_run_counts report.test_targets
stages.test_state_dicts stages.test_a_pickled distributed.test_pretrained
stages.test_a_file_system stages.test_directories
bad_input.test_a_loss bad_input.test_a_line_search
bad_input.test_hostile 1
resume.test_a_second_run
distributed.test_a_dead distributed.test_a_signal distributed.test_a_process
"""  # behind each line of testing.md: what starts so in the tests; a test counts with its parameters


def cases(name):
    """How often pytest runs the tests whose names start so, without what is slow or needs a GPU; or a number."""
    if name.isdecimal():
        return int(name)
    module, start = name.split(".")
    found = {key: value for key, value in vars(importlib.import_module(f"test_{module}")).items()
             if key.startswith(start)}
    assert found, name
    return sum(value if isinstance(value, int) else sum(value.values()) if isinstance(value, dict) else
               math.prod(sum(not getattr(values, "marks", ()) for values in mark.args[1])
                         for mark in getattr(value, "pytestmark", []) if mark.name == "parametrize")
               for value in found.values())


def test_counts_of_faults_are_those_of_the_tests():
    rows = re.findall(r"^\| .* \| (.*) \| (\d+) \|$", DOCS["testing.md"], re.MULTILINE)
    for (files, count), line in zip(rows, FAULTS.strip().splitlines(), strict=True):
        assert int(count) == sum(map(cases, line.split())), line
        assert all(f"(../tests/test_{name.split('.')[0]}.py)" in files for name in line.split() if "." in name), line


def test_networks_are_listed_as_they_are():
    rows = re.findall(r"^\| (\w+) \| ([\d,]+) \| [\d,]+ \| \[models/(\w+)\.py\]", DOCS["networks.md"], re.MULTILINE)
    assert [(name, file) for name, _, file in rows] == [
        (name, family) for family, names in models.FAMILIES.items() for name in names.split()]
    for name, parameters, _ in rows:
        assert parameters == f"{sum(p.numel() for p in on_meta(name, 100).parameters()):,}"


@pytest.mark.slow
def test_the_page_of_networks_is_made_from_them():
    assert DOCS["networks.md"] == make().networks()


def test_speeds_are_those_that_were_printed():
    printed = "".join(path.read_text() for path in (ROOT / "results" / "cpu-speed").glob("*.log"))
    rows = re.findall(r"^\|.*(?:baseline / ours|with --half|its passes|first iteration).*$", DOCS["speed.md"],
                      re.MULTILINE)
    assert len(rows) >= 9 and all(row in printed for row in rows)


TABLES = [path.parent.name for path in sorted((ROOT / "results").glob("*/runs.csv"))]


@pytest.mark.parametrize("directory", [*TABLES, "cifar100-zoo"])
def test_tables_are_those_of_the_runs(directory):
    runs = report.find_runs([ROOT / "results" / directory])
    assert (ROOT / "results" / directory / "table.md").read_text() == report.table(runs)
    if directory != "cifar100-zoo":  # two epochs are no result
        assert (ROOT / "results" / directory / "runs.csv").read_text() == report.comma_separated(runs)


DRAWN = sorted({path.parent.name for path in (ROOT / "results").glob("*/*.png")} & {*TABLES})


@pytest.mark.parametrize("directory", DRAWN)
def test_figures_are_those_of_the_runs(directory, tmp_path):
    """The same pixels, from the same versions of matplotlib and numpy; and a page that shows or links to each."""
    committed = sorted((ROOT / "results" / directory).glob("*.png"))
    linked = "".join(path.read_text() for path in (ROOT / "README.md", ROOT / "results" / "README.md"))
    assert not [path.name for path in committed if f"{directory}/{path.name})" not in linked]
    pinned = dict(re.findall(r"(\S+)==(\S+)", (ROOT / "requirements.txt").read_text()))
    if any(module.__version__ != pinned[module.__name__] for module in (matplotlib, numpy)):
        pytest.skip("drawn with the versions of requirements.txt")
    report.main(report.parse_args([str(ROOT / "results" / directory), "--figures", str(tmp_path)]))
    assert {path.name for path in committed} <= {path.name for path in tmp_path.iterdir()}
    for path in committed:
        assert (imread(path) == imread(tmp_path / path.name)).all(), path.name


def test_results_are_small_without_weights_and_each_run_is_there_once():
    """A second folder has a link to a run, which report.py follows."""
    files = [path for path in (ROOT / "results").rglob("*") if path.is_file() and not path.is_symlink()]
    assert sum(path.stat().st_size for path in files) < 6e6 and not {path.suffix for path in files} & {".pt", ".npz"}
    logs = [path.read_text() for path in files if path.name.endswith("_log.jsonl")]
    assert len(logs) > 50 and len(set(logs)) == len(logs)
    links = [path for path in (ROOT / "results").rglob("*") if path.is_symlink()]
    for link in links:
        assert not link.readlink().is_absolute() and report.find_runs([link.parent])
        assert len(report.find_runs([link])) == 1
    assert len(links) >= 6


def test_measured_dimensions_and_differences_are_those_of_the_runs():
    """T3's last column in results/README.md: k, last test accuracy, difference from the reference."""
    page = (ROOT / "results" / "README.md").read_text()
    targets = {(target["setting"]["corrupt"], target["setting"].get("n_components")): target["last"]
               for target in json.loads(report.TARGETS.read_text())["targets"] if target["table"] == "T3"}
    for noise, row in (0, "0"), (0.2, "0.20"):
        expected = []
        for run in report.find_runs([ROOT / "results" / "dims-full"]):
            if run["corrupt"] == noise and run["method"] == "psgd":
                k, last = run["args"]["n_components"], run["test_accuracy_last"]
                expected.append(f"{k:g}: {last:.2f}"
                                + (f" ({last - targets[noise, k]:+.2f})" if (noise, k) in targets else ""))
        shown = re.search(rf"^\| {row} \|.* \| (.*) \|$", page, re.M)[1]
        assert len(expected) >= 4 and shown == ", ".join(expected)


def test_every_target_is_compared():
    """Each line of results/targets.json has its figure in results/README.md, and describes a run that can be made."""
    page = (ROOT / "results" / "README.md").read_text()
    targets = json.loads(report.TARGETS.read_text())["targets"]
    assert len(targets) > 75
    for target in targets:
        assert f"{target['last']:.2f}" in page or f"{target['last']:g}" in page
        script = {"SGD": train_sgd, "P-SGD": train_psgd, "P-BFGS": train_pbfgs}[target["setting"]["label"]]
        assert set(target["setting"]) <= {*vars(script.parse_args(["--save-dir", "x"])), "label", "dataset"}
