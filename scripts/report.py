"""Tables, figures and one HTML page from the results files of runs.

    python scripts/report.py runs/quickstart                                   # every run of a folder
    python scripts/report.py results/2026-01-31_voc_15-5s_*.json --out runs/report --formats png markdown latex csv

Prints a table of old, new and all by step, and writes report.html: one page that needs no network and no other file. `--formats` adds
the figures as PNG and the tables as Markdown, LaTeX and CSV.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.errors import UserError  # noqa: E402
from utils.reporting import figures, page, runs  # noqa: E402  (the project is run from its folder, not installed)
from utils.reporting.runs import Run, TaskRuns  # noqa: E402

FORMATS = ("png", "markdown", "latex", "csv")
_SUFFIXES = {"markdown": ".md", "latex": ".tex", "csv": ".csv"}


class Output:
    """The files of a report, none of which replaces another.

    Args:
        folder: of the files; it is created.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.written: list[Path] = []
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """An unused path of this name, with a number added where the report has written one of that name."""
        path = self.folder / name
        number = 1
        while path in self.written:
            number += 1
            path = (self.folder / name).with_stem(f"{Path(name).stem}-{number}")
        self.written.append(path)
        return path

    def figure(self, figure: Figure | None, name: str) -> None:
        """Write a figure as PNG; None writes nothing."""
        if figure is not None:
            figure.savefig(self.path(name), dpi=150)


def write_figures(tasks: Sequence[TaskRuns], output: Output) -> None:
    """The figures of all tasks as PNG."""
    styles = figures.term_styles([run for task in tasks for run in task.runs])
    for task in tasks:
        suffix = f"_{task.dataset}_{task.task}" if len(tasks) > 1 else ""
        output.figure(figures.draw_steps(task), f"miou_by_step{suffix}.png")
        for group in task.groups:
            stem = group.runs[0].path.stem
            if group.class_iou()[0]:
                output.figure(figures.draw_classes(group, task.base_classes), f"{stem}_classes.png")
            output.figure(figures.draw_confusion(group, task.base_classes), f"{stem}_confusion.png")
        for run in task.runs:
            output.figure(figures.draw_history(run, styles), f"{run.path.stem}.png")


def write_tables(tasks: Sequence[TaskRuns], found: Sequence[Run], formats: Sequence[str], output: Output) -> None:
    """The summary of each task, and the figures of all runs and steps, in each of the formats."""
    tables = {f"summary_{task.dataset}_{task.task}": page.summary_table(task) for task in tasks}
    tables["steps"] = page.steps_table(found)
    for wanted in formats:
        for name, table in tables.items():
            output.path(name + _SUFFIXES[wanted]).write_text(getattr(table, wanted)() + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, write the page and what `--formats` asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="JSON files of runs, or folders that contain some")
    parser.add_argument("--out", type=Path, default=Path("runs/report"), help="folder of the report")
    parser.add_argument("--formats", nargs="+", default=[], choices=FORMATS, help="what to write beside report.html")
    arguments = parser.parse_args(argv)
    try:
        found, beginnings = runs.without_beginnings(runs.read(arguments.runs))
        for label, longer in beginnings.items():
            print(f"note: {label} is left out: its steps are the first ones of {longer}")
        print(page.steps_table(found).markdown())
        tasks = runs.by_task(found)
        output = Output(arguments.out)
        page.write(tasks, output.path("report.html"))
        if "png" in arguments.formats:
            write_figures(tasks, output)
        write_tables(tasks, found, [name for name in arguments.formats if name in _SUFFIXES], output)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\nreport: {output.written[0]}" + (f" and {len(output.written) - 1} files" if output.written[1:] else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
