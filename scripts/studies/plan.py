"""From the file of a study to the runs of run.py that it stands for.

name: shapes
options: {dataset: shapes, task: 6-2, overlap: true, lr: [0.05, 0.01]}   # of run.py, for all runs
step0: {epochs: 3}                                                       # for step 0 alone
later: {epochs: 2}                                                       # for all later steps
seeds: [1, 2, 3]
methods:                                                                 # a row of the table each
  FT:
  EWC: {reg_importance: 10}
  LSKD, more of it: {method: LSKD, rge_alpha: 20}
  ALIFE: {step0: {lr: [0.02]}, later: {epochs: 5}}                       # options of this row for step 0, and for later steps
variants:                                                                # optional: the whole study once for each
  4 epochs: {step0: {epochs: 4}}
  8 epochs: {step0: {epochs: 8}, methods: {ALIFE: {later: {epochs: 10}}}}  # methods: changes of rows

A relative path of task_file and preset is that of a file beside the study, or one in the current folder where there is none beside it.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import argparser
import dataset
from dataset.tasks import OFFLINE
from utils import scheduler
from utils.errors import UserError
from utils.options import config
from utils.reporting import documents

#: Entries of a study, and of a variant.
KEYS = ("name", "options", "step0", "later", "seeds", "methods", "variants")
OF_VARIANT = ("options", "step0", "later", "methods")
#: Options whose relative path may start at the folder of the file.
FILES = ("task_file", "preset")
#: Options that the study sets itself.
OWN = ("step", "step_ckpt", "random_seed", "name", "date", "checkpoint", "results", "logdir", "resume", "no_progress")


@dataclass(frozen=True)
class Study:
    """The file of a study.

    Attributes:
        path: of the file, for messages.
        name: of the study.
        options, step0, later: options of run.py for all runs, for step 0 alone, for later steps alone.
        seeds: `--random_seed` of each repetition.
        methods: by the name of the row, the options that differ; "method" is the row's name where it is not given. Its entries
            "step0" and "later" hold options for these steps alone.
        variants: by name, changes of options, step0, later and rows; {"": {}} where there are none.
    """

    path: Path
    name: str
    options: dict[str, Any]
    step0: dict[str, Any]
    later: dict[str, Any]
    seeds: tuple[int, ...]
    methods: dict[str, dict[str, Any]]
    variants: dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Job:
    """One process of run.py.

    Attributes:
        title: what the progress calls it; unique in a study.
        name: `--name` of the run.
        words: its command line.
        log: file that takes what it prints.
        epochs: that it trains, all steps together.
        after: the job whose checkpoint it starts from, or None.
        results: its JSON; None for a step 0 that other runs share.
        checkpoint: of a shared step 0, from which later steps start; None for other jobs.
        kind: jobs of one kind take the same time an epoch.
        last_step: the last step that it trains.
        row: name of its row; that of the first row which has it where rows share a step 0.
    """

    title: str
    name: str
    words: list[str] = field(repr=False)
    log: Path
    epochs: int
    after: Job | None = None
    results: Path | None = None
    checkpoint: Path | None = None
    kind: str = ""
    last_step: int = 0
    row: str = ""

    @property
    def has_ended(self) -> bool:
        """Whether its results have the scores of its last step."""
        if self.results is None or not self.results.is_file():
            return False
        return str(self.last_step) in documents.read(self.results)["steps"]


def read(path: Path) -> Study:
    """Read and check the file of a study.

    Args:
        path: YAML or JSON.

    Raises:
        UserError: names the file, the entry and the remedy.
    """
    document = config.load(path)
    if unknown := sorted(set(document) - set(KEYS)):
        raise UserError(f"{path}: {unknown[0]!r} is not an entry of a study; the entries are {', '.join(KEYS)}")
    mappings = {key: mapping(document, key, path) for key in ("options", "step0", "later", "methods", "variants")}
    repeated = seeds(document.get("seeds", [42]), path)
    if not mappings["methods"]:
        raise UserError(f"{path}: no methods; list at least one under methods, such as FT")
    methods = {name: mapping(mappings["methods"], name, path) for name in mappings["methods"]}
    parts = {
        f"methods, {name}, {key}": mapping(row, key, path)
        for name, row in methods.items()
        for key in ("step0", "later")
    }
    variants = {name: _variant(mappings["variants"], name, methods, path) for name in mappings["variants"]} or {"": {}}
    name = document.get("name", path.stem)
    if not isinstance(name, str) or not name.isprintable():
        raise UserError(f"{path}: name is {name!r}; give a text")
    for names in (methods, variants):
        if twice := [text for text, count in Counter(map(file_name, names)).items() if count > 1]:
            raise UserError(f"{path}: two entries are called {twice[0]!r} in file names; rename one of them")
    shared = {key: mappings[key] for key in ("options", "step0", "later")}
    rows = {f"methods, {name}": row for name, row in methods.items()}
    for place, options in (shared | rows | parts).items():
        _refuse_own(options, f"{path}, {place}")
    return Study(path, name, seeds=repeated, methods=methods, variants=variants, **shared)


def _refuse_own(options: Mapping[str, Any], place: str) -> None:
    if taken := sorted(set(options) & set(OWN)):
        raise UserError(f"{place}: {taken[0]!r} is set by the study itself; leave it out")


def seeds(entry: Any, path: Path) -> tuple[int, ...]:
    """The seeds of a file, each once.

    Raises:
        UserError: they are no list of whole numbers; names the file.
    """
    if not isinstance(entry, list) or not entry or not all(type(seed) is int and seed >= 0 for seed in entry):
        raise UserError(f"{path}: seeds is {entry!r}; give a list of whole numbers, such as [1, 2, 3]")
    return tuple(dict.fromkeys(entry))


def mapping(document: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    """An entry of a file that is a mapping, or empty where there is none.

    Raises:
        UserError: it is something else; names the file and the entry.
    """
    value = document.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{path}: {key} is {value!r:.80}; give names with values (a name of digits stands in quotes)")
    return value


def _variant(variants: Mapping[str, Any], name: str, rows: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """The changes of a variant.

    Args:
        variants: of the file.
        name: of the variant.
        rows: the rows of the study.
        path: of the file, for messages.
    """
    changes, place = mapping(variants, name, path), f"{path}, variant {name}"
    if unknown := sorted(set(changes) - set(OF_VARIANT)):
        raise UserError(f"{place}: {unknown[0]!r} cannot vary; change {', '.join(OF_VARIANT)}")
    found = {key: mapping(changes, key, path) for key in changes}
    for row in found.get("methods", {}):
        if row not in rows:
            raise UserError(f"{place}: {row!r} is no row of the study; its rows are {', '.join(rows)}")
        found["methods"][row] = changed = mapping(found["methods"], row, path)
        for options in (changed, *(mapping(changed, key, path) for key in ("step0", "later"))):
            _refuse_own(options, f"{place}, {row}")
    for key in set(found) - {"methods"}:
        _refuse_own(found[key], f"{place}, {key}")
    return found


def _changed(row: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the changes of a variant; step0 and later are changed entry by entry."""
    parts = {key: (row.get(key) or {}) | (changes.get(key) or {}) for key in ("step0", "later")}
    return {**row, **changes, **parts}


