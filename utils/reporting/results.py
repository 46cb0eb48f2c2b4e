"""The results of a run: the official CSV with one row per step, and a JSON with everything that the CSV has no column for.

Scores (IoU, accuracy and their means) are percentages in the JSON, as its "unit" says, in TensorBoard and on the terminal. The CSV has
the format of the official programs, with fractions, which their average_csv.py expects.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch
from filelock import FileLock

from metrics.summary import missing_steps, summarise
from utils.checkpointing import checkpoint_files
from utils.checkpointing.header import MAY_CHANGE_ON_RESUME, plain_options
from utils.checkpointing.structure import PART_OF_FILE_NAME
from utils.errors import UserError
from utils.reporting import pictures
from utils.reporting.documents import UNIT, epoch_in_percent, percent, read
from utils.types import TaskLike

#: Entry of the official CSV for a class that is not learned yet or does not occur.
ABSENT = "x"
#: Options that change the scores of given weights.
EVALUATION_OPTIONS = (
    *(
        "data_root",
        "shapes_val",
        "test_on_val",
        "val_on_trainset",
        "cross_val",
        "crop_val",
        "crop_size",
        "ignore_test_bg",
    ),
    *("dont_predict_bg", "pooling", "opt_level", "amp_dtype"),
)
#: Further ones, which are recorded only where they are set: the results of earlier versions do not have them.
VIEW_OPTIONS = ("scales", "flip")


def csv_path(opts: Namespace, task: TaskLike) -> Path:
    """`results/<date>_<dataset>_<task>_<name>.csv`."""
    return Path(opts.results) / f"{opts.date}_{task.dataset}_{task.name}_{opts.name}.csv"


def recorded(opts: Namespace, task: TaskLike, model_state: dict[str, Any]) -> bool:
    """Whether CSV and JSON have the test of exactly these weights, not of an earlier training of the step.

    Args:
        opts: results, date, name.
        task: which step.
        model_state: weights by name, without the wrapper's prefix.
    """
    path = csv_path(opts, task)
    entry = _read_or_empty(path.with_suffix(".json"))["steps"].get(str(task.step), {})
    return task.step in _read_rows(path) and entry.get("weights_sha256") == checkpoint_files.digest(model_state)


def origin(opts: Namespace, checkpoint: str | Path, trained_with: dict[str, Any] | None) -> dict[str, Any]:
    """Identify the run to which the test of a step belongs. A later test replaces it only if their origins are equal.

    Args:
        opts: results, and the options of the test.
        checkpoint: file of the tested weights.
        trained_with: the options that the weights were trained with; None for an official checkpoint, which does not contain them.

    Returns:
        Part of the step's entry in the JSON. The path is relative to the results, so that both can be moved together.
    """
    decisive = (
        None if trained_with is None else {k: v for k, v in trained_with.items() if k not in MAY_CHANGE_ON_RESUME}
    )
    return {
        "checkpoint": os.path.relpath(checkpoint, opts.results),
        "trained_with": decisive,
        "evaluation": _evaluation(opts),
    }


def check(opts: Namespace, task: TaskLike, ours: dict[str, Any]) -> None:
    """Refuse existing results that could not be continued; called before the training.

    Args:
        opts: results, date, name.
        task: the step that will be tested.
        ours: of `origin`; for weights that exist already, their "weights_sha256" too.

    Raises:
        UserError: names the file.
        OSError: a file cannot be read.
    """
    path = csv_path(opts, task)
    checkpoint_files.require_places(path, path.with_suffix(".json"))
    _read_rows(path)
    document = _read_or_empty(path.with_suffix(".json"))
    _require_task(path, document, task)
    _require_same_run(path, document, {str(task.step): ours})


def missing(opts: Namespace, task: TaskLike) -> list[int]:
    """The steps before this one for which the results have no scores."""
    return missing_steps(map(int, _read_or_empty(csv_path(opts, task).with_suffix(".json"))["steps"]), task.step)


def write(
    opts: Namespace, task: TaskLike, scores: dict[str, Any], class_names: list[str], history: list[dict]
) -> dict[str, Any]:
    """Record the test of a step. If the run has a test of this step already, it is replaced.

    Args:
        opts: results, date, name.
        task: which step was tested.
        scores: of `Trainer.evaluate`, fractions, with the SHA-256 of the "Weights" and their "Origin".
        class_names: by position in the order of learning.
        history: of `Trainer`, one entry for each epoch.

    Returns:
        The step's entry in the JSON.

    Raises:
        UserError: the file holds the results of another task, or of another run of this step.
        OSError: the folder cannot be written; neither file is changed.
    """
    class_iou = scores["Class IoU"]
    num_classes = max(len(task.at(task.last_step).label_ids), len(class_iou))
    columns = [str(class_iou[c]) if class_iou.get(c) is not None else ABSENT for c in range(num_classes)]
    row = f"{task.step},{','.join(columns)},{scores['Mean IoU']}"
    entry = _entry(opts, task, scores, class_names, history)
    return _record(opts, task, {task.step: row}, {str(task.step): entry})[str(task.step)]


def describe(entry: dict[str, Any], labels: str) -> str:
    """The scores of a step, as one line of text.

    Args:
        entry: of the step, as `write` returns it.
        labels: which labels the test counts, as text.
    """

    def shown(key: str) -> str:
        return "-" if entry[key] is None else f"{entry[key]:.2f}"

    return (
        f"test mIoU old {shown('old')}, new {shown('new')}, all {shown('all')}, average over steps {shown('average_over_steps')} "
        f"(%, {labels})"
    )


def copy_scores(opts: Namespace, task: TaskLike, state: dict[str, Any]) -> bool:
    """Copy the scores of a checkpoint, and of the steps before it, from the results of the run that wrote it.

    Args:
        opts: results, date, name of the run that goes on from the checkpoint.
        task: the step of the checkpoint.
        state: the checkpoint as `store.read` returns it.

    Returns:
        Whether the results of this run have them now: of these very weights, and tested with the same options.

    Raises:
        UserError: the file of this run holds the results of another task, or of other runs of these steps.
        OSError: the folder cannot be written; neither file is changed.
    """
    if recorded(opts, task, state["model_state"]):
        return True
    theirs = Namespace(**{**vars(opts), **{key: state.get("options", {}).get(key) for key in ("date", "name")}})
    if not all(PART_OF_FILE_NAME.fullmatch(str(part)) for part in (theirs.date, theirs.name)):
        return False
    path = csv_path(theirs, task)
    try:
        if not recorded(theirs, task, state["model_state"]):
            return False
        document, rows = read(path.with_suffix(".json")), _read_rows(path)
        _require_task(path, document, task)
    except UserError:  # the file is of another task, or not of this program
        return False
    steps = range(task.step + 1)
    entries = {str(step): document["steps"].get(str(step), {}) for step in steps}
    known = all(step in rows and entries[str(step)].get("evaluation") == _evaluation(opts) for step in steps)
    if known:
        _record(opts, task, {step: rows[step] for step in steps}, entries)
        pictures.copy_steps(pictures.folder_of(path), pictures.folder_of(csv_path(opts, task)), task.step)
    return known


def _record(opts: Namespace, task: TaskLike, rows: dict[int, str], entries: dict[str, Any]) -> dict[str, Any]:
    """Add rows to the CSV and entries to the JSON; returns all entries of the JSON."""
    path = csv_path(opts, task)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.stem}.lock")):
        rows = _read_rows(path) | rows
        document = _read_or_empty(path.with_suffix(".json"))
        _require_task(path, document, task)
        _require_same_run(path, document, entries)
        steps = document["steps"] | entries
        document |= _header(opts, task) | {"steps": {step: steps[step] for step in sorted(steps, key=int)}}
        _summarise(document, task.at(0).num_total)
        # The CSV is written first, because `recorded` trusts the digest of the weights in the JSON
        table = "".join(f"{rows[step]}\n" for step in sorted(rows))
        _replace({path: table, path.with_suffix(".json"): json.dumps(document, indent=1)})
    return document["steps"]


def _require_task(path: Path, document: dict[str, Any], task: TaskLike) -> None:
    """Refuse to mix the results of two tasks, or of two orders of classes under one name.

    Raises:
        UserError: names the file.
    """
    theirs = document.get("class_order")
    if document["steps"] and theirs != [list(step) for step in task.steps]:
        raise UserError(
            f"{path.with_suffix('.json')} holds the results of another order of classes, {str(theirs)[:200]}; choose another --name or "
            "--date, or move it away"
        )


def _require_same_run(path: Path, document: dict[str, Any], entries: dict[str, Any]) -> None:
    """Refuse to replace the tests of other runs: of another checkpoint file, or with other options.

    Raises:
        UserError: names the file and what differs.
    """
    for step, ours in entries.items():
        differing = _differences(document["steps"].get(step, {}), ours)
        if differing:
            raise UserError(
                f"{path.with_suffix('.json')} has the test of step {step} by another run ({'; '.join(differing)}); choose "
                "another --name, --date or --results, or move the file and its CSV away"
            )


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """The differences between two entries of a step, as text; entries of earlier versions do not name the checkpoint."""
    if "checkpoint" not in theirs:
        return []
    keys = ["evaluation"]
    if theirs["weights_sha256"] != ours.get("weights_sha256"):
        keys += ["checkpoint", "trained_with"]
    pairs: dict[str, tuple[Any, Any]] = {}
    for key in keys:
        before, now = theirs.get(key), ours.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            pairs |= {name: (before.get(name), now.get(name)) for name in sorted({*before, *now} - {"data_root"})}
        else:
            pairs[key] = (before, now)
    found = [f"{name} was {before!r}, is {now!r}" for name, (before, now) in pairs.items() if before != now]
    return found[:3] + [f"{len(found) - 3} more"] * (len(found) > 3)


def _summarise(document: dict[str, Any], num_base: int) -> None:
    """Compute the summary figures of all steps; a new entry may change the averages of others."""
    entries = document["steps"]
    figures = summarise({int(step): list(entry["class_iou"].values()) for step, entry in entries.items()}, num_base)
    for step, summary in figures.items():
        entries[str(step)] |= summary._asdict()
    document["average_over_steps"] = figures[max(figures)].average_over_steps


def _evaluation(opts: Namespace) -> dict[str, Any]:
    """The options on which the scores of given weights depend."""
    return {
        dest: value
        for dest, value in plain_options(opts).items()
        if dest in EVALUATION_OPTIONS or (dest in VIEW_OPTIONS and value)
    }


def _entry(
    opts: Namespace, task: TaskLike, scores: dict[str, Any], class_names: list[str], history: list[dict]
) -> dict[str, Any]:
    """The entry of a step in the JSON, without the scores of `metrics.summary`."""
    fractions = {
        "overall_accuracy": scores["Overall Acc"],
        "mean_accuracy": scores["Mean Acc"],
        "frequency_weighted_accuracy": scores["FreqW Acc"],
        "class_iou": {name: scores["Class IoU"][i] for i, name in enumerate(class_names)},
        "class_accuracy": {name: scores["Class Acc"][i] for i, name in enumerate(class_names)},
    }
    return percent(fractions) | {
        **scores["Origin"],
        "weights_sha256": scores["Weights"],
        "confusion_matrix": scores["Confusion Matrix"].tolist(),
        "epochs": [epoch_in_percent(epoch) for epoch in history],
    }


def _header(opts: Namespace, task: TaskLike) -> dict[str, Any]:
    return {
        "unit": UNIT,
        "dataset": task.dataset,
        "task": task.name,
        "name": opts.name,
        "method": opts.method,
        "class_order": [list(step) for step in task.steps],
        "base_classes": task.at(0).num_total,
        "options": plain_options(opts),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": version("torchvision"),
            "numpy": numpy.__version__,
            "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        },
        "commit": commit(),
    }


def commit() -> str | None:
    """Commit of this code, with a mark for local changes; None outside a git checkout."""
    folder = Path(__file__).resolve().parents[2]
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
    """Rows of an existing CSV by step; other lines, which this program does not write, are dropped."""
    if not path.is_file():
        return {}
    rows = {}
    for line in path.read_text(errors="replace").splitlines():
        step = line.split(",", 1)[0]
        if step.isdecimal():
            rows[int(step)] = line
    return rows


def _read_or_empty(path: Path) -> dict[str, Any]:
    """The JSON of a run; if there is no file, a document without steps."""
    return read(path) if path.is_file() else {"steps": {}}


def _replace(texts: dict[Path, str]) -> None:
    """Write under other names, flush to the disk, rename: no reader gets an incomplete file, and a full disk changes no file."""
    # The names are fixed: callers hold the lock, and killed processes leave at most one such file each
    asides = {path: path.with_name(f".{path.name}.writing") for path in texts}
    try:
        for path, aside in asides.items():
            with open(aside, "w") as file:
                file.write(texts[path])
                file.flush()
                os.fsync(file.fileno())
        for path, aside in asides.items():
            os.replace(aside, path)
    except OSError as error:
        raise OSError(
            error.errno,
            f"the results cannot be written ({error.strerror}); free some space or repair the disk, then repeat the command with --resume: "
            "only the test is repeated",
            str(next(iter(texts))),
        ) from error
    finally:
        for aside in asides.values():
            aside.unlink(missing_ok=True)
