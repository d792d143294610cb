"""What the three scripts share: flags, set-up, and the only training and evaluation loop.

This module imports none of the others (flag checks aside), so that all of them can raise its InputError.
"""
import argparse
import contextlib
import ctypes
import math
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import distributed


class InputError(Exception):
    """Something the user can put right. Its message is one line that names the flag or file and what to do."""


def one_line(error):
    """An error's text as a single printable line; file names may hold anything."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(error).split()))


class NonFiniteLoss(Exception):
    """A loss became NaN or infinite; raised before the step that would have used it."""


class Stopped(Exception):
    """A signal asked the run to end."""

    def __init__(self, number, where=""):
        super().__init__(f"stopped by {signal.Signals(number).name} {where}".strip())
        self.number = number


class StopSignals:
    """In here SIGTERM and Ctrl-C are only noted, and raise Stopped between two batches; a second one acts at once,
    unless it comes within a second: a scheduler may tell the process and its parent, which passes it on."""

    def __enter__(self):
        self.number, self.since, self.before = None, 0.0, {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        now = time.monotonic()
        if self.number and now - self.since > 1:
            signal.signal(number, self.before[number])
            signal.raise_signal(number)
        self.number, self.since = number, self.since or now

    def watch(self, batches):
        """The batches, until a signal comes; of several processes all stop at the same batch if one gets it."""
        batches = iter(batches)
        while True:
            if number := distributed.maximum(self.number or 0):
                raise Stopped(number)
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield batch


def run_script(parse_args, main):
    """Entry point of a script: exit status 2 for wrong usage, 1 for an InputError, 128 + n for signal n.

    Of several processes the first to fail says why.
    """
    args = parse_args()
    name = Path(sys.argv[0]).name

    def fail(line, status=1):
        if distributed.first_to_fail():
            print(f"{name}: {line}", file=sys.stderr, flush=True)
        if distributed.world() > 1:
            os._exit(status)  # parting from processes that may be gone could take for ever
        sys.exit(status)

    try:
        main(args)
        distributed.stop()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python flushes into it once more
        fail("error: nobody reads this run's output any more; stopped, --resume auto goes on")
    except Stopped as error:
        fail(str(error), 128 + error.number)
    except KeyboardInterrupt:
        fail("stopped by SIGINT at once; --resume auto goes on from the last checkpoint", 130)
    except InputError as error:
        fail(f"error: {one_line(error)}")
    except OSError as error:
        if not error.filename:
            raise
        fail(f"error: {one_line(error.filename)}: {error.strerror}")
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in reason:
            fail(f"error: out of memory: try a smaller --batch-size, with --accumulate ({reason})")
        if "deterministic" in reason:
            fail(f"error: --deterministic does not go with this --arch on this --device: {reason}")
        connection = re.search("(gloo|NCCL).*(onnection|imed out|imeout)", reason)
        if connection or isinstance(error, torch.distributed.DistError):
            fail(f"error: another process of this run has ended, or has not answered for --timeout {args.timeout:g} "
                 f"seconds; --resume auto goes on from the last checkpoint ({one_line(reason)[:200]})")
        raise


# ------------------------------------------------------------------------------------------------------------ flags


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, exit status 2."""

    def error(self, message):  # one line, without the usage that would bury it
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n" if distributed.first_to_fail() else None)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=32, width=110)

    def _get_help_string(self, action):  # no "(default: None)": the help says what happens then; but "(default: 0)"
        bare = action.default is None or action.default is False or action.default == ""
        return action.help if bare else super()._get_help_string(action)


def _at_least(kind, low, text, high=math.inf):
    """An argparse type: a finite `kind` (int or float) that is at least `low` and at most `high`."""

    def convert(value):
        number = kind(value)
        if not low <= number <= high or not math.isfinite(number):
            raise argparse.ArgumentTypeError(f"{value} is not {text}")
        return number

    convert.__name__ = kind.__name__
    return convert


