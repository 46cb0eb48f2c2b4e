"""Tables and figures from the JSON files that runs leave in results/.

    python scripts/report.py results/*.json --out runs/report

Prints a table of old, new and all by step. Draws the mIoU by step of all runs of a task in one figure, and for every run how the loss
terms and, where they are balanced, λ moved.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from metrics.summary import require_complete  # noqa: E402  (the project is run from its folder, not installed)
from utils.errors import UserError  # noqa: E402
from utils.reporting.documents import read as read_document  # noqa: E402


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table.

    Args:
        header: names of the columns.
        rows: as many cells each.

    Returns:
        Lines joined by newlines, columns aligned.
    """
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "| " + " | ".join(str(cell).ljust(width) for cell, width in zip(row, widths)) + " |" for row in [header, *rows]
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def _figure(width: float, height: float) -> tuple[Figure, FigureCanvasAgg]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, FigureCanvasAgg(figure)


def draw_steps(curves: Mapping[str, Sequence[Mapping[int, float | None]]], path: Path, title: str = "") -> None:
    """mIoU over all classes by step, the mean over seeds with their range shaded.

    Args:
        curves: by method, for each seed the mIoU by step, in percent; None where a step has none.
        path: PNG to write.
        title: of the figure.
    """
    figure, _ = _figure(6, 4)
    axes = figure.add_subplot()
    all_steps = sorted({step for seeds in curves.values() for curve in seeds for step in curve})
    for name, seeds in curves.items():
        steps = sorted({step for curve in seeds for step in curve})
        values = [[v for curve in seeds if (v := curve.get(step)) is not None] or [math.nan] for step in steps]
        (line,) = axes.plot(steps, [sum(v) / len(v) for v in values], marker="o", label=name)
        if len(seeds) > 1:
            axes.fill_between(
                steps, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.2
            )
    axes.set_xticks(all_steps)
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.set_ylabel("mIoU of all classes so far (%)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_history(document: dict, path: Path) -> bool:
    """λ (where terms are balanced) and the loss terms over the epochs of all steps.

    Args:
        document: JSON of a run.
        path: PNG to write.

    Returns:
        Whether there was anything to draw.
    """
    epochs = [entry for step in sorted(document["steps"], key=int) for entry in document["steps"][step]["epochs"]]
    weights = _series([entry["balance"] for entry in epochs], "lambda/")
    losses = _series([entry["losses"] for entry in epochs], "")
    if not epochs:
        return False
    figure, _ = _figure(7, 7 if weights else 4)
    panels = [(losses, "loss term (mean of the epoch)", True)] + (
        [(weights, "λ at the end of the epoch", False)] if weights else []
    )
    for place, (series, label, logarithmic) in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, place + 1)
        for name, (where, values) in series.items():
            axes.plot(where, values, marker=".", label=name)
        if logarithmic:
            axes.set_yscale("log")
        axes.set_xlabel("epoch, all steps in a row")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small", ncols=2)
    figure.suptitle(f"{document['name']} on {document['dataset']} {document['task']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return True


def _series(entries: list[dict[str, float]], prefix: str) -> dict[str, tuple[list[int], list[float]]]:
    """By name, the epochs at which a value exists, and the values."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    for epoch, values in enumerate(entries):
        for name, value in values.items():
            if name.startswith(prefix):
                where, numbers = series.setdefault(name.removeprefix(prefix), ([], []))
                where.append(epoch)
                numbers.append(value)
    return series


def steps_table(documents: Mapping[str, dict[str, Any]]) -> str:
    """The figures of `metrics.summary` in percent, one row a run and step.

    Args:
        documents: by label, as `read` returns them.
    """

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    keys = ("old", "new", "all", "harmonic_mean", "average_over_steps")
    rows = [
        [label, f"{document['dataset']} {document['task']}", step, *(cell(entry[key]) for key in keys)]
        for label, document in documents.items()
        for step, entry in document["steps"].items()
    ]
    return markdown(["run", "task", "step", "old", "new", "all", "harmonic mean", "average over steps"], rows)


def read(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The JSON files of runs by labels that differ: the name of the run, or where several have it the name of the file.

    Raises:
        UserError: a file that is not the JSON of a run, that lacks the scores of a step, or that is given twice.
        OSError: a file cannot be read.
    """
    twice = [path for path, count in Counter(path.resolve() for path in paths).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]} is given twice")
    documents = [read_document(path) for path in paths]
    for path, document in zip(paths, documents):
        require_complete(map(int, document["steps"]), path)
    labels = _different([document["name"] for document in documents], [path.stem for path in paths])
    return dict(zip(_different(labels, [str(path.with_suffix("")) for path in paths]), documents))


def _different(labels: Sequence[str], longer: Sequence[str]) -> list[str]:
    """The labels, with the longer one in the place of each that occurs more than once."""
    count = Counter(labels)
    return [long if count[label] > 1 else label for label, long in zip(labels, longer)]


def draw_tasks(documents: Mapping[str, dict[str, Any]], folder: Path) -> list[Path]:
    """One figure of the mIoU by step for each task: runs of different tasks, or orders of classes, cannot be compared.

    Args:
        documents: by label, as `read` returns them.
        folder: where the figures go.

    Returns:
        The figures: miou_by_step.png, for several tasks miou_by_step_DATASET_TASK.png.
    """
    tasks: dict[str, dict[str, dict[str, Any]]] = {}
    for label, document in documents.items():
        tasks.setdefault(str([document[key] for key in ("dataset", "task", "class_order")]), {})[label] = document
    drawn: list[Path] = []
    for runs in tasks.values():
        first = next(iter(runs.values()))
        stem = f"miou_by_step_{first['dataset']}_{first['task']}" if len(tasks) > 1 else "miou_by_step"
        path = _unused(folder / f"{stem}.png", drawn)
        curves = {
            label: [{int(step): entry["all"] for step, entry in document["steps"].items()}]
            for label, document in runs.items()
        }
        draw_steps(curves, path, f"{first['dataset']} {first['task']}")
        drawn.append(path)
    return drawn


def _unused(path: Path, drawn: Sequence[Path]) -> Path:
    """The path, or with a number added to its name if it was drawn before."""
    candidates = (
        path.with_stem(f"{path.stem}-{number}") if number > 1 else path for number in range(1, len(drawn) + 2)
    )
    return next(candidate for candidate in candidates if candidate not in drawn)


def main(argv: list[str] | None = None) -> int:
    """Print the table and draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="JSON files of runs")
    parser.add_argument("--out", type=Path, default=Path("runs/report"), help="folder of the figures")
    arguments = parser.parse_args(argv)
    try:
        documents = read(arguments.files)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(steps_table(documents))
    drawn = draw_tasks(documents, arguments.out)
    for path, document in zip(arguments.files, documents.values()):
        target = _unused(arguments.out / f"{path.stem}.png", drawn)
        if draw_history(document, target):
            drawn.append(target)
    print("figures: " + ", ".join(str(path) for path in drawn))
    return 0


if __name__ == "__main__":
    sys.exit(main())
