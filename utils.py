"""What the three scripts share: flags, set-up, the only training and evaluation loop, and the files a run writes.

This module imports none of the others (flag checks aside), so that all of them can raise its InputError.
"""
import argparse
import contextlib
import ctypes
import io
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm


class InputError(Exception):
    """Something the user can put right. Its message is one line that names the flag or file and what to do."""


class NonFiniteLoss(Exception):
    """A loss became NaN or infinite; raised before the step that would have used it."""


def run_script(parse_args, main):
    """Entry point of a script: exit status 2 for wrong usage, 1 with one line on stderr for an InputError."""
    args = parse_args()
    try:
        main(args)
    except InputError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}")


# ------------------------------------------------------------------------------------------------------------ flags


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, exit status 2."""

    def error(self, message):  # one line, without the usage that would bury it
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=32, width=110)

    def _get_help_string(self, action):  # no "(default: None)": the help says what happens then; but "(default: 0)"
        bare = action.default is None or action.default is False or action.default == ""
        return action.help if bare else super()._get_help_string(action)


def _at_least(kind, low, text):
    """An argparse type: `kind` (int or float) that is at least `low`."""

    def convert(value):
        number = kind(value)
        if not number >= low or not math.isfinite(number):
            raise argparse.ArgumentTypeError(f"{value} is not {text}")
        return number

    convert.__name__ = kind.__name__
    return convert


count = _at_least(int, 1, "a whole number of at least 1")
natural = _at_least(int, 0, "a whole number of at least 0")
nonnegative = _at_least(float, 0, "a number of at least 0")


def seed(value):
    """An argparse type: a seed that torch and numpy both take."""
    number = int(value)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{value} is not a whole number from 0 to 2**32 - 1")
    return number


def fraction(value):
    """An argparse type: a float in [0, 1]."""
    number = float(value)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not in [0, 1]")
    return number


def base_parser(doc, *, epochs, batch_size, lr, lr_help, epochs_help="epochs in all",
                batch_help="samples per mini-batch"):
    """A parser with the flags that all three scripts have; returns (parser, the group of training flags)."""
    description, example = doc.strip().split("\n\nExample", 1)
    parser = Parser(
        description=description, epilog="example" + example, formatter_class=HelpFormatter, allow_abbrev=False
    )
    data = parser.add_argument_group("data and network")
    data.add_argument("--datasets", default="CIFAR10", metavar="NAME",
                      help="CIFAR10, CIFAR100, MNIST, FashionMNIST, digits (comes with scikit-learn) or ImageNet")
    data.add_argument("--data", default=os.environ.get("DLDR_DATA", "data/"), metavar="DIR",
                      help="where data sets lie or are downloaded to; the environment variable DLDR_DATA sets it too")
    data.add_argument("-a", "--arch", default="resnet32", metavar="ARCH",
                      help="network: resnet8, 20, 32, 44, 56, 110, 1202; on ImageNet a torchvision name (resnet18)")
    data.add_argument("--corrupt", type=fraction, default=0.0, metavar="C",
                      help="share of the training labels, in [0, 1], redrawn uniformly over all classes")
    data.add_argument("--smalldatasets", type=fraction, default=None, metavar="P",
                      help="use only this share, in [0, 1], of the training samples: the first ones (default: all)")
    data.add_argument("-j", "--workers", type=natural, default=4, metavar="N",
                      help="data loading processes, for ImageNet; other data sets live on the device")

    train = parser.add_argument_group("training")
    train.add_argument("--epochs", type=natural, default=epochs, metavar="N", help=epochs_help)
    train.add_argument("--start-epoch", type=natural, default=0, metavar="N",
                       help="number of the first epoch: schedule, order and names of snapshots count from it; --resume "
                       "knows its own")
    train.add_argument("-b", "--batch-size", type=count, default=batch_size, metavar="N", help=batch_help)
    train.add_argument("--lr", "--learning-rate", type=nonnegative, default=lr, metavar="LR", help=lr_help)
    train.add_argument("--accumulate", type=count, default=1, metavar="A",
                       help="average the gradient of A mini-batches before each update")
    train.add_argument("--randomseed", type=seed, default=1, metavar="N",
                       help="seed of initial weights, order, augmentation and label noise")
    train.add_argument("-e", "--evaluate", action="store_true",
                       help="only evaluate the final network of this run (or the checkpoint of --resume) and exit")
    train.add_argument("--resume", default="", metavar="PATH",
                       help="go on from this *_checkpoint.pt to the result of an uninterrupted run (bitwise on a CPU, "
                       "and with --deterministic on a GPU)")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", metavar="auto|cpu|cuda|cuda:N",
                         help="where to run; auto: CUDA where there is one")
    machine.add_argument("--half", action="store_true",
                         help="bfloat16 autocast of the network's passes; never in the basis, the projections or the "
                         "Armijo comparison")
    machine.add_argument("--deterministic", action="store_true",
                         help="only deterministic algorithms: bitwise repeatable on one machine, slower on CUDA")

    output = parser.add_argument_group("output")
    output.add_argument("--save-dir", default="save_temp", metavar="DIR",
                        help="directory of the snapshots 0.pt, 1.pt, ...")
    output.add_argument("--save-every", type=count, default=10, metavar="N",
                        help="write a checkpoint for --resume every N epochs, and after the last")
    output.add_argument("-p", "--print-freq", type=count, default=50, metavar="N",
                        help="iterations between updates of the progress bar (on a terminal only)")
    return parser, train


def add_subspace_flags(parser):
    """The flags of the two subspace scripts."""
    group = parser.add_argument_group("subspace")
    group.add_argument("--n_components", type=count, default=40, metavar="K",
                       help="dimensions: the first K principal directions, at most snapshots - 1")
    group.add_argument("--params_start", type=natural, default=0, metavar="I",
                       help="first snapshot of the window, and the one training starts from")
    group.add_argument("--params_end", type=natural, default=51, metavar="I", help="one past its last snapshot")
    group.add_argument("--params_step", type=count, default=1, metavar="N",
                       help="use every N-th snapshot of the window")
    group.add_argument("--output-dir", default=None, metavar="DIR", help="where to write (default: the --save-dir)")


def check_args(parser, args):
    """Exit with status 2 and one line if the flags cannot work together, before anything is read or written."""
    import datasets  # here and not above: both import this module
    import models

    try:
        datasets.check_name(args.datasets)
        models.check_name(args.arch, args.datasets)
        pick_device(args.device)
    except InputError as error:
        parser.error(str(error))
    if args.smalldatasets == 0:
        parser.error("--smalldatasets 0 leaves no training sample")
    if "n_components" in args and not args.evaluate:
        snapshots = len(window_indices(args))
        if args.params_end <= args.params_start:
            parser.error(f"--params_end {args.params_end} must be larger than --params_start {args.params_start}")
        if args.n_components > snapshots - 1:
            parser.error(
                f"--n_components {args.n_components} needs at least {args.n_components + 1} snapshots; --params_start "
                f"{args.params_start} --params_end {args.params_end} --params_step {args.params_step} are {snapshots}"
            )
    return args


def window_indices(args):
    """The snapshots that --params_start, --params_end (exclusive) and --params_step name."""
    return range(args.params_start, args.params_end, args.params_step)


# ----------------------------------------------------------------------------------------------- device and randomness


def pick_device(name):
    """torch.device for --device; raises InputError for one that this machine does not have."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: not one of auto, cpu, cuda, cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    index = device.index or 0
    if index >= torch.cuda.device_count():
        raise InputError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices; try --device auto")
    return torch.device("cuda", index)


