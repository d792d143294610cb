"""The README names every flag that there is and no other, and its tables are those of the runs in results/."""
import re

import matplotlib
import pytest
import test_fuzz
import test_resume
from conftest import ROOT
from matplotlib.image import imread
from test_zoo import on_meta

import models.__main__
import report
import train_pbfgs
import train_psgd
import train_sgd
import trajectory

README = (ROOT / "README.md").read_text()
LAUNCHERS = {"--nproc_per_node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id",  # torchrun's and
             "--nodes", "--ntasks-per-node", "--gpus-per-node", "--signal", "--requeue"}  # Slurm's own
FLAG = r"(?<![\w-])--[a-z][\w-]*"


def test_every_flag_is_documented_and_exists(capsys):
    flags = set()
    for script in (train_sgd, train_pbfgs, train_psgd, report, trajectory):
        with pytest.raises(SystemExit):
            script.parse_args(["--help"])
        flags |= set(re.findall(FLAG, capsys.readouterr().out))
    named = set(re.findall(FLAG, README)) - LAUNCHERS
    assert len(flags) > 30 and not flags - named - {"--help"} and not named - flags


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "results" / "README.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), target


def test_counts_of_faults_are_those_of_the_tests():
    counts = [int(a) for a, b in re.findall(r"\| (\d+) \| (\d+) \|\n", README) if a == b]
    assert counts[:3] == [sum(test_resume.KILLS.values()), sum(map(len, test_resume.KILLED_WRITES.values())), 3]
    assert counts[5:8] == [test_fuzz.COMMAND_LINES, test_fuzz.SNAPSHOTS + 50, test_fuzz.ARRAYS]


def test_networks_are_listed_as_they_are():
    rows = re.findall(r"^\| (\w+) \| ([\d,]+) \| [\d,]+ \| \[models/(\w+)\.py\]", README, re.MULTILINE)
    names = [(name, file) for file, names in models.FAMILIES.items() for name in names.split()]
    assert [(name, file) for name, _, file in rows] == names
    for name, parameters, _ in rows:
        assert parameters == f"{sum(p.numel() for p in on_meta(name, 100).parameters()):,}"


def test_speeds_are_those_that_were_printed():
    printed = "".join(path.read_text() for path in (ROOT / "results" / "cpu-speed").glob("*.log"))
    rows = re.findall(r"^\|.*(?:baseline / ours|with --half|its passes|first iteration).*$", README, re.MULTILINE)
    assert len(rows) >= 9 and all(row in printed for row in rows)


@pytest.mark.slow
def test_table_of_networks():
    assert models.__main__.table() in README


TABLES = [path.parent.name for path in sorted((ROOT / "results").glob("*/runs.csv"))]


@pytest.mark.parametrize("directory", [*TABLES, "cifar100-zoo"])
def test_tables_are_those_of_the_runs(directory):
    runs = report.find_runs([ROOT / "results" / directory])
    table = report.table(runs)
    assert (ROOT / "results" / directory / "table.md").read_text() == table
    if directory != "cifar100-zoo":  # two epochs are no result
        assert (ROOT / "results" / directory / "runs.csv").read_text() == report.comma_separated(runs)
    if directory in ("digits-quick", "cifar10-cpu"):
        assert table in README


@pytest.mark.parametrize("directory", TABLES)
def test_figures_are_those_of_the_runs(directory, tmp_path):
    """The same pixels, from the same version of matplotlib."""
    pinned = re.search(r"matplotlib==(\S+)", (ROOT / "requirements.txt").read_text())[1]
    if matplotlib.__version__ != pinned:
        pytest.skip(f"drawn with matplotlib {pinned}, this is {matplotlib.__version__}")
    report.main(report.parse_args([str(ROOT / "results" / directory), "--figures", str(tmp_path)]))
    committed = sorted((ROOT / "results" / directory).glob("*.png"))
    assert committed and [path.name for path in committed] == sorted(path.name for path in tmp_path.iterdir())
    for path in committed:
        assert (imread(path) == imread(tmp_path / path.name)).all(), path.name


def test_results_are_small_and_without_weights():
    files = [path for path in (ROOT / "results").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5e6 and not {path.suffix for path in files} & {".pt", ".npz"}


def test_every_target_is_compared():
    """Each line of results/targets.json has its figure in results/README.md, and describes a run that can be made."""
    page = (ROOT / "results" / "README.md").read_text()
    targets = report.load_json(report.TARGETS)["targets"]
    assert len(targets) > 60
    for target in targets:
        assert f"{target['last']:.2f}" in page or f"{target['last']:g}" in page
        script = {"SGD": train_sgd, "P-SGD": train_psgd, "P-BFGS": train_pbfgs}[target["label"]]
        known = vars(script.parse_args(["--save-dir", "x"]))
        assert not set(target) - set(known) - {"table", "source", "label", "dataset", "last", "best"}
