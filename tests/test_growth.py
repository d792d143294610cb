"""The growth benchmark measures, predicts and draws what it says; its times are nobody's assertion."""
import importlib
import json

import pytest
from conftest import ROOT

from utils import InputError

RESULTS = sorted((ROOT / "results").glob("cost-growth*/**/growth*.json"))


@pytest.fixture
def growth(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("growth")


def test_a_small_sweep_from_measurement_to_table_and_figure(growth, tmp_path, capsys):
    path, table, figure = (tmp_path / "new" / name for name in ("growth.json", "table.md", "figure.png"))
    growth.main(growth.parse_args([
        "--dims", "resnet8", "99999999999", "--snapshots", "121", "--components", "20", "--base-dim", "100000",
        "--device", "cpu", "--json", str(path), "--table", str(table), "--figure", str(figure)]))
    resnet8, large, both = json.loads(path.read_text())["points"]
    assert [(row["D"], row["n"], row["k"], row["sweeps"]) for row in (resnet8, large, both)] == [
        (75_290, 81, 40, ["D"]), (99_999_999_999, 81, 40, ["D"]), (100_000, 121, 20, ["n", "k"])]
    assert "over 60% of the" in large["skipped"] and "seconds" not in large
    for row in (resnet8, both):
        assert 1 <= len(row["seconds"]["basis"]) <= 5
        assert all(len(row["seconds"][method]) == 7 for method in ("psgd", "pbfgs"))
        assert row["search"] == {"trials_per_step": 1, "first_trial_accepted": 100, "failed_searches": 0,
                                 "skipped_updates": 0}
        memory = row["memory"]
        assert memory["basis"]["host"] > 0.9 * 4 * row["n"] * row["D"]  # the window, whatever else
        assert all(memory[method]["host"] > 0.9 * 4 * row["k"] * row["D"] for method in ("psgd", "pbfgs"))
        assert memory["basis"]["device"] == 0 and memory["basis"]["in_all"]["host"] > memory["basis"]["host"]
    text = table.read_text()
    assert text in capsys.readouterr().out and "| resnet8 | 75,290 | 81 | 40 |" in text
    assert "Skipped: D 99,999,999,999, n 81, k 40: needs" in text
    assert figure.read_bytes().startswith(b"\x89PNG")

    again, drawn = tmp_path / "again.md", tmp_path / "again.svg"
    growth.main(growth.parse_args(["--from", str(path), "--table", str(again), "--figure", str(drawn)]))
    assert again.read_text() == text
    assert "<svg" in drawn.read_text()

    result = json.loads(path.read_text())  # as if of a GPU: its memory in place of the host's, which moves aside
    result["hardware"] |= {"device": "cuda", "gpu": "some GPU"}
    for row in (result["points"][0], result["points"][2]):
        row["memory"] = {method: {"host": 5e6, "device": 7e9} for method in ("basis", "psgd", "pbfgs")}
    path.write_text(json.dumps(result))
    growth.main(growth.parse_args(["--from", str(path), "--table", str(again), "--figure", str(drawn)]))
    assert "some GPU, " in again.read_text() and "basis, device GB" in again.read_text()
    assert "| 7 / 0.0244 | 7 / 0.012 | 7 / 0.012 | 0.005 |" in again.read_text()


def test_predictions_by_hand(growth):
    row = {"D": 1000, "n": 21, "k": 10, "bytes_per_second": 1e9, "float64_per_second": 1e10, "cache_bytes": 40_001}
    expected = growth.predicted(row)
    assert expected["basis"] == {"seconds": pytest.approx((882_000 + 420_000) / 1e10), "bytes": 84_000}
    assert expected["psgd"] == expected["pbfgs"] == {"seconds": pytest.approx(8e-5), "bytes": 40_000}
    assert growth.in_cache(row) and not growth.in_cache({**row, "cache_bytes": None})


def test_bad_flags_and_files_are_one_line(growth, tmp_path, capsys):
    for argv in (["--snapshots", "20"], ["--components", "121"], ["--from", "x", "--json", "y"]):
        with pytest.raises(SystemExit) as stopped:
            growth.parse_args(argv)
        assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(InputError, match="--from"):
        growth.main(growth.parse_args(["--from", str(tmp_path / "none.json")]))
    with pytest.raises(InputError, match="differ in 5 directions"):  # what a point's own process says
        growth.main(growth.parse_args(["--dims", "5", "--snapshots", "--components", "--device", "cpu"]))


@pytest.mark.skipif(not RESULTS, reason="no results/cost-growth")
def test_the_tables_in_results_are_those_of_their_measurements(growth):
    for path in RESULTS:
        written = path.with_name(path.name.replace("growth", "table")).with_suffix(".md")
        assert growth.table(json.loads(path.read_text())) == written.read_text(), written
