"""The description in a checkpoint or in the state of a run: step and task, and the options of the training."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.checkpointing.structure import PART_OF_FILE_NAME, check_history
from utils.errors import UserError
from utils.types import TaskLike

#: Options that do not change the numbers of a run.
MAY_CHANGE_ON_RESUME = frozenset(
    # paths of files, amount of output
    (
        "config",
        "preset",
        "data_root",
        "task_file",
        "palette",
        "checkpoint",
        "results",
        "logdir",
        "date",
        "name",
        "pretrained",
        "no_pretrained",
    )
    + ("debug", "no_progress", "print_interval", "sample_num", "pictures", "visualize")
    + ("dry_run", "check_data", "list_methods")
    # start and saving of the run
    + (
        "resume",
        "step",
        "test",
        "no_test",
        "trial_batch",
        "local_rank",
        "device",
        "threads",
        "num_workers",
        "code_directory",
    )
    + ("ckpt_interval", "ckpt_minutes", "skip_nonfinite")
    # how the images of the test are seen, which its results say
    + ("scales", "flip")
    # only its value for this step matters, which is stored under another name
    + ("lr",)
)

#: Keys of `describe`.
DESCRIPTION = {"dataset", "name", "step", "steps"}


def check_header(path: Path, state: dict[str, Any], own: bool = False) -> None:
    """Refuse a file whose description is missing or is not made of plain values.

    Args:
        path: the file.
        state: its content.
        own: it is a file of this program; official files have no description.

    Raises:
        UserError: names the file.
    """
    described, options = state.get("task"), state.get("options", None if own else {})
    schedule, history = state.get("scheduler_state"), state.get("history", [])
    try:
        json.dumps([described, options])
        check_history(history)
        known = (described is None and not own) or (isinstance(described, dict) and _is_description(described))
        counted = schedule is None or (isinstance(schedule, dict) and _is_count(schedule.get("last_epoch", 0)))
        counted = counted and all(_is_count(state.get(key, 0)) for key in ("iterations", "iterations_before"))
        plain = (
            isinstance(options, dict)
            and all(isinstance(key, str) for key in options)
            # The date becomes part of the file name of the results; it must not contain a path
            and PART_OF_FILE_NAME.fullmatch(options.get("date", "none")) is not None
        )
    except (TypeError, ValueError):
        known = counted = plain = False
    if not (known and counted and plain):
        raise UserError(
            f"{path} does not say what it learned as this program does; name a file that a finished step wrote"
        )


def _is_count(value: Any) -> bool:
    """Whether a value is an integer that a curve can have as its abscissa; True and False are refused."""
    return type(value) is int and 0 <= value < 2**63


def _is_description(described: dict[str, Any]) -> bool:
    """Whether a dictionary is one that `describe` returns: of a step, with the class ids of all steps up to it."""
    if set(described) != DESCRIPTION or not all(isinstance(described[key], str) for key in ("dataset", "name")):
        return False
    step, steps = described["step"], described["steps"]
    if type(step) is not int or not isinstance(steps, list) or not 0 <= step == len(steps) - 1:
        return False
    ids = [class_id for ids in steps for class_id in (ids if isinstance(ids, list) and ids else [None])]
    return all(type(class_id) is int and 0 <= class_id <= 255 for class_id in ids) and len(set(ids)) == len(ids)


def iterations_of(state: Mapping[str, Any]) -> tuple[int, int]:
    """Iterations of the steps before that of a checkpoint, as far as it says, and of its own step."""
    own = state.get("iterations", (state.get("scheduler_state") or {}).get("last_epoch", 0))
    return state.get("iterations_before", 0), own


def describe(task: TaskLike) -> dict[str, Any]:
    """Data set, step and class order of a task, as plain values."""
    steps = [list(step) for step in task.steps[: task.step + 1]]
    return {"dataset": task.dataset, "name": task.name, "step": task.step, "steps": steps}


def plain_options(opts: Namespace) -> dict[str, Any]:
    """Options as plain values that load without unpickling code."""

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)

    return {
        key: plain(value)
        for key, value in sorted(vars(opts).items())
        if key not in ("explicit", "preset_applied", "task_preset")
    }
