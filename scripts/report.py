"""Tables and figures from the JSON files that runs leave in results/.

    python scripts/report.py results/*.json --out runs/report

Prints a table of old, new and all by step. Draws the mIoU by step of all runs in one figure, and for every run with balanced terms how λ
and the loss terms moved.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.reporting import results  # noqa: E402  (the project is run from its folder, not installed)


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


def draw_steps(curves: dict[str, list[list[float]]], path: Path) -> None:
    """mIoU over all classes by step, the mean over seeds with their range shaded.

    Args:
        curves: by method, for each seed the mIoU of every step, in percent.
        path: PNG to write.
    """
    figure, _ = _figure(6, 4)
    axes = figure.add_subplot()
    longest = 1
    for name, seeds in curves.items():
        values = list(zip(*seeds))
        steps = range(len(values))
        longest = max(longest, len(values))
        (line,) = axes.plot(steps, [sum(v) / len(v) for v in values], marker="o", label=name)
        if len(seeds) > 1:
            axes.fill_between(
                steps, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.2
            )
    axes.set_xticks(range(longest))
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


def steps_table(documents: list[dict]) -> str:
    """Old, new, all and the average over steps, one row a run and step."""

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    rows = [
        [
            document["name"],
            step,
            *(cell(document["steps"][step].get(key)) for key in ("old", "new", "all", "average_over_steps")),
        ]
        for document in documents
        for step in sorted(document["steps"], key=int)
    ]
    return markdown(["run", "step", "old", "new", "all", "average"], rows)


def main(argv: list[str] | None = None) -> int:
    """Print the table and draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="JSON files of runs")
    parser.add_argument("--out", type=Path, default=Path("runs/report"), help="folder of the figures")
    arguments = parser.parse_args(argv)
    try:
        documents = [results.read(path) for path in arguments.files]
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(steps_table(documents))
    curves = {d["name"]: [[d["steps"][s]["all"] for s in sorted(d["steps"], key=int)]] for d in documents}
    draw_steps(curves, arguments.out / "miou_by_step.png")
    drawn = [arguments.out / "miou_by_step.png"]
    for path, document in zip(arguments.files, documents):
        target = arguments.out / f"{path.stem}.png"
        if draw_history(document, target):
            drawn.append(target)
    print("figures: " + ", ".join(str(path) for path in drawn))
    return 0


if __name__ == "__main__":
    sys.exit(main())
