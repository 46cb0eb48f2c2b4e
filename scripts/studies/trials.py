"""The trials of a search: Optuna chooses the values (upper level), run.py trains the step with them (lower level)."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState

from scripts.studies import execute
from scripts.studies.search import Dimension, Runs, Search
from utils.errors import UserError

#: What a validation with --val_by_teacher prints.
_SCORES = re.compile(
    r"step \d+ epoch (\d+)/(\d+): validation mIoU ([\d.]+) %, old ([\d.]+|-), new ([\d.]+|-), old objects on ([\d.]+) %",
    flags=re.MULTILINE,
)
#: Share of the pixels in percent below which a note says that old objects hardly count.
FEW_OLD = 5.0
#: run.py's exit code for a loss that is not finite: the values do not work, which is their score.
DIVERGED = 3
#: run.py's exit codes after Ctrl-C and SIGTERM.
STOPPED = (130, 143, -2, -15)

#: mIoU of all, of old and of new classes in percent; None for a part of which no class occurs.
Scores = tuple[float, float | None, float | None]


class Stopped(Exception):
    """A run was stopped from outside; the search can be continued."""


class Failed(Exception):
    """A run failed for another reason than its values."""


def open_study(search: Search, file: Path) -> optuna.Study:
    """The study of Optuna in a file of SQLite, new or continued.

    Args:
        search: what is searched.
        file: the storage.

    Raises:
        UserError: the file is no storage of Optuna, or holds another search.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = SuccessiveHalvingPruner(min_resource=search.min_epochs, reduction_factor=search.reduction_factor)
    try:
        study = optuna.create_study(
            storage=f"sqlite:///{file}", study_name="search", direction="maximize", pruner=pruner, load_if_exists=True
        )
    except Exception as error:  # of SQLite, of SQLAlchemy or of Optuna, by the kind of damage
        raise UserError(
            f"{file} cannot be used as the storage of Optuna; move it away to begin anew: {error}"
        ) from error
    if study.user_attrs.get("search", search.identity) != search.identity:
        raise UserError(
            f"{file} holds a search with other options, values, seeds or schedule than {search.path}; "
            "restore that file, or name another folder with --out"
        )
    study.set_user_attr("search", search.identity)
    return study


def suggest(trial: Trial, dimension: Dimension) -> Any:
    """The value that Optuna chooses, or has chosen before, for a dimension."""
    name = dimension.name
    if dimension.choices is not None:
        return trial.suggest_categorical(name, dimension.choices)
    if dimension.whole:
        return trial.suggest_int(name, int(dimension.low), int(dimension.high), log=dimension.log)
    return trial.suggest_float(name, dimension.low, dimension.high, log=dimension.log)


