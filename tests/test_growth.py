"""The growth benchmark measures and predicts what it says; its times are nobody's assertion."""
import functools
import importlib
import json

import pytest
from conftest import ROOT

RESULTS = ROOT / "results/cost-growth"


@pytest.fixture
def growth(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("growth")


def test_a_small_sweep_from_measurement_to_table(growth, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(growth, "rates", functools.cache(growth.rates))  # of this machine: once for all points
    path = tmp_path / "new" / "growth.json"
    growth.main(growth.parse_args(["--points", "resnet8,9,3", "300000,41,3", "300000,41,3,0.02", "--device", "cpu",
                                   "--json", str(path)]))
    assert path.exists() and not list(tmp_path.glob("growth*"))  # no snapshots are left
    rows = json.loads(path.read_text())["points"]
    assert [(row["D"], row["n"], row["k"], row["gib"]) for row in rows] == [
        (75_290, 9, 3, 0), (300_000, 41, 3, 0), (300_000, 41, 3, 0.02)]
    for row in rows:
        assert 1 <= len(row["seconds"]["basis"]) <= 5
        assert all(len(row["seconds"][method]) == 7 for method in ("psgd", "pbfgs"))
    memory, streamed = (row["memory"]["basis"]["host"] for row in rows[1:])
    assert memory > 0.9 * 4 * 41 * 300_000 > streamed > 0  # the window, and a part of it
    text = capsys.readouterr().out
    assert "| resnet8 | 75,290 | 9 | 3 |" in text and "| 300000, streamed under 0.02 GiB | 300,000 | 41 | 3 |" in text
    growth.main(growth.parse_args(["--from", str(path)]))
    assert capsys.readouterr().out == text


def test_predictions_by_hand(growth):
    row = {"D": 1000, "n": 21, "k": 10, "bytes_per_second": 1e9, "float64_per_second": 1e10}
    expected = growth.predicted(row)
    assert expected["basis"] == {"seconds": pytest.approx((882_000 + 420_000) / 1e10), "bytes": 84_000}
    assert expected["psgd"] == expected["pbfgs"] == {"seconds": pytest.approx(8e-5), "bytes": 40_000}
    assert growth.predicted(row | {"gib": 0.5}, 4)["basis"]["bytes"] == 2**27
    assert growth.predicted(row, 4)["psgd"]["bytes"] == 10_000


def test_the_recorded_table_is_that_of_its_measurements(growth):
    assert growth.table(json.loads((RESULTS / "growth.json").read_text())) == (RESULTS / "table.md").read_text()