def set_up(args):
    """Pick the device, seed everything for the initial weights, and choose the numerics; returns the device."""
    torch.set_float32_matmul_precision("highest")  # products with P: TF32 would cost 4e-4 relative error
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(args.deterministic)
    torch.backends.cudnn.benchmark = not args.deterministic
    seed_everything(args.randomseed)
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    return device


def keep_freed_memory():
    """Let glibc keep the activations that a step frees for the next one, in place of returning them to the kernel.

    Faulting them in again took half of a step: ResNet-20 at batch 1024 on two cores, 2.4 s with and 1.2 s without.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: whose top is never given back


def seed_everything(seed, epoch=None):
    """Make what is drawn from torch's generators (initial weights; dropout) a function of (seed, epoch)."""
    torch.manual_seed(seed if epoch is None else int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))


# ----------------------------------------------------------------------------------------------- the loop


def multistep(lr, milestones, warm_up=False):
    """Schedule epoch -> lr: x 0.1 from each milestone on, and, with `warm_up`, x 0.1 during the first epoch."""

    def schedule(epoch):
        return lr * 0.1 ** (sum(epoch >= m for m in milestones) + (warm_up and epoch == 0))

    return schedule


def forward(model, x, half=False):
    """Logits (N, classes), float32 with `half` too, where the network itself runs in bfloat16 autocast."""
    if not half:
        return model(x)
    with torch.autocast(x.device.type, torch.bfloat16):
        return model(x).float()


