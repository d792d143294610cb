"""The benchmark runs and writes what it says; its times are nobody's assertion."""
import importlib.util
import json

from conftest import ROOT


def test_benchmark_runs_on_a_small_window(sampled, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("benchmark", ROOT / "benchmarks" / "run.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
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
