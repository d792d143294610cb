"""Random command lines, files, image folders and environments: each ends well, or in one line and exit status 1 or 2;
never in a traceback, and never not at all.

A damaged file must be refused, or give the very values that were saved: training on other ones would be a lie.
"""
import contextlib
import io
import multiprocessing
import os
import shutil
import signal
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from runs import network
from small_networks import small

import datasets
import report
import train_pbfgs
import train_psgd
import train_sgd
import utils
from dldr.errors import UserError
from dldr.files import load_json
from dldr.snapshots import load_window

COMMAND_LINES, SNAPSHOTS, ARRAYS, FOLDERS, ENVIRONMENTS = 200, 200, 100, 60, 100
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def often(n):
    """Run a test with n cases, the same ones every time; and, if slow tests are asked for, with 10 n other ones."""
    return pytest.mark.parametrize("n", [n, pytest.param(10 * n, marks=pytest.mark.slow)])


def cases(n, usual):
    return settings(max_examples=n, derandomize=n <= usual, deadline=None, database=None, suppress_health_check=QUIET)


# ---------------------------------------------------------------------------------------------------- command lines

HUGE = "9" * 30
WORDS = ["", "x", "-1", "0", "1", "nan", "inf", "1e400", "--", "-h", HUGE, "ä", "../..", "a b", "n" * 300,
         "\udcff"]  # the last: a byte that is not UTF-8
FLAGS = {  # a flag -> the values that might follow it; None is none
    "--datasets": ["digits", "digit", "ImageNet", "CIFAR10", "npz:FILE", "folder:SAMPLED@8", "nowhere.py:f"],
    "--arch": ["resnet7", "squeezenet", "vgg", "nowhere.py:f", "FILE.py:"],
    "-b": ["64", "7", "100000"], "--lr": ["0.1", "1e38", "0"], "--epochs": ["0", "1", "2"],
    "--start-epoch": ["0", "1", "5"], "--accumulate": ["1", "2", "9"], "--randomseed": ["0", "7"],
    "--corrupt": ["0", "0.5", "1"], "--workers": ["0"], "--device": ["cpu", "auto", "cuda:7", "mps"],
    "--resume": ["auto", "nowhere.pt", "SAMPLED/0.pt", "SAMPLED/sgd_checkpoint.pt"], "--save-every": ["1", "3"],
    "--print-freq": ["1"], "--evaluate": [None], "--half": [None], "--deterministic": [None],
    "--timeout": ["5"], "--sync-bn": [None], "--overwrite": [None],
    "--save-dir": ["SAMPLED", "NEW", "FILE", "FILE/below"], "--data": ["NEW", "FILE", "BAD"],
}
SUBSPACE = {"--n_components": ["1", "3", "5", "6", "0.9"], "--start": ["first", "last", "mean"],
            "--basis": ["pca", "spherical", "random", "snapshots", "SAMPLED/0.pt", "FILE"],
            "--save-basis": ["NEW/b.pt", "FILE/b.pt"], "--params_start": ["0", "1", "4"],
            "--params_end": ["6", "5", "7"], "--params_step": ["1", "2"], "--output-dir": ["NEW", "FILE", "SAMPLED"],
            "--basis-memory": ["1e-5", "1"], "--shard-basis": ["auto", "on"],
            "--allow-mismatch": ["corrupt", "arch,labels"]}
OF_SCRIPT = {
    train_sgd: {"--optimizer": ["sgd", "adam", "lion"], "--momentum": ["0.9"], "--wd": ["1e-4"],
                "--milestones": ["1", "0"], "--pretrained": [None, "SAMPLED/0.pt", "nowhere.pt"],
                "--snapshot-dtype": ["bfloat16"], "--samples-per-epoch": ["1", "2", "50"]},
    train_psgd: {**SUBSPACE, "--momentum": ["0.5"], "--milestones": ["1"]},
    train_pbfgs: {**SUBSPACE, "--alpha": ["0.01", "1e38"], "--gamma": ["0.5"]},
    report: {"--table": ["NEW/t.md", "FILE/t.md", "t"], "--figures": ["NEW", "FILE", "."],
             "--csv": ["NEW/t.csv", "t.csv"]},
}


