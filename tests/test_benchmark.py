"""The benchmark runs, compares equal work and writes what it says; its times are nobody's assertion."""
import copy
import importlib
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import datasets
import models
import utils
from subspace import ProjectedBFGS, ProjectedSGD, flat_parameters, frozen_statistics

GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture
def script(monkeypatch):
    """A script of benchmarks/ by name, as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_benchmark_runs_at_a_small_size(tmp_path, capsys, script, device):
    benchmark = script("run")
    path = tmp_path / "new" / "benchmark.json"
    benchmark.main(benchmark.parse_args([
        "--arch", "resnet8", "--samples", "48", "--test-samples", "20", "--batch-size", "16", "--snapshots", "5",
        "--pbfgs-batch-size", "32", "--n_components", "3", "--save-arch", "squeezenet1_1", "--runs", "1", "--half",
        "--device", device, "--data", str(tmp_path), "--json", str(path)]))
    printed = capsys.readouterr().out
    result = json.loads(path.read_text())
    assert "48 random images" in printed and result["settings"]["images"] == "random"
    assert [path.name for path in path.parent.iterdir()] == ["benchmark.json"]  # no temporary files are left
    stages = result["stages"]
    assert list(stages) == list(benchmark.STAGES)
    for stage, sides in stages.items():
        assert set(sides) == set(benchmark.STAGES[stage][1].split())
        for repetitions in sides.values():
            assert len(repetitions) == 1 and all(facts["seconds"] > 0 for facts in repetitions)
    for line in result["table"]:
        assert line["what"] in printed
        assert ("ratio" in line) == (" / " in line["what"])
    assert stages["save"]["product"][0]["megabytes"] > 9
    assert stages["pbfgs"]["baseline"][0]["trials_per_step"] >= 1
    ours, baseline = (stages["evaluation"][side][0]["loss"] for side in ("product", "baseline"))
    assert ours == pytest.approx(baseline, rel=1e-4 if device == "cpu" else 1e-2)
    assert result["basis"]["angle_to_float64_svd"] < 1e-5


def ours(method, model, P, batches):
    """Two epochs over `batches` with the parts of train_<method>.py: what train_epoch returns of each, and trials."""
    w = flat_parameters(model)
    algorithm = {"sgd": lambda: torch.optim.SGD([w], 0.1, 0.9, weight_decay=1e-4), "psgd": lambda: ProjectedSGD(w, P),
                 "pbfgs": lambda: ProjectedBFGS(w, P)}[method]()

    def search(loss, x, y):
        with frozen_statistics(model), torch.no_grad():
            algorithm.step(loss, lambda: F.cross_entropy(model(x), y))

    for _ in range(2):
        facts = utils.train_epoch(model, w, batches, utils.training_passes(model),
                                  search if method == "pbfgs" else lambda *_: algorithm.step())
        yield {**facts, **(algorithm.statistics() if method == "pbfgs" else {})}


@pytest.mark.parametrize("method", ["sgd", "psgd", "pbfgs"])
def test_baseline_takes_the_same_steps(method, script, tmp_path):
    """Four iterations on the same batches: the same parameters, batch-norm statistics, losses and trials."""
    baseline = script("baseline")
    torch.manual_seed(1)
    model, other = (models.get_model("resnet8", 10) for _ in range(2))
    other.load_state_dict(model.state_dict())
    start = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    batches = [(torch.randn(16, 3, 32, 32), torch.randint(10, (16,))) for _ in range(2)]
    twin = copy.deepcopy(model)
    gradients = [torch.autograd.grad(F.cross_entropy(twin(x), y), list(twin.parameters())) for x, y in batches]
    rows = [torch.cat([g.reshape(-1) for g in gradient]) for gradient in gradients]  # directions that matter
    P = torch.linalg.qr(torch.stack([*rows, torch.randn_like(start)]).T)[0].T.contiguous()

    lr, momentum, decay = {"sgd": (0.1, 0.9, 1e-4), "psgd": (1, 0.9, 0), "pbfgs": (1, 0, 0)}[method]
    optimizer = torch.optim.SGD(other.parameters(), lr, momentum, weight_decay=decay)
    more = {"sgd": (), "psgd": (P,), "pbfgs": (P, {}, tmp_path / "temporary.pt")}[method]
    for expected in ours(method, model, P, batches):
        facts = getattr(baseline, f"{method}_epoch")(other, batches, torch.device("cpu"), optimizer, *more)
        assert facts == pytest.approx({name: expected[name] for name in facts}, rel=1e-5)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-5, atol=1e-5, msg=name)
    assert (torch.cat([p.detach().reshape(-1) for p in model.parameters()]) - start).norm() > 0.1


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")
def test_baseline_sees_the_same_images(script):
    """Its test images are ours; a training image is one of the 2 x 9 x 9 that ours can become."""
    baseline, source, cpu = script("baseline"), datasets.SOURCES["CIFAR10"], torch.device("cpu")
    images, labels = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), np.uint8), np.arange(3)
    (x, y), = datasets.ImageBatches(images, labels, source, 3, cpu).epoch(0)
    (x_plain, y_plain), = baseline.loader(images, labels, 3, cpu, augment=False)
    torch.testing.assert_close(x_plain, x, rtol=0, atol=1e-6)
    assert torch.equal(y_plain, y)

    flip, top, left = torch.cartesian_prod(torch.arange(2), torch.arange(9), torch.arange(9)).T
    batches = datasets.ImageBatches(images, labels, source, 3, cpu, augment=True)
    possible = batches.pixels(torch.zeros_like(flip), flip, top, left).flatten(1)  # (162, 3 * 32 * 32)
    torch.manual_seed(1)
    drawn = torch.stack([baseline.loader(images, labels, 3, cpu, augment=True).dataset[0][0] for _ in range(40)])
    distance, which = torch.cdist(drawn.flatten(1), possible).min(1)
    assert distance.max() < 0.1 and len(which.unique()) > 20


def test_every_network_can_be_timed(tmp_path, script):
    path, zoo = tmp_path / "passes.json", script("zoo")
    zoo.main(zoo.parse_args(["--models", "resnet8", "stochasticdepth18", "--batch-size", "2", "--device", "cpu",
                             "--json", str(path)]))
    networks = json.loads(path.read_text())["networks"]
    assert list(networks) == ["resnet8", "stochasticdepth18"]
    assert all(row["finite"] and row["seconds"] > 0 for row in networks.values())
