"""Which packages are needed, from which version on (as pyproject.toml says). The scripts import this first, and so end
in one line where a package is missing or torch is too old. Standard library only.

python packages.py NAME ...    what is wrong with these here and how to mend it, in a line; then exit status 1
"""
import re
import sys
from pathlib import Path

OLDEST = dict(re.findall(r'([\w-]+)(?: = ")?>=([\d.]+)"', (Path(__file__).parent / "pyproject.toml").read_text()))
MODULES = {"scikit-learn": "sklearn", "pytest-xdist": "xdist"}  # where it is not the package's name


def release(version):
    """(2, 4) of "2.4.1+cu121"."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def fault(name):
    """What is wrong with a package in this Python, as the end of a sentence; None if nothing is."""
    try:
        module = __import__(MODULES.get(name, name))
    except Exception as error:  # a torchvision for another torch, a system library too old, ...
        missing = getattr(error, "name", None) == MODULES.get(name, name)
        return "not installed" if missing else f"cannot be imported ({' '.join(str(error).split())[:200]})"
    old = name in OLDEST and release(module.__version__) < release(OLDEST[name])
    return f"{module.__version__} is too old, {OLDEST[name]} or later is needed" if old else None


def check(names):
    """None, or a line: what is wrong with these packages, and the command that mends it and leaves torch if it can."""
    here = sys.version.split()[0]
    if release(here) < release(OLDEST["requires-python"]):
        return f"Python {here} is too old, {OLDEST['requires-python']} or later is needed"
    found = {name: fault(name) for name in names}
    found = {name: wrong for name, wrong in found.items() if wrong}
    if not found:
        return None
    sentences = [", ".join(name for name in found if found[name] == wrong) + " " + wrong
                 for wrong in dict.fromkeys(found.values())]
    wanted = [f"'{name}>={OLDEST[name]}'" if name in OLDEST else name for name in found]
    if "torchvision" in found and "torch" not in found:
        wanted.append("torch==" + sys.modules["torch"].__version__.split("+")[0])  # else pip takes the newest
    return f"{'; '.join(sentences)}: {sys.executable} -m pip install {' '.join(wanted)}"


def excepthook(kind, error, traceback):
    """One line for a package that is missing, the traceback for anything else."""
    module = (getattr(error, "name", None) or "").split(".")[0]
    problem = check([name for name in OLDEST if MODULES.get(name, name) == module])
    if problem:
        print(f"{Path(sys.argv[0]).name}: error: {problem}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


if __name__ == "__main__":
    sys.exit(check(sys.argv[1:]))
sys.excepthook = excepthook
problem = check(["torch"])
if problem:
    sys.exit(f"{Path(sys.argv[0]).name}: error: {problem}")