def train_epoch(model, w, batches, update, *, iterations=None, accumulate=1, half=False, after_iteration=None,
                bar=None):
    """One epoch: forward, backward, and update(loss, x, y) after every `accumulate` mini-batches.

    w is the model's `flat_parameters`; at an update w.grad holds the mean gradient over the accumulated mini-batches,
    `loss` (a float) and (x, y) belong to the last of them. A shorter group at the end of the epoch counts too;
    `iterations` says how many batches there are, where `batches` has no length.
    after_iteration(i) is called after mini-batch i = 1, 2, ... Returns the mean loss and accuracy (%) of the forward
    passes before each step. Raises NonFiniteLoss before an update that would use such a loss.
    """
    model.train()
    iterations = iterations or len(batches)
    loss_sum = correct = seen = pending = 0
    w.grad.zero_()
    for i, (x, y) in enumerate(batches, 1):
        logits = forward(model, x, half)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        value, hits = torch.stack([loss.detach(), (logits.argmax(1) == y).sum()]).tolist()  # one synchronisation
        if not math.isfinite(value):
            raise NonFiniteLoss(f"the training loss is {value} at iteration {i}")
        loss_sum, correct, seen, pending = loss_sum + value * len(y), correct + hits, seen + len(y), pending + 1
        if pending == accumulate or i == iterations:
            w.grad.div_(pending)
            update(value, x, y)
            w.grad.zero_()
            pending = 0
        if after_iteration:
            after_iteration(i)
        if bar is not None:
            bar.set_postfix(loss=f"{loss_sum / seen:.4f}", accuracy=f"{100 * correct / seen:.2f}%", refresh=False)
            bar.update()
    return {"loss": loss_sum / seen, "accuracy": 100 * correct / seen, "samples": seen}


@torch.inference_mode()
def evaluate(model, batches, half=False):
    """Mean loss and accuracy (%) of the model in eval mode over `batches`, read from the device once."""
    model.eval()
    loss_sum = correct = seen = 0
    for x, y in batches:
        logits = forward(model, x, half)
        loss_sum = loss_sum + F.cross_entropy(logits, y, reduction="sum").double()
        correct = correct + (logits.argmax(1) == y).sum()
        seen += len(y)
    return {"loss": float(loss_sum) / seen, "accuracy": 100 * int(correct) / seen}


def fit(run, model, w, data, update, *, schedule, algorithm, statistics=None, after_iteration=None):
    """Train for the epochs of run.args, evaluating, logging and checkpointing after each; returns the summary.

    update(loss, x, y): see `train_epoch`. `algorithm` has state_dict and load_state_dict, for --resume, and may have
    param_groups as torch's optimisers do: they get the lr that schedule(epoch) says. statistics() gives what
    the method adds to an epoch's log. after_iteration(epoch, i) is called after each mini-batch.
    """
    args = run.args
    first = run.resume(model, algorithm) if args.resume else run.start_over()
    for epoch in range(first, args.epochs):
        good = run.state(epoch, model, algorithm)
        seed_everything(args.randomseed, epoch)
        lr = schedule(epoch)
        for group in getattr(algorithm, "param_groups", ()):  # read anew: loading a state replaces them
            group["lr"] = lr
        hook = after_iteration and (lambda i, epoch=epoch: after_iteration(epoch, i))
        bar = tqdm(total=len(data.train), desc=f"epoch {epoch + 1}/{args.epochs}", unit="it", leave=False,
                   disable=None, miniters=args.print_freq, mininterval=0, file=sys.stderr)
        try:
            with run.timer("train") as train_time, bar:
                train = train_epoch(model, w, data.train.epoch(epoch), update, iterations=len(data.train),
                                    accumulate=args.accumulate, half=args.half, after_iteration=hook, bar=bar)
            with run.timer("eval"):
                test = evaluate(model, data.test.epoch(0), args.half)
            if not math.isfinite(test["loss"]):  # where the last step of the epoch was the fatal one
                raise NonFiniteLoss(f"the test loss is {test['loss']} after the last iteration")
        except (NonFiniteLoss, FloatingPointError) as error:
            path = run.save("checkpoint.pt", good)
            raise InputError(
                f"epoch {epoch + 1}: {error}; stopped there, the state before this epoch is in {path}; "
                f"try a smaller --lr{', or without --half' if args.half else ''}"
            ) from error
        run.log_epoch(epoch, lr, train, test, train_time.seconds, statistics() if statistics else {})
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
            run.save("checkpoint.pt", run.state(epoch + 1, model, algorithm))
    run.save("final.pt", cpu_copy(model.state_dict()))
    return run.finish()


