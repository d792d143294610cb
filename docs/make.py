"""Write docs/flags.md and docs/networks.md from the parsers and the networks: `python docs/make.py`."""
import argparse
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import models.__main__  # noqa: E402
import report  # noqa: E402
import train_pbfgs  # noqa: E402
import train_psgd  # noqa: E402
import train_sgd  # noqa: E402
import trajectory  # noqa: E402

SCRIPTS = {"train_sgd.py": train_sgd, "train_psgd.py": train_psgd, "train_pbfgs.py": train_pbfgs,
           "trajectory.py": trajectory, "report.py": report}


FLAGS = """# Every flag

Made from the scripts' own parsers by `python docs/make.py`. Wrong usage exits with status 2, other bad input with 1,
each with one line that names the flag or file. Flags are not abbreviated.

With `--half` the forward and backward passes run in bfloat16; the basis, the projections and the losses that the line
search compares do not, since a bfloat16 weight cannot see small steps. Everything else is float32, the basis and the
k-dimensional algebra float64. Products with `P` never use TF32. On a GPU losses are read every `--print-freq`
iterations (P-BFGS: each): one that is not finite stops the run that much later, and the epoch's start is kept. P-BFGS
on a CPU computes in NCHW memory, SGD and P-SGD in channels_last: torch's channels_last batch norm sums in float32
there, which is faster, but off by 4e-5 in the loss of 1,024 images (NCHW: 3e-8), and a line search compares losses.

"""
NETWORKS = """# Networks

`--arch` for small images is one of the names below; on ImageNet it is any classification model of torchvision; and
`FILE.py:FUNCTION` is a function of your own, which is called with the number of classes. Its steps are not captured as
CUDA graphs unless `--cuda-graphs on` says so, since a graph would repeat what the network draws on the host.

Beside the CIFAR ResNets these are the official release's CIFAR-100 networks, all with a stem for 32 x 32 images. They
compute the release's function, checked in float64 to 1e-9 for the 47 names that it has, with its initial values for the
same seed; where the release differs from an architecture's paper, the file says so. Its snapshots load: by name where
names agree, else by position, after all shapes have been compared. Dropout and stochastic depth are drawn anew in each
forward pass, trials of P-BFGS included. A new network is a file with a dict MODELS, listed in `models/__init__.py`.

Counted for 100 classes and one image; `python -m models` prints the table.

"""


def parser_of(script):
    """The parser that a script's parse_args makes, caught before it parses."""
    caught = []
    real, argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_args, lambda self, *_: caught.append(self)
    try:
        script.parse_args([])
    except AttributeError:  # no arguments came back
        pass
    finally:
        argparse.ArgumentParser.parse_args = real
    return caught[0]


def flags():
    """A table for each script; those of all three training scripts, and of both subspace scripts, once."""
    rows = {}  # (names, value, help) -> {script: default}
    for name, script in SCRIPTS.items():
        for action in parser_of(script)._actions:
            if not isinstance(action, argparse._HelpAction):
                names = ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{action.metavar}`"
                value = "|".join(action.choices) if action.choices else "" if action.nargs == 0 else action.metavar
                text = (action.help or "").replace("|", "\\|")
                rows.setdefault((names, f"{value or ''}".replace("|", "\\|"), text), {})[name] = action.default
    pages = {}  # scripts -> lines
    for (names, value, meaning), defaults in rows.items():
        texts = {name: "" if v is None or v is False or v in ("", []) else str(v) for name, v in defaults.items()}
        if len(set(texts.values())) == 1:
            shown = next(iter(texts.values()))
        else:
            shown = ", ".join(f"{text} ({name})" for name, text in texts.items())
        pages.setdefault(tuple(defaults), []).append(f"| {names} | {value} | {meaning} | {shown} |")
    blocks = [f"## {', '.join(scripts)}\n\n| flag | value | meaning | default |\n|---|---|---|---|\n" + "\n".join(lines)
              for scripts, lines in pages.items()]
    return FLAGS + "\n\n".join(blocks) + "\n"


def networks():
    return NETWORKS + models.__main__.table().replace("](models/", "](../models/")


if __name__ == "__main__":
    (HERE / "flags.md").write_text(flags())
    (HERE / "networks.md").write_text(networks())
