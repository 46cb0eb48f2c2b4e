"""The official summary of a results file: the last step, final and average mIoU, mIoU of old and of new classes.

    python scripts/average_csv.py results/2026-01-31_voc_15-5s_PLOP.csv

A row is `step,class_iou_0,...,class_iou_n,mean_iou`, with x for a class that is not learned yet. Old classes are those
with a value in the first row, background among them; new ones are all the others.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ABSENT = "x"


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
        ValueError: a line that is no row, or none at all; names the file and the line.
        OSError: the file cannot be read.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fields = [field.strip() for field in line.split(",")]
        if fields == [""]:
            continue
        try:
            step, *class_iou, mean_iou = fields
            values = tuple(None if value.lower() == ABSENT else float(value) for value in class_iou)
            rows.append(Row(int(step), values, float(mean_iou)))
        except ValueError:
            raise ValueError(f"{path}, line {number}: {line[:80]!r} is not step,iou,...,mean_iou") from None
        if not values or len(values) != len(rows[0].class_iou):
            raise ValueError(
                f"{path}, line {number}: {len(values)} classes, the first row has {len(rows[0].class_iou)}"
            )
    if not rows:
        raise ValueError(f"{path} has no rows; has a step of this run been tested?")
    return [row for _, row in sorted({row.step: row for row in rows}.items())]


def summarise(rows: Sequence[Row]) -> dict[str, float | None]:
    """The figures of the official summary.

    Args:
        rows: as `read` returns them.

    Returns:
        step: number of the last one; final: its mean IoU; average: mean of all rows' mean IoU; old and new: means over
        the classes of the first step and over the later ones in the last row, None where there are none. IoUs are
        fractions.

    Reference: the tables of PLOP (CVPR 2021), section 4.
    """
    first, last = rows[0], rows[-1]
    is_old = [iou is not None for iou in first.class_iou]
    groups = {
        name: [iou for iou, old in zip(last.class_iou, is_old, strict=True) if old is wanted and iou is not None]
        for name, wanted in (("old", True), ("new", False))
    }
    return {
        "step": last.step,
        "final": last.mean_iou,
        "average": sum(row.mean_iou for row in rows) / len(rows),
        **{name: sum(ious) / len(ious) if ious else None for name, ious in groups.items()},
    }


def describe(summary: dict[str, float | None]) -> str:
    """The summary in percent, a line each."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f}"

    return "\n".join(
        [
            f"Last Step: {summary['step']}",
            f"Final Mean IoU {percent(summary['final'])}",
            f"Average Mean IoU {percent(summary['average'])}",
            f"Mean IoU first {percent(summary['old'])}",
            f"Mean IoU last {percent(summary['new'])}",
        ]
    )


def main(argv: Sequence[str]) -> int:
    """Print the summary of each file named; exit code 2 for one that cannot be used."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if argv else 2
    try:
        for name in argv:
            if len(argv) > 1:
                print(name)
            print(describe(summarise(read(Path(name)))))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
