"""The table and figure, from real runs' files."""
import csv
import json
import re
import shutil

import pytest
from conftest import digits_args
from matplotlib.colors import to_hex

import plots
import report
import train_psgd
import train_sgd
from dldr.errors import UserError


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory, snapshots = tmp_path_factory.mktemp("report"), tmp_path_factory.mktemp("snapshots")
    flags = digits_args(snapshots, "--arch", "resnet8", "--smalldatasets", "0.1")
    train_sgd.main(train_sgd.parse_args([*flags, "--epochs", "5"]))
    for name in ("sgd_summary.json", "sgd_log.jsonl"):
        shutil.copy(snapshots / name, directory)
    window = ["--params_end", "6", "--n_components", "3"]
    train_psgd.main(train_psgd.parse_args([*flags, "--output-dir", str(directory), *window, "--epochs", "2"]))
    return directory


def changed(run, **values):
    """A run as it would be with other arguments, a seed or a result of its own."""
    args = {**run["args"], **{key: value for key, value in values.items() if key in run["args"]}}
    return {**run, **{key: value for key, value in values.items() if key in run},
            "args": {**args, "randomseed": values.get("seed", args["randomseed"])}}


def test_table_and_csv(runs, tmp_path, capsys):
    report.main(report.parse_args([str(runs), "--table", str(tmp_path / "t.md"), "--csv", str(tmp_path / "t.csv")]))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100 and "|" not in printed
    header, rule, *body = [[cell.strip() for cell in line.split("|")[1:-1]]
                           for line in (tmp_path / "t.md").read_text().splitlines() if line.startswith("|")]
    sgd, psgd = (dict(zip(header, row, strict=True)) for row in body)
    assert len(rule) == len(header) and not {"difference", "reference, last (%)"} & set(header)  # nothing but dashes
    made = {method: json.loads((runs / f"{method}_summary.json").read_text()) for method in ("sgd", "psgd")}
    assert (sgd["method"], sgd["parameters trained"], sgd["epochs (+ sampling)"]) == ("SGD", "75,290", "5")
    assert (psgd["method"], psgd["parameters trained"], psgd["epochs (+ sampling)"]) == ("P-SGD", "3", "2 (+ 5)")
    assert psgd["test accuracy, last (%)"] == f"{made['psgd']['test_accuracy_last']:.2f}"
    assert psgd["best (%)"] == f"{made['psgd']['test_accuracy_best']:.2f}"
    assert psgd["best epoch"] == str(made["psgd"]["best_epoch"])
    assert psgd["run"] == "handwritten digits (10% of the images), ResNet-8" and psgd["method"] in printed
    sampling = sum(json.loads(line)["seconds"] for line in (runs / "sgd_log.jsonl").read_text().splitlines())
    seconds = sampling + made["psgd"]["seconds"]["basis"] + made["psgd"]["seconds"]["train"]
    assert psgd["seconds (sampling)"].rstrip("\\*") == f"{seconds:.0f} ({sampling:.0f})"
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert [row["label"] for row in rows] == ["SGD", "P-SGD"]
    assert float(rows[1]["test_accuracy_last"]) == made["psgd"]["test_accuracy_last"]
    assert float(rows[1]["explained_variance"]) == made["psgd"]["explained_variance"]["total"]


@pytest.fixture
def many(runs):
    """Runs of two seeds and two levels of label noise: SGD; P-SGD with k = 3, 6, 9; P-BFGS with k = 9."""
    sgd, psgd = report.find_runs([runs])
    made = []
    for seed in (1, 2):
        for c in (0.0, 0.4):
            low = {"seed": seed, "corrupt": c}
            made.append(changed(sgd, **low, test_accuracy_last=90 - 50 * c + seed, test_accuracy_best=95))
            made += [changed(psgd, **low, n_components=k, test_accuracy_last=80 + k - 20 * c + seed) for k in (3, 6, 9)]
            log = [{**line, "trials_per_step": seed + e, "first_trial_accepted": 90 + seed}
                   for e, line in enumerate(psgd["log"])]
            made.append({**changed(psgd, **low, n_components=9, test_accuracy_last=85), "method": "pbfgs", "log": log})
    return made


