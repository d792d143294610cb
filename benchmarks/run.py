"""Time every stage of the scripts (STAGES) against a plain implementation of it (baseline.py), in turn on one machine.

Each side has a process of its own, which sleeps while another works: A B A B ... after a warm-up repetition of each.
Printed are medians, their ratio and its range. An epoch is one of the first --samples training images, of the digits
where --data has no cifar10.npz, and in SGD ends with its snapshot. Run it on an idle machine.

Example:
  python benchmarks/run.py --half --json results/cpu-speed/benchmark.json
"""
import argparse
import itertools
import multiprocessing
import signal
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean, median

import baseline
import common
import torch
from common import seconds

import datasets
import models
import train_sgd
import utils
from dldr import engine, graphs
from dldr.files import save_tensors
from dldr.subspace import ProjectedBFGS, ProjectedSGD, flat_parameters, pca_basis

BASIS = "basis of {snapshots} snapshots, k {n_components}: "
SOLVERS = {"basis": "full", "basis_covariance": "covariance_eigh", "basis_gram": "gram"}
STAGES = {  # what over what; the sides that do it; what is aimed at for ResNet-20 in float32 on two CPU cores
    "sgd": ("SGD epoch, batch {batch_size}: baseline / ours", "product baseline half", ">= 1.25"),
    "psgd": ("P-SGD epoch, batch {batch_size}: baseline / ours", "product baseline half", ">= 1.25"),
    "pbfgs": ("P-BFGS epoch, batch {pbfgs_batch_size}: baseline / ours", "product baseline half", ">= 1.4"),
    "evaluation": ("evaluation, {test_samples:,} images: baseline / ours", "product baseline half", ">= 1.5"),
    "basis": (BASIS + "scikit-learn / ours", "product baseline", ">= 10"),
    "basis_covariance": (BASIS + "scikit-learn's covariance_eigh / ours", "product baseline", ""),
    "basis_gram": (BASIS + "plain Gram + eigh / ours", "product baseline", ""),
    "step": ("SGD step, batch {batch_size} / bare forward + backward", "product", "<= 1.05"),
    "passes": ("P-BFGS iteration, batch {pbfgs_batch_size} / its passes", "product", ""),
    "save": ("checkpoint of {save_arch}", "product", ""),
    "startup": ("train_sgd.py, one iteration on the digits, from start to end", "product", "< 5 s"),
}
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
PSGD_LR = 0.1  # not the script's 1, which diverges in a subspace of single steps; it takes the same time


def parse_args(argv=None):
    parser = common.parser(__doc__)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES, metavar="STAGE", help="which")
    parser.add_argument("--half", action="store_true", help="also time the scripts' --half against them without it")
    parser.add_argument("--samples", type=utils.count, help="of an epoch (default: 50000 on CUDA, 5000 on a CPU)")
    for name, value, text in (
        ("--runs", 5, "timed repetitions"), ("--test-samples", 10_000, "images of an evaluation"),
        ("--batch-size", 128, "of SGD and P-SGD"), ("--pbfgs-batch-size", 1024, "of P-BFGS"),
        ("--snapshots", 81, "of the basis: one per step of a short SGD run"), ("--n_components", 40, "dimensions"),
        ("--data", "data/", "where cifar10.npz lies"), ("--arch", "resnet20", "network"),
        ("--save-arch", "resnet50", "network of torchvision")):
        parser.add_argument(name, type=str if isinstance(value, str) else utils.count, default=value, help=text)
    return parser.parse_args(argv)


