"""The registry, torchvision's networks and weights, and networks from a file."""
import importlib
from pathlib import Path

import pytest
import torch
import torchvision.models as tv_models
import torchvision.models._api as tv_api
from runs import SCRIPTS, digits_run, state

import models
from dldr.errors import UserError


@pytest.mark.parametrize(("arguments", "message"), [
    (("resnet21", 10), "resnet20"), (("resnet_18", 10, "ImageNet"), "resnet18"),
    (("resnet20", 10, "CIFAR10", True), "--pretrained: there are no weights for resnet20 on CIFAR10"),
    (("resnet18", 10, "ImageNet", True), "torchvision's weights have 1000 classes, --data has 10"),
])
def test_networks_that_there_are_not(arguments, message):
    with pytest.raises(UserError, match=message):
        models.get_model(*arguments)


@pytest.mark.parametrize("arch", ["resnet18", "googlenet", "inception_v3"])
def test_imagenet_models_are_torchvisions_with_one_output(arch):
    model = models.get_model(arch, 7, "ImageNet")
    out = model.train()(torch.randn(2, 3, 299, 299) if arch == "inception_v3" else torch.randn(2, 3, 64, 64))
    assert isinstance(out, torch.Tensor) and out.shape == (2, 7)


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


def other(classes):
    pass
"""


def start(method, arch, directory, *more, output=None):
    return digits_run(method, directory, "--arch", arch, "--smalldatasets", 0.1, "--epochs", 5, *more, output=output)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_frozen_and_unused_parameters_of_an_own_network_stay(own, tmp_path, optimizer):
    """--arch FILE.py:FUNCTION in all three scripts, bitwise: under weight decay, and P+-BFGS's residual step, too."""
    arch = f"{own(OWN)}:net"
    for method, *more in (("sgd", "--optimizer", optimizer, "--lr", "0.05", "--wd", "0.1"), ("psgd", "--lr", "0.1"),
                          ("pbfgs", "--alpha", "0.01")):
        summary = start(method, arch, tmp_path, *more)
        assert summary["parameters"] == 8 * 4 * 9 + 2 * 8 + 2 * (8 * 10 + 10)  # without the frozen ones
        first, final = (state(tmp_path / name) for name in ("0.pt", f"{method}_final.pt"))
        moved = {name for name in first if not torch.equal(first[name], final[name])}
        assert moved == {name for name in first if not name.startswith(("frozen", "unused"))}
    assert start("psgd", arch, tmp_path, "--evaluate")["accuracy"] > 0


@pytest.mark.parametrize("method", SCRIPTS)
@pytest.mark.parametrize("function, message", [
    ("net", "there is no file"), ("nothing", "own.py has no function nothing"),
    ("other", "other is called with num_classes: missing a required"),
    ("none", "the function returned a NoneType, not a torch.nn.Module"),
    ("wide", r"for 2 samples and 10 classes the network returned \(2, 11\) logits"),
    ("pair", "for 2 samples and 10 classes the network returned a tuple"),
])
def test_own_networks_that_cannot_be_trained(own, sampled, tmp_path, method, function, message):
    file, out = own(OWN), tmp_path / "out"
    if "no file" in message:
        file.unlink()
    with pytest.raises(UserError, match=rf"^--arch {file}:{function}: .*{message}"):
        start(method, f"{file}:{function}", out if method == "sgd" else sampled, output=out)
    assert not (tmp_path / "out").exists()
