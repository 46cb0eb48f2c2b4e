"""The checkpoint files of a run, their content, and the check that the checkpoint of step t-1 fits the step to be trained."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from utils.checkpointing import checkpoint_files
from utils.checkpointing.header import MAY_CHANGE_ON_RESUME, check_header, describe, iterations_of, plain_options
from utils.checkpointing.loss_weights import named_loss_weights, stacked, with_loss_weights
from utils.checkpointing.structure import scales_in_place
from utils.errors import UserError
from utils.types import TaskLike

#: Options that must be equal at all steps, because they determine the shape of the network or the meaning of its weights.
NETWORK_OPTIONS = (
    *("backbone", "norm_act", "output_stride", "cosine", "nb_background_modes"),
    *("rcil_network", "rcil_stem"),
)

#: States of an unfinished step on the disk: the last one, the one before it, and the one that is being written.
STATES = 3


class Store:
    """The checkpoint files of a task under one name.

    Args:
        opts: checkpoint (folder), name, step_ckpt.
        task: any step of the task.

    Reference: file names and dictionary keys of the official programs, `<task>-<dataset>_<name>_<step>.pth`.
    """

    def __init__(self, opts: Namespace, task: TaskLike):
        self.opts = opts
        self.task = task
        self.folder = Path(opts.checkpoint)
        #: Why the last state of the interrupted run could not be read, if the state before it is continued; else "".
        self.damage = ""
        #: SHA-256 of the weights of step t-1, once they are read.
        self.previous_sha256: str | None = None
        self.iterations_before = 0

    def finished(self, step: int) -> Path:
        """Checkpoint of a finished step."""
        return self.folder / f"{self.task.name}-{self.task.dataset}_{self.opts.name}_{step}.pth"

    def unfinished(self, step: int) -> Path:
        """State of an unfinished step, for `--resume`."""
        return self.finished(step).with_suffix(".resume.pth")

    def before_unfinished(self, step: int) -> Path:
        """The state before `unfinished`, which is used if that one is damaged."""
        return self.finished(step).with_suffix(".resume.before.pth")

    def replaced(self, step: int) -> Path:
        """Checkpoint of the earlier training of a step that is trained again."""
        return self.finished(step).with_suffix(".replaced.pth")

    def interrupted(self) -> bool:
        """Whether a run of this step was started and is not finished."""
        step = self.task.step
        return self.unfinished(step).is_file() or self.before_unfinished(step).is_file()

    @property
    def starts_from_file(self) -> bool:
        """Whether this step starts from the checkpoint of `--step_ckpt`."""
        return self.opts.step_ckpt is not None and self.task.step == self.opts.step[0] > 0

    def previous(self) -> Path:
        """Checkpoint of step t-1, from which the teacher is loaded."""
        if self.starts_from_file:
            return Path(self.opts.step_ckpt)
        return self.finished(self.task.step - 1)

    def _lock_path(self) -> Path:
        return self.folder / f".{self.finished(self.task.step).stem}.lock"

    def lock(self) -> FileLock:
        """A lock on this name and step. The system releases it when the process ends, also if it is killed.

        Raises:
            UserError: another run holds it.
        """
        path = self._lock_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"another run named {self.opts.name!r} trains step {self.task.step} of {self.task.name} into {self.folder}; "
                "wait for it, or choose another --name or --checkpoint"
            ) from error
        return lock

    def check_writable(self, *folders: str) -> None:
        """Create the folders of checkpoints and outputs, and check before the training that they can be written.

        Args:
            folders: those of the outputs.

        Raises:
            UserError: names the folder, or what has the name of a file that will be written.
        """
        for folder in (self.folder, *map(Path, folders)):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):  # it has no name, so a kill leaves no file
                    pass
            except OSError as error:
                raise UserError(
                    f"{folder} cannot be written ({error.strerror}); name another with --checkpoint, --results or --logdir"
                ) from error
        step = self.task.step
        places = (self.finished, self.replaced, self.unfinished, self.before_unfinished)
        checkpoint_files.require_places(self._lock_path(), *(place(step) for place in places))

    def require_space(self, size: int) -> None:
        """Refuse to start if the disk has too little space for the states of this step and the checkpoints of it and later steps.

        Args:
            size: bytes of one checkpoint.

        Raises:
            UserError: less is free.
        """
        step, steps = self.task.step, self.opts.step
        later = steps[steps.index(step) + 1 :] if step in steps else []
        again = [self.replaced(number) for number in (step, *later) if self.finished(number).is_file()]
        freed = [self.unfinished(step), self.before_unfinished(step), *again]
        room = sum(min(path.stat().st_size, size) for path in freed if path.is_file())
        checkpoint_files.require_space(self.folder, (STATES + len(later)) * size - room)

    def load_previous(self) -> dict[str, Any]:
        """The checkpoint of step t-1, checked against this run.

        Returns:
            As `read`.

        Raises:
            UserError: missing, damaged, or of another task, order, backbone or overlap setting.
        """
        self.require_previous()
        path = self.previous()
        state = read(path)
        self._check(path, state, self.task.step - 1)
        self.previous_sha256 = checkpoint_files.digest(state["model_state"])
        self.iterations_before = sum(iterations_of(state))
        return state

    def require_previous(self) -> None:
        """Refuse a step if the checkpoint of step t-1 is missing.

        Raises:
            UserError: names the file and the remedy.
        """
        path = self.previous()
        if not path.is_file():
            given = (
                "--step_ckpt names no file"
                if self.opts.step_ckpt
                else "it was not trained under this --name and --checkpoint"
            )
            raise UserError(
                f"step {self.task.step} of {self.task.name} needs the checkpoint of step {self.task.step - 1}, but {path} does not exist "
                f"({given}); train --step {self.task.step - 1} first, or name the file with --step_ckpt"
            )

    def load_tested(self, path: Path) -> dict[str, Any]:
        """A checkpoint of this step, to be tested; with `--base_weights` also one of step 0.

        Args:
            path: the file.

        Returns:
            As `read`.

        Raises:
            UserError: missing, damaged, or of another step, task, order or network.
        """
        state = read(path)
        of_base = self.opts.base_weights and state.get("task", {}).get("step") == 0
        self._check(path, state, 0 if of_base else self.task.step)
        return state

    def _check(self, path: Path, state: dict[str, Any], step: int) -> None:
        """Refuse a checkpoint of another step or task, or of another network. Official files have no options to compare."""
        task, described = self.task, state.get("task")
        if described is not None:
            mine = describe(task.at(step))
            if described["dataset"] != task.dataset or described["step"] != step:
                flag = "--step_ckpt" if step < task.step else "--ckpt"
                raise UserError(
                    f"{path} is step {described['step']} of {described['name']} on {described['dataset']}, not step "
                    f"{step} of {task.name} on {task.dataset}; name the right file with {flag}"
                )
            if described["steps"] != mine["steps"]:
                raise UserError(
                    f"{path} learned the classes {described['steps']}, task {task.name} has {mine['steps']} up to step {step}; "
                    "use the same --task or --task_file for all steps"
                )
        theirs = state.get("options", {})
        fused = ("multimodal_fusion",) if self.opts.nb_background_modes > 1 else ()
        for dest in NETWORK_OPTIONS + fused + (("overlap",) if step < task.step else ()):
            if dest in theirs and not _same(dest, theirs[dest], getattr(self.opts, dest)):
                raise UserError(
                    f"{path} was trained with --{dest} {theirs[dest]}, this run has {getattr(self.opts, dest)}; "
                    f"give all steps the same --{dest}"
                )

    def save_finished(
        self,
        trainer_state: dict[str, Any],
        loss_weights: Mapping[str, Tensor],
        inherited: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the checkpoint of this step: the official dictionary, and further keys of this program.

        The official keys have the content that the official programs write, so that these can test the step, train the next
        one, or load the optimiser. λ is stored as `head.lossweights` only if the step has λ: the official PLOP and MiB refuse
        that name.

        Args:
            trainer_state: of `Trainer.state_dict`.
            loss_weights: λ of this step by term, empty for methods without.
            inherited: λ of the previous step, which is stored if this step has no λ.

        The key "loss_weights" of this program has the names of the terms and their λ, so that λ is inherited by name.
        """
        parts = dict(trainer_state["method"])
        content = {
            "epoch": trainer_state["position"][0] - 1,  # index of the last epoch, as in the official programs
            "model_state": with_loss_weights(checkpoint_files.with_prefix(trainer_state["model"]), loss_weights),
            "optimizer_state": trainer_state["optimizer"],
            "scheduler_state": trainer_state["scheduler"],
            "best_score": trainer_state["best_score"],
            "trainer_state": {"regularizer": parts.pop("regularizer", None)},
            "method_state": parts,
            "history": trainer_state["history"],
            "iterations": trainer_state["iterations"],
            "iterations_before": self.iterations_before,
            "options": plain_options(self.opts),
            "task": describe(self.task),
            **self._origin(),
        }
        if named := loss_weights or inherited:
            content["loss_weights"] = {"names": list(named), "values": stacked(named)}
        checkpoint_files.save(self.finished(self.task.step), content)
        checkpoint_files.discard(self.before_unfinished(self.task.step))
        checkpoint_files.discard(self.unfinished(self.task.step))

    def begin(self) -> Path | None:
        """Record that the step is started anew, so that `--resume` does not continue the state of an older run.

        Returns:
            The file in which the checkpoint that this training will replace is kept; None if there is none.
        """
        checkpoint_files.discard(self.before_unfinished(self.task.step))
        self._write_unfinished(None)
        return checkpoint_files.keep(self.finished(self.task.step), self.replaced(self.task.step))

    def save_unfinished(self, trainer_state: dict[str, Any]) -> None:
        """Write the state of an unfinished step. The state before it is kept, unless it is damaged."""
        self._write_unfinished(trainer_state, None if self.damage else self.before_unfinished(self.task.step))
        self.damage = ""

    def _write_unfinished(self, trainer_state: dict[str, Any] | None, before: Path | None = None) -> None:
        """Write the state of an unfinished step; None: the step has begun, but has no state yet."""
        state = {"state": trainer_state, "options": plain_options(self.opts), "task": describe(self.task)}
        checkpoint_files.save(self.unfinished(self.task.step), state | self._origin(), before)

    def _origin(self) -> dict[str, str]:
        """Entries of a state about the step that it continues; empty at step 0."""
        return {} if self.previous_sha256 is None else {"previous_sha256": self.previous_sha256}

    def load_unfinished(self) -> dict[str, Any] | None:
        """The interrupted run of this step: its "state" for the trainer and its "options"; None if there is no such run.

        If the last state is damaged, this is the state before it, and `damage` is the reason.

        Raises:
            UserError: both are damaged, or of a run with other options or from another step t-1.
        """
        path, before = self.unfinished(self.task.step), self.before_unfinished(self.task.step)
        if not self.interrupted():
            return None
        try:
            state = checkpoint_files.load(path)
        except UserError as error:
            if not before.is_file():
                raise
            path, state, self.damage = before, checkpoint_files.load(before), str(error)
        if "state" not in state:
            raise UserError(
                f"--resume: {path} is not the state of an interrupted run; delete it to start the step anew"
            )
        if state["state"] is None:
            return None
        check_header(path, state, own=True)
        self._same_options(path, state)
        self._same_previous(path, state)
        return state

    def check_finished(self) -> dict[str, Any]:
        """The finished checkpoint of this step, refused if it was trained with other options or from another step t-1.

        Raises:
            UserError: names what differs.
        """
        path = self.finished(self.task.step)
        state = read(path)
        if "options" in state:
            self._same_options(path, state)
        self._same_previous(path, state)
        return state

    def _same_options(self, path: Path, state: dict[str, Any]) -> None:
        """Refuse a state of a run with other options. A file of an earlier version was trained with the defaults of newer options."""
        mine, theirs = plain_options(self.opts), state["options"]
        compared = theirs.keys() | self.opts.explicit | dict(self.opts.preset_applied).keys()
        changed = sorted(key for key in compared - MAY_CHANGE_ON_RESUME if mine.get(key) != theirs.get(key))
        if changed or state["task"] != describe(self.task):
            differing = (
                ", ".join(f"{key} was {theirs.get(key)!r}, is {mine.get(key)!r}" for key in changed) or "the task"
            )
            raise UserError(
                f"--resume: {path} was written with other options ({differing}); repeat them, or start anew without --resume"
            )

    def _same_previous(self, path: Path, state: dict[str, Any]) -> None:
        """Refuse a state that continues another checkpoint of step t-1 than the present one. Earlier versions did not store this."""
        theirs, step = state.get("previous_sha256"), self.task.step
        if step == 0 or theirs is None or not self.previous().is_file():
            return
        if self.previous_sha256 is None:
            self.previous_sha256 = checkpoint_files.digest(read(self.previous())["model_state"])
        if theirs != self.previous_sha256:
            raise UserError(
                f"--resume: {path} was trained from another step {step - 1} than {self.previous()}, whose weights have changed since; "
                f"train step {step} anew without --resume, or restore that file"
            )


