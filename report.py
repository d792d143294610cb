"""Tables and figures of finished runs: reads the *_summary.json and *_log.jsonl below the given directories.

Prints a Markdown table with one row per setting: parameters trained, epochs, last and best test accuracy, the published
accuracy of the same setting (results/targets.json) and the difference from it, seconds; runs that differ in their seed
only share a row, as mean ± standard deviation. Runs that have begun and not ended are listed below it. With --figures
it draws what the runs have data for:

accuracy     test accuracy against epoch and against seconds of training
variance     the share of the snapshots' variance that each component explains, and all up to it
dimensions   test accuracy against the number of components
noise        test accuracy against label noise
trials       trials per step of P-BFGS
trajectory_* what trajectory.py measured in the directory of that name: distances, and paths over the loss surface

Example:
  python report.py runs/quick --table runs/quick/table.md --figures runs/quick
"""
import csv
import io
import json
import statistics
from itertools import accumulate
from pathlib import Path

import packages  # noqa: F401 - first: it says what is missing

import utils
from dldr.checkpoint import load_json, write_atomically
from dldr.errors import UserError

# method -> label and colour (Okabe and Ito's palette, safe for colour-blind readers)
STYLES = {"sgd": ("SGD", "#000000"), "psgd": ("P-SGD", "#D55E00"), "pbfgs": ("P-BFGS", "#0072B2")}
OTHERS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")  # of the same palette, for what shares a method
BASES = {"pca": "principal directions", "random": "random directions", "snapshots": "span of snapshots"}
LINES = ("-", "--", ":", "-.")
TARGETS = Path(__file__).parent / "results" / "targets.json"


def parse_args(argv=None):
    parser = utils.Parser(__doc__)
    parser.add_argument("directories", nargs="+", metavar="DIR", help="run directories, searched with all below them")
    parser.add_argument("--table", metavar="FILE", help="also write the Markdown table to this file")
    parser.add_argument("--csv", metavar="FILE", help="write one line per run, every number unrounded")
    parser.add_argument("--figures", metavar="DIR", help="draw the figures into this directory")
    parser.add_argument("--format", choices=("png", "svg"), default="png", help="of the figures")
    return parser.parse_args(argv)


def find_runs(directories):
    """Summaries below the directories, each once and with its log as "log"; SGD, P-BFGS, P-SGD in each directory."""
    runs, seen = [], set()
    for directory in directories:
        for method in STYLES:
            for path in Path(directory).rglob(f"{method}_summary.json"):
                try:
                    summary = json.loads(path.read_text())
                    lines = path.with_name(f"{method}_log.jsonl").read_text().splitlines()
                    if (content := json.dumps(summary, sort_keys=True)) not in seen:  # else a copy of a run
                        runs.append({**summary, "directory": path.parent, "log": [json.loads(line) for line in lines]})
                    seen.add(content)
                except (OSError, ValueError) as error:
                    raise UserError(f"{path} and its {method}_log.jsonl cannot be read: {error}") from error
    if not runs:
        raise UserError(f"no *_summary.json below {' '.join(directories)}; a finished run writes one")
    return sorted(runs, key=order)


def order(run):
    """Data set, network and part of the data, label noise, method, k, window, seed: each ascending as a number."""
    args, methods = run["args"], ["SGD", "Adam", "P-SGD", "P-BFGS"]
    return (run["dataset"], run["arch"], args.get("smalldatasets") or 1, run["corrupt"],
            methods.index(label(run).split(" (")[0]), args.get("basis", "pca"), run["n_components"] or 0,
            args.get("params_end", 0), args.get("params_step", 1), args.get("samples_per_epoch") or 1, run["seed"],
            str(run["directory"]))


def unfinished(directories):
    """Lines of text on runs below the directories that have begun and have no summary."""
    lines = []
    for directory in directories:
        for method in STYLES:
            for path in sorted(Path(directory).rglob(f"{method}_args.json")):
                args, log = load_json(path)["args"], path.with_name(f"{method}_log.jsonl")
                if not path.with_name(f"{method}_summary.json").is_file():
                    epochs = len(log.read_text().splitlines()) if log.is_file() else 0
                    name = label({"method": method, "args": args})
                    lines.append(f"unfinished: {name} in {path.parent}, seed {args['randomseed']}, {epochs} of "
                                 f"{args['epochs']} epochs")
    return lines


