"""Every figure of report.py and trajectory.py. A method has one colour in all of them, a band or bar is the mean ± one
standard deviation over seeds, and the width is a README's.
"""
import io
import re
import statistics
from collections import namedtuple
from pathlib import Path

import numpy as np

COLOURS = {"SGD": "#000000", "Adam": "#CC79A7", "P-SGD": "#D55E00", "P-BFGS": "#0072B2"}  # Okabe and Ito's palette
OTHERS = ("#009E73", "#E69F00", "#56B4E9", "#999999")  # for what is no method
DASHES, MARKERS = ("-", "--", ":", "-."), "os^Dv"
BAND = {"alpha": 0.15, "linewidth": 0}
SHADE = {"color": "0.5", **BAND}  # the sampled window
BEST = {"markersize": 9, "markerfacecolor": "none"}  # a best epoch is hollow
CLOSE = 15  # percentage points below the best: what a close view shows

# what a figure draws as one: summaries (with "log") that differ in their seed, or in what is on the x axis; the method
# gives the colour
Line = namedtuple("Line", "name method runs")


def short(name):
    """A data set, network or basis as tables name it: of a file its name only."""
    return Path(name.removeprefix("folder:").removeprefix("npz:")).name


def in_words(args, data=None):
    """Data set, share of it, network and label noise of a run, as a person names them."""
    names = {"CIFAR10": "CIFAR-10", "CIFAR100": "CIFAR-100", "digits": "handwritten digits"}
    if args["datasets"] == "ImageNet" and data and data["classes"] != 1000:
        names["ImageNet"] = f"a folder of {data['classes']} classes, {data['training']:,} images"
    share = f" ({100 * args['smalldatasets']:g}% of the images)" if args.get("smalldatasets") else ""
    words = [names.get(args["datasets"], short(args["datasets"])) + share,
             re.sub("^resnet", "ResNet-", short(args["arch"]))]
    return ", ".join(words + ([f"{100 * args['corrupt']:g}% label noise"] if args.get("corrupt") else []))


def figure(title, height=3.8):
    from matplotlib.figure import Figure

    fig = Figure(figsize=(9, height), layout="constrained")
    fig.suptitle(title, fontsize=10)
    return fig


def panels(fig, columns):
    """Axes side by side, with whole numbers on x."""
    axes = fig.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.locator_params(axis="x", integer=True)
    return axes


