"""Run directory: atomic writes, checkpoints, log, summary."""
import contextlib
import errno
import fcntl
import importlib.metadata
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
import zlib
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from dldr import distributed
from dldr.errors import UserError

# ------------------------------------------------------------------------------------------------------ single files


def write_atomically(path, data):
    """Atomic write (temporary file, fsync, rename) of bytes, on rank 0, in a folder that is made if need be."""
    if distributed.rank():
        return path
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # the new name, too
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system whose directories cannot be flushed (CIFS)
                raise
        finally:
            os.close(directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({len(data):,} bytes): {error.strerror or error}") from error
    return path


def save_tensors(path, value):
    """torch.save of nested dicts of tensors, atomically; raises UserError with path and size if that fails."""
    if distributed.rank():
        return path
    value = cpu_copy(value)  # clone, since torch.save stores a view's whole storage
    buffer = io.BytesIO()  # torch.save reports a full disk as a RuntimeError of its own wording; a file says OSError
    torch.save(value, buffer)
    return write_atomically(path, buffer.getbuffer())


def checksum(path):
    """Of a file by torch.save, from the checksums that its directory carries; "" for one of another format."""
    if not zipfile.is_zipfile(path):
        return ""
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, entry.CRC) for entry in archive.infolist()]
    return f"{zlib.crc32(repr(entries).encode()):08x}"


def save_json(path, value):
    """JSON, atomically; raises UserError like `save_tensors`."""
    return write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def load_file(path, what, mmap=False):
    """A dict of tensors and plain values from a file; raises UserError if it is missing or unreadable.

    Only tensors and plain values are unpickled: a file from elsewhere cannot run code. torch.save's checksums, which
    torch.load ignores, are compared, so that a flipped bit is found. `mmap`: the tensors are memory-mapped.
    """
    try:
        if zipfile.is_zipfile(path):  # the official release's older format is not
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged!r} in it is damaged")
        with warnings.catch_warnings(action="ignore"):  # torch's guesses about files that are none
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no {what} at this path") from error
    except Exception as error:  # invalid files raise many exception types
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(f"{what} {path} holds a pickled {refused[1]}; only tensors, numbers, strings, lists and "
                            "dicts are read: save its state_dict()") from error
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{what} {path} cannot be read: {reason[:200]} (truncated, or not by torch.save?)") from error
    if not isinstance(value, dict):
        raise UserError(f"{what} {path} holds a {type(value).__name__}, not a dict")
    return value


def without_prefixes(key):
    """A key of a state dict without what DataParallel (`module.`) or torch.compile (`_orig_mod.`) put before it."""
    return re.sub(r"^((module|_orig_mod)\.)+", "", str(key))


def state_dict_in(value, keys):
    """The state dict in what people save, itself or in a dict beside other things.

    It has the names `keys` where only prefixes (`module.`, `_orig_mod.`) differ from them, on either side.
    """
    for name in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(value.get(name), dict):
            value = value[name]
            break
    if value.keys() == set(keys):
        return value
    bare, names = {without_prefixes(key): item for key, item in value.items()}, {without_prefixes(k): k for k in keys}
    return {names[key]: item for key, item in bare.items()} if bare.keys() == names.keys() else bare


def load_json(path):
    """A JSON object from a file, or None if there is no such file; raises UserError if it is damaged."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def differences(then, now):
    """Where `now` differs from `then`: "lr 0.1 -> 0.2, ...", or "" if nowhere."""
    return ", ".join(f"{key} {then.get(key)} -> {value}" for key, value in now.items() if value != then.get(key))


def load_model(model, state, path):
    """model.load_state_dict of `state_dict_in`, with one line that names the file if it does not fit."""
    try:
        model.load_state_dict(state_dict_in(state, list(model.state_dict())))
    except (RuntimeError, AttributeError) as error:
        raise UserError(f"{path} does not fit the network of --arch and --datasets: {error}"[:400]) from error


def cpu_copy(value):
    """A copy of nested dicts, lists and tensors that shares no memory with the original, tensors on the CPU.

    Small tensors of a GPU come in one transfer for each dtype, instead of one and a wait for each.
    """
    small = {}  # dtype -> tensors
    for x in tensors_in(value):
        if x.is_cuda and x.numel() < 2**20:
            small.setdefault(x.dtype, {})[id(x)] = x
    copies = {}
    for tensors in small.values():
        flat = torch.cat([x.detach().reshape(-1) for x in tensors.values()]).cpu()
        for x, part in zip(tensors.values(), flat.split([x.numel() for x in tensors.values()]), strict=True):
            copies[id(x)] = part.view(x.shape).clone()

    def copy(value):
        if isinstance(value, torch.Tensor):
            return copies[id(value)] if id(value) in copies else value.detach().to("cpu", copy=True)
        if isinstance(value, dict):
            return {key: copy(item) for key, item in value.items()}
        return [copy(item) for item in value] if isinstance(value, list) else value

    return copy(value)


def tensors_in(value):
    """The tensors of nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from tensors_in(item)


