"""A table of text, written as Markdown, LaTeX, CSV or HTML."""

from __future__ import annotations

import csv
import html
import io
import statistics
from collections.abc import Sequence
from typing import NamedTuple

#: Text of a cell without a value.
EMPTY = "-"


class Table(NamedTuple):
    """Cells of text.

    Attributes:
        header: names of the columns; the first column names the row.
        rows: with as many cells as the header.
    """

    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Lines joined by newlines, columns aligned."""
        widths = [max(len(row[i]) for row in [self.header, *self.rows]) for i in range(len(self.header))]
        lines = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |"
            for row in [self.header, *self.rows]
        ]
        lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
        return "\n".join(lines)

    def latex(self) -> str:
        """A tabular environment with the rules of the package booktabs."""
        lines = [
            " & ".join(_escape_latex(cell) for cell in row) + r" \\" for row in [self.header, *self.rows]
        ]  # row by row
        columns = "l" + "c" * (len(self.header) - 1)
        head, *body = lines
        return "\n".join(
            [
                rf"\begin{{tabular}}{{{columns}}}",
                r"\toprule",
                head,
                r"\midrule",
                *body,
                r"\bottomrule",
                r"\end{tabular}",
            ]
        )

    def csv(self) -> str:
        """Comma-separated values, one line a row, without a newline at the end."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.header, *self.rows])
        return text.getvalue().rstrip("\n")

    def html(self) -> str:
        """A table element; all text is escaped."""
        head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in self.header)
        body = "".join(
            f'<tr><th scope="row">{html.escape(row[0])}</th>'
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
            + "</tr>"
            for row in self.rows
        )
        return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


#: Characters that LaTeX reads as commands, and the text that prints them.
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
}  # fmt: skip


def _escape_latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def mean_and_deviation(values: Sequence[float | None], digits: int = 1) -> str:
    """Mean ± sample standard deviation of the values that are not None; the mean alone for one value, "-" for none."""
    present = [value for value in values if value is not None]
    if not present:
        return EMPTY
    spread = f" ± {statistics.stdev(present):.{digits}f}" if len(present) > 1 else ""
    return f"{statistics.fmean(present):.{digits}f}{spread}"
