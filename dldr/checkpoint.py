"""A run: what a start means, its directory, checkpoints, log, summary and lines on the console."""
import contextlib
import errno
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from dldr import distributed
from dldr.errors import UserError
from dldr.files import checksum, cpu_copy, load_file, load_json, load_model, save_json, save_tensors, write_atomically

FORMAT = 2  # of checkpoints
FILES = r"(args|summary)\.json|log\.jsonl|(checkpoint|final)\.pt"  # after the method and "_"; of sgd also:
SNAPSHOTS = r"\d+\.pt|sgd_snapshots\.json"
COLUMNS = {  # of the epoch lines: heading -> key in the log, format; at most 100 characters in all
    "lr": ("lr", "8.3g"),
    "train loss": ("train_loss", "#10.4g"),
    "train %": ("train_accuracy", "7.2f"),
    "test loss": ("test_loss", "#9.4g"),
    "test %": ("test_accuracy", "6.2f"),
    "top-5 %": ("test_top5", "7.2f"),
    "best %": ("best_accuracy", "6.2f"),
    "at": ("best_epoch", "4d"),
    "trials": ("trials_per_step", "6.2f"),
    "seconds": ("seconds", "7.1f"),
}


class Run:
    """One run of a method: its directory and lock, its clocks, its lines on the console, and the files

    <method>_args.json, _log.jsonl, _checkpoint.pt, _final.pt and _summary.json.
    """

    def __init__(self, method, args, changeable, snapshots=()):
        """`args`: the flags by name (a dict); `changeable`: those that a resumed run may change.

        `snapshots`: the files of the window, in a subspace method.
        """
        self.method, self.args, self.changeable, self.snapshots = method, args, set(changeable), snapshots
        self.epochs, self.seed, self.save_every = args["epochs"], args["randomseed"], args["save_every"]
        self.directory = Path(args.get("output_dir") or args["save_dir"])
        self.files = rf"{method}_({FILES})" + (f"|{SNAPSHOTS}" if method == "sgd" else "")
        self.flag = "--output-dir" if "output_dir" in args else "--save-dir"
        self.start, self.seconds = time.perf_counter(), dict.fromkeys(("load", "basis", "train", "eval"), 0.0)
        self.log, self.facts, self.lock, self.header = [], {}, None, False

    def path(self, name):
        return self.directory / f"{self.method}_{name}"

    def save(self, name, value):
        return save_tensors(self.path(name), value)

    @contextlib.contextmanager
    def timer(self, name):
        """Add the seconds spent inside, device work included, to self.seconds[name]."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self.seconds[name] += time.perf_counter() - start

    # ------------------------------------------------------------------------------------------ starting, resuming

    def may_start(self, data_facts):
        """Whether to start or resume; False if the run is finished; UserError if the table refuses. Reads only.

        data_facts() is called, to compare the data, where all else says that the run is finished.

        | directory              | no flag                     | --resume auto              | --overwrite |
        |------------------------|-----------------------------|----------------------------|-------------|
        | empty                  | start                       | start                      | start       |
        | finished, same flags   | refused, names both flags   | nothing to do: the summary | start over  |
        | unfinished, same flags | refused, names both flags   | resume                     | start over  |
        | results, no checkpoint | refused, names both flags   | refused, unless finished   | start over  |
        | other flags            | refused, names differences  | refused                    | start over  |

        Starting over removes what lies there first. --resume PATH starts from that checkpoint, where --resume auto
        would start or resume. Flags that may change (more --epochs, say) are the same flags.
        """
        if self.args["evaluate"] or self.args["overwrite"] or not self.has_results():
            return True
        before = load_json(self.path("args.json"))
        changed = "unknown ones" if before is None else self.changed_flags(before.get("args", {}))
        if changed:
            raise UserError(f"{self.directory} holds a {self.method} run with other flags ({changed}); choose another "
                            f"{self.flag}, or start over with --overwrite")
        summary = load_json(self.path("summary.json"))
        finished = (summary is not None and summary.get("epochs") == self.epochs
                    and summary.get("snapshots_checksum") == checksum(*self.snapshots))
        if not self.args["resume"] or finished and self.args["resume"] != "auto":
            state, keep = ("a finished", "keep") if finished else ("an unfinished", "resume")
            raise UserError(f"{self.directory} holds {state} {self.method} run with these flags; {keep} it with "
                            f"--resume auto, start over with --overwrite, or choose another {self.flag}")
        if not finished:
            results = self.path("final.pt").is_file() or summary is not None
            if results and self.args["resume"] == "auto" and not self.checkpoint_to_resume():
                raise UserError(f"{self.directory} holds results of a {self.method} run, but no checkpoint to resume "
                                f"it from: start over with --overwrite, or choose another {self.flag}")
            return True
        facts = data_facts()
        self.check_data(self.path("summary.json"), summary.get("data", facts), facts)
        if distributed.rank() == 0:
            print(f"{self.path('summary.json')}: already finished, nothing to do", flush=True)
            print_summary(summary)
        return False

    def check_data(self, path, then, now):
        """Raise UserError if the data are not those that the run of the file `path` was trained on."""
        if changed := what_changed(then, now):
            raise UserError(f"{path} is of other data than --datasets {self.args['datasets']} --data "
                            f"{self.args['data']}: {changed}")

    def has_results(self):
        """Whether the directory holds more of a run of this method than its start."""
        names = [f"{self.method}_{name}" for name in ("log.jsonl", "checkpoint.pt", "final.pt", "summary.json")]
        if self.method == "sgd":  # the start's snapshot may be there
            first = self.args["start_epoch"] * self.args["samples_per_epoch"]
            names += [path.name for path in self.directory.glob("*.pt")
                      if path.stem.isdecimal() and int(path.stem) > first]
        return any(path.is_file() and path.stat().st_size for path in map(self.directory.joinpath, names))

    def changed_flags(self, then):
        """How the flags differ from `then`, ignoring those that may change: "lr 0.1 -> 0.2, ...", or ""."""
        return what_changed(then, {key: value for key, value in self.args.items() if key not in self.changeable})

    def prepare_directory(self):
        """Make the directory and lock it (the OS releases the lock on exit); remove half-written files. On rank 0.

        Raises UserError if it cannot be written, or if another process is writing to it.
        """
        if distributed.rank():
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.directory / f".{self.method}.lock", "w")
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another {self.method} process is writing to {self.directory}; choose another {self.flag} "
                            "or wait for it") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise UserError(f"{self.flag} {self.directory} cannot be written to: {error.strerror}") from error
            distributed.note(f"the file system of {self.directory} has no locks: nothing keeps another process out of "
                             "it", "warning")
        self.remove(rf"\.({self.files})(\.\d+)?\.tmp")  # killed while writing

    def checkpoint_to_resume(self):
        """The file of --resume PATH, or with auto the run's own checkpoint if there is one; None for a new start."""
        own = self.path("checkpoint.pt")
        if self.args["resume"] == "auto":
            return own if own.is_file() else None
        return Path(self.args["resume"]) if self.args["resume"] else None

    def remove(self, pattern):
        """Remove the files of the directory whose whole names match."""
        for path in self.directory.iterdir() if distributed.rank() == 0 else ():
            if re.fullmatch(pattern, path.name):
                path.unlink(missing_ok=True)

    def begin(self, data, w, *, snapshots, explained=None, sampling=None, writes=0):
        """Print what is trained, and keep it for the summary; with --overwrite remove what an earlier run has left.

        Comes after all that may refuse the flags. `explained`: the variance shares of the basis, if any; `sampling`:
        how its snapshots were made. `writes`: bytes of the snapshots to come; warns if the disk has too little space.
        """
        free = shutil.disk_usage(self.directory).free if distributed.rank() == 0 else math.inf
        writes += 6 * w.nbytes  # network and optimiser in a checkpoint, while the next one is written; final network
        if writes > free:
            distributed.note(f"this run writes {writes / 1e6:,.0f} MB, {self.directory} has {free / 1e6:,.0f} MB free",
                             "warning")
        k = len(explained) if explained else None
        self.facts = {
            "parameters": w.numel(),
            "data": data.facts,
            "parameters_trained": k if k and not self.args.get("alpha") else w.numel(),
            "n_components": k,
            "snapshots": snapshots,
            "snapshots_checksum": checksum(*self.snapshots),
            **({"sampling": sampling} if sampling else {}),
            "explained_variance": {"total": sum(explained), "per_component": explained} if explained else None,
        }
        args = self.args
        if args["overwrite"]:
            self.remove(self.files)
        print(f"{self.method}: {args['arch']} on {args['datasets']}, {w.numel():,} parameters, {data.classes} classes, "
              f"{data.train.samples:,} training and {data.test.samples:,} test samples, {w.device}", flush=True)
        if explained:
            print(f"basis: {k} components of {snapshots} snapshots explain {100 * sum(explained):.4f}% of the "
                  "variance; each (%): " + " ".join(f"{100 * share:.3g}" for share in explained), flush=True)

    def start_or_resume(self, model, optimizer):
        """Restore the checkpoint if there is one; remove what goes with no earlier start; write args and log.

        Returns the index of the first epoch to train.
        """
        first = self.args["start_epoch"]
        if path := self.checkpoint_to_resume():
            first = self.restore(path, model, optimizer)
            if path != self.path("checkpoint.pt"):  # --resume auto means this one from now on
                self.save("checkpoint.pt", self.state(first, model, optimizer))
        if self.method == "sgd" and (known := load_json(self.path("snapshots.json"))):
            last = first * self.args["samples_per_epoch"]  # later ones are written again, maybe with other bits
            save_json(self.path("snapshots.json"), {i: value for i, value in known.items() if int(i) <= last})
            self.remove("|".join(rf"{i}\.pt" for i in known if int(i) > last))
        save_json(self.path("args.json"), {"command": command_line(), "args": self.args, "data": self.facts["data"],
                                           "snapshots_checksum": self.facts["snapshots_checksum"]})
        for name in ("summary.json", "final.pt") if distributed.rank() == 0 else ():
            self.path(name).unlink(missing_ok=True)  # they would not go with the new log
        self.write_log()
        return first

    def restore(self, path, model, optimizer):
        """Load a checkpoint, with the log as it was then; returns the index of the next epoch."""
        state = load_file(path, "checkpoint (--resume)")
        kinds = {"epoch": int, "log": list, **dict.fromkeys(("model", "seconds", "optimizer", "facts", "args"), dict)}
        if ((state.get("method"), state.get("format")) != (self.method, FORMAT)
                or not all(isinstance(state.get(name), kind) for name, kind in kinds.items())):
            raise UserError(f"--resume {path} is not a checkpoint of this script and version "
                            f"({self.method}_checkpoint.pt)")
        if changed := self.changed_flags(state["args"]):
            raise UserError(f"--resume {path} is of another experiment: {changed}")
        if state["epoch"] > self.epochs:
            raise UserError(f"--resume {path} is past --epochs {self.epochs}: it has {state['epoch']}")
        self.check_data(f"--resume {path}", state["facts"].get("data", {}), self.facts["data"])  # which may have moved
        then, now = ((facts["explained_variance"] or {}).get("per_component", [])
                     for facts in (state["facts"], self.facts))
        if len(then) != len(now) or not np.allclose(then, now, rtol=1e-4):
            raise UserError(f"--resume {path} was made with different snapshots than those in --save-dir")
        load_model(model, state["model"], path)
        try:
            optimizer.load_state_dict(state["optimizer"])
            for name in self.seconds:
                self.seconds[name] += state["seconds"][name]
            self.start -= state["seconds"]["total"]
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise UserError(f"--resume {path} is damaged: {error!r}"[:300]) from error
        self.log = state["log"]
        print(f"resumed from {path} after epoch {state['epoch']}", flush=True)
        return state["epoch"]

    def state(self, epoch, model, optimizer):
        """Checkpoint dict at the start of epoch number `epoch` (from 0), on the CPU; on rank 0, for any world size."""
        if distributed.rank():
            return None
        seconds = {**self.seconds, "total": time.perf_counter() - self.start}
        return cpu_copy({"format": FORMAT, "method": self.method, "epoch": epoch, "model": model.state_dict(),
                         "optimizer": optimizer.state_dict(), "seconds": seconds, "log": self.log,
                         "facts": self.facts, "args": self.args})

    # --------------------------------------------------------------------------------- snapshots, log and summary

    def save_snapshot(self, index, state):
        """Save the state dict number `index` of the trajectory, and its checksum in sgd_snapshots.json."""
        path = save_tensors(self.directory / f"{index}.pt", state)
        if distributed.rank() == 0:
            known = load_json(self.path("snapshots.json")) or {}
            save_json(self.path("snapshots.json"), {**known, str(index): checksum(path)})

    def write_log(self):
        write_atomically(self.path("log.jsonl"), "".join(json.dumps(line) + "\n" for line in self.log).encode())

    def log_epoch(self, epoch, lr, train, test, seconds, statistics):
        """Append one JSON line to the log, and print what COLUMNS has of it. Accuracies in percent."""
        line = {
            "epoch": epoch + 1,
            "lr": lr,
            "train_loss": train["loss"],
            "train_accuracy": train["accuracy"],
            "test_loss": test["loss"],
            "test_accuracy": test["accuracy"],
        }
        best = max([*self.log, line], key=lambda line: line["test_accuracy"])  # the first of equals
        line |= {
            "best_accuracy": best["test_accuracy"],
            "best_epoch": best["epoch"],
            "seconds": round(seconds, 3),
            "samples_per_second": round(train["samples"] / seconds, 1),
            **({"test_top5": test["top5"]} if "top5" in test else {}),
            **statistics,
        }
        self.log.append(line)
        if distributed.rank():
            return
        try:
            with open(self.path("log.jsonl"), "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"{self.path('log.jsonl')} cannot be written: {error.strerror}") from error
        cells = {heading: format(line[key], form) for heading, (key, form) in COLUMNS.items() if key in line}
        cells = {"epoch": f"{epoch + 1}/{self.epochs}".rjust(9), **cells}
        if not self.header:
            print(*(heading.rjust(len(cell)) for heading, cell in cells.items()), sep="  ")
            self.header = True
        print(*cells.values(), sep="  ", flush=True)

    def finish(self, device):
        """Write and return the summary, and print its line."""
        last, args = self.log[-1] if self.log else {}, self.args
        seconds = {**self.seconds, "total": time.perf_counter() - self.start}
        summary = {
            "method": self.method,
            "dataset": args["datasets"],
            "arch": args["arch"],
            "seed": self.seed,
            "corrupt": args["corrupt"],
            **self.facts,
            "epochs": self.epochs,
            "test_accuracy_last": last.get("test_accuracy"),
            "test_accuracy_best": last.get("best_accuracy"),
            "best_epoch": last.get("best_epoch"),
            "train_accuracy_last": last.get("train_accuracy"),
            **({"test_top5_last": last["test_top5"]} if "test_top5" in last else {}),
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "args": args,
            "command": command_line(),
            **provenance(device),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        }
        self.write_log()  # on the disk for certain before the summary is
        save_json(self.path("summary.json"), summary)
        print_summary(summary)
        return summary


def print_summary(summary):
    """One line that starts with "summary", of key=value pairs."""
    keys = ("method", "dataset", "arch", "seed", "corrupt", "parameters_trained", "epochs", "best_epoch")
    percents = {key: summary[key] for key in ("test_accuracy_last", "test_accuracy_best", "train_accuracy_last")}
    print("summary", *(f"{key}={summary[key]}" for key in keys),
          *(f"{key}={value if value is None else round(value, 2)}" for key, value in percents.items()),
          f"seconds={summary['seconds']['total']:.1f}", flush=True)


def what_changed(then, now):
    """Where `now` differs from `then`: "lr 0.1 -> 0.2, ...", or "" if nowhere."""
    return ", ".join(f"{key} {then.get(key)} -> {value}" for key, value in now.items() if value != then.get(key))


def command_line():
    """Command line to reproduce the run."""
    script = Path(sys.argv[0])
    here = os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size())
    launcher = ["torchrun", f"--nproc_per_node={here}"] if distributed.world_size() > 1 else ["python"]
    if distributed.world_size() > int(here):
        launcher.append(f"--nnodes={distributed.world_size() // int(here)}")
    return shlex.join([*launcher, script.name if script.is_absolute() else str(script), *sys.argv[1:]])


def provenance(device):
    """What a reader needs to know of a result's origin: versions, hardware (no host name), git revision."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    for package in ("torchvision", "scikit-learn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # the library needs neither
            versions[package] = importlib.metadata.version(package)
    cpu = None
    with contextlib.suppress(OSError):  # Linux has this file
        cpu = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
    revision = None  # outside a checkout; with "-dirty" if tracked files differ from it
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        revision = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], check=True,
                                  cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    return {
        "versions": {**versions, "cuda": torch.version.cuda},
        "hardware": {
            "device": device.type,
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "cpu": cpu[1] if cpu else platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "processes": distributed.world_size(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        },
        "git_revision": revision,
    }
