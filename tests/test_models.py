"""The CIFAR ResNets against the published parameter counts, the registry, and networks from a file."""
import importlib
from pathlib import Path

import pytest
import torch
import torchvision.models as tv_models
import torchvision.models._api as tv_api
from conftest import digits_args

import models
import train_pbfgs
import train_psgd
import train_sgd
from dldr.errors import UserError
from dldr.files import load_file

COUNTS = {  # parameters for 10 and for 100 classes
    "resnet8": (75_290, 81_140), "resnet20": (269_722, 275_572), "resnet32": (464_154, 470_004),
    "resnet44": (658_586, 664_436), "resnet56": (853_018, 858_868), "resnet110": (1_727_962, 1_733_812),
    "resnet1202": (19_421_274, 19_427_124),
}


@pytest.mark.parametrize("arch", COUNTS)
def test_parameter_counts(arch):
    for classes, count in zip((10, 100), COUNTS[arch], strict=True):
        with torch.device("meta"):
            assert sum(p.numel() for p in models.get_model(arch, classes).parameters()) == count


def test_shapes_strides_and_gradients():
    model = models.get_model("resnet20", 100)
    sizes = []
    for stage in (model.layer1, model.layer2, model.layer3):
        stage.register_forward_hook(lambda module, x, out: sizes.append(tuple(out.shape[1:])))
    out = model(torch.randn(2, 3, 32, 32))
    assert out.shape == (2, 100) and sizes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    out.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_shortcut_is_option_a():
    """With the block's own branch silenced the block is its shortcut: every second pixel, zeros in the new channels."""
    block = models.get_model("resnet8", 10).layer2[0]
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 16, 8, 8)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any() and not out[:, 24:].any()


def test_weights_are_kaiming_normal():
    torch.manual_seed(0)
    model = models.get_model("resnet56", 10)
    weight = model.layer3[4].conv2.weight
    assert abs(weight.std().item() / (2 / (64 * 9)) ** 0.5 - 1) < 0.02
    assert model.linear.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.1)


def test_unknown_names_list_close_ones():
    with pytest.raises(UserError, match="resnet20"):
        models.get_model("resnet21", 10)
    with pytest.raises(UserError, match="resnet18"):
        models.get_model("resnet_18", 10, "ImageNet")
    with pytest.raises(UserError, match="pretrained"):
        models.get_model("resnet20", 10, pretrained=True)


@pytest.mark.parametrize("arch", ["resnet18", "googlenet", "inception_v3"])
def test_imagenet_models_are_torchvisions_with_one_output(arch):
    model = models.get_model(arch, 7, "ImageNet")
    out = model.train()(torch.randn(2, 3, 299, 299) if arch == "inception_v3" else torch.randn(2, 3, 64, 64))
    assert isinstance(out, torch.Tensor) and out.shape == (2, 7)


def test_pretrained_needs_the_weights_own_classes():
    with pytest.raises(UserError, match="1000 classes"):
        models.get_model("resnet18", 10, "ImageNet", pretrained=True)


def test_pretrained_weights_are_loaded_without_unpickling(monkeypatch):
    wanted = models.get_model("squeezenet1_1", 1000, "ImageNet").state_dict()
    asked = {}
    monkeypatch.setattr(tv_api, "load_state_dict_from_url", lambda url, **options: asked.update(options) or wanted)
    model = models.get_model("squeezenet1_1", 1000, "ImageNet", pretrained=True)
    assert asked == {"weights_only": True, "check_hash": True}
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("arch, first", [
    ("resnet50", "IMAGENET1K_V1"),
    ("vit_h_14", "IMAGENET1K_SWAG_E2E_V1"),  # there is no IMAGENET1K_V1
])
def test_pretrained_takes_the_first_weights(arch, first, monkeypatch):
    """As the release; where the download fails, the error says of which weights."""
    asked = []

    def unreachable(url, **options):
        asked.append(url)
        raise OSError("no network")

    monkeypatch.setattr(tv_api, "load_state_dict_from_url", unreachable)
    with pytest.raises(UserError, match=f"--pretrained: the weights of {arch} could not be downloaded .no network"):
        models.get_model(arch, 1000, "ImageNet", pretrained=True)
    assert asked == [tv_models.get_model_weights(arch)[first].url]


