"""Image folders: which files and samples are taken, what is refused, and how a run ends if an image or worker fails."""
import errno
import os
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import runs
import torch
from runs import ROOT, draw, epoch, network, run, same

from dldr import engine
from dldr.errors import UserError


def load(root, seed=1, **options):
    return runs.load("ImageNet", root, seed=seed, batch_size=4, **options)


def samples(data):
    """(path, label) of the training samples."""
    drawn = data.train.loader.dataset
    return [(drawn.dataset.samples[i][0], label) for i, label in zip(drawn.kept, drawn.labels.tolist(), strict=True)]


# ------------------------------------------------------------------------------------------- which samples are taken


def test_a_part_is_a_fixed_draw_over_all_classes(folder):
    root = folder(classes=10, train=20, val=1)
    part = samples(load(root, part=0.3))
    assert len(part) == 60 and {label for _, label in part} == set(range(10))
    assert part == samples(load(root, 2, part=0.3))  # stages may have different seeds
    assert set(samples(load(root, part=0.1))) < set(part) < set(samples(load(root)))


def test_noise_is_spread_over_all_classes_by_the_seed(folder):
    root = folder(classes=10, train=40, val=1)
    clean, noisy, other = (samples(load(root, seed, corrupt=share)) for seed, share in ((1, 0), (1, 0.5), (2, 0.5)))
    assert noisy == samples(load(root, 1, corrupt=0.5)) and noisy != other
    assert [path for path, _ in noisy] == [path for path, _ in clean]
    changed = [before for (_, before), (_, after) in zip(clean, noisy, strict=True) if before != after]
    assert set(changed) == set(range(10)) and 140 <= len(changed) <= 200  # 200 are redrawn, a tenth of them alike


@pytest.mark.parametrize(("name", "part"), [("ImageNet", 0.06), ("digits", 0.002)])
def test_a_part_without_some_classes_says_so(folder, capsys, name, part):
    root = folder(classes=10, train=10, val=1)
    _, labels = epoch(runs.load(name, root, part=part).train)
    lacking = 10 - len(labels.unique())
    assert f"warning: --smalldatasets {part} keeps no sample of {lacking} of 10 classes\n" == capsys.readouterr().err
    runs.load(name, root, part=0.9)
    assert not capsys.readouterr().err


def test_hidden_files_and_folders_are_no_images_and_no_classes(folder):
    root = folder()
    data = load(root)
    for split in ("train", "val"):
        shutil.copytree(root / split / "c0", root / split / ".ipynb_checkpoints")
        shutil.copytree(root / split / "c0", root / split / "c0" / ".ipynb_checkpoints")
        (root / split / "c1" / "._0.JPEG").write_bytes(b"Mac OS X")
    again = load(root)
    assert again.classes == 2 and samples(again) == samples(data) and again.test.samples == data.test.samples
    shutil.move(root, root.parent / ".images")  # where the data lie may be hidden
    assert load(root.parent / ".images").train.samples == 8


def test_class_folders_that_differ_are_named(folder):
    root = folder()
    shutil.copytree(root / "train" / "c0", root / "train" / "cat")
    shutil.move(root / "val" / "c1", root / "val" / "dog")
    with pytest.raises(UserError, match="only in train/: c1, cat; only in val/: dog"):
        load(root)


# ----------------------------------------------------------------------------------------------- which are refused


def first_pixels(root):
    (x, _), *_ = load(root).test.epoch(0)
    return x[0]


def test_16_bit_png_looks_as_with_8_bits(folder):
    root = folder(classes=1)
    grey = np.random.default_rng(0).integers(0, 256, (256, 256), dtype=np.uint8)
    images = []
    for pixels in (grey, grey.astype(np.uint16) * 257):
        shutil.rmtree(root / "val" / "c0")
        draw(root / "val" / "c0" / "0.png", pixels)
        images.append(first_pixels(root))
    assert torch.equal(*images)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_other_depths_are_refused_by_name(folder, dtype):
    root = folder(classes=1)
    path = draw(root / "val" / "c0" / "0.tif", np.full((40, 48), 200, dtype))
    (path.parent / "0.JPEG").unlink()
    with pytest.raises(UserError, match=f"{path}.*8 bits"):
        first_pixels(root)


