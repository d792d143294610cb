"""What the scripts share: flags, set-up, the subspace, and the entry point."""
import argparse
import functools
import itertools
import math
import os
import re
import shlex
import sys
from pathlib import Path

import torch

import datasets
import models
from dldr import distributed, engine, graphs, userfile
from dldr.checkpoint import Run, command_line
from dldr.device import pick_device, set_up
from dldr.errors import Stopped, UserError
from dldr.files import checksum, load_file, load_json, load_model
from dldr.snapshots import BASES, load_window, make_basis, save_basis, snapshot_paths
from dldr.subspace import flat_parameters

# ------------------------------------------------------------------------------------------------------------- stages


def run_stage(method, args, train):
    """train(run, args, data, model), unless the run is finished or --evaluate is given; returns the summary.

    `run` is the `Run` in its directory, `model` the initial network on the device.
    """
    add_digests(args)
    subspace = "n_components" in args
    paths = snapshot_paths(args.save_dir, window_indices(vars(args))) if subspace and not args.evaluate else []
    run = Run(method, vars(args), changeable_flags(subspace), paths)
    if not run.may_start(lambda: load_data(args, "cpu").facts):
        if getattr(args, "save_basis", None) and not os.path.isfile(args.save_basis):
            raise UserError(f"--save-basis {args.save_basis}: the run in {run.directory} is finished and makes no "
                            "basis; --epochs 0 with another --output-dir does")
        print_next(run, args)
        return load_json(run.path("summary.json"))
    device = set_up(args.device, args.randomseed, deterministic=args.deterministic, conv_tf32=args.conv_tf32 == "on",
                    timeout=args.timeout)
    with run.timer("load"):
        data = load_data(args, device)
        if not distributed.agree(data.facts):
            raise UserError("the processes find different data: --data and --datasets must hold the same on all "
                            "machines, and a FILE.py must not draw its split anew each time")
        model = models.on_device(make_network(args, data), device, args.sync_bn)
    if args.evaluate:
        return evaluate_saved(run, args, data, model)
    graphs.capturer(args.cuda_graphs, model, device)  # may refuse the flag, before --overwrite removes anything
    run.prepare_directory()  # not before: there may be no such data or network
    summary = train(run, args, data, model)
    print_next(run, args)
    return summary


def print_next(run, args):
    """Print where the files of a run are, and the command that comes next. On rank 0."""
    if distributed.rank():
        return
    print(f"files: {run.directory}/{run.method}_*")
    if "n_components" in args:
        print(f"next: python report.py {shlex.quote(str(run.directory))}")
        return
    first = args.start_epoch * args.samples_per_epoch
    end = next(i for i in itertools.count(first) if not (run.directory / f"{i}.pt").is_file())
    if end - first > 1:
        print(f"snapshots: {run.directory}/{first}.pt ... {end - 1}.pt")
        flags = {"--datasets": args.datasets, "--data": args.data, "--arch": args.arch, "--corrupt": args.corrupt,
                 "--smalldatasets": args.smalldatasets, "--randomseed": args.randomseed, "--save-dir": args.save_dir,
                 "--params_start": first, "--params_end": min(end, first + 81),
                 "--n_components": min(end - first - 1, 40)}
        words = [str(word) for flag in flags.items() if flag[1] is not None for word in flag]
        print(f"next, or with train_pbfgs.py: python train_psgd.py {shlex.join(words)}")


def load_data(args, device):
    """The data set of the flags."""
    return datasets.load(args.datasets, args.data, batch_size=args.batch_size, device=device, seed=args.randomseed,
                         corrupt=args.corrupt, part=args.smalldatasets, workers=getattr(args, "workers", 0))


def make_network(args, data):
    """The network of the flags, on the CPU, for these data."""
    model = models.get_model(args.arch, data.classes, args.datasets, getattr(args, "pretrained", None))
    models.check_output(model, args.arch, data.classes, data.example)
    return model


def add_digests(args):
    """Add args.file_digests: what is in the files that flags name, compared on resuming and between stages."""
    digests = {name: userfile.digest(vars(args)[name], f"--{name}") for name in ("datasets", "arch")
               if ".py:" in vars(args)[name]}
    if getattr(args, "basis", "pca") not in BASES:
        digests["basis"] = checksum(args.basis)
    if isinstance(getattr(args, "pretrained", False), str):
        digests["pretrained"] = checksum(args.pretrained)
    if digests:
        args.file_digests = digests


