"""The README names every flag that there is and no other, and its tables are those of the runs in results/."""
import re

import pytest
from conftest import ROOT

import report
import train_pbfgs
import train_psgd
import train_sgd

README = (ROOT / "README.md").read_text()
FLAG = r"(?<![\w-])--[a-z][\w-]*"


def test_every_flag_is_documented_and_exists(capsys):
    flags = set()
    for script in (train_sgd, train_pbfgs, train_psgd, report):
        with pytest.raises(SystemExit):
            script.parse_args(["--help"])
        flags |= set(re.findall(FLAG, capsys.readouterr().out))
    named = set(re.findall(FLAG, README))
    assert len(flags) > 30 and not flags - named - {"--help"} and not named - flags


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "results" / "README.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("directory", ["digits-quick", "cifar10-tenth"])
def test_tables_are_those_of_the_runs(directory):
    table = report.table(report.find_runs([ROOT / "results" / directory]))
    assert (ROOT / "results" / directory / "table.md").read_text() == table
    assert table in README
