"""Data sets and loaders of one step."""

from __future__ import annotations

import functools
import hashlib
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dataset
from dataset.base import JoinedSet, SegmentationSet
from dataset.sampler import EpochSampler, EvaluationBatches, LoadedBatches, Loader, PartSampler
from dataset.tasks import Task
from dataset.teacher_labels import TeacherLabelled
from utils.checkpointing.store import Store
from utils.errors import UserError
from utils.runtime import distributed

#: Maps a function, which makes a data set of the training images with given indices, to the data sets of a replay memory.
Replay = Callable[[Callable[[Sequence[int]], SegmentationSet]], list[SegmentationSet]]


def require_batches(images: int, opts: Namespace, task: Task) -> None:
    """Refuse a step whose training images do not fill one batch."""
    world = distributed.world_size()
    if images < opts.batch_size * world and not opts.test:
        raise UserError(
            f"step {task.step} of {task.name} has {images} training images, fewer than one batch of "
            f"{opts.batch_size} x {world} process(es); lower --batch_size"
        )


def require_later_steps(opts: Namespace) -> None:
    """Refuse, before the first step is trained, a later step that cannot be trained.

    Raises:
        UserError: a step without images, or without the checkpoint that it builds on.
    """
    for number, step in enumerate(opts.step):
        task = dataset.load_task(opts, step)
        require_batches(len(dataset.build(opts, task).train), opts, task)
        store = Store(opts, task)
        finished = opts.resume and store.finished(step).is_file()
        if not opts.test and not finished and step > 0 and step - 1 not in opts.step[:number]:
            store.require_previous()


def check_step(opts: Namespace, task: Task) -> list[str]:
    """Read every image and mask of a step, print the result, and return a sentence for each bad file."""
    faults = distributed.on_main(lambda: dataset.check_data(opts, task))
    if distributed.is_main():
        said = f"{len(faults)} faults" if faults else "every image and mask can be read"
        print(f"step {task.step} of {task.name}: {said}")
    return faults


class StepData:
    """Data sets and loaders of a step.

    Args:
        opts: options of the step.
        task: the step.
        device: to which the batches are copied.
        replay: the method's `replay`, which extends the training set by a memory of earlier steps; None for a test, which accepts
            any number of training images.
        judge: the network whose predictions label old classes for the validation (`--val_by_teacher`), or None.

    Attributes:
        batches: of the training set.
        val_loader, test_loader: this process's share of the validation and test images, each once.
        class_names: by position in the order of learning.
    """

    def __init__(
        self,
        opts: Namespace,
        task: Task,
        device: torch.device,
        replay: Replay | None = None,
        judge: nn.Module | None = None,
    ):
        self.opts = opts
        splits, world, rank = dataset.build(opts, task), distributed.world_size(), distributed.rank()
        train: SegmentationSet | JoinedSet = splits.train
        if replay is not None:
            memory = replay(lambda indices: dataset.replay_set(opts, task, indices))
            train = JoinedSet([splits.train, *memory]) if memory else splits.train
            require_batches(len(train), opts, task)
        names = dataset.class_names(opts)
        self.class_names = [names[label] for label in task.label_ids]
        pin = device.type == "cuda"
        sampler = EpochSampler(len(train), opts.batch_size, opts.random_seed, rank, world, task.step)
        self.batches = LoadedBatches(train, sampler, opts, pin)
        # Full images differ in size and cannot share a batch.
        per_batch = opts.batch_size if opts.crop_val else 1
        self.val_loader: EvaluationBatches
        self.test_loader: EvaluationBatches
        self.val_loader, self.test_loader = (
            Loader(split, PartSampler(len(split), rank, world), per_batch, opts, pin)
            for split in (splits.val, splits.test)
        )
        if judge is not None:
            self.val_loader = TeacherLabelled(self.val_loader, judge, opts.val_by_teacher)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What must be the same after a resume: digest of the training images in their order, their number and the batches of an epoch."""
        data, root = self.batches.data, str(Path(self.opts.data_root))
        digest = hashlib.blake2b(digest_size=16)
        for position in range(len(data)):
            names = "\n".join(name.removeprefix(root) for name in data.files(position))
            digest.update(f"{names}\n\n".encode(errors="surrogateescape"))
        return {"images": digest.hexdigest(), "count": len(data), "batches": self.batches.sampler.batches}

    def require_same(self, identity: Any) -> None:
        """Refuse to continue a training of other images.

        Args:
            identity: of the data of the interrupted run, as its state has it.

        Raises:
            UserError: says how many images there were.
        """
        if identity != self.identity:
            count = identity.get("count") if isinstance(identity, dict) else "?"
            raise UserError(
                f"--resume: the interrupted run had another list of training images ({count}, now {self.identity['count']}); restore the "
                "list, or start the step anew without --resume"
            )

    def files_of_batch(self, number: int) -> list[str]:
        """Files of a batch of the current epoch, of all processes."""
        return [name for names in distributed.gather_objects(self.batches.files(number)) for name in names]