def evaluate_saved(run, args, data, model):
    """--evaluate: test loss and accuracy of <method>_final.pt, or of the file of --resume; returns both."""
    name = {"": "final.pt", "auto": "checkpoint.pt"}.get(args.resume)
    path = run.path(name) if name else Path(args.resume)
    state = load_file(path, "final network (--evaluate)")
    load_model(model, state, path)
    test = engine.evaluate(model, data.test.epoch(0), args.half, top5=args.datasets == "ImageNet")
    print(f"evaluate  {path}  test loss {test['loss']:.4f}  test accuracy {test['accuracy']:.2f}%"
          + (f"  top-5 {test['top5']:.2f}%" if "top5" in test else ""), flush=True)
    return test


def subspace(run, args, data, model):
    """The basis P of the flags, as the optimisers take it; `model` is then where training starts (--start)."""
    sampling = check_sampling(args, data)
    w = flat_parameters(model)
    pca, k = args.basis in ("pca", "spherical"), args.n_components  # other bases are made in memory
    # sharding costs two collectives of D numbers a step, a replicated P one of k numbers: worth it for memory only
    large = 4 * (k if k >= 1 else len(run.snapshots)) * w.numel() >= 2**30
    wanted = args.shard_basis == "on" or args.shard_basis == "auto" and large
    sharded = pca and wanted and distributed.world_size() > 1
    if sharded and args.save_basis:
        raise UserError("--save-basis writes a whole basis, and each process has a part of it: add --shard-basis off")
    try:
        with run.timer("load"):
            window = load_window(run.snapshots, model, w.device, sharded=sharded, start=args.start,
                                 memory=2**30 * args.basis_memory if pca else math.inf)
            check_snapshots(run.snapshots)
        with run.timer("basis"):
            P, explained = make_basis(window, k, args.basis, args.randomseed, sharded, model)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{error} (--n_components, --params_start, --params_end, --params_step)") from error
    if args.save_basis:
        save_basis(Path(args.save_basis), model, P, explained,
                   {"command": command_line(), "args": vars(args), "data": data.facts})
    run.begin(data, w, snapshots=len(run.snapshots), explained=explained, sampling=sampling)
    return distributed.distribute(P, w.numel(), sharded)


SAMPLING = ("optimizer", "lr", "batch_size", "momentum", "weight_decay", "milestones", "accumulate", "half",
            "samples_per_epoch", "snapshot_dtype", "pretrained", "sync_bn")
NOT_RECORDED = {"sync_bn": False}  # in older records of sampling
MISMATCHES = ("datasets", "arch", "smalldatasets", "corrupt", "labels", "content")


def check_snapshots(paths):
    """Raise UserError unless the snapshots are as one run of train_sgd.py saved them; a note if there is no record."""
    directory = paths[0].parent
    index = load_json(directory / "sgd_snapshots.json")
    if index is None:
        distributed.note(f"{directory} has no sgd_snapshots.json: whether its snapshots are of one run is not checked")
        return
    foreign = [path.name for path in paths if index.get(path.stem) != checksum(path)]
    if foreign:
        raise UserError(f"--save-dir {directory}: {' '.join(foreign[:10])} not as sgd_snapshots.json of this run lists "
                        f"{'it' if len(foreign) == 1 else 'them'}: changed, left by another run, or copied without it")