def test_npz_of_images_scaled_to_one_is_refused(tmp_path):
    arrays = {"x_train": np.full((20, 32, 32, 3), 9, np.uint8), "x_test": np.ones((10, 32, 32, 3), np.uint8)}
    np.savez(tmp_path / "cifar10.npz", **arrays, y_train=np.zeros(20, int), y_test=np.zeros(10, int))
    with pytest.raises(UserError, match="x_test.*0 to 255.*largest is 1"):
        runs.load("CIFAR10", tmp_path)


def test_real_photographs(tmp_path):
    archive = ROOT.parent / "shared" / "data" / "imagenette_mini.tar"
    if not archive.is_file():
        pytest.skip("no imagenette_mini.tar")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    data = load(tmp_path / "imagenette_mini", part=0.02)
    (x, y), *_ = data.train.epoch(0)
    assert data.classes == 10 and data.train.samples == 16 and x.shape == (4, 3, 224, 224) and x.std() > 0.5


# --------------------------------------------------------------------------------------------- through the scripts


def imagenet(method, root, directory, arch, *more):
    return run(method, ["--datasets", "ImageNet", "--data", str(root), "--arch", arch, "--batch-size", "4", "--workers",
                        "1", "--device", "cpu", "--save-dir", str(directory), *more])


def test_resume_is_exact_with_dropout_and_workers(folder, tmp_path):
    """Dropout masks and augmentation are functions of (seed, epoch), so a second epoch needs no first one before it."""
    root = folder(train=6)
    for name, epochs in (("whole", "2"), ("cut", "1"), ("cut", "2")):
        imagenet("sgd", root, tmp_path / name, network("dropout"), "--lr", "0.001", "--samples-per-epoch", "1",
                 "--epochs", epochs, "--resume", "auto")
    assert same(tmp_path / "whole" / "2.pt", tmp_path / "cut" / "2.pt")


def test_sgd_then_psgd_with_a_network_of_torchvisions(folder, tmp_path):
    flags = folder(train=6), tmp_path / "run", "squeezenet1_1", "--epochs", "1"
    imagenet("sgd", *flags, "--lr", "0.001", "--samples-per-epoch", "3")
    assert sorted(p.name for p in (tmp_path / "run").glob("[0-9]*.pt")) == ["0.pt", "1.pt", "2.pt", "3.pt"]
    summary = imagenet("psgd", *flags, "--params_end", "4", "--n_components", "2")
    assert summary["snapshots"] == 4 and summary["parameters_trained"] == 2 and summary["test_top5_last"] == 100


def test_top_5_counts_the_five_largest_logits():
    torch.manual_seed(0)
    model, x, y = torch.nn.Linear(4, 9), torch.randn(50, 4), torch.randint(9, (50,))
    larger = (model(x) > model(x).gather(1, y[:, None])).sum(1)  # logits than that of the label
    result = engine.evaluate(model, [(x[:30], y[:30]), (x[30:], y[30:])], top5=True)
    assert result["accuracy"] == pytest.approx(100 * float((larger == 0).float().mean()))
    assert result["top5"] == pytest.approx(100 * float((larger < 5).float().mean())) and 30 < result["top5"] < 90


# ------------------------------------------------------------------------------------------------- when something fails

NETWORK = """
import multiprocessing, os, time
from torch import nn

class Network(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))

    def forward(self, x):
        {forward}
        return super().forward(x)
"""
KILL_WORKERS = "[process.kill() for process in multiprocessing.active_children()]"
SLOW_EVALUATION = "time.sleep(0 if self.training or int(os.environ['RANK']) else 4)"


