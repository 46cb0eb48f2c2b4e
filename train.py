"""The training loop of one step: phases, epochs, iterations, evaluation. It names no loss and no method.

trainer = Trainer(opts, task, method, model, teacher, context, iterations_per_epoch)
trainer.fit(batches, val_loader, save)
scores = trainer.evaluate(test_loader)
"""

from __future__ import annotations

import contextlib
import math
from argparse import Namespace
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

import dataset
from dataset.sampler import EvaluationBatches, TrainingBatches
from dataset.tasks import Task
from methods.base import Method
from methods.phase import PhaseRun
from metrics.evaluation import Evaluator
from metrics.summary import of_old_and_new
from segmentation_module import SegmentationModel
from utils import scheduler
from utils.checkpointing import structure
from utils.checkpointing.random_state import random_state, set_random_state
from utils.optimizer import allocate_momenta, initialise_momenta, make_optimizer, parameter_groups
from utils.reporting.context import Context
from utils.reporting.meters import Meters
from utils.runtime import distributed, divergence, gate
from utils.runtime.divergence import DivergenceWatch, copy_to_cpu
from utils.runtime.errors import NonFiniteLoss, NonFiniteNetwork
from utils.runtime.signals import Stopped

#: Version of the state. It is increased by a change after which a run could not be continued exactly; other versions are refused.
STATE_VERSION = 5


