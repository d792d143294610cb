"""Tables and figures of finished runs: reads the *_summary.json and *_log.jsonl below the given directories.

Prints a table with one row per setting: parameters trained, epochs, last and best test accuracy, the published accuracy
of the same setting (results/targets.json) and the difference from it, seconds with those of sampling; runs that differ
in their seed only share a row, as mean ± standard deviation. Runs that have begun and not ended are listed below it.
With --figures it draws what the runs have data for, a file for each data set, network and label noise:

accuracy     test accuracy against epoch and against seconds, sampling included; the last and the best epochs
variance     the share of the snapshots' variance that each direction explains, and the cumulative one
dimensions   test accuracy against the number of components
trials       trials per step of P-BFGS
noise        test accuracy against label noise
trajectory_* what trajectory.py measured in the directory of that name: distances, and paths over the loss surface

Example:
  python report.py runs/quick --table runs/quick/table.md --figures runs/quick
"""
import csv
import io
import json
import math
import os
import re
import statistics
import textwrap
from itertools import zip_longest
from pathlib import Path

import packages  # noqa: F401 - first: it says what is missing

import plots
import utils
from dldr.errors import UserError
from dldr.files import load_json, write_atomically

METHODS = {"sgd": "SGD", "psgd": "P-SGD", "pbfgs": "P-BFGS"}
BASES = {"pca": "principal directions", "spherical": "principal directions, snapshots divided by their norms",
         "random": "random directions", "snapshots": "span of snapshots"}
TARGETS = Path(__file__).parent / "results" / "targets.json"


def parse_args(argv=None):
    parser = utils.Parser(__doc__)
    parser.add_argument("directories", nargs="+", metavar="DIR", help="run directories, searched with all below them")
    parser.add_argument("--table", metavar="FILE", help="also write the table to this file, as Markdown")
    parser.add_argument("--csv", metavar="FILE", help="write one line per run, every number unrounded")
    parser.add_argument("--figures", metavar="DIR", help="draw the figures into this directory")
    parser.add_argument("--format", choices=("png", "svg"), default="png", help="of the figures")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------- runs


def files(directories, name):
    """(stage, path) of the stages' files of this name below the directories."""
    for directory in directories:
        for stage in METHODS:
            yield from ((stage, path) for path in sorted(Path(directory).rglob(f"{stage}_{name}")))


def find_runs(directories):
    """Summaries below the directories, each once, in the order of the table; with "log", and what `sampling` adds."""
    runs, seen = [], set()
    for stage, path in files(directories, "summary.json"):
        try:
            summary = json.loads(path.read_text())
            lines = path.with_name(f"{stage}_log.jsonl").read_text().splitlines()
            if (content := json.dumps(summary, sort_keys=True)) not in seen:  # else a copy of a run
                summary |= {key: plots.short(summary[key]) for key in ("dataset", "arch")}
                runs.append({**summary, "directory": path.parent, "log": [json.loads(line) for line in lines]})
            seen.add(content)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} and its {stage}_log.jsonl cannot be read: {error}") from error
    if not runs:
        raise UserError(f"no *_summary.json below {' '.join(directories)}; a finished run writes one")
    return sorted(({**run, **sampling(run, runs)} for run in runs), key=order)


def sampling(run, runs):
    """How a run's subspace was sampled: "window", the first and last epoch of SGD in it (None for SGD and if unknown),
    and "sampling_seconds" of SGD's training up to there (0 for SGD, None if the run that sampled is not in `runs`)."""
    if run["method"] == "sgd":
        return {"window": None, "sampling_seconds": 0.0}
    args, facts = run["args"], run.get("sampling") or {}
    found = {}  # SGD's runs by how many letters their path and this run's have in common: the nearest is meant
    for sgd in runs:
        if (sgd["method"] == "sgd" and all(sgd[key] == run[key] for key in ("dataset", "arch", "parameters"))
                and all(sgd["args"].get(key, value) == value for key, value in facts.items())
                and (sgd["args"]["save_dir"] == args["save_dir"] or sgd["directory"] == run["directory"])):
            paths = [sgd["directory"].absolute(), run["directory"].absolute()]
            found.setdefault(len(os.path.commonpath(paths)), []).append(sgd)
    source = found[max(found)] if found else []
    per_epoch = facts.get("samples_per_epoch") or (source[0]["args"].get("samples_per_epoch") if source else None) or 1
    epochs = [i / per_epoch for i in window(run)]
    seconds = [e["seconds"] for e in source[0]["log"] if e["epoch"] < epochs[-1] + 1] if len(source) == 1 else []
    known = bool(seconds) and len(seconds) == math.ceil(epochs[-1])
    return {"window": (epochs[0], epochs[-1]) if known or facts else None,
            "sampling_seconds": sum(seconds) if known else None}