def test_figures_show_the_numbers_of_their_runs(many):
    """Lines and bars hold mean and standard deviation, computed by hand; no two entries of a legend are the same."""
    clean = [run for run in many if run["corrupt"] == 0]
    (ax,) = plots.dimensions(report.named(clean, "n_components"), "title").axes
    bars = {bar.get_label(): bar for bar in ax.containers}
    assert list(bars["P-SGD"][0].get_xdata()) == [3, 6, 9] and list(bars["P-SGD"][0].get_ydata()) == [84.5, 87.5, 90.5]
    (low, high), *_ = bars["P-SGD"][2][0].get_segments()
    assert high[1] - low[1] == pytest.approx(2 * 0.5**0.5)
    assert [list(line.get_ydata()) for line in ax.get_lines() if line.get_label().startswith("SGD")] == [[91.5, 91.5]]
    far = [changed(run, test_accuracy_last=20) if run["n_components"] == 3 else run for run in clean]
    _, close = plots.dimensions(report.named(far, "n_components"), "title").axes  # the second panel leaves k = 3 out
    assert close.get_ylim()[0] > 75

    (ax,) = plots.noise(report.named(many, "corrupt"), "title").axes
    names = [bar.get_label() for bar in ax.containers]
    assert names == ["SGD, last epoch", "SGD, best epoch", "P-SGD, k = 3, last epoch", "P-SGD, k = 6, last epoch",
                     "P-SGD, k = 9, last epoch", "P-BFGS, k = 9, last epoch"]
    assert [list(bar[0].get_ydata()) for bar in ax.containers[:2]] == [[91.5, 71.5], [95, 95]]

    searches = [line for line in report.named(clean) if line.method == "P-BFGS"]
    count, first = plots.trials(searches, "title").axes
    assert list(count.get_lines()[0].get_ydata()) == [1.5, 2.5] and list(first.get_lines()[0].get_ydata()) == [91.5] * 2
    band = count.collections[0].get_datalim(count.transData)
    assert (band.y0, band.y1) == (pytest.approx(1.5 - 0.5**0.5), pytest.approx(2.5 + 0.5**0.5))
    (space,) = report.bases(report.named(clean))
    assert [run["n_components"] for run in space.runs] == [9, 9]
    each, total = plots.variance([space], "title").axes
    shares = clean[1]["explained_variance"]["per_component"]
    assert list(each.get_lines()[0].get_ydata()) == pytest.approx([100 * share for share in shares])
    assert total.get_lines()[0].get_ydata()[-1] == pytest.approx(100 * sum(shares))
    assert "cumulative" in total.get_ylabel()


def extent(patch):
    """What axvspan covers, in data coordinates: a rectangle, but a polygon before matplotlib 3.9."""
    return patch.get_path().transformed(patch.get_patch_transform()).get_extents()


def test_accuracy_counts_sampling(many):
    """Against seconds P-SGD starts where its sampling ended, which is shaded; the window is shaded against epoch."""
    clean = [run for run in many if run["corrupt"] == 0]
    lines = report.named(clean)
    by_epoch, by_time, last = plots.accuracy(lines, "title").axes
    psgd = next(line for line in lines if line.method == "P-SGD")
    xs = [line.get_xdata() for line in by_time.get_lines() if line.get_label() == psgd.name][0]
    run = psgd.runs[0]
    assert run["sampling_seconds"] == pytest.approx(sum(epoch["seconds"] for epoch in clean[0]["log"]))
    assert xs[0] == pytest.approx(run["sampling_seconds"] + run["seconds"]["basis"] + run["log"][0]["seconds"])
    assert [extent(patch).x1 for patch in (*by_epoch.patches, *by_time.patches)] == [
        5, pytest.approx(run["sampling_seconds"])]
    starts = [line.get_xdata()[0] for line in by_epoch.get_lines() if line.get_label() == psgd.name]
    assert starts == [5 + 1] and "shaded" in by_epoch.figure.get_supxlabel()
    names = [text.get_text() for text in last.get_yticklabels()]
    assert names[:2] == ["SGD: 91.50 ± 0.71", "P-SGD, k = 3: 84.50 ± 0.71"] and len(set(names)) == len(names) == 5
    looks = {(tuple(line.get_color()), line.get_linestyle(), line.get_marker()) for line in by_epoch.get_lines()}
    assert len(looks) == 5  # all can be told apart
    by_epoch, last = plots.accuracy(lines, "title", "why not").axes
    assert by_epoch.get_xlabel().startswith("epoch") and "best epoch" in last.get_xlabel()


