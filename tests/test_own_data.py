"""Data of one's own: npz:FILE, folder:DIR@SIZE and FILE.py:FUNCTION; what is recorded, compared and refused."""
import sys
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from runs import ROOT, SCRIPTS, epoch, load
from test_data import write_npz
from test_folders import samples

import report
import trajectory
from dldr import userfile
from dldr.errors import UserError

FILE = """
import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

rng = np.random.default_rng(0)
X, Y = rng.integers(0, 200, (60, 12, 10), np.uint8), np.arange(60) % 3
X[:, :4] += 25 * Y.astype(np.uint8)[:, None, None]

def grey():
    return X[:40], Y[:40], X[40:], Y[40:], 3

def augmented():
    return X[:40], Y[:40], X[40:], Y[40:], 3, "flip crop"

def tabular():
    return X[:40, 0] / 100, Y[:40].tolist(), torch.tensor(X[40:, 0] / 100), torch.tensor(Y[40:]), 3

class Noisy(TensorDataset):
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + torch.rand(1) + float(np.random.rand() + random.random()), y

def sets():
    x, y = torch.tensor(X[:, None] / 100).float(), torch.tensor(Y)
    return Noisy(x[:40], y[:40]), TensorDataset(x[40:], y[40:]), 3

def flat_net(num_classes):
    return nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, num_classes))

def norm_net(num_classes):
    return nn.BatchNorm1d(num_classes)

def frozen_net(num_classes):
    return flat_net(num_classes).requires_grad_(False)

def mixed_net(num_classes):
    net = flat_net(num_classes)
    net.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
    return net

def image_net(num_classes):
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(320, num_classes))
"""


# ------------------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("shape", [(12, 10), (12, 10, 1), (7, 20, 3)])
def test_npz_is_normalised_by_the_training_images_and_not_augmented(tmp_path, shape, monkeypatch):
    arrays = write_npz(tmp_path / "a.npz", shape)
    monkeypatch.setenv("HOME", str(tmp_path))
    data = load("npz:~/a.npz")
    assert (data.classes, data.train.samples, data.test.samples) == (3, 30, 9)
    train, test = (arrays[name].reshape(-1, *(*shape, 1)[:3]) / 255 for name in ("x_train", "x_test"))
    order = data.train.draws(3)[0]
    for batches, number, pixels in ((data.train, 3, train[order]), (data.test, 0, test)):
        x, _ = epoch(batches, number)
        normalised = (pixels - train.mean((0, 1, 2))) / train.std((0, 1, 2))
        torch.testing.assert_close(x.permute(0, 2, 3, 1).double(), torch.tensor(normalised), rtol=1e-4, atol=1e-5)
    assert torch.equal(epoch(data.train, 3)[1], order % 3) and data.example.shape == (2, *x.shape[1:])


def test_functions_return_arrays_or_datasets(own):
    file = own(FILE)
    module = {}
    exec(FILE, module)
    grey, augmented, tabular, sets = (load(f"{file}:{name}") for name in ("grey", "augmented", "tabular", "sets"))
    assert all((data.classes, data.train.samples, data.test.samples) == (3, 40, 20)
               for data in (grey, augmented, tabular, sets))
    assert not torch.equal(epoch(augmented.train)[0], epoch(grey.train)[0])
    assert torch.equal(epoch(augmented.test)[0], epoch(grey.test)[0])
    x, y = epoch(tabular.test)
    assert x.dtype == torch.float32 and torch.equal(x, torch.tensor(module["X"][40:, 0] / 100).float())
    assert torch.equal(epoch(sets.test)[0][:, 0], torch.tensor(module["X"][40:] / 100).float())
    assert torch.equal(y, torch.tensor(module["Y"][40:])) and torch.equal(epoch(sets.test)[1], y)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["np.uint8", "np.float64"])
