"""The scores that the LSKD article reports, for comparison with runs of the same task on the same data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: Its entry "source" says which tables of which article the figures are from.
FILE = Path(__file__).with_name("published_results.json")


def rows(document: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The article's scores for the task of a run.

    Args:
        document: a results file. Its data set, task and setting (overlapped or disjoint) must be the article's.

    Returns:
        By method: old, new and all after the last step, in percent. Empty where the article has no such table.
    """
    options = document.get("options", {})
    if options.get("exclude_old"):  # in no article
        return {}
    setting = "overlap" if options.get("overlap") else "disjoint"
    tables = json.loads(FILE.read_text(encoding="utf-8"))
    methods, task = tables.get(f"{document['dataset']}_{setting}", {}), _paper_name(document["class_order"])
    return {method: scores[task] for method, scores in methods.items() if scores.get(task)}


def _paper_name(class_order: Sequence[Sequence[int]]) -> str:
    """The name of a task in papers, such as 15-1; "" if its classes are not in ascending order or its steps differ in size."""
    ids = [label for step in class_order for label in step]
    base, *later = map(len, class_order)
    if ids != list(range(len(ids))) or len(set(later)) != 1:
        return ""
    return f"{base - 1}-{later[0]}"


def source() -> str:
    """Which tables of which article the scores are from."""
    return json.loads(FILE.read_text(encoding="utf-8"))["source"]
