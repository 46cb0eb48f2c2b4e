"""Task: which classes each step learns. The only part of the program that knows the incremental protocol.

A task is an ordered partition of the classes of a data set, or of some of them. Step 0 learns the base classes, the first of
which is background 0; each later step learns further classes. Inside the program a class is its position in the order of
learning; the look-up tables of `Task.label_table` map the ids of the data set to these positions. The official tasks are in
tasks.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.options.spelling import suggestion
from utils.types import IGNORE

OFFLINE = "offline"
#: Which classes the labels of a training step keep (`--data_masking`), and the labels of a test.
LABEL_KINDS = ("current", "current+old", "new", "test")

_TABLES = Path(__file__).with_name("tasks.json")
_MAX_TASK_FILE = 1 << 20  # bytes; task files are much smaller
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")  # the name becomes part of file names


@dataclass(frozen=True)
class Task:
    """One step of a class-incremental (or, with `domain`, a domain-incremental) task.

    Class ids are those of the data set. In a domain-incremental task the ids of the steps are domains (cities), the
    `domain_labels` labels are the same at every step, and no label is a background that contains other classes.

    Attributes:
        dataset: name of the data set, a key of `dataset.DATASETS`.
        name: name of the task, such as "15-5s".
        step: the step to train, 0 for the base classes.
        steps: class ids learned by each step, in order.
        domain: whether the steps are domains rather than classes.
        domain_labels: number of labels of a domain-incremental task.

    Raises:
        UserError: if the task has no such step; the message names those it has.
    """

    dataset: str
    name: str
    step: int
    steps: tuple[tuple[int, ...], ...]
    domain: bool = False
    domain_labels: int = 19

    def __post_init__(self) -> None:
        if not (isinstance(self.step, int) and 0 <= self.step < len(self.steps)):
            raise UserError(
                f"task {self.name!r} of {self.dataset} has no step {self.step}: its steps are 0 to {self.last_step}"
            )

    @property
    def last_step(self) -> int:
        """Number of the last step."""
        return len(self.steps) - 1

    @property
    def new(self) -> tuple[int, ...]:
        """Class (or domain) ids of this step; background 0 belongs to step 0."""
        return self.steps[self.step]

    @property
    def old(self) -> tuple[int, ...]:
        """Class (or domain) ids of the steps before this one, in the order of learning."""
        return tuple(c for step in self.steps[: self.step] for c in step)

    @property
    def order(self) -> tuple[int, ...]:
        """Class (or domain) ids of steps 0 to this one, in the order of learning, background first."""
        return self.old + self.new

    @property
    def seen(self) -> tuple[int, ...]:
        """The same as `order`: everything learned by the end of this step."""
        return self.order

    @property
    def label_ids(self) -> tuple[int, ...]:
        """For each output channel the id of its label in the data set."""
        return tuple(range(self.domain_labels)) if self.domain else self.order

    @property
    def num_new(self) -> int:
        """C_new, the number of channels that this step adds."""
        if self.domain:
            return 0 if self.step else self.domain_labels
        return len(self.new)

    @property
    def num_old(self) -> int:
        """C_old, the number of channels known before this step, background included."""
        if self.domain:
            return self.domain_labels if self.step else 0
        return len(self.old)

    @property
    def num_total(self) -> int:
        """C = C_old + C_new."""
        return self.num_old + self.num_new

    @property
    def classes_per_step(self) -> list[int]:
        """Output channels of each classifier up to this step, such as [16, 5]; one classifier for all domains."""
        if self.domain:
            return [self.domain_labels]
        return [len(step) for step in self.steps[: self.step + 1]]

    def at(self, step: int) -> Task:
        """The same task at another step."""
        return Task(self.dataset, self.name, step, self.steps, self.domain, self.domain_labels)

    def label_table(self, kind: str, ignore_background: bool = False) -> np.ndarray:
        """The look-up table from the class ids of a mask to the labels of this step.

        Args:
            kind: "current": the step's classes keep an id (their position in the order of learning), old and future
                ones become background 0. "current+old": old classes keep theirs too (also what `--no_mask` does).
                "new": background and the step's classes keep theirs, old and future classes are ignored.
                "test": as "current+old".
            ignore_background: what would become background is ignored instead (`--disable_background` in training,
                `--ignore_test_bg` in a test).

        Returns:
            (256,) uint8; entry 255 is 255. In a domain-incremental task the labels pass unchanged.

        Raises:
            UserError: for another kind; "all" is an official spelling that the official program does not implement.

        Reference:
            PLOP (CVPR 2021) and MiB (CVPR 2020), section "experimental protocol".
        """
        if kind not in LABEL_KINDS:
            raise UserError(f"--data_masking {kind!r} is not one of {', '.join(LABEL_KINDS[:3])}")
        if self.domain:
            table = np.full(256, IGNORE, dtype=np.uint8)
            table[: self.domain_labels] = np.arange(self.domain_labels)
            return table
        background = IGNORE if ignore_background else 0
        table = np.full(256, IGNORE if kind == "new" else background, dtype=np.uint8)
        table[0] = background
        kept = self.new if kind in ("current", "new") else self.order
        for position, class_id in enumerate(self.order):
            if class_id in kept and class_id != 0:
                table[class_id] = position
        table[IGNORE] = IGNORE
        return table


@lru_cache(maxsize=1)
def _tables() -> dict[str, Any]:
    return json.loads(_TABLES.read_text(encoding="utf-8"))


#: Data sets whose number of classes is in tasks.json; for others it is an argument of `load`.
KNOWN = tuple(_tables())


#: Official names of tasks by their names in papers.
_NAMES_IN_PAPERS = {("voc", "15-1"): "15-5s", ("ade", "50-50"): "50"}


def official_name(dataset: str, name: str) -> str:
    """The official name of a task, given that name or its name in papers, such as "15-5s" for "15-1" on VOC."""
    return _NAMES_IN_PAPERS.get((dataset, name), name)


def names(dataset: str) -> list[str]:
    """Names of the tasks of a data set; every data set has "offline", all classes at once."""
    return [OFFLINE, *_tables().get(dataset, {}).get("tasks", {})]


def load(
    dataset: str,
    name: str | None,
    step: int,
    task_file: str | None = None,
    num_classes: int | None = None,
    domain_labels: int | None = None,
) -> Task:
    """The task of that name, or the one of a task file.

    Args:
        dataset: name of the data set.
        name: name of an official task; ignored if there is a task file, which contains a name.
        step: the step to train.
        task_file: JSON, `{"name": "pets", "steps": {"0": [0, 8, 10, 12], "1": [13], "2": [17, 15]}}`, or only the
            steps, as an object or as a list of lists. Every id at most once; 0 stands first in step 0 (in
            domain-incremental tasks it is an id like any other); ids that no step names stay background.
        num_classes: number of classes with background, or of domains, for data sets that are not in tasks.json (`folder`).
        domain_labels: number of labels of a domain-incremental data set that is not in tasks.json.

    Raises:
        UserError: unknown task or step, or a task file that is not as above; names the file and the value.
        OSError: the task file cannot be read.
    """
    facts = _tables().get(dataset, {})
    classes = num_classes or facts.get("classes")
    assert classes, f"the number of classes of {dataset} is not known"
    labels = domain_labels or facts.get("domain_labels", 0)
    if task_file:
        name, steps = _read_task_file(Path(task_file), classes, labels > 0)
    elif name is not None and name == OFFLINE:
        steps = (tuple(range(classes)),)
    elif name is not None and name in facts.get("tasks", {}):
        steps = tuple(tuple(ids) for ids in facts["tasks"][name])
    else:
        raise UserError(
            f"--task {name!r} is not a task of {dataset}: it has {', '.join(names(dataset))}; "
            f"an order of your own is given with --task_file{suggestion(str(name), names(dataset))}"
        )
    return Task(dataset, name, step, steps, *((True, labels) if labels else ()))


def _read_task_file(path: Path, classes: int, domain: bool) -> tuple[str, tuple[tuple[int, ...], ...]]:
    """Name and steps of a task file; every UserError names the file and the value."""
    with path.open("rb") as stream:
        raw = stream.read(_MAX_TASK_FILE + 1)
    if len(raw) > _MAX_TASK_FILE:
        raise UserError(f"task file {path} is larger than 1 MiB: is it another file?")
    try:
        content = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"task file {path} is not valid JSON: {error}") from None
    name, steps = path.stem, content
    if isinstance(content, dict) and "steps" in content:
        unknown = sorted(set(content) - {"name", "steps"})
        if unknown:
            raise UserError(f"task file {path} has the unknown key {unknown[0]!r}: the keys are 'name' and 'steps'")
        name, steps = content.get("name", path.stem), content["steps"]
    if not isinstance(name, str) or not _SAFE_NAME.fullmatch(name):
        raise UserError(
            f"task file {path}: the name {name!r:.80} must be 1 to 64 letters, digits, '.', '_', '+' or '-' "
            "(it becomes part of file names)"
        )
    if name in (OFFLINE, *(t for d in _tables().values() for t in d["tasks"])):
        raise UserError(f"task file {path}: {name!r} is the name of an official task, choose another")
    return name, _check_steps(path, _as_list(path, steps), classes, domain)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without equal keys, of which the standard parser would silently keep the last one."""
    unique: dict[str, Any] = {}
    for key, value in pairs:
        if key in unique:
            raise ValueError(f"the key {key!r:.80} appears twice")
        unique[key] = value
    return unique


