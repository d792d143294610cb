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
import re
import statistics
import textwrap
from itertools import chain, compress, zip_longest
from pathlib import Path

import packages  # noqa: F401 - first: it says what is missing

import plots
import utils
from dldr import distributed
from dldr.errors import UserError
from dldr.files import load_json, write_atomically

METHODS = {"sgd": "SGD", "psgd": "P-SGD", "pbfgs": "P-BFGS"}
BASES = {"pca": "principal directions", "spherical": "principal directions, snapshots divided by their norms",
         "random": "random directions", "snapshots": "span of snapshots"}
TARGETS = Path(__file__).parent / "results" / "targets.json"
BEFORE = {"basis": "pca", "start": "first"}  # what P-SGD and P-BFGS did before they had these flags


def parse_args(argv=None):
    parser = utils.Parser(__doc__)
    parser.add_argument("directories", nargs="+", metavar="DIR", help="run directories, searched with all below them")
    for flag, metavar, text in (("--table", "FILE", "also write the table to this file, as Markdown"),
                                ("--csv", "FILE", "write one line per run, every number unrounded"),
                                ("--figures", "DIR", "draw the figures into this directory")):
        parser.add_argument(flag, type=utils.folder, metavar=metavar, help=text)
    parser.add_argument("--format", choices=("png", "svg"), default="png", help="of the figures")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------- runs


def files(directories, name):
    """(stage, path) of the stages' files of this name below the directories."""
    found = utils.files_below(directories)
    return [(stage, path) for stage in METHODS for path in found if path.name == f"{stage}_{name}"]


def find_runs(directories):
    """Summaries below the directories, each once, in the order of the table; with "log", and what `sampling` adds."""
    runs = {}  # by content: a copy is no second run
    for stage, path in files(directories, "summary.json"):
        try:
            summary = json.loads(path.read_text())
            log = [json.loads(line) for line in path.with_name(f"{stage}_log.jsonl").read_text().splitlines()]
            names = {key: plots.short(summary[key]) for key in ("dataset", "arch")}
            if stage != "sgd":
                summary["args"] = {**BEFORE, **summary["args"]}
            if summary.get("sampling"):
                summary["sampling"] = {**utils.NOT_RECORDED, **summary["sampling"]}
            if log and log[-1]["epoch"] != summary["epochs"]:
                raise ValueError(f"the log ends at epoch {log[-1]['epoch']}, the run at {summary['epochs']}")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} and its {stage}_log.jsonl cannot be read: {error}") from error
        runs.setdefault(json.dumps(summary, sort_keys=True), {**summary, **names, "directory": path.parent, "log": log})
    if not runs:
        raise UserError(f"no *_summary.json below {' '.join(directories)}; a finished run writes one")
    return sorted(({**run, **sampling(run, runs.values())} for run in runs.values()), key=order)


def sampling(run, runs):
    """How a run's subspace was sampled: "window", the first and last epoch of SGD in it (None for SGD and if unknown),
    and "sampling_seconds" of SGD's training up to there (0 for SGD, None if not exactly one of `runs` can be it)."""
    if run["method"] == "sgd":
        return {"window": None, "sampling_seconds": 0.0}
    facts = run.get("sampling") or {}
    args = filled(run["args"])
    same = {"randomseed", "corrupt", "smalldatasets"} - {*args.get("allow_mismatch", ())}  # which older facts lack
    same = {**{key: args[key] for key in same}, **facts}
    found = [sgd for sgd in runs if sgd["method"] == "sgd"
             and all(sgd[key] == run[key] for key in ("dataset", "arch", "parameters"))
             and all(filled(sgd["args"]).get(key, value) == value for key, value in same.items())
             and (sgd["args"]["save_dir"] == run["args"]["save_dir"] or sgd["directory"] == run["directory"])]
    args, log = (found[0]["args"], found[0]["log"]) if len(found) == 1 else (facts, [])
    epochs = [i / (args.get("samples_per_epoch") or 1) for i in utils.window_indices(run["args"])]
    end = math.ceil(epochs[-1])
    seconds = [line["seconds"] for line in log if line["epoch"] <= end]
    known = 0 < len(seconds) == end
    return {"window": (epochs[0], epochs[-1]) if known or facts else None,
            "sampling_seconds": sum(seconds) if known else None}


def filled(args):
    """`args` with the share of the training set as a number: all is 1."""
    return {**args, "smalldatasets": args.get("smalldatasets") or 1.0}


def order(run):
    """Data set, network and part of the data, label noise, method, k, window, seed: each ascending as a number."""
    args = run["args"]
    return (run["dataset"], run["arch"], args.get("smalldatasets") or 1, run["corrupt"],
            list(plots.COLOURS).index(method(run)), args.get("basis", "pca"), run["n_components"] or 0,
            args.get("params_end", 0), args.get("params_step", 1), args.get("samples_per_epoch") or 1, run["seed"])


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