class Plan:
    """The runs of one variant of a study.

    Args:
        study: of `read`.
        variant: name of the variant, "" for none.
        out: folder of the study.
        extra: further words for all runs.
        rows: names of the rows whose runs are wanted; None: all. The shared steps 0 are those of the whole study, so that a part of
            it can be run first and the rest later.
        shared: steps 0 of other variants, which are taken where no option that step 0 reads differs; those of this variant are
            added. None: no other variant.

    Raises:
        UserError: options that run.py refuses; names the file and the row.
    """

    def __init__(
        self,
        study: Study,
        variant: str,
        out: Path,
        extra: Sequence[str] = (),
        rows: Collection[str] | None = None,
        shared: dict[str, Job] | None = None,
    ):
        self.study, self.variant, self.extra = study, variant, list(extra)
        changes = study.variants[variant]
        self.options, self.step0, self.later = (
            getattr(study, key) | changes.get(key, {}) for key in ("options", "step0", "later")
        )
        rows_of_variant = changes.get("methods", {})
        self.rows = {name: _changed(row, rows_of_variant.get(name, {})) for name, row in study.methods.items()}
        self.out = out / file_name(variant) if variant else out
        self.parser = argparser.build_parser()
        self._shared = {} if shared is None else shared
        self._own_first: list[Job] = []
        runs = [(name, self._run(name, seed)) for seed in study.seeds for name in study.methods]
        self.jobs = [job for name, job in runs if rows is None or name in rows]
        self.first = list({job.after.title: job.after for job in self.jobs if job.after is not None}.values())

    def _words(self, name: str, options: Mapping[str, Any]) -> list[str]:
        return config.words(beside(options, self.study.path), self.parser, f"{self.study.path}, {name}")

    def _parse(self, name: str, words: Sequence[str]) -> Namespace:
        """The options of a run, checked as run.py checks them."""
        return parse(words, f"{self.study.path}, {name}")

    def _run(self, name: str, seed: int) -> Job:
        """The run of a row and a seed; its step 0 is added to `first` unless another row has the same."""
        own = {"method": name} | self.rows[name]
        at_step0, at_later = (self._words(name, own.pop(key, None) or {}) for key in ("step0", "later"))
        joint = str(own["method"]).lower() == "joint"
        shared = self._words(name, self.options | ({"task": OFFLINE} if joint else {}))
        mine, extra = self._words(name, own), self.extra
        opts = self._parse(name, [*shared, *mine, *at_step0, *extra, "--dry_run"])
        last = dataset.load_task(opts, 0).last_step
        before = [*shared, *self._words(name, self.step0)]
        end = [*extra, *rates(opts.lr, last, [0]), "--step", "0"]
        first = [*before, *mine, *at_step0, *end]
        if last == 0:
            return self._job(name, name, seed, first)
        steps = range(1, last + 1)
        opts = self._parse(name, [*shared, *mine, *at_later, *extra, "--dry_run"])
        later = [*shared, *self._words(name, self.later), *mine, *at_later, *extra, *rates(opts.lr, last, steps)]
        step0 = self._step0(name, first, [*before, "--method", "FT", *end], seed)
        return self._job(name, name, seed, [*later, "--step", *map(str, steps)], step0)

    def _step0(self, name: str, words: Sequence[str], plain: Sequence[str], seed: int) -> Job:
        """The step 0 of a row: that of another row or variant where no option that step 0 reads differs.

        Args:
            name: of the row.
            words: its command line.
            plain: that of fine-tuning, which is taken where it trains the same. Options of later steps are then not stored with step 0,
                so that it does not matter which row comes first.
            seed: of the run.
        """
        read = self._step0_reads(name, words)
        with contextlib.suppress(UserError):
            words = plain if self._step0_reads(name, plain) == read else words
        key = f"{seed} {read}"
        if key not in self._shared:
            others = any(job.words[job.words.index("--random_seed") + 1] == str(seed) for job in self._own_first)
            self._shared[key] = self._job(f"step0-{name}" if others else "step0", name, seed, words, shared=True)
            self._own_first.append(self._shared[key])
        return self._shared[key]

    def _step0_reads(self, name: str, words: Sequence[str]) -> list[tuple[str, str]]:
        return what_step0_reads(self._parse(name, [*words, "--dry_run"]))

    def _job(
        self, title: str, name: str, seed: int, words: Sequence[str], after: Job | None = None, shared: bool = False
    ) -> Job:
        """A process of run.py, named after its row or its step 0, and its seed."""
        run_name = f"{file_name(title)}-seed{seed}"
        places = {"checkpoint": "checkpoints", "results": "results", "logdir": "logs"}
        own = ["--date", "all", "--name", run_name, "--random_seed", str(seed), "--resume", "--no_progress"]
        own += [word for flag, folder in places.items() for word in (f"--{flag}", str(self.out / folder))]
        opts = self._parse(name, [*words, *own, "--dry_run"])
        task = dataset.load_task(opts, 0)
        if after is not None:
            own += ["--step_ckpt", str(after.checkpoint)]
        results = self.out / "results" / f"all_{opts.dataset}_{task.name}_{run_name}.json"
        log = self.out / f"{run_name}.log"
        epochs = len(opts.step) * opts.epochs
        title = f"{self.variant}, {run_name}" if self.variant else run_name
        kind = f"{self.variant} {name}"
        checkpoint = self.out / "checkpoints" / f"{task.name}-{task.dataset}_{run_name}_0.pth" if shared else None
        kept = None if shared else results
        return Job(title, run_name, [*words, *own], log, epochs, after, kept, checkpoint, kind, max(opts.step), name)