def test_arrays_may_be_views_of_any_byte_order(own, kind):
    views = own(f"""
import numpy as np
X, Y = np.arange(4 * 75).reshape(4, 5, 5, 3).astype({kind}), np.array([0, 1, 0, 1])
X.flags.writeable = False
def plain(): return X[..., ::-1].copy(), Y, X[::-1].copy(), Y[::-1].copy(), 2
def views(): return X[..., ::-1], Y.astype(">i8"), X[::-1].astype(X.dtype.newbyteorder(">")), Y[::-1], 2
""")
    sets = [load(f"{views}:{name}") for name in ("plain", "views")]
    pairs = [[*epoch(data.train), *epoch(data.test)] for data in sets]
    assert all(torch.equal(a, b) for one, other in zip(*pairs, strict=True) for a, b in zip(one, other, strict=True))


def test_items_of_a_dataset_are_drawn_by_seed_and_epoch(own):
    """Whatever the workers; and a part and label noise are drawn as those of image folders."""
    name = f"{own(FILE)}:sets"
    here, there, other = load(name), load(name, workers=1), load(name, seed=2)
    torch.manual_seed(5)
    first = epoch(here.train, 2)
    torch.manual_seed(6)
    again = epoch(there.train, 2)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], epoch(other.train, 2)[0]) and not torch.equal(first[0], epoch(here.train, 3)[0])
    part, noisy = load(name, part=0.5).train, load(name, part=0.5, corrupt=0.5).train
    assert part.samples == 20 and (epoch(part)[1] != epoch(noisy)[1]).sum() in range(3, 11)
    assert set(part.dataset.kept.tolist()) < set(range(40)) and (np.diff(part.dataset.kept) != 1).any()


@pytest.mark.parametrize("function", ["split", "split_sets", "split_numpy"])
def test_a_split_is_the_same_in_every_stage(own, function):
    """No test sample of one stage is trained on in another, whatever the seed."""
    name = own(FILE + """
def split():
    order = torch.randperm(60).numpy()
    return X[order[:40]], Y[order[:40]], X[order[40:]], Y[order[40:]], 3

def split_numpy():
    order = np.random.permutation(60)
    return X[order[:40]], Y[order[:40]], X[order[40:]], Y[order[40:]], 3

def split_sets():
    x, y = torch.tensor(X[:, None] / 100).float(), torch.tensor(Y)
    return *torch.utils.data.random_split(TensorDataset(x, y), [40, 20]), 3
""")
    tests = []
    for number in (1, 2):
        torch.manual_seed(number)
        np.random.seed(number)
        tests.append(epoch(load(f"{name}:{function}", seed=number).test)[0])
    assert torch.equal(*tests)


def test_arrays_that_require_gradients_are_refused(own):
    name = own("import torch\nX, Y = torch.ones(2, 3, requires_grad=True), [0, 1]\ndef f(): return X, Y, X, Y, 2")
    with pytest.raises(UserError, match="is no array: Can't call numpy"):
        load(f"{name}:f")


@pytest.mark.parametrize("function", ["grey", "sets"])
def test_the_initial_weights_do_not_depend_on_what_the_data_draw(own, function):
    torch.manual_seed(3)
    load(f"{own(FILE + 'torch.manual_seed(0)')}:{function}")
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))


@pytest.mark.parametrize(("pixels", "batch"), [(16, 128), (32, 128), (64, 32), (256, 8)])
def test_larger_images_are_evaluated_in_smaller_batches(own, pixels, batch):
    """Of as many pixels as 128 of CIFAR's, or as many images as train at once, here 8."""
    value = f"np.full((150, {pixels}, {pixels}, 3), 9, np.uint8), np.arange(150) % 2"
    data = load(f"{own(f'import numpy as np{chr(10)}def f(): return {value}, {value}, 2')}:f")
    assert [len(y) for _, y in data.test.epoch(0)][:-1] == [batch] * (149 // batch)


@pytest.mark.parametrize(("suffix", "size"), [("@16", 16), ("", 224)])
def test_folders_at_a_size(folder, suffix, size):
    name = f"folder:{folder(train=6)}{suffix}"
    data = load(name)
    x, y = epoch(data.train)
    assert data.classes == 2 and x.shape == (12, 3, size, size) and data.example.shape == (2, 3, size, size)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3), rtol=0, atol=1e-5)
    again, labels = epoch(data.train, 1)
    order, key = (images.flatten(1).sum(1).sort() for images in (x, again))  # another order of the same images
    torch.testing.assert_close(x[order.indices], again[key.indices])
    assert torch.equal(y[order.indices], labels[key.indices])
    assert len(samples(load(name, part=0.5))) == 6