# --------------------------------------------------------------------------------------------------- groups and names


def method(run):
    """SGD, Adam, P-BFGS or P-SGD."""
    return "Adam" if run["args"].get("optimizer") == "adam" else METHODS[run["method"]]


def label(run):
    """The method, and in brackets pretrained weights, another basis than the principal directions, another start."""
    args = run["args"]
    basis, start = args.get("basis", "pca"), args.get("start", "first")
    extra = (["pretrained"] * bool(args.get("pretrained")) + [plots.short(basis)] * (basis != "pca")
             + [f"from the {start}"] * (start != "first"))
    name = "P+-BFGS" if args.get("alpha") else method(run)
    return name + (f" ({', '.join(extra)})" if extra else "")


def snapshots(run):
    """The window of a subspace run, in words; "" for SGD."""
    if run["method"] == "sgd":
        return ""
    used = utils.window_indices(run["args"])
    return f"snapshots {used[0]} to {used[-1]}" + (f" in steps of {used.step}" if used.step > 1 else "")


def grouped(runs, key):
    """{key(run): list of runs}, in the order of the first of each."""
    groups = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def by_figure(runs, noise=True):
    """(end of file names, runs) of each data set, network and, with `noise`, label noise; a name tells what varies."""
    groups = grouped(runs, lambda run: (run["dataset"], run["arch"], f"noise{100 * run['corrupt']:g}" if noise else ""))
    varies = [len(set(column)) > 1 for column in zip(*groups, strict=True)]
    for names, group in groups.items():
        yield re.sub(r"\W+", "-", "".join(f"_{name}" for name in compress(names, varies))), group


def setting(run, x=None):
    """{what: text} of all that makes a run another experiment: not the seed, nor argument `x`, which an axis tells."""
    args, k = run["args"], run["n_components"]  # where the flag is a share of the variance, k differs by seed
    ignored = {"randomseed", "save_dir", "n_components", "smalldatasets", x, *utils.changeable_flags()}
    processes = run["hardware"].get("processes") or 1  # each normalises its own part of a mini-batch
    return {"k": f"k = {k}" if k and x != "n_components" else "", "snapshots": snapshots(run),
            "images": f"{100 * (args.get('smalldatasets') or 1):g}% of the images",
            "processes": f"{processes} processes" if processes > 1 else "",
            **{key: f"{key} {args[key]}".replace("_", " ") for key in sorted(args) if key not in ignored},
            "epochs": f"epochs {run['epochs']}",
            **{f"sampling {key}": f"sampled with {key} {value}".replace("_", " ")
               for key, value in (run.get("sampling") or {}).items() if key in utils.SAMPLING}}


def named(runs, x=None):
    """`plots.Line`s of the runs that differ in their seed only, or in the argument `x` too; no two of one name."""
    def experiment(run):
        data = {**run.get("data", {}), "labels": None}  # noisy ones differ by seed
        return json.dumps([run["method"], setting(run, x), data, run.get("sampling")], sort_keys=True)

    groups = list(grouped(runs, experiment).values())
    names = distinct([label(group[0]) for group in groups], [setting(group[0], x) for group in groups])
    return [plots.Line(name, method(group[0]), group) for name, group in zip(names, groups, strict=True)]