@st.composite
def command_lines(draw):
    """(script, arguments), the directories by name. Most values are valid, so that some lines get far."""
    script = draw(st.sampled_from(list(OF_SCRIPT)))
    if script is report:
        flags, argv = OF_SCRIPT[script], [draw(st.sampled_from(["SAMPLED", "NEW", "FILE", "--"]))]
    else:
        flags = {**FLAGS, **OF_SCRIPT[script]}
        argv = ["--datasets", "digits", "--arch", network("small"), "--smalldatasets", "0.05", "--epochs", "1",
                "--device", "cpu", "--save-dir", "NEW" if script is train_sgd else "SAMPLED"]
        if script is not train_sgd:
            argv += ["--params_end", "6", "--n_components", "3", "--output-dir", "NEW", "--allow-mismatch",
                     "smalldatasets,corrupt,labels"]
    for flag in draw(st.lists(st.sampled_from(sorted(flags)), max_size=4)):
        usual = st.sampled_from(flags[flag])
        value = draw(st.one_of(usual, usual, usual, st.sampled_from(WORDS)))
        if flag == "--epochs" and value == HUGE:
            continue  # a valid wish, and a long one
        argv += [flag] if value is None else [flag, value]
    return script, argv + draw(st.sampled_from([[], [], [], ["--no-such-flag"], ["stray"]]))


class Hangs(BaseException):
    """Which nothing catches."""


def ring(*_):
    for process in multiprocessing.active_children():
        process.kill()
    raise Hangs


