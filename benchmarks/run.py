"""Time every stage of the scripts against a plain implementation of it (baseline.py), in turn on one machine.

Each side has a process of its own, which sleeps while another works: A B A B ... after a warm-up repetition of each.
Printed are medians, their ratio and its range over the repetitions; --json holds every single time. An epoch is one of
the first --samples training images, random ones where --data has no cifar10.npz; the fewer, the more the start of the
baseline's DataLoader (a few tenths of a second) weighs.

sgd, psgd, pbfgs, evaluation, basis: the baseline and ours; with --half also ours without and with --half
step:    an SGD step in utils.train_epoch, and a bare forward + backward pass before each, on batches that are ready
passes:  an iteration of P-BFGS, and its forward + backward and trial passes alone
save:    the checkpoint of an SGD run of --save-arch (ImageNet's ResNet-50), which a stopped run has to write
startup: train_sgd.py from the command to the snapshot after its first iteration, data in the page cache

Run it on an idle machine.

Example:
  python benchmarks/run.py --json results/cpu-speed/benchmark.json
"""
import argparse
import contextlib
import gc
import itertools
import multiprocessing
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import baseline

import datasets
import graphs
import models
import runs
import train_sgd
import utils
from subspace import ProjectedBFGS, ProjectedSGD, flat_parameters, frozen_statistics, pca_basis

STAGES = {  # what over what; the sides that do it; what is aimed at for ResNet-20 in float32 on two CPU cores
    "sgd": ("SGD epoch, batch {batch_size}: baseline / ours", "product baseline half", ">= 1.25"),
    "psgd": ("P-SGD epoch, batch {batch_size}: baseline / ours", "product baseline half", ">= 1.25"),
    "pbfgs": ("P-BFGS epoch, batch {pbfgs_batch_size}: baseline / ours", "product baseline half", ">= 1.4"),
    "evaluation": ("evaluation, {test_samples:,} images: baseline / ours", "product baseline half", ">= 1.5"),
    "basis": ("basis of {snapshots} snapshots, k {n_components}: scikit-learn / ours", "product baseline", ">= 10"),
    "step": ("SGD step, batch {batch_size} / bare forward + backward", "product", "<= 1.05"),
    "passes": ("P-BFGS iteration, batch {pbfgs_batch_size} / its passes", "product", ""),
    "save": ("checkpoint of {save_arch}", "product", ""),
    "startup": ("train_sgd.py to the end of its first iteration", "product", "< 5 s"),
}
PSGD_LR = 0.1  # not the script's 1, which diverges in a subspace of single steps; it takes the same time


def parse_args(argv=None):
    description, example = __doc__.strip().split("\n\nExample", 1)
    parser = argparse.ArgumentParser(
        description=description, epilog="example" + example, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES, metavar="STAGE",
                        help="default: all")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    parser.add_argument("--half", action="store_true", help="also time the scripts' --half against them without it")
    parser.add_argument("--data", default="data/", metavar="DIR", help="where cifar10.npz lies (default: data/)")
    parser.add_argument("--samples", type=utils.count, metavar="N",
                        help="training images of an epoch (default: 50000 on CUDA, 5000 on a CPU)")
    parser.add_argument("--arch", default="resnet20", help="network (default: resnet20)")
    for name, value, text in (
        ("--runs", 5, "timed repetitions"), ("--test-samples", 10_000, "images of an evaluation"),
        ("--batch-size", 128, "of SGD and P-SGD"), ("--pbfgs-batch-size", 1024, "of P-BFGS"),
        ("--snapshots", 81, "parameter vectors of the basis: one per step of a short SGD run"),
        ("--n_components", 40, "dimensions"),
    ):
        parser.add_argument(name, type=utils.count, default=value, metavar="N", help=f"{text} (default: {value})")
    parser.add_argument("--save-arch", default="resnet50", metavar="ARCH", help="of torchvision (default: resnet50)")
    parser.add_argument("--json", metavar="FILE", help="write the results here; temporary files lie beside it")
    return parser.parse_args(argv)


@contextlib.contextmanager
def clock(device, times):
    """Append the seconds that the block takes to `times`, its work on the device included (on a GPU: CUDA events)."""
    if device.type == "cpu":
        start = time.perf_counter()
        yield
        times.append(time.perf_counter() - start)
    else:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record(torch.cuda.current_stream(device))
        yield
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)


def seconds(device, function, *args):
    """Seconds of function(*args), see `clock`, and what it returned."""
    times = []
    with clock(device, times):
        result = function(*args)
    return times[0], result


