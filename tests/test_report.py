"""The table and figure, from real runs' files."""
import json
import shutil

import pytest
from conftest import digits_args

import report
import train_psgd
from utils import InputError


@pytest.fixture(scope="module")
def runs(sampled, tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    for name in ("sgd_summary.json", "sgd_log.jsonl"):
        shutil.copy(sampled / name, directory)
    window = ["--params_end", "6", "--n_components", "3"]
    argv = digits_args(sampled, "--output-dir", str(directory), *window, "--epochs", "2")
    train_psgd.main(train_psgd.parse_args(argv))
    return directory


def test_table_and_figure(runs, tmp_path, capsys):
    report.main(report.parse_args([str(runs), "--table", str(tmp_path / "t.md"), "--figure", str(tmp_path / "f.png")]))
    text = (tmp_path / "t.md").read_text()
    assert text in capsys.readouterr().out
    header, rule, sgd, psgd = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert len(header) == len(rule) == len(sgd) == len(psgd)
    summary = json.loads((runs / "psgd_summary.json").read_text())
    assert sgd[1:3] == ["SGD", "75,290"] and psgd[1:4] == ["P-SGD", "3", "2"]
    assert psgd[4] == f"{summary['test_accuracy_last']:.2f}"
    assert psgd[5:7] == [f"{summary['test_accuracy_best']:.2f}", str(summary["best_epoch"])]
    assert "30% of the samples" in psgd[0]
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_share_a_row(runs):
    """Two runs that differ in their seed only: mean and sample standard deviation, computed by hand."""
    first = next(run for run in report.find_runs([runs]) if run["method"] == "psgd")
    second = {**first, "seed": 2, "args": {**first["args"], "randomseed": 2}, "test_accuracy_last": 90.0}
    first["test_accuracy_last"] = 88.0
    other = {**second, "args": {**second["args"], "lr": 0.5}}
    rows = report.table([first, second, other]).splitlines()[2:]
    assert len(rows) == 2 and "2 seeds (1, 2)" in rows[0] and "| 89.00 ± 1.41 |" in rows[0] and "seed 2 " in rows[1]


def test_a_run_of_no_epochs_has_a_row(sampled, tmp_path):
    window = ["--params_end", "6", "--n_components", "3"]
    argv = digits_args(sampled, "--output-dir", str(tmp_path), *window, "--epochs", "0")
    train_psgd.main(train_psgd.parse_args(argv))
    assert "| P-SGD | 3 | 0 | - |" in report.table(report.find_runs([tmp_path]))


def test_damaged_files_are_named(runs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(runs, copy)
    (copy / "psgd_log.jsonl").write_text("{")
    with pytest.raises(InputError, match="psgd_log.jsonl"):
        report.find_runs([copy])


def test_unknown_figure_format_is_one_line(runs):
    with pytest.raises(InputError, match="--figure"):
        report.main(report.parse_args([str(runs), "--figure", "x.nothing"]))
