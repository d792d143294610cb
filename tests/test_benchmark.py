"""The benchmarks run, compare equal work and write what they say; their times are nobody's assertion."""
import copy
import json
from functools import cache, partial

from packages import release

import numpy as np
import processes
import pytest
import sklearn
import torch
import torch.nn.functional as F
from runs import ROOT

import datasets
import models
from dldr import engine
from dldr.subspace import ProjectedBFGS, ProjectedSGD, pca_basis

NEW_SOLVER = pytest.mark.skipif(release(sklearn.__version__) < (1, 5), reason="covariance_eigh: scikit-learn 1.5 on")
CPU, GPU = torch.device("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)


@NEW_SOLVER
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_benchmark_runs_at_a_small_size(tmp_path, capsys, script, device, monkeypatch):
    processes.serve()
    monkeypatch.setattr("multiprocessing.get_context", lambda method: processes.context)  # not to import all again
    run, path = script("run"), tmp_path / "new" / "benchmark.json"
    run.main(run.parse_args([
        "--arch", "resnet8", "--samples", "48", "--test-samples", "20", "--batch-size", "16", "--snapshots", "5",
        "--pbfgs-batch-size", "32", "--n_components", "3", "--save-arch", "squeezenet1_1", "--runs", "1", "--half",
        "--device", device, "--data", str(tmp_path), "--json", str(path)]))
    printed, result = capsys.readouterr().out, json.loads(path.read_text())
    assert {"command", "versions", "hardware", "git_revision"} < result.keys() and "48 images of digits" in printed
    assert list(result["stages"]) == list(run.STAGES)
    for stage, sides in result["stages"].items():
        assert list(sides) == run.STAGES[stage][1].split()
        for (repetition,) in sides.values():
            assert repetition["seconds"] > 0 and repetition["peak"]["host"] > 0
    assert printed.count("baseline / ours") == printed.count("ours / with --half") == 4
    ours, baseline = (result["stages"]["evaluation"][side][0]["loss"] for side in ("product", "baseline"))
    assert ours == pytest.approx(baseline, rel=1e-4 if device == "cpu" else 1e-2)
    assert len(result["angles"]) == 6
    for name, angle in result["angles"].items():
        assert angle < (1e-5 if "product" in name else 1e-2), name


@pytest.mark.parametrize("method", ["sgd", "psgd", "pbfgs"])
def test_baseline_takes_the_same_steps(method, script, tmp_path):
    """Four iterations on the same batches: the same parameters, batch-norm statistics, losses and trials."""
    baseline = script("baseline")
    torch.manual_seed(1)
    model = models.get_model("resnet8", 10)
    other, twin = copy.deepcopy(model), copy.deepcopy(model)
    start = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    batches = [(torch.randn(16, 3, 32, 32), torch.randint(10, (16,))) for _ in range(2)]
    gradients = [torch.autograd.grad(F.cross_entropy(twin(x), y), list(twin.parameters())) for x, y in batches]
    rows = [torch.cat([g.reshape(-1) for g in gradient]) for gradient in gradients]  # directions that matter
    P = torch.linalg.qr(torch.stack([*rows, torch.randn_like(start)]).T)[0].T.contiguous()

    options = {"sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}, "psgd": {"lr": 1, "momentum": 0.9},
               "pbfgs": {"lr": 1}}[method]
    optimizer, memory = torch.optim.SGD(other.parameters(), **options), {}
    step = {"sgd": lambda *_: optimizer.step(), "psgd": lambda *_: baseline.psgd_step(other, optimizer, P),
            "pbfgs": partial(baseline.pbfgs_step, other, optimizer, P, memory, tmp_path / "trial.pt")}[method]
    ours = {"sgd": lambda: torch.optim.SGD(model.parameters(), **options), "psgd": lambda: ProjectedSGD(model, P),
            "pbfgs": lambda: ProjectedBFGS(model, P)}[method]()
    loop = engine.Loop(model, ours)
    for _ in range(2):
        expected, facts = loop.train_epoch(batches), baseline.epoch(other, batches, CPU, step)
        assert facts == pytest.approx({name: expected[name] for name in facts}, rel=1e-5)
        if method == "pbfgs":
            assert memory.pop("trials") == 2 * ours.statistics()["trials_per_step"]
        for name, value in model.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-5, atol=1e-5, msg=name)
    assert (torch.cat([p.detach().reshape(-1) for p in model.parameters()]) - start).norm() > 0.1