def prepare(side, stage, args, directory, device):
    """A stage's repeat(), as the scripts or as people write it; returns what to keep, perhaps its own "seconds"."""
    ours, searching, k = side != "baseline", stage in ("pbfgs", "passes"), args.n_components
    if stage == "save":
        model = models.get_model(args.save_arch, 1000, "ImageNet").to(device)
        state = {"model": model.state_dict(), "momentum": torch.zeros_like(flat_parameters(model))}
        return lambda: {"megabytes": save_tensors(directory / "checkpoint.pt", state).stat().st_size / 1e6}
    if stage == "startup":
        script = [sys.executable, train_sgd.__file__, "--datasets=digits", "--smalldatasets=0.05", "--epochs=1",
                  f"--arch={args.arch}", f"--device={args.device}", f"--save-dir={directory}/run", "--overwrite"]
        return lambda: {"status": subprocess.run(script, stdout=subprocess.DEVNULL, check=True).returncode}
    window = torch.load(directory / "window.pt", weights_only=True).to(device) if stage != "trajectory" else None
    if stage in SOLVERS:
        return lambda: {"P": pca_basis(window, k)[0] if ours else baseline.basis(window, k, SOLVERS[stage])}
    torch.manual_seed(1)  # the same initial network everywhere
    model, source = models.get_model(args.arch, 10).to(device), datasets.SOURCES["CIFAR10"]
    x, y, *test = datasets.SOURCES[args.dataset].read(Path(args.data))
    x, y, test = x[:args.samples], y[:args.samples], [array[:args.test_samples] for array in test]
    if stage == "evaluation":
        if not ours:
            return partial(baseline.epoch, model, baseline.loader(*test, 128, device, augment=False), device)
        test = datasets.ArrayBatches(*test, source, datasets.EVALUATION_BATCH[device.type], device)
        return lambda: engine.evaluate(model, test.epoch(0), side == "half")
    batch_size = args.pbfgs_batch_size if searching else args.batch_size
    P = pca_basis(window, k)[0] if stage in ("psgd", "pbfgs", "passes") else None
    if not ours:
        options = {"sgd": SGD, "psgd": {"lr": PSGD_LR, "momentum": 0.9}, "pbfgs": {"lr": 1}}[stage]
        optimizer, memory = torch.optim.SGD(model.parameters(), **options), {}
        loader = baseline.loader(x, y, batch_size, device, augment=True)
        step = {"sgd": lambda *_: optimizer.step(), "psgd": lambda *_: baseline.psgd_step(model, optimizer, P),
                "pbfgs": partial(baseline.pbfgs_step, model, optimizer, P, memory, directory / "trial.pt")}[stage]

        def plain_epoch():
            facts = baseline.epoch(model, loader, device, step)
            if stage == "sgd":
                torch.save(model.state_dict(), directory / "baseline.pt")
            return facts | {"trials_per_step": memory.pop("trials", 0) / len(loader)}

        return plain_epoch

    batches = datasets.ArrayBatches(x, y, source, batch_size, device, seed=1, shuffle=True, augment=True)
    epochs, w = map(batches.epoch, itertools.count()), flat_parameters(model)
    ready = itertools.chain.from_iterable(epochs)  # mini-batches without end
    optimizer = (ProjectedBFGS(model, P) if searching else ProjectedSGD(model, P, PSGD_LR) if stage == "psgd" else
                 train_sgd.make_optimizer(argparse.Namespace(optimizer="sgd", **SGD), list(model.parameters())))
    loop = engine.Loop(model, optimizer, half=side == "half", read_every=1 if device.type == "cpu" else 50,
                       capture=graphs.capturer("auto", model, device))

    def epoch():
        facts = loop.train_epoch(next(epochs), sizes=batches.sizes)
        if stage == "sgd" and all(torch.isfinite(value).all() for value in (w, *model.buffers())):
            save_tensors(directory / f"{side}.pt", model.state_dict())
        return facts | ({"trials_per_step": optimizer.statistics()["trials_per_step"]} if searching else {})

    def trajectory():
        window = [w.cpu().clone()]  # (D,) before and after each step
        loop.train_epoch(list(itertools.islice(ready, args.snapshots - 1)),
                         after_iteration=lambda _: window.append(w.cpu().clone()))
        torch.save(torch.stack(window), directory / "window.pt")
        return {}

    def passes(x, y, trials):
        loop.passes(x, y, len(y), 1) if searching else torch.nn.functional.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for _ in range(trials):
                float(loop.trial_loss(x, y, len(y)))

    def iterations():
        whole, reference = [], []
        for batch in itertools.islice(ready, graphs.WARM_UP + 2):
            whole.append(seconds(device, loop.train_epoch, [batch])[0])
            trials = int(optimizer.statistics()["trials_per_step"]) if searching else 0
            reference.append(seconds(device, passes, *batch, trials)[0])
        return {"seconds": median(whole), "reference": median(reference)}

    return {"trajectory": trajectory, "step": iterations, "passes": iterations}.get(stage, epoch)


PREPARED = {}  # in a side's process: its current stage


def start(side, device):
    """Set up a side's process, as a script is."""
    multiprocessing.set_start_method(None, force=True)  # loader workers are forked, as in any script
    warnings.filterwarnings("ignore", "This DataLoader will create 4 worker")
    torch.backends.cudnn.benchmark = True
    if side != "baseline":
        utils.set_up(device, conv_tf32=True)