# ---------------------------------------------------------------------------------------------- through the scripts


def run(method, directory, data, arch, *more):
    window = [] if method == "sgd" else ["--params_end", "4", "--n_components", "2"]
    return runs.run(method, ["--datasets", str(data), "--arch", str(arch), "--device", "cpu", "--batch-size", "8",
                             "--workers", "0", "--save-dir", str(directory), "--epochs", "3", "--lr", "0.1", *window,
                             *more])


@pytest.mark.parametrize(("function", "network"), [("grey", "image_net"), ("sets", "image_net"),
                                                   ("tabular", "flat_net")])
def test_all_stages_report_and_trajectory(own, tmp_path, function, network, monkeypatch, capsys):
    file, out = own(FILE, "my/own.py"), tmp_path / "run"
    data, arch = f"{file}:{function}", f"{file}:{network}"
    for method in SCRIPTS:
        summary = run(method, out, data, arch)
        assert summary["args"]["file_digests"] == dict.fromkeys(("datasets", "arch"), userfile.digest(data, ""))
    text = report.table(report.find_runs([out]))
    assert text.count(f"| own.py:{function}, own.py:{network} |") == 3
    monkeypatch.setattr(trajectory, "GRID", 2)
    result = trajectory.main(trajectory.parse_args(
        ["--datasets", data, "--arch", arch, "--device", "cpu", "--batch-size", "8", "--save-dir", str(out),
         "--params_end", "4", "--n_components", "0.5", "--runs", str(out), "--figure", str(out / "t.png")]))
    assert len(result["paths"]["psgd"][0]) == 4 and (out / "t.png").is_file()


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_named_networks_on_own_images(folder, tmp_path, kind):
    write_npz(tmp_path / "a.npz", (16, 16, 3))
    data = f"npz:{tmp_path / 'a.npz'}" if kind == "npz" else f"folder:{folder()}@16"
    for method in SCRIPTS:
        assert run(method, tmp_path / "run", data, "resnet8")["epochs"] == 3


def test_another_file_is_refused_between_stages_and_on_resuming(own, tmp_path):
    file, out = own(FILE), tmp_path / "run"
    names = f"{file}:grey", f"{file}:image_net"
    run("sgd", out, *names)
    own(FILE + "# changed\n")
    with pytest.raises(UserError, match=r"sampled otherwise: datasets \S+:grey \w{16}, here .*; arch \S+ \w{16}, "):
        run("psgd", tmp_path / "p", *names, "--save-dir", str(out))
    run("psgd", tmp_path / "p", *names, "--save-dir", str(out), "--output-dir", str(tmp_path / "p"),
        "--allow-mismatch", "datasets,arch")
    for resume in ("auto", str(out / "sgd_checkpoint.pt")):
        with pytest.raises(UserError, match="file_digests .*datasets"):
            run("sgd", out, *names, "--epochs", "4", "--resume", resume)


# ---------------------------------------------------------------------------------- the file's own imports


