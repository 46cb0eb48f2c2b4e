"""What a method is: a preset of options, and the parts that those options switch on.

The official programs describe a method by its flags, and `--method` is a shorthand for some of them. So it is here: a `Part`
adds named loss terms (and, where it needs to, pseudo-labels or state), is switched on by options, and any set of options composes a
method. A new method is a subclass of `Method` with a name, a paper and a preset; it may add options and terms of its own.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dataset.tasks import Task
from utils.balance import equilibrium
from utils.types import Batch


class Part:
    """One ingredient of a method; a subclass overrides what it takes part in.

    Args:
        opts: the parsed command line.
        task: which classes this step learns.
    """

    #: Whether the part looks at the teacher's forward pass.
    needs_teacher = False
    #: Key of its state in the checkpoint of a finished step: in "trainer_state" if it is "regularizer", the only official
    #: one, else in "method_state".
    state_key: ClassVar[str] = ""
    #: What `begin_step` reads images for: each purpose has random crops of its own, and none those of the training.
    purpose: ClassVar[str] = "statistics"

    def __init__(self, opts: Namespace, task: Task):
        self.opts = opts
        self.task = task

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """Whether these options switch the part on at this step."""
        raise NotImplementedError(f"{cls.__name__} does not say when it is enabled")

    def begin_step(self, loader: Iterable, teacher: nn.Module | None, device: torch.device) -> None:
        """Called once before the first iteration of a step; not after a resume. The loader's crops are those of `purpose`."""

    def attach(self, model: nn.Module, previous: dict[str, Any]) -> None:
        """Called once the student is built.

        Args:
            model: the student, not wrapped.
            previous: checkpoint of step t-1 as `utils.checkpointing.store.read` returns it, empty where there is none.
        """

    def prepare(self, batch: Batch, teacher: nn.Module | None) -> None:
        """Complete the batch before the student's forward pass, without gradient: pseudo-labels, further teacher views."""

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Named scalar losses of a batch that has its student."""
        return {}

    def after_backward(self, model: nn.Module) -> dict[str, Tensor]:
        """Add to the gradients after the main backward pass; returns what is to be logged by name."""
        return {}

    def after_step(self, model: nn.Module) -> None:
        """Called after the optimiser has moved the parameters."""

    def end_epoch(self, model: nn.Module, epoch: int) -> None:
        """Called after every epoch."""

    def end_step(self, model: nn.Module) -> None:
        """Called once after the last epoch of a step."""

    def state_dict(self) -> dict[str, Any]:
        """What a resume and the next step need."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""


class Method:
    """A way to learn the classes of a step without forgetting the earlier ones.

    Args:
        opts: the parsed command line, preset applied.
        task: which classes this step learns.
        parts: part classes in the order in which they prepare a batch and list their terms.
    """

    #: Spelling of `--method`.
    name: ClassVar[str] = ""
    #: Where it was published, for `--list_methods`.
    paper: ClassVar[str] = ""
    year: ClassVar[int] = 0
    #: Options it sets unless the user gives them.
    preset: ClassVar[dict[str, Any]] = {}
    #: Further options for one (data set, task) pair, where the paper needs them; task None stands for any --task_file.
    task_presets: ClassVar[dict[tuple[str, str | None], dict[str, Any]]] = {}

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Options of this method alone."""

    def __init__(self, opts: Namespace, task: Task, parts: Sequence[type[Part]]):
        self.opts = opts
        self.task = task
        self.parts = [part(opts, task) for part in parts if part.enabled(opts, task)]

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's forward pass is looked at; otherwise it is not computed."""
        return any(part.needs_teacher for part in self.parts)

    @torch.no_grad()
    def prepare(self, images: Tensor, labels: Tensor, teacher: nn.Module | None) -> Batch:
        """Everything that happens to a batch before the student sees it.

        Args:
            images: (B, 3, H, W) normalised.
            labels: (B, H, W) int64, positions in learning order, 255 ignored.
            teacher: the frozen model of step t-1, or None at step 0.

        Returns:
            The batch with teacher taps, pseudo-labels and pixel weights.
        """
        batch = Batch(images=images, truth=labels, labels=labels)
        if teacher is not None and self.needs_teacher:
            batch.teacher = teacher(images)
        for part in self.parts:
            part.prepare(batch, teacher)
        return batch

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """All named loss terms of a batch.

        Args:
            batch: prepared, with the student's taps.

        Returns:
            Scalars by name; the names are those of the log, of TensorBoard, of λ and of the report.
        """
        merged: dict[str, Tensor] = {}
        for part in self.parts:
            merged |= part.terms(batch)
        return merged

    def make_balancer(self, model: nn.Module) -> equilibrium.Sum | equilibrium.GradientEquilibrium:
        """How the terms become one loss.

        Args:
            model: the student, not wrapped.

        Returns:
            A balancer; the plain sum unless a part brings its own.
        """
        for part in self.parts:
            if hasattr(part, "make_balancer"):
                return part.make_balancer(model)
        return equilibrium.Sum()

    def begin_step(self, loader: Iterable, teacher: nn.Module | None, device: torch.device) -> None:
        """Statistics a part needs before the first iteration, such as PLOP's thresholds."""
        data = getattr(loader, "dataset", None)
        for part in self.parts:
            if hasattr(data, "set_epoch"):
                data.set_epoch(0, part.purpose)
            part.begin_step(loader, teacher, device)

    def attach(self, model: nn.Module, previous: dict[str, Any]) -> None:
        """Hand the student and the state of step t-1 to the parts."""
        for part in self.parts:
            part.attach(model, previous)

    def after_backward(self, model: nn.Module) -> dict[str, Tensor]:
        """Gradients that are added after the main backward pass; returns values to log."""
        logged: dict[str, Tensor] = {}
        for part in self.parts:
            logged |= part.after_backward(model)
        return logged

    def after_step(self, model: nn.Module) -> None:
        """Called after the optimiser has moved the parameters."""
        for part in self.parts:
            part.after_step(model)

    def end_epoch(self, model: nn.Module, epoch: int) -> None:
        """Called after every epoch."""
        for part in self.parts:
            part.end_epoch(model, epoch)

    def end_step(self, model: nn.Module) -> None:
        """Called after the last epoch."""
        for part in self.parts:
            part.end_step(model)

    def state_dict(self) -> dict[str, Any]:
        """State of all parts that have any."""
        return {part.state_key: part.state_dict() for part in self.parts if part.state_key}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        for part in self.parts:
            if part.state_key:
                part.load_state_dict(state[part.state_key])
