"""Every network for small images against the published facts and the official release.

architectures.json lists, for 100 classes, the parameter count, the parameter shapes and the layers with how often each
occurs. zoo/ describes 47 networks of the release (nblt/DLDR, 4f1284e): zoo_reference.json.gz has the entries of each
state dict in order, as [key, shape, kind] ("norm" stands for the five of a batch norm), and the scale of the weights
that `fill` gives them; zoo_reference.npz the logits that follow; zoo_init.json.gz mean and standard deviation of each
parameter as drawn with seed 1.
"""
import gzip
import json
import math
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import step
from torch import nn

import models
from dldr.errors import UserError
from dldr.snapshots import read_snapshot
from dldr.subspace import ProjectedBFGS, ProjectedSGD, flat_parameters, pca_basis

HERE = Path(__file__).parent
FACTS = json.loads((HERE / "architectures.json").read_text())
REFERENCE, INITIAL = (json.loads(gzip.open(HERE / f"zoo/zoo_{n}.json.gz").read()) for n in ("reference", "init"))
NORM = {"weight": "norm_weight", "bias": "bias", "running_mean": "running_mean", "running_var": "running_var"}
# Their list of layers stops at the stem, the pooling and the classifier: the blocks were compiled.
STEM_ONLY = [name for name in FACTS if name.startswith("stochasticdepth")]
ACTIVATIONS = ("relu", "relu6", "sigmoid")
SLOW = 15_000_000  # parameters from which the passes on real tensors are left to the `slow` tests


def by_size(names):
    slow = pytest.mark.slow
    return [pytest.param(name, marks=slow) if FACTS[name]["parameters"] > SLOW else name for name in names]


BY_SIZE = by_size(FACTS)
SMALLEST = [min(set(names.split()) & set(FACTS), key=lambda name: FACTS[name]["parameters"])  # of each family
            for names in models.FAMILIES.values()]


def entries(name):
    """[(key, shape, kind), ...] of the release's state dict, in order."""
    for key, shape, kind in REFERENCE[name]["entries"]:
        if kind == "norm":
            yield from ((f"{key}.{leaf}", shape, kind) for leaf, kind in NORM.items())
            yield f"{key}.num_batches_tracked", [], "counter"
        else:
            yield key, shape, kind


def fill(model, name):
    """Set the state dict to the values that the reference logits were computed with, a function of the position."""
    for i, (tensor, (_, shape, kind)) in enumerate(zip(model.state_dict().values(), entries(name), strict=True)):
        random = np.random.RandomState(1000 + i)
        match kind:
            case "weight":
                scale = REFERENCE[name]["scale"] * math.sqrt(2 / math.prod(shape[1:]))
                value = scale * random.standard_normal(shape)
            case "norm_weight" | "running_var":
                value = random.uniform(0.5, 1.5, shape)
            case "bias" | "running_mean":
                value = 0.1 * random.standard_normal(shape)
            case "counter":
                value = np.zeros(())
        tensor.copy_(torch.from_numpy(np.asarray(value)))


def unused(name):
    """The release's keys of the modules that its forward pass leaves out."""
    _, _, keys = REFERENCE.get(name, {"notes": ""})["notes"].partition("never used in the forward pass: ")
    return tuple(f"{key}." for key in keys.split(", ") if key)


@cache
def on_meta(name, classes):
    with torch.device("meta"):
        return models.get_model(name, classes)


def describe(module):
    """One of our layers in the words of architectures.json, or None for a container."""
    def numbers(x):
        return x if isinstance(x, int) else x[0]

    match module:
        case nn.Conv2d():
            bias = " bias" if module.bias is not None else ""
            (kh, kw), (ph, pw) = module.kernel_size, module.padding
            return (f"conv {module.in_channels}->{module.out_channels} k{kh}x{kw} s{module.stride[0]} p{ph}x{pw} "
                    f"g{module.groups}{bias}")
        case nn.BatchNorm2d():
            usual = (module.eps, module.momentum) == (1e-5, 0.1)
            odd = "" if usual else f" eps={module.eps} momentum={module.momentum}"
            return f"batchnorm {module.num_features}{odd}"
        case nn.Linear():
            bias = " bias" if module.bias is not None else ""
            return f"linear {module.in_features}->{module.out_features}{bias}"
        case nn.ReLU6() | nn.ReLU() | nn.Sigmoid():
            return type(module).__name__.lower()
        case nn.Dropout() | nn.Dropout2d():
            return f"{type(module).__name__.lower()} {module.p}"
        case nn.AdaptiveAvgPool2d():
            return f"AdaptiveAvgPool2d {numbers(module.output_size)}"
        case nn.MaxPool2d() | nn.AvgPool2d():
            sizes = [numbers(x) for x in (module.kernel_size, module.stride, module.padding)]
            return "{} {} s{} p{}".format(type(module).__name__, *sizes)
    return None


