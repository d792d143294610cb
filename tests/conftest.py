"""Shared fixtures: a short real sampling run, image folders, the benchmarks."""
import importlib
import itertools
import os
import sys

import pytest
import torch
from runs import ROOT, digits_args, digits_run, draw, network  # noqa: F401 - two are for tests

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


@pytest.fixture
def folder(tmp_path):
    """A function that makes train/ and val/ with so many classes of so many images, and returns their directory."""

    def make(classes=2, train=4, val=2):
        for split, count in (("train", train), ("val", val)):
            for label, i in itertools.product(range(classes), range(count)):
                draw(tmp_path / "images" / split / f"c{label}" / f"{i}.JPEG")
        return tmp_path / "images"

    return make


@pytest.fixture
def own(tmp_path):
    """A function that writes a file of functions, for FILE.py:FUNCTION, and returns its path."""

    def write(text, name="own.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return write


@pytest.fixture
def script(monkeypatch):
    """A script of benchmarks/ by name, as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module
