"""Data: torchvision's augmentation, label noise, the readers, and what bad files provoke."""
import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from torchvision import transforms

import datasets
from datasets import SOURCES, ArrayBatches, noisy_labels
from dldr.errors import UserError


def images(n=64, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, n)


def loader(n=64, seed=1, batch_size=20, **options):
    x, y = images(n)
    return ArrayBatches(x, y, SOURCES["CIFAR10"], batch_size, "cpu", seed=seed, **options)


@pytest.mark.parametrize(("shape", "augment", "training"), [
    ((32, 32), "flip crop", True), ((12, 10), "flip crop", True), ((12, 10), "flip", True), ((12, 10), "crop", True),
    ((32, 32), "flip crop", False)])
def test_pixels_equal_torchvision(shape, augment, training):
    """What is drawn, each through torchvision's own flip, zero padding, crop, ToTensor and Normalize; and
    evaluation, in the order of the file, with neither flip nor crop."""
    raw = np.random.default_rng(0).integers(0, 256, (400, *shape, 3), np.uint8)
    _, mean, std, *_ = SOURCES["CIFAR10"]
    batches = ArrayBatches(raw, np.zeros(400, int), datasets.Source(3, mean, std, None, augment), 128, "cpu", seed=1,
                           shuffle=training, augment=training)
    order, flip, top, left = batches.draws(2)
    x = torch.cat([x for x, _ in batches.epoch(2)])
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


def test_an_epoch_holds_every_sample_once_and_keeps_the_last_batch():
    batches = loader(shuffle=True)
    x, y = zip(*batches.epoch(0), strict=True)
    assert [len(b) for b in y] == [20, 20, 20, 4] and len(batches) == 4
    whole = ArrayBatches(*images(), SOURCES["CIFAR10"], 64, "cpu")
    order = batches.draws(0)[0]
    (all_x, all_y), = whole.epoch(0)
    assert torch.equal(torch.cat(x), all_x[order]) and torch.equal(torch.cat(y), all_y[order])
    assert x[0].is_contiguous(memory_format=torch.channels_last)


def test_order_and_augmentation_are_functions_of_seed_and_epoch():
    a, b = loader(shuffle=True, augment=True), loader(shuffle=True, augment=True, batch_size=7)
    list(a.epoch(0))  # reading an epoch must not shift later ones
    same = torch.cat([x for x, _ in a.epoch(2)]), torch.cat([x for x, _ in b.epoch(2)])
    assert torch.equal(*same)
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
    options = {"batch_size": 100, "device": "cpu", "seed": 3}
    clean = datasets.load("digits", "none", **options)
    noisy = datasets.load("digits", "none", **options, corrupt=0.5, part=0.25)
    n = int(0.25 * 1437)
    assert (clean.train.samples, clean.test.samples, noisy.train.samples) == (1437, 360, n)
    assert np.array_equal(noisy.train.labels[: n // 2], np.random.RandomState(3).randint(0, 10, n // 2))
    assert torch.equal(noisy.train.labels[n // 2 :], clean.train.labels[n // 2 : n])
    assert torch.equal(noisy.test.labels, clean.test.labels)


def write_npz(directory, name="cifar10", **change):
    x, y = images(30)
    arrays = {"x_train": x[:20], "y_train": y[:20], "x_test": x[20:], "y_test": y[20:]}
    np.savez(directory / f"{name}.npz", **{**arrays, **change})


def test_npz_is_used_where_it_lies(tmp_path):
    write_npz(tmp_path)
    data = datasets.load("CIFAR10", tmp_path, batch_size=8, device="cpu", seed=1)
    assert (data.classes, data.train.samples, data.test.samples) == (10, 20, 10)
    assert np.array_equal(data.train.labels, images(30)[1][:20])


@pytest.mark.parametrize("change, message", [
    ({"x_train": np.zeros((20, 3, 32, 32), np.uint8)}, r"x_train must be \(N, 32, 32, 3\) uint8"),
    ({"x_test": np.zeros((10, 32, 32, 3), np.float32)}, r"x_test must be"),
    ({"y_train": np.zeros(19, int)}, r"y_train must be \(20,\) integer"),
    ({"y_test": np.full(10, 10)}, "labels 0 to 9"),
    ({"y_test": np.full(10, -1)}, "labels 0 to 9"),
    ({"y_train": np.array([{}] * 20, dtype=object)}, "cannot be read"),  # a pickle inside: never loaded
])
def test_malformed_npz_is_refused(tmp_path, change, message):
    write_npz(tmp_path, **change)
    with pytest.raises(UserError, match=message):
        datasets.load("CIFAR10", tmp_path, batch_size=8, device="cpu", seed=1)


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "MNIST", "FashionMNIST"])
def test_missing_data_without_network_says_what_to_do(tmp_path, name, monkeypatch):
    import torchvision.datasets.utils as tv_utils

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(tv_utils.urllib.request, "urlopen", refuse)
    with pytest.raises(UserError, match=f"--data .*{name} is not there"):
        datasets.load(name, tmp_path, batch_size=8, device="cpu", seed=1)


def test_mnist_becomes_32_pixels_and_three_channels(tmp_path, monkeypatch):
    import torchvision.datasets as tv_datasets

    class Fake:
        data, targets = torch.arange(2 * 28 * 28).reshape(2, 28, 28).byte(), torch.tensor([3, 7])

    monkeypatch.setattr(tv_datasets, "MNIST", lambda root, train, download: Fake)
    data = datasets.load("MNIST", tmp_path, batch_size=2, device="cpu", seed=1)
    x = data.test.images
    assert x.shape == (2, 32, 32, 3) and torch.equal(x[..., 0], x[..., 2])
    assert torch.equal(x[:, 2:30, 2:30, 1], Fake.data) and not x[:, :2].any() and not x[:, :, 30:].any()


def test_normalisation_constants_of_digits():
    pixels = datasets.read_digits(None)[0] / 255
    assert (round(pixels.mean(), 4), round(pixels.std(), 4)) == (SOURCES["digits"].mean[0], SOURCES["digits"].std[0])


def test_digits_are_not_mirrored():
    assert {name for name, source in SOURCES.items() if "flip" in source.augment} == {
        "CIFAR10", "CIFAR100", "FashionMNIST"}


def test_real_cifar10(real_cifar10):
    """The real data set: sizes, balanced classes, and the normalised moments of its pixels."""
    data = datasets.load("CIFAR10", real_cifar10, batch_size=1000, device="cpu", seed=1)
    assert (data.train.samples, data.test.samples) == (50_000, 10_000)
    assert data.train.labels.bincount().tolist() == [5000] * 10 and data.test.labels.bincount().tolist() == [1000] * 10
    x = torch.cat([x for x, _ in data.test.epoch(0)])
    means = x.mean((0, 2, 3)) * data.test.std + data.test.mean
    torch.testing.assert_close(means, torch.tensor([0.4942, 0.4851, 0.4504]), atol=2e-3, rtol=0)  # known channel means