def test_every_published_name_is_here():
    assert len(FACTS) == 51 and set(models.list_models("CIFAR100")) == {*FACTS, "resnet1202"}
    assert sum(p.numel() for p in on_meta("resnet1202", 10).parameters()) == 19_421_274


@pytest.mark.parametrize("name", FACTS)
def test_parameters_shapes_and_layers(name):
    shapes = Counter("x".join(map(str, p.shape)) for p in on_meta(name, 100).parameters())
    assert shapes == Counter(FACTS[name]["shapes"]) and shapes.total() == FACTS[name]["tensors"]
    assert sum(p.numel() for p in on_meta(name, 100).parameters()) == FACTS[name]["parameters"]
    layers = Counter(filter(None, map(describe, on_meta(name, 100).modules())))
    facts = Counter(FACTS[name]["layers"])
    if not any(activation in facts for activation in ACTIVATIONS):  # they were functions there
        layers = Counter({layer: count for layer, count in layers.items() if layer not in ACTIVATIONS})
    assert facts <= layers if name in STEM_ONLY else facts == layers


@pytest.mark.parametrize("name", FACTS)
def test_logits_have_one_row_per_image(name):
    """On shapes alone, for 10 classes and any batch size."""
    with torch.device("meta"):
        model = models.get_model(name, 10)
        assert model.eval()(torch.randn(3, 3, 32, 32)).shape == (3, 10)


@pytest.mark.parametrize("name", REFERENCE)
def test_snapshots_of_the_release_load_by_position(name, tmp_path):
    """Entries come in the release's order; entry i is filled with i, so that a swap of two would be seen."""
    model, path = on_meta(name, REFERENCE[name]["classes"]), tmp_path / "0.pt"
    ours = [(key.rpartition(".")[2], list(value.shape)) for key, value in model.state_dict().items()]
    assert ours == [(key.rpartition(".")[2], shape) for key, shape, _ in entries(name)]
    state = {key: torch.tensor(float(i)).expand(shape) for i, (key, shape, _) in enumerate(entries(name))}
    torch.save(state, path)
    read, by_position = read_snapshot(path, model)
    assert by_position == (name not in ("resnet20", "resnet32"))  # whose names are ours
    assert list(read) == list(model.state_dict())
    assert [value.flatten()[0].item() for value in read.values()] == list(range(len(state)))
    key, value = next(reversed(state.items()))
    torch.save({**state, key: value.new_zeros(len(value) + 1)}, path)
    with pytest.raises(UserError, match="0.pt is of another network"):
        read_snapshot(path, model)


@pytest.fixture(scope="module", params=by_size(REFERENCE))
def network(request):
    """(name, network with seed 1), built once for the two tests below, in their order."""
    torch.manual_seed(1)
    return request.param, models.get_model(request.param, REFERENCE[request.param]["classes"])


def test_initial_values_are_the_releases(network):
    """With the same seed the same values: mean and standard deviation agree to the six digits that the file has."""
    name, model = network
    for (key, p), official in zip(model.named_parameters(), INITIAL[name]["mean_std"], strict=True):
        std, mean = torch.std_mean(p.detach().double(), correction=0)
        assert (mean.item(), std.item()) == pytest.approx(official, rel=1e-5, abs=1e-5 * official[1]), key


def test_logits_are_the_releases(network):
    name, model = network
    fill(model.double().eval(), name)
    images = torch.from_numpy(np.random.RandomState(7).standard_normal((4, 3, 32, 32)))
    with torch.inference_mode():
        logits = model(images).numpy()
    expected = np.load(HERE / "zoo/zoo_reference.npz")[f"{name}/logits"]
    assert logits.shape == expected.shape and np.abs(logits - expected).max() < 1e-9 * np.abs(expected).max()


def test_networks_with_unused_parameters_say_so():
    """As DDP must know them; those of stochastic depth, unused at random, have `draws_on_host`."""
    says = {n for n in REFERENCE if any(getattr(m, "unused_parameters", False) for m in on_meta(n, 100).modules())}
    assert says == {name for name in REFERENCE if unused(name)} == {"nasnet", "attention56", "attention92"}