def check_sampling(args, data):
    """Raise UserError, naming each difference, unless the snapshots were sampled on the same data and network.

    What --allow-mismatch names may differ. Returns how they were sampled, with what differs (another seed, too), or
    None (and prints a note) if there is no record of the run.
    """
    directory = Path(args.save_dir)
    record = load_json(directory / "sgd_args.json")
    if record is None:
        distributed.note(f"{directory} has no sgd_args.json: data and network of its snapshots are not compared with "
                         "these flags")
        return None
    then, now = ({**NOT_RECORDED, **flags, "smalldatasets": flags.get("smalldatasets") or 1.0}
                 for flags in (record["args"], vars(args)))
    allowed = set(getattr(args, "allow_mismatch", ()))

    def used(flags, name):  # with what is in a FILE.py
        digest = flags.get("file_digests", {}).get(name)
        return f"{flags.get(name)} {digest}" if digest else flags.get(name)

    pairs = {name: (used(then, name), used(now, name), f"--{name}")
             for name in ("datasets", "arch", "smalldatasets", "corrupt")}
    same = all(a == b for name, (a, b, _) in pairs.items() if name != "arch")
    facts = record.get("data", {})
    pairs["content"] = facts.get("content"), data.facts["content"], "--datasets or --data holds other data"
    if same:  # else the labels differ for a reason that is said
        pairs["labels"] = facts.get("labels"), data.facts["labels"], "--randomseed draws other noisy labels"
    wrong = [f"{name} {a}, here {b} ({why})" for name, (a, b, why) in pairs.items() if a != b and name not in allowed]
    if wrong:
        raise UserError(f"the snapshots in --save-dir {directory} were sampled otherwise: {'; '.join(wrong)}; repeat "
                        "the flags of train_sgd.py, or name what is meant to differ in --allow-mismatch")
    differs = [name for name, (a, b, _) in pairs.items() if a != b and name != "labels"]
    differs += ["randomseed"] * (then["randomseed"] != now["randomseed"])
    return {name: then.get(name, facts.get(name)) for name in (*SAMPLING, *differs)}


def make_loop(args, model, optimizer, network=None):
    """The training loop as the flags say."""
    device = next(model.parameters()).device
    # what a network of the user's draws on the host is not known
    mode = "off" if args.cuda_graphs == "auto" and ".py:" in args.arch else args.cuda_graphs
    return engine.Loop(model, optimizer, half=args.half, accumulate=args.accumulate, network=network,
                       read_every=args.print_freq if device.type == "cuda" else 1, top5=args.datasets == "ImageNet",
                       capture=graphs.capturer(mode, model, device, args.datasets))


def drops(milestones, warm_up=False):
    """Factor on the initial lr by epoch: x 0.1 from each milestone on and, with `warm_up`, during the first epoch."""
    return lambda epoch: 0.1 ** (sum(epoch >= m for m in milestones) + (warm_up and epoch == 0))


def progress_bar(args):
    """Progress bars for `engine.fit`, on a terminal only."""
    from tqdm import tqdm

    return lambda total, text: tqdm(total=total, desc=text, unit="it", leave=False, file=sys.stderr, mininterval=0,
                                    disable=True if distributed.rank() else None, miniters=args.print_freq)


def run_script(parse_args, main):
    """Entry point of a script: exit status 2 for wrong usage, 1 for a UserError, 128 + n for signal n.

    Of several ranks the first to fail says why.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed
        stream.reconfigure(errors="replace")  # a terminal may be ASCII
    args = parse_args()
    name = Path(sys.argv[0]).name

    def fail(line, status=1):
        if distributed.first_to_fail():
            print(f"{name}: {line}", file=sys.stderr, flush=True)
        if distributed.world_size() > 1:
            os._exit(status)  # destroy_process_group hangs if a peer is dead
        sys.exit(status)

    try:
        main(args)
        distributed.destroy()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python flushes into it once more
        fail("error: output pipe closed; resume with --resume auto")
    except Stopped as error:
        fail(str(error), 128 + error.number)
    except KeyboardInterrupt:
        fail("stopped by SIGINT at once; --resume auto resumes from the last checkpoint", 130)
    except UserError as error:
        fail(f"error: {one_line(error)}")
    except OSError as error:
        if not error.filename:
            raise
        fail(f"error: {one_line(error.filename)}: {error.strerror}")
    except (RuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        if reason.startswith("Expected more than 1 value per channel"):
            fail(f"error: batch norm cannot normalise a mini-batch, or a process's part of it, of one sample: choose "
                 f"another --batch-size ({reason})")
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in reason:
            fail(f"error: out of memory: try a smaller --batch-size, with --accumulate ({reason})")
        if "deterministic" in reason:
            fail(f"error: --deterministic: {args.arch} has no deterministic implementation on this --device: {reason}")
        connection = re.search("(gloo|NCCL).*(onnection|imed out|imeout)", reason)
        if connection or isinstance(error, torch.distributed.DistError):
            fail(f"error: another process of this run has ended, or has not answered for --timeout {args.timeout:g} "
                 f"seconds; --resume auto resumes from the last checkpoint ({one_line(reason)[:200]})")
        raise


def one_line(error):
    """An error's text as a single printable line; file names may hold anything."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(error).split()))


