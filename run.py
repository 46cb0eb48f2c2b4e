"""Train, test or describe steps of a class-incremental segmentation task.

    python run.py --dataset shapes --task 6-2 --overlap --step 0 1 2 --method PLOP --backbone resnet18 --no_pretrained
    torchrun --nproc_per_node=4 run.py --data_root DATA --dataset voc --task 15-5s --overlap --step 0 1 2 3 4 5 --method PLOP --opt_level O1

One process runs without a launcher; any number under torchrun or torch.distributed.launch.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

if __name__ == "__main__":  # the imports take seconds; Ctrl-C during them ends the program without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from filelock import FileLock

import argparser
import dataset
import methods
import segmentation_module
from dataset.kept_pictures import keep_pictures
from dataset.sampler import Interruptible
from dataset.step_data import StepData, check_step, require_later_steps
from dataset.tasks import Task
from dataset.transform import denormalise
from methods.dry_run import dry_run
from segmentation_module import SegmentationModel
from train import Trainer
from utils.checkpointing import checkpoint_files
from utils.checkpointing.header import iterations_of, plain_options
from utils.checkpointing.random_state import seed_everything
from utils.checkpointing.store import Store
from utils.errors import UserError
from utils.options import config
from utils.options.spelling import given
from utils.reporting import results, visualize
from utils.reporting.context import Context
from utils.reporting.logger import Logger
from utils.reporting.scores import log_folder, log_scores
from utils.runtime import console, distributed, errors, memory, workers
from utils.runtime.divergence import REMEDY
from utils.runtime.errors import NonFiniteLoss, NonFiniteNetwork
from utils.runtime.signals import Stopped, StopRequest

Network = TypeVar("Network", bound=torch.nn.Module)
Entry = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: words after the program's name, those of this process by default.

    Returns:
        Exit code: 0, 2 for a user's error, 3 for a non-finite loss, 4 where another process is gone, 130 or 143 after a stop request.
    """
    with console.tolerant():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    opts = parse(argv)
    try:
        argparser.check(opts)
        if not opts.list_methods:
            run(opts)
        elif distributed.first_here():
            print(methods.describe())
    except (Stopped, NonFiniteLoss, UserError, OSError, RuntimeError, MemoryError) as error:
        code = errors.report(error, opts.debug)
        if code is None:
            raise
        return code
    finally:
        workers.kill_workers()
        distributed.shutdown()
    return 0


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line; only the first process of a machine prints its errors."""
    if distributed.first_here():
        return argparser.parse(given(argv))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        return argparser.parse(given(argv))


def run(opts: Namespace) -> None:
    """Initialise the processes and run the steps.

    Args:
        opts: parsed and checked.
    """
    if opts.num_workers and not (opts.dry_run or opts.check_data):
        workers.start_server()
    device = distributed.initialise(opts.device, opts.local_rank)
    if opts.threads:
        torch.set_num_threads(opts.threads)
    if opts.deterministic:
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not opts.deterministic
    if distributed.is_main() and not opts.dry_run:
        argparser.announce(opts, device)
    if len(opts.step) > 1 and not (opts.dry_run or opts.check_data):
        distributed.on_main(lambda: require_later_steps(opts))
    faults: list[str] = []
    with StopRequest() as stop:
        for step in opts.step:
            stop.raise_on_all()
            seed_everything(opts.random_seed)
            task = dataset.load_task(opts, step)
            step_opts = argparser.options_of_step(opts, task)
            if opts.dry_run:
                dry_run(step_opts, task)
            elif opts.check_data:
                faults += check_step(step_opts, task)
            else:
                StepRun(step_opts, task, device, stop).go()
                gc.collect()  # frees networks and optimiser, which reference each other, before the next step
    if faults := list(dict.fromkeys(faults)):
        raise distributed.SharedError(
            f"--check_data found {len(faults)} faults; correct or remove these:\n" + "\n".join(faults)
        )


@dataclass(frozen=True)
class Plan:
    """What remains to be done for a step.

    Attributes:
        finished: it is trained, tested and recorded.
        test_only: it is trained already, or only a test is asked for (`--test`).
        resumed: an interrupted run of it is continued.
    """

    finished: bool = False
    test_only: bool = False
    resumed: bool = False


class Prepared(NamedTuple):
    """Networks and data of a training.

    Attributes:
        model: the student.
        teacher: the frozen model of step t−1, where the method uses it.
        previous: checkpoint of step t−1, empty at step 0.
        unfinished: state of the interrupted run that is continued, or None.
        data: data sets and loaders.
    """

    model: SegmentationModel
    teacher: torch.nn.Module | None
    previous: dict[str, Any]
    unfinished: dict[str, Any] | None
    data: StepData


class StepRun:
    """One step of a task, from its data to its row in the results.

    Args:
        opts: options of this step.
        task: the step.
        device: where to compute.
        stop: the process's stop request.
    """

    def __init__(self, opts: Namespace, task: Task, device: torch.device, stop: StopRequest):
        self.opts, self.task, self.device, self.stop = opts, task, device, stop
        self.store = Store(opts, task)
        self.origin = results.origin(opts, self.store.finished(task.step), plain_options(opts))
        self.log = Logger(progress=not opts.no_progress)

    def go(self) -> None:
        """Train (unless the step is finished or only a test is asked for), test, record."""
        # The first look is without the lock: runs that find the step finished do not refuse each other.
        if distributed.on_main(self._plan).finished:
            return
        lock = distributed.on_main(self._claim, local=True)
        try:
            plan: Plan = distributed.on_main(self._plan)
            if plan.finished:
                return
            # The main process scans the files first; the others then read its cache.
            distributed.on_main(lambda: dataset.build(self.opts, self.task) and None)
            if not (plan.test_only or self.opts.no_test) and self.task.step == self.opts.step[0] > 0:
                self._record_previous()
            if plan.test_only:
                self._test_checkpoint()
            else:
                self._train_and_test(plan.resumed)
        finally:
            self.log.close()
            if lock is not None:
                lock.release()

    # ------------------------------------------------------------- before work

    def _claim(self) -> FileLock | None:
        """Check that the outputs can be written, and lock the step unless it is only tested."""
        self.store.check_writable(self.opts.results, self.opts.logdir)
        return None if self.opts.test else self.store.lock()

    def _plan(self) -> Plan:
        """What is to be done, given `--test`, `--resume` and the files of earlier runs; prints a line if that is nothing."""
        if self.opts.test or not self.opts.resume:
            return Plan(test_only=self.opts.test)
        if self.store.interrupted():
            return Plan(resumed=True)
        if not self.store.finished(self.task.step).is_file():
            return Plan()
        state = self.store.check_finished()
        self._continue_date(state)
        finished = self.opts.no_test or results.recorded(self.opts, self.task, state["model_state"])
        if finished:
            path = self.store.finished(self.task.step)
            self.log.info(f"step {self.task.step} of {self.task.name} is finished: {path}")
        return Plan(finished, test_only=True)

    def _record_previous(self) -> None:
        """Record the scores of the steps before the first step of this run, which the average over steps needs."""
        before = self.task.at(self.task.step - 1)

        def known() -> tuple[str, bool]:
            state = self.store.load_previous()
            self._continue_date(state)
            return self.opts.date, results.copy_scores(self.opts, before, state)

        self.opts.date, found = distributed.on_main(known)
        if not found and self.store.starts_from_file:
            self.log.info(
                f"the scores of {self.opts.step_ckpt} are not in {self.opts.results}: it is tested as step {before.step}"
            )
            opts = copy.copy(self.opts)
            opts.test, opts.ckpt = True, opts.step_ckpt
            StepRun(opts, before, self.device, self.stop).go()
            seed_everything(self.opts.random_seed)  # as before the test, which drew random weights

    def _continue_date(self, previous: Mapping[str, Any]) -> None:
        """Take over the date of the previous checkpoint, so that the results of all steps of a task are in one file."""
        if "date" not in self.opts.explicit:
            self.opts.date = previous.get("options", {}).get("date", self.opts.date)

    # ------------------------------------------------------------------ models

    def _test_checkpoint(self) -> None:
        """Test the checkpoint of the step, train nothing."""
        opts, task = self.opts, self.task
        method = methods.build(opts, task)
        data, state, model = distributed.run_on_all(lambda: self._load_tested(method))
        try:
            context = Context(self.device, self.log, self.stop)
            trainer = Trainer(opts, task, method, model, None, context, len(data.batches))
            origin = results.origin(opts, state["file"], state.get("options"))
            weights = checkpoint_files.digest(state["model_state"])
            distributed.on_main(lambda: results.check(opts, task, origin | {"weights_sha256": weights}))
            before, iterations = iterations_of(state)
            distributed.on_main(lambda: self._open_log(None, before))
            self._test(trainer, data, iterations, state.get("history", []), origin)
        finally:
            data.batches.close()

    def _load_tested(self, method: methods.Method) -> tuple[StepData, dict[str, Any], SegmentationModel]:
        """Load the data, the checkpoint and the network of a test."""
        opts, task = self.opts, self.task
        path = Path(opts.ckpt) if opts.ckpt else self.store.finished(task.step)
        state = self.store.load_tested(path)
        classes = segmentation_module.network_classes(opts, task)
        model = segmentation_module.build_network(opts, classes, False, method.wrap_model)
        segmentation_module.load_weights(model, state["model_state"], path, strict=opts.strict_weights)
        return StepData(opts, task, self.device), state, self._placed(model)

    def _placed(self, model: Network) -> Network:
        """The network on the device, in the memory format of the run."""
        model = model.to(self.device)
        return model.to(memory_format=torch.channels_last) if self.opts.channels_last else model

    def _teacher(self, method: methods.Method, previous: dict[str, Any]) -> torch.nn.Module:
        return self._placed(segmentation_module.build_teacher(self.opts, self.task, previous, method.wrap_model))

    def _train_and_test(self, resumed: bool) -> None:
        method = methods.build(self.opts, self.task)
        prepared = distributed.run_on_all(lambda: self._prepare(method, resumed))
        data, previous, unfinished = prepared.data, prepared.previous, prepared.unfinished
        try:
            if unfinished is None and self.opts.ckpt is None:
                batches = Interruptible(data.batches, self.stop)
                method.init_classifier(prepared.model, prepared.teacher, batches, self.device)
                self.stop.raise_on_all()
            context = Context(self.device, self.log, self.stop, data.files_of_batch, self.opts.ckpt_minutes)
            trainer = Trainer(
                self.opts, self.task, method, prepared.model, prepared.teacher, context, len(data.batches)
            )
            self._train(trainer, data, previous, unfinished)
            if not self.opts.no_test:
                self._test(trainer, data, trainer.total_iterations, trainer.history, self.origin)
        finally:
            data.batches.close()

    def _prepare(self, method: methods.Method, resumed: bool) -> Prepared:
        """Load the networks, the data and the state of an interrupted run."""
        task, opts = self.task, self.opts
        previous: dict[str, Any] = {}
        teacher = None
        if task.step > 0:
            previous = self.store.load_previous()
            self._continue_date(previous)
            if method.uses_teacher:
                teacher = self._teacher(method, previous)
        unfinished = self.store.load_unfinished() if resumed else None
        if self.store.damage:
            self.log.info(f"note: {self.store.damage}; the state before it is continued")
        fresh = task.step == 0 and opts.ckpt is None and unfinished is None
        model = self._placed(segmentation_module.build_student(opts, task, previous, fresh, method.wrap_model))
        method.attach(model, teacher, previous)
        judge = None
        if opts.val_by_teacher is not None and task.step > 0:
            # A network that is built for the validation must not change the random numbers of the training
            with torch.random.fork_rng():
                judge = teacher or self._teacher(method, previous)
        data = StepData(opts, task, self.device, method.replay, judge)
        return Prepared(model, teacher, previous, unfinished, data)

    # ---------------------------------------------------------------- training

    def _train(
        self, trainer: Trainer, data: StepData, previous: Mapping[str, Any], unfinished: dict[str, Any] | None
    ) -> None:
        task = self.task
        if unfinished is not None:
            distributed.run_on_all(lambda: self._continue(trainer, data, unfinished))
        distributed.on_main(lambda: self._prepare_outputs(trainer, fresh=unfinished is None))
        if unfinished is None:
            trainer.method.begin_step(Interruptible(data.batches, self.stop), trainer.teacher, self.device)
            self.stop.raise_on_all()
        try:
            if self.opts.trial_batch:
                with memory.trial(self.opts.batch_size, self.opts.crop_size):
                    trainer.trial(data.batches)
            trainer.fit(data.batches, data.val_loader, lambda: self._save_unfinished(trainer, data))
            trainer.require_finite(f"the end of the training of step {task.step}")
            if 0 < self.opts.epochs * trainer.iterations_per_epoch <= trainer.skipped:
                raise NonFiniteLoss(
                    f"step {task.step} learned nothing: the loss of every batch was not finite; {REMEDY}"
                )
            trainer.method.end_step(trainer.network, data.batches, self.device)
            trainer.require_finite(f"the end of step {task.step}")
        except NonFiniteLoss as error:
            self._set_aside(trainer, error)
            raise
        state = trainer.state_dict()
        state["model"] = trainer.method.export(state["model"])
        weights, inherited = trainer.balancer.loss_weights, previous.get("loss_weights", {})
        distributed.on_main(lambda: self.store.save_finished(state, weights, inherited))

    def _set_aside(self, trainer: Trainer, error: NonFiniteLoss) -> None:
        """Save the last state whose values are finite, for analysis."""
        path = self.store.finished(self.task.step).with_suffix(".nonfinite.pth")
        if trainer.divergence.state is None and isinstance(error, NonFiniteNetwork):
            return  # no earlier state is in memory
        state = trainer.divergence.state or trainer.state_dict()
        distributed.on_main(lambda: checkpoint_files.save(path, {"state": state}))
        when = "in which it began to diverge" if trainer.divergence.state else "in which it was not finite"
        self.log.info(f"the state before the iteration {when} is in {path}")

    def _continue(self, trainer: Trainer, data: StepData, unfinished: dict[str, Any]) -> None:
        self._continue_date(unfinished)
        state = unfinished["state"]
        trainer.load_state_dict(state)
        data.require_same(state.get("data"))
        threads = torch.get_num_threads()
        if state.get("threads") != threads:
            self.log.info(
                f"note: the interrupted run computed with {state.get('threads')} threads, this one has {threads}, which rounds otherwise: "
                f"the weights will differ in their last digits; --threads {state.get('threads')} continues exactly"
            )
        epochs = self.opts.epochs
        place = f"epoch {trainer.epoch + 1}/{epochs}, iteration {trainer.iteration + 1}/{trainer.iterations_per_epoch}"
        if trainer.epoch == epochs:  # it was stopped in the validation after the last epoch
            place = f"the end of epoch {epochs}/{epochs}"
        self.log.info(f"resumed step {self.task.step} at {place}")

    def _prepare_outputs(self, trainer: Trainer, fresh: bool) -> None:
        """Check that the outputs can be written, then open them, so that the end of the step does not fail."""
        network, kept = trainer.network, (trainer.method.state_dict(), trainer.balancer.state_dict())
        # The momenta have the sizes of the parameters
        self.store.require_space(checkpoint_files.size([network.state_dict(), *network.parameters(), *kept]))
        results.check(self.opts, self.task, self.origin)
        self._open_log(0 if fresh else trainer.total_iterations, self.store.iterations_before)
        if fresh and (replaced := self.store.begin()):
            self.log.info(
                f"step {self.task.step} of {self.task.name} is trained again: its last checkpoint is kept as {replaced}"
            )

    def _open_log(self, first_iteration: int | None, before: int) -> None:
        self.log.open(log_folder(self.opts, self.task) / f"step-{self.task.step}", first_iteration, before)

    def _save_unfinished(self, trainer: Trainer, data: StepData) -> None:
        place = f"step {self.task.step}, epoch {trainer.epoch + 1}, before iteration {trainer.iteration + 1}"
        trainer.require_finite(place)
        state = trainer.state_dict() | {"data": data.identity, "threads": torch.get_num_threads()}
        self.log.flush()  # a resume continues the curves from this state
        distributed.on_main(lambda: self.store.save_unfinished(state))

    # -------------------------------------------------------------------- test

    def _test(self, trainer: Trainer, data: StepData, iterations: int, history: list[Entry], origin: Entry) -> None:
        """Test the trainer's network and record the scores.

        Args:
            trainer: holds the network.
            data: of the step.
            iterations: that were trained, the abscissa of the test's curves.
            history: of the training, an entry for each epoch.
            origin: of the tested weights (`results.origin`).
        """
        task = self.task
        weights = checkpoint_files.digest(trainer.network.state_dict())  # those of the checkpoint
        trainer.method.begin_test(trainer.network)
        scores = trainer.evaluate(data.test_loader, keep=self.opts.sample_num, views=trainer.test_views)
        if scores is None:
            raise Stopped(trainer.stop_agreed)
        scores |= {"Weights": weights, "Origin": origin}
        entry = distributed.on_main(lambda: results.write(self.opts, task, scores, data.class_names, history))
        log_scores(self.log, self.opts, task, entry, dataset.labels_of_test(self.opts, task), iterations)
        if self.opts.visualize:
            for name, picture in visualize.pictures_of_test(scores, data.class_names, denormalise).items():
                self.log.image(name, picture, iterations)
        distributed.on_main(lambda: keep_pictures(self.opts, task, trainer.predict_each, self.log, iterations))
        path, parser = results.csv_path(self.opts, task), argparser.build_parser()
        distributed.on_main(lambda: config.keep(path, self.opts, parser, self.log.info))


if __name__ == "__main__":
    sys.exit(main())
