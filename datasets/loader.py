"""Image folders, train/<class>/*.JPEG and val/<class>/*.JPEG, and torch Datasets, through DataLoader workers.

ImageNet: RandomResizedCrop(224) and flip in training, Resize(256), CenterCrop(224) in evaluation, its usual
normalisation. folder:DIR@SIZE: Resize(SIZE), CenterCrop(SIZE) in both, normalised with its own statistics.
"""
import atexit
import contextlib
import ctypes
import errno
import multiprocessing.connection
import multiprocessing.queues
import operator
import os
import random
import resource
import shutil
import signal
import threading
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
    moments,
    noisy_labels,
    shares,
    warn_of_missing,
)
from dldr.errors import UserError


def load(train, test, classes, labels, *, batch_size, device, seed, corrupt=0.0, part=None, workers=4):
    """Data of two map-style Datasets of (x, label); `labels` (N,) of the training set, or None if not known.

    They may be sorted by class, so the first ones will not do: `part` keeps the first int(part N) of a permutation of
    all N (a smaller part is within a larger one), the same for every seed, since stages may differ in theirs; `corrupt`
    redraws the first int(corrupt n) of a permutation of the n kept ones by `seed`.
    """
    n = len(train)
    kept = np.sort(np.random.default_rng(0).permutation(n)[: kept_samples(n, part)])
    if labels is not None:
        warn_of_missing(labels[kept], classes, part)
    order = np.random.default_rng(seed).permutation(len(kept))
    labels = noisy_labels(np.full(len(kept), -1) if labels is None else labels[kept], corrupt, classes, seed, order)
    batches = (LoaderBatches(Drawn(train, kept, labels), batch_size, device, workers, seed=seed, shuffle=True),
               LoaderBatches(Drawn(test, np.arange(len(test))), batch_size, device, workers))
    content = [os.fsencode(f"{path}\t{label}\n") for folder in (train, test) for path, label in folder.named()]
    x, _ = batches[0].dataset[0, 0]
    return Data(classes, *batches, describe(classes, *batches, content, labels), torch.zeros_like(torch.stack([x, x])))


def read_folders(name, root):
    """What `load` takes, of ImageNet in the folder `root` or of folder:DIR[@SIZE]; 224 x 224 unless SIZE says so."""
    where, transforms = f"--data {root}", (TRAIN, EVAL)
    if own := name.startswith("folder:"):
        root, _, size = name.removeprefix("folder:").rpartition("@")
        if not (root and size.isdigit()):
            root, size = name.removeprefix("folder:"), 224
        where, size = f"--datasets {name}", int(size)
        if not 1 <= size <= 4096:
            raise UserError(f"{where}: a size of 1 to 4096 pixels, not {size}")
        square = v2.Compose([v2.ToImage(), v2.Resize(size, antialias=True), v2.CenterCrop(size)])
        transforms = square, square
    train, test = (Folder(Path(root).expanduser(), split, transform, where)
                   for split, transform in zip(("train", "val"), transforms, strict=True))
    only = {"train": set(train.classes) - set(test.classes), "val": set(test.classes) - set(train.classes)}
    if any(only.values()):
        differences = "; ".join(f"only in {split}/: {', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''}"
                                for split, names in only.items() if names)
        raise UserError(f"{where}: train/ and val/ must have the same class folders; {differences}")
    if own:
        some = np.random.default_rng(0).permutation(len(train))[:2000]  # within 0.01 of the statistics of all
        normalise = v2.Normalize(*moments(train[i][0].permute(1, 2, 0)[None].numpy() for i in some))
        train.transform = test.transform = v2.Compose([square, v2.ToDtype(torch.float32, scale=True), normalise])
    return train, test, len(train.classes), np.asarray(train.targets)