def test_a_best_epoch_is_shown_where_the_last_is_far_below(many):
    """By an arrow and the hollow point; a filled one and no arrow for the others."""
    sgd, psgd = (changed(run, test_accuracy_last=last, test_accuracy_best=58.0)
                 for run, last in zip(many, (40.0, 57.0), strict=False))
    *_, last = plots.accuracy(report.named([sgd, psgd]), "title", "why not").axes
    points = [(float(line.get_xdata()[0]), line.get_marker(), line.get_markerfacecolor() == "none")
              for line in last.get_lines() if line.get_marker() not in ("None", None, "")]
    assert points == [(0.01, "<", False), (58.0, "o", True), (57.0, "o", False), (58.0, "o", True)]
    assert "arrow" in last.get_xlabel()


def test_a_method_has_one_colour(many):
    """The line of a method, that of its largest k, in every figure; on the loss surface too."""
    clean = [run for run in many if run["corrupt"] == 0]
    figures = [plots.accuracy(report.named(clean), ""), plots.noise(report.named(many, "corrupt"), ""),
               plots.dimensions(report.named(clean, "n_components"), ""), plots.plane(surface())]
    found = set()
    for ax in [ax for fig in figures for ax in fig.axes]:
        lines = [*ax.get_lines(), *(bar[0] for bar in ax.containers)]
        labels = [*(line.get_label() for line in ax.get_lines()), *(bar.get_label() or "" for bar in ax.containers)]
        found |= {(label.split(",")[0], to_hex(line.get_color())) for label, line in zip(labels, lines, strict=True)
                  if not re.search("k = [36]", label) and label.split(",")[0] in plots.COLOURS}
    assert found == {(name, colour.lower()) for name, colour in plots.COLOURS.items() if name != "Adam"}


def surface():
    """A trajectory.json by hand."""
    return {"args": {"datasets": "digits", "arch": "resnet8", "randomseed": 1, "n_components": 2, "params_start": 0,
                     "params_end": 3}, "snapshots": [0, 3],
            "distance_from_start": [0, 1, 2, 3], "distance_from_subspace": [0, 0, 0, 1],
            "axes": [[-1, 0, 1], [-1, 0, 1]], "losses": [[1, 2, 3], [1, 2, 4], [1, 3, 5]],
            "paths": {"sgd": [[[0, 0], [1, 1]]], "psgd": [[[0, 0], [1, 0]]], "pbfgs": [[[0, 0], [0, 1]]]}}


def test_the_loss_surface_marks_start_and_ends_and_says_what_is_projected():
    fig = plots.plane(surface())
    distance, plane, _ = fig.axes
    marks = [(line.get_marker(), list(map(float, line.get_xydata()[0]))) for line in plane.get_lines()
             if len(line.get_xdata()) == 1]
    assert marks == [("o", [1, 1]), ("s", [1, 0]), ("^", [0, 1]), ("*", [0, 0])]
    assert "projected" in plane.get_title() and plane.get_legend() is None and fig.legends  # the legend is off the data
    assert extent(distance.patches[0]).width == 2  # snapshots 0 to 2


def test_lines_of_one_name_are_told_apart(runs):
    """By what differs, however unusual; and where nothing that was recorded does, by a number."""
    sgd, psgd = report.find_runs([runs])
    made = [sgd, changed(sgd, lr=0.5), changed(sgd, pretrained="a.pt"), psgd, changed(psgd, params_end=5),
            changed(psgd, params_end=5, n_components=2), {**psgd, "data": {**psgd["data"], "content": "0"}}]
    assert [line.name for line in report.named(made)] == [
        f"SGD, lr {sgd['args']['lr']}", "SGD, lr 0.5", "SGD (pretrained)", "P-SGD, k = 3, snapshots 0 to 5 (1)",
        "P-SGD, k = 3, snapshots 0 to 4", "P-SGD, k = 2, snapshots 0 to 4", "P-SGD, k = 3, snapshots 0 to 5 (2)"]
    assert report.label({"method": "pbfgs", "args": {"alpha": 0.1}}) == "P+-BFGS"
    sampled = [{**psgd, "sampling": {**psgd["sampling"], "optimizer": optimizer}} for optimizer in ("sgd", "adam")]
    lines = report.bases(report.named(sampled))
    assert [line.name for line in lines] == ["principal directions (1)", "principal directions (2)"]
    text = report.console([changed(psgd, arch="a/very/long/path.py:" + "network" * 20, lr=i) for i in range(12)])
    assert max(map(len, text.splitlines())) <= 100