# ------------------------------------------------------------------------------------------------------------- flags


def changeable(flag):
    """Mark a flag that a resumed run may change: it does not change the result, or says how far to train."""
    flag.changeable = True


class Parser(argparse.ArgumentParser):
    """argparse with the docstring of a script as its help, and errors of one line, exit status 2."""

    def __init__(self, doc):
        description, _, example = doc.strip().partition("\n\nExample")
        super().__init__(description=description, epilog="example" + example, formatter_class=HelpFormatter,
                         allow_abbrev=False)

    def error(self, message):  # one line, without the usage that would bury it
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n" if distributed.first_to_fail() else None)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=32, width=110)

    def _get_help_string(self, action):  # no "(default: None)": the help says what happens then; but "(default: 0)"
        bare = action.default is None or action.default is False or action.default in ("", [])
        return action.help if bare else super()._get_help_string(action)


def number(kind, low, high, text):
    """An argparse type: a finite `kind` (int or float) that is at least `low` and at most `high`."""

    def convert(value):
        x = kind(value)
        if not low <= x <= high or not math.isfinite(x):
            raise argparse.ArgumentTypeError(f"{value} is not {text}")
        return x

    convert.__name__ = kind.__name__
    return convert


count = number(int, 1, 10**6, "a whole number from 1 to 1,000,000")
natural = number(int, 0, 10**6, "a whole number from 0 to 1,000,000")
seed = number(int, 0, 2**32 - 1, "a whole number from 0 to 2**32 - 1")  # what torch and numpy both take
nonnegative = number(float, 0, math.inf, "a number of at least 0")
waiting = number(float, 1, 10**6, "a number from 1 to 1,000,000")
positive = number(float, 1e-6, math.inf, "a number above 0")
fraction = number(float, 0, 1, "in [0, 1]")
share = number(float, 1e-6, 1 - 1e-6, "a whole number from 1, or a fraction between 0 and 1")


def components(value):
    """An argparse type: a whole number, or a fraction below 1."""
    return count(value) if value.lstrip("+-").isdigit() else share(value)


def mismatches(value):
    """An argparse type: a comma-separated list of what may differ between stages."""
    names = value.split(",")
    if wrong := set(names) - set(MISMATCHES):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(wrong))} not in {', '.join(MISMATCHES)}")
    return names


@functools.cache
def changeable_flags(subspace=True):
    """Names of the flags that may differ between runs of one experiment."""
    parser, _ = base_parser("", epochs=0, batch_size=0, lr=0, lr_help="", subspace=subspace)
    return frozenset(flag.dest for flag in parser._actions if hasattr(flag, "changeable"))


def folder(value):
    """An argparse type: a path without a final slash, with ~ expanded (a shell leaves that in --save-dir=~/x)."""
    return os.path.normpath(os.path.expanduser(value))


def files_below(directories):
    """Paths of the files below the directories, sorted; links are followed, each directory is searched once.

    Raises OSError if a directory is missing or cannot be read; a note names a link to nothing.
    """
    def refuse(error):
        raise error

    found, seen = [], set()
    for where, folders, names in itertools.chain(*(os.walk(Path(top), onerror=refuse, followlinks=True)
                                                   for top in directories)):
        folders.sort()
        if os.path.realpath(where) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(where))
        found += [Path(where, name) for name in names]
    for path in found:
        if not path.exists():
            distributed.note(f"{path} is a link to nothing")
    return sorted(path for path in found if path.exists())


def data_directory():
    """The default of --data."""
    return os.environ.get("DLDR_DATA", "data/")


