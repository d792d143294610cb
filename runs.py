"""What a run leaves behind: files that a crash cannot tear, checkpoints to go on from, the log and the summary."""
import contextlib
import fcntl
import io
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
import warnings
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

import distributed
from utils import InputError, evaluate, pick_device

# ------------------------------------------------------------------------------------------------------ single files


def write_atomically(path, data):
    """Write bytes to `path` so that at any moment, whatever dies, it holds the old content or the new, on the disk.

    Of several processes number 0 does.
    """
    if distributed.rank():
        return path
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # the new name, too
        finally:
            os.close(directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written ({len(data):,} bytes): {error.strerror or error}") from error
    return path


def save_tensors(path, value):
    """torch.save of nested dicts of tensors, atomically; raises InputError with path and size if that fails."""
    if distributed.rank():  # of several processes number 0 writes
        return path
    value = cpu_copy(value)  # and no views: a file holds what its tensors show, not the buffer they may be part of
    buffer = io.BytesIO()  # torch.save reports a full disk as a RuntimeError of its own wording; a file says OSError
    torch.save(value, buffer)
    return write_atomically(path, buffer.getbuffer())


def save_json(path, value):
    """JSON, atomically; raises InputError like `save_tensors`."""
    return write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def load_file(path, what, mmap=False):
    """A dict of tensors and plain values from a file; raises InputError that says what was looked for and why not.

    Only tensors and plain values are unpickled: a file from elsewhere cannot run code. torch.save's checksums, which
    torch.load ignores, are compared: a flipped bit is found out wherever it is. `mmap`: the tensors stay in the file.
    """
    try:
        if zipfile.is_zipfile(path):  # the official release's older format is not
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged!r} in it is damaged")
        with warnings.catch_warnings(action="ignore"):  # torch's guesses about files that are none
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no {what} at this path") from error
    except Exception as error:  # whatever a truncated, foreign or hostile file provokes
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"{what} {path} cannot be read: {reason[:200]} (truncated, or not by torch.save?)") from error
    if not isinstance(value, dict):
        raise InputError(f"{what} {path} holds a {type(value).__name__}, not a dict")
    return value


def without_prefixes(state):
    """A state dict without what DataParallel (`module.`) or torch.compile (`_orig_mod.`) put before its keys."""
    return {re.sub(r"^((module|_orig_mod)\.)+", "", str(key)): value for key, value in state.items()}


def load_json(path):
    """A JSON object from a file, or None if there is no such file; raises InputError if it is damaged."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object")
    return value


def load_model(model, state, path):
    """model.load_state_dict, with one line that names the file if it does not fit."""
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError) as error:
        raise InputError(f"{path} does not fit the network of --arch and --datasets: {error}"[:400]) from error


def cpu_copy(value):
    """A copy of nested dicts, lists and tensors that shares no memory with the original, tensors on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: cpu_copy(item) for key, item in value.items()}
    return [cpu_copy(item) for item in value] if isinstance(value, list) else value


# ------------------------------------------------------------------------------------------------------------- a run

# arguments that may differ between a run and the one that goes on from its checkpoint
HARMLESS = {"epochs", "start_epoch", "resume", "evaluate", "data", "workers", "device", "save_dir", "output_dir",
            "save_every", "print_freq", "cuda_graphs", "timeout", "basis_memory", "shard_basis"}


class Timer:
    seconds = 0.0


