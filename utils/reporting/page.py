"""The HTML page of a report. Tables, figures and pictures are inside the file; nothing else is loaded."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from utils.reporting import figures, pictures, published
from utils.reporting.runs import Run, TaskRuns
from utils.reporting.tables import EMPTY, Table, mean_and_deviation

#: Figures of a summary table: key in the results, heading.
COLUMNS = {
    "old": "old", "new": "new", "all": "all", "average_over_steps": "average over steps", "harmonic_mean": "harmonic mean",
}  # fmt: skip
#: The page's colours by the reader's preference; those of the curves come from `figures`.
_DARK_SERIES = ("#6aa9f4", "#f39a4e", "#4fc494", "#e283cb", "#ab94ee", "#cdb04a", "#f07b85", "#55c3d8", "#a3afbb")
_STYLE = """
:root { --ink: #1c2127; --soft: #56606b; --page: #ffffff; --card: #f5f7f9; --grid: #d3d8de; LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #a7b0ba; --page: #14181c; --card: #1d2329; --grid: #3a434c; DARK }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; } h2 { font-size: 1.25rem; margin: 2rem 0 0.5rem; }
h3 { font-size: 1.05rem; margin: 1.5rem 0 0.5rem; } p { max-width: 46rem; color: var(--soft); margin: 0.3rem 0 0.8rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th:first-child { text-align: left; } thead th { color: var(--soft); font-weight: 600; }
tbody tr:hover { background: var(--card); }
.figures { margin-top: 0.8rem; display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
figure { margin: 0; overflow-x: auto; max-width: 100%; } figure svg { display: block; height: auto; max-width: 100%; }
figure.wide svg { max-width: none; }
.pictures td, .pictures th { border: 0; padding: 0.15rem; text-align: center; font-size: 0.8rem; }
.pictures img { width: 8rem; height: auto; display: block; image-rendering: pixelated; border-radius: 3px; }
.legend { display: flex; flex-wrap: wrap; gap: 0.3rem 1rem; padding: 0; list-style: none; font-size: 0.85rem; }
.legend span { display: inline-block; width: 0.9em; height: 0.9em; border: 1px solid var(--grid); margin-right: 0.35em;
  vertical-align: -0.1em; }
details { margin: 0.6rem 0; } summary { cursor: pointer; color: var(--soft); }
"""


def summary_table(task: TaskRuns, with_published: bool = True) -> Table:
    """Old, new, all, average over steps and harmonic mean after the last step: mean ± standard deviation over seeds.

    Args:
        task: methods on one task.
        with_published: add the article's rows where task and data are the article's.
    """
    rows = [
        [group.label, str(len(group.runs)), *(mean_and_deviation(group.last_values(key)) for key in COLUMNS)]
        for group in task.groups
    ]
    for group in task.references:
        values = task.figures_of_reference(group)
        cells = [mean_and_deviation(values[key]) if key in values else EMPTY for key in COLUMNS]
        rows.append([f"{group.label} (one step)", str(len(group.runs)), *cells])
    if with_published:
        for method, scores in published.rows(task.runs[0].document).items():
            cells = [f"{scores[key]:.1f}" if key in scores else EMPTY for key in COLUMNS]
            rows.append([f"{method} (article)", EMPTY, *cells])
    return Table(["method", "seeds", *COLUMNS.values()], rows)


def steps_table(runs: Sequence[Run]) -> Table:
    """The figures of every run and step, in percent."""
    keys = ("old", "new", "all", "harmonic_mean", "average_over_steps")
    rows = [
        [run.label, f"{run.document['dataset']} {run.document['task']}", str(step)]
        + [EMPTY if entry[key] is None else f"{entry[key]:.2f}" for key in keys]
        for run in runs
        for step, entry in run.steps.items()
    ]
    return Table(["run", "task", "step", *(key.replace("_", " ") for key in keys)], rows)


def write(tasks: Sequence[TaskRuns], path: Path, name: str = "") -> None:
    """Write the page.

    Args:
        tasks: of `utils.reporting.runs.by_task`.
        path: of the HTML file; its folder is created.
        name: of a study, for the title; "": the names of the tasks.

    Raises:
        OSError: it cannot be written.
    """
    title = "Results: " + (name or ", ".join(dict.fromkeys(task.title for task in tasks)))
    variants = {task.variant: task for task in tasks if task.variant}
    body = _Section(tasks[0], len(tasks)).figures([figures.draw_variants(variants)]) if len(variants) > 1 else ""
    body += "".join(_Section(task, number).html() for number, task in enumerate(tasks))
    series = [f"--s{i}: {colour};" for i, colour in enumerate(figures.SERIES)]
    dark = [f"--s{i}: {colour};" for i, colour in enumerate(_DARK_SERIES)]
    style = _STYLE.replace("LIGHT", " ".join(series)).replace("DARK", " ".join(dark))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{style}</style></head><body><h1>{html.escape(title)}</h1>{body}</body></html>\n",
        encoding="utf-8",
    )


class _Section:
    """The part of the page that shows one task.

    Args:
        task: its runs.
        number: of the section, which makes the names inside its drawings unique.
    """

    def __init__(self, task: TaskRuns, number: int):
        self.task = task
        self.number = number
        self.drawn = 0

    def html(self) -> str:
        """The section, its heading first."""
        task = self.task
        parts = [f"<h2>{html.escape(task.title)}</h2>", self._summary()]
        if any(len(group.steps) > 1 for group in task.groups):
            parts.append(self.figures([figures.draw_steps(task)]))
        parts += ["<h3>Pictures</h3>" + grid if (grid := self._pictures()) else ""]
        classes = [figures.draw_classes(group, task.base_classes) for group in task.groups if group.class_iou()[0]]
        if classes:
            said = "IoU of each class in percent. The line separates the classes of step 0 from the later ones."
            parts.append(f"<h3>By class and step</h3><p>{said}</p>{self.figures(classes)}")
        confusion = [figures.draw_confusion(group, task.base_classes) for group in task.groups]
        if drawn := [figure for figure in confusion if figure is not None]:
            said = "After the last step, summed over seeds. Lines separate old and new classes."
            parts.append(f"<h3>Confusion matrices</h3><p>{said}</p>{self.figures(drawn)}")
        parts += [self._histories(), self._all_steps()]
        return "<section>" + "".join(parts) + "</section>"

    def _summary(self) -> str:
        rows = published.rows(self.task.runs[0].document)
        note = (
            "mIoU in percent after the last step: old are the classes of step 0 with the background, new all later ones. "
            "Mean ± standard deviation over seeds."
        )
        if rows:
            note += f" Rows marked (article): {published.source()}."
        return f"<p>{html.escape(note)}</p>{summary_table(self.task).html()}"

    def figures(self, drawn: Sequence[Figure]) -> str:
        """The drawings, side by side where the page is wide enough."""
        return '<div class="figures">' + "".join(self._svg(figure) for figure in drawn) + "</div>"

    def _svg(self, figure: Figure) -> str:
        """The drawing of a figure, its colours replaced by those of the page."""
        self.drawn += 1
        buffer = io.StringIO()
        # Text is not converted to paths. Ids in the drawing are derived from the salt; they must be unique in the page.
        salt = f"{self.number}-{self.drawn}"
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}):
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        drawing = buffer.getvalue()
        drawing = drawing[drawing.index("<svg") :]
        for index, colour in enumerate(figures.SERIES):
            drawing = drawing.replace(colour, f"var(--s{index})")
        drawing = drawing.replace(figures.INK, "var(--ink)").replace(figures.GRID, "var(--grid)")
        drawing = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>d{salt}-", drawing)
        wide = ' class="wide"' if figure.get_figwidth() > 7 else ""
        return f"<figure{wide}>{drawing}</figure>"

    def _pictures(self) -> str:
        """A table of pictures a method: image, truth, and the prediction after each step."""
        parts = []
        for group in self.task.groups:
            shown = pictures.read(group.runs[0].path)
            if shown is None:
                continue
            header = ["image", "truth", *(f"after step {step}" for step in shown.steps)]
            head = "".join(f'<th scope="col">{text}</th>' for text in header)
            rows = "".join(
                "<tr>" + "".join(f"<td>{_image(path, name)}</td>" for path, name in zip(row, header)) + "</tr>"
                for row in shown.rows
            )
            parts.append(f"<h4>{html.escape(group.label)}</h4>")
            parts.append(f'<div class="scroll"><table class="pictures"><tr>{head}</tr>{rows}</table></div>')
            parts.append(_legend(shown.legend))
        if not parts:
            return ""
        said = (
            "The same test images after every step. The prediction after step t−1 is that of the teacher of step t. "
            "The truth shows all classes of the task."
        )
        return f"<p>{said}</p>" + "".join(parts)

    def _histories(self) -> str:
        styles = figures.term_styles(self.task.runs)
        drawn = [(run, figures.draw_history(run, styles)) for group in self.task.groups for run in group.runs[:1]]
        found = [figure for _, figure in drawn if figure is not None]
        if not found:
            return ""
        said = "Of the first seed of each method. A term has one colour in all figures; dotted lines mark where a step begins."
        return f"<h3>Losses and λ</h3><p>{said}</p>{self.figures(found)}"

    def _all_steps(self) -> str:
        return f"<details><summary>All runs and steps</summary>{steps_table(self.task.runs).html()}</details>"


def _image(path: Path | None, name: str) -> str:
    """A PNG inside the page; nothing for None."""
    if path is None:
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'


def _legend(colours: dict[str, str]) -> str:
    """Names of classes with their colours."""
    items = (
        f'<li><span style="background:{colour}"></span>{html.escape(name)}</li>' for name, colour in colours.items()
    )
    return f'<ul class="legend">{"".join(items)}</ul>'