def base_parser(doc, *, epochs, batch_size, lr, lr_help, subspace=True):
    """A parser with the flags that the scripts share; returns (parser, the group of training flags)."""
    parser = Parser(doc)
    if subspace:
        window = parser.add_argument_group("subspace").add_argument
        window("--n_components", type=components, default=40, metavar="K",
               help="dimensions: the first K principal directions, at most snapshots - 1; or a fraction such as 0.99: "
               "as many as explain this share of the variance")
        window("--params_start", type=natural, default=0, metavar="I", help="first snapshot of the window")
        window("--params_end", type=natural, default=51, metavar="I", help="one past its last snapshot")
        window("--params_step", type=count, default=1, metavar="N", help="use every N-th snapshot of the window")
        window("--start", choices=("first", "last", "mean"), default="first",
               help="where training starts: the window's first or last snapshot, or the mean of its parameters, with "
               "batch norm's statistics of the last")
        window("--basis", default="pca", metavar="|".join([*BASES, "FILE"]),
               help="principal directions of the snapshots, or of the snapshots divided by their norms (spherical); to "
               "compare: K random ones, or the span of K evenly spaced snapshots; or a FILE by --save-basis")
        changeable(window("--save-basis", type=folder, metavar="FILE",
                          help="write the basis and how it was made to this file"))
        window("--allow-mismatch", type=mismatches, default=[], metavar="NAME,...",
               help=f"in what the sampling run may differ from this one, of {', '.join(MISMATCHES)} (default: nothing)")

    training = parser.add_argument_group("training")
    train = training.add_argument
    changeable(train("--epochs", type=natural, default=epochs, metavar="N",
                     help="epochs in all (train_sgd.py on ImageNet: 90)"))
    train("--start-epoch", type=natural, default=0, metavar="N",
          help="index of the first epoch, for schedule, order and names of snapshots; set by --resume")
    train("-b", "--batch-size", type=count, default=batch_size, metavar="N",
          help="samples per mini-batch (train_sgd.py on ImageNet: 256)")
    train("--lr", "--learning-rate", type=nonnegative, default=lr, metavar="LR", help=lr_help)
    train("--accumulate", type=count, default=1, metavar="A",
          help="average the gradient of A mini-batches before each step; P-BFGS searches on the last of them, as the "
          "official release does")
    train("--randomseed", type=seed, default=1, metavar="N",
          help="seed of initial weights, order, augmentation and label noise")
    changeable(train("-e", "--evaluate", action="store_true",
                     help="only evaluate the final network of this run (or the checkpoint of --resume) and exit"))
    changeable(train("--resume", default="", metavar="auto|PATH",
                     help="resume from this checkpoint; auto: the run's own, if there is one; a finished run is left "
                     "as it is. The result is that of an uninterrupted run, bitwise on a CPU or with --deterministic"))
    changeable(train("--overwrite", action="store_true",
                     help="start over: remove what this script has left in its directory"))

    data = parser.add_argument_group("data and network").add_argument
    data("--datasets", default="CIFAR10", metavar="NAME",
         help="CIFAR10, CIFAR100, MNIST, FashionMNIST, digits (comes with scikit-learn) or ImageNet; or your own: "
         "FILE.py:FUNCTION, folder:DIR (folder:DIR@64 for 64 x 64 pixels) or npz:FILE")
    changeable(data("--data", type=folder, default=data_directory(), metavar="DIR",
                    help="where data sets are or are downloaded to; the environment variable DLDR_DATA sets it too"))
    data("-a", "--arch", default="resnet32", metavar="ARCH",
         help=f"network: {'; '.join(models.FAMILIES.values())}; a torchvision name on ImageNet (resnet18); or "
         "FILE.py:FUNCTION, which is called with num_classes")
    data("--corrupt", type=fraction, default=0.0, metavar="C",
         help="share of the training labels, in [0, 1], redrawn uniformly over all classes")
    data("--smalldatasets", type=fraction, default=None, metavar="P",
         help="use only this share, in [0, 1], of the training samples: the first ones; of image folders and Datasets "
         "drawn ones (default: all)")

    output = parser.add_argument_group("output").add_argument
    save_dir = output("--save-dir", type=folder, default="save_temp", metavar="DIR",
                      help="directory of the snapshots 0.pt, 1.pt, ...")
    if subspace:
        changeable(output("--output-dir", type=folder, metavar="DIR", help="where to write (default: the --save-dir)"))
    else:
        changeable(save_dir)  # a folder may be moved; for a subspace it says which snapshots
    changeable(output("--save-every", type=count, default=10, metavar="N",
                      help="write a checkpoint for --resume every N epochs, and after the last"))
    changeable(output("-p", "--print-freq", type=count, default=50, metavar="N",
                      help="iterations between updates of the progress bar and, on a GPU, between reading losses"))

    machine = parser.add_argument_group("machine").add_argument
    changeable(machine("--device", default="auto", metavar="auto|cpu|cuda|cuda:N",
                       help="where to run; auto: CUDA where there is one"))
    machine("--half", action="store_true",
            help="bfloat16 autocast of the network's passes; never of the basis, the projections or the losses that a "
            "line search compares")
    changeable(machine("--cuda-graphs", choices=("auto", "on", "off"), default="auto",
                       help="capture the step as a CUDA graph; auto: on a GPU, where network and data allow it"))
    machine("--conv-tf32", choices=("on", "off"), default="on",
            help="TF32 in convolutions on a GPU; never in products with the basis")
    machine("--deterministic", action="store_true",
            help="only deterministic algorithms: bitwise repeatable on one machine, slower on CUDA")
    changeable(machine("-j", "--workers", type=natural, default=4, metavar="N",
                       help="data loading processes, for image folders and Datasets; arrays are held on the device"))
    changeable(machine("--timeout", type=waiting, default=600, metavar="S",
                       help="process-group timeout (s); a signal to one rank stops all of them within 20 batches"))
    machine("--sync-bn", action="store_true",
            help="batch norm over the whole mini-batch, not each rank's part of it (GPUs only)")
    if subspace:
        changeable(machine("--basis-memory", type=positive, default=2.0, metavar="GIB",
                          help="stream snapshots from disk above this many GiB per process"))
        changeable(machine("--shard-basis", choices=("auto", "on", "off"), default="auto",
                          help="each rank holds its part of P's columns only; auto: from a P of 1 GiB"))
    return parser, training