@pytest.mark.parametrize("name", [name for name in REFERENCE if name.startswith("stochasticdepth")])
def test_survival_is_the_releases(name):
    survival = [f"{block.survival:.4f}" for block in on_meta(name, 100).blocks]
    assert survival == REFERENCE[name]["notes"].partition(": ")[2].split()


def test_stochastic_depth_draws_as_the_release():
    """Each block draws from torch's global generator, the first one too; a dropped block runs its shortcut only."""
    torch.manual_seed(0)
    model, images = models.get_model("stochasticdepth18", 100).train(), torch.randn(2, 3, 32, 32)
    torch.manual_seed(5)
    survive = [bool(torch.bernoulli(torch.tensor(1 - 0.5 * i / 7))) for i in range(8)]
    torch.manual_seed(5)
    logits = model(images)
    logits.square().sum().backward()
    x = model.stem(images)
    assert survive[0] and 3 < sum(survive) < 7
    for block, survives in zip(model.blocks, survive, strict=True):
        assert all((p.grad is not None) == survives for p in block.branch.parameters())
        assert all(p.grad is not None for p in block.shortcut.parameters())
        assert all(b.item() == survives for n, b in block.branch.named_buffers() if n.endswith("tracked"))
        assert all(b.item() == 1 for n, b in block.shortcut.named_buffers() if n.endswith("tracked"))
        x = block.shortcut(x) + (block.branch(x) if survives else 0)
    torch.testing.assert_close(logits, model.classifier(model.pool(x).flatten(1)))


def test_efficientnet_draws_for_its_dropout_only():
    model = models.get_model("efficientnet", 100).train()
    next(m for m in model.modules() if isinstance(m, nn.Dropout)).eval()
    state = torch.get_rng_state()
    model(torch.zeros(2, 3, 32, 32))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", BY_SIZE)
def test_passes(name):
    """A forward and backward pass in train mode with two images leaves no gradient and no statistics just where the
    release leaves none; evaluation depends on nothing random."""
    torch.manual_seed(0)
    model = models.get_model(name, 100)
    if name.startswith("stochasticdepth"):  # a dropped block rightly gets no gradient
        for block in model.modules():
            if hasattr(block, "survival"):
                block.survival = 1.0
    images = torch.randn(2, 3, 32, 32)
    logits = model.train()(images)
    assert logits.shape == (2, 100) and logits.isfinite().all()
    logits.square().sum().backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None}
    passes = {n: b.item() for n, b in model.named_buffers() if n.endswith("num_batches_tracked")}
    assert all(p.grad.isfinite().all() for n, p in model.named_parameters() if n not in silent)
    if name in REFERENCE:
        official = dict(zip(model.state_dict(), (key for key, *_ in entries(name)), strict=True))
        assert silent == {n for n, _ in model.named_parameters() if official[n].startswith(unused(name))}
        for n, count in passes.items():
            twice = official[n].startswith("stage1.") and ".soft_resdown3." in official[n]
            assert count == (0 if official[n].startswith(unused(name)) else 2 if twice else 1), n
    else:
        assert not silent and set(passes.values()) == {1}
    with torch.inference_mode():
        first, second = model.eval()(images), model(images)
    assert torch.equal(first, second) and first.isfinite().all()
    assert model.load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize("name", [p for p in BY_SIZE if (p if isinstance(p, str) else p.values[0]) in SMALLEST])
def test_a_step_in_a_subspace(name):
    """P-SGD and P-BFGS in the one direction between two snapshots, whatever is random in the forward pass: batch norm's
    statistics end as the one forward pass left them, and the step stays in the subspace."""
    torch.manual_seed(0)
    model = models.get_model(name, 10).train()
    w = flat_parameters(model)
    start = w.clone()
    window = torch.stack([start, start + 1e-3 * torch.randn_like(start)])
    P, _ = pca_basis(window, 1)
    batch, buffers = (torch.randn(4, 3, 32, 32), torch.arange(4)), []
    model.register_forward_hook(lambda *_: buffers.append([b.clone() for b in model.buffers()]))
    for method in (ProjectedSGD, ProjectedBFGS):
        w.copy_(start)
        buffers.clear()
        step(method(model, P, lr=0.1), model, *batch)
        assert (len(buffers) > 1) == (method is ProjectedBFGS)
        move = (w - start).double()
        assert move.norm() > 0
        outside = move - P.T.double() @ (P.double() @ move)
        assert outside.norm() <= 1e-3 * move.norm() + 1e-6 * start.norm()
        assert all(torch.equal(b, s) for b, s in zip(model.buffers(), buffers[0], strict=True))
