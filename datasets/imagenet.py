"""ImageNet, or any folder laid out like it: train/<class>/*.JPEG and val/<class>/*.JPEG, through DataLoader workers.

Training: RandomResizedCrop(224) and flip; evaluation: Resize(256), CenterCrop(224); both normalised.
"""
import atexit
import contextlib
import ctypes
import errno
import multiprocessing.connection
import multiprocessing.queues
import os
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
    content = [os.fsencode(f"{path}\t{label}\n") for folder in (train, test) for path, label in folder.named()]
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
    if not os.path.isfile(path):
        raise ValueError("there is no such file")  # a pipe would be waited for
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
        directory = Path(root) / split

        def is_image(path):
            return is_image_file(path) and f"{os.sep}." not in path[len(str(directory)):]

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


class FolderBatches:
    """epoch(e) yields x (B, 3, 224, 224) float32 in channels_last memory and y (B,) int64 on the device."""

    def __init__(self, folder, batch_size, device, workers, *, seed=0, shuffle=False):
        self.samples, self.device, self.workers = len(folder.samples), device, []
        self.sizes = batch_sizes(self.samples, batch_size)
        self.order = Order(self.samples, batch_size, seed, shuffle)
        self.loader = torch.utils.data.DataLoader(
            folder, batch_sampler=self.order, num_workers=workers, pin_memory=torch.device(device).type == "cuda",
            collate_fn=torch.utils.data.default_convert, persistent_workers=workers > 0, worker_init_fn=start_worker,
            generator=torch.Generator(),  # its own, so that seeding workers does not consume the global generator
        )

    def __len__(self):
        return len(self.sizes)

    def epoch(self, epoch):
        self.order.current = epoch
        for x, y in self.batches():
            x = x.to(self.device, non_blocking=True, memory_format=torch.channels_last)
            yield x, y.to(self.device, non_blocking=True)

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