PACKAGE = """
def load_dataset():
    return "installed"

def later():
    from datasets.inner import value
    return value
"""
IMPORTS = """
from datasets import load_dataset
import helper
import numpy as np, torch

class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        import datasets, utils
        return torch.full((4,), float(datasets.later() + utils.number)), i % 2

def sets():
    import utils
    assert load_dataset() == "installed" and helper.name == "beside" and utils.number == 3
    return Items(), Items(), 2

def net(num_classes):
    from models.resnet_cifar import MODELS  # no other package of this name: this project's
    assert load_dataset() == "installed"
    return torch.nn.Linear(4, num_classes)
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_imports_installed_packages_and_what_lies_beside_it(own, tmp_path, workers, monkeypatch):
    """`datasets` installed, `utils` and `helper` beside the file, while it is imported, called and iterated over."""
    for name, text in {"site/datasets/__init__.py": PACKAGE, "site/datasets/inner.py": "value = 4\n",
                       "mine/utils.py": "number = 3\n", "mine/helper.py": "name = 'beside'\n"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "mine" / "models").mkdir()  # a folder of that name is no package
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site")])
    path, modules = list(sys.path), {name: sys.modules[name] for name in ("datasets", "models", "utils")}
    file = own(IMPORTS, "mine/own.py")
    data = load(f"{file}:sets", batch_size=3, workers=workers)
    assert torch.equal(epoch(data.train)[0], torch.full((6, 4), 7.0))
    userfile.call(f"{file}:net", "--arch", num_classes=2)
    assert sys.path == path and all(sys.modules[name] is module for name, module in modules.items())
    assert Path(sys.modules["datasets"].__file__).parent == ROOT / "datasets" and "datasets.inner" not in sys.modules


def test_without_the_package_one_line_says_so(own):
    with pytest.raises(UserError, match=r"--datasets \S+own.py:f: cannot import name 'load_dataset' from 'datasets'"):
        load(f"{own('from datasets import load_dataset')}:f")


# --------------------------------------------------------------------------------------------------- what is refused


def returning(value, before=""):
    return f"""
import numpy as np, torch
X, Y = np.arange(4 * 25, dtype=np.uint8).reshape(4, 5, 5), np.array([0, 1, 0, 1])
{before}
def f():
    return {value}
