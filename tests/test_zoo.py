"""Every network for small images against the published facts: architectures.json lists, for 100 classes, the parameter
count, the parameter shapes and the layers with how often each occurs."""
import json
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import models
from subspace import ProjectedBFGS, ProjectedSGD, flat_parameters, frozen_statistics, pca_basis

FACTS = json.loads((Path(__file__).parent / "architectures.json").read_text())
# Their list of layers stops at the stem, the pooling and the classifier: the blocks were compiled.
STEM_ONLY = [name for name in FACTS if name.startswith("stochasticdepth")]
ACTIVATIONS = ("relu", "relu6", "sigmoid")
SLOW = 15_000_000  # parameters from which the passes on real tensors are left to the `slow` tests
BY_SIZE = [
    pytest.param(name, marks=pytest.mark.slow) if facts["parameters"] > SLOW else name for name, facts in FACTS.items()
]
SMALLEST = [  # of each family
    min(set(family.MODELS) & set(FACTS), key=lambda name: FACTS[name]["parameters"], default=None)
    for family in models.FAMILIES
]


@cache
def on_meta(name):
    with torch.device("meta"):
        return models.get_model(name, 100)


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
    assert len(FACTS) == 51 and set(FACTS) <= set(models.list_models("CIFAR100"))


@pytest.mark.parametrize("name", FACTS)
def test_parameters_and_shapes(name):
    shapes = Counter("x".join(map(str, p.shape)) for p in on_meta(name).parameters())
    assert shapes == Counter(FACTS[name]["shapes"])
    assert sum(p.numel() for p in on_meta(name).parameters()) == FACTS[name]["parameters"]
    assert shapes.total() == FACTS[name]["tensors"]


@pytest.mark.parametrize("name", FACTS)
def test_layers(name):
    layers = Counter(filter(None, map(describe, on_meta(name).modules())))
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


@pytest.mark.parametrize("name", BY_SIZE)
def test_passes(name):
    """A forward and backward pass in train mode with two images; evaluation depends on nothing random."""
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
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not silent
    with torch.inference_mode():
        first, second = model.eval()(images), model(images)
    assert torch.equal(first, second) and first.isfinite().all()
    assert models.get_model(name, 100).load_state_dict(model.state_dict(), strict=True)


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
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)

    def loss():
        return nn.functional.cross_entropy(model(images), labels)

    for method in (ProjectedSGD(w, P, lr=0.1), ProjectedBFGS(w, P)):
        w.copy_(start)
        w.grad.zero_()
        f = loss()
        f.backward()
        statistics = [b.clone() for b in model.buffers()]
        if isinstance(method, ProjectedSGD):
            method.step()
        else:
            with frozen_statistics(model), torch.no_grad():
                search = method.step(f.item(), loss)
            assert search.trials >= 1 and torch.isfinite(torch.tensor(search.loss))
        step = (w - start).double()
        assert step.norm() > 0
        outside = step - P.T.double() @ (P.double() @ step)
        assert outside.norm() <= 1e-3 * step.norm() + 1e-6 * start.norm()
        assert all(torch.equal(b, s) for b, s in zip(model.buffers(), statistics, strict=True))
