"""Imports go one way, the method needs torch alone, and the package installs and works on its own."""
import ast
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from runs import ROOT

# from the bottom; a file may import from lines above its own, and a line's files not each other but where listed
LAYERS = [
    ["packages", "dldr.errors", "dldr.subspace"], ["dldr.distributed", "dldr.userfile"],
    ["dldr.device", "dldr.files", "dldr.graphs"], ["dldr.checkpoint"], ["dldr.snapshots", "dldr.engine"],
    ["datasets", "models"], ["utils"], ["plots"], ["report"],
    ["train_sgd", "train_psgd", "train_pbfgs", "trajectory"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(path):
    """Names of the modules that a file imports, anywhere in it, `from package import module` included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(name):
    """The module of LAYERS that `name` belongs to, or None."""
    while name and name not in LEVEL:
        name = name.rpartition(".")[0]
    return name or None


def files():
    for name in LEVEL:
        path = ROOT / (name.replace(".", "/") + ".py")
        inside = sorted((ROOT / name).glob("*.py")) if (ROOT / name).is_dir() else [path]
        yield from ((name, file) for file in inside if file.is_file())


def test_every_module_has_a_layer():
    ours = {path.stem for path in ROOT.glob("*.py")} | {f"dldr.{path.stem}" for path in ROOT.glob("dldr/*.py")}
    assert ours - set(LEVEL) <= {"dldr.__init__", "recipes"}


@pytest.mark.parametrize(("name", "path"), list(files()), ids=lambda x: x.name if isinstance(x, Path) else x)
def test_no_file_imports_upward(name, path):
    for imported in imports(path):
        other = layer(imported)
        assert other in (None, name) or LEVEL[other] < LEVEL[name], f"{path.name} imports {imported}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("dldr/*.py")), ids=lambda path: path.name)
def test_the_package_needs_torch_and_numpy_only(path):
    packages = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"dldr"}
    assert packages <= ({"torch"} if path.name == "subspace.py" else {"torch", "numpy"})


def test_the_method_loads_nothing_beyond_torch():
    code = "import sys, torch; before = {*sys.modules}; import dldr.subspace; print(*{*sys.modules} - before)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"dldr", "dldr.subspace"}


def readme_example():
    """The README's lines of Python that use the package, runnable: with a model, data and a loop of one's own."""
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
               if "from dldr import" in block)
    return code


PREAMBLE = """
import torch, torch.nn.functional as F
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 2))
batches = [(x, (x[:, 0] > 0).long()) for x in torch.randn(20, 32, 20)]
loss_fn = F.cross_entropy
def train(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i in torch.randperm(len(batches)):
        x, y = batches[i]
        optimizer.zero_grad(); loss_fn(model(x), y).backward(); optimizer.step()
"""
CHECK = """
import dldr
assert dldr.__version__ and loss_fn(model(x), y) < 0.7 and optimizer.theta.norm() > 0
print("works")
"""


def test_the_readme_example_runs():
    exec(PREAMBLE + readme_example() + CHECK, {})


@pytest.mark.slow
def test_the_package_installs_and_works_elsewhere(tmp_path):
    """In an environment of its own, which takes torch and numpy from this one, from another directory."""
    venv.create(tmp_path / "venv", with_pip=True, system_site_packages=False)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv").glob("lib/*/site-packages")
    (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))  # 5 GB that need not be installed again
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", ROOT], check=True)
    code = PREAMBLE + readme_example() + CHECK + f"assert not dldr.__file__.startswith({str(ROOT)!r} + '/dldr')"
    out = subprocess.run([python, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert out.endswith("works\n")