def label(run):
    """SGD, Adam, P-BFGS or P-SGD, and in brackets a basis other than the principal directions."""
    args, name = run["args"], STYLES[run["method"]][0]
    if args.get("optimizer") == "adam":
        return "Adam"
    basis = args.get("basis", "pca")
    return name if basis == "pca" else f"{name} ({basis})"


def setting(run):
    """What a row is: everything that was chosen but the seed, the data, and how the snapshots were sampled."""
    same = {"randomseed", "save_dir", *utils.changeable_flags()}
    args = {key: value for key, value in run["args"].items() if key not in same}
    data = {key: value for key, value in run.get("data", {}).items() if key != "labels"}  # noisy ones differ by seed
    return json.dumps([run["method"], run["epochs"], args, data, run.get("sampling")], sort_keys=True)


def grouped(runs):
    """Lists of the runs that differ in their seed only."""
    groups = {}
    for run in runs:
        groups.setdefault(setting(run), []).append(run)
    return list(groups.values())


def mean(runs, key, digits=2):
    """Mean of summary[key] over the runs, ± the standard deviation where there are several; a dash for no epochs."""
    values = [run[key] for run in runs]
    if None in values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def part(run):
    """Which part of the data set was trained on, where not all."""
    share = run["args"].get("smalldatasets")
    return f", {100 * share:g}% of the samples" if share else ""


def sampled(run):
    """The snapshots that a run sampled or used, where that is not one per epoch from the window's start."""
    args = run["args"]
    if run["method"] == "sgd":
        return f", {args['samples_per_epoch']} snapshots an epoch" if (args.get("samples_per_epoch") or 1) > 1 else ""
    step = f", every {args['params_step']}." if args.get("params_step", 1) > 1 else ""
    return f", snapshots {args['params_start']} to {args['params_end'] - 1}{step}"


# what the published runs have in common, and their schedules
PUBLISHED = {"momentum": 0.9, "weight_decay": 1e-4, "accumulate": 1, "half": False, "smalldatasets": None, "alpha": 0.0,
             "samples_per_epoch": 1, "start_epoch": 0, "snapshot_dtype": "float32", "pretrained": False}
MILESTONES = {("sgd", "CIFAR10"): [100, 150], ("sgd", "CIFAR100"): [150], ("psgd", "CIFAR10"): [30, 50]}


def on_record(run):
    """The reference result (results/targets.json) of the run's setting; None unless all that matters agrees."""
    values = {**run["args"], **run, "label": label(run), "processes": run["hardware"].get("processes", 1)}
    wanted = {**PUBLISHED, "processes": 1, "milestones": MILESTONES.get((run["method"], run["dataset"]))}
    for target in load_json(TARGETS)["targets"]:
        own = {key: value for key, value in target.items() if key not in ("table", "source", "last", "best")}
        if all(values.get(key) == value if key in own else values.get(key, value) == value
               for key, value in {**wanted, **own}.items()):
            return target
    return None


def compared(group):
    """Target and difference of a row: of the last epoch, flagged if larger than one standard deviation."""
    target, values = on_record(group[0]), [run["test_accuracy_last"] for run in group]
    if target is None or None in values:
        return "-", "-"
    difference = round(statistics.fmean(values) - target["last"], 2)
    spread = statistics.stdev(values) if len(values) > 1 else None
    remark = " (one seed)" if spread is None else " (beyond the spread)" if abs(difference) > spread else ""
    return f"{target['last']:.2f} [{target['source']}]", f"{difference:+.2f}{remark}"


