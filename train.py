"""The training loop of one step: epochs, iterations, evaluation. It names no loss and no method.

trainer = Trainer(opts, task, method, model, teacher, device, log)
trainer.fit(train_loader, val_loader, save)
scores = trainer.evaluate(test_loader)
"""

from __future__ import annotations

import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dataset.tasks import Task
from methods.base import Method
from metrics.stream_metrics import StreamSegMetrics
from utils import scheduler
from utils.checkpointing import structure
from utils.checkpointing.random_state import random_state, set_random_state
from utils.optimizer import make_optimizer
from utils.reporting.logger import Logger
from utils.runtime import amp, distributed
from utils.runtime.signals import Stopped, StopRequest

#: Counts the changes after which a run continued from an older state would not go on exactly: such states are refused.
STATE_VERSION = 2


class NonFiniteLoss(ArithmeticError):
    """A loss term is NaN or infinite and the run is not told to tolerate it."""


class Meters:
    """Sums of named values over the iterations of an epoch, kept as plain numbers so that a resume continues them exactly."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.count = 0

    def update(self, values: dict[str, float]) -> None:
        """Add one iteration."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1

    def means(self) -> dict[str, float]:
        """Mean of every value over the iterations so far."""
        return {name: total / max(1, self.count) for name, total in self.sums.items()}


