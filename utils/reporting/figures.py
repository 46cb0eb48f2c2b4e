"""The figures of a report, drawn by matplotlib without a display: scores by step, by class, confusion matrices, losses and λ."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator

from utils.reporting.runs import Group, Run, TaskRuns

# Names of runs and classes are plain text: a dollar sign in them must not begin a formula.
matplotlib.rcParams["text.parse_math"] = False

#: Colours of text and lines; `utils.reporting.page` replaces them where the reader prefers a dark page.
INK, GRID = "#1c2127", "#d3d8de"
#: Colours of curves, in an order that people with common forms of colour blindness can distinguish.
SERIES = ("#2166c2", "#d9660f", "#1a8a5f", "#b8409b", "#7a5cc9", "#8a6d00", "#c2323f", "#0e8aa3", "#5f6b77")
#: Line styles of the curves beyond the last colour.
STYLES = ("-", "--", ":", "-.")
#: Marks of points by the task that they belong to.
MARKS = ("o", "s", "D", "^", "v", "*")
#: Width of most figures in inches: on a phone they are shown at about their own size.
WIDTH = 4.8
#: Least height of a figure with names beside its curves, what of it lies above and below the axes, and a line of text, in inches.
HEIGHT, MARGINS, LINE = 3.4, 0.75, 0.145
#: Entries above which a heat map has no numbers in its cells.
MANY = 24


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that needs no display and no global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def style_of(index: int) -> dict[str, Any]:
    """Colour and line style of a curve by its number."""
    return {"color": SERIES[index % len(SERIES)], "linestyle": STYLES[index // len(SERIES) % len(STYLES)]}


def prepare(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.tick_params(colors=INK)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)


def draw_steps(task: TaskRuns) -> Figure:
    """mIoU over all classes by step, a curve a method: the mean over its seeds, the standard deviation shaded, the name at its end.

    Args:
        task: methods on one task.
    """
    figure = new_figure(WIDTH, HEIGHT)
    axes = figure.add_subplot()
    ends = []
    for index, group in enumerate(task.groups):
        values = {step: found for step in group.steps if (found := group.values("all", step))}
        steps, means = list(values), [statistics.fmean(v) for v in values.values()]
        style = style_of(index)
        axes.plot(steps, means, marker="o", markersize=4, label=group.label, **style)
        if len(group.runs) > 1:
            spreads = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values.values()]
            low, high = ([m + sign * s for m, s in zip(means, spreads)] for sign in (-1, 1))
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.18, linewidth=0)
        if steps:
            ends.append((steps[-1], means[-1], group.label, style["color"]))
    for index, group in enumerate(task.references, len(task.groups)):
        value = statistics.fmean(v for v in group.last_values("all") if v is not None)
        axes.axhline(value, color=style_of(index)["color"], linewidth=1, linestyle=(0, (4, 3)))
        ends.append((task.groups[0].steps[-1], value, group.label, style_of(index)["color"]))
    axes.set_title(task.title, color=INK, fontsize="medium")
    prepare(axes, "step", "mIoU of all classes so far (%)")
    axes.set_xticks(sorted({step for group in task.groups for step in group.steps}))
    axes.set_ylim(bottom=0)
    _label_ends(axes, ends)
    return figure


def draw_variants(tasks: Mapping[str, TaskRuns]) -> Figure:
    """mIoU over all classes after the last step by variant of a study, a curve a method, standard deviations as bars.

    Args:
        tasks: by the name of the variant, in the order of the abscissa.
    """
    figure = new_figure(WIDTH, HEIGHT)
    axes = figure.add_subplot()
    labels = dict.fromkeys(group.label for task in tasks.values() for group in (*task.groups, *task.references))
    ends = []
    for index, label in enumerate(labels):
        places, means, spreads = [], [], []
        for place, task in enumerate(tasks.values()):
            groups = [group for group in (*task.groups, *task.references) if group.label == label]
            if values := [v for group in groups for v in group.last_values("all") if v is not None]:
                places.append(place)
                means.append(statistics.fmean(values))
                spreads.append(statistics.stdev(values) if len(values) > 1 else 0.0)
        axes.errorbar(places, means, spreads, marker="o", markersize=4, capsize=3, **style_of(index))
        ends.append((places[-1], means[-1], label, style_of(index)["color"]))
    prepare(axes, "", "mIoU after the last step (%)")
    if len(tasks) < 5:  # names in lines of words, so that neighbours do not cover each other
        axes.set_xticks(range(len(tasks)), [textwrap.fill(name, 48 // len(tasks)) for name in tasks])
    else:
        axes.set_xticks(range(len(tasks)), list(tasks), rotation=30, ha="right", rotation_mode="anchor")
    axes.set_ylim(bottom=0)
    _label_ends(axes, ends)
    return figure


def draw_ripeness(tasks: Mapping[str, TaskRuns]) -> Figure:
    """mIoU of all classes after the last step over the mIoU of step 0, a curve a method: does it need a step 0 that is well trained?

    Variants of one task are joined by a line in the order of their step 0. Tasks of other classes cannot be compared, so each has a
    mark and a line style of its own.

    Args:
        tasks: by the name of the variant.
    """
    figure = new_figure(WIDTH, HEIGHT)
    axes = figure.add_subplot()
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for task in tasks.values():
        for group in task.groups:
            first, last = group.values("all", 0), [v for v in group.last_values("all") if v is not None]
            if first and last and group.steps[-1] > 0:
                points.setdefault((group.label, task.task), []).append(
                    (statistics.fmean(first), statistics.fmean(last))
                )
    labels, names = (list(dict.fromkeys(key[place] for key in points)) for place in (0, 1))
    marks: dict[str, dict[str, Any]] = {
        name: {"marker": MARKS[i % len(MARKS)], "linestyle": STYLES[i % len(STYLES)], "markersize": 4}
        for i, name in enumerate(names)
    }
    colours = {label: style_of(index)["color"] for index, label in enumerate(labels)}
    for (label, name), found in points.items():
        axes.plot(*zip(*sorted(found)), color=colours[label], **marks[name])
    prepare(axes, "mIoU of step 0 (%)", "mIoU of all classes after the last step (%)")
    axes.set_ylim(bottom=0)
    _label_ends(axes, [(*max(points[key]), key[0], colours[key[0]]) for key in points if key[1] == names[0]])
    if len(names) > 1:
        entries = [Line2D([], [], color=INK, **mark) for mark in marks.values()]
        axes.legend(entries, names, title="task", fontsize="small", title_fontsize="small", frameon=False)
    return figure


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write the names of curves beside their last points, moved apart where they would overlap; the figure grows with their number."""
    height = max(HEIGHT, MARGINS + LINE * (len(ends) + 1))
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_figheight(height)
    low, high = axes.get_ylim()
    spacing = LINE / (height - MARGINS) * (high - low)
    heights: list[float] = []
    for _, value, _, _ in sorted(ends, key=lambda end: end[1]):
        heights.append(max(value, heights[-1] + spacing if heights else value))
    excess = max(0.0, (heights[-1] if heights else low) - (high - spacing / 2))
    for (step, value, label, colour), height in zip(sorted(ends, key=lambda end: end[1]), heights):
        axes.annotate(
            _shortened(label),
            (step, value),
            xytext=(axes.get_xlim()[1], height - excess),
            textcoords="data",
            color=colour,
            fontsize="small",
            va="center",
            annotation_clip=False,
        )


