"""Data: torchvision's augmentation, label noise, the readers, and what bad files provoke."""
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from runs import ROOT, epoch, load
from torchvision import transforms

import datasets
from datasets import SOURCES, ArrayBatches, noisy_labels
from dldr.errors import UserError


def loader(n=64, seed=1, batch_size=20, **options):
    images = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), np.uint8)
    return ArrayBatches(images, np.zeros(n, int), SOURCES["CIFAR10"], batch_size, "cpu", seed=seed, **options)


@pytest.mark.parametrize(("shape", "augment", "training"), [
    ((32, 32), "flip crop", True), ((12, 10), "flip crop", True), ((12, 10), "flip", True), ((12, 10), "crop", True),
    ((32, 32), "flip crop", False)])
def test_pixels_equal_torchvision(shape, augment, training):
    """What is drawn, each through torchvision's own flip, zero padding, crop, ToTensor and Normalize; and
    evaluation, in the order of the file, with neither flip nor crop."""
    raw = np.random.default_rng(0).integers(0, 256, (400, *shape, 3), np.uint8)
    _, mean, std, *_ = SOURCES["CIFAR10"]
    batches = ArrayBatches(raw, np.arange(400), datasets.Source(3, mean, std, None, augment), 128, "cpu", seed=1,
                           shuffle=training, augment=training)
    order, flip, top, left = batches.draws(2)
    x, y = epoch(batches, 2)
    assert torch.equal(y, order) and [len(labels) for _, labels in batches.epoch(2)] == [128, 128, 128, 16]
    assert len(batches) == 4 and next(batches.epoch(2))[0].is_contiguous(memory_format=torch.channels_last)
    assert training or order.tolist() == list(range(400))
    for kind, drawn in (("flip", flip), ("crop", top), ("crop", left)):
        assert set(drawn.tolist()) == set(range(2 if kind == "flip" else 9) if kind in augment else [0])
    finish = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    for i in range(400):
        image = torch.from_numpy(raw[order[i]]).permute(2, 0, 1)
        if training:
            image = TF.pad(TF.hflip(image) if flip[i] else image, [4 * ("crop" in augment)])
            image = TF.crop(image, int(top[i]), int(left[i]), *shape)
        assert torch.equal(x[i], finish(image.permute(1, 2, 0).numpy()))


def test_draws_have_torchvisions_distribution():
    """Flips with probability 1/2, 81 equally likely windows, independent of one another and of the order."""
    order, flip, top, left = loader(n=40_000, shuffle=True, augment=True).draws(3)
    cells = torch.bincount((flip * 81 + top * 9 + left), minlength=162).double()
    expected = 40_000 / 162
    chi2 = ((cells - expected) ** 2 / expected).sum().item()
    assert 161 - 5 * (2 * 161) ** 0.5 < chi2 < 161 + 5 * (2 * 161) ** 0.5  # five deviations of chi-squared
    assert torch.equal(order.sort().values, torch.arange(40_000))
    assert abs(np.corrcoef(order, flip)[0, 1]) < 0.03


def test_order_and_augmentation_are_functions_of_seed_and_epoch():
    a, b = loader(shuffle=True, augment=True), loader(shuffle=True, augment=True, batch_size=7)
    list(a.epoch(0))  # reading an epoch must not shift later ones
    assert torch.equal(epoch(a, 2)[0], epoch(b, 2)[0])
    assert not torch.equal(a.draws(1), a.draws(2))
    assert not torch.equal(a.draws(1), loader(seed=2, shuffle=True, augment=True).draws(1))


@pytest.mark.parametrize("classes", [10, 100])
def test_label_noise_is_the_seeded_draw(classes):
    labels = np.arange(1000) % classes
    noisy = noisy_labels(labels, 0.37, classes, seed=5)
    assert np.array_equal(noisy[:370], np.random.RandomState(5).randint(0, classes, 370))
    assert np.array_equal(noisy[370:], labels[370:])
    assert np.array_equal(labels, np.arange(1000) % classes)  # the argument is left alone
    assert set(noisy_labels(labels, 1.0, classes, 0)) == set(range(classes))


