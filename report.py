"""Table and figure of finished runs: reads the *_summary.json and *_log.jsonl below the given directories.

Prints a Markdown table with one row per setting: parameters trained, epochs, last and best test accuracy, seconds; runs
that differ in their seed only share a row, as mean ± standard deviation. With --figure it draws test accuracy against
epoch and against training time.

Example:
  python report.py runs/quick --table runs/quick/table.md --figure runs/quick/figure.png
"""
import argparse
import io
import json
import statistics
from pathlib import Path

import utils
from runs import HARMLESS, write_atomically

# method -> label and colour (Okabe and Ito's palette, safe for colour-blind readers)
STYLES = {"sgd": ("SGD", "#000000"), "pbfgs": ("P-BFGS", "#0072B2"), "psgd": ("P-SGD", "#D55E00")}


def parse_args(argv=None):
    description, example = __doc__.strip().split("\n\nExample", 1)
    parser = utils.Parser(
        description=description, epilog="example" + example, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directories", nargs="+", metavar="DIR", help="run directories, searched with all below them")
    parser.add_argument("--table", metavar="FILE", help="also write the Markdown table to this file")
    parser.add_argument("--figure", metavar="FILE", help="draw the figure to this file (.png, .svg or .pdf)")
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


def label(run):
    """SGD, Adam, P-BFGS or P-SGD."""
    return "Adam" if run["args"].get("optimizer") == "adam" else STYLES[run["method"]][0]


def setting(run):
    """What a row is: everything that was chosen, but for the seed."""
    args = {key: value for key, value in run["args"].items() if key not in {"randomseed", *HARMLESS}}
    return json.dumps([run["method"], run["epochs"], args], sort_keys=True)


def mean(runs, key, digits=2):
    """Mean of summary[key] over the runs, ± the standard deviation where there are several; a dash for no epochs."""
    values = [run[key] for run in runs]
    if None in values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def table(runs):
    """A Markdown table, one row per setting; the first column names data set, network, label noise and seeds."""
    groups = {}
    for run in runs:
        groups.setdefault(setting(run), []).append(run)
    rows = [
        "| run | method | parameters trained | epochs | test accuracy, last (%) | best (%) | at epoch "
        "| training accuracy, last (%) | seconds: train + eval + basis |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for group in groups.values():
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


def figure(runs, path):
    """Test accuracy against epoch and against seconds of training, one line per run, one colour per method."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    fig = Figure(figsize=(9, 3.6), layout="constrained")
    by_epoch, by_time = fig.subplots(1, 2, sharey=True)
    for run in runs:
        log, (_, colour) = run["log"], STYLES[run["method"]]
        accuracy = [line["test_accuracy"] for line in log]
        elapsed = [run["seconds"]["basis"] + sum(line["seconds"] for line in log[: i + 1]) for i in range(len(log))]
        text = f"{label(run)} ({run['parameters_trained']:,} parameters)"
        if text in by_epoch.get_legend_handles_labels()[1]:
            text = None  # another seed of a run that the legend has already
        by_epoch.plot([line["epoch"] for line in log], accuracy, color=colour, label=text, marker=".", markersize=4)
        by_time.plot(elapsed, accuracy, color=colour, label=text, marker=".", markersize=4)
    by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_epoch.set(xlabel="epoch", ylabel="test accuracy (%)")
    by_time.set(xlabel="seconds of training, basis included")
    titles = {f"{run['dataset']}, {run['arch']}" for run in runs}
    fig.suptitle("; ".join(sorted(titles)), fontsize=10)
    for axes in (by_epoch, by_time):
        axes.grid(alpha=0.3)
    by_epoch.legend(frameon=False, loc="lower right", fontsize=8)
    image = io.BytesIO()
    fig.savefig(image, dpi=150, format=Path(path).suffix[1:] or None)
    write_atomically(Path(path), image.getbuffer())


def main(args):
    runs = find_runs(args.directories)
    text = table(runs)
    print(text, end="")
    try:
        if args.table:
            write_atomically(Path(args.table), text.encode())
        if args.figure:
            figure(runs, args.figure)
            print(f"figure: {args.figure}")
    except (OSError, ValueError) as error:
        raise utils.InputError(f"--table, --figure: {error}") from error


if __name__ == "__main__":
    utils.run_script(parse_args, main)
