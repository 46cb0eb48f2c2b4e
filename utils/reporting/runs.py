"""The runs of a report, read from their JSON files and grouped by task and, within a task, by method."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metrics.summary import mean, require_complete
from utils.errors import UserError
from utils.reporting import documents

#: Options that may differ between the runs of one method: the seed, names and places of files, and what does not change a result.
NOT_OF_THE_METHOD = frozenset(
    (
        "random_seed",
        "name",
        "date",
        "checkpoint",
        "results",
        "logdir",
        "data_root",
        "step_ckpt",
        "ckpt",
        "step",
        "resume",
    )
    + (
        "config",
        "preset",
        "threads",
        "num_workers",
        "no_progress",
        "device",
        "local_rank",
        "sample_num",
        "pictures",
        "visualize",
    )
    + ("print_interval", "ckpt_interval", "ckpt_minutes", "val_interval", "trial_batch", "debug", "explicit")
)


@dataclass(frozen=True)
class Run:
    """One results file.

    Attributes:
        path: of the JSON.
        label: its name; differs from those of all other runs of the report.
        document: as `utils.reporting.documents.read` returns it.
        row: name of the row of a study to which it belongs; "" if there is none.
    """

    path: Path
    label: str
    document: Mapping[str, Any]
    row: str = ""

    @property
    def steps(self) -> dict[int, Mapping[str, Any]]:
        """The entries of the steps, from step 0 on."""
        return {int(step): entry for step, entry in self.document["steps"].items()}

    @property
    def last(self) -> Mapping[str, Any]:
        """The entry of the last step."""
        return self.steps[max(self.steps)]

    def figure(self, key: str) -> dict[int, float | None]:
        """One figure of `metrics.summary`, in percent, by step."""
        return {step: entry[key] for step, entry in self.steps.items()}


@dataclass(frozen=True)
class Group:
    """The runs of one method on one task, which differ only in the seed.

    Attributes:
        label: name in the report.
        runs: one for each seed.
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def steps(self) -> list[int]:
        """The steps that any of the runs has."""
        return sorted({step for run in self.runs for step in run.steps})

    def values(self, key: str, step: int) -> list[float]:
        """A figure of a step, of each run that has it."""
        found = [run.figure(key).get(step) for run in self.runs]
        return [value for value in found if value is not None]

    def last_values(self, key: str) -> list[float | None]:
        """A figure of the last step of each run."""
        return [run.last[key] for run in self.runs]

    def class_iou(self) -> tuple[list[str], dict[int, list[float | None]]]:
        """Names of the classes in the order of learning, and for each step their IoU, mean over the runs; None where no run has one."""
        entries = {
            step: [run.steps[step].get("class_iou", {}) for run in self.runs if step in run.steps]
            for step in self.steps
        }
        names = list(dict.fromkeys(name for runs in entries.values() for ious in runs for name in ious))
        return names, {
            step: [mean(ious.get(name) for ious in runs) for name in names] for step, runs in entries.items()
        }


@dataclass(frozen=True)
class TaskRuns:
    """The runs of one task; runs of different tasks, or orders of classes, cannot be compared.

    Attributes:
        dataset, task: names.
        base_classes: classes of step 0, background included; None in files of early versions.
        groups: in the order in which the files were given.
        references: methods that learned the same classes in one step, such as Joint.
        variant: name of the variant of a study to which the runs belong; "" if there is none.
    """

    dataset: str
    task: str
    base_classes: int | None
    groups: tuple[Group, ...]
    references: tuple[Group, ...] = ()
    variant: str = ""

    @property
    def title(self) -> str:
        """Data set, task and variant."""
        return f"{self.dataset} {self.task}" + (f", {self.variant}" if self.variant else "")

    @property
    def runs(self) -> list[Run]:
        """The runs of all groups."""
        return [run for group in self.groups for run in group.runs]

    @property
    def class_ids(self) -> list[int]:
        """The class ids of all steps, sorted."""
        return sorted(label for step in self.runs[0].document.get("class_order", ()) for label in step)

    def figures_of_reference(self, group: Group) -> dict[str, list[float | None]]:
        """Old, new and all of a reference, for each of its runs, with the old and new classes of this task.

        Args:
            group: one of `references`.
        """
        names, _ = self.groups[0].class_iou()
        found: dict[str, list[float | None]] = {"old": [], "new": [], "all": []}
        for run in group.runs:
            ious = run.last.get("class_iou", {})
            learned = [ious.get(name) for name in names]
            found["old"].append(mean(learned[: self.base_classes]))
            found["new"].append(mean(learned[self.base_classes :]))
            found["all"].append(run.last["all"])
        return found