def _shortened(label: str) -> str:
    """The end of a long label, such as the path of a file, which would leave no space for the drawing."""
    return label if len(label) <= 24 else "…" + label[-23:]


def draw_classes(group: Group, base_classes: int | None) -> Figure:
    """IoU by class and step, mean over the seeds; a line separates the classes of step 0 from the later ones.

    Args:
        group: one method.
        base_classes: classes of step 0; None draws no line.
    """
    names, by_step = group.class_iou()
    steps = list(by_step)
    values = np.array([[np.nan if v is None else v for v in by_step[step]] for step in steps], dtype=float).T
    figure = new_figure(max(2.6, min(WIDTH, 1.6 + 0.5 * len(steps))), 0.9 + 0.2 * len(names))
    axes = figure.add_subplot()
    heat(axes, values, 100.0, "{:.0f}" if len(steps) <= MANY else "")
    axes.set_xticks(np.arange(len(steps)) + 0.5, [str(step) for step in steps])
    axes.set_yticks(np.arange(len(names)) + 0.5, names, fontsize="small")
    axes.set_xlabel("after step", color=INK)
    axes.set_title(_shortened(group.label), color=INK, fontsize="medium")
    if base_classes is not None and base_classes < len(names):
        axes.axhline(base_classes, color=SERIES[1], linewidth=1.5)
    return figure


def heat(axes: Axes, values: np.ndarray, largest: float, shown: str) -> None:
    """Cells coloured from 0 to `largest`, the first row at the top, with their numbers if `shown` is a format."""
    cells = np.ma.masked_invalid(values)
    axes.pcolormesh(cells, vmin=0, vmax=largest, cmap="Blues", rasterized=values.size > 1000, edgecolors="none")
    axes.invert_yaxis()
    axes.tick_params(colors=INK, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if not shown:
        return
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            # The colours of the cells are the same on a dark page, and so are those of the numbers in them.
            colour = "#fefefe" if value > 0.55 * largest else "#101010"
            text = shown.format(value)
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize="x-small", color=colour)


