"""Tables and figures of finished runs: reads the *_summary.json and *_log.jsonl below the given directories.

Prints a Markdown table with one row per setting: parameters trained, epochs, last and best test accuracy, seconds; runs
that differ in their seed only share a row, as mean ± standard deviation. Runs that have begun and not ended are listed
below it. With --figures it draws what the runs have data for:

accuracy.png     test accuracy against epoch and against seconds of training
variance.png     the share of the snapshots' variance that each component explains, and all up to it
dimensions.png   test accuracy against the number of components
noise.png        test accuracy against label noise
trials.png       trials per step of P-BFGS

Example:
  python report.py runs/quick --table runs/quick/table.md --figures runs/quick
"""
import argparse
import csv
import io
import json
import statistics
from pathlib import Path

import utils
from runs import HARMLESS, load_json, write_atomically

# method -> label and colour (Okabe and Ito's palette, safe for colour-blind readers)
STYLES = {"sgd": ("SGD", "#000000"), "pbfgs": ("P-BFGS", "#0072B2"), "psgd": ("P-SGD", "#D55E00")}
OTHERS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")  # of the same palette, for what shares a method


def parse_args(argv=None):
    description, example = __doc__.strip().split("\n\nExample", 1)
    parser = utils.Parser(
        description=description, epilog="example" + example, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directories", nargs="+", metavar="DIR", help="run directories, searched with all below them")
    parser.add_argument("--table", metavar="FILE", help="also write the Markdown table to this file")
    parser.add_argument("--csv", metavar="FILE", help="write one line per run, every number unrounded")
    parser.add_argument("--figures", metavar="DIR", help="draw the figures into this directory")
    return parser.parse_args(argv)


def find_runs(directories):
    """Summaries below the directories, each with its log as "log"; SGD, P-BFGS, P-SGD in each directory."""
    runs = []
    for directory in directories:
        for method in STYLES:
            for path in Path(directory).rglob(f"{method}_summary.json"):
                try:
                    summary = json.loads(path.read_text())
                    lines = path.with_name(f"{method}_log.jsonl").read_text().splitlines()
                    runs.append({**summary, "directory": path.parent, "log": [json.loads(line) for line in lines]})
                except (OSError, ValueError) as error:
                    raise utils.InputError(f"{path} and its {method}_log.jsonl cannot be read: {error}") from error
    if not runs:
        raise utils.InputError(f"no *_summary.json below {' '.join(directories)}; a finished run writes one")
    order = list(STYLES)
    return sorted(runs, key=lambda run: (str(run["directory"]), order.index(run["method"])))


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
    """What a row is: everything that was chosen, but for the seed."""
    args = {key: value for key, value in run["args"].items() if key not in {"randomseed", *HARMLESS}}
    return json.dumps([run["method"], run["epochs"], args], sort_keys=True)


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


def table(runs):
    """A Markdown table, one row per setting; the first column names data set, network, label noise and seeds."""
    rows = [
        "| run | method | parameters trained | epochs | test accuracy, last (%) | best (%) | at epoch "
        "| training accuracy, last (%) | seconds: train + eval + basis |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for group in grouped(runs):
        run = group[0]
        noise = f", {100 * run['corrupt']:g}% label noise" if run["corrupt"] else ""
        part = run["args"].get("smalldatasets")
        part = f", {100 * part:g}% of the samples" if part else ""
        seeds = sorted(run["seed"] for run in group)
        seeds = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds ({', '.join(map(str, seeds))})"
        best_epochs = ", ".join(str(run["best_epoch"] or "-") for run in group)
        seconds = [statistics.fmean(run["seconds"][stage] for run in group) for stage in ("train", "eval", "basis")]
        rows.append(
            f"| {run['dataset']}, {run['arch']}{noise}{part}, {seeds} | {label(run)} | {run['parameters_trained']:,} "
            f"| {run['epochs']} | {mean(group, 'test_accuracy_last')} | {mean(group, 'test_accuracy_best')} "
            f"| {best_epochs} | {mean(group, 'train_accuracy_last')} | {' + '.join(f'{s:.1f}' for s in seconds)} |"
        )
    return "\n".join(rows) + "\n"


COLUMNS = ("method", "dataset", "arch", "seed", "corrupt", "parameters", "parameters_trained", "snapshots", "epochs",
           "test_accuracy_last", "test_accuracy_best", "best_epoch", "train_accuracy_last")


def comma_separated(runs):
    """The runs as CSV, a line each: COLUMNS, the shares that the basis explains, seconds by stage, the command."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    stages = list(runs[0]["seconds"])
    writer.writerow([*COLUMNS, "label", "explained_variance", *(f"seconds_{stage}" for stage in stages), "command"])
    for run in runs:
        explained = (run["explained_variance"] or {}).get("total")
        writer.writerow([*(run[key] for key in COLUMNS), label(run), explained,
                         *(run["seconds"][stage] for stage in stages), run["command"]])
    return text.getvalue()


# --------------------------------------------------------------------------------------------------------- figures


def panels(columns, title):
    """A figure of README's width with `columns` axes side by side."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(9, 3.6), layout="constrained")
    fig.suptitle(title, fontsize=10)
    axes = fig.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.grid(alpha=0.3)
    return fig, axes


def colours(runs):
    """label -> colour: a method's own for the first of its labels, others for the rest."""
    chosen, others = {}, list(OTHERS)
    for run in runs:
        if label(run) not in chosen:
            own = STYLES[run["method"]][1]
            chosen[label(run)] = others.pop(0) if own in chosen.values() and others else own
    return chosen


def accuracy(runs, title):
    """Test accuracy against epoch and against seconds, a line per run, a colour per method."""
    from matplotlib.ticker import MaxNLocator

    fig, (by_epoch, by_time) = panels(2, title)
    colour, shown = colours(runs), set()
    for run in runs:
        log = run["log"]
        values = [line["test_accuracy"] for line in log]
        elapsed = [run["seconds"]["basis"] + sum(line["seconds"] for line in log[: i + 1]) for i in range(len(log))]
        text = f"{label(run)} ({run['parameters_trained']:,} parameters)"
        style = {"color": colour[label(run)], "label": None if text in shown else text, "marker": ".", "markersize": 4,
                 "linewidth": 1}  # another seed of a run that the legend has needs no entry
        shown.add(text)
        by_epoch.plot([line["epoch"] for line in log], values, **style)
        by_time.plot(elapsed, values, **style)
    by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_epoch.set(xlabel="epoch", ylabel="test accuracy (%)")
    by_time.set(xlabel="seconds of training, basis included")
    by_epoch.legend(frameon=False, loc="lower right", fontsize=8)
    return fig


def variance(runs, title):
    """Explained variance per component and in sum, one line per basis; None without a subspace."""
    runs = [run for run in runs if run["explained_variance"]]
    if not runs:
        return None
    fig, (each, total) = panels(2, title)
    shown = set()
    for run in sorted(runs, key=lambda run: -run["n_components"]):  # of one window the largest basis holds the others
        text = f"{run['args']['basis']}, {run['snapshots']} snapshots" if "basis" in run["args"] else "pca"
        if (text, run["seed"], run["corrupt"]) in shown:
            continue
        shares = run["explained_variance"]["per_component"]
        numbers = range(1, len(shares) + 1)
        style = {"marker": ".", "label": None if text in {other for other, *_ in shown} else text,
                 "color": OTHERS[len({other for other, *_ in shown} - {text}) % len(OTHERS)]}
        shown.add((text, run["seed"], run["corrupt"]))
        each.semilogy(numbers, [100 * share for share in shares], **style)
        total.plot(numbers, [100 * sum(shares[:i]) for i in numbers], **style)
    each.set(xlabel="component", ylabel="variance explained (%)")
    total.set(xlabel="components", ylabel="variance explained by all (%)")
    each.legend(frameon=False, fontsize=8)
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
    for i, c in enumerate(sorted({run["corrupt"] for run in subspace})):
        for method, line in (("psgd", "-"), ("pbfgs", "--")):
            these = [run for run in subspace if run["method"] == method and run["corrupt"] == c]
            if these:
                against(ax, these, "n_components", "test_accuracy_last", linestyle=line, color=OTHERS[i % len(OTHERS)],
                        label=f"{STYLES[method][0]}, {100 * c:g}% label noise")
        sgd = [run["test_accuracy_last"] for run in runs if label(run) == "SGD" and run["corrupt"] == c]
        if sgd:
            ax.axhline(statistics.fmean(sgd), linestyle=":", color=OTHERS[i % len(OTHERS)], label="SGD, all parameters")
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
    ax.legend(frameon=False, fontsize=8)
    return fig


def trials(runs, title):
    """Trials per step of P-BFGS and how many searches take their first trial, against epoch."""
    runs = [run for run in runs if run["method"] == "pbfgs" and run["log"]]
    if not runs:
        return None
    fig, (count, first) = panels(2, title)
    for run in runs:
        epochs = [line["epoch"] for line in run["log"]]
        style = {"color": STYLES["pbfgs"][1], "marker": ".", "linewidth": 1}
        count.plot(epochs, [line["trials_per_step"] for line in run["log"]], **style)
        first.plot(epochs, [line["first_trial_accepted"] for line in run["log"]], **style)
    count.set(xlabel="epoch", ylabel="trials per step")
    first.set(xlabel="epoch", ylabel="first trial accepted (% of steps)")
    return fig


FIGURES = (accuracy, variance, dimensions, noise, trials)


def draw(runs, directory):
    """Write the figures that the runs have data for; returns their paths."""
    paths, title = [], "; ".join(sorted({f"{run['dataset']}, {run['arch']}" for run in runs}))
    for figure in FIGURES:
        fig = figure(runs, title)
        if fig is not None:
            image = io.BytesIO()
            fig.savefig(image, dpi=150, format="png", metadata={"Software": None})  # the same bytes every time
            paths.append(write_atomically(directory / f"{figure.__name__}.png", image.getbuffer()))
    return paths


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
        for path in draw(runs, Path(args.figures)):
            print(f"figure: {path}")


if __name__ == "__main__":
    utils.run_script(parse_args, main)