class Trainer:
    """Trains and evaluates the model of one step.

    Args:
        opts: the parsed command line, with `lr_of_step` resolved.
        task: which classes the step learns.
        method: loss terms and hooks.
        model: the student on its device, not wrapped.
        teacher: the frozen model of step t-1 in eval mode, or None.
        device: where to compute.
        log: terminal and TensorBoard.

    Attributes:
        epoch, iteration: position of the next iteration; `iteration` counts within the epoch.
    """

    def __init__(self, opts: Namespace, task: Task, method: Method, model: nn.Module, teacher: nn.Module | None,
                 device: torch.device, log: Logger):  # fmt: skip
        self.opts, self.task, self.method = opts, task, method
        self.network, self.teacher, self.device, self.log = model, teacher, device, log
        self.dtype = next(model.parameters()).dtype
        self.layout = torch.channels_last if opts.channels_last else torch.contiguous_format
        self.precision = amp.build(opts, device)
        self.balancer = method.make_balancer(model)
        if opts.fix_bn:  # before the optimiser and the wrapper collect what is trained
            model.fix_bn()
        extra, fused = self.balancer.parameters(), self.precision.allows_fused_step
        self.optimizer = make_optimizer(opts, task, model, extra, fused)
        self.model, self.optimizer = self.precision.prepare(model, self.optimizer)
        self.scheduler = None
        self.epoch = self.iteration = self.validated_epoch = 0
        self.skipped = 0
        self.best_score = 0.0
        self.meters = Meters()
        self.history: list[dict[str, Any]] = []
        self.stop = StopRequest()
        #: Signal that all processes agreed to stop on, or 0.
        self.stop_agreed = 0
        #: Names the files of the batch under way, for messages.
        self.files_of_batch: Callable[[], list[str]] = list
        self._saved_at = time.monotonic()

    # ---------------------------------------------------------------- set-up

    def start(self, iterations_per_epoch: int) -> None:
        """Fix the length of the schedule and wrap the model for several processes.

        Args:
            iterations_per_epoch: of each process.
        """
        self.scheduler = scheduler.build(self.opts, self.optimizer, self.opts.epochs * iterations_per_epoch)
        if self.opts.compile:
            if self.teacher is not None:
                self.teacher = torch.compile(self.teacher)
            if not self.balancer.needs_partial_backward:
                self.model = torch.compile(self.model)
        if distributed.active():
            # Synchronised norms keep equal statistics by themselves; the others follow the main process, as in the official runs.
            follow_main = not self.opts.norm_act.startswith("iabn_sync")
            self.model = distributed.wrap(self.model, self.device, follow_main)

    # -------------------------------------------------------------- training

    def fit(self, train_loader, val_loader: Iterable | None, save: Callable[[], None]) -> None:
        """Train to the last epoch, from wherever the trainer stands.

        Args:
            train_loader: yields (images, labels); its `sampler` takes a position and its `dataset` an epoch.
            val_loader: for the validation every `--val_interval` epochs, or None.
            save: writes the trainer's state; called every `--ckpt_interval` epochs, `--ckpt_minutes`, and on a stop request.

        Raises:
            Stopped: after a stop request, with the state saved.
            NonFiniteLoss: on a loss that is NaN or infinite, see `--skip_nonfinite`.
        """
        while True:
            if val_loader is not None and self._validation_due():
                self._validate(val_loader, save)
            if self.epoch >= self.opts.epochs:
                return
            self.train_epoch(train_loader, save)
            if self.epoch % self.opts.ckpt_interval == 0 and self.epoch < self.opts.epochs:
                save()
                self._saved_at = time.monotonic()

    def train_epoch(self, loader, save: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Train from the current position to the end of the epoch.

        Args:
            loader: as in `fit`.
            save: as in `fit`.

        Returns:
            Mean of every loss term over the epoch, all processes averaged.
        """
        self._position(loader)
        self.model.train()
        bar = self.log.bar(
            loader, f"step {self.task.step} epoch {self.epoch + 1}/{self.opts.epochs}", initial=self.iteration
        )
        for images, labels in bar:
            values = self.train_iteration(images, labels)
            self.iteration += 1
            if values:
                self._report(values, bar)
            if self.stop_agreed:
                save()
                raise Stopped(self.stop_agreed)
            if self._minutes_over():
                save()
                self._saved_at = time.monotonic()
        return self._end_epoch()

    def trial(self, loader: Iterable) -> None:
        """Run one batch forward and backward, and leave everything as it was: does it fit into the memory?

        Args:
            loader: its first batch is taken.

        Raises:
            RuntimeError, MemoryError: it does not; `utils.runtime.memory.trial` makes a sentence of it.
        """
        images, labels = next(iter(loader))
        images = images.to(self.device, self.dtype, memory_format=self.layout)
        buffers = [buffer.clone() for buffer in self.network.buffers()]
        momenta = self._momenta_to_come()
        try:
            with self.precision.autocast():
                batch = self.method.prepare(images, labels.to(self.device).long(), self.teacher)
                batch = batch.with_student(self.network(batch.images))
            torch.stack([term.reshape(()) for term in self.method.terms(batch).values()]).sum().backward()
        finally:
            del momenta
            self.optimizer.zero_grad(set_to_none=True)
            self._restore_buffers(buffers)

    def _momenta_to_come(self) -> list[Tensor]:
        """Room for what the first step of the optimiser allocates and the second forward pass finds taken."""
        if self.opts.momentum == 0 or self.optimizer.state:
            return []
        return [
            torch.empty_like(p) for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad
        ]

    @torch.no_grad()
    def _restore_buffers(self, buffers: list[Tensor]) -> None:
        """Take back what a forward pass did to the running statistics of the norms."""
        for buffer, value in zip(self.network.buffers(), buffers):
            buffer.copy_(value)

    def _position(self, loader) -> None:
        if hasattr(getattr(loader, "sampler", None), "set_position"):
            loader.sampler.set_position(self.epoch, self.iteration)
        if hasattr(getattr(loader, "dataset", None), "set_epoch"):
            loader.dataset.set_epoch(self.epoch)

    def train_iteration(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """One step of the optimiser.

        Args:
            images: (B, 3, H, W) normalised.
            labels: (B, H, W), positions in learning order, 255 ignored.

        Returns:
            Every loss term and the total, averaged over processes; empty if the iteration was skipped as non-finite.
        """
        images = images.to(self.device, self.dtype, non_blocking=True, memory_format=self.layout)
        labels = labels.to(self.device, non_blocking=True).long()
        self.optimizer.zero_grad(set_to_none=True)
        buffers = [buffer.clone() for buffer in self.network.buffers()] if self.opts.skip_nonfinite else []
        with self.precision.autocast():
            batch = self.method.prepare(images, labels, self.teacher)
            batch = batch.with_student(self.balancer.detach_taps(self.model(images)))
        self.balancer.gradient_scale = self.precision.gradient_scale
        terms = self.method.terms(batch)
        loss = self.balancer.combine(terms)
        values = self._agree(loss, terms)
        del batch, terms  # what the backward pass does not need makes room for it
        if not all(math.isfinite(value) for value in values.values()):
            self._tolerate(values)
            self._restore_buffers(buffers)
            if self.scheduler:
                self.scheduler.step()
            return {}
        self.precision.backward(loss, self.optimizer)
        self.balancer.after_backward()
        values |= {name: float(value) for name, value in self.method.after_backward(self.network).items()}
        self.precision.step(self.optimizer)
        self.method.after_step(self.network)
        if self.scheduler:
            self.scheduler.step()
        return values

    def _agree(self, loss: Tensor, terms: dict[str, Tensor]) -> dict[str, float]:
        """Average the losses over processes, and learn in the same message whether any of them was asked to stop."""
        vector = torch.stack([value.detach().reshape(()) for value in (*terms.values(), loss)])  # n
        vector = torch.cat([vector, vector.new_tensor([float(self.stop.signum)])])  # n+1
        *values, asked = distributed.mean_(vector).tolist()
        self.stop_agreed = max(distributed.gather_objects(self.stop.signum)) if asked else 0
        return dict(zip((*terms, "loss"), values))

    def _tolerate(self, values: dict[str, float]) -> None:
        self.skipped += 1
        named = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
        where = f"step {self.task.step}, epoch {self.epoch + 1}, iteration {self.iteration + 1}"
        files = ", ".join(self.files_of_batch())
        named += f"; batch: {files}" if files else ""
        if self.skipped > self.opts.skip_nonfinite:
            remedy = "lower --lr, --pod_factor or --loss_kd, or skip such batches with --skip_nonfinite N"
            raise NonFiniteLoss(f"non-finite loss at {where}: {named}; {remedy}")
        self.log.info(f"skipped a non-finite loss ({self.skipped} of {self.opts.skip_nonfinite}) at {where}: {named}")

    def _report(self, values: dict[str, float], bar) -> None:
        self.meters.update(values)
        if self.iteration % self.opts.print_interval == 0 or self.iteration == 1:
            if hasattr(bar, "set_postfix"):
                bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
            scalars = {f"loss/{name}" if name != "loss" else "loss/total": value for name, value in values.items()}
            scalars |= {f"balance/{name}": float(value) for name, value in self.balancer.log_values().items()}
            scalars["learning_rate"] = self.optimizer.param_groups[-1]["lr"]
            self.log.scalars(scalars, self.total_iterations)

    @property
    def total_iterations(self) -> int:
        """Iterations of this step so far."""
        return self.scheduler.last_epoch if self.scheduler is not None else self.iteration

    def _minutes_over(self) -> bool:
        """Whether a checkpoint is due by the clock, decided by the main process for all."""
        if not self.opts.ckpt_minutes:
            return False
        return distributed.any_true(time.monotonic() - self._saved_at > 60 * self.opts.ckpt_minutes, self.device)

    def _end_epoch(self) -> dict[str, float]:
        balance = {name: float(value) for name, value in self.balancer.log_values().items()}
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

    def _validate(self, loader: Iterable, save: Callable[[], None]) -> None:
        scores = self.evaluate(loader, title=f"validation after epoch {self.epoch}")
        if scores is None:
            save()
            raise Stopped(self.stop_agreed)
        self.validated_epoch = self.epoch
        self.best_score = max(self.best_score, scores["Mean IoU"])
        self.history[-1]["val_miou"] = scores["Mean IoU"]
        self.log.scalars({"val/mIoU": scores["Mean IoU"], "val/accuracy": scores["Overall Acc"]}, self.total_iterations)
        self.log.info(
            f"step {self.task.step} epoch {self.epoch}/{self.opts.epochs}: validation mIoU {scores['Mean IoU']:.4f}"
        )

    @torch.no_grad()
    def evaluate(self, loader: Iterable, title: str = "test", keep: int = 0) -> dict[str, Any] | None:
        """Scores of the student over a loader; every image counts once, whatever the number of processes.

        Args:
            loader: yields (images, labels); each process holds its own part of the images.
            title: text before the progress bar.
            keep: number of (image, label, prediction) triples to return under "samples", on the main process.

        Returns:
            The scores of `StreamSegMetrics.get_results`, with the (C, C) "Confusion Matrix"; None if a stop was asked for.
        """
        metrics = StreamSegMetrics(self.task.num_total, self.device)
        batches = iter(loader)  # starts processes, which is no good while the threads of the back end are busy
        self._share_buffers()
        was_training = self.network.training
        self.network.eval()
        samples: list[tuple[Tensor, Tensor, Tensor]] = []
        for images, labels in self.log.bar(batches, title, len(loader) if hasattr(loader, "__len__") else None):
            if self.stop.signum:
                break
            predictions = self.predict(images)
            metrics.update(labels.to(self.device, non_blocking=True), predictions)
            if len(samples) < keep:
                samples += list(zip(images, labels, predictions.cpu()))[: keep - len(samples)]
        self.network.train(was_training)
        self.stop_agreed = max(distributed.gather_objects(self.stop.signum))
        if self.stop_agreed:
            return None
        distributed.sum_(metrics.confusion_matrix)
        return metrics.get_results() | {"Confusion Matrix": metrics.confusion_matrix.cpu(), "samples": samples}

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Most likely class of every pixel.

        Args:
            images: (B, 3, H, W) normalised.

        Returns:
            (B, H, W) int64.
        """
        images = images.to(self.device, self.dtype, non_blocking=True, memory_format=self.layout)
        with self.precision.autocast():
            logits = self.network(images).logits
        if self.opts.dont_predict_bg:
            logits[:, 0] = -math.inf
        return logits.argmax(dim=1)

    def _share_buffers(self) -> None:
        """Norm statistics that are not synchronised differ between processes: the main process's are evaluated."""
        if distributed.active():
            for buffer in self.network.buffers():
                torch.distributed.broadcast(buffer, src=0)

    # ----------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact continuation needs; call it on all processes."""
        return {
            "version": STATE_VERSION,
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "precision": self.precision.state_dict(),
            "balancer": self.balancer.state_dict(),
            "method": self.method.state_dict(),
            "position": [self.epoch, self.iteration, self.validated_epoch, self.skipped],
            "meters": [self.meters.sums, self.meters.count],
            "best_score": self.best_score,
            "history": self.history,
            "random": distributed.gather_objects(random_state(self.device)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, with the same number of processes.

        Raises:
            ValueError: taken with another number of processes, or not by this program.
        """
        try:
            self._load(state)
        except (LookupError, TypeError, AttributeError, AssertionError, RuntimeError, OverflowError) as error:
            raise ValueError(
                f"--resume: the state of the interrupted run does not fit this one ({type(error).__name__}); start anew without it"
            ) from error

    def _load(self, state: dict[str, Any]) -> None:
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                "--resume: the interrupted run is of another version of this program, which would not continue it exactly; "
                "start the step anew without --resume"
            )
        random, processes = state["random"], distributed.world_size()
        if len(random) != processes:
            raise ValueError(
                f"the interrupted run had {len(random)} processes, this one has {processes}; "
                "start as many as before, or without --resume"
            )
        parts = {name: getattr(self, name) for name in ("scheduler", "precision", "balancer")} | {"model": self.network}
        mine = {name: part.state_dict() for name, part in parts.items()} | {"position": [0] * 4, "best_score": 0.0}
        if not (mine["precision"] and state["precision"]):  # a scaler has no state on the CPU
            del mine["precision"]
        structure.require_fit(mine, {name: state[name] for name in mine}, "state")
        structure.check_log(state["history"], state["meters"])
        for name, part in parts.items():
            part.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        structure.check_momenta(self.optimizer)
        self.method.load_state_dict(state["method"])
        self.epoch, self.iteration, self.validated_epoch, self.skipped = state["position"]
        self.meters.sums, self.meters.count = state["meters"]
        self.best_score, self.history = state["best_score"], state["history"]
        set_random_state(random[distributed.rank()], self.device)
