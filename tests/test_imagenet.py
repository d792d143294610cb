"""The image-folder path, on a few drawn photographs' worth of JPEG files."""
import json

import numpy as np
import pytest
import torch
from conftest import network
from PIL import Image

import datasets
import train_psgd
import train_sgd
from dldr.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """train/ with 2 x 6 and val/ with 2 x 3 images of different sizes."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(120 * label, 120 * label + 120, (240 + 5 * i, 300, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.JPEG")
    return root


def read(folder, epoch, workers, **options):
    data = datasets.load("ImageNet", folder, batch_size=5, device="cpu", seed=4, workers=workers, **options)
    x, y = zip(*data.train.epoch(epoch), strict=True)
    return data, torch.cat(x), torch.cat(y)


def test_batches_do_not_depend_on_workers_or_on_what_was_read_before(folder):
    data, x, y = read(folder, 1, workers=0)
    assert data.classes == 2 and x.shape == (12, 3, 224, 224) and len(data.train) == 3
    other, x2, y2 = read(folder, 0, workers=2)
    assert not torch.equal(x, x2)
    x3, y3 = (torch.cat(part) for part in zip(*other.train.epoch(1), strict=True))
    assert torch.equal(x, x3) and torch.equal(y, y3)


def test_sampling_iterations_are_the_published_ones():
    assert train_sgd.sampling_iterations(5005, 6) == [1, 1001, 2001, 3001, 4001, 5001]  # after iterations 0, 1000, ...
    assert train_sgd.sampling_iterations(391, 1) == [391]
    with pytest.raises(UserError, match="--samples-per-epoch"):
        train_sgd.sampling_iterations(5, 6)


def test_resume_is_exact_with_dropout_and_workers(folder, tmp_path):
    """Dropout masks and augmentation are functions of (seed, epoch), so a second epoch needs no first one before it."""
    def final(name, *epochs):
        for count in epochs:
            train_sgd.main(train_sgd.parse_args([
                "--datasets", "ImageNet", "--data", str(folder), "--arch", network("dropout"), "--batch-size", "4",
                "--lr", "0.001", "--workers", "1", "--samples-per-epoch", "1", "--device", "cpu", "--save-dir",
                str(tmp_path / name), "--epochs", str(count), "--resume", "auto"]))
        return torch.load(tmp_path / name / "2.pt", weights_only=True)

    whole, cut = final("whole", 2), final("cut", 1, 2)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_sgd_then_psgd_end_to_end(folder, tmp_path):
    common = ["--datasets", "ImageNet", "--data", str(folder), "--arch", "squeezenet1_1", "--batch-size", "4",
              "--workers", "1", "--device", "cpu", "--save-dir", str(tmp_path)]
    train_sgd.main(train_sgd.parse_args([*common, "--epochs", "1", "--lr", "0.001", "--samples-per-epoch", "3"]))
    assert sorted(p.name for p in tmp_path.glob("[0-9]*.pt")) == ["0.pt", "1.pt", "2.pt", "3.pt"]
    train_psgd.main(train_psgd.parse_args([*common, "--epochs", "1", "--params_end", "4", "--n_components", "2"]))
    summary = json.loads((tmp_path / "psgd_summary.json").read_text())
    assert summary["snapshots"] == 4 and summary["parameters_trained"] == 2