class Run:
    """One run of a method: its directory and lock, its clocks, its lines on the console, and the files

    <method>_args.json, _log.jsonl, _checkpoint.pt, _final.pt and _summary.json, which `utils.fit` has written here.
    """

    def __init__(self, method, args):
        self.method, self.args, self.start = method, args, time.perf_counter()
        self.directory = Path(getattr(args, "output_dir", None) or args.save_dir)
        self.flag = "--output-dir" if "output_dir" in args else "--save-dir"
        self.seconds = dict.fromkeys(("load", "basis", "train", "eval"), 0.0)
        self.log, self.facts, self.lock = [], {}, None

    def path(self, name):
        return self.directory / f"{self.method}_{name}"

    def save(self, name, value):
        return save_tensors(self.path(name), value)

    @contextlib.contextmanager
    def timer(self, name):
        """Add the seconds spent inside, device work included, to self.seconds[name]; yields them as .seconds."""
        timer, start = Timer(), time.perf_counter()
        try:
            yield timer
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            timer.seconds = time.perf_counter() - start
            self.seconds[name] += timer.seconds

    # ------------------------------------------------------------------------------------------ beginning, going on

    def finished(self, snapshots=()):
        """The summary of --resume auto's run if it has been to its end with these arguments; else None.

        Snapshots written after it (by a sampling run that was started over) make it a result of other ones.
        """
        summary = load_json(self.path("summary.json")) if self.args.resume == "auto" else None
        if summary is None or summary.get("epochs") != self.args.epochs or self.changes(summary.get("args", {})):
            return None
        if any(path.stat().st_mtime > self.path("summary.json").stat().st_mtime for path in snapshots):
            return None
        if distributed.rank() == 0:
            print(f"{self.path('summary.json')}: finished before", flush=True)
            print_summary(summary)
        return summary

    def begin(self, data, w, *, snapshots, explained=None, writes=0):
        """Say what is trained, and keep it for the summary.

        `explained`: the variance shares of the basis, if any. `writes`: bytes of the snapshots to come; a disk too
        small for them and the checkpoints is warned of.
        """
        free = shutil.disk_usage(self.directory).free if distributed.rank() == 0 else math.inf
        writes += 6 * w.nbytes  # network and optimiser in a checkpoint, while the next one is written; final network
        if writes > free:
            print(f"warning: this run writes {writes / 1e6:,.0f} MB, {self.directory} has {free / 1e6:,.0f} MB free",
                  file=sys.stderr, flush=True)
        k = len(explained) if explained else None
        self.facts = {
            "parameters": w.numel(),
            "data": {"classes": data.classes, "training": data.train.samples, "test": data.test.samples},
            "parameters_trained": k or w.numel(),
            "n_components": k,
            "snapshots": snapshots,
            "explained_variance": {"total": sum(explained), "per_component": explained} if explained else None,
        }
        args = self.args
        print(f"{self.method}: {args.arch} on {args.datasets}, {w.numel():,} parameters, {data.classes} classes, "
              f"{data.train.samples:,} training and {data.test.samples:,} test samples, {w.device}", flush=True)
        if explained:
            print(f"basis: {k} components of {snapshots} snapshots explain {100 * sum(explained):.4f}% of the "
                  "variance; each (%): " + " ".join(f"{100 * share:.3g}" for share in explained), flush=True)

    def take_directory(self):
        """Make the directory, and keep other processes from this method in it until this one ends, killed or not.

        Raises InputError if it cannot be written, if such a process is at work, or if it holds another run's results.
        Of several processes of a run number 0 does this for all.
        """
        if distributed.rank():
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.flag} {self.directory} cannot be made: {error.strerror}") from error
        try:
            self.lock = open(self.directory / f".{self.method}.lock", "w")
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another {self.method} run is at work in {self.directory}; choose another {self.flag} or "
                             "wait for it") from error
        except OSError as error:
            raise InputError(f"{self.flag} {self.directory} cannot be written to: {error.strerror}") from error
        self.refuse_another_run()

    def changes(self, then, harmless=frozenset(HARMLESS)):
        """How the arguments differ from `then`, the harmless ones aside: "lr 0.1 -> 0.2, ...", or "" if not at all."""
        then = {"sync_bn": False, "snapshot_dtype": "float32", **then}  # what files from before these flags mean
        if self.method != "sgd":
            harmless = harmless - {"save_dir"}  # where the snapshots come from
        return ", ".join(f"{key} {then.get(key)} -> {value}" for key, value in vars(self.args).items()
                         if key not in harmless and value != then.get(key))

    def refuse_another_run(self):
        """Raise InputError if a run of this method with other arguments has left epochs or snapshots here."""
        kept = [self.path("log.jsonl"), *([self.directory / "1.pt"] if self.method == "sgd" else [])]
        before = load_json(self.path("args.json"))
        if before is None or not any(path.is_file() and path.stat().st_size for path in kept):
            return
        changed = self.changes(before.get("args", {}), HARMLESS - {"start_epoch"})
        if changed:
            raise InputError(f"{self.directory} holds a {self.method} run with other arguments ({changed}); choose "
                             f"another {self.flag}, or remove its files")

    def has_checkpoint(self):
        """Whether --resume means a checkpoint: a path does, auto if this run has left one."""
        return self.path("checkpoint.pt").is_file() if self.args.resume == "auto" else bool(self.args.resume)

    def first_epoch(self, model, algorithm):
        """Restore the checkpoint that --resume means, or start over; returns the epoch to begin with, from 0."""
        patterns = [f".{self.method}_*.tmp", *([".[0-9]*.pt.tmp"] if self.method == "sgd" else [])]
        for pattern in patterns if distributed.rank() == 0 else ():
            for temporary in self.directory.glob(pattern):  # of a run that was killed while writing
                temporary.unlink()
        first, stale = self.args.start_epoch, ["summary.json", "final.pt"]  # they would not go with the new log
        if self.has_checkpoint():
            path = self.path("checkpoint.pt") if self.args.resume == "auto" else Path(self.args.resume)
            first = self.restore(path, model, algorithm)
            if path != self.path("checkpoint.pt"):  # --resume auto means this one from now on
                self.save("checkpoint.pt", self.state(first, model, algorithm))
        else:
            stale.append("checkpoint.pt")
        save_json(self.path("args.json"), {"command": command_line(), "args": vars(self.args)})
        for name in stale if distributed.rank() == 0 else ():
            self.path(name).unlink(missing_ok=True)
        self.write_log()
        return first

    def write_log(self):
        write_atomically(self.path("log.jsonl"), "".join(json.dumps(line) + "\n" for line in self.log).encode())

    def restore(self, path, model, algorithm):
        """Load a checkpoint, the log as it was then included; returns the epoch to go on with, counted from 0."""
        state = load_file(path, "checkpoint (--resume)")
        kinds = {"epoch": int, "log": list, **dict.fromkeys(("model", "seconds", "algorithm", "facts", "args"), dict)}
        if state.get("method") != self.method or not all(isinstance(state.get(k), kind) for k, kind in kinds.items()):
            raise InputError(f"--resume {path} is not a checkpoint of this script ({self.method}_checkpoint.pt)")
        changed = self.changes(state["args"])
        if changed:
            raise InputError(f"--resume {path} is of another experiment: {changed}")
        if state["epoch"] > self.args.epochs:
            raise InputError(f"--resume {path} is past --epochs {self.args.epochs}: it has {state['epoch']}")
        if state["facts"].get("data") != self.facts["data"]:  # --data may name another place, but not other data
            raise InputError(f"--resume {path} is of other data: {state['facts'].get('data')}, in --data now "
                             f"{self.facts['data']}")
        shares = [facts["explained_variance"] for facts in (state["facts"], self.facts)]
        if shares[0] and not np.allclose(*(share["per_component"] for share in shares), rtol=1e-6):
            raise InputError(f"--resume {path} is of another window: the snapshots in --save-dir span another subspace")
        load_model(model, state["model"], path)
        try:
            algorithm.load_state_dict(state["algorithm"])
            for name in self.seconds:
                self.seconds[name] += state["seconds"][name]
            self.start -= state["seconds"]["total"]
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise InputError(f"--resume {path} is damaged: {error!r}"[:300]) from error
        self.log = state["log"]
        print(f"resumed from {path} after epoch {state['epoch']}", flush=True)
        return state["epoch"]

    def state(self, epoch, model, algorithm):
        """All that a run needs to go on before epoch number `epoch` (counted from 0), copied to the CPU.

        It does not depend on the number of processes; those that write no files get none of it.
        """
        if distributed.rank():
            return None
        seconds = {**self.seconds, "total": time.perf_counter() - self.start}
        return cpu_copy({"method": self.method, "epoch": epoch, "model": model.state_dict(), "seconds": seconds,
                         "algorithm": algorithm.state_dict(), "log": self.log, "facts": self.facts,
                         "args": vars(self.args)})

    # ------------------------------------------------------------------------------------------ what comes of it

    def log_epoch(self, epoch, lr, train, test, seconds, statistics):
        """Append one JSON line to the log and print the same as one line of text. Accuracies in percent."""
        best = max(self.log, key=lambda line: line["test_accuracy"], default=None)
        improved = best is None or test["accuracy"] > best["test_accuracy"]
        line = {
            "epoch": epoch + 1,
            "lr": lr,
            "train_loss": train["loss"],
            "train_accuracy": train["accuracy"],
            "test_loss": test["loss"],
            "test_accuracy": test["accuracy"],
            "best_accuracy": test["accuracy"] if improved else best["test_accuracy"],
            "best_epoch": epoch + 1 if improved else best["epoch"],
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
            raise InputError(f"{self.path('log.jsonl')} cannot be written: {error.strerror}") from error
        trials = f"  trials {line['trials_per_step']:5.2f}" if "trials_per_step" in statistics else ""
        text = ("epoch {epoch:4d}/{epochs}  lr {lr:<7.4g} train loss {train_loss:7.4f} acc {train_accuracy:6.2f}%  "
                "test loss {test_loss:7.4f} acc {test_accuracy:6.2f}%  best {best_accuracy:6.2f}% @{best_epoch:<4d}"
                "{trials}  {seconds:7.1f} s {samples_per_second:8.0f}/s")
        if "top5" in test:
            trials = f"  top-5 {test['top5']:6.2f}%{trials}"
        print(text.format(**line, epochs=self.args.epochs, trials=trials), flush=True)

    def finish(self):
        """Write and return the summary, and print its line."""
        args = self.args
        accuracies = ("test_accuracy", "best_accuracy", "best_epoch", "train_accuracy")
        last = self.log[-1] if self.log else dict.fromkeys(accuracies)
        seconds = {**self.seconds, "total": time.perf_counter() - self.start}
        summary = {
            "method": self.method,
            "dataset": args.datasets,
            "arch": args.arch,
            "seed": args.randomseed,
            "corrupt": args.corrupt,
            **self.facts,
            "epochs": args.epochs,
            "test_accuracy_last": last["test_accuracy"],
            "test_accuracy_best": last["best_accuracy"],
            "best_epoch": last["best_epoch"],
            "train_accuracy_last": last["train_accuracy"],
            **({"test_top5_last": last["test_top5"]} if "test_top5" in last else {}),
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "args": vars(args),
            "command": command_line(),
            "versions": versions(),
            "hardware": hardware(pick_device(args.device)),
            "git_revision": git_revision(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self.write_log()  # on the disk for certain before the summary is
        save_json(self.path("summary.json"), summary)
        print_summary(summary)
        return summary

    def evaluate(self, model, data):
        """--evaluate: test loss and accuracy of <method>_final.pt, or of the file of --resume; returns both."""
        args = self.args
        name = {"": "final.pt", "auto": "checkpoint.pt"}.get(args.resume)
        path = self.path(name) if name else Path(args.resume)
        state = load_file(path, "final network (--evaluate)")
        load_model(model, state.get("model", state), path)
        test = evaluate(model, data.test.epoch(0), args.half, top5=args.datasets == "ImageNet")
        print(f"evaluate  {path}  test loss {test['loss']:.4f}  test accuracy {test['accuracy']:.2f}%"
              + (f"  top-5 {test['top5']:.2f}%" if "top5" in test else ""), flush=True)
        return test


def print_summary(summary):
    """One line that starts with "summary", of key=value pairs."""
    keys = ("method", "dataset", "arch", "seed", "corrupt", "parameters_trained", "epochs", "best_epoch")
    percents = {key: summary[key] for key in ("test_accuracy_last", "test_accuracy_best", "train_accuracy_last")}
    print("summary", *(f"{key}={summary[key]}" for key in keys),
          *(f"{key}={value if value is None else round(value, 2)}" for key, value in percents.items()),
          f"seconds={summary['seconds']['total']:.1f}", flush=True)


def command_line():
    """The command as typed, torchrun's part as far as it matters; of an absolute path to the script only its name."""
    script = Path(sys.argv[0])
    here = os.environ.get("LOCAL_WORLD_SIZE", distributed.world())
    launcher = ["torchrun", f"--nproc_per_node={here}"] if distributed.world() > 1 else ["python"]
    if distributed.world() > int(here):
        launcher.append(f"--nnodes={distributed.world() // int(here)}")
    return shlex.join([*launcher, script.name if script.is_absolute() else str(script), *sys.argv[1:]])


def versions():
    import sklearn
    import torchvision

    return {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
            "numpy": np.__version__, "scikit-learn": sklearn.__version__, "cuda": torch.version.cuda}


def hardware(device):
    """What a figure's reader needs to know of the machine: processor, cores, memory, GPU; no host name."""
    cpu = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"device": device.type, "gpu": gpu, "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "processes": distributed.world(), "memory_gib": round(memory, 1)}


def git_revision():
    """Commit of this checkout, with "-dirty" if tracked files differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