def what_step0_reads(opts: Namespace) -> list[tuple[str, str]]:
    """What decides the weights of step 0: its options, and of the task its classes, with those of all later steps in any order.

    Args:
        opts: of step 0.
    """
    task = dataset.load_task(opts, 0)
    later = sorted(class_id for step in task.steps[1:] for class_id in step)
    classes = {"classes": list(task.new), "later classes": later}
    names = {"method", "config", "preset", "explicit", "preset_applied", "task_preset", "dry_run", "task", "task_file"}
    read = {dest: value for dest, value in vars(opts).items() if dest not in argparser.later_options() | names}
    return sorted((dest, str(value)) for dest, value in (read | classes).items())


def parse(words: Sequence[str], place: str) -> Namespace:
    """The options of a run, checked as run.py checks them.

    Args:
        words: its command line.
        place: file and entry, for messages.

    Raises:
        UserError: run.py would refuse them; names the place.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            opts = argparser.parse(words)
        argparser.check(opts)
    except SystemExit:
        raise UserError(f"{place}: {said.getvalue().strip().splitlines()[-1]}") from None
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    return opts


def rates(lr: Sequence[float], last: int, steps: Sequence[int]) -> list[str]:
    """`--lr` with one value for each of the steps: several values are those of all steps of the task.

    Args:
        lr: `--lr` of the file; one value is left to the other words.
        last: last step of the task.
        steps: that a run trains.
    """
    if len(lr) == 1:
        return []
    return ["--lr", *(str(scheduler.rate_of_step(lr, range(last + 1), step)) for step in steps)]


def beside(options: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Options in which a relative path of a file starts where that file is: beside the study, or in the current folder.

    Args:
        options: by name.
        path: of the study.
    """
    files = {name: path.parent / value for name, value in options.items() if name in FILES and isinstance(value, str)}
    return {**options, **{name: str(file) for name, file in files.items() if file.is_file()}}


def split_words(argv: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """The arguments before the first "--", which are those of a script, and those after it, which are run.py's.

    Args:
        argv: of the script; None: those of the process.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    end = given.index("--") if "--" in given else len(given)
    return given[:end], given[end + 1 :]


def file_name(text: str) -> str:
    """A text as part of a file name: ASCII letters, digits and -+.= stay, other characters become "-"."""
    return re.sub(r"[^\w+.=]+", "-", text, flags=re.ASCII).strip("-.") or "x"