def check_names(parser, args):
    """Exit with status 2 and one line if there is no such data set, network or device; returns the device."""
    try:
        datasets.check_name(args.datasets)
        models.check_name(args.arch, args.datasets)
        return pick_device(args.device)
    except UserError as error:
        parser.error(str(error))


def check_args(parser, args):
    """Exit with status 2 and one line if the flags cannot work together, before anything is read or written."""
    device = check_names(parser, args)
    if args.sync_bn and device.type == "cpu":
        parser.error("--sync-bn: torch has it for GPUs only; leave it out here")
    if args.overwrite and args.resume:
        parser.error("--overwrite starts over, --resume does not: give one of them")
    if 0 < args.epochs <= args.start_epoch:
        parser.error(f"--start-epoch {args.start_epoch} leaves none of --epochs {args.epochs}")
    if args.smalldatasets == 0:
        parser.error("--smalldatasets 0 leaves no training sample")
    if "n_components" in args and not args.evaluate:
        check_window(parser, args)
        pca = args.basis in ("pca", "spherical")
        if args.basis not in BASES and not os.path.isfile(args.basis):
            parser.error(f"--basis {args.basis}: not one of {', '.join(BASES)}, and there is no such file")
        if args.save_basis and len({os.path.realpath(path) for path in (args.basis, args.save_basis)}) == 1:
            parser.error(f"--save-basis {args.save_basis} would replace the file of --basis")
        if re.fullmatch(r"\d+\.pt|(sgd|psgd|pbfgs)_.*", os.path.basename(args.save_basis or "")):
            parser.error(f"--save-basis {args.save_basis}: snapshots and the runs' own files have such names")
        if args.shard_basis == "on" and not pca:
            parser.error(f"--shard-basis on goes with --basis pca or spherical, not {args.basis}")
        if args.n_components < 1 and not pca:
            parser.error(f"--n_components {args.n_components}: a share of the variance goes with --basis pca or "
                         f"spherical; for {args.basis} give their number")
    return args


def check_window(parser, args):
    """Exit with status 2 and one line if the window has too few snapshots for --n_components."""
    if args.params_end <= args.params_start:
        parser.error(f"--params_end {args.params_end} must be larger than --params_start {args.params_start}")
    snapshots = len(window_indices(vars(args)))
    needed = max(2, args.n_components + 1) if getattr(args, "basis", "pca") in BASES else 1
    if needed > snapshots:
        parser.error(f"--n_components {args.n_components} needs at least {needed} snapshots; "
                     f"--params_start {args.params_start} --params_end {args.params_end} --params_step "
                     f"{args.params_step} are {snapshots}")


def window_indices(flags):
    """The snapshots that --params_start, --params_end (exclusive) and --params_step name."""
    return range(flags["params_start"], flags["params_end"], flags["params_step"])