def find(paths: Sequence[Path]) -> list[Path]:
    """Find the results files among paths and in folders.

    Args:
        paths: JSON files, or folders. In a folder that contains a folder "results", that one is searched.

    Raises:
        UserError: a path that does not exist, a folder without results, or a file that is given twice.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist; name the JSON files of runs, or folders that contain some")
        if not path.is_dir():
            found.append(path)
            continue
        inside = path / "results" if (path / "results").is_dir() else path
        files = sorted(inside.glob("*.json"))
        if not files:
            raise UserError(f"{inside} holds no JSON file; name the folder that --results named, or one above it")
        found += files
    twice = [path for path, count in Counter(path.resolve() for path in found).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]} is given twice; name it once")
    return found


def read(paths: Sequence[Path]) -> list[Run]:
    """Read results files.

    Args:
        paths: files and folders, as `find` takes them.

    Returns:
        The runs. A run is labelled with its name or, where several have that name, with the name or the path of its file.

    Raises:
        UserError: a file that is not the JSON of a run, or that lacks the scores of a step.
        OSError: a file cannot be read.
    """
    files = find(paths)
    found = [documents.read(path) for path in files]
    for path, document in zip(files, found):
        if not document["steps"]:
            raise UserError(f"{path} has the scores of no step; leave it out, or test a step of that run first")
        require_complete(map(int, document["steps"]), path)
    labels = _different([document["name"] for document in found], [path.stem for path in files])
    labels = _different(labels, [str(path.with_suffix("")) for path in files])
    return [Run(*parts) for parts in zip(files, labels, found)]


def _different(labels: Sequence[str], longer: Sequence[str]) -> list[str]:
    """The labels; each one that occurs more than once is replaced by its longer form."""
    count = Counter(labels)
    return [long if count[label] > 1 else label for label, long in zip(labels, longer)]


def without_beginnings(found: Sequence[Run]) -> tuple[list[Run], dict[str, str]]:
    """Leave out runs whose steps are the first steps of a longer run, such as the step 0 that several methods share.

    Args:
        found: of any tasks.

    Returns:
        The other runs, and by the label of each run left out that of a run which has its steps: the same weights, tested in the
        same way.
    """
    tests = {run.label: _tests(run) for run in found}
    beginnings = {
        run.label: longer.label
        for run in found
        for longer in found
        if tests[run.label] and tests[run.label].items() < tests[longer.label].items()
    }
    return [run for run in found if run.label not in beginnings], beginnings


def _tests(run: Run) -> dict[int, str]:
    """By step the tested weights and how they were tested; empty for a run of an early version, which does not say."""
    if not all(entry.get("weights_sha256") for entry in run.steps.values()):
        return {}
    return {step: f"{entry['weights_sha256']} {entry.get('evaluation')}" for step, entry in run.steps.items()}


def by_task(runs: Sequence[Run]) -> list[TaskRuns]:
    """Group runs by task and, within a task, by row of their study or, where they have none, by method and options.

    Args:
        runs: of any tasks.

    Returns:
        In the order in which the tasks first occur. A task of one step whose classes are those of a task of several steps is not
        listed by itself: its methods are references of the other.
    """
    found: dict[str, list[Run]] = {}
    for run in runs:
        key = str([run.document.get(name) for name in ("dataset", "task", "class_order")])
        found.setdefault(key, []).append(run)
    tasks = [_task(runs) for runs in found.values()]
    single = [task for task in tasks if len(task.runs[0].document.get("class_order", ())) == 1]
    several = [task for task in tasks if task not in single]
    used: list[TaskRuns] = []
    for place, task in enumerate(tasks):
        like = [other for other in single if (other.dataset, other.class_ids) == (task.dataset, task.class_ids)]
        complete = task.base_classes is not None and max(task.groups[0].steps) > 0
        if task in several and complete and like:
            used += like
            tasks[place] = replace(task, references=tuple(group for other in like for group in other.groups))
    return [task for task in tasks if task not in used]


def _task(runs: Sequence[Run]) -> TaskRuns:
    methods: dict[str, list[Run]] = {}
    for run in runs:
        methods.setdefault(run.row or _method_and_options(run), []).append(run)
    groups = list(methods.values())
    names = [runs[0].row or runs[0].document.get("method") or _name(runs) for runs in groups]
    labels = _different(_different(names, [_name(runs) for runs in groups]), [runs[0].label for runs in groups])
    first = runs[0].document
    return TaskRuns(
        first["dataset"], first["task"], first.get("base_classes"), tuple(map(Group, labels, map(tuple, groups)))
    )


def _method_and_options(run: Run) -> str:
    """What the runs of one method have in common: their name without the seed, and the options that may not differ."""
    options = run.document.get("options")
    same = sorted((key, value) for key, value in options.items() if key not in NOT_OF_THE_METHOD) if options else ()
    return f"{_without_seed(run.document['name'])} {same if options else run.label}"


def _name(runs: Sequence[Run]) -> str:
    """The name of a group of runs; without the seed if there are several."""
    return _without_seed(runs[0].document["name"]) if len(runs) > 1 else runs[0].label


def _without_seed(name: str) -> str:
    return re.sub(r"[-_]seed-?\d+$", "", name)