def read_scores(log: Path) -> dict[int, Scores]:
    """By epoch the mIoU of all, of old and of new classes, in percent, that a run has printed."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    found: dict[int, Scores] = {}
    for epoch, _, every, old, new, _ in _SCORES.findall(text):
        parts = [None if value == "-" else float(value) for value in (old, new)]
        found[int(epoch)] = (float(every), parts[0], parts[1])
    return found


class Trials:
    """Runs the trials that are left.

    Args:
        runs: command lines.
        study: of `open_study`.
        say: takes a line for every finished trial.
    """

    def __init__(self, runs: Runs, study: optuna.Study, say: Callable[[str], None]):
        self.runs, self.search, self.study, self.say = runs, runs.search, study, say
        self.lock = threading.Lock()
        self.noted = False
        self.unfinished = list(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
        if not study.trials and (published := runs.published()):
            study.enqueue_trial(published)

    def prepare(self) -> None:
        """Train the steps before the searched one, for every seed."""
        for seed in self.search.seeds:
            for number, words in enumerate(self.runs.before(seed)):
                log = self.runs.out / f"before-seed{seed}-{number}.log"
                self._check(execute.launch(words, log, lambda line: False), log)

    def run(self, jobs: int) -> None:
        """Run trials until there are as many as the file asks for.

        Args:
            jobs: trials at a time. With one, a search that was interrupted ends as one that was not.

        Raises:
            Stopped: a run was stopped from outside.
            Failed: a run failed.
        """
        if jobs == 1:
            self._work()
            return
        with ThreadPoolExecutor(jobs) as pool:
            for worker in [pool.submit(self._work) for _ in range(jobs)]:
                worker.result()

    def _work(self) -> None:
        while (trial := self._next()) is not None:
            self._run(trial)

    def _next(self) -> Trial | None:
        """An interrupted trial, or a new one; None if there are enough."""
        with self.lock:
            if self.unfinished:
                return Trial(self.study, self.unfinished.pop(0)._trial_id)
            begun = [t for t in self.study.get_trials(deepcopy=False) if t.state != TrialState.WAITING]
            if len(begun) >= self.search.trials:
                return None
            # A sampler of its own for every trial: the choice depends on the trials before, not on when the search began
            self.study.sampler = TPESampler(seed=len(begun), n_startup_trials=self.search.startup)
            trial = self.study.ask()
            self._values(trial)
            self.runs.discard(trial.number, log=True)  # leftovers of a search whose storage was moved away
            return trial

    def _values(self, trial: Trial) -> dict[str, Any]:
        return {dimension.name: suggest(trial, dimension) for dimension in self.search.space}

    def _run(self, trial: Trial) -> None:
        """Train a trial with every seed, and tell Optuna its score."""
        with self.lock:
            values = self._values(trial)
            before = self._same(values, trial.number)
        if before is not None:
            self._tell(trial, before.value, before.user_attrs.get("parts"), f"as trial {before.number + 1}")
            return
        found: list[Scores] = []
        note = ""
        for seed in self.search.seeds:
            pruned, note = self._train(trial, values, seed, found)
            if pruned:
                self._tell(trial, None, None, note)
                return
        parts = [_mean([scores[place] for scores in found]) for place in range(3)]
        self._tell(trial, _mean([self.score(scores) for scores in found]), parts, note)

    def _same(self, values: dict[str, Any], number: int) -> FrozenTrial | None:
        """A finished trial of the same values: run.py would repeat it to the bit."""
        done = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return next((other for other in done if other.params == values and other.number != number), None)

    def _train(self, trial: Trial, values: dict[str, Any], seed: int, found: list[Any]) -> tuple[bool, str]:
        """Train a trial with one seed; its scores join `found`. Returns whether it was pruned, and a note."""
        words, log = self.runs.trial(trial.number, values, seed), self.runs.log(trial.number, seed)
        prunable = seed == self.search.seeds[0]
        stopped_at: list[int] = []

        def hear(line: str) -> bool:
            match = _SCORES.match(line)
            if match:
                self._note_share(float(match[6]))
            if not match or not prunable or stopped_at:
                return False
            with self.lock:
                self._report(trial, read_scores(log))
                worse = int(match[1]) < int(match[2]) and trial.should_prune()
            stopped_at.extend([int(match[1])] * worse)
            return worse

        code = execute.launch(words, log, hear, "a")
        scores = read_scores(log)
        if stopped_at:
            return True, f"pruned after epoch {stopped_at[0]} with {self.score(scores[stopped_at[0]]):.2f}"
        if code == DIVERGED:
            found.append((0.0, 0.0, 0.0))
            return False, "diverged"
        self._check(code, log)
        if not scores:
            raise Failed(f"{log} has no score of a validation; are there --epochs?")
        if prunable:
            self._report(trial, scores)
        found.append(scores[max(scores)])
        return False, ""

    def _note_share(self, share: float) -> None:
        """Say once that the score cannot show what is forgotten, because the held-out images have few pixels of old objects."""
        if share < FEW_OLD and not self.noted:
            self.noted = True
            self.say(
                f"note: old objects cover {share:.2f} % of the held-out pixels that count, so the score hardly shows what is forgotten"
            )

    def _report(self, trial: Trial, scores: dict[int, Scores]) -> None:
        """Give Optuna the scores of the epochs that it does not have yet."""
        known = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        for epoch, found in scores.items():
            if epoch not in known:
                trial.report(self.score(found), epoch)

    def score(self, scores: Scores) -> float:
        """The objective, in percent."""
        every, old, new = scores
        if self.search.objective == "all":
            return every
        return _mean([old, new]) or 0.0

    def _tell(self, trial: Trial, value: float | None, parts: list[float | None] | None, note: str) -> None:
        with self.lock:
            trial.set_user_attr("parts", parts)
            self.study.tell(trial, value, state=TrialState.PRUNED if value is None else TrialState.COMPLETE)
            self.runs.discard(trial.number)
            self.say(describe(self.study.get_trials(deepcopy=False)[trial.number], self.search.trials, note))

    def _check(self, code: int, log: Path) -> None:
        """Raise for a run that did not end by itself."""
        if code in STOPPED:
            raise Stopped(f"{log} says where; the same command continues the search")
        if code:
            raise Failed(f"a run ended with exit code {code}, see {log}:\n{execute.end_of(log)}")


def describe(trial: FrozenTrial, of: int, note: str = "") -> str:
    """A trial in a line."""
    parts = trial.user_attrs.get("parts") or []
    shown = ", ".join(f"{name} {v:.2f}" for name, v in zip(("all", "old", "new"), parts) if v is not None)
    values = ", ".join(f"{name}={v:.4g}" if isinstance(v, float) else f"{name}={v}" for name, v in trial.params.items())
    value = f"{trial.value:.2f}" if trial.state == TrialState.COMPLETE else "pruned"
    said = "; ".join(text for text in (shown, note) if text)
    return f"trial {trial.number + 1}/{of}: {value}" + (f" ({said})" if said else "") + f" {values}"


def _mean(values: list[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