def _transform(*geometry):
    return v2.Compose([v2.ToImage(), *geometry, v2.ToDtype(torch.float32, scale=True),
                       v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


TRAIN = _transform(v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip())
EVAL = _transform(v2.Resize(256, antialias=True), v2.CenterCrop(224))


def read_image(path):
    """An image file in 8-bit RGB; ValueError for one of a depth whose range is unknown: Pillow would clip it at 255."""
    if not os.path.isfile(path):
        raise ValueError("there is no such file")  # a pipe would be waited for
    with Image.open(path) as image:
        if image.format == "PNG" and image.mode in ("I", "I;16"):  # grey; of 16-bit colour Pillow takes the upper half
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode[0] in "IF":
            raise ValueError(f"{image.mode} pixels of 16 or 32 bits; convert it to 8 bits per channel")
        return image.convert("RGB")


class Folder(tv_datasets.ImageFolder):
    """ImageFolder without hidden files and folders (._name.JPEG, .ipynb_checkpoints)."""

    def __init__(self, root, split, transform, where):
        directory, self.where = Path(root) / split, where

        def is_image(path):
            return is_image_file(path) and f"{os.sep}." not in path[len(str(directory)):]

        try:
            super().__init__(directory, transform, loader=read_image, is_valid_file=is_image)
        except OSError as error:
            raise UserError(f"{where}: there must be class folders with images under {split}/ ({error})") from error

    def named(self):
        """Path below the root and label of each image."""
        return [(str(Path(path).relative_to(self.root)), label) for path, label in self.samples]

    def find_classes(self, directory):
        names = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir() and entry.name[0] != ".")
        if not names:
            raise FileNotFoundError("there are none")
        return names, {name: label for label, name in enumerate(names)}

    def __getitem__(self, index):
        try:
            return super().__getitem__(index)
        except Exception as error:  # truncated, foreign, not there: Pillow has many types for it
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{self.samples[index][0]} cannot be read as an image: {reason}") from error


class Checked:
    """A user's Dataset of (x, label), x of one shape; UserError, with `where` it is from, for any other item."""

    def __init__(self, dataset, where, classes, imports):
        self.dataset, self.where, self.classes, self.imports, self.shape = dataset, where, classes, imports, None

    def __len__(self):
        return len(self.dataset)

    def named(self):
        """Nothing: what the items hold is not read before training."""
        return []

    def __getitem__(self, index):
        where = f"item {index} of {self.where}"
        try:
            with self.imports:
                item = self.dataset[index]
        except Exception as error:  # in the user's code
            raise UserError(f"{where}: {type(error).__name__}: {error}") from error
        if not (isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], (torch.Tensor, np.ndarray))):
            inside = f" of {', '.join(type(part).__name__ for part in item)}" if isinstance(item, (tuple, list)) else ""
            raise UserError(f"{where} must be (x, label) with a tensor x, not a {type(item).__name__}{inside}")
        x, label = torch.as_tensor(item[0]), item[1]
        try:
            label = operator.index(label)
        except TypeError:
            label = -1
        if not 0 <= label < self.classes:
            raise UserError(f"{where} must have an integer label from 0 to {self.classes - 1}, not {item[1]!r}")
        self.shape = self.shape or x.shape
        if x.shape != self.shape:
            raise UserError(f"{where} must be {tuple(self.shape)} as the first one, not {tuple(x.shape)}")
        return x, label


@contextlib.contextmanager
def seeded(number):
    """Inside, the generators of torch (on the CPU), numpy and Python start from `number`; then they go on as before."""
    of_numpy, of_python = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(number)  # the CPU's only: a CUDA generator may be drawing dropout
        np.random.seed(number % 2**32)
        random.seed(number)
        try:
            yield
        finally:
            np.random.set_state(of_numpy)
            random.setstate(of_python)


class Drawn(torch.utils.data.Dataset):
    """Items `kept` of a Dataset, indexed by (i, draw): what is random in one is a function of `draw`, in any worker.

    `labels` are theirs, where it is not -1.
    """

    def __init__(self, dataset, kept, labels=None):
        self.dataset, self.kept = dataset, kept
        self.labels = np.full(len(kept), -1) if labels is None else labels

    def __len__(self):
        return len(self.kept)

    def __getitem__(self, key):
        index, draw = key
        with seeded(draw):
            x, label = self.dataset[int(self.kept[index])]
        return x, label if self.labels[index] < 0 else int(self.labels[index])

    def __getitems__(self, keys):
        """A mini-batch; or the error, which would come from a worker with its traceback in place of its message."""
        try:
            x, y = torch.utils.data.default_collate([self[key] for key in keys])
            if torch.utils.data.get_worker_info():
                y.share_memory_()  # as x is: here, where a failure can be told
            return x, y
        except UserError as error:
            return error
        except RuntimeError as error:  # no shared memory
            return RuntimeError(str(error))


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