def legend(ax):
    """The figure of `ax`, below it what the lines are where there are several; as many side by side as fit."""
    lines, names = ax.get_legend_handles_labels()
    if len(names) > 1:
        columns = max(1, min(len(names), 120 // (max(map(len, names)) + 8)))
        ax.figure.legend(lines, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    return ax.figure


def spread(values):
    """Mean and sample standard deviation, which is 0 of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def plus_minus(values):
    """Mean and, of several values, standard deviation as text."""
    mean, sd = spread(values)
    return f"{mean:.2f}" + (f" ± {sd:.2f}" if len(values) > 1 else "")


def styled(lines):
    """Each line with its style: the method's colour; lines of one method differ in tint, dashes and marker."""
    from matplotlib.colors import to_rgb

    for line in lines:
        same = sorted((other for other in lines if other.method == line.method),
                      key=lambda other: -max(run["n_components"] or 0 for run in other.runs))  # full colour: largest k
        i = same.index(line)
        yield line, {"color": tuple(1 - (1 - c) * (1 - 0.6 * i / len(same)) for c in to_rgb(COLOURS[line.method])),
                     "label": line.name, "linestyle": DASHES[i % len(DASHES)], "marker": MARKERS[i % len(MARKERS)]}


def logged(line, key):
    """Array (seeds, epochs)."""
    return np.array([[epoch[key] for epoch in run["log"]] for run in line.runs])


def elapsed(line):
    """Seconds at the end of each epoch: SGD's up to the end of the window, the basis', and the run's own training."""
    before = [[run["sampling_seconds"] + run["seconds"]["basis"]] for run in line.runs]
    return before + logged(line, "seconds").cumsum(axis=1)


def epochs(line):
    """Epochs of training after each of the run's own, SGD's up to the end of the window included where it is known."""
    return logged(line, "epoch") + [[run["window"][1] if run["window"] else 0] for run in line.runs]


def within(ax, low, high):
    """Show nothing of the y axis below `low` and above `high`, where a band of mean ± deviation may reach."""
    bottom, top = ax.get_ylim()
    ax.set_ylim(max(bottom, low), min(top, high))


def curve(ax, x, y, style):
    """Mean and standard deviation of y (seeds, points) against the mean of x."""
    x, mean = np.mean(x, axis=0), np.mean(y, axis=0)
    ax.plot(x, mean, markersize=3, linewidth=1.2, **style)
    if len(y) > 1:
        sd = np.std(y, axis=0, ddof=1)
        ax.fill_between(x, mean - sd, mean + sd, color=style["color"], **BAND)


def against(ax, line, x, key, style, scale=1, shift=0.0):
    """Mean and standard deviation of run[key] over seeds, against scale * run[x] + shift."""
    points = sorted({run[x] for run in line.runs})
    values = [spread([run[key] for run in line.runs if run[x] == point]) for point in points]
    ax.errorbar([scale * point + shift for point in points], *zip(*values, strict=True), capsize=3, **style)


def accuracy(lines, title, untimed=""):
    """Test accuracy against epoch; against seconds, unless `untimed` says why not; the last and the best epochs, whose
    panel is the legend too: the row of a line has its name and style."""
    rows = 0.9 + 0.2 * len(lines)
    fig = figure(title, 3.4 + rows)
    curves, points = fig.subfigures(2, 1, height_ratios=(3.4, rows))
    axes, windows = panels(curves, 1 if untimed else 2), {}
    for line, style in styled(lines):
        curve(axes[0], epochs(line), logged(line, "test_accuracy"), style)
        if not untimed:
            curve(axes[1], elapsed(line), logged(line, "test_accuracy"), style)
        for run in line.runs:
            windows.setdefault(run["window"], []).append(run["sampling_seconds"])
    for window in filter(None, windows):
        axes[0].axvspan(*window, **SHADE)
        if not untimed:
            axes[1].axvspan(0, statistics.fmean(windows[window]), **SHADE)
    for ax, text in zip(axes, ("epoch", "seconds of training"), strict=False):
        ax.set(ylabel="test accuracy (%)", xlabel=text)
        within(ax, -2, 102)
    if any(windows):
        curves.supxlabel("shaded: sampling by SGD, after which subspace methods start", fontsize=9, color="0.35")
    fig.supxlabel(f"no panel against seconds: {untimed}" if untimed else "", fontsize=9, color="0.35")
    last_points(*panels(points, 1), lines)
    return fig


def last_points(ax, lines):
    """A row for each line: its last epoch, filled, and its best, hollow; an arrow for a last far below others."""
    floor, names = max(run["test_accuracy_last"] for line in lines for run in line.runs) - CLOSE, []
    for y, (line, style) in enumerate(styled(lines)):
        last, best = ([run[f"test_accuracy_{which}"] for run in line.runs] for which in ("last", "best"))
        names.append(f"{line.name}: {plus_minus(last)}")
        ax.axhline(y, color=style["color"], linestyle=style["linestyle"], linewidth=1.2, alpha=0.5)
        look = {"color": style["color"], "marker": style["marker"], "capsize": 3, "markersize": 6}
        if statistics.fmean(last) < floor:
            ax.plot(0.01, y, color=style["color"], marker="<", markersize=9, transform=ax.get_yaxis_transform())
        for values, own in ((last, look), (best, {**look, **BEST})):
            mean, sd = spread(values)
            if mean >= floor:
                ax.errorbar(mean, y, xerr=sd or None, **own)
    ax.locator_params(axis="x", integer=False)
    ax.set_yticks(range(len(lines)), names, fontsize=9)
    arrows = "\narrow: a last epoch far below" * any(line.get_marker() == "<" for line in ax.get_lines())
    ax.set(ylim=(len(lines) - 0.5, -0.5),
           xlabel=f"test accuracy (%): last epoch (filled, number), best epoch (hollow){arrows}")


def variance(lines, title):
    """Share of the snapshots' variance that each direction explains, and the cumulative one; a line for each basis."""
    each, total = panels(figure(title), 2)
    for i, line in enumerate(lines):
        style = {"color": OTHERS[i % len(OTHERS)], "marker": MARKERS[i % len(MARKERS)], "label": line.name}
        shares = 100 * np.array([run["explained_variance"]["per_component"] for run in line.runs])
        numbers = [range(1, 1 + shares.shape[1])]
        curve(each, numbers, shares, style)
        curve(total, numbers, shares.cumsum(axis=1), style)
    least = min(share for line in each.get_lines() for share in line.get_ydata() if share > 0)
    each.set(xlabel="direction", ylabel="explained variance (%)", yscale="log", ylim=(least / 3, 150))
    total.set(xlabel="number of directions", ylabel="cumulative explained variance (%)")
    return legend(total)


def dimensions(lines, title):
    """Last test accuracy against k, of methods in all parameters as a band; and closer, if some is far below others."""
    last = [run["test_accuracy_last"] for line in lines for run in line.runs]
    far = min(last) < max(last) - CLOSE
    axes = panels(figure(title), 2 if far else 1)
    for ax in axes:
        for line, style in styled(lines):
            if line.runs[0]["n_components"]:
                against(ax, line, "n_components", "test_accuracy_last", style)
            else:
                mean, sd = spread([run["test_accuracy_last"] for run in line.runs])
                ax.axhline(mean, color=style["color"], linestyle=style["linestyle"], label=f"{line.name}, no subspace")
                ax.axhspan(mean - sd, mean + sd, color=style["color"], **BAND)
        ax.set_xticks(sorted({run["n_components"] for line in lines for run in line.runs} - {None}))
        ax.set(xlabel="components k", ylabel="test accuracy, last epoch (%)")
    if far:
        axes[1].set(ylim=(max(last) - CLOSE, max(last) + 1), ylabel="the same, close to the best (%)")
    return legend(axes[0])


def noise(lines, title):
    """Last test accuracy against label noise, and SGD's best."""
    (ax,), levels = panels(figure(title), 1), sorted({100 * run["corrupt"] for line in lines for run in line.runs})
    for i, (line, style) in enumerate(styled(lines)):
        shift = 0.008 * levels[-1] * (i - (len(lines) - 1) / 2)  # else the bars hide each other
        looks = {"last": {"markersize": 5}} | ({"best": {"linestyle": ":", **BEST}} if line.method == "SGD" else {})
        for which, look in looks.items():
            style |= {"label": f"{line.name}, {which} epoch", **look}
            against(ax, line, "corrupt", f"test_accuracy_{which}", style, scale=100, shift=shift)
    ax.set_xticks(levels)
    ax.set(xlabel="label noise (%); methods side by side at each level", ylabel="test accuracy (%)")
    return legend(ax)


def trials(lines, title):
    """Trials per step of P-BFGS and how many searches take their first trial, against epoch."""
    texts = {"trials_per_step": ("trials per step", 0, 40),
             "first_trial_accepted": ("first trial accepted (% of steps)", -2, 102)}
    for ax, (key, (text, *limits)) in zip(panels(figure(title), 2), texts.items(), strict=True):
        for line, style in styled(lines):
            curve(ax, logged(line, "epoch"), logged(line, key), style)
        ax.set(xlabel="epoch of P-BFGS", ylabel=text)
        within(ax, *limits)
    return legend(ax)


def plane(result):
    """What trajectory.py measured: distances against snapshot; the loss surface with the paths over it."""
    args, (first, last) = result["args"], result["snapshots"]
    fig = figure(f"SGD and the subspace of its snapshots: {in_words(args)}, seed {args['randomseed']}", height=4.2)
    distance, surface = panels(fig, 2)
    k = result.get("k", args["n_components"])
    for key, text, dashes in (("start", "from where it started", "-"),
                              ("subspace", f"from the {k}-dimensional subspace", "--")):
        distance.plot(range(first, last + 1), result[f"distance_from_{key}"], dashes, color=COLOURS["SGD"], label=text)
    distance.axvspan(args["params_start"], args["params_end"] - 1, **SHADE)
    distance.set(xlabel="snapshot of SGD (shaded: the window of the basis)", ylabel="Euclidean distance of SGD")
    distance.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1))
    losses = np.maximum(result["losses"], 1e-6)
    levels = np.geomspace(losses.min(), losses.max(), 12)
    shown = surface.contourf(*result["axes"], losses, levels, cmap="Greys", alpha=0.5)
    fig.colorbar(shown, ax=surface, label="training loss in the plane", format="%.2g")
    for method, key, marker in (("SGD", "sgd", "o"), ("P-SGD", "psgd", "s"), ("P-BFGS", "pbfgs", "^")):
        for i, path in enumerate(result["paths"][key]):
            style = {"color": COLOURS[method], "marker": marker}
            surface.plot(*zip(*path, strict=True), markersize=4, markerfacecolor="none", linewidth=1.2, **style,
                         label=None if i else method)
            surface.plot(*path[-1], markersize=7, markeredgecolor="white", zorder=3, **style)
    surface.plot(0, 0, "*", color="white", markeredgecolor="black", markersize=13)
    surface.locator_params(axis="x", integer=False)
    surface.set(xlabel="component 1", ylabel="component 2")
    surface.set_title("paths from the star to their filled ends, projected onto\n"
                      "the plane (hollow points): their own losses differ", fontsize=9)
    return legend(surface)


def image(fig, kind="png"):
    """The figure's file, the same bytes every time: without the date, and without the library's name."""
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "dldr"}):
        fig.savefig(file, dpi=100, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return file.getbuffer()
