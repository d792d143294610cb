"""The benchmark runs and writes what it says; its times are nobody's assertion."""
import importlib
import json

import pytest
from conftest import ROOT


@pytest.fixture
def script(monkeypatch):
    """A script of benchmarks/ by name, as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def test_benchmark_runs_on_a_small_window(sampled, tmp_path, capsys, script):
    benchmark = script("run")
    path = tmp_path / "new" / "benchmark.json"
    benchmark.main(benchmark.parse_args([
        "--save-dir", str(sampled), "--arch", "resnet8", "--params_end", "6", "--n_components", "3",
        "--batch-size", "16", "--runs", "2", "--save-arch", "squeezenet1_1", "--device", "cpu", "--json", str(path)]))
    assert "P-BFGS iteration, resnet8, batch 16" in capsys.readouterr().out
    result = json.loads(path.read_text())
    assert result["basis"]["window"] == [6, 75_290] and len(result["basis"]["seconds"]) == 2
    assert result["save"]["megabytes"] > 9 and len(result["save"]["seconds"]) == 2
    assert sorted(path.name for path in sampled.glob(".*.pt")) == []
    assert result["basis"]["angle_to_float64_svd"] < 1e-5 and len(result["pbfgs"]["ratios"]) == 2


def test_every_network_can_be_timed(tmp_path, script):
    path, zoo = tmp_path / "passes.json", script("zoo")
    zoo.main(zoo.parse_args(["--models", "resnet8", "stochasticdepth18", "--batch-size", "2", "--device", "cpu",
                             "--json", str(path)]))
    networks = json.loads(path.read_text())["networks"]
    assert list(networks) == ["resnet8", "stochasticdepth18"]
    assert all(row["finite"] and row["seconds"] > 0 for row in networks.values())