def window(run):
    """Numbers of the snapshots that a subspace run used."""
    return range(run["args"]["params_start"], run["args"]["params_end"], run["args"].get("params_step", 1))


def order(run):
    """Data set, network and part of the data, label noise, method, k, window, seed: each ascending as a number."""
    args = run["args"]
    return (run["dataset"], run["arch"], args.get("smalldatasets") or 1, run["corrupt"],
            list(plots.COLOURS).index(method(run)), args.get("basis", "pca"), run["n_components"] or 0,
            args.get("params_end", 0), args.get("params_step", 1), args.get("samples_per_epoch") or 1, run["seed"],
            str(run["directory"]))


def unfinished(directories):
    """Lines of text on runs below the directories that have begun and have no summary."""
    lines = []
    for stage, path in files(directories, "args.json"):
        args, log = load_json(path)["args"], path.with_name(f"{stage}_log.jsonl")
        if not path.with_name(f"{stage}_summary.json").is_file():
            epochs = len(log.read_text().splitlines()) if log.is_file() else 0
            name = label({"method": stage, "args": args})
            lines.append(f"unfinished: {name} in {path.parent}, seed {args['randomseed']}, {epochs} of "
                         f"{args['epochs']} epochs")
    return lines


def method(run):
    """SGD, Adam, P-BFGS or P-SGD."""
    return "Adam" if run["args"].get("optimizer") == "adam" else METHODS[run["method"]]


def label(run):
    """The method, and in brackets another basis than the principal directions, another start than the first."""
    basis, start = run["args"].get("basis", "pca"), run["args"].get("start", "first")
    extra = [plots.short(basis)] * (basis != "pca") + [f"from the {start}"] * (start != "first")
    return method(run) + (f" ({', '.join(extra)})" if extra else "")


def snapshots(run):
    """The snapshots that a run sampled or used, in words."""
    if run["method"] == "sgd":
        return f"{run['args'].get('samples_per_epoch') or 1} snapshots an epoch"
    used = window(run)
    return f"snapshots {used[0]} to {used[-1]}" + (f" in steps of {used.step}" if used.step > 1 else "")


def settings(runs, *keys):
    """Lists of the runs of one data set, network and value of `keys`, each with what varies of these for file names."""
    found, keys = {}, ("dataset", "arch", *keys)
    for run in runs:
        found.setdefault(tuple(run[key] for key in keys), []).append(run)
    for values, group in found.items():
        texts = [f"_noise{100 * value:g}" if key == "corrupt" else f"_{value}" for key, value, column
                 in zip(keys, values, zip(*found, strict=True), strict=True) if len(set(column)) > 1]
        yield re.sub(r"\W+", "-", "".join(texts)), group


def unlike(without=()):
    """Names of the arguments in which runs of one group may differ: the seed, where they are, and `without`."""
    return {"randomseed", "save_dir", *utils.changeable_flags(), *without}


def grouped(runs, *without):
    """Lists of the runs that differ in their seed only, and in the arguments `without`."""
    groups = {}
    for run in runs:
        args = {"start": "first"} if run["method"] != "sgd" else {}  # what runs from before this flag mean
        args |= {key: value for key, value in run["args"].items() if key not in unlike(without)}
        data = {**run.get("data", {}), "labels": None}  # noisy ones differ by seed
        key = json.dumps([run["method"], run["epochs"], args, data, run.get("sampling")], sort_keys=True)
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def named(runs, *without):
    """The groups of `grouped` as `plots.Line`s, no two of one name: the method, and in what it differs from others."""
    groups = grouped(runs, *without)
    first = [group[0] for group in groups]
    labels = list(map(label, first))
    names = list(labels)

    def tell(alike, text):  # where it differs among those of the same entry in `alike`
        texts = list(map(text, first))
        for i, kind in enumerate(alike):
            if len({t for t, other in zip(texts, alike, strict=True) if other == kind}) > 1:
                names[i] += f", {texts[i]}" if texts[i] else ""

    if "n_components" not in without:
        tell(labels, lambda run: f"k = {run['n_components']}")
    tell(labels, snapshots)
    tell([None] * len(names), lambda run: f"{100 * (run['args'].get('smalldatasets') or 1):g}% of the images")
    tell(labels, lambda run: "pretrained" if run["args"].get("pretrained") else "")
    for key in ["epochs", *sorted(set().union(*(run["args"] for run in first)) - unlike(without) - {"output_dir"})]:
        tell(list(names), lambda run, key=key: f"{key} {run['args'].get(key)}".replace("_", " "))
    return [plots.Line(name, method(group[0]), group) for name, group in zip(numbered(names), groups, strict=True)]