def repetition(side, stage, args, directory):
    """What a repetition of a stage gave, its seconds included; in the side's process."""
    device = utils.pick_device(args.device)
    if stage not in PREPARED:
        PREPARED.clear()
        common.reset_peaks(device)
        PREPARED[stage] = prepare(side, stage, args, directory, device)
    taken, facts = seconds(device, PREPARED[stage])
    if "P" in facts:
        torch.save(facts.pop("P").cpu(), directory / f"{stage}-{side}.pt")
    return {"seconds": taken, **facts, "peak": common.peaks(device)}


def measure(args, directory, save):
    """stage -> side -> what each timed repetition gave; and each basis's largest principal angle to a float64 SVD's.

    save(stages, angles, complete) follows each stage, so that a benchmark that is stopped keeps what it has measured.
    """
    wanted = {stage: STAGES[stage][1].replace("half", "half" * args.half).split() for stage in args.stages}
    stages, angles, new = {}, {}, partial(ProcessPoolExecutor, 1, multiprocessing.get_context("spawn"), start)
    processes = {side: new((side, args.device)) for side in ("product", "baseline", "half")}  # start when asked

    def ask(side, stage):
        return processes[side].submit(repetition, side, stage, args, directory).result()

    ask("product", "trajectory")
    for stage, sides in wanted.items():
        runs = [{side: ask(side, stage) for side in sides} for _ in range(args.runs + 1)]
        stages[stage] = {side: [run[side] for run in runs[1:]] for side in sides}  # without the warm-up
        save(stages, angles, False)
        print(f"{stage}: done", file=sys.stderr, flush=True)
    X = torch.load(directory / "window.pt", weights_only=True).double()
    exact = torch.linalg.svd(X - X.mean(0), full_matrices=False)[2][:args.n_components]
    for path in sorted(directory.glob("basis*-*.pt")):
        Q = torch.linalg.qr(torch.load(path, weights_only=True).double().T)[0]
        angles[path.stem] = float(torch.linalg.matrix_norm(Q - exact.T @ (exact @ Q), 2).clamp(max=1).asin())
    save(stages, angles, True)
    return stages, angles


def table(args, stages, targets):
    """The Markdown table of what `measure` gave."""
    lines = ["| A / B | A, s | B, s | ratio | range | target |", "|---|--:|--:|--:|--:|--:|"]
    for stage, found in stages.items():
        times = {side: [facts["seconds"] for facts in runs] for side, runs in found.items()}
        times["reference"] = [facts["reference"] for facts in found["product"] if "reference" in facts]
        pairs = [("baseline", "product"), ("product", "half"), ("product", "reference")]
        for above, below in [pair for pair in pairs if all(map(times.get, pair))] or [("product", "reference")]:
            A, B, what, cells = times[above], times[below], STAGES[stage][0].format(**vars(args)), "| | "
            what = what.replace("baseline / ours", "ours / with --half") if below == "half" else what
            if B:
                ratios = [a / b for a, b in zip(A, B, strict=True)]
                cells = f"{median(B):.3g} | {median(A) / median(B):.2f} | {min(ratios):.2f} to {max(ratios):.2f}"
            lines.append(f"| {what} | {median(A):.3g} | {cells} | {STAGES[stage][2] * (targets and below != 'half')} |")
    return "\n".join(lines)


def main(args):
    device = utils.pick_device(args.device)
    args.samples = args.samples or (50_000 if device.type == "cuda" else 5_000)
    args.dataset = "CIFAR10" if (Path(args.data) / "cifar10.npz").is_file() else "digits"

    def save(stages, angles, complete):
        common.save(args.json, device, {"complete": complete, "settings": vars(args), "stages": stages,
                                        "angles": angles})

    with tempfile.TemporaryDirectory(prefix="benchmark-") as directory:
        stages, angles = measure(args, Path(directory), save)
    print(f"{args.arch} on {device}, medians of {args.runs}, epochs of {args.samples:,} images of {args.dataset}\n")
    print(table(args, stages, targets=device.type == "cpu" and args.arch == "resnet20"), "\n")
    for side, runs in stages.get("pbfgs", {}).items():
        print(f"P-BFGS trials per step, {side}: {mean(facts['trials_per_step'] for facts in runs):.2f}")
    print(*(f"{name}: {value:.1e} radians from a float64 SVD" for name, value in angles.items()), sep="\n")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # processes and temporary files go with this one
    utils.run_script(parse_args, main)