def read_data(args):
    """x_train, y_train, x_test, y_test: the first images of CIFAR-10, or random ones."""
    sizes = args.samples, args.samples, args.test_samples, args.test_samples
    if args.images == "CIFAR10":
        arrays = datasets.SOURCES["CIFAR10"].read(Path(args.data))
        return [array[:n].copy() for array, n in zip(arrays, sizes, strict=True)]
    rng = np.random.default_rng(1)
    return [rng.integers(0, 10, n) if i % 2 else rng.integers(0, 256, (n, 32, 32, 3), np.uint8)
            for i, n in enumerate(sizes)]


def network(args, device):
    """The same initial network everywhere."""
    torch.manual_seed(1)
    return models.get_model(args.arch, 10).to(device)


# ------------------------------------------------------------------------------------------------------- the two sides
# Both functions prepare a stage and return repeat(i), which does its i-th repetition and returns what to keep of it.
# `worker` adds the seconds it took, unless it says them itself; a "reference" is what to compare them to.


def product(stage, args, data, directory, device, half):
    """A stage as the scripts do it."""
    if stage in ("basis", "save", "startup"):
        return {"basis": basis, "save": save, "startup": startup}[stage](args, directory, device)
    model, cuda, source = network(args, device), device.type == "cuda", datasets.SOURCES["CIFAR10"]
    if stage == "evaluation":
        test = datasets.ImageBatches(*data[2:], source, datasets.EVALUATION_BATCH[device.type], device)
        return lambda i: utils.evaluate(model, test.epoch(0), half)

    searching = stage in ("pbfgs", "passes")
    w = flat_parameters(model)
    batches = datasets.ImageBatches(*data[:2], source, args.pbfgs_batch_size if searching else args.batch_size, device,
                                    seed=1, shuffle=True, augment=True)
    ready = (batch for e in itertools.count() for batch in batches.epoch(e)
             if len(batch[1]) == min(batches.batch_size, batches.samples))  # full ones, without end
    capture = graphs.capturer("auto", model, device)
    passes = capture(utils.training_passes(model, half))
    trial_loss = capture(lambda x, y: F.cross_entropy(model(x), y))
    if stage in ("sgd", "step", "trajectory"):
        algorithm = torch.optim.SGD([w], lr=0.1, momentum=0.9, weight_decay=1e-4, fused=cuda)
    else:
        window = torch.load(directory / "window.pt", weights_only=True)
        P, _ = pca_basis(window.to(device, copy=True), args.n_components)
        algorithm = ProjectedBFGS(w, P) if searching else ProjectedSGD(w, P, PSGD_LR)
    step = capture(algorithm.step)

    def search(loss, x, y):
        with frozen_statistics(model), torch.no_grad():
            algorithm.step(float(trial_loss(x, y)) if half else loss, lambda: trial_loss(x, y))

    def train(batches, iterations, after_iteration=None):
        facts = utils.train_epoch(model, w, batches, passes, search if searching else lambda *_: step(key=0),
                                  iterations=iterations, read_every=50 if cuda and not searching else 1,
                                  after_iteration=after_iteration)
        return {**facts, **({"trials_per_step": algorithm.statistics()["trials_per_step"]} if searching else {})}

    def trajectory(i):
        window = [w.cpu().clone()]  # (D,) before and after each step
        train(itertools.islice(ready, args.snapshots - 1), args.snapshots - 1, lambda _: window.append(w.cpu().clone()))
        torch.save(torch.stack(window), directory / "window.pt")
        return {}

    def steps_and_passes(i, count=10):
        bare, steps, references = network(args, device).train(), [], []

        def timed():
            for x, y in itertools.islice(ready, count):
                with clock(device, references):
                    F.cross_entropy(bare(x), y).backward()
                with clock(device, steps):
                    yield x, y

        train(timed(), count)
        return {"seconds": statistics.median(steps), "reference": statistics.median(references)}

    def iteration_and_passes(i):
        for _ in range(1 if i else graphs.WARM_UP + 2):
            (x, y), = itertools.islice(ready, 1)
            whole, facts = seconds(device, train, [(x, y)], 1)
            references = [seconds(device, passes, x, y)[0]]
            for _ in range(int(facts["trials_per_step"])):
                with clock(device, references), frozen_statistics(model), torch.no_grad():
                    float(trial_loss(x, y))
        return {**facts, "seconds": whole, "reference": sum(references)}

    return {"trajectory": trajectory, "step": steps_and_passes, "passes": iteration_and_passes}.get(
        stage, lambda i: train(batches.epoch(i), len(batches)))


def basis(args, directory, device):
    window = torch.load(directory / "window.pt", weights_only=True).to(device)

    def repeat(i):
        copy = window.clone()  # pca_basis uses its window up
        time, (P, _) = seconds(device, pca_basis, copy, args.n_components)
        return {"seconds": time, "P": P.cpu().numpy()}

    return repeat