def evaluate_saved(run, model, data):
    """--evaluate: test loss and accuracy of <method>_final.pt, or of the checkpoint of --resume; returns both."""
    path = Path(run.args.resume) if run.args.resume else run.path("final.pt")
    state = load_file(path, "final network (--evaluate)")
    load_model(model, state.get("model", state), path)
    test = evaluate(model, data.test.epoch(0), run.args.half)
    print(f"evaluate  {path}  test loss {test['loss']:.4f}  test accuracy {test['accuracy']:.2f}%")
    return test


# ----------------------------------------------------------------------------------------------- files


def cpu_copy(value):
    """A copy of nested dicts, lists and tensors that shares no memory with the original, tensors on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: cpu_copy(item) for key, item in value.items()}
    return [cpu_copy(item) for item in value] if isinstance(value, list) else value


def write_atomically(path, write):
    """Call write(file) on a temporary file beside `path` and move it there, so that `path` is never half written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def save_tensors(path, value):
    """torch.save of nested dicts of tensors, atomically; raises InputError naming the path if it cannot be written."""
    buffer = io.BytesIO()  # torch.save reports a full disk as a RuntimeError of its own wording; a file says OSError
    torch.save(value, buffer)
    return write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def save_json(path, value):
    return write_atomically(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def load_file(path, what):
    """A dict of tensors and plain values from a file; raises InputError that says what was looked for and why not.

    Only tensors and plain values are unpickled: a file from elsewhere cannot run code.
    """
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no {what} at this path") from error
    except Exception as error:  # whatever a truncated, foreign or hostile file provokes
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"{what} {path} cannot be read: {reason[:200]}") from error
    if not isinstance(value, dict):
        raise InputError(f"{what} {path} holds a {type(value).__name__}, not a dict")
    return value


def load_model(model, state, path):
    """model.load_state_dict, with one line that names the file if it does not fit."""
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError) as error:
        raise InputError(f"{path} does not fit the network of --arch and --datasets: {error}"[:400]) from error


class Timer:
    seconds = 0.0


# arguments that may differ between a checkpoint and the run that goes on from it
HARMLESS = {"epochs", "start_epoch", "resume", "evaluate", "data", "workers", "device", "save_dir", "output_dir",
            "save_every", "print_freq"}


