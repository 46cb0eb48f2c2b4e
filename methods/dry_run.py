"""--dry_run: build everything that a step needs, and train nothing."""

from __future__ import annotations

import json
from argparse import Namespace

import dataset
import methods
import segmentation_module
from dataset.sampler import EpochSampler
from dataset.step_data import require_batches
from dataset.tasks import Task
from utils.checkpointing.store import Store
from utils.runtime import distributed


def dry_run(opts: Namespace, task: Task) -> None:
    """Build data sets, network and method of a step, read the previous checkpoint, and print one line of JSON.

    Args:
        opts: options of the step.
        task: the step.

    Raises:
        UserError: something cannot be built.
    """
    splits = dataset.build(opts, task)
    require_batches(len(splits.train), opts, task)
    classes, method = segmentation_module.network_classes(opts, task), methods.build(opts, task)
    model = segmentation_module.build_network(opts, classes, False, method.wrap_model)
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
