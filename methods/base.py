"""What a method is: a preset of options, and the parts that those options switch on.

As in the official programs, a method is a set of options, and `--method` sets some of them. A `Part` adds named loss terms,
pseudo-labels, an initialisation, a phase or state, and is switched on by options. Any set of options is a method. A new method is
a subclass of `Method` with a name, a paper and a preset, and a `Part` for what is new in it.

The hooks of a part, in the order in which a step calls them, on all processes. "Resumed" says what a resume does with the hook.

    hook                when                                                    resumed
    add_options         the command line is built                               called
    enabled             the method is built, for every step                     called
    wrap_model          each network is built, before weights are loaded        called
    attach              student and teacher hold the weights of step t−1        called, before the state is loaded
    replay              the training set of the step is built                   called
    init_classifier     before optimiser and wrapper are made                   not called: the state has the weights
    frozen              before the optimiser is made                            called
    phases              before and after the main training (methods/phase.py)   continued at the same iteration
    term_specs          the balancer is made                                    called
    make_balancer       before the optimiser is made                            called, its state is loaded
    parameter_groups    the optimiser is made                                   called
    begin_step          before the first iteration                              not called: `state_dict` has its result
    prepare             every iteration, before the student's forward pass      -
    terms               every iteration, after it                               -
    penalties           every iteration, before the backward pass               -
    after_backward      every iteration, before the optimiser's step            -
    after_step          every iteration, after it                               -
    remedies            a loss diverges or is not finite                        -
    end_epoch           after every epoch                                       -
    end_validation      after every validation                                  -
    end_step            after the last epoch and phase, before the checkpoint   called, unless the step is finished
    export              a checkpoint of the finished step is written            -
    state_dict          every saved state, and the finished checkpoint          -
    load_state_dict     a resume                                                called last
    begin_test          before the test of the step, and of --test              called, if the test is not recorded
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from dataset.base import SegmentationSet
from dataset.sampler import TrainingBatches
from dataset.tasks import Task
from methods.part_types import GatedHooks, Previous
from segmentation_module import SegmentationModel
from utils.balance.equilibrium import Balancer, Sum, TermSpec
from utils.options.rules import Rules
from utils.runtime import distributed
from utils.types import Batch

if TYPE_CHECKING:
    from methods.phase import Phase


class Part(GatedHooks):
    """One ingredient of a method. A subclass overrides the hooks that it needs; the table above says when each is called.

    Args:
        opts: the parsed command line.
        task: which classes this step learns.
    """

    #: Whether the part reads the teacher's forward pass of every batch.
    needs_teacher: ClassVar[bool] = False
    #: Whether the part uses the teacher in other hooks than `prepare` and `terms`; the teacher is loaded if a part says so.
    uses_teacher: ClassVar[bool] = False
    #: Key of its state in the checkpoint of a finished step: in "trainer_state" if it is "regularizer", the only official one,
    #: else in "method_state"; "" for a part without state.
    state_key: ClassVar[str] = ""
    #: Name of the random stream of the crops that `init_classifier`, `begin_step` and `end_step` read.
    purpose: ClassVar[str] = "statistics"
    #: Ranges of its options, which options exclude or need each other, and which of them step 0 does not read.
    rules: ClassVar[Rules] = Rules()

    def __init__(self, opts: Namespace, task: Task):
        self.opts = opts
        self.task = task

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Add the part's own options to the command line, in a group of `--help` (`utils.options.groups.option_group`)."""

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """Whether these options switch the part on at this step."""
        raise NotImplementedError(f"{cls.__name__} must define when it is enabled")

    # ------------------------------------------------------------------ before the step

    def wrap_model(self, model: SegmentationModel) -> None:
        """Replace layers of a freshly built network in place.

        Called for the student, the teacher and a tested network, after the pretrained weights of the body are loaded and before
        those of a checkpoint. Parameters that keep their name and shape stay loadable by other methods.
        """

    def attach(self, model: SegmentationModel, teacher: nn.Module | None, previous: Previous) -> None:
        """Store what the part needs of the networks and of step t−1.

        Args:
            model: the student, not wrapped; at step t ≥ 1 it holds the weights of step t−1.
            teacher: the frozen model of step t−1 in evaluation mode; None at step 0 and where no part needs it.
            previous: the part's own state of step t−1, and that step's weights.
        """

    def replay(self, make: Callable[[Sequence[int]], SegmentationSet]) -> SegmentationSet | None:
        """Samples of earlier steps that join the training set of this step, or None.

        Args:
            make: makes a data set of the training images with these indices (`SegmentationSet.indices` of an earlier step), with
                the training transform and the labels of all classes seen so far.
        """
        return None

    def init_classifier(
        self, model: SegmentationModel, teacher: nn.Module | None, loader: TrainingBatches, device: torch.device
    ) -> None:
        """Initialise the new classifier otherwise than PyTorch does.

        Afterwards all processes get the weights of the main process.

        Args:
            model: the student on the device, not wrapped.
            teacher: as in `attach`.
            loader: (images, labels) of this process's share of the training set, training transform.
            device: where to compute.
        """

    def frozen(self, model: SegmentationModel) -> Iterable[nn.Module | nn.Parameter]:
        """Modules and parameters that this step does not train.

        They take no gradient and no weight decay, and norms in such modules stay in evaluation mode, also after `model.train()`.
        """
        return ()

    def parameter_groups(self, groups: list[dict[str, Any]], model: SegmentationModel) -> list[dict[str, Any]]:
        """Change the optimiser's parameter groups.

        Args:
            groups: dictionaries of `torch.optim.SGD`, with "params" and "lr"; body, head, classifiers.
            model: the student.

        Returns:
            The groups; every trained parameter is in one of them.
        """
        return groups

    def make_balancer(self, model: SegmentationModel, specs: Sequence[TermSpec]) -> Balancer | None:
        """Make the balancer, which combines the terms into one loss; None: another part's balancer or the plain sum is used.

        Args:
            model: the student.
            specs: `term_specs` of all parts, in their order.
        """
        return None

    def term_specs(self) -> list[TermSpec]:
        """The terms that `terms` returns, and for each the weight and the group by which a balancer measures it."""
        return []

    def phases(self) -> list[Phase]:
        """Phases of the step before or after the main training, which train other tensors or with another loss."""
        return []

    def begin_step(self, loader: TrainingBatches, teacher: nn.Module | None, device: torch.device) -> None:
        """Compute statistics of the training set before the first iteration.

        Args:
            loader: (images, labels) of this process's share of the training set.
            teacher: as in `attach`.
            device: where to compute.
        """

    # ------------------------------------------------------------------ every iteration

    def prepare(self, batch: Batch, teacher: nn.Module | None) -> None:
        """Complete the batch before the student's forward pass, without gradient: pseudo-labels, further views of the teacher.

        Store in `batch.extras` what later hooks need and `Batch` has no field for.
        """

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Named scalar losses of a batch that is prepared and has the student's taps."""
        return {}

    def penalties(self, model: SegmentationModel) -> dict[str, Tensor]:
        """Named scalars that depend on the parameters alone. They count in the total loss; `after_backward` adds their gradient."""
        return {}

    def remedies(self) -> dict[str, str]:
        """Advice to the user, by the name of the term that diverges or is not finite."""
        return {}

    # ------------------------------------------------------------------ ends

    def end_epoch(self, model: SegmentationModel, epoch: int) -> None:
        """Called after every epoch of the main training; `epoch` counts from 0."""

    def end_validation(self, model: SegmentationModel) -> None:
        """Called after every validation. Training continues with the weights that it sets, and they are saved."""

    def end_step(self, model: SegmentationModel, loader: TrainingBatches, device: torch.device) -> None:
        """Called after the last epoch and phase, before the checkpoint of the step is written.

        Args:
            model: the trained student, not wrapped.
            loader: as in `begin_step`.
            device: where to compute.
        """

    def export(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the checkpoint of the finished step stores of the network.

        Args:
            state: `model.state_dict()`, after the other parts.

        Returns:
            The weights by name; loading them into a network that `wrap_model` has changed must give the same network.
        """
        return state

    def begin_test(self, model: SegmentationModel) -> None:
        """Called before the test of a step. The checkpoint is written already and does not contain changes made here."""

    def state_dict(self) -> dict[str, Any]:
        """What a resume and the next step need: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""


class Method:
    """A method of class-incremental learning: its preset of options, and the parts that the options switch on.

    Args:
        opts: the parsed command line, preset applied.
        task: which classes this step learns.
        parts: part classes in the order in which they prepare a batch and list their terms.
    """

    #: The value of `--method`.
    name: ClassVar[str] = ""
    #: Where it was published, for `--list_methods`.
    paper: ClassVar[str] = ""
    year: ClassVar[int] = 0
    #: What the checkpoint keeps beside the network, and what step 0 the method needs, for `--list_methods`.
    stores: ClassVar[str] = "nothing"
    step0: ClassVar[str] = "any"
    #: Further parts beside `methods.PARTS`. Their options may be used with other methods too.
    own_parts: ClassVar[tuple[type[Part], ...]] = ()
    #: Options it sets unless the user gives them.
    preset: ClassVar[dict[str, Any]] = {}
    #: Further options for one (data set, task) pair, where the paper needs them; task None stands for any --task_file.
    task_presets: ClassVar[dict[tuple[str, str | None], dict[str, Any]]] = {}

    def __init__(self, opts: Namespace, task: Task, parts: Sequence[type[Part]]):
        self.opts = opts
        self.task = task
        self.parts = [part(opts, task) for part in parts if part.enabled(opts, task)]
        self._loss_weights: Mapping[str, Tensor] = {}

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's forward pass is read; otherwise it is not computed."""
        return any(part.needs_teacher for part in self.parts)

    @property
    def uses_teacher(self) -> bool:
        """Whether any part uses the teacher at all; otherwise it is not loaded."""
        return any(part.needs_teacher or part.uses_teacher for part in self.parts)

    def wrap_model(self, model: SegmentationModel) -> None:
        """Let the parts replace layers of a freshly built network."""
        for part in self.parts:
            part.wrap_model(model)

    def attach(
        self, model: SegmentationModel, teacher: nn.Module | None = None, checkpoint: Mapping[str, Any] | None = None
    ) -> None:
        """Give the networks and the state of step t−1 to the parts.

        Args:
            model: the student, not wrapped.
            teacher: as in `Part.attach`.
            checkpoint: of step t−1 as `utils.checkpointing.store.read` returns it; None or empty at step 0.
        """
        self._loss_weights = (checkpoint or {}).get("loss_weights", {})
        for part in self.parts:
            part.attach(model, teacher, Previous.of_part(checkpoint or {}, part.state_key))

    def replay(self, make: Callable[[Sequence[int]], SegmentationSet]) -> list[SegmentationSet]:
        """The data sets by which the parts extend the training set."""
        return [data for part in self.parts if (data := part.replay(make)) is not None]

    def init_classifier(
        self, model: SegmentationModel, teacher: nn.Module | None, loader: TrainingBatches, device: torch.device
    ) -> None:
        """Let the parts start the new classifier, then give the main process's weights to all processes."""
        for part in self.parts:
            loader.set_position(0, purpose=part.purpose)
            part.init_classifier(model, teacher, loader, device)
        distributed.broadcast_module(model)

    def freeze(self, model: SegmentationModel) -> None:
        """Freeze the modules and parameters that the parts name."""
        model.freeze([item for part in self.parts for item in part.frozen(model)])

    def parameter_groups(self, groups: list[dict[str, Any]], model: SegmentationModel) -> list[dict[str, Any]]:
        """The optimiser's groups after the changes of all parts."""
        for part in self.parts:
            groups = part.parameter_groups(groups, model)
        return groups

    def make_balancer(self, model: SegmentationModel) -> Balancer:
        """The balancer of the first part that has one, with λ of step t−1; else the plain sum of the terms."""
        specs = [spec for part in self.parts for spec in part.term_specs()]
        balancers = (part.make_balancer(model, specs) for part in self.parts)
        balancer = next((found for found in balancers if found is not None), None) or Sum()
        balancer.inherit(self._loss_weights)
        return balancer

    def phases(self) -> list[Phase]:
        """The phases of all parts, in their order."""
        return [phase for part in self.parts for phase in part.phases()]

    def begin_step(self, loader: TrainingBatches, teacher: nn.Module | None, device: torch.device) -> None:
        """Statistics that parts need before the first iteration, such as PLOP's thresholds."""
        for part in self.parts:
            loader.set_position(0, purpose=part.purpose)
            part.begin_step(loader, teacher, device)

    @torch.no_grad()
    def prepare(self, images: Tensor, labels: Tensor, teacher: nn.Module | None) -> Batch:
        """Prepare a batch for the student's forward pass.

        Args:
            images: (B, 3, H, W) normalised.
            labels: (B, H, W) int64, positions in learning order, 255 ignored.
            teacher: the frozen model of step t-1, or None.

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
            found = part.terms(batch)
            assert not merged.keys() & found.keys(), f"two parts yield {sorted(merged.keys() & found.keys())}"
            merged |= found
        return merged

    @torch.no_grad()
    def penalties(self, model: SegmentationModel) -> dict[str, Tensor]:
        """Named scalars that depend on the parameters alone and belong to the total loss."""
        merged: dict[str, Tensor] = {}
        for part in self.parts:
            merged |= part.penalties(model)
        return merged

    def remedy(self, values: dict[str, float]) -> str:
        """The advice of a part if a loss diverges or is not finite.

        Args:
            values: losses by name, the total as "loss".

        Returns:
            The advice for a term that is not finite, or else for the largest term; "" if no part has one.
        """
        terms = {name: value for name, value in values.items() if name != "loss"}
        diverging = [name for name, value in terms.items() if not math.isfinite(value)]
        diverging = diverging or [max(terms, key=lambda name: abs(terms[name]))]
        remedies = {name: text for part in self.parts for name, text in part.remedies().items()}
        return next((remedies[name] for name in diverging if name in remedies), "")

    @property
    def gated(self) -> bool:
        """Whether the host may read the losses of an iteration after the next one has begun, see `utils.runtime.gate`."""
        return all(part.takes_part for part in self.parts)

    def after_backward(self, model: SegmentationModel) -> None:
        """Add the gradients of the penalties."""
        for part in self.parts:
            part.after_backward(model)

    def after_step(self, model: SegmentationModel, batch: Batch) -> None:
        """Called after the optimiser has moved the parameters."""
        for part in self.parts:
            part.after_step(model, batch)

    def end_epoch(self, model: SegmentationModel, epoch: int) -> None:
        """Called after every epoch."""
        for part in self.parts:
            part.end_epoch(model, epoch)

    def end_validation(self, model: SegmentationModel) -> None:
        """Called after the scores of every validation are counted."""
        for part in self.parts:
            part.end_validation(model)

    def end_step(self, model: SegmentationModel, loader: TrainingBatches, device: torch.device) -> None:
        """Called after the last epoch and phase. Norms that are not synchronised follow the main process, as in the checkpoint."""
        distributed.broadcast_(list(model.buffers()))
        for part in self.parts:
            loader.set_position(0, purpose=part.purpose)
            part.end_step(model, loader, device)

    def export(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights that the checkpoint of the finished step stores."""
        for part in self.parts:
            state = part.export(state)
        return state

    def begin_test(self, model: SegmentationModel) -> None:
        """Called before the test of a step, which may change the weights that are tested."""
        for part in self.parts:
            part.begin_test(model)

    def state_dict(self) -> dict[str, Any]:
        """State of all parts that have any."""
        return {part.state_key: part.state_dict() for part in self.parts if part.state_key}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        for part in self.parts:
            if part.state_key:
                part.load_state_dict(state[part.state_key])