# ------------------------------------------------------------------------------------------------------------- a run

FORMAT = 2  # of checkpoints; those without a number are of revision 4748ea4 and before


class Run:
    """One run of a method: its directory and lock, its clocks, its lines on the console, and the files

    <method>_args.json, _log.jsonl, _checkpoint.pt, _final.pt and _summary.json.
    """

    def __init__(self, method, args, changeable, snapshots=()):
        """`args`: the flags by name (a dict); `changeable`: those that a resumed run may change.

        `snapshots`: the files of the window, in a subspace method.
        """
        self.method, self.args, self.changeable, self.snapshots = method, args, set(changeable), snapshots
        self.directory = Path(args.get("output_dir") or args["save_dir"])
        self.flag = "--output-dir" if "output_dir" in args else "--save-dir"
        self.start, self.seconds = time.perf_counter(), dict.fromkeys(("load", "basis", "train", "eval"), 0.0)
        self.log, self.facts, self.lock = [], {}, None

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

    def finished(self):
        """Whether there is nothing to do; else the run may start, or resume. Reads only.

        | directory              | no flag                     | --resume auto              | --overwrite |
        |------------------------|-----------------------------|----------------------------|-------------|
        | empty                  | start                       | start                      | start       |
        | finished, same flags   | refused, names both flags   | nothing to do: the summary | start over  |
        | unfinished, same flags | refused, names both flags   | resume                     | start over  |
        | other flags            | refused, names differences  | refused                    | start over  |

        Starting over removes what lies there first. --resume PATH starts from that checkpoint, where --resume auto
        would start or resume. Flags that may change (more --epochs, say) are the same flags.
        """
        args = self.args
        if args["evaluate"] or args["overwrite"]:
            return False
        if not any(path.is_file() and path.stat().st_size for path in self.results()):
            return False
        before = load_json(self.path("args.json"))
        changed = "unknown ones" if before is None else self.changes(before.get("args", {}))
        if changed:
            raise UserError(f"{self.directory} holds a {self.method} run with other flags ({changed}); choose another "
                            f"{self.flag}, or start over with --overwrite")
        summary = load_json(self.path("summary.json"))
        newest = max((path.stat().st_mtime for path in self.snapshots), default=0)
        done = (summary is not None and summary.get("epochs") == args["epochs"]
                and summary["args"].get("data") == args["data"]  # else the data are compared first, on resuming
                and newest <= self.path("summary.json").stat().st_mtime)  # else it is of other snapshots
        if done and args["resume"] not in ("", "auto"):
            raise UserError(f"{self.directory} holds a finished {self.method} run with these flags: --resume "
                            f"{args['resume']} would replace it; choose another {self.flag}, or remove its files")
        if not args["resume"]:
            raise UserError(f"{self.directory} holds {'a finished' if done else 'an unfinished'} {self.method} run "
                            f"with these flags; {'keep' if done else 'resume'} it with --resume auto, or start over "
                            "with --overwrite")
        if done and args["resume"] == "auto" and distributed.rank() == 0:
            print(f"{self.path('summary.json')}: already finished, nothing to do", flush=True)
            print_summary(summary)
        return done and args["resume"] == "auto"

    def results(self):
        """Files that make a directory that of a run of this method."""
        samples = self.args.get("samples_per_epoch") or 1
        first = self.directory / f"{self.args.get('start_epoch', 0) * samples + 1}.pt"
        return [*(self.path(name) for name in ("log.jsonl", "checkpoint.pt", "final.pt", "summary.json")),
                *([first] if self.method == "sgd" else [])]

    def changes(self, then):
        """How the flags differ from `then`, ignoring those that may change: "lr 0.1 -> 0.2, ...", or ""."""
        # what files from before these flags mean
        then = {"sync_bn": False, "snapshot_dtype": "float32", "allow_mismatch": [], "start": "first", **then}
        return differences(then, {key: value for key, value in self.args.items() if key not in self.changeable})

    def take_directory(self):
        """Make the directory and lock it (the OS releases the lock on exit); with --overwrite empty it. On rank 0.

        Raises UserError if it cannot be written, or if another process is writing to it.
        """
        if distributed.rank():
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.flag} {self.directory} cannot be made: {error.strerror}") from error
        try:
            self.lock = open(self.directory / f".{self.method}.lock", "w")
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another {self.method} process is writing to {self.directory}; choose another {self.flag} "
                            "or wait for it") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise UserError(f"{self.flag} {self.directory} cannot be written to: {error.strerror}") from error
            print(f"warning: the file system of {self.directory} has no locks: nothing keeps another process out of it",
                  file=sys.stderr, flush=True)
        stale = list(self.directory.glob(f".{self.method}_*.tmp"))  # of a run that was killed while writing
        snapshots = [path for path in self.directory.iterdir() if re.fullmatch(r"\d+\.pt|\.\d+\.pt\.tmp", path.name)]
        if self.args["overwrite"]:
            stale += [*self.results(), self.path("args.json"), self.path("snapshots.json")]
        if self.method == "sgd":
            stale += [path for path in snapshots if self.args["overwrite"] or path.suffix == ".tmp"]
        for path in stale:
            path.unlink(missing_ok=True)

    def has_checkpoint(self):
        """Whether this run resumes: from --resume PATH, or with auto from its own checkpoint if it has left one."""
        return self.path("checkpoint.pt").is_file() if self.args["resume"] == "auto" else bool(self.args["resume"])

    def begin(self, data, w, *, snapshots, explained=None, sampling=None, writes=0):
        """Print what is trained, and keep it for the summary.

        `explained`: the variance shares of the basis, if any; `sampling`: how its snapshots were made. `writes`: bytes
        of the snapshots to come; warns if the free disk space is too small.
        """
        free = shutil.disk_usage(self.directory).free if distributed.rank() == 0 else math.inf
        writes += 6 * w.nbytes  # network and optimiser in a checkpoint, while the next one is written; final network
        if writes > free:
            print(f"warning: this run writes {writes / 1e6:,.0f} MB, {self.directory} has {free / 1e6:,.0f} MB free",
                  file=sys.stderr, flush=True)
        k = len(explained) if explained else None
        self.facts = {
            "parameters": w.numel(),
            "data": data.facts,
            "parameters_trained": k or w.numel(),
            "n_components": k,
            "snapshots": snapshots,
            **({"sampling": sampling} if sampling else {}),
            "explained_variance": {"total": sum(explained), "per_component": explained} if explained else None,
        }
        args = self.args
        print(f"{self.method}: {args['arch']} on {args['datasets']}, {w.numel():,} parameters, {data.classes} classes, "
              f"{data.train.samples:,} training and {data.test.samples:,} test samples, {w.device}", flush=True)
        if explained:
            print(f"basis: {k} components of {snapshots} snapshots explain {100 * sum(explained):.4f}% of the "
                  "variance; each (%): " + " ".join(f"{100 * share:.3g}" for share in explained), flush=True)

    def first_epoch(self, model, optimizer):
        """Restore the checkpoint, or start over; returns the index of the first epoch to train."""
        first = self.args["start_epoch"]
        if self.has_checkpoint():
            path = self.path("checkpoint.pt") if self.args["resume"] == "auto" else Path(self.args["resume"])
            first = self.restore(path, model, optimizer)
            if path != self.path("checkpoint.pt"):  # --resume auto means this one from now on
                self.save("checkpoint.pt", self.state(first, model, optimizer))
        if self.method == "sgd" and (known := load_json(self.path("snapshots.json"))):
            last = first * self.args["samples_per_epoch"]  # later ones are written again, maybe with other bits
            save_json(self.path("snapshots.json"), {i: value for i, value in known.items() if int(i) <= last})
        save_json(self.path("args.json"), {"command": command_line(), "args": self.args, "data": self.facts["data"]})
        for name in ("summary.json", "final.pt") if distributed.rank() == 0 else ():
            self.path(name).unlink(missing_ok=True)  # they would not go with the new log
        self.write_log()
        return first

    def save_snapshot(self, index, state):
        """Save the state dict number `index` of the trajectory, and its checksum in sgd_snapshots.json."""
        path = save_tensors(self.directory / f"{index}.pt", state)
        if distributed.rank() == 0:
            known = load_json(self.path("snapshots.json")) or {}
            save_json(self.path("snapshots.json"), {**known, str(index): checksum(path)})

    def write_log(self):
        write_atomically(self.path("log.jsonl"), "".join(json.dumps(line) + "\n" for line in self.log).encode())

    def restore(self, path, model, optimizer):
        """Load a checkpoint, with the log as it was then; returns the index of the next epoch."""
        state = load_file(path, "checkpoint (--resume)")
        if state.get("method") == self.method and "format" not in state:
            raise UserError(f"--resume {path} is a checkpoint of an earlier revision (4748ea4 or before): "
                            "resume it with that revision, or start over with --overwrite")
        kinds = {"epoch": int, "log": list, **dict.fromkeys(("model", "seconds", "optimizer", "facts", "args"), dict)}
        if state.get("method") != self.method or not all(isinstance(state.get(k), kind) for k, kind in kinds.items()):
            raise UserError(f"--resume {path} is not a checkpoint of this script ({self.method}_checkpoint.pt)")
        changed = self.changes(state["args"])
        if changed:
            raise UserError(f"--resume {path} is of another experiment: {changed}")
        if state["epoch"] > self.args["epochs"]:
            raise UserError(f"--resume {path} is past --epochs {self.args['epochs']}: it has {state['epoch']}")
        if changed := differences(state["facts"].get("data", {}), self.facts["data"]):  # --data may have moved
            raise UserError(f"--resume {path} is of other data than --datasets {self.args['datasets']} --data "
                            f"{self.args['data']}: {changed}")
        shares = [facts["explained_variance"] for facts in (state["facts"], self.facts)]
        if shares[0] and not np.allclose(*(share["per_component"] for share in shares), rtol=1e-4):
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

    # ------------------------------------------------------------------------------------------ log and summary

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
            raise UserError(f"{self.path('log.jsonl')} cannot be written: {error.strerror}") from error
        trials = f"  trials {line['trials_per_step']:5.2f}" if "trials_per_step" in statistics else ""
        text = ("epoch {epoch:4d}/{epochs}  lr {lr:<7.4g} train loss {train_loss:7.4f} acc {train_accuracy:6.2f}%  "
                "test loss {test_loss:7.4f} acc {test_accuracy:6.2f}%  best {best_accuracy:6.2f}% @{best_epoch:<4d}"
                "{trials}  {seconds:7.1f} s {samples_per_second:8.0f}/s")
        if "top5" in test:
            trials = f"  top-5 {test['top5']:6.2f}%{trials}"
        print(text.format(**line, epochs=self.args["epochs"], trials=trials), flush=True)

    def finish(self, device):
        """Write and return the summary, and print its line."""
        args = self.args
        accuracies = ("test_accuracy", "best_accuracy", "best_epoch", "train_accuracy")
        last = self.log[-1] if self.log else dict.fromkeys(accuracies)
        seconds = {**self.seconds, "total": time.perf_counter() - self.start}
        summary = {
            "method": self.method,
            "dataset": args["datasets"],
            "arch": args["arch"],
            "seed": args["randomseed"],
            "corrupt": args["corrupt"],
            **self.facts,
            "epochs": args["epochs"],
            "test_accuracy_last": last["test_accuracy"],
            "test_accuracy_best": last["best_accuracy"],
            "best_epoch": last["best_epoch"],
            "train_accuracy_last": last["train_accuracy"],
            **({"test_top5_last": last["test_top5"]} if "test_top5" in last else {}),
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "args": args,
            "command": command_line(),
            **provenance(device),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
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


def command_line():
    """Command line to reproduce the run."""
    script = Path(sys.argv[0])
    here = os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size())
    launcher = ["torchrun", f"--nproc_per_node={here}"] if distributed.world_size() > 1 else ["python"]
    if distributed.world_size() > int(here):
        launcher.append(f"--nnodes={distributed.world_size() // int(here)}")
    return shlex.join([*launcher, script.name if script.is_absolute() else str(script), *sys.argv[1:]])


def provenance(device):
    """What a reader needs to know of a result's origin: versions, hardware, revision."""
    return {"versions": versions(), "hardware": hardware(device), "git_revision": git_revision()}


def versions():
    """Of python and packages, "none" where one is not installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    for package in ("torchvision", "scikit-learn"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return {**found, "cuda": torch.version.cuda}


def hardware(device):
    """What a figure's reader needs to know of the machine: processor, cores, memory, GPU; no host name."""
    cpu = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"device": device.type, "gpu": gpu, "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "processes": distributed.world_size(), "memory_gib": round(memory, 1)}


def git_revision():
    """Commit of this checkout, with "-dirty" if tracked files differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