def distinct(names, settings):
    """The names, each with what tells it from others: of its setting k, snapshots and images where any two settings
    differ in these, anything else where names are the same so far; and where nothing differs, a number."""
    for key in dict.fromkeys(chain(*settings)):
        texts = [own.get(key, "") for own in settings]
        pairs = list(zip(names, texts, strict=True))
        if key in ("k", "snapshots", "images"):
            told = names if len({*texts} - {""}) > 1 else []
        else:
            of_each_text = [name for name, _ in set(pairs)]
            told = [name for name in names if of_each_text.count(name) > 1]
        names = [f"{name}, {text}" if text and name in told else name for name, text in pairs]
    return [f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


# -------------------------------------------------------------------------------------------------------------- tables


def mean(runs, key):
    """Mean ± standard deviation of summary[key] over the runs; a dash for no epochs."""
    values = [run[key] for run in runs]
    return "-" if None in values else plots.plus_minus(values)


def on_record(run):
    """The reference result (results/targets.json) of the run's setting; None unless all that matters agrees."""
    record, sampled = load_json(TARGETS), run.get("sampling") or {}  # of runs before there was one it is not known
    values = {**record["common"], **run["hardware"], **run["args"], **run, "label": label(run),
              "training": run.get("data", {}).get("training")}
    if (any(record["sampling"].get(key, value) != value for key, value in sampled.items())
            or min(sampled.get("milestones") or [math.inf]) < run["args"].get("params_end", 0) - 1):
        return None
    for target in record["targets"]:
        if all(values.get(key) == value for key, value in {**record["common"], **target["setting"]}.items()):
            return target
    return None


def compared(group):
    """Target and difference of a row: of the last epoch, flagged if larger than one standard deviation."""
    target, values = on_record(group[0]), [run["test_accuracy_last"] for run in group]
    if target is None or None in values:
        return "-", "-"
    average, deviation = plots.spread(values)
    difference = round(average - target["last"], 2)
    remark = " (beyond the spread)" if len(values) > 1 and abs(difference) > deviation else ""
    return f"{target['last']:.2f} [{target['source']}]", f"{difference:+.2f}{remark}"


def untimed(runs):
    """Why the seconds of these runs are no measure, or ""."""
    if None in [run["sampling_seconds"] for run in runs]:
        return "the SGD run that sampled is not, or not alone, among these"
    if len({tuple(run["hardware"].get(key) for key in ("device", "gpu", "cpu", "threads")) for run in runs}) > 1:
        return "the runs were made on different hardware"
    epochs = {name: [line["seconds"] for run in group for line in run["log"][1:]]  # a first one may be a warm-up
              for name, group in grouped(runs, method).items()}
    texts = [f"epochs of {name} took {min(s):,.0f} to {max(s):,.0f} s" for name, s in epochs.items()
             if s and max(s) > 3 * min(s)]  # other work ran beside them
    return ", ".join(texts)


def seconds(group):
    """Mean seconds of sampling, basis and training, and in brackets those of sampling."""
    own = statistics.fmean(run["seconds"]["basis"] + run["seconds"]["train"] for run in group)
    sampled = [run["sampling_seconds"] for run in group]
    if None in sampled:
        return f"{own:,.0f} + ?"
    return f"{own + statistics.fmean(sampled):,.0f}" + (f" ({statistics.fmean(sampled):,.0f})" if any(sampled) else "")


def rows(runs):
    """Rows of the table, {column: cell}, without columns of dashes only; and its footnotes."""
    found, notes = [], ["Seconds: of training and the basis, without evaluation. They include those of sampling, in "
                        "brackets: SGD's up to the last snapshot of the window."]
    for _, those in by_figure(runs):
        reason = untimed(those)
        for name, _, group in named(those):
            run, seeds = group[0], sorted(run["seed"] for run in group)
            if len(set(seeds)) < len(seeds):
                distributed.note(f"a seed twice in one row: {', '.join(str(run['directory']) for run in group)}")
            sampled = f" (+ {math.ceil(run['window'][1])})" if run["window"] else " (+ ?)" * (run["method"] != "sgd")
            reference, difference = compared(group)
            found.append({
                "run": plots.in_words(run["args"], run.get("data")),
                "method": name,
                "seeds": ", ".join(map(str, seeds)),
                "parameters trained": f"{run['parameters_trained']:,}",
                "epochs (+ sampling)": f"{run['epochs']}{sampled}",
                "test accuracy, last (%)": mean(group, "test_accuracy_last"),
                "best (%)": mean(group, "test_accuracy_best"),
                "best epoch": ", ".join(str(run["best_epoch"] or "-") for run in group),
                "reference, last (%)": reference,
                "difference": difference,
                "training accuracy, last (%)": mean(group, "train_accuracy_last"),
                "seconds (sampling)": seconds(group) + "*" * bool(reason)})
        if reason:
            notes.append(f"*: no measure of speed ({found[-1]['run']}): {reason}.")
    kept = [name for name in found[0] if {row[name] for row in found} != {"-"}]
    return [{name: row[name] for name in kept} for row in found], notes


def table(runs):
    """The table as Markdown."""
    body, notes = rows(runs)
    rule = ["---" if name in ("run", "method", "seeds") else "--:" for name in body[0]]
    lines = [f"| {' | '.join(cells)} |" for cells in (body[0], rule, *(row.values() for row in body))]
    return "\n".join([*lines, "", *notes]).replace("*", "\\*") + "\n"


def console(runs, width=100):
    """The table for a terminal of `width` columns: without the least telling, data set and network above their rows."""
    body, notes = rows(runs)
    shown = [name for name in body[0] if name not in ("run", "best epoch", "training accuracy, last (%)")]
    widths = [max(map(len, [*name.split(), *(row[name] for row in body)])) for name in shown]
    while sum(widths) + 2 * len(widths) - 2 > width:
        widths[widths.index(max(widths))] -= 1
    lines, above = [], "run"
    for row in [{name: name for name in body[0]}, *body]:
        lines += [] if row["run"] == above else ["", *textwrap.wrap(row["run"], width)]
        above = row["run"]
        wrapped = [textwrap.wrap(row[name], w) for name, w in zip(shown, widths, strict=True)]
        for parts in zip_longest(*wrapped, fillvalue=""):
            lines.append("  ".join([parts[0].ljust(widths[0]), *map(str.rjust, parts[1:], widths[1:])]).rstrip())
    return "\n".join([*lines, "", *(textwrap.fill(note, width) for note in notes)]) + "\n"


COLUMNS = ("method", "dataset", "arch", "seed", "corrupt", "parameters", "parameters_trained", "snapshots", "epochs",
           "test_accuracy_last", "test_accuracy_best", "best_epoch", "train_accuracy_last")


def comma_separated(runs):
    """The runs as CSV, a line each: COLUMNS, the shares that the basis explains, seconds by stage, the command."""
    lines = [{**{key: run[key] for key in COLUMNS}, "label": label(run),
              "target_last": (on_record(run) or {}).get("last"),
              "explained_variance": (run["explained_variance"] or {}).get("total"),
              **{f"seconds_{stage}": value for stage, value in run["seconds"].items()}, "command": run["command"]}
             for run in runs]
    text = io.StringIO()
    writer = csv.DictWriter(text, lines[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


# ------------------------------------------------------------------------------------------------------------- figures


def bases(lines):
    """Of the lines of each basis and window the one of the largest k, which has all directions; named by basis."""
    def kind(line):
        run = line.runs[0]
        basis = run["args"].get("basis", "pca")
        return BASES.get(basis, plots.short(basis)), snapshots(run), json.dumps(run.get("sampling"), sort_keys=True)

    shown = [line for line in lines if (line.runs[0]["explained_variance"] or {}).get("total")]  # not of one snapshot
    groups = grouped(shown, kind)
    names = distinct([basis for basis, _, _ in groups], [{"snapshots": used} for _, used, _ in groups])
    return [max(group, key=lambda line: line.runs[0]["n_components"])._replace(name=name)
            for name, group in zip(names, groups.values(), strict=True)]


def title(message, lines):
    """Message; setting, but for what lines or axes tell; k and window if all subspaces share them; what a band is."""
    runs = [run for line in lines for run in line.runs]
    told = {key: None for key in ("smalldatasets", "corrupt") if len({run["args"].get(key) for run in runs}) > 1}
    where = sorted({plots.in_words({**run["args"], **told}, run.get("data")) for run in runs})
    spaces = {f"subspace of {k} dimensions, {snapshots(run)}; " for run in runs if (k := run["n_components"])}
    seeds = sorted({len({run["seed"] for run in line.runs}) for line in named(runs)})
    several = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else seeds[0]
    spread = f"mean ± one standard deviation of {several} seeds" if seeds[-1] > 1 else "one seed"
    return f"{message}: {' and '.join(where)}\n{spaces.pop() if len(spaces) == 1 else ''}{spread}"


def draw(runs, directory, kind, trajectories=()):
    """Write the figures that the runs have data for; returns their paths."""
    made, runs = {}, [run for run in runs if run["log"]]
    for suffix, those in by_figure(runs):
        lines, by_k = named(those), named(those, "n_components")
        made["accuracy" + suffix] = plots.accuracy(lines, title("Test accuracy", lines), untimed(those))
        if spaces := bases(lines):
            made["variance" + suffix] = plots.variance(spaces, title("Variance of the snapshots", spaces))
        if any(len({run["n_components"] for run in line.runs}) > 2 for line in by_k):
            made["dimensions" + suffix] = plots.dimensions(by_k, title("Test accuracy by dimension", by_k))
        if searches := [line for line in lines if line.method == "P-BFGS"]:
            made["trials" + suffix] = plots.trials(searches, title("Line search of P-BFGS", searches))
    for suffix, those in by_figure(runs, noise=False):
        if len({run["corrupt"] for run in those}) > 1:
            lines = named(those, "corrupt")
            made["noise" + suffix] = plots.noise(lines, title("Label noise", lines))
    for path in trajectories:
        name = f"trajectory_{path.parent.name}"
        made[f"{name}_{len(made)}" if name in made else name] = plots.plane(load_json(path))
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
        found = [path for path in utils.files_below(args.directories) if path.name == "trajectory.json"]
        trajectories = [*{path.read_text(): path for path in reversed(found)}.values()][::-1]  # a copy is no second one
        for path in [path for path in trajectories if "losses" not in load_json(path)]:
            distributed.note(f"{path} is not drawn: it holds no losses; make it again with trajectory.py")
            trajectories.remove(path)
        for path in draw(runs, Path(args.figures), args.format, trajectories):
            print(f"figure: {path}")


if __name__ == "__main__":
    utils.run_script(parse_args, main)