def _as_list(path: Path, steps: Any) -> list[Any]:
    """Steps as a list, from a list or from an object whose keys are "0", "1", ... without a gap."""
    if isinstance(steps, dict):
        for key in steps:
            if not re.fullmatch(r"0|[1-9][0-9]{0,3}", key):
                raise UserError(f"task file {path} has the unknown key {key!r:.80}: steps are '0', '1', '2', ...")
        missing = [number for number in range(len(steps)) if str(number) not in steps]
        if missing:
            raise UserError(f"task file {path} has no step {missing[0]}: steps are numbered from 0 without a gap")
        steps = [steps[str(number)] for number in range(len(steps))]
    if not isinstance(steps, list):
        raise UserError(f"task file {path}: steps {steps!r:.80} must be an object or a list of lists of class ids")
    if not steps:
        raise UserError(f"task file {path} has no steps")
    return steps


def _check_steps(path: Path, steps: Sequence[Any], classes: int, domain: bool) -> tuple[tuple[int, ...], ...]:
    """The steps as tuples, checked: every id is in the data set and occurs once, and background 0 stands first in step 0."""
    home: dict[int, int] = {}
    for number, ids in enumerate(steps):
        if not isinstance(ids, list) or not ids:
            raise UserError(f"task file {path}: step {number} is {ids!r:.80}, it must be a list of class ids")
        for class_id in ids:
            if type(class_id) is not int or not 0 <= class_id < classes:
                raise UserError(
                    f"task file {path}: step {number} names class {class_id!r:.80}, "
                    f"the data set has the classes 0 to {classes - 1}"
                )
            if class_id in home:
                raise UserError(f"task file {path}: class {class_id} is in step {home[class_id]} and step {number}")
            home[class_id] = number
    if not domain and steps[0][0] != 0:
        raise UserError(f"task file {path}: background 0 must stand first in step 0, which is {steps[0]!r:.80}")
    if not domain and len(steps[0]) == 1:
        raise UserError(f"task file {path}: step 0 names only the background, it needs at least one class")
    return tuple(tuple(ids) for ids in steps)
