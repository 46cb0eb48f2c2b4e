"""The official summary of a results file: the last step, final and average mIoU, mIoU of old and of new classes.

    python scripts/average_csv.py results/2026-01-31_voc_15-5s_PLOP.csv

A row is `step,class_iou_0,...,class_iou_n,mean_iou`, fractions, with x for a class that is not learned yet or does not occur. Old
classes are those of step 0, background among them; new ones are all the others. The JSON beside the CSV says how many classes step 0 has;
without it they are the ones with a value in the row of step 0.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from metrics.summary import Summary, require_complete, summarise  # noqa: E402  (the project is run from its folder, not installed)
from utils.errors import UserError  # noqa: E402

ABSENT = "x"


#: As in run.py; the steps up to the last one are counted.
MOST_STEPS = 10_000


class Row(NamedTuple):
    """One step: its number, the IoU of each class (None where it is absent) and their mean."""

    step: int
    class_iou: tuple[float | None, ...]
    mean_iou: float


def read(path: Path) -> list[Row]:
    """Rows of a results file, in the order of their steps.

    Args:
        path: the CSV.

    Returns:
        At least one row, one a step (the last of several); all have the same number of classes.

    Raises:
        UserError: a line that is no row, or none at all; names the file and the line.
        OSError: the file cannot be read.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        fields = [field.strip() for field in line.split(",")]
        if fields == [""]:
            continue
        try:
            step, *class_iou, mean_iou = fields
            values = tuple(None if value.lower() == ABSENT else float(value) for value in class_iou)
            rows.append(Row(int(step), values, float(mean_iou)))
            if not 0 <= rows[-1].step < MOST_STEPS:
                raise ValueError
        except ValueError:
            raise UserError(f"{path}, line {number}: {line[:80]!r} is not step,iou,...,mean_iou") from None
        if not values or len(values) != len(rows[0].class_iou):
            raise UserError(f"{path}, line {number}: {len(values)} classes, the first row has {len(rows[0].class_iou)}")
    if not rows:
        raise UserError(f"{path} has no rows; has a step of this run been tested?")
    return [row for _, row in sorted({row.step: row for row in rows}.items())]


def last_summary(path: Path) -> tuple[int, Summary]:
    """Number of the last step of a results file, and its figures as fractions.

    Raises:
        UserError: a line that is no row, or a step between 0 and the last one is missing; names the file.
        OSError: the file cannot be read.
    """
    rows = read(path)
    require_complete([row.step for row in rows], path)
    figures = summarise({row.step: row.class_iou for row in rows}, _num_base(path, rows[0]))
    last = rows[-1].step
    return last, figures[last]


def _num_base(path: Path, first: Row) -> int:
    """Number of classes of step 0."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["base_classes"])
    return 1 + max((place for place, iou in enumerate(first.class_iou) if iou is not None), default=-1)


def describe(step: int, summary: Summary) -> str:
    """The figures of a step in percent, a line each."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f}"

    return "\n".join(
        [
            f"Last Step: {step}",
            f"Final Mean IoU {percent(summary.all)}",
            f"Average Mean IoU {percent(summary.average_over_steps)}",
            f"Mean IoU first {percent(summary.old)}",
            f"Mean IoU last {percent(summary.new)}",
        ]
    )


def main(argv: Sequence[str]) -> int:
    """Print the summary of each file; exit code 2 if a file cannot be used."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if argv else 2
    try:
        for name in argv:
            if len(argv) > 1:
                print(name)
            print(describe(*last_summary(Path(name))))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