@pytest.mark.parametrize("solver, atol", [("full", 1e-5), ("gram", 1e-4),
                                          pytest.param("covariance_eigh", 1e-2, marks=NEW_SOLVER)])
def test_baseline_has_the_same_basis(solver, atol, script):
    window = torch.randn(6, 5000, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 7)[:, None] ** 2
    P, _ = pca_basis(window, 3)
    other = script("baseline").basis(window, 3, solver)
    torch.testing.assert_close((P @ other.T).abs(), torch.eye(3), rtol=0, atol=atol)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")
def test_baseline_sees_the_same_images(script):
    """Its test images are ours; a training image is one of the 2 x 9 x 9 that ours can become."""
    baseline, source = script("baseline"), datasets.SOURCES["CIFAR10"]
    images, labels = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), np.uint8), np.arange(3)
    (x, y), = datasets.ArrayBatches(images, labels, source, 3, CPU).epoch(0)
    (x_plain, y_plain), = baseline.loader(images, labels, 3, CPU, augment=False)
    torch.testing.assert_close(x_plain, x, rtol=0, atol=1e-6)
    assert torch.equal(y_plain, y)

    flip, top, left = torch.cartesian_prod(torch.arange(2), torch.arange(9), torch.arange(9)).T
    batches = datasets.ArrayBatches(images, labels, source, 3, CPU, augment=True)
    possible = batches.pixels(torch.zeros_like(flip), flip, top, left).flatten(1)  # (162, 3 * 32 * 32)
    torch.manual_seed(1)
    drawn = torch.stack([baseline.loader(images, labels, 3, CPU, augment=True).dataset[0][0] for _ in range(40)])
    distance, which = torch.cdist(drawn.flatten(1), possible).min(1)
    assert distance.max() < 0.1 and len(which.unique()) > 20


def test_a_sweep_of_growth_from_measurement_to_table(script, tmp_path, capsys, monkeypatch):
    growth = script("growth")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(growth, "rates", cache(growth.rates))  # of this machine: once for all points
    path = tmp_path / "new" / "growth.json"
    growth.main(growth.parse_args(["--device", "cpu", "--json", str(path),
                                   "--points", "resnet8,9,3", "1000000,41,3", "1000000,41,3,0.02"]))
    assert path.exists() and not list(tmp_path.glob("growth*"))  # no snapshots are left
    rows = json.loads(path.read_text())["points"]
    assert [(row["D"], row["n"], row["k"], row["gib"]) for row in rows] == [
        (75_290, 9, 3, 0), (1_000_000, 41, 3, 0), (1_000_000, 41, 3, 0.02)]
    for row in rows:
        assert 1 <= len(row["seconds"]["basis"]) <= 5
        assert all(len(row["seconds"][method]) == 7 for method in ("psgd", "pbfgs"))
    memory, streamed = (row["memory"]["basis"]["host"] for row in rows[1:])
    assert memory > 0.9 * 4 * 41 * 1_000_000 > streamed > 0  # the window, far above the overhead, and a part
    text = capsys.readouterr().out
    assert "| resnet8 | 75,290 | 9 | 3 |" in text
    assert "| 1000000, streamed under 0.02 GiB | 1,000,000 | 41 | 3 |" in text
    growth.main(growth.parse_args(["--from", str(path)]))
    assert capsys.readouterr().out == text


def test_predictions_of_growth_by_hand(script):
    growth, row = script("growth"), {"D": 1000, "n": 21, "k": 10, "bytes_per_second": 1e9, "float64_per_second": 1e10}
    expected = growth.predicted(row)
    assert expected["basis"] == {"seconds": pytest.approx((882_000 + 420_000) / 1e10), "bytes": 84_000}
    assert expected["psgd"] == expected["pbfgs"] == {"seconds": pytest.approx(8e-5), "bytes": 40_000}
    assert growth.predicted(row | {"gib": 0.5}, 4)["basis"]["bytes"] == 2**27
    assert growth.predicted(row, 4)["psgd"]["bytes"] == 10_000


@pytest.mark.parametrize(("name", "directory"), [("growth", "cost-growth"), ("scale", "scale")])
def test_recorded_tables_are_those_of_their_measurements(script, name, directory):
    results = ROOT / "results" / directory
    text = script(name).table(json.loads((results / f"{name}.json").read_text()))
    assert text == (results / "table.md").read_text()
    page = (ROOT / "docs" / "scale.md").read_text()
    assert name == "growth" or all(part.strip() in page for part in text.split("\n\n")
                                   if "float32" in part or "largest" in part)
