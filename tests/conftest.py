"""Shared fixtures: a short real sampling run, and where real CIFAR-10 lies."""
import importlib
import os
import sys
from pathlib import Path

import pytest
import torch
from runs import ROOT, digits_args, digits_run, network  # noqa: F401 - two for tests

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for --deterministic; torch looks once per process


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # --device auto stops where there is a GPU that torch cannot use
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def isolated(monkeypatch):
    """Runs record their command line, and pytest's own does not belong in it; --deterministic ends with the test."""
    monkeypatch.setattr(sys, "argv", ["test"])
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def sampled(tmp_path_factory):
    """A directory with snapshots 0.pt ... 5.pt of a real SGD run. Read only: write to another --output-dir."""
    directory = tmp_path_factory.mktemp("sampled")
    digits_run("sgd", directory, "--epochs", "5", "--lr", "0.05")
    return directory


@pytest.fixture(scope="session")
def real_cifar10():
    """The directory with a real cifar10.npz; skips where there is none."""
    for directory in (os.environ.get("DLDR_DATA"), ROOT / "data"):
        if directory and (Path(directory) / "cifar10.npz").is_file():
            return Path(directory)
    pytest.skip("no cifar10.npz in DLDR_DATA or data/")


@pytest.fixture
def script(monkeypatch):
    """A script of benchmarks/ by name, as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module