def test_corrupt_and_part_reach_the_loader():
    clean, noisy = load("digits", seed=3), load("digits", seed=3, corrupt=0.5, part=0.25)
    n = int(0.25 * 1437)
    assert (clean.train.samples, clean.test.samples, noisy.train.samples) == (1437, 360, n)
    assert np.array_equal(noisy.train.labels[: n // 2], np.random.RandomState(3).randint(0, 10, n // 2))
    assert torch.equal(noisy.train.labels[n // 2 :], clean.train.labels[n // 2 : n])
    assert torch.equal(noisy.test.labels, clean.test.labels)


def write_npz(path, shape=(12, 10), **change):
    """A file of 30 + 9 images, with other arrays or (None) without; the arrays."""
    rng = np.random.default_rng(0)
    arrays = {"x_train": rng.integers(0, 256, (30, *shape), np.uint8), "y_train": np.arange(30) % 3,
              "x_test": rng.integers(0, 256, (9, *shape), np.uint8), "y_test": np.arange(9) % 3}
    np.savez(path, **{name: value for name, value in {**arrays, **change}.items() if value is not None})
    return arrays


def test_npz_is_used_where_it_lies(tmp_path):
    arrays = write_npz(tmp_path / "cifar10.npz", (32, 32, 3))
    data = load("CIFAR10", tmp_path)
    assert (data.classes, data.train.samples, data.test.samples) == (10, 30, 9)
    assert np.array_equal(data.train.labels, arrays["y_train"])


@pytest.mark.parametrize(("name", "change", "message"), [
    ("CIFAR10", {"x_train": np.zeros((30, 3, 32, 32), np.uint8)}, r"x_train must be \(N, 32, 32, 3\) uint8"),
    ("CIFAR10", {"x_test": np.zeros((9, 32, 32, 3), np.float32)}, "x_test must be"),
    ("CIFAR10", {"y_train": np.zeros(19, int)}, r"y_train must be \(30,\) integer"),
    ("CIFAR10", {"y_test": np.full(9, 10)}, "labels 0 to 9"), ("CIFAR10", {"y_test": np.full(9, -1)}, "labels 0 to 9"),
    ("CIFAR10", {"y_train": np.array([{}] * 30, dtype=object)}, "cannot be read"),  # a pickle inside: never loaded
    ("npz:", {"x_train": None}, "cannot be read as x_train, y_train, x_test, y_test: .*x_train"),
    ("npz:", {"x_train": np.zeros((30, 12), np.uint8)}, r"x_train must be .*, not \(30, 12\) uint8"),
    ("npz:", {"y_train": np.arange(30) - 1}, "y_train must hold labels of at least 0, not -1"),
    ("npz:", {"y_test": np.arange(9)}, "y_test must hold labels 0 to 2, not 0 to 8"),
    ("npz:", {"y_train": np.zeros(30, int)}, "number of classes must be an integer of at least 2, not 1"),
])
def test_malformed_npz_is_refused(tmp_path, name, change, message):
    path = tmp_path / "cifar10.npz"
    write_npz(path, (32, 32, 3) if name == "CIFAR10" else (12, 10), **change)
    with pytest.raises(UserError, match=f"{'--datasets npz:' if name == 'npz:' else ''}{path}.*{message}"):
        load(name if name == "CIFAR10" else f"{name}{path}", tmp_path)


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "MNIST", "FashionMNIST"])
def test_missing_data_without_network_says_what_to_do(tmp_path, name, monkeypatch):
    import torchvision.datasets.utils as tv_utils

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(tv_utils.urllib.request, "urlopen", refuse)
    with pytest.raises(UserError, match=f"--data .*{name} is not there"):
        load(name, tmp_path)


def test_mnist_becomes_32_pixels_and_three_channels(tmp_path, monkeypatch):
    import torchvision.datasets as tv_datasets

    class Fake:
        data, targets = torch.arange(2 * 28 * 28).reshape(2, 28, 28).byte(), torch.tensor([3, 7])

    monkeypatch.setattr(tv_datasets, "MNIST", lambda root, train, download: Fake)
    x = load("MNIST", tmp_path).test.images
    assert x.shape == (2, 32, 32, 3) and torch.equal(x[..., 0], x[..., 2])
    assert torch.equal(x[:, 2:30, 2:30, 1], Fake.data) and not x[:, :2].any() and not x[:, :, 30:].any()


def test_normalisation_constants_of_digits():
    pixels = datasets.read_digits(None)[0] / 255
    assert (round(pixels.mean(), 4), round(pixels.std(), 4)) == (SOURCES["digits"].mean[0], SOURCES["digits"].std[0])


def test_digits_are_not_mirrored():
    assert {name for name, source in SOURCES.items() if "flip" in source.augment} == {
        "CIFAR10", "CIFAR100", "FashionMNIST"}


def test_real_cifar10():
    """The real data set: sizes, balanced classes, and the normalised moments of its pixels."""
    roots = [Path(root) for root in (os.environ.get("DLDR_DATA"), ROOT / "data") if root]
    if not (roots := [root for root in roots if (root / "cifar10.npz").is_file()]):
        pytest.skip("no cifar10.npz in DLDR_DATA or data/")
    data = load("CIFAR10", roots[0], batch_size=1000)
    assert (data.train.samples, data.test.samples) == (50_000, 10_000)
    assert data.train.labels.bincount().tolist() == [5000] * 10 and data.test.labels.bincount().tolist() == [1000] * 10
    x, _ = epoch(data.test)
    means = x.mean((0, 2, 3)) * data.test.std + data.test.mean
    torch.testing.assert_close(means, torch.tensor([0.4942, 0.4851, 0.4504]), atol=2e-3, rtol=0)  # known channel means
