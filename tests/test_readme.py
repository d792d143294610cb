"""The README names every flag that there is and no other, and its tables are those of the runs in results/."""
import re

import pytest
import test_fuzz
import test_resume
from conftest import ROOT
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
    names = [(name, family.__name__) for family in models.FAMILIES for name in family.MODELS]
    assert [(name, f"models.{file}") for name, _, file in rows] == names
    for name, parameters, _ in rows:
        assert parameters == f"{sum(p.numel() for p in on_meta(name).parameters()):,}"


def test_speeds_are_those_that_were_printed():
    printed = "".join(path.read_text() for path in (ROOT / "results" / "cpu-speed").glob("*.log"))
    rows = re.findall(r"^\|.*(?:baseline / ours|with --half|its passes|first iteration).*$", README, re.MULTILINE)
    assert len(rows) >= 9 and all(row in printed for row in rows)


@pytest.mark.slow
def test_table_of_networks():
    assert models.__main__.table() in README


@pytest.mark.parametrize("directory", ["digits-quick", "cifar10-tenth", "cifar100-zoo"])
def test_tables_are_those_of_the_runs(directory):
    table = report.table(report.find_runs([ROOT / "results" / directory]))
    assert (ROOT / "results" / directory / "table.md").read_text() == table
    assert table in README or directory == "cifar100-zoo"  # two epochs are no result
