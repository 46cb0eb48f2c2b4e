"""Reading of the JSON of a run: every value is checked, and files of earlier versions are converted.

Scores (IoU, accuracy and their means) are percentages. Files of earlier versions, which have no "unit", hold fractions.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from metrics.summary import average_over_steps, harmonic_mean
from utils.checkpointing.structure import PART_OF_FILE_NAME, check_history, is_number, is_plain
from utils.errors import UserError

#: Unit of all scores.
UNIT = "percent"

#: Entries of a step that are scores, numbers or dictionaries of numbers.
SCORES = (
    *("old", "new", "all", "average_over_steps", "overall_accuracy", "mean_accuracy", "frequency_weighted_accuracy"),
    *("class_iou", "class_accuracy"),
)

#: A document of this size has the scores of a hundred steps of a thousand classes.
LARGEST_FILE = 1 << 28


def read(path: Path) -> dict[str, Any]:
    """The JSON of a run, scores in percent.

    Args:
        path: written by this or an earlier version.

    Returns:
        The document; its "steps" have the entries of `results.write` by the number of the step, as text, in ascending order.

    Raises:
        UserError: not the JSON of a run.
        OSError: the file cannot be read.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError("its size")
        document = json.loads(path.read_text(encoding="utf-8"))
        unit = document.get("unit") if isinstance(document, dict) else None
        if isinstance(unit, str) and unit != UNIT:
            raise ValueError(f"'unit' is {unit[:40]!r}, this version of the program knows {UNIT!r}")
        if place := next(_misfits(document), ""):
            raise ValueError(place)
    except (ValueError, RecursionError) as error:
        reason = (
            type(error).__name__ if isinstance(error, (UnicodeError, json.JSONDecodeError, RecursionError)) else error
        )
        raise UserError(
            f"results file {path} is not one that this program wrote ({reason}); move it away, then run again"
        ) from error
    entries = {step: dict(document["steps"][step]) for step in sorted(document["steps"], key=int)}
    if document.get("unit") is None:
        entries = {step: _entry_in_percent(entry) for step, entry in entries.items()}
    averages = average_over_steps({int(step): entry["all"] for step, entry in entries.items()})
    # Files of earlier versions have no harmonic mean, and averages although steps are missing
    for step, entry in entries.items():
        entry["harmonic_mean"] = harmonic_mean(entry["old"], entry["new"])
        entry["average_over_steps"] = averages[int(step)]
    return document | {"unit": UNIT, "steps": entries}


def percent(value: Any) -> Any:
    """Convert fractions to percentages: a number, None, or a dictionary of these."""
    if isinstance(value, dict):
        return {key: percent(part) for key, part in value.items()}
    return None if value is None else 100 * value


def epoch_in_percent(epoch: dict[str, Any]) -> dict[str, Any]:
    """Convert an entry of the history; in earlier versions the score of the validation was the fraction "val_miou"."""
    epoch = dict(epoch)
    if "val_miou" in epoch:
        epoch["validation_miou"] = percent(epoch.pop("val_miou"))
    return epoch


def _entry_in_percent(entry: dict[str, Any]) -> dict[str, Any]:
    """Convert the entry of a step in a file of an earlier version, which contains fractions."""
    scores = {key: percent(entry[key]) for key in SCORES if key in entry}
    return entry | scores | {"epochs": [epoch_in_percent(epoch) for epoch in entry.get("epochs", [])]}


# ---------------------------------------------------------------------- checks


def _misfits(document: Any) -> Iterator[str]:
    """The places at which a document differs from what this program writes."""
    if not isinstance(document, dict) or not is_plain(document, levels=12):
        yield "no dictionary of plain values"
        return
    yield from _misfits_of(document, DOCUMENT, "")
    steps = document.get("steps")
    if not isinstance(steps, dict):
        yield "steps"
        return
    for step, entry in steps.items():
        if not re.fullmatch(r"0|[1-9][0-9]{0,3}", step) or not isinstance(entry, dict):
            yield f"steps: {step[:20]!r}"
            return
        yield from _misfits_of(entry, ENTRY, f"step {step}: ")


def _misfits_of(
    found: dict[str, Any], checks: dict[str, tuple[bool, Callable[[Any], bool]]], place: str
) -> Iterator[str]:
    for key, (required, fits) in checks.items():
        if key not in found:
            if required:
                yield f"{place}no {key!r}"
        elif not fits(found[key]):
            yield f"{place}{key!r}"


def _is_file_part(value: Any) -> bool:
    return isinstance(value, str) and bool(PART_OF_FILE_NAME.fullmatch(value))


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_dictionary(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _is_score(value: Any) -> bool:
    return value is None or (is_number(value) and math.isfinite(value))


def _is_scores(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_score, value.values()))


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_matrix(value: Any) -> bool:
    """Rows of counts, as many as there are columns."""
    return (
        isinstance(value, list)
        and value != []
        and all(isinstance(row, list) and len(row) == len(value) and all(map(_is_count, row)) for row in value)
    )


def _is_order(value: Any) -> bool:
    """Class ids of each step; at least one step."""
    return isinstance(value, list) and value != [] and all(_is_step(step) for step in value)


def _is_step(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(map(_is_count, value))


def _is_history(value: Any) -> bool:
    try:
        check_history(value)
    except ValueError:
        return False
    return True


#: By key, whether it is required and what it must be; there may be others.
DOCUMENT: dict[str, tuple[bool, Callable[[Any], bool]]] = {
    "dataset": (True, _is_file_part),
    "task": (True, _is_file_part),
    "name": (True, _is_file_part),
    "class_order": (True, _is_order),
    "steps": (True, _is_dictionary),
    "unit": (False, lambda value: value in (None, UNIT)),
    "method": (False, _is_text),
    "base_classes": (False, _is_count),
    "options": (False, _is_dictionary),
    "versions": (False, _is_dictionary),
    "commit": (False, _is_text),
    "average_over_steps": (False, _is_score),
}
ENTRY: dict[str, tuple[bool, Callable[[Any], bool]]] = {
    **{key: (key in ("old", "new", "all"), _is_score) for key in SCORES if not key.startswith("class_")},
    "class_iou": (False, _is_scores),
    "class_accuracy": (False, _is_scores),
    "harmonic_mean": (False, _is_score),
    "confusion_matrix": (False, _is_matrix),
    "epochs": (False, _is_history),
    "evaluation": (False, _is_dictionary),
    "weights_sha256": (False, _is_text),
    "checkpoint": (False, _is_text),
    "trained_with": (False, _is_dictionary),
}
