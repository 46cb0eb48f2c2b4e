"""Train, test or describe steps of a class-incremental segmentation task.

    python run.py --dataset shapes --task 6-2 --overlap --step 0 1 2 --method PLOP --backbone resnet18 --no_pretrained
    torchrun --nproc_per_node=4 run.py --data_root DATA --dataset voc --task 15-5s --overlap --step 0 1 2 3 4 5 --method PLOP --opt_level O1

One process runs without a launcher; any number under torchrun or torch.distributed.launch.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import os
import re
import signal
import sys
import traceback
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the imports take seconds: Ctrl-C ends them without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from filelock import FileLock
from torch.utils.data import DataLoader

import argparser
import dataset
import methods
import segmentation_module
from dataset.sampler import EpochSampler, PartSampler, end_workers, kill_workers, make_loader
from dataset.tasks import Task
from dataset.transform import denormalise
from train import NonFiniteLoss, Trainer
from utils import scheduler
from utils.checkpointing import checkpoint_files
from utils.checkpointing.random_state import seed_everything
from utils.checkpointing.store import Store
from utils.reporting import results, visualize
from utils.reporting.logger import Logger
from utils.runtime import amp, distributed, memory
from utils.runtime.signals import Interruptible, Stopped, StopRequest

#: Exit codes: a user's error, a loss that is not finite, another process that is gone.
USER_ERROR, NON_FINITE, PEER_LOST = 2, 3, 4


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: words after the program's name, those of this process by default.

    Returns:
        Exit code: 0, 2 for a user's error, 3 for a non-finite loss, 4 where another process is gone, 130 or 143 after a stop request.
    """
    opts = parse(argv)
    try:
        argparser.check(opts)
        if not opts.list_methods:
            run(opts)
        elif distributed.first_here():
            print(methods.describe())
    except (Stopped, NonFiniteLoss, ValueError, OSError, RuntimeError, MemoryError) as error:
        code = report(error, opts.debug)
        if code is None:
            raise
        return code
    finally:
        kill_workers()
        distributed.shutdown()
    return 0


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line; what is wrong with it is said by one process of a machine."""
    if distributed.first_here():
        return argparser.parse(argv)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        return argparser.parse(argv)


def report(error: Exception, debug: bool) -> int | None:
    """Say on stderr, once over all processes, why the program ends.

    Args:
        error: what ended it.
        debug: print where it was raised, too.

    Returns:
        The exit code; None for an error that only a bug explains.
    """
    said, code = distributed.is_main(), NON_FINITE
    text = f"error: {error}"
    if isinstance(error, Stopped):
        text, code = f"{error}; the same command with --resume continues", error.exit_code
    elif isinstance(error, (ValueError, OSError)):
        said, code = distributed.should_print(error), USER_ERROR
        # An error of a worker process that loads data brings a traceback, whose last line is the message.
        last_line = re.compile(rf"\n[\w.]*{type(error).__name__}: ")
        text = f"error: {last_line.split(str(error))[-1].strip()}"
    elif lack := memory.shortage(error):
        said, code, text = True, USER_ERROR, f"error: {lack}"
    elif distributed.peer_lost(error):
        said, code = True, PEER_LOST
        text = (
            f"error: process {distributed.rank()} ends because another process is gone ({str(error).splitlines()[0]})"
        )
    elif not isinstance(error, NonFiniteLoss):
        return None
    if debug:
        traceback.print_exc()
    if said:
        print(text, file=sys.stderr)
    return code


def run(opts: Namespace) -> None:
    """Join the other processes and go through the steps.

    Args:
        opts: parsed and checked.
    """
    device = distributed.initialise(opts.device, opts.local_rank)
    if opts.threads:
        torch.set_num_threads(opts.threads)
    if opts.deterministic:
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not opts.deterministic
    if distributed.is_main() and not opts.dry_run:
        announce(opts, device)
    if len(opts.step) > 1 and not (opts.dry_run or opts.check_data):
        distributed.on_main(lambda: check_later_steps(opts))
    faults: list[str] = []
    with StopRequest() as stop:
        for step in opts.step:
            if signum := distributed.max_over_ranks(stop.signum):
                raise Stopped(signum)
            seed_everything(opts.random_seed)
            task = dataset.load_task(opts, step)
            step_opts = options_of_step(opts, task)
            if opts.dry_run:
                dry_run(step_opts, task)
            elif opts.check_data:
                faults += check_data(step_opts, task)
            else:
                StepRun(step_opts, task, device, stop).go()
                gc.collect()  # networks and optimiser lie in circles of references: the next step needs their memory
    if faults := list(dict.fromkeys(faults)):
        raise distributed.SharedError(
            f"--check_data found {len(faults)} faults; mend or remove these:\n" + "\n".join(faults)
        )


def check_later_steps(opts: Namespace) -> None:
    """Refuse, before the first step is trained, what a later one would stumble over.

    Raises:
        ValueError: a step without images, or without the checkpoint that it builds on.
    """
    for number, step in enumerate(opts.step):
        task = dataset.load_task(opts, step)
        require_batches(len(dataset.build(opts, task).train), opts, task)
        store = Store(opts, task)
        finished = opts.resume and store.finished(step).is_file()
        if not opts.test and not finished and step > 0 and step - 1 not in opts.step[:number]:
            store.require_previous()


def require_batches(images: int, opts: Namespace, task: Task) -> None:
    """Refuse a step whose training images do not fill one batch."""
    world = distributed.world_size()
    if images < opts.batch_size * world and not opts.test:
        raise ValueError(
            f"step {task.step} of {task.name} has {images} training images, fewer than one batch of "
            f"{opts.batch_size} x {world} process(es); lower --batch_size"
        )


def announce(opts: Namespace, device: torch.device) -> None:
    """Say once what a preset, an official leftover or a mapping changes."""
    if opts.preset_applied:
        print(f"--method {opts.method}: " + ", ".join(f"{dest}={value}" for dest, value in opts.preset_applied))
    for note in argparser.notes(opts):
        print(f"note: {note}")
    print(
        amp.build(opts, device).describe(opts.opt_level) + f"; device {device}, {distributed.world_size()} process(es)"
    )


def options_of_step(opts: Namespace, task: Task) -> Namespace:
    """The options as this step sees them: its learning rate and its pseudo-label threshold."""
    opts = copy.copy(opts)
    opts.lr_of_step = scheduler.rate_of_step(opts.lr, opts.step, task.step)
    opts.threshold_of_step = opts.threshold + task.step * (opts.step_threshold or 0.0)
    return opts


def dry_run(opts: Namespace, task: Task) -> None:
    """Build everything, train nothing, print one line of JSON about the step."""
    splits = dataset.build(opts, task)
    require_batches(len(splits.train), opts, task)
    model = segmentation_module.build_network(opts, task.classes_per_step, pretrained=False)
    methods.build(opts, task)
    store = Store(opts, task)
    if task.step > 0 and store.previous().is_file():
        store.load_previous()
    sampler = EpochSampler(len(splits.train), opts.batch_size, opts.random_seed, world_size=distributed.world_size())
    line = {
        "task": task.name,
        "step": task.step,
        "classes": {"old": task.num_old, "new": task.num_new, "total": task.num_total},
        "images": {"train": len(splits.train), "val": len(splits.val), "test": len(splits.test)},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps_per_epoch": sampler.batches,
    }
    if distributed.is_main():
        print(json.dumps(line), flush=True)


def check_data(opts: Namespace, task: Task) -> list[str]:
    """Read every image and mask of the step; returns a sentence for each bad one."""
    faults = distributed.on_main(lambda: dataset.check_data(opts, task))
    if distributed.is_main():
        said = f"{len(faults)} faults" if faults else "every image and mask can be read"
        print(f"step {task.step} of {task.name}: {said}")
    return faults


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
        self.log = Logger(progress=not opts.no_progress)
        self.lock: FileLock | None = None
        self.train_loader: DataLoader | None = None
        #: Iterations that the tested weights were trained for, the abscissa of their test.
        self.iterations = 0

    def go(self) -> None:
        """Train (unless the step is finished or only a test is asked for), test, record."""
        distributed.on_main(self._claim)
        try:
            if distributed.on_main(self._finished_before):
                self.log.info(
                    f"step {self.task.step} of {self.task.name} is finished: {self.store.finished(self.task.step)}"
                )
                return
            # The main process scans the files first, the others then find its cache.
            self.test_only = distributed.on_main(lambda: dataset.build(self.opts, self.task) and self.test_only)
            distributed.run_on_all(self._build_data)
            resumed = distributed.run_on_all(self._build_trainer)
            self.trainer.start(self.sampler.batches)
            if not self.test_only:
                self._train(resumed)
                self.iterations = self.trainer.total_iterations
            self._test()
        finally:
            if self.train_loader is not None:
                end_workers(self.train_loader)
            self.log.close()
            if self.lock is not None:
                self.lock.release()

    # ------------------------------------------------------------- before work

    def _claim(self) -> None:
        """Refuse what could not be finished or would disturb another run."""
        self.store.check_writable(self.opts.results, self.opts.logdir)
        if not self.opts.test:
            self.lock = self.store.lock()

    def _finished_before(self) -> bool:
        """Whether `--resume` finds the step trained, tested and recorded."""
        self.test_only = self.opts.test
        resumable = self.opts.resume and not self.opts.test and not self.store.interrupted()
        if not resumable or not self.store.finished(self.task.step).is_file():
            return False
        state = self.store.check_finished()
        self._continue_date(state)
        self.test_only = not results.recorded(self.opts, self.task, state["model_state"])
        return not self.test_only

    def _build_data(self) -> None:
        """Data sets and loaders."""
        self.splits = dataset.build(self.opts, self.task)
        names = dataset.class_names(self.opts)
        self.class_names = [names[label] for label in self.task.label_ids]
        opts, world = self.opts, distributed.world_size()
        self.sampler = EpochSampler(
            len(self.splits.train), opts.batch_size, opts.random_seed, distributed.rank(), world, self.task.step
        )
        if not self.test_only:
            require_batches(len(self.splits.train), opts, self.task)
        pin = self.device.type == "cuda"
        self.train_loader = make_loader(self.splits.train, self.sampler, opts.batch_size, opts, pin, lasting=True)
        # Full images differ in size and cannot share a batch.
        per_batch = opts.batch_size if opts.crop_val else 1
        self.val_loader, self.test_loader = (
            make_loader(split, PartSampler(len(split), distributed.rank(), world), per_batch, opts, pin)
            for split in (self.splits.val, self.splits.test)
        )

    # ------------------------------------------------------------------ models

    def _build_trainer(self) -> dict[str, Any] | None:
        """Networks, method and trainer; returns what an interrupted run left, or None."""
        task, opts = self.task, self.opts
        previous: dict[str, Any] = {}
        teacher = None
        resumed = self.store.load_unfinished() if opts.resume and not self.test_only else None
        if self.store.damage:
            self.log.info(f"note: {self.store.damage}; going on from the state before it")
        if task.step > 0 and not self.test_only:
            previous = self.store.load_previous()
            self._continue_date(previous)
            teacher = segmentation_module.build_teacher(opts, task, previous).to(self.device)
        fresh = task.step == 0 and not self.test_only and opts.ckpt is None and resumed is None
        model = segmentation_module.build_student(opts, task, previous, pretrained=fresh)
        history = self._load_tested(model) if self.test_only else []
        model = model.to(self.device)
        if opts.channels_last:
            model = model.to(memory_format=torch.channels_last)
            teacher = teacher.to(memory_format=torch.channels_last) if teacher is not None else None
        method = methods.build(opts, task)
        method.attach(model, previous)
        self.trainer = Trainer(opts, task, method, model, teacher, self.device, self.log)
        self.trainer.stop, self.trainer.history = self.stop, history
        self.trainer.files_of_batch = self._files_of_batch
        self.trainer.balancer.inherit(previous.get("loss_weights"))
        return resumed

    def _load_tested(self, model: torch.nn.Module) -> list[dict]:
        """Put the weights that are to be tested into the model; returns how their training went."""
        path = Path(self.opts.ckpt) if self.opts.ckpt else self.store.finished(self.task.step)
        state = self.store.load_tested(path)
        segmentation_module.load_weights(model, state["model_state"], path, strict=self.opts.strict_weights)
        self.iterations = (state.get("scheduler_state") or {}).get("last_epoch", 0)
        return state.get("history", [])

    def _continue_date(self, previous: dict[str, Any]) -> None:
        """The results of a task that runs past midnight stay in the file of its first step."""
        if "date" not in self.opts.explicit:
            self.opts.date = previous.get("options", {}).get("date", self.opts.date)

    def _files_of_batch(self) -> list[str]:
        """Files of the batch under way, of all processes."""
        mine = [
            str(name) for index in self.sampler.batch(self.trainer.iteration) for name in self.splits.train.files(index)
        ]
        return [name for names in distributed.gather_objects(mine) for name in names]

    # ---------------------------------------------------------------- training

    def _train(self, resumed: dict[str, Any] | None) -> None:
        trainer, task = self.trainer, self.task
        if resumed is not None:
            distributed.run_on_all(lambda: self._continue(resumed))
        distributed.on_main(lambda: self._prepare_outputs(fresh=resumed is None))
        if resumed is None:
            self.sampler.set_position(0)
            trainer.method.begin_step(Interruptible(self.train_loader, self.stop), trainer.teacher, self.device)
            if signum := distributed.max_over_ranks(self.stop.signum):
                raise Stopped(signum)
        try:
            if self.opts.trial_batch:
                with memory.trial(self.opts.batch_size, self.opts.crop_size):
                    trainer.trial(self.train_loader)
            trainer.fit(self.train_loader, self.val_loader, self._save_unfinished)
        except NonFiniteLoss:
            state = trainer.state_dict()
            aside = self.store.finished(task.step).with_suffix(".nonfinite.pth")
            distributed.on_main(lambda: checkpoint_files.save(aside, {"state": state}))
            self.log.info(f"the state before the non-finite loss is in {aside}")
            raise
        trainer.method.end_step(trainer.network)
        state = trainer.state_dict()
        distributed.on_main(lambda: self.store.save_finished(state, trainer.balancer.loss_weights))

    def _continue(self, resumed: dict[str, Any]) -> None:
        self._continue_date(resumed)
        self.trainer.load_state_dict(resumed["state"])
        self.log.info(
            f"resumed step {self.task.step} at epoch {self.trainer.epoch + 1}, iteration {self.trainer.iteration + 1}"
        )

    def _prepare_outputs(self, fresh: bool) -> None:
        """Refuse outputs that would fail at the end of the step, then open them."""
        network, kept = self.trainer.network, (self.trainer.method.state_dict(), self.trainer.balancer.state_dict())
        self.store.require_space(
            checkpoint_files.size([network.state_dict(), *network.parameters(), *kept])
        )  # and momenta
        results.check(self.opts, self.task)
        self._open_log(0 if fresh else self.trainer.total_iterations)
        if fresh:
            self.store.begin()

    def _open_log(self, first_iteration: int | None = None) -> None:
        opts, task = self.opts, self.task
        folder = Path(opts.logdir) / f"{task.name}-{task.dataset}" / opts.name / f"step-{task.step}"
        self.log.open(folder, first_iteration)

    def _save_unfinished(self) -> None:
        state = self.trainer.state_dict()
        distributed.on_main(lambda: self.store.save_unfinished(state))

    # -------------------------------------------------------------------- test

    def _test(self) -> None:
        trainer, task = self.trainer, self.task
        if self.test_only:
            distributed.on_main(self._open_log)
        scores = trainer.evaluate(self.test_loader, keep=self.opts.sample_num)
        if scores is None:
            raise Stopped(trainer.stop_agreed)
        scores["Weights"] = checkpoint_files.digest(trainer.network.state_dict())
        entry = distributed.on_main(lambda: results.write(self.opts, task, scores, self.class_names, trainer.history))
        means = {key: entry[key] for key in ("old", "new", "all", "average_over_steps")}
        shown = {key: f"{100 * mean:.2f}" if mean is not None else "-" for key, mean in means.items()}
        self.log.info(
            f"step {task.step} of {task.name}: mIoU old {shown['old']}, new {shown['new']}, all {shown['all']}, "
            f"average over steps {shown['average_over_steps']} (%) -> {results.csv_path(self.opts, task)}"
        )
        self.log.scalars({f"test/{key}": mean for key, mean in means.items() if mean is not None}, self.iterations)
        if self.opts.visualize:
            picture = visualize.confusion_picture(scores["Confusion Matrix"], self.class_names)
            self.log.image("test/confusion", picture, self.iterations)
            for number, (image, label, prediction) in enumerate(scores["samples"]):
                self.log.image(
                    f"test/sample{number}", visualize.strip(denormalise(image), label, prediction), self.iterations
                )


if __name__ == "__main__":
    sys.exit(main())
