"""Phases of a step before or after its main training, each with its own epochs, learning rate, trained tensors and loss.

`Part.phases` returns the phases of a part. The trainer runs them like the main training: over the batches of the training set, on all
processes with averaged gradients, with a line in the log, curves in TensorBoard and an entry in the history for every epoch. A resume
continues them at the same iteration, bit for bit.
"""

from __future__ import annotations

import contextlib
import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dataset.sampler import Interruptible, TrainingBatches
from dataset.tasks import Task
from segmentation_module import SegmentationModel
from utils.errors import UserError
from utils.reporting.context import Context
from utils.reporting.meters import Meters
from utils.runtime import amp, distributed
from utils.runtime.errors import NonFiniteLoss
from utils.runtime.gate import agree
from utils.runtime.signals import Stopped


class Phase:
    """A phase of a step. A subclass defines what is trained and with which loss.

    The calls, in order: `attach` (also after a resume), `begin` (not after a resume), for each iteration `terms`, then `end`.
    While a phase runs, all parameters of the student that are not in `parameters` take no gradient.

    Args:
        opts: the parsed command line; `lr_of_step`, momentum and weight_decay are the step's.
        task: which classes this step learns.

    Attributes:
        model: the student, not wrapped, from `attach` on.
        teacher: the frozen model of step t−1, or None.
        device: where to compute.
    """

    #: Name in the log and in the history; unique within a method.
    name: ClassVar[str] = ""
    #: Whether it runs before the first epoch of the main training or after the last one.
    when: ClassVar[Literal["before", "after"]] = "before"
    #: Whether the student is in training mode, in which norms use and update batch statistics.
    training_mode: ClassVar[bool] = True

    def __init__(self, opts: Namespace, task: Task):
        self.opts = opts
        self.task = task
        self.model: SegmentationModel
        self.teacher: nn.Module | None = None
        self.device = torch.device("cpu")

    @property
    def epochs(self) -> int:
        """Number of passes over the training set; with 0 a phase only begins and ends."""
        raise NotImplementedError(f"{type(self).__name__} must define how many epochs it has")

    def attach(self, model: SegmentationModel, teacher: nn.Module | None, device: torch.device) -> None:
        """Store the networks and create the tensors that the phase trains; `begin` or a resume sets their values."""
        self.model, self.teacher, self.device = model, teacher, device

    def begin(self, loader: TrainingBatches) -> None:
        """Set the starting values, for instance from statistics over the training set.

        Args:
            loader: (images, labels) of this process's share of the training set.
        """

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters: the phase's own, some of the student, or both."""
        raise NotImplementedError(f"{type(self).__name__} must define what it trains")

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of `parameters`: SGD with the step's learning rate, momentum and weight decay by default."""
        opts = self.opts
        return torch.optim.SGD(
            self.parameters(),
            lr=opts.lr_of_step,
            momentum=opts.momentum,
            nesterov=opts.momentum > 0,
            weight_decay=opts.weight_decay,
        )

    def rate(self, iteration: int, iterations: int) -> float:
        """Factor of the learning rate in an iteration: poly with `--lr_power` by default.

        Args:
            iteration: from 0.
            iterations: of the whole phase.
        """
        return (1 - iteration / max(1, iterations)) ** self.opts.lr_power

    def terms(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Named scalar losses of a batch; their sum is minimised.

        Args:
            images: (B, 3, H, W) normalised, on the device.
            labels: (B, H, W) int64 as the data set gives them.
        """
        raise NotImplementedError(f"{type(self).__name__} must define its loss")

    def end(self) -> None:
        """Use the result of the phase, for instance by copying it into the student."""

    def state_dict(self) -> dict[str, Any]:
        """The phase's own tensors; those of the student are saved with the student."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; called after `attach`."""


class PhaseRun:
    """Runs one phase from its current position to its end.

    Args:
        phase: attached.
        context: device, log and stop request of the step.
        iterations_per_epoch: of each process.
        history: of the trainer; each epoch appends an entry.
    """

    def __init__(self, phase: Phase, context: Context, iterations_per_epoch: int, history: list[dict[str, Any]]):
        self.phase, self.context, self.history = phase, context, history
        self.iterations_per_epoch = iterations_per_epoch
        self.epoch = self.iteration = 0
        self.begun = self.finished = False
        self.meters = Meters()
        self.optimizer: torch.optim.Optimizer | None = None
        self.precision = amp.build(phase.opts, context.device)

    @property
    def iterations_done(self) -> int:
        """Iterations since the beginning of the phase."""
        return self.epoch * self.iterations_per_epoch + self.iteration

    def run(self, batches: TrainingBatches, save: Callable[[], None], offset: int) -> None:
        """Run the phase to its end, unless it is finished.

        Args:
            batches: of the training set.
            save: writes the trainer's state.
            offset: iterations of the step before the phase, for the abscissa of its curves.

        Raises:
            Stopped: after a stop request, with the state saved.
            NonFiniteLoss: a loss is NaN or infinite.
        """
        if self.finished:
            return
        phase = self.phase
        with self._training_only(phase.parameters()):
            if not self.begun:
                if not phase.training_mode:
                    # Norms that are not synchronised follow the main process, whose statistics a resume finds
                    distributed.broadcast_(list(phase.model.buffers()))
                batches.set_position(0, purpose=f"{phase.name} statistics")
                phase.begin(Interruptible(batches, self.context.stop))
                self.context.stop.raise_on_all()
                self.begun = True
            if self.optimizer is None and self.epoch < phase.epochs:
                self.optimizer = phase.make_optimizer()
            while self.epoch < phase.epochs:
                self._run_epoch(batches, save, offset)
            phase.end()
        self.finished, self.optimizer = True, None
        save()
        self.context.saved()

    @contextlib.contextmanager
    def _training_only(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Context in which only these parameters have gradients and the student is in the mode of the phase."""
        model = self.phase.model
        trained = {id(parameter) for parameter in parameters}
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        mode = model.training
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in trained)
        model.train(self.phase.training_mode)
        try:
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
                parameter.grad = None
            model.train(mode)

    def _run_epoch(self, batches: TrainingBatches, save: Callable[[], None], offset: int) -> None:
        phase, context = self.phase, self.context
        batches.set_position(self.epoch, self.iteration, purpose=phase.name)
        title = f"step {phase.task.step} {phase.name} epoch {self.epoch + 1}/{phase.epochs}"
        bar = context.log.bar(batches, title, self.iterations_per_epoch, initial=self.iteration)
        for images, labels in bar:
            values, stop, save_agreed = self._iterate(images, labels)
            self.iteration += 1
            self.meters.update(values)
            if self.iteration % phase.opts.print_interval == 0 or self.iteration == 1:
                context.log.scalars(
                    {f"{phase.name}/{name}": v for name, v in values.items()}, offset + self.iterations_done
                )
            if stop or save_agreed:
                save()
                context.saved()
            if stop:
                raise Stopped(stop)
        means = self.meters.means()
        self.history.append({"phase": phase.name, "epoch": self.epoch, "losses": means, "balance": {}})
        self.epoch, self.iteration, self.meters = self.epoch + 1, 0, Meters()
        text = ", ".join(f"{name} {value:.4g}" for name, value in means.items())
        context.log.info(f"step {phase.task.step} {phase.name} epoch {self.epoch}/{phase.epochs}: {text}")

    def _iterate(self, images: Tensor, labels: Tensor) -> tuple[dict[str, float], int, bool]:
        """One step of the phase's optimiser.

        Returns:
            Its losses, averaged over processes; the signal to stop on, or 0; and whether it is time to save the state.
        """
        phase, optimizer = self.phase, self.optimizer
        assert optimizer is not None
        dtype = next(phase.model.parameters()).dtype
        images = images.to(self.context.device, dtype, non_blocking=True)
        labels = labels.to(self.context.device, non_blocking=True).long()
        rate = phase.rate(self.iterations_done, phase.epochs * self.iterations_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * rate
        optimizer.zero_grad(set_to_none=True)
        with self.precision.autocast():
            terms = phase.terms(images, labels)
        loss = torch.stack([term.reshape(()) for term in terms.values()]).sum()
        *numbers, stop, save = agree(loss, terms, self.context.requests()).tolist()
        values = dict(zip((*terms, "loss"), numbers))
        if not all(math.isfinite(value) for value in numbers):
            named = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
            where = f"step {phase.task.step}, {phase.name} epoch {self.epoch + 1}, iteration {self.iteration + 1}"
            raise NonFiniteLoss(f"non-finite loss at {where}: {named}; lower the learning rate of this phase")
        self.precision.backward(loss, optimizer)
        for parameter in phase.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            distributed.mean_(parameter.grad)
        self.precision.step(optimizer)
        return values, distributed.max_over_ranks(self.context.stop.signum) if stop else 0, save > 0

    def state_dict(self) -> dict[str, Any]:
        """Everything but the student that is needed to continue exactly."""
        return {
            "name": self.phase.name,
            "position": [self.epoch, self.iteration, int(self.begun), int(self.finished)],
            "meters": [self.meters.sums, self.meters.count],
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "precision": self.precision.state_dict(),
            "phase": self.phase.state_dict() if self.begun and not self.finished else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            UserError: the state is of another phase.
        """
        if state["name"] != self.phase.name:
            raise UserError(f"the interrupted run was in the phase {state['name']!r}, this one has {self.phase.name!r}")
        self.epoch, self.iteration, begun, finished = state["position"]
        self.begun, self.finished = bool(begun), bool(finished)
        self.meters.sums, self.meters.count = state["meters"]
        self.precision.load_state_dict(state["precision"])
        if self.begun and not self.finished:
            self.phase.load_state_dict(state["phase"])
            if state["optimizer"] is not None:
                self.optimizer = self.phase.make_optimizer()
                self.optimizer.load_state_dict(state["optimizer"])
