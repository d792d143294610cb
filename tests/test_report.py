"""The table and figure, from real runs' files."""
import csv
import json
import shutil

import pytest
from conftest import digits_args

import report
import train_psgd
from dldr.errors import UserError


@pytest.fixture(scope="module")
def runs(sampled, tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    for name in ("sgd_summary.json", "sgd_log.jsonl"):
        shutil.copy(sampled / name, directory)
    window = ["--params_end", "6", "--n_components", "3"]
    argv = digits_args(sampled, "--output-dir", str(directory), *window, "--epochs", "2")
    train_psgd.main(train_psgd.parse_args(argv))
    return directory


def test_table_csv_and_figures(runs, tmp_path, capsys):
    report.main(report.parse_args([str(runs), "--table", str(tmp_path / "t.md"), "--csv", str(tmp_path / "t.csv"),
                                   "--figures", str(tmp_path)]))
    text = (tmp_path / "t.md").read_text()
    assert text in capsys.readouterr().out
    header, rule, sgd, psgd = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert len(header) == len(rule) == len(sgd) == len(psgd)
    summary = json.loads((runs / "psgd_summary.json").read_text())
    assert sgd[1:3] == ["SGD", "6,282"] and psgd[1:4] == ["P-SGD", "3", "2"]
    assert psgd[4] == f"{summary['test_accuracy_last']:.2f}"
    assert psgd[5:7] == [f"{summary['test_accuracy_best']:.2f}", str(summary["best_epoch"])]
    assert "30% of the samples" in psgd[0]
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert [row["label"] for row in rows] == ["SGD", "P-SGD"]
    assert float(rows[1]["test_accuracy_last"]) == summary["test_accuracy_last"]
    assert float(rows[1]["explained_variance"]) == summary["explained_variance"]["total"]
    drawn = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert set(drawn) == {"accuracy.png", "variance.png"}  # one k, no noise, no P-BFGS: nothing to draw of those
    assert all(content.startswith(b"\x89PNG") for content in drawn.values())
    report.main(report.parse_args([str(runs), "--figures", str(tmp_path)]))
    assert drawn == {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}


def test_every_figure_shows_the_numbers_of_its_runs(runs):
    """Drawn from runs that differ in k, noise, seed and method; the lines hold what the summaries hold."""
    sgd, psgd = report.find_runs([runs])
    made = []
    for seed in (1, 2):
        for c in (0.0, 0.4):
            made.append({**sgd, "corrupt": c, "seed": seed, "test_accuracy_last": 90 - 50 * c + seed})
            for k in (3, 6, 9):
                made.append({**psgd, "corrupt": c, "seed": seed, "n_components": k,
                             "test_accuracy_last": 80 + k - 20 * c + seed})
    (ax,) = report.dimensions(made, "title").axes
    line = next(line for line in ax.get_lines() if line.get_label() == "_child0" or len(line.get_xdata()) == 3)
    assert list(line.get_xdata()) == [3, 6, 9] and list(line.get_ydata()) == [84.5, 87.5, 90.5]
    (ax,) = report.noise(made, "title").axes
    lines = {tuple(line.get_xdata()): tuple(line.get_ydata()) for line in ax.get_lines() if len(line.get_xdata()) == 2}
    assert (0.0, 40.0) in lines
    assert {container.get_label() for container in ax.containers} == {
        "SGD, last epoch", "SGD, best epoch", "P-SGD, last epoch, k = 9"}
    pbfgs = {**psgd, "method": "pbfgs", "log": [{"epoch": e, "trials_per_step": 1 + e, "first_trial_accepted": 100 - e}
                                                for e in (1, 2)]}
    count, first = report.trials([pbfgs], "title").axes
    assert list(count.get_lines()[0].get_ydata()) == [2, 3] and list(first.get_lines()[0].get_ydata()) == [99, 98]
    each, total = report.variance([psgd], "title").axes
    shares = psgd["explained_variance"]["per_component"]
    assert list(each.get_lines()[0].get_ydata()) == [100 * share for share in shares]
    assert total.get_lines()[0].get_ydata()[-1] == pytest.approx(100 * sum(shares))


def test_runs_that_have_not_ended_are_listed(runs, tmp_path, capsys):
    shutil.copytree(runs, tmp_path / "runs")
    (tmp_path / "runs" / "psgd_summary.json").unlink()
    report.main(report.parse_args([str(tmp_path)]))
    out = capsys.readouterr().out
    assert "P-SGD" not in out.split("unfinished")[0]
    assert f"unfinished: P-SGD in {tmp_path / 'runs'}, seed 1, 2 of 2 epochs" in out


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
    with pytest.raises(UserError, match="psgd_log.jsonl"):
        report.find_runs([copy])


def test_targets_are_compared_with_the_very_setting_only(runs):
    """T1's P-SGD by hand; any other setting, and any part of the data set, has no target."""
    psgd = next(run for run in report.find_runs([runs]) if run["method"] == "psgd")
    args = {**psgd["args"], "arch": "resnet20", "smalldatasets": None, "epochs": 40, "lr": 1.0, "batch_size": 128,
            "params_start": 0, "params_end": 81, "params_step": 1, "n_components": 40}

    def run(accuracy, seed=1, **changed):
        made = {**args, "randomseed": seed, **changed}
        return {**psgd, "dataset": "CIFAR10", "arch": made["arch"], "epochs": made["epochs"], "corrupt": 0.0,
                "n_components": made["n_components"], "seed": seed, "test_accuracy_last": accuracy, "args": made}

    assert report.compared([run(92.0)]) == ("91.95 [A]", "+0.05 (one seed)")
    assert report.compared([run(91.9), run(92.2, 2)]) == ("91.95 [A]", "+0.10")  # 92.05 ± 0.21
    assert report.compared([run(90.9), run(91.1, 2)]) == ("91.95 [A]", "-0.95 (beyond the spread)")
    assert report.compared([run(91.0, n_components=25)]) == ("91.77 [B]", "-0.77 (one seed)")
    for changed in ({"smalldatasets": 0.2}, {"epochs": 30}, {"params_end": 71}, {"arch": "resnet32"}, {"lr": 0.5},
                    {"basis": "random"}, {"n_components": 39}, {"half": True}, {"accumulate": 2}, {"momentum": 0.5},
                    {"milestones": [10]}):
        assert report.compared([run(92.0, **changed)]) == ("-", "-")
    assert report.compared([{**run(92.0), "hardware": {"processes": 2}}]) == ("-", "-")
    rows = report.table([run(91.0), run(92.0, n_components=3), run(90.0, 2)])
    assert "| -1.45 (beyond the spread) |" in rows and rows.count("\n") == 4


def test_rows_ascend_as_numbers(runs, tmp_path):
    """k = 3 comes before 20 and SGD before all, whatever the directories are called; copies of a run count once."""
    for i, k in enumerate((20, 3, 15)):
        shutil.copytree(runs, tmp_path / f"{i}")
        path = tmp_path / f"{i}" / "psgd_summary.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "n_components": k}))
    found = report.find_runs([tmp_path])
    assert [(report.label(run), run["n_components"]) for run in found] == [
        ("SGD", None), *(("P-SGD", k) for k in (3, 15, 20))]


def test_svg_is_the_same_every_time(runs, tmp_path):
    drawn = []
    for _ in range(2):
        report.main(report.parse_args([str(runs), "--figures", str(tmp_path), "--format", "svg"]))
        drawn.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    assert drawn[0] == drawn[1] and set(drawn[0]) == {"accuracy.svg", "variance.svg"}


def test_a_run_counts_once_and_different_experiments_are_different_rows(runs, tmp_path, capsys):
    """A copy below the same root is no second seed; other data, classes or sampling are no second seed either."""
    shutil.copytree(runs, tmp_path / "tables" / "copy")
    shutil.copytree(runs, tmp_path / "run")
    found = report.find_runs([tmp_path])
    assert [run["method"] for run in found] == ["sgd", "psgd"]
    psgd = found[1]
    again = {**psgd, "seed": 2, "args": {**psgd["args"], "randomseed": 2},
             "data": {**psgd["data"], "labels": "noisy ones of another seed"}}
    assert len(report.grouped([psgd, again])) == 1
    for other in ({"data": {**psgd["data"], "content": "0"}}, {"data": {**psgd["data"], "classes": 3}},
                  {"sampling": {**psgd["sampling"], "optimizer": "adam"}}):
        assert len(report.grouped([psgd, {**again, **other}])) == 2
    assert "seeds (1, 1)" in report.table([psgd, {**psgd, "finished": "later"}])
    assert "a seed twice in one row" in capsys.readouterr().err
