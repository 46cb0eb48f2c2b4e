"""The scores of a test in the log and in TensorBoard: curves over iterations, and curves over the steps of the task."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from metrics.summary import Summary, how_to_complete
from utils.checkpointing.header import MAY_CHANGE_ON_RESUME, plain_options
from utils.errors import UserError
from utils.reporting import documents, results
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
    distributed.on_main(lambda: _log_steps(log, opts, task))


def log_folder(opts: Namespace, task: TaskLike) -> Path:
    """Folder of the TensorBoard files of a run; those of step t are in its folder step-<t>."""
    return Path(opts.logdir) / f"{task.name}-{task.dataset}" / opts.name


def _log_steps(log: Logger, opts: Namespace, task: TaskLike) -> None:
    """Write the curves over steps anew, from the results of all steps, and the options by which TensorBoard compares runs.

    TensorBoard sorts the groups of curves by name: loss, mIoU_by_step, test, test_class_IoU_by_step, train, val, weights.
    """
    curves = Logger(progress=False)
    try:
        curves.open(log_folder(opts, task), 0)
    except UserError as error:  # the scores are recorded; this file is no reason to end a run
        log.info(f"note: no curves over steps: {error}")
        return
    for step, entry in documents.read(results.csv_path(opts, task).with_suffix(".json"))["steps"].items():
        figures = {f"mIoU_by_step/{key}": entry[key] for key in ("old", "new", "all")}
        figures |= {f"test_class_IoU_by_step/{name}": iou for name, iou in entry.get("class_iou", {}).items()}
        curves.scalars({name: value for name, value in figures.items() if value is not None}, int(step))
    plain = {key: value for key, value in plain_options(opts).items() if key not in MAY_CHANGE_ON_RESUME - {"lr"}}
    shown = {key: value if isinstance(value, str | float | int) else str(value) for key, value in plain.items()}
    derived = ("lr_of_step", "step_ckpt")  # from --lr, and from where the files lie
    curves.hyperparameters(
        {key: value for key, value in shown.items() if plain[key] is not None and key not in derived}
    )
    curves.close()