def save(args, directory, device):
    """Copy network and momentum from the device and write them, flushed to the disk."""
    model = models.get_model(args.save_arch, 1000, "ImageNet").to(device)
    state = {"model": model.state_dict(), "algorithm": {"momentum_buffer": torch.zeros_like(flat_parameters(model))}}

    def repeat(i):
        time, path = seconds(device, runs.save_tensors, directory / "checkpoint.pt", state)
        return {"seconds": time, "megabytes": path.stat().st_size / 1e6}

    return repeat


def startup(args, directory, device):
    """An epoch of one iteration, on digits where there is no CIFAR-10, ended at its snapshot."""
    name, samples = ("CIFAR10", 50_000) if args.images == "CIFAR10" else ("digits", 1437)
    script = [sys.executable, train_sgd.__file__, "--datasets", name, "--data", args.data, "--arch", args.arch,
              "--smalldatasets", str((args.batch_size + 0.5) / samples), "--batch-size", str(args.batch_size),
              "--epochs", "1", "--device", args.device]

    def repeat(i):
        snapshot = directory / f"startup{i}" / "1.pt"
        start = time.perf_counter()
        process = subprocess.Popen([*script, "--save-dir", str(snapshot.parent)], stdout=subprocess.DEVNULL)
        while not snapshot.exists():
            if process.poll() is not None:
                raise utils.InputError(f"train_sgd.py ended with status {process.returncode}")
            time.sleep(0.01)
        taken = time.perf_counter() - start
        process.kill()
        process.wait()
        return {"seconds": taken, "dataset": name}

    return repeat


def plain(stage, args, data, directory, device):
    """A stage as people write it."""
    window = torch.load(directory / "window.pt", weights_only=True) if stage in ("psgd", "pbfgs", "basis") else None
    if stage == "basis":
        return lambda i: {"P": baseline.basis(window.numpy(), args.n_components)}
    model = network(args, device)
    if stage == "evaluation":
        loader = baseline.loader(*data[2:], 128, device, augment=False)
        return lambda i: baseline.evaluation(model, loader, device)
    batch_size = args.pbfgs_batch_size if stage == "pbfgs" else args.batch_size
    loader = baseline.loader(*data[:2], batch_size, device, augment=True)
    lr, momentum, decay = {"sgd": (0.1, 0.9, 1e-4), "psgd": (PSGD_LR, 0.9, 0), "pbfgs": (1, 0, 0)}[stage]
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=decay)
    if stage == "sgd":
        return lambda i: baseline.sgd_epoch(model, loader, device, optimizer)
    P, _ = pca_basis(window.to(device, copy=True), args.n_components)
    if stage == "psgd":
        return lambda i: baseline.psgd_epoch(model, loader, device, optimizer, P)
    memory = {}
    return lambda i: baseline.pbfgs_epoch(model, loader, device, optimizer, P, memory, directory / "temporary.pt")


# ------------------------------------------------------------------------------------------------ in turn, and a table


def worker(side, args, directory, threads, connection):
    """Answer (stage, i) with what its i-th repetition gave, until the other end is closed."""
    multiprocessing.set_start_method(None, force=True)  # "spawn" is for this process: a DataLoader in it starts its own
    #                                                     workers as in any script, in 0.1 s and not in 10 s
    torch.set_num_threads(threads)
    if side == "baseline":
        device = utils.pick_device(args.device)
        torch.backends.cudnn.benchmark = True
        warnings.filterwarnings("ignore", "This DataLoader will create 4 worker")
    else:
        device = utils.set_up(train_sgd.parse_args(["--device", args.device]))
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    data, now, repeat = read_data(args), None, None
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            stage, i = connection.recv()
            if stage != now:
                now, repeat = stage, None
                gc.collect()
                if cuda:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                repeat = (plain(stage, args, data, directory, device) if side == "baseline" else
                          product(stage, args, data, directory, device, half=side == "half"))
            time, facts = seconds(device, repeat, i)
            if "P" in facts:
                np.save(directory / f"{side}.npy", facts.pop("P"))
            peak = {"peak_megabytes": torch.cuda.max_memory_allocated() / 1e6} if cuda else {}
            connection.send({"seconds": time, **facts, **peak})


@contextlib.contextmanager
def workers(sides, args, directory):
    """ask(side, stage, i): see `worker`; each side is a process that sleeps until it is asked."""
    context = multiprocessing.get_context("spawn")
    ends, processes = {}, []
    for side in sides:
        ends[side], theirs = context.Pipe()
        processes.append(context.Process(target=worker, args=(side, args, directory, torch.get_num_threads(), theirs)))
        processes[-1].start()
        theirs.close()

    def ask(side, stage, i):
        try:
            ends[side].send((stage, i))
            return ends[side].recv()
        except (EOFError, OSError):
            raise utils.InputError(f"the {side}'s process ended in {stage}, see above") from None

    try:
        yield ask
    finally:
        for end in ends.values():
            end.close()
        for process in processes:
            process.join()