def numbered(names):
    """The names, with a number behind those that are there more than once."""
    return [f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


# -------------------------------------------------------------------------------------------------------------- tables


def mean(runs, key):
    """Mean of summary[key] over the runs, ± the standard deviation where there are several; a dash for no epochs."""
    if None in [run[key] for run in runs]:
        return "-"
    average, deviation = plots.spread([run[key] for run in runs])
    return f"{average:.2f}" + (f" ± {deviation:.2f}" if len(runs) > 1 else "")


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


def uneven(runs):
    """{method: (least, most)} seconds of an epoch, for methods with epochs that took over twice the median.

    Something else ran beside them, or they ran on different machines. The first epoch of a run may be a warm-up.
    """
    epochs = {}
    for run in runs:
        epochs.setdefault(method(run), []).extend(line["seconds"] for line in run["log"][1:])
    return {name: (min(s), max(s)) for name, s in epochs.items() if s and max(s) > 2 * statistics.median(s)}


def seconds(group):
    """Mean seconds of sampling, basis and training, and in brackets those of sampling."""
    own = statistics.fmean(run["seconds"]["basis"] + run["seconds"]["train"] for run in group)
    sampled = [run["sampling_seconds"] for run in group]
    if None in sampled:
        return f"{own:,.0f} + ?"
    return f"{own + statistics.fmean(sampled):,.0f}" + (f" ({statistics.fmean(sampled):,.0f})" if any(sampled) else "")


HEADER = ("run", "method", "seeds", "parameters trained", "epochs (+ sampling)", "test accuracy, last (%)", "best (%)",
          "best epoch", "reference, last (%)", "difference", "training accuracy, last (%)", "seconds (sampling)")
NOTES = {"": "Seconds: of training and the basis, without evaluation. They include those of sampling, in brackets: "
             "SGD's up to the last snapshot of the window.",
         "?": "?: the run that sampled is not among these.",
         "*": "*: no measure of speed, since some epochs of this method took over twice as long as others."}


def rows(runs):
    """Cells of the table, its header first, without columns of dashes only; and its footnotes."""
    cells = [HEADER]
    for _, those in settings(runs, "corrupt"):
        marked = uneven(those).keys()
        for name, kind, group in named(those):
            run, seeds = group[0], sorted(run["seed"] for run in group)
            if len(set(seeds)) < len(seeds):
                utils.note(f"a seed twice in one row: {', '.join(str(run['directory']) for run in group)}")
            cells.append((
                plots.in_words(run["args"], run.get("data")), name, ", ".join(map(str, seeds)),
                f"{run['parameters_trained']:,}",
                f"{run['epochs']}" + (f" (+ {math.ceil(run['window'][1])})" if run["window"] else ""),
                mean(group, "test_accuracy_last"), mean(group, "test_accuracy_best"),
                ", ".join(str(run["best_epoch"] or "-") for run in group), *compared(group),
                mean(group, "train_accuracy_last"),
                seconds(group) + "*" * (kind in marked or bool(run["sampling_seconds"] and {"SGD", "Adam"} & marked))))
    kept = [i for i, column in enumerate(zip(*cells[1:], strict=True)) if set(column) != {"-"}]
    notes = [text for mark, text in NOTES.items() if any(mark in row[-1] for row in cells[1:])]
    return [[row[i] for i in kept] for row in cells], notes


def table(runs):
    """The table as Markdown."""
    (header, *body), notes = rows(runs)
    lines = [header, ["---" if name in HEADER[:3] else "--:" for name in header], *body]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *notes]).replace("*", "\\*") + "\n"