def outcome(script, argv):
    """Run the script as its command line would, for at most a minute; (exit status, lines of its error message)."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))  # which refuse what is not UTF-8
    status = 0
    signal.signal(signal.SIGALRM, ring)
    signal.alarm(60)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *argv])
        try:
            utils.run_script(script.parse_args, script.main)
        except SystemExit as stop:
            status = stop.code or 0
        finally:
            signal.alarm(0)
    err.seek(0)
    return status, [line for line in err.read().splitlines() if not line.startswith(("note: ", "warning: "))]


@often(COMMAND_LINES)
def test_command_lines(sampled, tmp_path, n):
    copy = shutil.copytree(sampled, tmp_path / "sampled")  # some of the lines write there
    places = {"SAMPLED": copy, "NEW": tmp_path / "new", "FILE": tmp_path / "file", "BAD": tmp_path / "bad"}
    places["FILE"].write_text("in the way")
    places["BAD"].mkdir()
    (places["BAD"] / "cifar10.npz").write_bytes(b"PK\x03\x04 not really")
    statuses = []

    @cases(n, COMMAND_LINES)
    @given(command_lines())
    def check(case):
        script, argv = case
        shutil.rmtree(places["NEW"], ignore_errors=True)
        shutil.copytree(sampled, copy, dirs_exist_ok=True)  # what --overwrite has removed
        for name, path in places.items():
            argv = [argument.replace(name, str(path)) for argument in argv]
        status, lines = outcome(script, argv)
        statuses.append(status)
        assert status in (0, 1, 2)
        assert status == 0 or len(lines) == 1 and " error: " in lines[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "download", refuse)  # what is tested does not depend on the network
        patch.chdir(tmp_path)
        check()
    assert len(statuses) >= n and {0, 1, 2} <= set(statuses)


def refuse(name, root, hint):
    raise UserError(f"--data {root}: {name} is not there; {hint}")


# ------------------------------------------------------------------------------------------------------ damaged files


@st.composite
def damages(draw):
    """A function bytes -> damaged bytes: cut, with bytes changed, with a stretch lost or put in, or of zeros."""
    kind = draw(st.sampled_from(["cut", "cut", "change", "change", "change", "lose", "insert", "zero"]))
    places = draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4))
    fiftieth, mask, length = draw(st.integers(0, 49)), draw(st.integers(1, 255)), draw(st.integers(1, 5000))

    def damage(data):
        data, at = bytearray(data), int(places[0] * len(data))
        if kind == "cut":
            return bytes(data[: len(data) * fiftieth // 50])
        if kind == "change":
            for place in places:
                # every other one near the end, where a zip file has its table of contents
                data[-1 - int(place * 2000) if mask % 2 else int(place * len(data))] ^= mask
        elif kind == "lose":
            del data[at : at + length]
        elif kind == "insert":
            data[at:at] = bytes([mask]) * length
        else:
            data[at : at + length] = bytes(len(data[at : at + length]))
        return bytes(data)

    damage.__name__ = f"{kind}_{fiftieth}_{mask}_{length}_{places}"
    return damage


def is_refused(path, read, valid):
    """Whether read() fails in a line that names the file; else valid() of what it returns must hold."""
    try:
        value = read()
    except UserError as error:
        assert str(path) in str(error)
        return True
    assert valid(value)
    return False


@often(SNAPSHOTS)
def test_snapshots(sampled, tmp_path, n):
    model = small(10)
    paths = [tmp_path / f"{i}.pt" for i in range(2)]
    for path in paths:
        shutil.copy(sampled / path.name, path)
    intact, whole = load_window(paths, model).clone(), paths[1].read_bytes()
    refused = []

    @cases(n, SNAPSHOTS)
    @given(damages())
    def check(damage):
        paths[1].write_bytes(damage(whole))
        refused.append(is_refused(paths[1], lambda: load_window(paths, model), intact.equal))

    check()
    assert sum(refused) > n // 2


def test_every_fiftieth_of_a_snapshot_is_refused(sampled, tmp_path):
    model, whole = small(10), (sampled / "1.pt").read_bytes()
    for fiftieth in range(50):
        (tmp_path / "1.pt").write_bytes(whole[: len(whole) * fiftieth // 50])
        with pytest.raises(UserError, match=r"snapshot .*1\.pt cannot be read"):
            load_window([tmp_path / "1.pt"], model)


SHAPES = st.sampled_from([(20, 32, 32, 3), (20, 32, 32, 3), (20, 3, 32, 32), (20, 32, 32), (0, 32, 32, 3), (20,), ()])
DTYPES = st.sampled_from(["u1", "u1", "u1", "f4", "i8", "O", "U3", "M8[s]", "c16"])


@st.composite
def archives(draw):
    """Arrays of a data set as somebody might have stored them: wrong shapes, types, labels, names."""
    arrays = {}
    for split in ("train", "test"):
        arrays[f"x_{split}"] = np.zeros(draw(SHAPES), dtype=draw(DTYPES))
        labels = draw(st.lists(st.integers(-1, 10), min_size=20, max_size=20))
        arrays[f"y_{split}"] = np.array(labels, dtype=draw(st.sampled_from(["i8", "i8", "i4", "f8", "O", "i8"])))
    for name in draw(st.lists(st.sampled_from(sorted(arrays)), max_size=1)):
        arrays[name.upper()] = arrays.pop(name)
    return arrays


@often(ARRAYS)
def test_arrays(tmp_path, n):
    """Half of the cases damage a good file, half store arrays that may be wrong."""
    path, rng = tmp_path / "cifar10.npz", np.random.default_rng(0)
    good = {"x_train": rng.integers(0, 256, (20, 32, 32, 3), np.uint8), "y_train": rng.integers(0, 10, 20)}
    good |= {"x_test": good["x_train"][:5], "y_test": good["y_train"][:5]}
    np.savez(path, **good)
    whole, refused, read = path.read_bytes(), [], datasets.SOURCES["CIFAR10"].read

    @cases(n // 2, ARRAYS)
    @given(damages())
    def damaged(damage):
        path.write_bytes(damage(whole))
        refused.append(is_refused(path, lambda: read(tmp_path), lambda arrays: all(
            np.array_equal(array, good[name]) for array, name in zip(arrays, good, strict=True))))

    @cases(n // 2, ARRAYS)
    @given(archives())
    @example({"x_train": np.zeros((20, 32, 32, 3), np.uint8), "y_train": np.arange(20) % 10,
              "x_test": np.zeros((2, 32, 32, 3), np.uint8), "y_test": np.array([0, 9])})
    def stored(arrays):
        def valid(found):
            return all(images.shape == (len(labels), 32, 32, 3) and images.dtype == np.uint8 and len(labels)
                       and 0 <= labels.min() <= labels.max() <= 9 for images, labels in (found[:2], found[2:]))

        np.savez(path, **arrays)
        refused.append(is_refused(path, lambda: read(tmp_path), valid))

    damaged()
    stored()
    assert sum(refused) > n // 2


# ------------------------------------------------------------------------------------------------------ image folders


def encoded(mode, form, dtype=np.uint8):
    """A small picture as bytes."""
    pixels = np.random.default_rng(0).integers(0, 200, (20, 24, 4)).astype(dtype)
    image = Image.fromarray(pixels[..., 0] if dtype != np.uint8 else pixels)
    file = io.BytesIO()
    (image if dtype != np.uint8 else image.convert(mode)).save(file, form)
    return file.getvalue()


def chunk(name, content):
    """Of a PNG file."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