def test_registry_lists_what_it_builds():
    files = {path.stem for path in Path(models.__path__[0]).glob("*.py") if "\nMODELS = " in path.read_text()}
    assert files == set(models.FAMILIES)
    for file, names in models.FAMILIES.items():
        assert list(importlib.import_module(f"models.{file}").MODELS) == names.split()
    assert len(models.list_models("CIFAR100")) == 52 and set(COUNTS) < set(models.list_models("CIFAR100"))
    assert {"resnet18", "vit_b_16"} < set(models.list_models("ImageNet"))


OWN = """
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Width:
    channels: int = 8


class Net(nn.Module):
    def __init__(self, columns):
        super().__init__()
        self.frozen = nn.Conv2d(3, 4, 3, stride=4).requires_grad_(False)
        self.conv, self.norm = nn.Conv2d(4, Width().channels, 3, bias=False), nn.BatchNorm2d(8)
        self.head, self.unused = nn.Linear(8, columns), nn.Linear(8, columns)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(self.frozen(x)))).mean((2, 3)))


def net(num_classes):
    return Net(num_classes)


def wide(num_classes):
    return Net(num_classes + 1)


def pair(num_classes):
    class Pair(Net):
        def forward(self, x):
            return super().forward(x), None
    return Pair(num_classes)


def none(num_classes):
    pass
"""
SCRIPTS = {"sgd": train_sgd, "psgd": train_psgd, "pbfgs": train_pbfgs}


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


def start(method, arch, directory, *more):
    window = [] if method == "sgd" else ["--params_end", "3", "--n_components", "2"]
    argv = digits_args(directory, "--arch", arch, "--smalldatasets", "0.1", "--epochs", "2", *window, *more)
    return SCRIPTS[method].main(SCRIPTS[method].parse_args(argv))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_frozen_and_unused_parameters_of_an_own_network_stay(own, tmp_path, optimizer):
    """--arch FILE.py:FUNCTION in all three scripts, bitwise: under weight decay, and P+-BFGS's residual step, too."""
    for method, *more in (("sgd", "--optimizer", optimizer, "--lr", "0.05", "--wd", "0.1"), ("psgd", "--lr", "0.1"),
                          ("pbfgs", "--alpha", "0.01")):
        summary = start(method, f"{own}:net", tmp_path, *more)
        assert summary["parameters"] == 8 * 4 * 9 + 2 * 8 + 2 * (8 * 10 + 10)  # without the frozen ones
        first, final = (load_file(tmp_path / name, "state dict") for name in ("0.pt", f"{method}_final.pt"))
        moved = {name for name in first if not torch.equal(first[name], final[name])}
        assert moved == {name for name in first if not name.startswith(("frozen", "unused"))}
    assert start("psgd", f"{own}:net", tmp_path, "--evaluate")["accuracy"] > 0


@pytest.mark.parametrize("method", SCRIPTS)
@pytest.mark.parametrize("function, message", [
    ("net", "there is no file"), ("nothing", "own.py has no function nothing"),
    ("none", "the function returned a NoneType, not a torch.nn.Module"),
    ("wide", r"for 2 samples and 10 classes the network returned \(2, 11\) logits"),
    ("pair", "for 2 samples and 10 classes the network returned a tuple"),
])
def test_own_networks_that_cannot_be_trained(own, sampled, tmp_path, method, function, message):
    file = own.with_name("missing.py") if "no file" in message else own
    output = [] if method == "sgd" else ["--output-dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match=rf"^--arch {file}:{function}: .*{message}"):
        start(method, f"{file}:{function}", tmp_path / "out" if method == "sgd" else sampled, *output)
    assert not (tmp_path / "out").exists()