class Run:
    """What one run writes: <method>_args.json, _log.jsonl, _checkpoint.pt, _final.pt and _summary.json in a directory.

    Also its clocks (run.timer("train") and so on, in seconds) and its lines on the console.
    """

    def __init__(self, method, args):
        self.method, self.args, self.start = method, args, time.perf_counter()
        self.directory = Path(getattr(args, "output_dir", None) or args.save_dir)
        self.seconds = dict.fromkeys(("load", "basis", "train", "eval"), 0.0)
        self.log, self.facts = [], {}
        if not args.evaluate:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                flag = "--output-dir" if getattr(args, "output_dir", None) else "--save-dir"
                raise InputError(f"{flag} {self.directory} cannot be made: {error.strerror}") from error

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

    def begin(self, data, w, *, snapshots, explained=None):
        """Say what is trained, and keep it for the summary. `explained`: variance shares of the basis, if any.

        Raises InputError if the directory holds a run of the same method with other arguments.
        """
        self.refuse_another_run()
        save_json(self.path("args.json"), {"command": command_line(), "args": vars(self.args)})
        k = len(explained) if explained else None
        self.facts = {
            "parameters": w.numel(),
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
            **statistics,
        }
        self.log.append(line)
        try:
            with open(self.path("log.jsonl"), "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise InputError(f"{self.path('log.jsonl')} cannot be written: {error.strerror}") from error
        trials = f"  trials {line['trials_per_step']:5.2f}" if statistics else ""
        text = ("epoch {epoch:4d}/{epochs}  lr {lr:<7.4g} train loss {train_loss:7.4f} acc {train_accuracy:6.2f}%  "
                "test loss {test_loss:7.4f} acc {test_accuracy:6.2f}%  best {best_accuracy:6.2f}% @{best_epoch:<4d}"
                "{trials}  {seconds:7.1f} s {samples_per_second:8.0f}/s")
        print(text.format(**line, epochs=self.args.epochs, trials=trials), flush=True)

    def state(self, epoch, model, algorithm):
        """All that a run needs to go on before epoch number `epoch` (counted from 0), copied to the CPU."""
        seconds = {**self.seconds, "total": time.perf_counter() - self.start}
        return cpu_copy({"method": self.method, "epoch": epoch, "model": model.state_dict(), "seconds": seconds,
                         "algorithm": algorithm.state_dict(), "log": self.log, "facts": self.facts,
                         "args": vars(self.args)})

    def changes(self, then, harmless):
        """How the arguments differ from `then`, the harmless ones aside: "lr 0.1 -> 0.2, ...", or "" if not at all."""
        return ", ".join(f"{key} {then.get(key)} -> {value}" for key, value in vars(self.args).items()
                         if key not in harmless and value != then.get(key))

    def refuse_another_run(self):
        """Raise InputError if a run of this method with other arguments has left its summary or snapshots here."""
        kept = [self.path("summary.json"), *([self.directory / "1.pt"] if self.method == "sgd" else [])]
        if self.args.resume or not self.path("args.json").is_file() or not any(path.is_file() for path in kept):
            return
        try:
            then = json.loads(self.path("args.json").read_text())["args"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path('args.json')} cannot be read: {error}") from error
        changed = self.changes(then, HARMLESS - {"start_epoch"})
        if changed:
            flag = "--save-dir" if self.method == "sgd" else "--output-dir"
            raise InputError(f"{self.directory} holds a {self.method} run with other arguments ({changed}); choose "
                             f"another {flag}, or remove its files")

    def start_over(self):
        """Remove what an earlier run of this method left: it would not go with the new log. Returns the first epoch."""
        for name in ("summary.json", "final.pt", "checkpoint.pt"):
            self.path(name).unlink(missing_ok=True)
        write_atomically(self.path("log.jsonl"), lambda file: None)
        return self.args.start_epoch

    def resume(self, model, algorithm):
        """Restore the checkpoint of --resume and cut the log back to it; returns the epoch to go on with."""
        path = self.args.resume
        state = load_file(path, "checkpoint (--resume)")
        keys = {"epoch", "model", "seconds", "algorithm", "log", "facts", "args"}
        if state.get("method") != self.method or keys - state.keys():
            raise InputError(f"--resume {path} is not a checkpoint of this script ({self.method}_checkpoint.pt)")
        changed = self.changes(state["args"], HARMLESS)
        if changed:
            raise InputError(f"--resume {path} is of another experiment: {changed}")
        shares = [facts["explained_variance"] for facts in (state["facts"], self.facts)]
        if shares[0] and not np.allclose(*(share["per_component"] for share in shares), rtol=1e-4):
            raise InputError(f"--resume {path} is of another window: the snapshots in --save-dir span another subspace")
        load_model(model, state["model"], path)
        algorithm.load_state_dict(state["algorithm"])
        self.log = state["log"]
        for name in self.seconds:
            self.seconds[name] += state["seconds"][name]
        self.start -= state["seconds"]["total"]
        lines = "".join(json.dumps(line) + "\n" for line in self.log).encode()
        write_atomically(self.path("log.jsonl"), lambda file: file.write(lines))
        print(f"resumed from {path} after epoch {state['epoch']}", flush=True)
        return state["epoch"]

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
            "parameters": self.facts["parameters"],
            "parameters_trained": self.facts["parameters_trained"],
            "n_components": self.facts["n_components"],
            "snapshots": self.facts["snapshots"],
            "epochs": args.epochs,
            "test_accuracy_last": last["test_accuracy"],
            "test_accuracy_best": last["best_accuracy"],
            "best_epoch": last["best_epoch"],
            "train_accuracy_last": last["train_accuracy"],
            "explained_variance": self.facts["explained_variance"],
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "args": vars(args),
            "command": command_line(),
            "versions": versions(),
            "hardware": hardware(pick_device(args.device)),
            "git_revision": git_revision(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        save_json(self.path("summary.json"), summary)
        keys = ("method", "dataset", "arch", "seed", "corrupt", "parameters_trained", "epochs", "best_epoch")
        percents = {key: summary[key] for key in ("test_accuracy_last", "test_accuracy_best", "train_accuracy_last")}
        print("summary", *(f"{key}={summary[key]}" for key in keys),
              *(f"{key}={value if value is None else round(value, 2)}" for key, value in percents.items()),
              f"seconds={seconds['total']:.1f}", flush=True)
        return summary


def command_line():
    """The command as typed; of an absolute path to the script only its name."""
    script = Path(sys.argv[0])
    return shlex.join(["python", script.name if script.is_absolute() else str(script), *sys.argv[1:]])


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
            "memory_gib": round(memory, 1)}


def git_revision():
    """Commit of this checkout, with "-dirty" if tracked files differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