def console(runs, width=100):
    """The table for a terminal of `width` columns: without the least telling, data set and network above their rows."""
    cells, notes = rows(runs)
    shown = [i for i, name in enumerate(cells[0]) if name not in ("run", "best epoch", "training accuracy, last (%)")]
    widths = [max(map(len, [*cells[0][i].split(), *(row[i] for row in cells[1:])])) for i in shown]
    while sum(widths) + 2 * len(widths) - 2 > width:
        widths[widths.index(max(widths))] -= 1
    lines, above = [], cells[0][0]
    for row in cells:
        lines += [] if row[0] == above else ["", *textwrap.wrap(row[0], width)]
        above = row[0]
        for parts in zip_longest(*(textwrap.wrap(row[i], w) for i, w in zip(shown, widths, strict=True)), fillvalue=""):
            lines.append("  ".join([parts[0].ljust(widths[0]), *map(str.rjust, parts[1:], widths[1:])]).rstrip())
    return "\n".join([*lines, "", *(textwrap.fill(note, width) for note in notes)]) + "\n"


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


# ------------------------------------------------------------------------------------------------------------- figures


def bases(runs):
    """Lines of the runs of one basis and window, a run for each seed: the largest k, whose directions are all's."""
    found = {}
    for run in sorted((run for run in runs if run["explained_variance"]), key=lambda run: -run["n_components"]):
        basis = run["args"].get("basis", "pca")
        kind = BASES.get(basis, plots.short(basis)), snapshots(run), json.dumps(run.get("sampling"))
        seeds = found.setdefault(kind, {})
        if run["n_components"] == next(iter(seeds.values()), run)["n_components"]:
            seeds.setdefault(run["seed"], run)
    several = len({used for _, used, _ in found}) > 1
    names = numbered([f"{basis}, {used}" if several else basis for basis, used, _ in found])
    return [plots.Line(name, None, list(seeds.values())) for name, seeds in zip(names, found.values(), strict=True)]


def title(message, runs, but=""):
    """Message and setting, without argument `but`; k and window if all subspaces have the same; what a band is."""
    if len({run["args"].get("smalldatasets") for run in runs}) > 1:  # the names of the lines tell it
        runs = [{**run, "args": {**run["args"], "smalldatasets": None}} for run in runs]
    where = sorted({plots.in_words({**run["args"], but: None}, run.get("data")) for run in runs})
    spaces = {f"subspace of {k} dimensions, {snapshots(run)}; " for run in runs if (k := run["n_components"])}
    seeds = sorted({len({run["seed"] for run in group}) for group in grouped(runs)})
    spread = f"mean ± one standard deviation of {' to '.join(map(str, seeds))} seeds" if seeds[-1] > 1 else "one seed"
    return f"{message}: {' and '.join(where)}\n{spaces.pop() if len(spaces) == 1 else ''}{spread}"


def untimed(runs):
    """Why a figure has no panel of seconds, or ""."""
    if None in [run["sampling_seconds"] for run in runs]:
        return "not against seconds: the log of the SGD run that sampled is not among these runs"
    if len({tuple(run["hardware"].get(key) for key in ("device", "gpu", "cpu", "threads")) for run in runs}) > 1:
        return "not against seconds: the runs were made on different hardware"
    texts = [f"{least:,.0f} to {most:,.0f} s ({name})" for name, (least, most) in uneven(runs).items()]
    return f"not against seconds, which are no measure: epochs took {', '.join(texts)}" if texts else ""


def draw(runs, directory, kind, trajectories=()):
    """Write the figures that the runs have data for; returns their paths."""
    made, runs = {}, [run for run in runs if run["log"]]
    for suffix, those in settings(runs, "corrupt"):
        lines, by_k = named(those), named(those, "n_components")
        made["accuracy" + suffix] = plots.accuracy(lines, title("Test accuracy", those), untimed(those))
        if spaces := bases(those):
            made["variance" + suffix] = plots.variance(spaces, title("Variance of the snapshots", those))
        if any(len({run["n_components"] for run in line.runs}) > 2 for line in by_k):
            made["dimensions" + suffix] = plots.dimensions(by_k, title("Test accuracy by dimension", those))
        if searches := [line for line in lines if line.method == "P-BFGS"]:
            theirs = [run for line in searches for run in line.runs]
            made["trials" + suffix] = plots.trials(searches, title("Line search of P-BFGS", theirs))
    for suffix, those in settings(runs):
        if len({run["corrupt"] for run in those}) > 1:
            made["noise" + suffix] = plots.noise(named(those, "corrupt"), title("Label noise", those, "corrupt"))
    made |= {f"trajectory_{path.parent.name}": plots.plane(load_json(path)) for path in trajectories}
    return [write_atomically(directory / f"{name}.{kind}", plots.image(fig, kind)) for name, fig in made.items()]


def main(args):
    runs = find_runs(args.directories)
    print(console(runs), end="")
    for line in unfinished(args.directories):
        print(line)
    if args.table:
        write_atomically(Path(args.table), table(runs).encode())
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