def start_worker(worker):
    """Only the main process handles signals. Its death is theirs: they hold its sockets, at which other ranks wait.

    A batch that cannot be sent ends the worker; the main process would wait for it for ever.
    """
    with contextlib.suppress(OSError, AttributeError):  # another system
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(
        lambda error, batch: os._exit(getattr(error, "errno", None) or 1))


def kill(workers, *_):
    for worker in workers:
        worker.kill()


class LoaderBatches:
    """epoch(e) yields x (B, ...), images in channels_last memory, and y (B,) int64 on the device."""

    def __init__(self, dataset, batch_size, device, workers, *, seed=0, shuffle=False):
        if multiprocessing.get_start_method() != "fork" and isinstance(dataset.dataset, Checked):
            workers = 0  # a process that is not forked cannot import the user's file by a name
        self.dataset, self.samples, self.device, self.workers = dataset, len(dataset), device, []
        self.sizes = batch_sizes(self.samples, batch_size)
        self.order = Order(self.samples, batch_size, seed, shuffle)
        self.loader = torch.utils.data.DataLoader(
            dataset, batch_sampler=self.order, num_workers=workers, pin_memory=torch.device(device).type == "cuda",
            collate_fn=torch.utils.data.default_convert, persistent_workers=workers > 0, worker_init_fn=start_worker,
            generator=torch.Generator(),  # its own, so that seeding workers does not consume the global generator
        )

    def __len__(self):
        return len(self.sizes)

    def epoch(self, epoch):
        self.order.current = epoch
        for x, y in self.batches():
            layout = torch.channels_last if x.ndim == 4 else torch.preserve_format
            yield x.to(self.device, non_blocking=True, memory_format=layout), y.to(self.device, non_blocking=True)

    def batches(self):
        """The loader's; UserError that names an image that cannot be read, or the limit at which workers fail."""
        try:
            for batch in self.start():
                if isinstance(batch, Exception):
                    raise batch
                yield batch
        except UserError:
            raise
        except Exception as error:  # where a worker is gone torch, pickle and sockets each have a type for it
            if not self.loader.num_workers:
                raise
            reason = self.failure(error)
            kill(self.workers)  # one may have died with a lock that the others wait for
            atexit.register(kill, [], error)  # keeps it till then: one that has started by half is noisy when it goes
            raise UserError(f"--workers {self.loader.num_workers}: {reason}; try fewer, or --workers 0") from error

    def start(self):
        """An iterator over the loader; the first one starts the workers."""
        others, handler = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
        try:
            return iter(self.loader)
        finally:
            if new := [process for process in multiprocessing.active_children() if process not in others]:
                self.workers = new
                # at exit multiprocessing sends SIGTERM, which they ignore, and waits for them; this comes before
                atexit.register(kill, new)
            if threading.current_thread() is threading.main_thread():
                # torch's handler raises wherever the main process is when a worker dies, in the middle of a save, say;
                # without it the next batch does, within 5 s
                signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)

    def failure(self, error):
        """Why the workers have failed, in a few words."""
        multiprocessing.connection.wait([process.sentinel for process in self.workers], timeout=1)  # one may be dying
        codes = {process.exitcode for process in self.workers} - {None, 0}
        reason = str(error).split("\n")[0]
        if "open files" in reason or "ancdata" in reason or errno.EMFILE in codes:
            return f"too many open files (ulimit -n is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]})"
        if "shared memory" in reason or codes & {-signal.SIGBUS, errno.ENOSPC}:
            size = shutil.disk_usage("/dev/shm").total / 2**20
            return f"the mini-batches do not fit into shared memory (/dev/shm has {size:,.0f} MB)"
        if isinstance(error, BlockingIOError) or "new thread" in reason:
            return f"too many processes (ulimit -u, or the limit of a container; {reason})"
        killed = [signal.Signals(-code).name for code in codes if code < 0]
        return f"a data loading process was ended by {killed[0]} (out of memory?)" if killed else reason