class Trainer(Evaluator):
    """Trains and evaluates the model of one step.

    Args:
        opts: the parsed command line, with `lr_of_step` resolved.
        task: which classes the step learns.
        method: loss terms and hooks, attached to the networks.
        model: the student on its device, not wrapped, its new classifier initialised.
        teacher: the frozen model of step t-1 in eval mode, or None.
        context: device, log and stop request.
        iterations_per_epoch: of each process.

    Attributes:
        epoch, iteration: position of the next iteration of the main training; `iteration` counts within the epoch.
        history: an entry for each epoch, also of phases.
        save_agreed: whether it is time to save the state.
        unsettled: the last iteration, where the host has not read its losses yet (`utils.runtime.gate`).
    """

    def __init__(self, opts: Namespace, task: Task, method: Method, model: SegmentationModel, teacher: nn.Module | None,
                 context: Context, iterations_per_epoch: int):  # fmt: skip
        super().__init__(opts, task, model, context)
        self.method, self.teacher = method, teacher
        self.iterations_per_epoch = iterations_per_epoch
        self.epoch = self.iteration = self.validated_epoch = 0
        self.skipped = 0
        self.best_score = 0.0
        self.save_agreed = False
        self.unsettled: gate.Outcome | None = None
        self.meters = Meters()
        self.divergence = DivergenceWatch()
        self.history: list[dict[str, Any]] = []
        if opts.fix_bn:
            model.fix_bn()
        method.freeze(model)  # before the optimiser and the wrapper collect what is trained
        self.phase_runs = self._make_phase_runs()
        self.balancer = method.make_balancer(model)
        groups = method.parameter_groups(parameter_groups(opts, task.step, model), model)
        fused = self.precision.allows_fused_step
        self.optimizer: Optimizer = make_optimizer(opts, groups, self.balancer.parameters(), fused)
        self.model, self.optimizer = self.precision.prepare(model, self.optimizer)
        initialise_momenta(self.optimizer, self.device)
        self.scheduler = scheduler.build(opts, self.optimizer, opts.epochs * iterations_per_epoch)
        self._wrap()

    def _make_phase_runs(self) -> list[PhaseRun]:
        phases = self.method.phases()
        for phase in phases:
            phase.attach(self.network, self.teacher, self.device)
        return [PhaseRun(phase, self.context, self.iterations_per_epoch, self.history) for phase in phases]

    def _wrap(self) -> None:
        """Compile the networks (`--compile`), and wrap the student if there are several processes."""
        if self.opts.compile:
            if self.teacher is not None:
                self.teacher = cast(nn.Module, torch.compile(self.teacher))
            if not self.balancer.needs_partial_backward:
                self.model = cast(nn.Module, torch.compile(self.model))
        if distributed.active():
            # Synchronised norms have equal statistics on all processes; other norms take those of the main process, as officially.
            follow_main = self.network.body.own_norms or not self.opts.norm_act.startswith("iabn_sync")
            self.model = distributed.wrap(self.model, self.device, follow_main)

    # -------------------------------------------------------------- training

    def fit(self, batches: TrainingBatches, val_loader: EvaluationBatches | None, save: Callable[[], None]) -> None:
        """Train from the current position to the end of the last epoch and the last phase.

        Args:
            batches: of the training set.
            val_loader: for the validation every `--val_interval` epochs, or None.
            save: writes the trainer's state; called every `--ckpt_interval` epochs, `--ckpt_minutes`, and on a stop request.

        Raises:
            Stopped: after a stop request, with the state saved.
            NonFiniteLoss: on a loss that is NaN or infinite, see `--skip_nonfinite`.
        """
        self._run_phases("before", batches, save)
        while True:
            if val_loader is not None and self._validation_due():
                self._validate(val_loader, save)
            if self.epoch >= self.opts.epochs:
                break
            self.train_epoch(batches, save)
            if self.epoch % self.opts.ckpt_interval == 0 and self.epoch < self.opts.epochs:
                save()
                self.context.saved()
        self._run_phases("after", batches, save)

    def _run_phases(self, when: str, batches: TrainingBatches, save: Callable[[], None]) -> None:
        for run in self.phase_runs:
            if run.phase.when == when:
                run.run(batches, save, self.total_iterations - run.iterations_done)

    def train_epoch(self, batches: TrainingBatches, save: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Train from the current position to the end of the epoch.

        Args:
            batches: as in `fit`.
            save: as in `fit`.

        Returns:
            Mean of every loss term over the epoch, all processes averaged.
        """
        batches.set_position(self.epoch, self.iteration)
        self.model.train()
        title = f"step {self.task.step} epoch {self.epoch + 1}/{self.opts.epochs}"
        bar = self.log.bar(batches, title, self.iterations_per_epoch, initial=self.iteration)
        for images, labels in bar:
            self._finish(self.settle(), bar, save)
            finished = self.train_iteration(images, labels)
            self.iteration += 1
            self._finish(finished, bar, save)
        self._finish(self.settle(), bar, save)
        return self._end_epoch()

    def _finish(self, values: dict[str, float] | None, bar: tqdm, save: Callable[[], None]) -> None:
        """Report the losses of an iteration, and save or stop if any process asks for it."""
        if values is None:
            return
        if values:
            self._report(values, bar)
        if self.stop_agreed or self.save_agreed:
            save()
            self.context.saved()
        if self.stop_agreed:
            raise Stopped(self.stop_agreed)

    def trial(self, batches: TrainingBatches) -> None:
        """Train one batch to test whether an iteration fits into the memory; the state before it is restored.

        Args:
            batches: the first one is taken.

        Raises:
            RuntimeError, MemoryError: the memory is too small; `utils.runtime.memory.trial` turns this into a UserError.
        """
        state = copy_to_cpu(self.state_dict())  # before the loader draws from a random generator
        buffers = gate.KeptBuffers(self.network)  # some are in no state dict
        allocate_momenta(self.optimizer)  # the second backward pass has to fit beside them
        self.model.train()
        with contextlib.suppress(NonFiniteLoss):  # the training will report it
            self._train_checked(*next(iter(batches)))
        self.optimizer.zero_grad(set_to_none=True)
        self.divergence, self.stop_agreed, self.save_agreed = DivergenceWatch(), 0, False
        self._restore(state)
        buffers.restore()

    def train_iteration(self, images: Tensor, labels: Tensor) -> dict[str, float] | None:
        """One step of the optimiser.

        Args:
            images: (B, 3, H, W) normalised.
            labels: (B, H, W), positions in learning order, 255 ignored.

        Returns:
            Every loss term and the total, averaged over processes; empty if the iteration was skipped as non-finite; None if the losses
            are still on the device, `settle` then returns them.
        """
        assert self.unsettled is None, "`settle` is called before"
        gated = self.precision.gates and self.method.gated and self.divergence.calm
        if gated and gate.asynchronous(self.device):
            self._train_gated(images, labels)
            return None
        return self._train_checked(images, labels)

    def _forward(self, images: Tensor, labels: Tensor, scale: Tensor | float) -> gate.ForwardPass:
        """The part of an iteration before the backward pass."""
        images = images.to(self.device, self.dtype, non_blocking=True, memory_format=self.layout)
        labels = labels.to(self.device, non_blocking=True).long()
        self.optimizer.zero_grad(set_to_none=True)
        with self.precision.autocast():
            batch = self.method.prepare(images, labels, self.teacher)
            batch = batch.with_student(self.balancer.detach_taps(self.model(images)))
        terms = self.method.terms(batch)
        loss = self.balancer.combine(terms, scale)
        penalties = self.method.penalties(self.network)
        total = sum(penalties.values(), start=loss.detach())
        message = gate.agree(total, terms | penalties, self.context.requests())
        batch.release_taps()  # frees memory for the backward pass
        return gate.ForwardPass(batch, loss, (*terms, *penalties, "loss"), message)

    def _train_checked(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """An iteration whose losses the host reads before the backward pass."""
        buffers = gate.KeptBuffers(self.network)
        passed = self._forward(images, labels, self.precision.gradient_scale)
        *losses, stop, save = passed.message.tolist()
        self._record_requests(gate.Requests(stop > 0, save > 0))
        values = dict(zip(passed.names, losses))
        if not all(math.isfinite(value) for value in losses):
            buffers.restore()
            self._tolerate(values)
            self.scheduler.step()
            return {}
        if self.divergence.begins(values):
            self._warn_of_divergence(values, buffers)
        self._update(passed)
        return values

    def _train_gated(self, images: Tensor, labels: Tensor) -> None:
        """An iteration whose losses the host reads before the next one, see `utils.runtime.gate`."""
        parts = self.method.parts
        kept = gate.Kept([self.scheduler, self.balancer, *(item for part in parts for item in part.assigned)])
        buffers = gate.KeptBuffers(self.network)
        passed = self._forward(images, labels, self.precision.scale_on_device())
        accepted = gate.acceptable(passed.message, self.divergence.limit)
        self.unsettled = gate.Outcome(passed.names, passed.message, accepted, (images, labels), kept)
        for part in parts:
            part.accepted = accepted
        self._update(passed, accepted)
        for part in parts:
            part.accepted = None
        buffers.restore(accepted)

    def settle(self) -> dict[str, float] | None:
        """Read the losses of the last iteration, if they are still on the device.

        Returns:
            What `train_iteration` returns where it reads them; None if it has done so.
        """
        outcome, self.unsettled = self.unsettled, None
        if outcome is None:
            return None
        accepted, values, requests = outcome.read()
        if accepted:
            self._record_requests(requests)
            self.divergence.begins(values)
            return values
        # Nothing was updated. The repetition warns, skips the batch or ends the training
        outcome.kept.restore()
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr()):
            group["lr"] = rate
        self.iteration -= 1
        values = self._train_checked(*outcome.batch)
        self.iteration += 1
        return values

    def _update(self, passed: gate.ForwardPass, accepted: Tensor | None = None) -> None:
        """Backward pass and step of the optimiser."""
        gated = {} if accepted is None else {"accepted": accepted}
        self.precision.backward(passed.loss, self.optimizer, **gated)
        self.balancer.after_backward()
        self.method.after_backward(self.network)
        self.precision.step(self.optimizer, **gated)
        self.method.after_step(self.network, passed.batch)
        self.scheduler.step()

    def _record_requests(self, requests: gate.Requests) -> None:
        """Record, on all processes, the requests that any of them has."""
        self.stop_agreed = distributed.max_over_ranks(self.context.stop.signum) if requests.stop else 0
        self.save_agreed = requests.save

    def _place(self, values: dict[str, float]) -> str:
        """Iteration and losses, for messages."""
        named = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
        return f"step {self.task.step}, epoch {self.epoch + 1}, iteration {self.iteration + 1}: {named}"

    def _tolerate(self, values: dict[str, float]) -> None:
        self.require_finite(self._place(values))
        files = ", ".join(self.context.files_of_batch(self.iteration))
        where = self._place(values) + (f"; batch: {files}" if files else "")
        if self.skipped >= self.opts.skip_nonfinite:
            raise NonFiniteLoss(self.divergence.failure(values, where, self.method.remedy))
        self.skipped += 1
        self.log.info(f"skipped a non-finite loss ({self.skipped} of {self.opts.skip_nonfinite}) at {where}")

    def require_finite(self, place: str) -> None:
        """Refuse to go on with, or to store, a network that is not finite. Call it on all processes.

        Args:
            place: where in the training this is.

        Raises:
            NonFiniteLoss: a weight or a statistic of the network is NaN or infinite.
        """
        try:
            divergence.require_finite(self.network, place)
        except NonFiniteNetwork as error:
            if self.divergence.values:
                raise NonFiniteLoss(self.divergence.failure({}, place, self.method.remedy)) from error
            raise

    def _warn_of_divergence(self, values: dict[str, float], buffers: gate.KeptBuffers) -> None:
        """Warn once per step, and keep the state before this iteration, which is saved if the loss becomes NaN or infinite."""
        state = self.state_dict()
        before = {name: value for name, value in buffers.named().items() if name in state["model"]}
        # The backward pass needs the buffers after the forward pass, so only the copy gets the earlier values
        self.divergence.state = copy_to_cpu(state | {"model": state["model"] | before})
        if not self.divergence.warned:
            self.divergence.warned = True
            self.log.info(self.divergence.warning(values, self._place(values), self.method.remedy))

    def _report(self, values: dict[str, float], bar: tqdm) -> None:
        self.meters.update(values)
        if self.iteration % self.opts.print_interval == 0 or self.iteration == 1:
            bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
            scalars = {f"loss/{name}" if name != "loss" else "loss/total": value for name, value in values.items()}
            scalars |= {f"weights/{name}": value for name, value in self._balance().items()}
            scalars["train/learning_rate"] = self.optimizer.param_groups[-1]["lr"]
            self.log.scalars(scalars, self.total_iterations)

    def _balance(self) -> dict[str, float]:
        """Values of the balancer to log, read from the device at once."""
        values = self.balancer.log_values()
        return dict(zip(values, torch.stack(list(values.values())).tolist())) if values else {}

    @property
    def total_iterations(self) -> int:
        """Iterations of this step so far, those of phases included."""
        return self.scheduler.last_epoch + sum(run.iterations_done for run in self.phase_runs)

    def _end_epoch(self) -> dict[str, float]:
        balance = self._balance()
        self.balancer.end_epoch()
        self.method.end_epoch(self.network, self.epoch)
        means = self.meters.means()
        self.history.append({"epoch": self.epoch, "losses": means, "balance": balance})
        self.epoch += 1
        self.iteration = 0
        self.meters = Meters()
        text = ", ".join(f"{name} {value:.4g}" for name, value in means.items())
        self.log.info(f"step {self.task.step} epoch {self.epoch}/{self.opts.epochs}: {text}")
        return means

    # ------------------------------------------------------------ evaluation

    def _validation_due(self) -> bool:
        at_end_of_epoch = self.iteration == 0 and self.epoch > self.validated_epoch
        return at_end_of_epoch and self.epoch % self.opts.val_interval == 0

    def _validate(self, loader: EvaluationBatches, save: Callable[[], None]) -> None:
        scores = self.evaluate(loader, title=f"validation after epoch {self.epoch}")
        if scores is None:
            save()
            raise Stopped(self.stop_agreed)
        self.method.end_validation(self.network)
        self.validated_epoch = self.epoch
        self.best_score = max(self.best_score, scores["Mean IoU"])  # a fraction, as in the official checkpoints
        miou, accuracy = 100 * scores["Mean IoU"], 100 * scores["Overall Acc"]
        self.history[-1]["validation_miou"] = miou
        values = {"val/mIoU_training_labels": miou, "val/accuracy_training_labels": accuracy}
        self.log.scalars(values, self.total_iterations)
        parts = of_old_and_new(scores, self.task.num_old) if self.opts.val_by_teacher is not None else ""
        self.log.info(
            f"step {self.task.step} epoch {self.epoch}/{self.opts.epochs}: validation mIoU {miou:.2f} %{parts} "
            f"({dataset.labels_of_validation(self.opts, self.task)})"
        )

    # ----------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to continue exactly; must be called on all processes."""
        return {
            "version": STATE_VERSION,
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "precision": self.precision.state_dict(),
            "balancer": self.balancer.state_dict(),
            "method": self.method.state_dict(),
            "phases": [run.state_dict() for run in self.phase_runs],
            "position": [self.epoch, self.iteration, self.validated_epoch, self.skipped],
            "meters": [self.meters.sums, self.meters.count],
            "best_score": self.best_score,
            "divergence": [self.divergence.reference, self.divergence.warned],
            "history": self.history,
            "iterations": self.total_iterations,
            "random": distributed.gather_objects(random_state(self.device)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, with the same number of processes.

        Raises:
            UserError: taken with another number of processes, or not by this program.
        """
        with structure.refusing_misfits():
            self._load(state)

    def _load(self, state: dict[str, Any]) -> None:
        structure.require_version(state, STATE_VERSION, distributed.world_size())
        parts: dict[str, Any] = {"scheduler": self.scheduler, "precision": self.precision, "balancer": self.balancer}
        mine = {name: part.state_dict() for name, part in (parts | {"model": self.network}).items()}
        mine |= {"position": [0] * 4, "best_score": 0.0, "divergence": [None, False]}
        if not (mine["precision"] and state["precision"]):  # a scaler has no state on the CPU
            del mine["precision"]
        structure.require_fit(mine, {name: state[name] for name in mine}, "state")
        structure.check_log(state["history"], state["meters"])
        self._restore(state)

    def _restore(self, state: dict[str, Any]) -> None:
        """Put every part back to a state that `state_dict` took of it."""
        for name in ("scheduler", "precision", "balancer", "optimizer", "method"):
            getattr(self, name).load_state_dict(state[name])
        self.network.load_state_dict(state["model"])
        structure.check_momenta(self.optimizer)
        initialise_momenta(self.optimizer, self.device)
        for run, saved in zip(self.phase_runs, state["phases"], strict=True):
            run.load_state_dict(saved)
        self.epoch, self.iteration, self.validated_epoch, self.skipped = state["position"]
        self.meters.sums, self.meters.count = state["meters"]
        self.best_score = state["best_score"]
        self.history[:] = state["history"]
        self.divergence.reference, self.divergence.warned = state["divergence"]
        set_random_state(state["random"][distributed.rank()], self.device)