count = _at_least(int, 1, "a whole number from 1 to 1,000,000", 10**6)
natural = _at_least(int, 0, "a whole number from 0 to 1,000,000", 10**6)
nonnegative = _at_least(float, 0, "a number of at least 0")
waiting = _at_least(float, 1, "a number from 1 to 1,000,000", 10**6)
positive = _at_least(float, 1e-6, "a number above 0")


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
    import models  # here and not above: it imports this module

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
                      help=f"network: {models.by_family()}; on ImageNet a torchvision name (resnet18)")
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
    train.add_argument("--resume", default="", metavar="auto|PATH",
                       help="go on from this *_checkpoint.pt, or with auto from the one this run left if any, to the "
                       "result of an uninterrupted run (bitwise on a CPU, and with --deterministic on a GPU); auto "
                       "leaves a finished run as it is")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", metavar="auto|cpu|cuda|cuda:N",
                         help="where to run; auto: CUDA where there is one")
    machine.add_argument("--half", action="store_true",
                         help="bfloat16 autocast of the network's passes; never in the basis, the projections or the "
                         "Armijo comparison")
    machine.add_argument("--cuda-graphs", choices=("auto", "on", "off"), default="auto",
                         help="record the training step once and replay it; auto: on a GPU, where the network and the "
                         "data allow it")
    machine.add_argument("--conv-tf32", choices=("on", "off"), default="on",
                         help="TF32 in convolutions on a GPU, as torch's default; never in products with the basis")
    machine.add_argument("--deterministic", action="store_true",
                         help="only deterministic algorithms: bitwise repeatable on one machine, slower on CUDA")

    machine.add_argument("--timeout", type=waiting, default=600, metavar="S",
                         help="seconds that one of several processes waits for the others before it gives up")
    machine.add_argument("--sync-bn", action="store_true",
                         help="batch norm over the whole mini-batch, not each process's part of it (GPUs only)")

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
    group.add_argument("--basis", choices=("pca", "random", "snapshots"), default="pca",
                       help="principal directions; or, to compare: random ones, or the span of K evenly spaced "
                       "snapshots")
    group.add_argument("--basis-memory", type=positive, default=2.0, metavar="GIB",
                       help="a window of snapshots larger than this is not loaded, but read from its files in blocks, "
                       "twice; per process, P itself (K x parameters x 4 bytes) not counted")
    group.add_argument("--shard-basis", choices=("auto", "on", "off"), default="auto",
                       help="each of several processes keeps its part of P's columns only; auto: from a P of 1 GiB on")
    group.add_argument("--output-dir", default=None, metavar="DIR", help="where to write (default: the --save-dir)")


def check_args(parser, args):
    """Exit with status 2 and one line if the flags cannot work together, before anything is read or written."""
    import datasets  # here and not above: both import this module
    import models

    try:
        datasets.check_name(args.datasets)
        models.check_name(args.arch, args.datasets)
        device = pick_device(args.device)
    except InputError as error:
        parser.error(str(error))
    if args.sync_bn and device.type == "cpu":
        parser.error("--sync-bn: torch has it for GPUs only; leave it out here")
    if "shard_basis" in args and args.shard_basis == "on" and args.basis != "pca":
        parser.error(f"--shard-basis on goes with --basis pca, not {args.basis}")
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


def basis_storage(args, D):
    """Bytes that a window may take before it is left in its files, and whether the processes share out P's columns.

    --shard-basis auto: from a P of 1 GiB on; below that the one reduction of k numbers that a whole P needs is what
    counts, and sharding has two collectives of D numbers more.
    """
    pca = args.basis == "pca"  # the others are for comparison, and made in memory
    sharded = args.shard_basis == "on" or args.shard_basis == "auto" and 4 * args.n_components * D >= 2**30
    return 2**30 * args.basis_memory if pca else math.inf, pca and sharded and distributed.world() > 1


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
    if device.index is not None and distributed.launched() > 1:
        raise InputError(f"--device {name}: each of several processes takes a GPU of its own; use auto or cuda")
    index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise InputError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, this process wants "
                         f"number {index}; try --device auto, or fewer processes")
    return torch.device("cuda", index)


def set_up(args):
    """Pick the device, seed everything for the initial weights, and choose the numerics; returns the device."""
    torch.set_float32_matmul_precision("highest")  # products with P: TF32 would cost 4e-4 relative error
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(args.deterministic)
    torch.backends.cudnn.benchmark = not args.deterministic
    torch.backends.cudnn.allow_tf32 = args.conv_tf32 == "on"
    seed_everything(args.randomseed)
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.start(device, args.timeout)
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # graphs are not recorded on the default stream
    else:
        keep_freed_memory()
    return device