def train(tmp_path, root, *, workers=1, forward="", before="", torchrun=False):
    """A run of train_sgd.py of two epochs, two batches each; (exit status, its lines on stderr, whether it saved)."""
    network = tmp_path / "network.py"
    network.write_text(NETWORK.format(forward=forward or "pass"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if torchrun else []
    command = [sys.executable, *launcher, str(ROOT / "train_sgd.py"), "--datasets", "ImageNet", "--data", str(root),
               "--arch", f"{network}:Network", "--batch-size", "4", "--samples-per-epoch", "1", "--epochs", "2",
               "--workers", str(workers), "--device", "cpu", "--save-dir", str(tmp_path / "run")]
    done = subprocess.run(["bash", "-c", f"{before} exec \"$@\"", "bash", *command], capture_output=True, text=True,
                          timeout=90, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path)
    return done.returncode, done.stderr.splitlines(), (tmp_path / "run" / "sgd_checkpoint.pt").is_file()


def truncate(path):
    os.truncate(path, 300)


def vanish(path):
    path.unlink()
    path.symlink_to("nowhere")  # listed, but not there


@pytest.mark.parametrize(("harm", "image"), [(truncate, "train/c1/2.JPEG"), (vanish, "val/c0/1.JPEG")])
def test_an_image_that_cannot_be_read_is_named(folder, tmp_path, harm, image):
    root = folder()
    harm(root / image)
    status, (line,), saved = train(tmp_path, root)
    assert status == 1 and saved and line.startswith("train_sgd.py: error: ") and str(root / image) in line


def test_a_killed_worker_ends_the_run(folder, tmp_path):
    status, (line,), saved = train(tmp_path, folder(), forward=KILL_WORKERS)
    assert status == 1 and saved and "--workers 0" in line
    assert "SIGKILL" in line or "Connection reset" in line  # if a batch of it was being read


def test_an_error_elsewhere_ends_the_run_and_its_workers(folder, tmp_path):
    status, lines, saved = train(tmp_path, folder(), forward="if len(x) > 2: raise KeyError('bug')")
    assert status == 1 and saved and lines[-1] == "KeyError: 'bug'"


SMALL_SHM = "mount -t tmpfs -o size=1m none /dev/shm &&"


def test_a_small_shared_memory_is_named(folder, tmp_path):
    if subprocess.run(["unshare", "-Urm", "bash", "-c", f"{SMALL_SHM} true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces for this user")
    before = f"[ $UNSHARED ] || UNSHARED=1 exec unshare -Urm bash -c '{SMALL_SHM} exec \"$@\"' bash \"$@\";"
    status, (*_, line), saved = train(tmp_path, folder(), before=before)  # in torch 2.4 the worker says something first
    assert status == 1 and saved and "/dev/shm" in line and "1 MB" in line and "--workers 0" in line


def test_a_low_limit_on_open_files_is_named(folder, tmp_path):
    """Not all of the workers start, and a checkpoint cannot be written either."""
    status, lines, _ = train(tmp_path, folder(), before="ulimit -n 32;", workers=4)
    assert status == 1 and "ulimit -n is 32" in lines[-1] and "--workers 0" in lines[-1]


@pytest.mark.parametrize(("function", "number", "words"), [
    ("os.fork", errno.EAGAIN, "too many processes"),
    ("multiprocessing.reduction.DupFd", errno.EMFILE, "too many open files")])  # where a worker sends a batch
def test_a_limit_met_on_the_way_is_named(folder, monkeypatch, function, number, words):
    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(function, fail)
    with pytest.raises(UserError, match=f"--workers 2: {words}.*--workers 0"):
        next(load(folder(), workers=2).train.epoch(0))


def test_the_other_rank_ends_too(folder, tmp_path):
    """Also with long to evaluate: torchrun kills after 30 s those that do not end."""
    root = folder(val=20)
    truncate(image := root / "val" / "c0" / "10.JPEG")  # the third of the first mini-batch, so rank 1's
    status, lines, saved = train(tmp_path, root, forward=SLOW_EVALUATION, torchrun=True)
    errors = [line for line in lines if line.startswith("train_sgd.py: ")]
    assert status == 1 and saved and len(errors) == 1 and str(image) in errors[0]