def draw_confusion(group: Group, base_classes: int | None) -> Figure | None:
    """The confusion matrix after the last step, summed over seeds, rows normalised; lines separate old and new classes.

    Args:
        group: one method.
        base_classes: classes of step 0; None draws no line.

    Returns:
        None if the results hold no matrix.
    """
    found = [
        np.array(run.last["confusion_matrix"], dtype=float) for run in group.runs if "confusion_matrix" in run.last
    ]
    if not found or len({matrix.shape for matrix in found}) > 1:
        return None
    matrix = sum(found[1:], start=found[0])
    names = list(group.runs[0].last.get("class_iou", {})) or [str(i) for i in range(len(matrix))]
    shares = 100 * matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)
    side = min(14.0, 1.8 + 0.27 * len(names))
    figure = new_figure(side, side)
    axes = figure.add_subplot()
    heat(axes, shares, 100.0, "{:.0f}" if len(names) <= MANY else "")
    places = np.arange(len(names)) + 0.5
    size = "small" if len(names) <= 40 else 4
    axes.set_xticks(places, names, rotation=90, fontsize=size)
    axes.set_yticks(places, names, fontsize=size)
    axes.set_xlabel("prediction", color=INK)
    axes.set_ylabel("truth", color=INK)
    axes.set_title(f"{_shortened(group.label)}, % of the class's pixels", color=INK, fontsize="medium")
    if base_classes is not None and base_classes < len(names):
        axes.axhline(base_classes, color=SERIES[1], linewidth=1.5)
        axes.axvline(base_classes, color=SERIES[1], linewidth=1.5)
    return figure


def term_styles(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """One colour and line style for each loss term of a report; λ of a term has the same.

    Args:
        runs: all runs of the report.
    """
    epochs = [epoch for run in runs for entry in run.steps.values() for epoch in entry.get("epochs", [])]
    names = dict.fromkeys(name for epoch in epochs for name in _terms(epoch))
    return {name: style_of(index) for index, name in enumerate(names)}


def _terms(epoch: Mapping[str, Any]) -> dict[str, float]:
    """The losses of an epoch, without the total where there is one term alone."""
    losses = dict(epoch.get("losses", {}))
    if len(losses) == 2:
        losses.pop("loss", None)
    return losses


def draw_history(run: Run, styles: Mapping[str, Mapping[str, Any]]) -> Figure | None:
    """Loss terms and, where terms are balanced, λ over the epochs of all steps; lines mark where a step begins.

    Args:
        run: one run.
        styles: of `term_styles`.

    Returns:
        None if the run recorded no epochs.
    """
    steps = {step: entry.get("epochs", []) for step, entry in run.steps.items()}
    epochs = [epoch for step in steps.values() for epoch in step]
    if not epochs:
        return None
    weights = [
        {name.removeprefix("lambda/"): v for name, v in e.get("balance", {}).items() if name.startswith("lambda/")}
        for e in epochs
    ]
    panels = [("loss term (mean of the epoch)", [_terms(epoch) for epoch in epochs], True)]
    if any(weights):
        panels.append(("λ at the end of the epoch", weights, False))
    figure = new_figure(WIDTH, 0.9 + 2.5 * len(panels))
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (label, series, logarithmic) in zip(all_axes, panels):
        lengths = [len(step) for step in steps.values()]
        for name in dict.fromkeys(name for values in series for name in values):
            places, heights = _interrupted([values.get(name, np.nan) for values in series], lengths)
            axes.plot(places, heights, marker=".", label=name, **styles.get(name, style_of(8)))
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(
                FormatStrFormatter("%g")
            )  # the usual one writes formulas, which are not parsed here
            axes.yaxis.set_minor_locator(NullLocator())
        prepare(axes, "", label)
        for end in np.cumsum(lengths)[:-1]:
            axes.axvline(end + 0.5, color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    all_axes[-1].set_xlabel("epoch, all steps in a row", color=INK)
    all_axes[0].set_title(
        f"{_shortened(run.label)}, {run.document['dataset']} {run.document['task']}", color=INK, fontsize="medium"
    )
    handles, names = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize="small", labelcolor=INK, frameon=False)
    return figure


def _interrupted(values: Sequence[float], lengths: Sequence[int]) -> tuple[list[float], list[float]]:
    """Epochs from 1 and values, with a gap between the epochs of two steps, which no training joins."""
    places: list[float] = []
    heights: list[float] = []
    first = 0
    for length in lengths:
        places += [*range(first + 1, first + length + 1), first + length + 0.5]
        heights += [*values[first : first + length], np.nan]
        first += length
    return places, heights