def _same(dest: str, theirs: Any, mine: Any) -> bool:
    """Whether two values of an option give the same network; norms are equal if their scales are."""
    if dest == "norm_act":
        return scales_in_place(str(theirs)) == scales_in_place(mine)
    return theirs == mine


def read(path: Path) -> dict[str, Any]:
    """A finished checkpoint of this or of an official program.

    Args:
        path: the file.

    Returns:
        Its dictionary; "model_state" without the wrapper's prefix and without λ; "loss_weights", λ by term, of this step or
        inherited, empty if there is none; the path as "file". Earlier versions of this program wrote `head.lossweights` for
        every step, with ones, the initial λ, for a step without λ.

    Raises:
        UserError: missing, damaged, without "model_state", or with a λ that is not finite.
    """
    state = checkpoint_files.load(path)
    weights = state.get("model_state")
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(
            f"{path} is no checkpoint of a step: it has no 'model_state' of tensors; name a file that a finished step wrote"
        )
    check_header(path, state)
    model_state = checkpoint_files.without_prefix(state["model_state"])
    state["loss_weights"] = named_loss_weights(
        path, model_state.pop(checkpoint_files.LOSS_WEIGHTS, None), state.get("loss_weights")
    )
    state["model_state"] = model_state
    state["file"] = str(path)
    return state