"""


class_of = "class D(torch.utils.data.Dataset):\n  def __len__(self): return 3\n  def __getitem__(self, i): return {}\n"
ARRAYS = r"x_train, y_train, x_test, y_test, classes \(and maybe an augmentation\), or train, test, classes"
BAD = {
    "nothing returned": (returning("None"), rf"must return {ARRAYS}; it returned 1 of them \(NoneType\)"),
    "four": (returning("X, Y, X, Y"), r"must return .*; it returned 4 of them \(ndarray, ndarray, ndarray, ndarray\)"),
    "shape": (returning("X[0], Y, X, Y, 2"), r"x_train must be \(N, H, W\) or .* uint8, or floating-point, not \(5, 5"),
    "channels": (returning("np.zeros((4, 5, 5, 2), np.uint8), Y, X, Y, 2"), r"x_train must be .*, not \(4, 5, 5, 2\)"),
    "dtype": (returning("X.astype(int), Y, X, Y, 2"), r"x_train must be .*, not \(4, 5, 5\) int64"),
    "range": (returning("X // 200, Y, X, Y, 2"), "x_train must hold pixels of 0 to 255; its largest is 0"),
    "too large": (returning("X * 1e40, Y, X / 1, Y, 2"), "x_train holds NaN or infinite"),
    "infinite": (returning("X / 0.0, Y, X / 1, Y, 2", "np.seterr(all='ignore')"), "x_train holds NaN or infinite"),
    "test unlike training": (returning("X, Y, X[:, :4], Y, 2"), r"x_test must be like x_train, \(5, 5, 1\) uint8, not"),
    "number of labels": (returning("X, Y[:3], X, Y, 2"), r"y_train must be \(4,\) integer, not \(3,\) int64"),
    "dtype of labels": (returning("X, Y, X, Y / 1, 2"), r"y_test must be \(4,\) integer, not \(4,\) float32"),
    "label out of range": (returning("X, Y, X, Y + 1, 2"), "y_test must hold labels 0 to 1, not 1 to 2"),
    "no samples": (returning("X, Y, X[:0], Y[:0], 2"), "y_test must hold labels 0 to 1, not none"),
    "classes": (returning("X, Y, X, Y, 2.5"), "number of classes must be an integer of at least 2, not 2.5"),
    "augmentation": (returning("X, Y, X, Y, 2, 'rotate'"), "augmentation must be 'flip', .*; it is 'rotate', of uint8"),
    "augmented floats": (returning("X / 1, Y, X / 1, Y, 2, 'flip'"), "it is 'flip', of float32 arrays"),
    "ragged": (returning("[[1], [1, 2]], Y, X, Y, 2"), "what should be x_train, y_train, x_test, y_test is no array"),
    "no Dataset": (returning("3, 4, 2"), "the training set must be a Dataset with a length and items, not int"),
    "empty Dataset": (returning("[], [], 2"), "the training set must be a Dataset .* not list of length 0"),
    "a dict": (returning("D(), D(), 2", class_of.format("{'x': 1}")),
               r"item 0 of the training set of --datasets .* must be \(x, label\) with a tensor x, not a dict"),
    "a label too large": (returning("D(), D(), 2", class_of.format("torch.zeros(3), 2")), "label from 0 to 1, not 2"),
    "a float label": (returning("D(), D(), 2", class_of.format("torch.zeros(3), 0.5")), "integer label .* not 0.5"),
    "an error in an item": (returning("D(), D(), 2", class_of.format("1 / 0")),
                            "item 0 of the training set .*: ZeroDivisionError: division by zero"),
    "arguments": ("def f(root):\n  pass", "f is called with no argument: missing a required argument: 'root'"),
    "no function": ("g = 3", "own.py has no function f"),
    "syntax": ("def f(:", "invalid syntax"),
}


@pytest.mark.parametrize("case", BAD)
def test_functions_that_return_something_else(own, case):
    text, message = BAD[case]
    file = own(text)
    with pytest.raises(UserError, match=message) as error:
        load(f"{file}:f")
    assert f"--datasets {file}:f" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("item", "message"), [
    ("torch.zeros(3 + (i == 2)), 0", r"item 2 of the training set of .* must be \(3,\) as the first one, not \(4,\)"),
    ("torch.zeros(3), 5 * (i == 2)", "item 2 of the training set of .* integer label from 0 to 1, not 5"),
])
@pytest.mark.parametrize("workers", [0, 1])
def test_later_items_are_checked_when_they_are_read(own, item, message, workers):
    data = load(f"{own(returning('D(), [D()[0]], 2', class_of.format(item)))}:f", workers=workers)
    with pytest.raises(UserError, match=message):
        epoch(data.train)


@pytest.mark.parametrize(("name", "message"), [
    ("npz:none.npz", "--datasets npz:none.npz: there is no file none.npz"),
    ("none.py:f", "--datasets none.py:f: there is no file none.py"),
    ("folder:none", "--datasets folder:none: there must be class folders with images under train/"),
    ("folder:none@0", "--datasets folder:none@0: a size of 1 to 4096 pixels, not 0"),
])
def test_files_that_do_not_exist(name, message):
    with pytest.raises(UserError, match=message):
        load(name)


@pytest.mark.parametrize(("function", "network", "message"), [
    ("grey", "resnet8", r"--arch resnet8 does not take a mini-batch \(2, 1, 12, 10\) torch.float32 of --datasets: "),
    ("tabular", "FILE:image_net", r"--arch \S+ does not take a mini-batch \(2, 10\) torch.float32 of --datasets: "),
    ("grey", "FILE:norm_net", r"--arch \S+ does not take a mini-batch .*: ValueError: expected 2D or 3D input"),
    ("tabular", "FILE:frozen_net", "--arch .*: the trainable parameters are none; the scripts train float32 ones"),
    ("tabular", "FILE:mixed_net", "--arch .*: the trainable parameters are torch.float32 and torch.float64; the"),
])
def test_networks_that_do_not_fit_the_data(own, tmp_path, function, network, message):
    file = own(FILE)
    with pytest.raises(UserError, match=message):
        run("sgd", tmp_path / "run", f"{file}:{function}", network.replace("FILE", str(file)))