JPEG = encoded("RGB", "JPEG")
PICTURES = {  # a name and what is in the file: good ones, whatever the name says, and some that cannot be read
    "a.JPEG": JPEG, "b.png": encoded("P", "PNG"), "c.PNG": encoded("RGBA", "PNG"), "d.bmp": encoded("1", "BMP"),
    "e.webp": encoded("RGB", "WEBP"), "f.tif": encoded("CMYK", "TIFF"), "g.jpg": encoded("LA", "PNG"),
    "h.png": encoded("", "PNG", np.uint16), "ä b\n.jpg": JPEG, "\udcff.JPEG": JPEG, "n" * 250 + ".jpg": JPEG,
}
UNREADABLE = {
    "empty.JPEG": b"", "text.jpg": b"no picture", "cut.JPEG": JPEG[: len(JPEG) // 2], "zeros.png": bytes(999),
    "float.tif": encoded("", "TIFF", np.float32),
    "huge.png": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
                + chunk(b"IDAT", bytes(9)),
}
IGNORED = {"._0.JPEG": b"Mac OS X", ".DS_Store": b"", "Thumbs.db": b"", "notes.txt": b"", "x.JPEG.part": JPEG}
FILES = {**PICTURES, **UNREADABLE, **IGNORED}
OTHERS = {  # what else may be there: a name and a function that makes it
    "folder.JPEG": Path.mkdir, "empty": Path.mkdir, "pipe.JPEG": os.mkfifo, "loop": lambda path: path.symlink_to("."),
    **dict.fromkeys(("gone.png", "gone"), lambda path: path.symlink_to("nowhere")),
    **dict.fromkeys((".ipynb_checkpoints", "c 1", "-x", "\udcfe", "new\nline", "below"),
                    lambda path: path.mkdir() or (path / "0.JPEG").write_bytes(JPEG)),
}
PLACES = ["", "train", "val", "train/c0", "train/c0", "train/c1", "val/c0", "val/c1"]


def tree(root):
    for place in PLACES[3:]:
        (root / place).mkdir(parents=True, exist_ok=True)
        for i in range(2):
            (root / place / f"{i}.JPEG").write_bytes(JPEG)


def images_of(root, split):
    """The image files of each class, by the documentation: what is hidden is no class and no image."""
    found = {}
    for place in (root / split).iterdir() if (root / split).is_dir() else ():
        if place.name[0] != "." and place.is_dir():
            found[place.name] = [Path(folder, name) for folder, _, names in os.walk(place, followlinks=True)
                                 for name in names if "/." not in f"{folder}/{name}"[len(str(root)):]
                                 and Path(name).suffix.lower() in (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".tif")]
    return found


@often(FOLDERS)
def test_folders(tmp_path, n):
    root, statuses = tmp_path / "all" / "images", []

    @cases(n, FOLDERS)
    @given(st.lists(st.tuples(st.sampled_from(PLACES), st.sampled_from([None, *FILES, *OTHERS])), max_size=3),
           st.sampled_from([0, 0, 0, 0, 0, 1]))
    @example([("train/c0", "pipe.JPEG")], 1)
    @example([("train", "\udcfe"), ("val", "\udcfe")], 0)
    def check(odd, workers):
        shutil.rmtree(root.parent, ignore_errors=True)
        tree(root)
        for place, name in odd:
            path = root / place / (name or "")
            with contextlib.suppress(FileExistsError, FileNotFoundError, NotADirectoryError):
                if name is None:  # not there, or a file
                    shutil.rmtree(path)
                    path.write_bytes(b"") if len(odd) % 2 else None
                elif name in FILES:
                    path.write_bytes(FILES[name])
                else:
                    OTHERS[name](path)
        classes = {split: images_of(root, split) for split in ("train", "val")}
        files = [path for split in classes.values() for paths in split.values() for path in paths]
        bad = {str(path) for path in files if not path.is_file() or path.name in UNREADABLE}
        status, lines = outcome(train_sgd, [
            "--datasets", "ImageNet", "--data", str(root), "--arch", network("small"), "--epochs", "1", "--device",
            "cpu", "--batch-size", "8", "--samples-per-epoch", "1", "--workers", str(workers), "--save-dir",
            str(root.parent / "run")])
        statuses.append(status)
        if classes["train"].keys() != classes["val"].keys() or not all(
                paths for split in classes.values() for paths in [*split.values(), split]):
            assert status == 1 and len(lines) == 1 and f"--data {root}" in lines[0]
        elif bad:
            assert status == 1 and len(lines) == 1 and any(utils.one_line(path) in lines[0] for path in bad)
        else:
            assert (status, lines) == (0, [])
            data = load_json(root.parent / "run" / "sgd_summary.json")["data"]
            assert [data["training"], data["test"]] == [sum(map(len, split.values())) for split in classes.values()]

    check()
    assert {0, 1} == set(statuses)


# -------------------------------------------------------------------------------------------------- environments

VARIABLES = {  # one that is not drawn is not set
    "WORLD_SIZE": ["1", "2", "4", "0", "-1", "four", "1.5", " 1", "²", HUGE, ""], "RANK": ["0", "1", "7", "x", ""],
    "LOCAL_RANK": ["0", "x", ""], "MASTER_ADDR": ["127.0.0.1", ""], "MASTER_PORT": ["29500", "x", "99999", ""],
    "DLDR_DATA": [*WORDS, "~/nowhere", "n" * 5000],
}


@often(ENVIRONMENTS)
def test_environments(tmp_path, n, monkeypatch):
    """Without a group of processes that can begin; see test_distributed.py for one in which the others do not come."""
    statuses = []

    @cases(n, ENVIRONMENTS)
    @given(st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in VARIABLES.items()}),
           st.sampled_from(["digits", "CIFAR10"]))
    @example({"WORLD_SIZE": "4"}, "digits")
    @example({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "digits")
    @example({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, "digits")
    @example({"WORLD_SIZE": "2", "RANK": "7", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, "digits")
    def check(variables, data):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        size = variables.get("WORLD_SIZE", "1")
        if size in ("2", "4") and variables.get("RANK") in ("0", "1") and variables.get("MASTER_PORT") == "29500":
            return
        status, lines = outcome(train_sgd, [
            "--datasets", data, "--arch", network("small"), "--smalldatasets", "0.05", "--epochs", "1", "--device",
            "cpu", "--save-dir", str(tmp_path / "run")])
        statuses.append(status)
        if size == "1" and data == "digits":
            assert (status, lines) == (0, [])
        else:
            assert status in (1, 2) and len(lines) == 1
            assert ("WORLD_SIZE" if size != "1" else "too long" if len(variables.get("DLDR_DATA", "")) > 255
                    else "--data") in lines[0]

    monkeypatch.setattr(datasets, "download", refuse)
    monkeypatch.chdir(tmp_path)
    check()
    assert {0, 1} <= set(statuses)