def table(runs):
    """A Markdown table, one row per setting; the first column names data set, network, label noise and seeds."""
    rows = [
        "| run | method | parameters trained | epochs | test accuracy, last (%) | best (%) | at epoch "
        "| target, last (%) | difference | training accuracy, last (%) | seconds: train + eval + basis |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    windows = {sampled(run) for run in runs if run["method"] != "sgd"}
    for group in grouped(runs):
        run = group[0]
        noise = f", {100 * run['corrupt']:g}% label noise" if run["corrupt"] else ""
        seeds = sorted(run["seed"] for run in group)
        if len(set(seeds)) < len(seeds):
            utils.note(f"a seed twice in one row: {', '.join(str(run['directory']) for run in group)}")
        seeds = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds ({', '.join(map(str, seeds))})"
        best_epochs = ", ".join(str(run["best_epoch"] or "-") for run in group)
        seconds = [statistics.fmean(run["seconds"][stage] for run in group) for stage in ("train", "eval", "basis")]
        name = label(run) + (sampled(run) if len(windows) > 1 else "")
        target, difference = compared(group)
        rows.append(
            f"| {run['dataset']}, {run['arch']}{noise}{part(run)}, {seeds} | {name} | {run['parameters_trained']:,} "
            f"| {run['epochs']} | {mean(group, 'test_accuracy_last')} | {mean(group, 'test_accuracy_best')} "
            f"| {best_epochs} | {target} | {difference} | {mean(group, 'train_accuracy_last')} "
            f"| {' + '.join(f'{s:.1f}' for s in seconds)} |"
        )
    return "\n".join(rows) + "\n"


COLUMNS = ("method", "dataset", "arch", "seed", "corrupt", "parameters", "parameters_trained", "snapshots", "epochs",
           "test_accuracy_last", "test_accuracy_best", "best_epoch", "train_accuracy_last")


def comma_separated(runs):
    """The runs as CSV, a line each: COLUMNS, the shares that the basis explains, seconds by stage, the command."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    stages = list(runs[0]["seconds"])
    writer.writerow([*COLUMNS, "label", "target_last", "explained_variance",
                     *(f"seconds_{stage}" for stage in stages), "command"])
    for run in runs:
        explained = (run["explained_variance"] or {}).get("total")
        writer.writerow([*(run[key] for key in COLUMNS), label(run), (on_record(run) or {}).get("last"), explained,
                         *(run["seconds"][stage] for stage in stages), run["command"]])
    return text.getvalue()


# --------------------------------------------------------------------------------------------------------- figures


def panels(columns, title):
    """A figure of README's width with `columns` axes side by side."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(9, 3.8), layout="constrained")
    fig.suptitle(title, fontsize=10)
    axes = fig.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.grid(alpha=0.3)
    return fig, axes


def shades(colour, count):
    """`count` tints of a colour, from light to itself."""
    rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [tuple(1 - (1 - c) * (0.35 + 0.65 * (i + 1) / count) for c in rgb) for i in range(count)]


def styles(runs):
    """Groups of runs that share a line, each with its style: colour by method, tint by k, dashes by label noise.

    Where label noise varies only the largest k of each method is shown: more lines could not be told apart.
    """
    noises, colour, others = sorted({run["corrupt"] for run in runs}), {}, list(OTHERS)
    dims = {name: sorted({run["n_components"] or 0 for run in runs if label(run) == name}) for name in map(label, runs)}
    lines = []
    for group in grouped(runs):
        run, name = group[0], label(group[0])
        k = dims[name] if len(noises) == 1 else dims[name][-1:]
        if (run["n_components"] or 0) not in k:
            continue
        if name not in colour:
            own = STYLES[run["method"]][1]
            colour[name] = others.pop(0) if own in colour.values() and others else own
        noise = f", {100 * run['corrupt']:g}% label noise" if len(noises) > 1 else ""
        dimension = f", k = {run['n_components']}" if run["n_components"] else ""
        several = len({sampled(run) for run in runs if run["method"] != "sgd"}) > 1
        lines.append((group, {
            "color": shades(colour[name], len(k))[k.index(run["n_components"] or 0)],
            "linestyle": LINES[noises.index(run["corrupt"]) % len(LINES)],
            "label": f"{name}{dimension}{noise}{sampled(run) if several else ''}",
        }))
    return lines


def curve(ax, group, x, y, **style):
    """The seeds' mean of y against the mean of x, over epochs, and between their least and largest a band."""
    xs, ys = ([[sum(point) / len(group) for point in zip(*map(of, group), strict=True)] for of in (x, y)])
    ax.plot(xs, ys, marker=".", markersize=3, linewidth=1.2, **style)
    if len(group) > 1:
        every = list(zip(*map(y, group), strict=True))
        ax.fill_between(xs, list(map(min, every)), list(map(max, every)), color=style["color"], alpha=0.15, linewidth=0)


def logged(key):
    return lambda run: [line[key] for line in run["log"]]


def elapsed(run):
    return [run["seconds"]["basis"] + s for s in accumulate(logged("seconds")(run))]


def accuracy(runs, title):
    """Test accuracy against epoch and against seconds: the mean over seeds, and their range as a band."""
    from matplotlib.ticker import MaxNLocator

    fig, (by_epoch, by_time) = panels(2, title)
    for group, style in styles(runs):
        curve(by_epoch, group, logged("epoch"), logged("test_accuracy"), **style)
        curve(by_time, group, elapsed, logged("test_accuracy"), **style)
    by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_epoch.set(xlabel="epoch", ylabel="test accuracy (%)")
    by_time.set(xlabel="seconds of training, basis included", ylabel="test accuracy (%)")
    fig.legend(*by_time.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return fig


def variance(runs, title):
    """Explained variance per component and in sum, one line per basis; None without a subspace."""
    runs = [run for run in runs if run["explained_variance"]]
    if not runs:
        return None
    fig, (each, total) = panels(2, title)
    noises, colour, shown = sorted({run["corrupt"] for run in runs}), {}, set()
    for run in sorted(runs, key=lambda run: -run["n_components"]):  # of one window the largest basis holds the others
        basis = run["args"].get("basis", "pca")
        text = f"{BASES[basis]}, {run['snapshots']} snapshots"
        text += f", {100 * run['corrupt']:g}% label noise" if len(noises) > 1 else ""
        if (text, run["seed"]) in shown:
            continue
        entry = None if text in colour else text  # another seed needs no entry in the legend
        shown.add((text, run["seed"]))
        shares = run["explained_variance"]["per_component"]
        numbers = range(1, len(shares) + 1)
        style = {"marker": ".", "markersize": 4, "linewidth": 1, "label": entry,
                 "color": colour.setdefault(text, OTHERS[len(colour) % len(OTHERS)])}
        each.semilogy(numbers, [100 * share for share in shares], **style)
        total.plot(numbers, [100 * sum(shares[:i]) for i in numbers], **style)
    each.set(xlabel="component", ylabel="variance explained by each (%)")
    total.set(xlabel="number of components", ylabel="variance explained by all (%)")
    total.legend(frameon=False, fontsize=8, loc="center right")
    return fig


def against(ax, runs, key, value, **style):
    """Mean and standard deviation over seeds of run[value] against run[key]."""
    points = sorted({run[key] for run in runs})
    values = [[run[value] for run in runs if run[key] == point] for point in points]
    spread = [statistics.stdev(v) if len(v) > 1 else 0 for v in values]
    ax.errorbar(points, [statistics.fmean(v) for v in values], spread, marker="o", markersize=4, capsize=3, **style)


def dimensions(runs, title):
    """Last test accuracy of P-SGD and P-BFGS against k, SGD's as a line; None for a single k."""
    subspace = [run for run in runs if run["n_components"] and run["epochs"] and label(run) in ("P-SGD", "P-BFGS")]
    if len({run["n_components"] for run in subspace if run["method"] == "psgd"}) < 3:
        return None
    fig, (ax,) = panels(1, title)
    noises = sorted({run["corrupt"] for run in subspace})
    for i, c in enumerate(noises):
        text = f", {100 * c:g}% label noise" if len(noises) > 1 else ""
        for method, line in (("psgd", "-"), ("pbfgs", "--")):
            these = [run for run in subspace if run["method"] == method and run["corrupt"] == c]
            if these:
                against(ax, these, "n_components", "test_accuracy_last", linestyle=line, color=OTHERS[i % len(OTHERS)],
                        label=f"{STYLES[method][0]}{text}")
        sgd = [run["test_accuracy_last"] for run in runs if label(run) == "SGD" and run["corrupt"] == c]
        if sgd:
            ax.axhline(statistics.fmean(sgd), linestyle=":", color=OTHERS[i % len(OTHERS)],
                       label=f"SGD, all parameters{text}")
    ax.set_xticks(sorted({run["n_components"] for run in subspace}))
    ax.set(xlabel="components k", ylabel="test accuracy, last epoch (%)")
    ax.legend(frameon=False, fontsize=8)
    return fig


def noise(runs, title):
    """Test accuracy against label noise: SGD's last and best, P-SGD and P-BFGS in their most components."""
    if len({run["corrupt"] for run in runs}) < 2:
        return None
    fig, (ax,) = panels(1, title)
    for method, value, text, line in (
        ("sgd", "test_accuracy_last", "SGD, last epoch", "-"), ("sgd", "test_accuracy_best", "SGD, best epoch", ":"),
        ("psgd", "test_accuracy_last", "P-SGD, last epoch", "-"),
        ("pbfgs", "test_accuracy_last", "P-BFGS, last epoch", "-"),
    ):
        these = [run for run in runs if label(run) == STYLES[method][0] and run["epochs"]]
        most = max((run["n_components"] or 0 for run in these), default=0)
        these = [{**run, "noise": 100 * run["corrupt"]} for run in these if (run["n_components"] or 0) == most]
        if these:
            against(ax, these, "noise", value, linestyle=line, color=STYLES[method][1],
                    label=f"{text}, k = {most}" if most else text)
    ax.set(xlabel="label noise (%)", ylabel="test accuracy (%)")
    ax.legend(frameon=False, fontsize=8, loc="lower left")
    return fig


def trials(runs, title):
    """Trials per step of P-BFGS and how many searches take their first trial, against epoch."""
    from matplotlib.ticker import MaxNLocator

    runs = [run for run in runs if run["method"] == "pbfgs" and run["log"]]
    if not runs:
        return None
    fig, (count, first) = panels(2, title)
    for group, style in styles(runs):
        curve(count, group, logged("epoch"), logged("trials_per_step"), **style)
        curve(first, group, logged("epoch"), logged("first_trial_accepted"), **style)
    for ax in (count, first):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    count.set(xlabel="epoch", ylabel="trials per step")
    first.set(xlabel="epoch", ylabel="first trial accepted (% of steps)")
    fig.legend(*count.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return fig


def plane(result):
    """What trajectory.py measured: distances against snapshot; the loss surface with the paths over it."""
    from matplotlib.ticker import LogLocator

    args = result["args"]
    fig, (distance, surface) = panels(2, f"{args['datasets']}, {args['arch']}{part(result)}, seed {args['randomseed']}")
    first, last = result["snapshots"]
    for key, text, colour in (("distance_from_start", "from the start", "#000000"),
                              ("distance_from_subspace", "from the subspace", "#D55E00")):
        distance.plot(range(first, last + 1), result[key], color=colour, label=text)
    distance.axvspan(first, args["params_end"] - 1, alpha=0.1, color="#009E73", label="window of the basis")
    distance.set(xlabel="snapshot of SGD (epoch)", ylabel="Euclidean distance of the parameters")
    distance.legend(frameon=False, fontsize=8)
    surface.grid(False)
    losses = [[max(loss, 1e-6) for loss in row] for row in result["losses"]]
    shown = surface.contourf(*result["axes"], losses, levels=20, locator=LogLocator(base=1.25), cmap="Blues_r",
                             alpha=0.7)
    fig.colorbar(shown, ax=surface, label="training loss", format="%.2g")
    for method, colour, marker in (("sgd", "#000000", "o"), ("psgd", "#D55E00", "s"), ("pbfgs", "#CC79A7", "^")):
        for i, line in enumerate(result["paths"][method]):
            surface.plot(*zip(*line, strict=True), color=colour, marker=marker, markersize=3, linewidth=1.2,
                         label=None if i else STYLES[method][0])
    surface.set(xlabel="component 1", ylabel="component 2")
    surface.legend(fontsize=8)
    return fig


FIGURES = (accuracy, variance, dimensions, noise, trials)


def image(fig, kind="png"):
    """The figure's file, the same bytes every time: without the date, and without the library's name."""
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "dldr"}):
        fig.savefig(file, dpi=150, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return file.getbuffer()


def draw(runs, directory, kind, trajectories=()):
    """Write the figures that the runs have data for; returns their paths."""
    title = "; ".join(sorted({f"{run['dataset']}, {run['arch']}{part(run)}" for run in runs}))
    figures = {figure.__name__: figure(runs, title) for figure in FIGURES}
    figures |= {f"trajectory_{path.parent.name}": plane(load_json(path)) for path in trajectories}
    return [write_atomically(directory / f"{name}.{kind}", image(fig, kind)) for name, fig in figures.items() if fig]


def main(args):
    runs = find_runs(args.directories)
    text = table(runs)
    print(text, end="")
    for line in unfinished(args.directories):
        print(line)
    if args.table:
        write_atomically(Path(args.table), text.encode())
    if args.csv:
        write_atomically(Path(args.csv), comma_separated(runs).encode())
    if args.figures:
        trajectories = sorted(path for top in args.directories for path in Path(top).rglob("trajectory.json"))
        for path in [path for path in trajectories if "losses" not in load_json(path)]:
            print(f"not drawn: {path} holds no losses; trajectory.py of this version writes them")
            trajectories.remove(path)
        for path in draw(runs, Path(args.figures), args.format, trajectories):
            print(f"figure: {path}")


if __name__ == "__main__":
    utils.run_script(parse_args, main)