def test_files_by_data_set_network_and_noise(many, tmp_path):
    other = [changed(run, arch="net.py:f") for run in many[:2]]
    drawn = {path.stem for path in report.draw([*many, *other], tmp_path, "svg")}
    assert drawn == {f"{name}_resnet8_noise{c}" for name in ("accuracy", "variance", "dimensions", "trials")
                     for c in (0, 40)} | {"noise_resnet8", "accuracy_net-py-f_noise0", "variance_net-py-f_noise0"}


def test_seconds_that_are_no_measure_are_not_drawn(runs, tmp_path):
    """SGD's epochs of very different lengths; runs on other hardware; a sampling run that is not there."""
    made = report.find_runs([runs])
    steady = [{**run, "log": [{**line, "seconds": 2.0} for line in run["log"]], "hardware": {}} for run in made]
    assert report.untimed(steady) == ""
    steady[0]["log"][3]["seconds"] = 7.0
    assert report.untimed(steady) == "epochs of SGD took 2 to 7 s"
    assert report.table(steady).count("\\* |") == 2 and "): epochs of SGD took 2 to 7 s" in report.table(steady)
    assert "hardware" in report.untimed([made[0], {**made[1], "hardware": {"device": "cuda"}}])
    (tmp_path / "alone").mkdir()
    for name in ("psgd_summary.json", "psgd_log.jsonl"):
        shutil.copy(runs / name, tmp_path / "alone")
    alone = report.find_runs([tmp_path / "alone"])
    assert "sampled" in report.untimed(alone) and " + ?\\* |" in report.table(alone)


def test_a_sampling_run_counts_if_no_other_can_be_it(runs, tmp_path):
    """Machines used one --save-dir: SGD's seconds count where one run alone can have sampled, else none."""
    for name in "ab":
        shutil.copytree(runs, tmp_path / name)
        for path in (tmp_path / name).glob("*_summary.json"):
            path.write_text(json.dumps({**json.loads(path.read_text()), "finished": name}))

    def seconds():
        return [run["sampling_seconds"] for run in report.find_runs([tmp_path]) if run["method"] == "psgd"]

    assert seconds() == [None, None]
    (tmp_path / "b" / "sgd_summary.json").unlink()
    assert seconds() == [pytest.approx(sum(json.loads(line)["seconds"] for line in (
        runs / "sgd_log.jsonl").read_text().splitlines()))] * 2


@pytest.mark.parametrize(("flag", "value"), [("randomseed", 2), ("corrupt", 0.5), ("smalldatasets", 0.5)])
def test_the_seconds_of_another_sampling_run_do_not_count(runs, tmp_path, flag, value):
    """SGD started over in the directory, with other flags than the P-SGD run beside it."""
    shutil.copytree(runs, tmp_path / "runs")
    path = tmp_path / "runs" / "sgd_summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps({**summary, "args": {**summary["args"], flag: value}}))
    (run,) = (run for run in report.find_runs([tmp_path]) if run["method"] == "psgd")
    assert run["sampling_seconds"] is None


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
    rows = report.table([first, second, other]).splitlines()[2:4]
    assert "| 1, 2 | 3 |" in rows[0] and "| 89.00 ± 1.41 |" in rows[0] and "| 2 | 3 |" in rows[1]


def test_a_run_of_no_epochs_has_a_row(sampled, tmp_path):
    window = ["--params_end", "6", "--n_components", "3"]
    argv = digits_args(sampled, "--output-dir", str(tmp_path), *window, "--epochs", "0")
    train_psgd.main(train_psgd.parse_args(argv))
    found = report.find_runs([tmp_path])
    assert "| P-SGD | 1 | 3 | 0 (+ 5) | 0 + ?\\* |" in report.table(found) and not report.draw(found, tmp_path, "png")


