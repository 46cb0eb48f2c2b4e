"""The results of a run: the official CSV, one row a step, and a JSON beside it with everything the CSV has no column for."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy
import torch
import torchvision
from filelock import FileLock

from dataset.tasks import Task
from metrics.stream_metrics import group_means
from utils.store import plain_options

#: What the official CSV writes for a class that is not learned yet or does not occur.
ABSENT = "x"


def csv_path(opts: Namespace, task: Task) -> Path:
    """`results/<date>_<dataset>_<task>_<name>.csv`."""
    return Path(opts.results) / f"{opts.date}_{task.dataset}_{task.name}_{opts.name}.csv"


def recorded(opts: Namespace, task: Task) -> bool:
    """Whether the CSV has a row for this step."""
    return task.step in _read_rows(csv_path(opts, task))


def write(
    opts: Namespace, task: Task, scores: dict[str, Any], class_names: list[str], history: list[dict]
) -> dict[str, Any]:
    """Record the test of a step; a step that was tested before has its row replaced.

    Args:
        opts: results, date, name.
        task: which step was tested.
        scores: of `Trainer.evaluate`.
        class_names: by position in the order of learning.
        history: of `Trainer`, one entry an epoch.

    Returns:
        The step's entry in the JSON.

    Raises:
        OSError: the folder cannot be written; neither file is changed.
    """
    path = csv_path(opts, task)
    path.parent.mkdir(parents=True, exist_ok=True)
    class_iou = scores["Class IoU"]
    num_classes = max(len(task.at(task.last_step).label_ids), len(class_iou))
    columns = [str(class_iou[c]) if class_iou.get(c) is not None else ABSENT for c in range(num_classes)]
    with FileLock(path.with_suffix(".lock")):
        rows = _read_rows(path)
        rows[task.step] = f"{task.step},{','.join(columns)},{scores['Mean IoU']}"
        document = _read_json(path.with_suffix(".json"))
        entry = _entry(task, scores, class_names, history)
        document |= _header(opts, task)
        document["steps"] = {**document.get("steps", {}), str(task.step): entry}
        means = [document["steps"][str(s)]["all"] for s in range(task.step + 1) if str(s) in document["steps"]]
        document["average_over_steps"] = sum(means) / len(means)
        entry["average_over_steps"] = document["average_over_steps"]
        _replace(path.with_suffix(".json"), json.dumps(document, indent=1))
        _replace(path, "".join(f"{rows[step]}\n" for step in sorted(rows)))
    return entry


def _entry(task: Task, scores: dict[str, Any], class_names: list[str], history: list[dict]) -> dict[str, Any]:
    means = group_means(scores["Class IoU"], task.at(0).num_total)
    return {
        **means,
        "overall_accuracy": scores["Overall Acc"],
        "mean_accuracy": scores["Mean Acc"],
        "frequency_weighted_accuracy": scores["FreqW Acc"],
        "class_iou": {name: scores["Class IoU"][i] for i, name in enumerate(class_names)},
        "class_accuracy": {name: scores["Class Acc"][i] for i, name in enumerate(class_names)},
        "confusion_matrix": scores["Confusion Matrix"].tolist(),
        "epochs": history,
    }


def _header(opts: Namespace, task: Task) -> dict[str, Any]:
    return {
        "dataset": task.dataset,
        "task": task.name,
        "name": opts.name,
        "method": opts.method,
        "class_order": [list(step) for step in task.steps],
        "options": plain_options(opts),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": numpy.__version__,
            "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        },
        "commit": commit(),
    }


def commit() -> str | None:
    """Commit of the code that runs, with a mark for local changes; None outside a git checkout."""
    folder = Path(__file__).resolve().parent.parent
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return described.stdout.strip() or None
    return None


def _read_rows(path: Path) -> dict[int, str]:
    """Rows of an existing CSV by step; a line that is no row is dropped, it cannot come from this program."""
    if not path.is_file():
        return {}
    rows = {}
    for line in path.read_text().splitlines():
        step = line.split(",", 1)[0]
        if step.isdigit():
            rows[int(step)] = line
    return rows


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"results file {path} is no valid JSON; move it away, then run again") from error
    return document if isinstance(document, dict) else {}


def _replace(path: Path, text: str) -> None:
    """Write aside, flush to the disk, rename: a reader never sees half a file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        with open(aside, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