def keep_freed_memory():
    """Let glibc keep the activations that a step frees for the next one, in place of returning them to the kernel.

    Faulting them in again took half of a step: ResNet-20 at batch 1024 on two cores, 2.4 s, and 1.2 s without it.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: whose top is never given back


def seed_everything(seed, epoch=None):
    """Make what is drawn from torch's generators a function of the seed (initial weights), or of seed, epoch and, of
    several, the process (dropout)."""
    entropy = [seed, epoch, *([distributed.rank()] if distributed.rank() else [])]
    torch.manual_seed(seed if epoch is None else int(np.random.SeedSequence(entropy).generate_state(1)[0]))


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
    with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):  # no casts kept in a recorded graph
        return model(x).float()


def training_passes(model, half=False):
    """passes(x, y) -> tensor (2,): mean loss and number of hits of a mini-batch, its gradient added to the model's.

    With several processes passes(x, y, weight), where the mean over them of weight x loss is the mini-batch's loss.
    """

    def passes(x, y, weight=None):
        logits = forward(model, x, half)
        loss = F.cross_entropy(logits, y)
        if weight is not None:
            loss = weight * loss
        loss.backward()
        return torch.stack([loss.detach(), (logits.argmax(1) == y).sum()])

    return passes


def train_epoch(model, w, batches, passes, update, *, iterations=None, sizes=None, accumulate=1, read_every=1,
                after_iteration=None, bar=None, no_sync=contextlib.nullcontext):
    """One epoch: passes(x, y), see `training_passes`, and update(loss, x, y) after every `accumulate` mini-batches.

    w is the model's `flat_parameters`; at an update w.grad holds the mean gradient over the accumulated mini-batches,
    `loss` and (x, y) belong to the last of them. A shorter group at the end of the epoch counts too; `iterations` says
    how many batches there are, where `batches` has no length.
    Losses are read from the device every `read_every` iterations, which waits for it; only if that is 1 does update
    get one (a float, else None). after_iteration(i) is called after mini-batch i = 1, 2, ...
    Returns the mean loss and accuracy (%) of the forward passes before each step. Raises NonFiniteLoss when it reads
    such a loss: before the update that would use it if read_every is 1.
    """
    model.train()
    iterations = iterations or len(sizes or batches)
    record = torch.zeros(iterations, 2, dtype=torch.float64, device=w.device)
    loss = None
    loss_sum = correct = seen = read = pending = 0
    samples = []
    w.grad.zero_()
    for i, (x, y) in enumerate(batches, 1):
        samples.append(sizes[i - 1] if sizes else len(y))
        weight = () if distributed.world() == 1 else (len(y) * distributed.world() / samples[-1],)
        pending += 1
        with contextlib.nullcontext() if pending == accumulate or i == iterations else no_sync():
            record[i - 1] = passes(x, y, *weight)
        if i % read_every == 0 or i == iterations:
            for value, hits in distributed.total(record[read:i]).tolist():
                value /= distributed.world()
                if not math.isfinite(value):
                    raise NonFiniteLoss(f"the training loss is {value} at iteration {read + 1}")
                loss_sum, correct, seen = loss_sum + value * samples[read], correct + hits, seen + samples[read]
                read += 1
            loss = value if read_every == 1 else None
            if bar is not None:
                bar.set_postfix(loss=f"{loss_sum / seen:.4f}", accuracy=f"{100 * correct / seen:.2f}%", refresh=False)
        if pending == accumulate or i == iterations:
            if pending > 1:
                w.grad.div_(pending)
            update(loss, x, y, *weight)
            w.grad.zero_()
            pending = 0
        if after_iteration:
            after_iteration(i)
        if bar is not None:
            bar.update()
    return {"loss": loss_sum / seen, "accuracy": 100 * correct / seen, "samples": seen}


@torch.inference_mode()
def evaluate(model, batches, half=False, top5=False):
    """Mean loss and accuracy (%) of the model in eval mode over `batches`, of all processes, read from the device once.

    With `top5` also the share (%) of samples whose class is among the five largest logits, as "top5".
    """
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=next(model.parameters()).device)  # loss, hits, in five, samples
    for x, y in batches:
        logits = forward(model, x, half)
        totals[0] += F.cross_entropy(logits, y, reduction="sum")
        totals[1] += (logits.argmax(1) == y).sum()
        if top5:
            totals[2] += (logits.topk(min(5, logits.shape[1])).indices == y[:, None]).sum()
        totals[3] += len(y)
    loss, hits, in_five, seen = distributed.total(totals).tolist()
    result = {"loss": loss / seen, "accuracy": 100 * hits / seen}
    return {**result, "top5": 100 * in_five / seen} if top5 else result


def fit(run, model, w, data, passes, update, *, schedule, algorithm, statistics=None, after_iteration=None,
        read_every=1, no_sync=contextlib.nullcontext):
    """Train for the epochs of run.args, evaluating, logging and checkpointing after each; returns the summary.

    passes(x, y), update(loss, x, y), read_every, no_sync: see `train_epoch`. `algorithm` has state_dict and
    load_state_dict, for --resume, and may have param_groups as torch's optimisers do: they get the lr that
    schedule(epoch) says.
    statistics() gives what the method adds to an epoch's log. after_iteration(epoch, i) follows each mini-batch.
    """
    args = run.args
    first = run.first_epoch(model, algorithm)
    if distributed.maximum(first) != -distributed.maximum(-first):
        raise InputError(f"the processes find different checkpoints: {run.flag} must be one directory for all machines")
    with StopSignals() as signals:
        for epoch in range(first, args.epochs):
            good = run.state(epoch, model, algorithm)
            seed_everything(args.randomseed, epoch)
            lr = schedule(epoch)
            for group in getattr(algorithm, "param_groups", ()):  # read anew: loading a state replaces them
                group["lr"] = lr
            hook = after_iteration and (lambda i, epoch=epoch: after_iteration(epoch, i))
            bar = tqdm(total=len(data.train), desc=f"epoch {epoch + 1}/{args.epochs}", unit="it", leave=False,
                       disable=True if distributed.rank() else None, miniters=args.print_freq, mininterval=0,
                       file=sys.stderr)
            try:
                with run.timer("train") as train_time, bar:
                    train = train_epoch(model, w, signals.watch(data.train.epoch(epoch)), passes, update,
                                        sizes=data.train.sizes, accumulate=args.accumulate, read_every=read_every,
                                        after_iteration=hook, bar=bar, no_sync=no_sync)
                distributed.share_statistics(model)
                with run.timer("eval"):
                    test_batches = data.test.epoch(0)  # of several processes some may have fewer, none waits in it
                    test = evaluate(model, test_batches if distributed.world() > 1 else signals.watch(test_batches),
                                    args.half, top5=args.datasets == "ImageNet")
                if not math.isfinite(test["loss"]):  # where the last step of the epoch was the fatal one
                    raise NonFiniteLoss(f"the test loss is {test['loss']} after the last iteration")
            except Stopped as stop:
                path = run.save("checkpoint.pt", good)
                raise Stopped(stop.number, f"in epoch {epoch + 1}; the state before it is in {path}; to go on, repeat "
                              "the command with --resume auto") from stop
            except (NonFiniteLoss, FloatingPointError) as error:
                path = run.save("checkpoint.pt", good)
                raise InputError(
                    f"epoch {epoch + 1}: {error}; stopped there, the state before this epoch is in {path}; "
                    f"try a smaller --lr{', or without --half,' if args.half else ''} in another {run.flag}"
                ) from error
            except Exception:  # a corrupt image, no more memory, ...: an epoch may be lost, the ones before are not
                with contextlib.suppress(InputError):  # nor is the reason, if it was the disk
                    run.save("checkpoint.pt", good)
                raise
            run.log_epoch(epoch, lr, train, test, train_time.seconds, statistics() if statistics else {})
            if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
                run.save("checkpoint.pt", run.state(epoch + 1, model, algorithm))
        run.save("final.pt", model.state_dict())
        summary = run.finish()
        if signals.number:  # too late to stop this run, but not what would follow it
            raise Stopped(signals.number, "after its last epoch; the run is finished")
        return summary
