"""The scores of a test in the log and in TensorBoard."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from metrics.summary import Summary, how_to_complete
from utils.reporting import results
from utils.reporting.logger import Logger
from utils.runtime import distributed
from utils.types import TaskLike


def log_scores(
    log: Logger, opts: Namespace, task: TaskLike, entry: dict[str, Any], labels: str, iterations: int
) -> None:
    """Print the scores of a step, and add them to the curves.

    Args:
        log: of the step.
        opts: results, date, name.
        task: the step that was tested.
        entry: of `results.write`.
        labels: which labels the test counts, as text.
        iterations: that were trained, the abscissa of the curves.
    """
    described = results.describe(entry, labels)
    log.info(f"step {task.step} of {task.name}: {described} -> {results.csv_path(opts, task)}")
    if absent := distributed.on_main(lambda: results.missing(opts, task)):
        log.info(f"note: no average over steps: {how_to_complete(absent)}")
    figures = {f"test/{key}": entry[key] for key in Summary._fields if entry[key] is not None}
    log.scalars(figures, iterations)
