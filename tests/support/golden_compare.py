"""How the numbers of a replayed training trace are compared with those of a golden file."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

#: Relative agreement of what training moves; a change of 1e-7 in an early weight grows to 2e-3 in the last logits.
TOLERANCE = 1e-6
#: Relative agreement of what no training step has touched yet.
UNTRAINED_TOLERANCE = 1e-9
#: Below this the maximum of an array or a column is taken for 0, and agreement is absolute.
_ZERO = 1e-12


def close(mine: object, theirs: object, what: str, tolerance: float = TOLERANCE) -> None:
    """Agreement relative to the largest value of the whole array.

    Args:
        mine, theirs: arrays of one shape.
        what: the name in the message.
        tolerance: greatest allowed difference, as a part of the largest |theirs|.

    Raises:
        AssertionError: the shapes differ, or a value does.
    """
    mine, theirs = np.asarray(mine, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    assert mine.shape == theirs.shape, f"{what}: shape {mine.shape}, expected {theirs.shape}"
    error = np.abs(mine - theirs).max(initial=0) / max(np.abs(theirs).max(initial=0), _ZERO)
    assert error < tolerance, f"{what}: relative error {error:.3g}"


def close_by_column(
    mine: object, theirs: object, what: str, names: Sequence[str] = (), tolerance: float = TOLERANCE
) -> None:
    """Agreement of each column (index of the last axis) relative to the largest value of that column.

    The columns of a trace differ in size: a distillation of 0.6 stands beside a feature distance of 1000.

    Args:
        mine, theirs: arrays of one shape, at least one axis.
        what: the name in the message.
        names: names of the columns, for the message; none: their numbers.
        tolerance: as in `close`, of each column.

    Raises:
        AssertionError: the shapes differ, or a column does.
    """
    mine, theirs = np.asarray(mine, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    assert mine.shape == theirs.shape, f"{what}: shape {mine.shape}, expected {theirs.shape}"
    for column in range(theirs.shape[-1]):
        name = names[column] if names else column
        close(mine[..., column], theirs[..., column], f"{what}, column {name}", tolerance)


def close_loss_weights(mine: object, theirs: object, what: str) -> None:
    """Agreement of the movement of λ away from its start, λ - 1, by column.

    λ moves by 1e-5 to 1e-3 in a trace: compared as a whole, a movement that is wrong by a tenth of a percent would pass.
    """
    mine, theirs = np.asarray(mine, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    close_by_column(mine - 1, theirs - 1, f"{what} - 1")


def log_figures(line: str) -> dict[str, float]:
    """The figures of an official log line, "… made of: CE 1.5, LKD 0.2", by their names in the line."""
    return {
        name: float(number) for name, number in re.findall(r"([A-Za-z]+) (-?[\d.]+(?:e[+-]?\d+)?)", line.split(":")[1])
    }


def _untrained(mine: object, theirs: object, what: str) -> None:
    close(mine, theirs, what, UNTRAINED_TOLERANCE)


#: Outputs of a trace that are not compared as whole arrays.
_COMPARISONS: dict[str, Callable[[object, object, str], None]] = {
    "out_probe_logits_before": _untrained,
    "out_loss_weights": close_loss_weights,
    "out_initial_task_losses": close_by_column,
    "out_thresholds": close_by_column,
}


def compare_output(name: str, mine: object, theirs: object) -> None:
    """Compare one output of a trace in the way that its name asks for; AssertionError where it differs."""
    _COMPARISONS.get(name, close)(mine, theirs, name)