def test_damaged_files_are_named(runs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(runs, copy)
    (copy / "psgd_log.jsonl").write_text("{")
    with pytest.raises(UserError, match="psgd_log.jsonl"):
        report.find_runs([copy])
    (copy / "psgd_log.jsonl").write_text((runs / "psgd_log.jsonl").read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match="the log ends at epoch 1, the run at"):
        report.find_runs([copy])
    shutil.copy(runs / "psgd_log.jsonl", copy)
    (copy / "psgd_summary.json").write_text("{}")
    with pytest.raises(UserError, match="psgd_summary.json"):
        report.find_runs([copy])


def test_a_trajectory_without_losses_is_named_and_the_rest_drawn(runs, tmp_path, capsys):
    shutil.copytree(runs, tmp_path / "copy")
    (tmp_path / "copy" / "trajectory.json").write_text("{}")
    report.main(report.parse_args([str(tmp_path / "copy"), "--figures", str(tmp_path)]))
    assert "trajectory.json is not drawn" in capsys.readouterr().err and (tmp_path / "accuracy.png").is_file()


def test_targets_are_compared_with_the_very_setting_only(runs):
    """T1's P-SGD by hand; any other setting, and any part of the data set, has no target."""
    psgd = next(run for run in report.find_runs([runs]) if run["method"] == "psgd")
    args = {**psgd["args"], "arch": "resnet20", "smalldatasets": None, "epochs": 40, "lr": 1.0, "batch_size": 128,
            "params_start": 0, "params_end": 81, "params_step": 1, "n_components": 40}
    released = {**psgd["sampling"], "lr": 0.1, "batch_size": 128}

    def run(accuracy, seed=1, **changed):
        made = {**args, "randomseed": seed, **changed}
        return {**psgd, "dataset": "CIFAR10", "arch": made["arch"], "epochs": made["epochs"], "corrupt": 0.0,
                "n_components": made["n_components"], "seed": seed, "test_accuracy_last": accuracy, "args": made,
                "sampling": released, "data": {**psgd["data"], "training": 50000}}

    assert report.compared([run(92.0)]) == ("91.95 [A]", "+0.05")
    assert report.compared([run(91.9), run(92.2, 2)]) == ("91.95 [A]", "+0.10")  # 92.05 ± 0.21
    assert report.compared([run(90.9), run(91.1, 2)]) == ("91.95 [A]", "-0.95 (beyond the spread)")
    assert report.compared([run(91.0, n_components=25)]) == ("91.77 [B]", "-0.77")
    for changed in ({"smalldatasets": 0.2}, {"epochs": 30}, {"params_end": 71}, {"arch": "resnet32"}, {"lr": 0.5},
                    {"basis": "random"}, {"n_components": 39}, {"half": True}, {"accumulate": 2}, {"momentum": 0.5},
                    {"milestones": [10]}, {"pretrained": "a.pt"}, {"allow_mismatch": ["smalldatasets"]}):
        assert report.compared([run(92.0, **changed)]) == ("-", "-")
    assert report.compared([{**run(92.0), "hardware": {"processes": 2}}]) == ("-", "-")
    assert report.compared([{**run(92.0), "data": {**psgd["data"], "training": 49999}}]) == ("-", "-")
    for sampled in ({"optimizer": "adam"}, {"samples_per_epoch": 2}, {"half": True}, {"milestones": [50]}):
        assert report.compared([{**run(92.0), "sampling": {**released, **sampled}}]) == ("-", "-")
    rows = report.table([run(91.0), run(92.0, n_components=3), run(90.0, 2)])
    assert "| -1.45 (beyond the spread) |" in rows and rows.count("\n|") == 3


def test_rows_ascend_as_numbers(runs, tmp_path):
    """k = 3 comes before 20 and SGD before all, whatever the directories are called; copies of a run count once."""
    for i, k in enumerate((20, 3, 15)):
        shutil.copytree(runs, tmp_path / f"{i}")
        path = tmp_path / f"{i}" / "psgd_summary.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "n_components": k}))
    found = report.find_runs([tmp_path])
    assert [(report.label(run), run["n_components"]) for run in found] == [
        ("SGD", None), *(("P-SGD", k) for k in (3, 15, 20))]


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_figures_are_the_same_bytes_every_time(runs, tmp_path, kind, start):
    drawn = []
    for _ in range(2):
        report.main(report.parse_args([str(runs), "--figures", str(tmp_path), "--format", kind]))
        drawn.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    assert drawn[0] == drawn[1] and all(content.startswith(start) for content in drawn[0].values())
    assert set(drawn[0]) == {f"accuracy.{kind}", f"variance.{kind}"}  # one k, no noise, no P-BFGS: no more to draw


def test_a_run_counts_once_and_different_experiments_are_different_rows(runs, tmp_path, capsys):
    """A copy below the same root is no second seed; other data, classes or sampling are no second seed either."""
    shutil.copytree(runs, tmp_path / "tables" / "copy")
    shutil.copytree(runs, tmp_path / "run")
    found = report.find_runs([tmp_path])
    assert [run["method"] for run in found] == ["sgd", "psgd"]
    psgd = found[1]
    again = {**psgd, "seed": 2, "args": {**psgd["args"], "randomseed": 2},
             "data": {**psgd["data"], "labels": "noisy ones of another seed"}}
    assert len(report.named([psgd, again])) == 1
    path = tmp_path / "run" / "psgd_summary.json"
    summary = json.loads(path.read_text())
    summary["args"] = {key: value for key, value in summary["args"].items() if key not in report.BEFORE}
    del summary["sampling"]["sync_bn"]
    path.write_text(json.dumps({**summary, "finished": "later"}))
    assert [len(line.runs) for line in report.named(report.find_runs([tmp_path]))] == [1, 2]
    for other in ({"data": {**psgd["data"], "content": "0"}}, {"data": {**psgd["data"], "classes": 3}},
                  {"sampling": {**psgd["sampling"], "optimizer": "adam"}}, {"hardware": {"processes": 2}},
                  {"sampling": {**psgd["sampling"], "smalldatasets": 0.1}}):
        assert len(report.named([psgd, {**again, **other}])) == 2
    assert "| 1, 1 |" in report.table([psgd, {**psgd, "finished": "later"}])
    assert "a seed twice in one row" in capsys.readouterr().err


def test_directories_are_searched_once_and_through_links(runs, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    for name in ("run", "again"):
        (tmp_path / "a" / name).symlink_to(runs)
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "a" / ".hidden").mkdir()
    (tmp_path / "a" / ".hidden" / "psgd_args.json").write_text(
        (runs / "psgd_args.json").read_text())
    assert len(report.find_runs([tmp_path, tmp_path / "a"])) == 2
    assert len(report.unfinished([tmp_path, tmp_path])) == 1
    (tmp_path / "a" / "lost").symlink_to("nowhere")
    report.find_runs([tmp_path])
    assert "lost is a link to nothing" in capsys.readouterr().err
    with pytest.raises(OSError, match="typo"):
        report.find_runs([tmp_path, tmp_path / "typo"])


def test_a_copied_trajectory_is_drawn_once(runs, tmp_path):
    trajectory = json.dumps({"losses": []})
    for name in ("a", "b"):
        shutil.copytree(runs, tmp_path / name)
        (tmp_path / name / "trajectory.json").write_text(trajectory)
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw", lambda runs, directory, kind, trajectories: made.extend(trajectories) or [])
        report.main(report.parse_args([str(tmp_path), "--figures", str(tmp_path)]))
    assert [path.parent.name for path in made] == ["a"]


def test_part_of_the_data_and_unknown_sampling_are_told(runs):
    one, *_ = [run for run in report.find_runs([runs]) if run["method"] == "psgd"]
    rows, _ = report.rows([{**one, "window": None, "sampling_seconds": None}])
    assert rows[0]["epochs (+ sampling)"] == "2 (+ ?)"
    whole = report.setting({**one, "args": {**one["args"], "smalldatasets": 1.0}})
    assert whole == report.setting({**one, "args": {**one["args"], "smalldatasets": None}})
    others = [one, {**one, "sampling": {**one["sampling"], "optimizer": "adam"}}]
    assert [line.name for line in report.named(others)] == [
        "P-SGD, sampled with optimizer sgd", "P-SGD, sampled with optimizer adam"]


def test_the_largest_k_has_the_full_colour(runs):
    one, *_ = [run for run in report.find_runs([runs]) if run["method"] == "psgd"]
    few = {**one, "args": {**one["args"], "basis": "random"}, "n_components": 3}
    lines = [plots.Line("random", "P-SGD", [few]), plots.Line("pca", "P-SGD", [{**one, "n_components": 2},
                                                                               {**one, "n_components": 4}])]
    colours = {line.name: to_hex(style["color"]) for line, style in plots.styled(lines)}
    assert colours["pca"] == plots.COLOURS["P-SGD"].lower() != colours["random"]
