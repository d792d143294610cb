"""ImageNet, or any folder laid out like it: train/<class>/*.JPEG and val/<class>/*.JPEG, through DataLoader workers.

Training: RandomResizedCrop(224) and flip; evaluation: Resize(256), CenterCrop(224); both normalised.
"""
import os
import signal
from pathlib import Path

import numpy as np
import torch
import torchvision.datasets as tv_datasets
from PIL import Image
from torchvision.datasets.folder import is_image_file
from torchvision.transforms import v2

from datasets import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Data,
    batch_sizes,
    describe,
    kept_samples,
    noisy_labels,
    shares,
    warn_of_missing,
)
from dldr.errors import UserError


def load(root, *, batch_size, device, seed, corrupt=0.0, part=None, workers=4):
    """Data of the image folders under `root`; as many classes as train/ has folders. See `datasets.load`.

    Files are sorted by class, so the first ones will not do: `part` keeps the first int(part N) of a permutation of all
    N (a smaller part is within a larger one), the same for every seed, since stages may differ in theirs; `corrupt`
    redraws the first int(corrupt n) of a permutation of the n kept ones by `seed`.
    """
    train, test = Folder(root, "train", TRAIN), Folder(root, "val", EVAL)
    only = {"train": set(train.classes) - set(test.classes), "val": set(test.classes) - set(train.classes)}
    if any(only.values()):
        differences = "; ".join(f"only in {split}/: {', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''}"
                                for split, names in only.items() if names)
        raise UserError(f"--data {root}: train/ and val/ must have the same class folders; {differences}")
    content = [f"{path}\t{label}\n".encode() for folder in (train, test) for path, label in folder.named()]
    n = len(train.samples)
    kept = np.sort(np.random.default_rng(0).permutation(n)[: kept_samples(n, part)])
    paths, labels = zip(*[train.samples[i] for i in kept], strict=True)
    warn_of_missing(labels, len(train.classes), part)
    order = np.random.default_rng(seed).permutation(len(kept))
    labels = noisy_labels(labels, corrupt, len(train.classes), seed, order)
    train.samples = list(zip(paths, labels.tolist(), strict=True))
    batches = (FolderBatches(train, batch_size, device, workers, seed=seed, shuffle=True),
               FolderBatches(test, batch_size, device, workers))
    return Data(len(train.classes), *batches, describe(len(train.classes), *batches, content, labels))


def _transform(*geometry):
    return v2.Compose([v2.ToImage(), *geometry, v2.ToDtype(torch.float32, scale=True),
                       v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


TRAIN = _transform(v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip())
EVAL = _transform(v2.Resize(256, antialias=True), v2.CenterCrop(224))


def read_image(path):
    """An image file in 8-bit RGB; ValueError for one of a depth whose range is unknown: Pillow would clip it at 255."""
    with Image.open(path) as image:
        if image.format == "PNG" and image.mode in ("I", "I;16"):  # grey; of 16-bit colour Pillow takes the upper half
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode[0] in "IF":
            raise ValueError(f"{image.mode} pixels of 16 or 32 bits; convert it to 8 bits per channel")
        return image.convert("RGB")


class Folder(tv_datasets.ImageFolder):
    """ImageFolder indexed by (i, draw): the augmentation of image i is a function of `draw`, in whichever worker.

    Hidden files and folders (._name.JPEG, .ipynb_checkpoints) are neither images nor classes.
    """

    def __init__(self, root, split, transform):
        directory = str(Path(root) / split)

        def is_image(path):
            return is_image_file(path) and f"{os.sep}." not in path[len(directory):]

        try:
            super().__init__(directory, transform, loader=read_image, is_valid_file=is_image)
        except OSError as error:
            raise UserError(
                f"--data {root}: ImageNet needs class folders with images under {split}/ ({error})"
            ) from error

    def named(self):
        """Path below the root and label of each image."""
        return [(str(Path(path).relative_to(self.root)), label) for path, label in self.samples]

    def find_classes(self, directory):
        names = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir() and entry.name[0] != ".")
        if not names:
            raise FileNotFoundError("there are none")
        return names, {name: label for label, name in enumerate(names)}

    def __getitem__(self, key):
        index, draw = key
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(draw)  # the CPU's only: a CUDA generator may be drawing dropout
            try:
                return super().__getitem__(index)
            except Exception as error:  # truncated, foreign, not there: Pillow has many types for it
                reason = getattr(error, "strerror", None) or error
                raise UserError(f"{self.samples[index][0]} cannot be read as an image: {reason}") from error


class Order(torch.utils.data.Sampler):
    """Mini-batches of pairs (index, draw), or this rank's part of each.

    The epoch's order is a function of (seed, epoch), whatever the processes; without `shuffle` it is the files'.
    """

    def __init__(self, n, batch_size, seed, shuffle):
        self.n, self.seed, self.shuffle, self.current = n, seed, shuffle, 0
        self.parts = shares(n, batch_size, training=shuffle)

    def __len__(self):
        return len(self.parts)

    def __iter__(self):
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + self.current)
        order = torch.randperm(self.n, generator=rng) if self.shuffle else torch.arange(self.n)
        draws = torch.randint(2**62, (self.n,), generator=rng)
        for first, last in self.parts:
            yield list(zip(order[first:last].tolist(), draws[first:last].tolist(), strict=True))


def ignore_signals(worker):
    """Only the main process handles signals."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class FolderBatches:
    """epoch(e) yields x (B, 3, 224, 224) float32 in channels_last memory and y (B,) int64 on the device."""

    def __init__(self, folder, batch_size, device, workers, *, seed=0, shuffle=False):
        self.samples, self.device = len(folder.samples), device
        self.sizes = batch_sizes(self.samples, batch_size)
        self.order = Order(self.samples, batch_size, seed, shuffle)
        self.loader = torch.utils.data.DataLoader(
            folder, batch_sampler=self.order, num_workers=workers, pin_memory=torch.device(device).type == "cuda",
            persistent_workers=workers > 0, worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # its own, so that seeding workers does not consume the global generator
        )

    def __len__(self):
        return len(self.sizes)

    def epoch(self, epoch):
        self.order.current = epoch
        for x, y in self.loader:
            x = x.to(self.device, non_blocking=True, memory_format=torch.channels_last)
            yield x, y.to(self.device, non_blocking=True)
