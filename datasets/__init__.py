"""Data sets by name or the user's own, as batches on the training device.

Arrays live on the device, images as uint8, and are augmented there (`ArrayBatches`); image folders and torch Datasets
come through DataLoader workers (`loader.py`). In both, order and augmentation are functions of (seed, epoch) alone and
are drawn on the CPU, so every device, batch size and stage sees the same stream for a seed.
"""
import contextlib
import difflib
import hashlib
import io
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from dldr import distributed
from dldr.errors import UserError

# of images like CIFAR's: on a CPU activations of 128 stay in the cache (1.17 times faster than 1000); a GPU wants many
EVALUATION_BATCH = {"cpu": 128, "cuda": 2000}
# batches whose pixels are made at once: a GPU waits for the launches of the dozen kernels, not for their work
AHEAD = {"cpu": 1, "cuda": 64}


class Source(NamedTuple):
    classes: int
    mean: tuple[float, ...] | None  # per channel, of pixels in [0, 1]; None for arrays that are taken as they are
    std: tuple[float, ...] | None
    read: Callable[[Path], tuple[np.ndarray, ...]] | None  # data directory -> x_train, y_train, x_test, y_test
    augment: str = "flip crop"  # in training; no flip of digits: a mirrored one is another one


class Data(NamedTuple):
    classes: int
    train: object  # .epoch(e) yields (x, y) batches; len() batches; .samples
    test: object
    facts: dict  # what identifies the data, see `describe`
    example: torch.Tensor  # a mini-batch of two samples, its values aside


def check_name(name):
    """Raise UserError, with the closest names, unless `name` is a data set."""
    names = [*SOURCES, "ImageNet"]
    own = ".py:" in name or name.startswith(("folder:", "npz:"))
    if name not in names and not own:
        lower = {known.lower(): known for known in names}
        close = [lower[match] for match in difflib.get_close_matches(name.lower(), lower, n=2, cutoff=0.5)]
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(names)}, and data of your own"
        raise UserError(f"--datasets: no data set {name!r}; {hint}")


