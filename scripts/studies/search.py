"""From the file of a search to what it varies and to the runs of run.py that it stands for.

name: tune_shapes
options: {dataset: shapes, task: 6-2, overlap: true, method: LSKD}   # of run.py, for all runs
step0: {epochs: 4}                          # for step 0 alone
later: {epochs: 3}                          # for all later steps
step: 1                                     # the step that is trained in every trial (default: 1)
seeds: [101]                                # a trial's score is the mean over them (default: [101])
confidence: 0.8                             # of the teacher, from which its prediction counts as the truth (default: 0.8)
objective: all                              # or balanced (default: all)
trials: 30
startup: 10                                 # trials at random before TPE begins (default: 10)
halving: {min_epochs: 1, reduction_factor: 2}
step_ckpt: FILE                             # optional, with one seed: a checkpoint of the step before instead of a new one
search:
  tap_schemes: {stage4: [none, pod, md], pre_logits: [md, mcd, md+mcd]}   # or: all, if mcd_groups fits the logits
  mcd_factor: {low: 0.0005, high: 0.05, log: true}
  loss_kd: [1, 3, 10]
  pod_options.switch.after.factor: {low: 0.0001, high: 0.01, log: true}   # within an option that is a JSON object
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import argparser
import dataset
import methods
from methods.lskd import SCHEMES
from scripts.studies import plan
from utils.errors import UserError
from utils.options import config
from utils.types import TAP_NAMES

KEYS = ("name", "options", "step0", "later", "step", "seeds", "confidence", "objective", "trials", "startup", "halving")
OTHER_KEYS = ("step_ckpt", "search")
#: How the score of a validation is formed: the mean IoU of all classes, or the mean of those of old and of new classes.
OBJECTIVES = ("all", "balanced")
#: Options that the search sets itself.
OWN = (*plan.OWN, "cross_val", "val_by_teacher", "no_test", "val_interval", "config", "preset")

#: Values by the name of the dimension.
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Dimension:
    """What a search varies.

    Attributes:
        name: "tap_schemes.TAP", an option, or "OPTION.KEY.KEY" within a JSON object.
        choices: the values, or None for a range.
        low, high, log: the range, both ends included, and whether it is searched on a logarithmic scale.
        whole: whether the values of the range are whole numbers.
    """

    name: str
    choices: tuple[Any, ...] | None = None
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    def contains(self, value: Any) -> bool:
        """Whether the search can choose a value."""
        if self.choices is not None:
            return value in self.choices
        return isinstance(value, int | float) and self.low <= value <= self.high

    @property
    def extremes(self) -> tuple[Any, ...]:
        """The choices, or both ends of the range."""
        return (self.low, self.high) if self.choices is None else self.choices


@dataclass(frozen=True)
class Search:
    """The file of a search; see the text of this module for its entries."""

    path: Path
    name: str
    options: dict[str, Any]
    step0: dict[str, Any]
    later: dict[str, Any]
    step: int
    seeds: tuple[int, ...]
    confidence: float
    objective: str
    trials: int
    startup: int
    min_epochs: int
    reduction_factor: int
    step_ckpt: str | None
    space: tuple[Dimension, ...]
    extra: tuple[str, ...] = field(default=())

    @property
    def identity(self) -> str:
        """What must be the same to go on with a search, as text; the number of trials may be raised."""
        free = ("path", "trials", "space", "extra")
        return json.dumps(
            {**{k: v for k, v in vars(self).items() if k not in free}, "space": list(map(vars, self.space))}
        )


def read(path: Path, extra: Sequence[str] = ()) -> Search:
    """Read and check the file of a search.

    Args:
        path: YAML or JSON.
        extra: further words of run.py, for all runs.

    Raises:
        UserError: names the file, the entry and the remedy.
    """
    document = config.load(path)
    if unknown := sorted(set(document) - {*KEYS, *OTHER_KEYS}):
        raise UserError(
            f"{path}: {unknown[0]!r} is not an entry of a search; the entries are {', '.join((*KEYS, *OTHER_KEYS))}"
        )
    mappings = {key: plan.mapping(document, key, path) for key in ("options", "step0", "later", "search", "halving")}
    for place in ("options", "step0", "later"):
        if taken := sorted(set(mappings[place]) & set(OWN)):
            raise UserError(f"{path}, {place}: {taken[0]!r} is set by the search itself; leave it out")
    halving = {"min_epochs": 1, "reduction_factor": 2} | mappings["halving"]
    if unknown := sorted(set(halving) - {"min_epochs", "reduction_factor"}):
        raise UserError(f"{path}, halving: {unknown[0]!r} is unknown; give min_epochs and reduction_factor")
    seeds = plan.seeds(document.get("seeds", [101]), path)
    name, objective = document.get("name", path.stem), document.get("objective", "all")
    if not isinstance(name, str) or not name.isprintable():
        raise UserError(f"{path}: name is {name!r}; give a text")
    if objective not in OBJECTIVES:
        raise UserError(f"{path}: objective is {objective!r}; choose one of {', '.join(OBJECTIVES)}")
    step_ckpt = document.get("step_ckpt")
    if step_ckpt is not None and (not isinstance(step_ckpt, str) or len(seeds) > 1):
        raise UserError(f"{path}: step_ckpt is {step_ckpt!r}; name one file, with one seed")
    search = Search(
        path, name, mappings["options"], mappings["step0"], mappings["later"],
        _number(document, "step", 1, (1, 10**4), path), seeds, _number(document, "confidence", 0.8, (0, 1), path, float),
        objective, _number(document, "trials", 30, (1, 10**6), path), _number(document, "startup", 10, (1, 10**6), path),
        _number(halving, "min_epochs", 1, (1, 10**6), path), _number(halving, "reduction_factor", 2, (2, 10**6), path),
        step_ckpt, _space(mappings["search"], path), tuple(extra),
    )  # fmt: skip
    Runs(search, Path()).check()
    return search


def _number(
    document: Mapping[str, Any], key: str, default: Any, ends: tuple[float, float], path: Path, kind: type = int
) -> Any:
    """A number of the file, within its range."""
    value = document.get(key, default)
    if type(value) not in (int, kind) or not ends[0] <= value <= ends[1]:
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{path}: {key} is {value!r}; give {what} from {ends[0]:.10g} to {ends[1]:.10g}")
    return value


def _space(entries: Mapping[str, Any], path: Path) -> tuple[Dimension, ...]:
    """What the file varies."""
    found: list[Dimension] = []
    for name, entry in entries.items():
        if name.lstrip("-") == "tap_schemes":
            found += _tap_schemes(entry, path)
        else:
            found.append(_dimension(name.lstrip("-"), entry, path))
    if not found:
        raise UserError(f"{path}: nothing to search; name at least one option under search, such as tap_schemes: all")
    return tuple(found)


def _tap_schemes(entry: Any, path: Path) -> list[Dimension]:
    """A dimension for each tap whose scheme is searched."""
    taps = {tap: list(SCHEMES) for tap in TAP_NAMES} if entry == "all" else entry
    if not isinstance(taps, dict) or not taps:
        raise UserError(
            f"{path}: tap_schemes is {entry!r:.80}; give `all`, or lists of schemes by tap ({', '.join(TAP_NAMES)})"
        )
    for tap, schemes in taps.items():
        if tap not in TAP_NAMES:
            raise UserError(f"{path}, tap_schemes: {tap!r} is no tap; the taps are {', '.join(TAP_NAMES)}")
        wrong = [scheme for scheme in schemes if scheme not in SCHEMES] if isinstance(schemes, list) else [schemes]
        if wrong or not schemes:
            raise UserError(
                f"{path}, tap_schemes, {tap}: {wrong!r} is no list of schemes; choose among {', '.join(SCHEMES)}"
            )
    return [Dimension(f"tap_schemes.{tap}", tuple(dict.fromkeys(schemes))) for tap, schemes in taps.items()]


def _dimension(name: str, entry: Any, path: Path) -> Dimension:
    """The dimension of an option, from a list of values or a range."""
    place = f"{path}, search, {name}"
    flags = _actions()
    option, _, inner = name.partition(".")
    if option not in flags or option in OWN:
        raise UserError(
            f"{place}: {option!r} is not an option that can be searched; python run.py --help lists the options"
        )
    if isinstance(entry, list) and entry:
        if not all(isinstance(value, str | int | float) for value in entry):
            raise UserError(f"{place}: a value of {entry!r:.80} is neither a text nor a number nor true or false")
        return Dimension(name, tuple(dict.fromkeys(entry)))
    if not isinstance(entry, dict) or not {"low", "high"} <= set(entry) <= {"low", "high", "log"}:
        raise UserError(
            f"{place}: {entry!r:.80}; give a list of values, or low and high, with log: true for a logarithmic scale"
        )
    low, high, log = entry["low"], entry["high"], entry.get("log", False)
    if type(low) not in (int, float) or type(high) not in (int, float) or not isinstance(log, bool) or not low < high:
        raise UserError(
            f"{place}: {entry!r:.80}; low must be a number below high, log true or false (a number is written 1.0e-4)"
        )
    if log and low <= 0:
        raise UserError(f"{place}: low is {low}; a logarithmic scale needs a number above 0")
    return Dimension(name, None, low, high, log, whole=not inner and flags[option].type is int)


class Runs:
    """The command lines of a search.

    Args:
        search: of `read`.
        out: folder of the search.
    """

    def __init__(self, search: Search, out: Path):
        self.search, self.out = search, out
        self.parser = argparser.build_parser()
        words = [*self._words(search.options | search.later), "--step", str(search.step), *search.extra]
        #: Options of the searched step before anything is searched, the preset of the method applied.
        self.base = plan.parse([*words, "--dry_run"], str(search.path))
        self.last = dataset.load_task(self.base, search.step).last_step

    def _words(self, options: Mapping[str, Any]) -> list[str]:
        return config.words(plan.beside(options, self.search.path), self.parser, str(self.search.path))

    def _own(self, name: str, seed: int, steps: Sequence[int]) -> list[str]:
        """Words of any run: where its files are, and that no test image is read."""
        places = {"checkpoint": "checkpoints", "results": "results", "logdir": "logs"}
        words = ["--date", "all", "--name", name, "--random_seed", str(seed), "--resume", "--no_progress", "--no_test"]
        words += [word for flag, folder in places.items() for word in (f"--{flag}", str(self.out / folder))]
        return [*words, *plan.rates(self.base.lr, self.last, steps), "--step", *map(str, steps)]

    def before(self, seed: int) -> list[list[str]]:
        """The command lines that train the steps before the searched one; none where the file names a checkpoint."""
        search, name = self.search, f"before-seed{seed}"
        if search.step_ckpt is not None:
            return []
        quiet = ["--val_interval", "1000000"]
        found = [[*self._words(search.options | search.step0), *search.extra, *quiet, *self._own(name, seed, [0])]]
        if search.step > 1:
            steps = range(1, search.step)
            found.append(
                [*self._words(search.options | search.later), *search.extra, *quiet, *self._own(name, seed, steps)]
            )
        return found

    def previous(self, seed: int) -> str:
        """The checkpoint of the step before the searched one."""
        if self.search.step_ckpt is not None:
            return self.search.step_ckpt
        task = dataset.load_task(self.base, 0)
        return str(
            self.out / "checkpoints" / f"{task.name}-{task.dataset}_before-seed{seed}_{self.search.step - 1}.pth"
        )

    def trial(self, number: int, values: Values, seed: int) -> list[str]:
        """The command line that trains the searched step with some values on four fifths of its images, and scores the rest."""
        own = self._own(trial_name(number, seed), seed, [self.search.step])
        return [*self._method(values), "--step_ckpt", self.previous(seed), *own]

    def _method(self, values: Values) -> list[str]:
        """Words of a trial without those about its files."""
        words = [
            *self._words(self.search.options | self.search.later),
            *self._words(self.chosen(values)),
            *self.search.extra,
        ]
        return [*words, "--cross_val", "--val_by_teacher", str(self.search.confidence), "--val_interval", "1"]

    def log(self, number: int, seed: int) -> Path:
        """What the run of a trial prints, which has its scores."""
        return self.out / "trials" / f"{trial_name(number, seed)}.log"

    def discard(self, number: int, log: bool = False) -> None:
        """Delete the checkpoints of a trial, and on request its logs."""
        for seed in self.search.seeds:
            found = list((self.out / "checkpoints").glob(f"*_{trial_name(number, seed)}_{self.search.step}.*"))
            for path in (*found, *([self.log(number, seed)] * log)):
                path.unlink(missing_ok=True)

    def chosen(self, values: Values) -> dict[str, Any]:
        """Options of run.py that stand for the values."""
        schemes = dict(zip(TAP_NAMES, self.base.tap_schemes))
        options: dict[str, Any] = {}
        for name, value in values.items():
            option, *inner = name.split(".")
            if option == "tap_schemes":
                schemes[inner[0]] = value
                options[option] = ",".join(schemes.values())
            elif inner:
                document = options.setdefault(option, copy.deepcopy(_of(self.base, option) or {}))
                for key in inner[:-1]:
                    document = document.setdefault(key, {})
                document[inner[-1]] = value
            else:
                options[option] = value
        return options

    def published(self) -> dict[str, Any]:
        """The values that the options have without a search, as far as the search can choose them."""
        found: dict[str, Any] = {}
        for dimension in self.search.space:
            option, *inner = dimension.name.split(".")
            value = _of(self.base, option)
            if option == "tap_schemes":
                value = value[TAP_NAMES.index(inner[0])]
            else:
                for key in inner:
                    value = value.get(key) if isinstance(value, dict) else None
            if dimension.contains(value):
                found[dimension.name] = value
        return found

    def preset(self, values: Values) -> dict[str, Any]:
        """The options of the searched step that make the method: those of the file that step 0 does not read, and the found ones."""
        wanted = {*argparser.later_options(), "method"}
        given = self.search.options | self.search.later
        kept = {name: value for name, value in given.items() if _actions()[name.lstrip("-")].dest in wanted}
        return kept | self.chosen(values)

    def check(self) -> None:
        """Refuse values that run.py or the method would refuse, before anything runs.

        Raises:
            UserError: names the file, the option and the value.
        """
        search = self.search
        if search.step_ckpt is not None and not Path(search.step_ckpt).is_file():
            raise UserError(
                f"{search.path}: step_ckpt is {search.step_ckpt}, which is not a file; mend it or leave it out"
            )
        start = self.published()
        for words in self.before(search.seeds[0]):
            plan.parse([*words, "--dry_run"], f"{search.path}, the steps before")
        for dimension in search.space:
            for value in dimension.extremes:
                place = f"{search.path}, search, {dimension.name} = {value}"
                words = [*self._method(start | {dimension.name: value}), "--step", str(search.step), "--dry_run"]
                opts = plan.parse(words, place)
                try:
                    methods.build(opts, dataset.load_task(opts, search.step))
                except UserError as error:
                    raise UserError(f"{place}: {error}") from error


def _of(opts: argparse.Namespace, option: str) -> Any:
    """The value of an option under any of its names."""
    return getattr(opts, _actions()[option].dest)


@cache
def _actions() -> dict[str, argparse.Action]:
    """The options of run.py by all their names, without dashes."""
    return {flag.lstrip("-"): action for action in argparser.build_parser()._actions for flag in action.option_strings}


def trial_name(number: int, seed: int) -> str:
    """Name of the run of a trial and a seed."""
    return f"trial{number}-seed{seed}"