def measure(args, directory):
    """stage -> side -> what each timed repetition gave."""
    sides, result = ["product", "baseline"] + ["half"] * args.half, {}
    with workers(sides, args, directory) as ask:
        if {"psgd", "pbfgs", "passes", "basis"} & set(args.stages):
            ask("product", "trajectory", 0)
        for stage in args.stages:
            result[stage] = {side: [] for side in sides if side in STAGES[stage][1]}
            for i in range(args.runs + 1):
                for side, repetitions in result[stage].items():
                    repetitions.append(ask(side, stage, i))
            for repetitions in result[stage].values():
                del repetitions[0]  # the warm-up
            print(f"{stage}: done", file=sys.stderr, flush=True)
    return result


def compare(args, stages, targets):
    """The lines of the table as dicts, from what `measure` gave."""
    lines = []
    for stage, sides in stages.items():
        title, _, target = STAGES[stage]
        title = title.format(**vars(args))
        times = {side: [facts["seconds"] for facts in repetitions] for side, repetitions in sides.items()}
        ours, reference = times["product"], [facts.get("reference") for facts in sides["product"]]
        lines.append((title, *((times["baseline"], ours) if "baseline" in times else (ours, reference)),
                      target if targets else ""))
        if "half" in times:
            lines.append((title.replace("baseline / ours", "ours / with --half"), ours, times["half"], ""))
    for i, (title, above, below, target) in enumerate(lines):
        lines[i] = {"what": title, "median": statistics.median(above), "target": target}
        if below[0]:
            ratios = [a / b for a, b in zip(above, below, strict=True)]
            other = statistics.median(below)
            lines[i] |= {"median_of_other": other, "ratio": lines[i]["median"] / other, "lowest": min(ratios),
                         "highest": max(ratios)}
    return lines


def table(lines):
    targets = any(line["target"] for line in lines)
    text = "| A / B | A, s | B, s | ratio | range |" + " target |" * targets
    text += "\n|---|--:|--:|--:|--:|" + "--:|" * targets
    for line in lines:
        cells = "| {what} | {median:.3g} | "
        cells += "{median_of_other:.3g} | {ratio:.2f} | {lowest:.2f} to {highest:.2f} |" if "ratio" in line else "| | |"
        text += "\n" + (cells + " {target} |" * targets).format(**line)
    return text


def angle(P, Q):
    """Largest principal angle (radians) between the row spans of P and Q (k, D)."""
    P, Q = (np.linalg.qr(np.asarray(M, dtype=np.float64).T)[0] for M in (P, Q))
    return float(np.arcsin(min(1.0, np.linalg.norm(Q - P @ (P.T @ Q), 2))))


def accuracy(directory):
    """Principal angles between our basis, scikit-learn's and numpy's SVD in float64."""
    ours, sklearn = (np.load(directory / f"{side}.npy", allow_pickle=False).astype(np.float64)
                     for side in ("product", "baseline"))
    X = torch.load(directory / "window.pt", weights_only=True).double().numpy()
    exact = np.linalg.svd(X - X.mean(0), full_matrices=False)[2][:len(ours)]
    return {"angle_to_sklearn_full": angle(ours, sklearn), "angle_to_float64_svd": angle(ours, exact),
            "angle_of_sklearn_full_to_float64_svd": angle(sklearn, exact),
            "orthonormality_error": float(np.abs(ours @ ours.T - np.eye(len(ours))).max())}


def main(args):
    device = utils.pick_device(args.device)
    models.check_name(args.arch)
    args.samples = args.samples or (50_000 if device.type == "cuda" else 5_000)
    args.images = "CIFAR10" if (Path(args.data) / "cifar10.npz").is_file() else "random"
    beside = Path(args.json or "benchmark.json").parent
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".benchmark-", dir=beside) as directory:
        stages = measure(args, Path(directory))
        angles = accuracy(Path(directory)) if "basis" in stages else {}
    lines = compare(args, stages, targets=device.type == "cpu" and args.arch == "resnet20")
    print(f"{args.arch} on {device}, medians of {args.runs}, epochs of {args.samples:,} {args.images} images\n")
    print(table(lines), "\n")
    for side, repetitions in stages.get("pbfgs", {}).items():
        print(f"P-BFGS trials per step, {side}: {statistics.mean(f['trials_per_step'] for f in repetitions):.2f}")
    print("".join(f"basis, {name}: {value:.1e}\n" for name, value in angles.items()), end="")
    if args.json:
        runs.save_json(Path(args.json), {
            "command": runs.command_line(), "settings": vars(args), "table": lines, "stages": stages, "basis": angles,
            "versions": runs.versions(), "hardware": runs.hardware(device), "git_revision": runs.git_revision()})


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # workers and temporary files go with this process
    utils.run_script(parse_args, main)