def load(name, root, *, batch_size, device, seed, corrupt=0.0, part=None, workers=4):
    """Data(classes, train, test) of data set `name` under directory `root`.

    `part` keeps the first int(part N) training samples; then the first int(corrupt n) labels of what is left are
    redrawn (`noisy_labels`). Of image folders and torch Datasets, often sorted by class, both are drawn
    (`loader.load`). Raises UserError for missing or malformed data.
    """
    check_name(name)
    options = {"batch_size": batch_size, "device": device, "seed": seed, "corrupt": corrupt, "part": part}
    if name in SOURCES:
        source = SOURCES[name]
        arrays = source.read(Path(root))
    else:
        from datasets import loader, own

        if name == "ImageNet" or name.startswith("folder:"):
            return loader.load(*loader.read_folders(name, root), workers=workers, **options)
        source, arrays = own.read(name)
        if source is None:
            return loader.load(*arrays, workers=workers, **options)
    x_train, y_train, x_test, y_test = arrays
    keep = kept_samples(len(x_train), part)
    warn_of_missing(y_train[:keep], source.classes, part)
    y_train = noisy_labels(y_train[:keep], corrupt, source.classes, seed)
    train = ArrayBatches(x_train[:keep], y_train, source, batch_size, device, seed=seed, shuffle=True,
                         augment=True)
    filling = EVALUATION_BATCH[torch.device(device).type]  # of larger images fewer: batch_size, which fits in training
    evaluation = min(filling, max(batch_size, filling * 3 * 32 * 32 // x_test[0].size))
    test = ArrayBatches(x_test, y_test, source, evaluation, device)
    return Data(source.classes, train, test, describe(source.classes, train, test, arrays, y_train), train.example())


def describe(classes, train, test, content, labels):
    """What identifies the data, for log and checks: classes, samples, and two digests.

    "content": of the whole data set (arrays or bytes); "labels": of the training labels in use.
    """
    def digest(pieces):
        state = hashlib.blake2b(digest_size=8)
        for piece in pieces:
            state.update(np.ascontiguousarray(piece) if isinstance(piece, np.ndarray) else piece)
        return state.hexdigest()

    return {"classes": classes, "training": train.samples, "test": test.samples, "content": digest(content),
            "labels": digest([np.asarray(labels, dtype=np.int64)])}


def kept_samples(n, part):
    """How many of n training samples --smalldatasets keeps: int(part n)."""
    keep = n if part is None else int(part * n)
    if keep < 1:
        raise UserError(f"--smalldatasets {part} of {n} training samples leaves none")
    return keep


def warn_of_missing(labels, classes, part):
    """Say so on stderr if the training samples that --smalldatasets keeps lack classes."""
    missing = classes - len(np.unique(labels))
    if part is not None and missing:
        distributed.note(f"--smalldatasets {part} keeps no sample of {missing} of {classes} classes", "warning")


def moments(chunks):
    """Mean and standard deviation per channel, in [0, 1], of images (N, H, W, C) uint8 in chunks of them."""
    levels = np.arange(256) / 255
    counts = sum(np.stack([np.bincount(channel.ravel(), minlength=256) for channel in np.moveaxis(chunk, 3, 0)])
                 for chunk in chunks)
    shares = counts / counts.sum(1, keepdims=True)
    mean = shares @ levels
    variance = (shares * (levels - mean[:, None]) ** 2).sum(1)
    return tuple(mean.tolist()), tuple(np.sqrt(variance).clip(1 / 255).tolist())  # a constant channel becomes zeros


def noisy_labels(labels, corrupt, classes, seed, order=None):
    """A copy of `labels` (n,), the first int(corrupt n) redrawn uniformly over all classes, the true one included.

    With `order`, a permutation of 0 ... n - 1, those are the first ones in it.
    """
    labels = np.array(labels, dtype=np.int64)
    count = int(corrupt * len(labels))
    redrawn = slice(count) if order is None else order[:count]
    labels[redrawn] = np.random.RandomState(seed).randint(0, classes, count)
    return labels


def batch_sizes(samples, batch_size):
    """Sizes of the mini-batches of an epoch: all batch_size, but for the last."""
    return [min(batch_size, samples - first) for first in range(0, samples, batch_size)]


def shares(samples, batch_size, training):
    """This rank's part of each mini-batch of an epoch of `samples`, as ranges [(first, last), ...] of its order.

    In training every rank must have some of each; in evaluation mini-batches of which it has none are left out.
    """
    ranges = [distributed.share(first, min(samples, first + batch_size)) for first in range(0, samples, batch_size)]
    if training and samples and min(batch_size, (samples - 1) % batch_size + 1) < distributed.world_size():
        raise UserError(f"--batch-size {batch_size}: the smallest mini-batch of {samples:,} samples is too small for "
                         f"{distributed.world_size()} processes")
    return ranges if training else [(first, last) for first, last in ranges if first < last]


class ArrayBatches:
    """Batches of arrays held on the device: images of H x W pixels as uint8, normalised and, in training, augmented
    there; anything else as it is.

    epoch(e) yields x, for images (B, C, H, W) float32 in channels_last memory, and y (B,) int64; the last batch may be
    smaller.
    Each rank gets its part of every batch, cut from the same order; `sizes` are those of whole batches.
    The augmentation has the same distribution as torchvision's RandomHorizontalFlip, RandomCrop(H, padding=4),
    ToTensor and Normalize: each sample draws a flip (p 1/2) and one of 9 x 9 windows of the zero-padded image, where
    `source.augment` names "flip" and "crop".
    """

    PAD = 4

    def __init__(self, images, labels, source, batch_size, device, *, seed=0, shuffle=False, augment=False):
        """images (N, H, W, C) uint8, or (N, ...) float32 of a source without mean; labels (N,) integer."""
        self.images = torch.as_tensor(images, device=device)
        self.labels = torch.as_tensor(labels, dtype=torch.int64, device=device)
        self.shape = self.images.shape[1:]
        self.flips, crops = ("flip" in source.augment, "crop" in source.augment)
        self.augment, self.pad = augment and (self.flips or crops), self.PAD * crops
        if self.augment:
            self.images = F.pad(self.images, (0, 0) + (self.pad,) * 4)  # (N, H + 8, W + 8, C)
        self.mean, self.std = source.mean, source.std
        if source.mean is not None:
            self.mean, self.std = (torch.tensor(value, device=device) for value in (source.mean, source.std))
        self.batch_size, self.device, self.seed = batch_size, device, seed
        self.shuffle, self.samples = shuffle, len(labels)
        self.sizes = batch_sizes(self.samples, batch_size)
        self.parts = shares(self.samples, batch_size, training=shuffle)

    def __len__(self):
        return len(self.sizes)

    def example(self):
        """Zeros of the shape of two samples, on the CPU."""
        if self.mean is None:
            return torch.zeros(2, *self.shape)
        height, width, channels = self.shape
        return torch.zeros(2, channels, height, width)

    def draws(self, epoch):
        """Order (N,), and for the i-th sample in it flip (N,) in {0, 1} and window offsets top, left (N,) in 0..8."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self.samples) if self.shuffle else np.arange(self.samples)
        flip = rng.integers(0, 2, self.samples) * self.flips
        top, left = rng.integers(0, 2 * self.pad + 1, (2, self.samples))
        return torch.from_numpy(np.stack([order, flip, top, left])).to(self.device)

    def epoch(self, epoch):
        draws = self.draws(epoch)  # (4, N)
        numbers = self.batch_size * self.shape.numel()  # of a mini-batch
        many = min(AHEAD[self.labels.device.type], 1 + 2**28 // numbers)  # 1 GiB in float32
        for i in range(0, len(self.parts), many):
            ahead = self.parts[i : i + many]
            order, flip, top, left = torch.cat([draws[:, first:last] for first, last in ahead], 1)
            sizes = [last - first for first, last in ahead]
            x, y = self.pixels(order, flip, top, left), self.labels[order]
            yield from zip(x.split(sizes), y.split(sizes), strict=True)

    def pixels(self, index, flip, top, left):
        """The samples at `index`; images are flipped where flip is 1, cropped at (top, left) and normalised."""
        if self.augment:
            height, width, _ = self.shape
            rows = top[:, None] + torch.arange(height, device=self.device)  # (B, H)
            columns = left[:, None] + torch.arange(width, device=self.device)
            # the window at `left` of the flipped image, read from the unflipped one
            columns = torch.where(flip[:, None] == 1, self.images.shape[2] - 1 - columns, columns)
            x = self.images[index[:, None, None], rows[:, :, None], columns[:, None, :]]
        else:
            x = self.images[index]
        if self.mean is None:
            return x
        x = x.float().div_(255).sub_(self.mean).div_(self.std)  # ToTensor and Normalize, in their order of rounding
        return x.permute(0, 3, 1, 2)


# ----------------------------------------------------------------------------------------------- reading


def check_arrays(arrays, classes, where, shape=None):
    """Raise UserError unless arrays are x_train, y_train, x_test, y_test: images (N, *shape) uint8, labels (N,).

    Without `shape` images are (N, H, W, 1 or 3), and floating-point arrays (N, ...) are taken too.
    """
    for images, labels, split in zip(arrays[::2], arrays[1::2], ("train", "test"), strict=True):
        pixels = images.dtype == np.uint8 and images.ndim == 4 and (
            images.shape[1:] == shape if shape else images.shape[3] in (1, 3))
        values = shape is None and images.dtype.kind == "f" and images.ndim > 1
        if not (pixels or values):
            wanted = f"(N, {', '.join(map(str, shape))}) uint8" if shape else (
                "(N, H, W) or (N, H, W, 1 or 3) uint8, or floating-point")
            raise UserError(f"{where}: x_{split} must be {wanted}, not {images.shape} {images.dtype}")
        if images.shape[1:] != arrays[0].shape[1:] or images.dtype != arrays[0].dtype:
            raise UserError(f"{where}: x_{split} must be like x_train, {arrays[0].shape[1:]} {arrays[0].dtype}, not "
                            f"{images.shape[1:]} {images.dtype}")
        if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise UserError(f"{where}: y_{split} must be ({len(images)},) integer, not {labels.shape} {labels.dtype}")
        if len(labels) == 0 or labels.min() < 0 or labels.max() >= classes:
            found = f"{labels.min()} to {labels.max()}" if len(labels) else "none"
            wanted = f"0 to {classes - 1}" if math.isfinite(classes) else "of at least 0"
            raise UserError(f"{where}: y_{split} must hold labels {wanted}, not {found}")
        if pixels and images.max() <= 1:
            raise UserError(f"{where}: x_{split} must hold pixels of 0 to 255; its largest is {images.max()}")
        if values and not np.isfinite(images).all():
            raise UserError(f"{where}: x_{split} holds NaN or infinite values")
    return arrays


def read_npz(path, where):
    """x_train, y_train, x_test, y_test of a file; UserError if it cannot be read, or lacks one of them."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return [file[key] for key in ("x_train", "y_train", "x_test", "y_test")]
    except FileNotFoundError as error:
        raise UserError(f"{where}: there is no file {path}") from error
    except Exception as error:  # truncated, foreign, pickled, or without one of the arrays
        raise UserError(f"{where} cannot be read as x_train, y_train, x_test, y_test: {error}") from error


def read_cifar(classes, root):
    """CIFAR-10 or CIFAR-100: cifar<classes>.npz in the data directory `root`, else torchvision's files there."""
    path = root / f"cifar{classes}.npz"
    if path.is_file():
        return check_arrays(read_npz(path, path), classes, path, (32, 32, 3))
    splits = download(f"CIFAR{classes}", root, f"or put {path} there (docs/install.md says how)")
    return [array for split in splits for array in (split.data, np.asarray(split.targets))]


def read_mnist(name, root):
    """MNIST or FashionMNIST through torchvision: padded from 28 to 32 pixels, three equal channels."""
    arrays = []
    for split in download(name, root, "or copy its files there from a machine with network"):
        grey = F.pad(split.data, (2, 2, 2, 2))
        arrays += [grey[..., None].expand(-1, -1, -1, 3).numpy(), split.targets.numpy()]
    return arrays


def download(name, root, hint):
    """torchvision's training and test split of `name` under `root`, downloaded with checksums if need be."""
    import torchvision.datasets as tv_datasets

    quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with quiet, distributed.rank0_first():  # a progress bar on a terminal only
            return [getattr(tv_datasets, name)(root, train=train, download=True) for train in (True, False)]
    except Exception as error:  # no network, a full disk, damaged files: torchvision has a type of its own for each
        raise UserError(f"--data {root}: {name} is not there and could not be downloaded ({error}); {hint}") from error


def read_digits(root):
    """scikit-learn's 1,797 handwritten digits (8 x 8, grey), 80/20 split, up-sampled to 32 x 32 x 3; needs no files."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images / 16).float()[:, None]
    images = F.interpolate(images, size=32, mode="bilinear", align_corners=False)
    images = (255 * images).round().byte().permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    x_train, x_test, y_train, y_test = train_test_split(
        images, digits.target, test_size=0.2, random_state=0, stratify=digits.target
    )
    return x_train, y_train, x_test, y_test


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SOURCES = {
    "CIFAR10": Source(10, IMAGENET_MEAN, IMAGENET_STD, partial(read_cifar, 10)),
    "CIFAR100": Source(100, (0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047),
                       partial(read_cifar, 100)),
    "MNIST": Source(10, (0.1307,) * 3, (0.3081,) * 3, partial(read_mnist, "MNIST"), "crop"),
    "FashionMNIST": Source(10, (0.2860,) * 3, (0.3530,) * 3, partial(read_mnist, "FashionMNIST")),
    "digits": Source(10, (0.3054,) * 3, (0.3237,) * 3, read_digits, "crop"),
}
