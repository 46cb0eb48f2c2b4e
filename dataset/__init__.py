"""The data sets: `DATASETS` lists them, `build` makes the three sets of a step, `check_data` reads every file.

A new data set is a file with a `Layout` (where the files are, what the classes are called) and a line in `DATASETS`.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataset import shapes, tasks
from dataset.ade import Ade
from dataset.base import SegmentationSet, Source, Splits, Transform, select
from dataset.cache import condense
from dataset.cityscapes_domain import CityscapesDomain
from dataset.folder import Folder
from dataset.layout import Layout
from dataset.source import FileSource
from dataset.tasks import Task
from dataset.transform import EvalTransform, FullImage, TrainTransform
from dataset.voc import Voc
from utils.errors import UserError
from utils.reporting.visualize import colour_map
from utils.types import IGNORE

#: Every value of `--dataset`; None is the embedded data set, which has no files and so no layout.
DATASETS: dict[str, Layout | None] = {
    "voc": Voc(),
    "ade": Ade(),
    "cityscapes_domain": CityscapesDomain(),
    "folder": Folder(),
    "shapes": None,
}

__all__ = [
    *("DATASETS", "SegmentationSet", "Splits", "Task"),
    *(
        "build",
        "check_data",
        "class_names",
        "colours",
        "described_task",
        "examined",
        "load_task",
        "pictured",
        "replay_set",
    ),
    *("labels_of_test", "labels_of_validation"),
]


_ALL_LABELS = "labels of all classes learned so far"


def class_names(opts: Namespace) -> tuple[str, ...]:
    """Names of the classes of `opts.dataset` by id, background first; of the labels of a domain-incremental one.

    The name of channel k of a task is `class_names(opts)[task.label_ids[k]]`.
    """
    layout = _layout(opts)
    return shapes.CLASSES if layout is None else layout.read_classes(_root(opts))


def colours(opts: Namespace) -> np.ndarray:
    """(256, 3) uint8, the colour of each class id of `opts.dataset`; the colours of Pascal VOC if the data set defines none."""
    table, layout = colour_map(), _layout(opts)
    palette = () if layout is None else layout.read_colours(Path(opts.data_root))
    if palette:
        table[: len(palette)] = palette
    return table


def load_task(opts: Namespace, step: int) -> Task:
    """The task that `opts` names (dataset, task, task_file, data_root), at a step; raises as `tasks.load` does."""
    sizes: tuple[int, ...] = ()
    if opts.dataset not in tasks.KNOWN:
        layout, classes = _layout(opts), len(class_names(opts))
        sizes = (len(layout.domains), classes) if layout is not None and layout.domains else (classes,)
    return tasks.load(opts.dataset, opts.task, step, opts.task_file, *sizes)


def described_task(described: dict[str, Any]) -> Task:
    """The task of a checkpoint, from the description in it (`utils.checkpointing.header.describe`).

    Raises:
        UserError: this program does not have the data set.
    """
    name = described["dataset"]
    if name not in DATASETS:
        raise UserError(f"the checkpoint is of the data set {name!r:.80}; this program has {', '.join(DATASETS)}")
    layout = DATASETS[name]
    steps = tuple(tuple(step) for step in described["steps"])
    domain = (True, len(layout.classes)) if layout is not None and layout.domains else ()
    return Task(name, described["name"], described["step"], steps, *domain)


def build(opts: Namespace, task: Task) -> Splits:
    """The data sets of a step.

    train: the training images that show a class of the step. Only the step's classes are labelled. Without `overlap`, images
    that also show a class of a later step are left out; with `exclude_old` those that also show a class of an earlier step.
    val: the validation images that show a class of the step, with the same labels. With `cross_val` it is a random fifth of
    the training images, which are then not trained on.
    test: the validation images (`val_on_trainset`: training images) that show a class seen so far. All classes seen so far
    are labelled.
    With `test_on_val` the images of each set are shuffled by a fixed seed; the first 80 % of training images and the last
    20 % of validation images are used. With `no_test` the test set is empty, and with `cross_val` too, the validation split is not read.

    Args:
        opts: dataset, data_root, crop_size, crop_val, overlap, exclude_old, data_masking, no_mask, cross_val, val_on_trainset,
            test_on_val, no_test, disable_background, ignore_test_bg, random_seed; for the embedded data set shapes_train and shapes_val,
            numbers of scenes.
        task: the step.

    Returns:
        train, val, test; a sample is an image (3, H, W) float32 and labels (H, W) uint8, positions in the order of
        learning and 255.

    Raises:
        UserError: no image belongs to one of the three, or a file of the data set cannot be used.
    """
    train_source = _source(opts, train=True)
    unread = opts.no_test and opts.cross_val
    val_source = train_source if unread else _source(opts, train=False)
    learning = task.label_table(_masking(opts), ignore_background=opts.disable_background)
    evaluate = EvalTransform(opts.crop_size) if opts.crop_val else FullImage()

    def shared(indices: np.ndarray, train: bool) -> np.ndarray:
        return _share(indices, train, (train_source if train else val_source).title) if opts.test_on_val else indices

    def chosen(train: bool, ids: tuple[int, ...]) -> np.ndarray:
        return shared(_chosen(train_source if train else val_source, task, ids), train)

    indices = shared(_trained_on(opts, train_source, task), train=True)
    if opts.cross_val:
        indices, held_out = _four_fifths(indices, opts.random_seed, train_source.title)
        val = _labelled(train_source, held_out, learning, evaluate)
    else:
        val = _labelled(val_source, chosen(False, task.new), learning, evaluate)
    train = _labelled(train_source, indices, learning, TrainTransform(opts.crop_size), opts.random_seed, task.step)
    test_source = train_source if opts.val_on_trainset else val_source
    testing = task.label_table("test", ignore_background=opts.ignore_test_bg)
    test_indices = np.zeros(0, np.int64) if opts.no_test else chosen(opts.val_on_trainset, task.seen)
    return Splits(train, val, _labelled(test_source, test_indices, testing, evaluate))


def replay_set(opts: Namespace, task: Task, indices: Sequence[int]) -> SegmentationSet:
    """Training images of earlier steps, labelled with all classes seen so far: a replay memory.

    Args:
        opts: as for `build`.
        task: the step that is trained.
        indices: of the images in the training split, as `SegmentationSet.indices` of an earlier step named them.
    """
    source = _source(opts, train=True)
    labels = task.label_table("current+old", ignore_background=opts.disable_background)
    return _labelled(source, np.asarray(indices), labels, TrainTransform(opts.crop_size), opts.random_seed, task.step)


def examined(opts: Namespace, task: Task, train: bool) -> tuple[SegmentationSet, SegmentationSet]:
    """The images of a step as centre crops, twice: with the labels of the step, and with those of all classes seen so far.

    Args:
        opts: as for `build`.
        task: the step.
        train: its training images, or the test images that show a class of it.
    """
    source = _source(opts, train)
    indices = _trained_on(opts, source, task) if train else _chosen(source, task, task.new)
    tables = (task.label_table(_masking(opts), ignore_background=opts.disable_background), task.label_table("test"))
    labelled, truth = (_labelled(source, indices, table, EvalTransform(opts.crop_size)) for table in tables)
    return labelled, truth


def pictured(opts: Namespace, task: Task, count: int) -> SegmentationSet:
    """The test images whose predictions are drawn after every step of a task, labelled with all classes of the task.

    They are the same at every step. Each image shows as many classes as possible that the images before it do not show.

    Args:
        opts: as for `build`.
        task: any step of the task.
        count: of images; fewer if the data set has fewer.
    """
    last = task.at(task.last_step)
    source = _source(opts, train=opts.val_on_trainset)
    ids = _wanted(task, last.seen)
    shows = source.presence()[:, ids].copy()  # images × classes
    chosen: list[int] = []
    while len(chosen) < min(count, int(source.presence()[:, ids].any(axis=1).sum())):
        if not shows.any():  # all classes are shown: continue with the remaining images and all classes
            shows = source.presence()[:, ids].copy()
            shows[chosen] = False
        best = int(shows.sum(axis=1).argmax())
        chosen.append(best)
        shows[:, shows[best]] = False
        shows[best] = False
    evaluate = EvalTransform(opts.crop_size) if opts.crop_val else FullImage()
    labels = last.label_table("test", ignore_background=opts.ignore_test_bg)
    return _labelled(source, np.asarray(chosen, dtype=np.int64), labels, evaluate)


def labels_of_validation(opts: Namespace, task: Task) -> str:
    """Which labels the validation of a step counts, as text for the log.

    Args:
        opts: data_masking, no_mask, disable_background, val_by_teacher.
        task: the step.
    """
    masking = _masking(opts)
    if task.domain or masking == "current+old":
        return _ALL_LABELS
    if opts.val_by_teacher is not None and task.step > 0:
        return f"labels of step {task.step}, old classes where the teacher is at least {opts.val_by_teacher:.10g} sure"
    ignored = masking == "new" or opts.disable_background
    return f"labels of step {task.step} alone, all other pixels {'ignored' if ignored else 'background'}"


def labels_of_test(opts: Namespace, task: Task) -> str:
    """Which labels the test of a step counts, as text for the log. Arguments as in `labels_of_validation`."""
    return _ALL_LABELS


def check_data(opts: Namespace, task: Task) -> list[str]:
    """Read every mask of the data set, and every image that the step uses or may use, in parallel.

    Returns:
        A sentence for each file and each line of a split that cannot be used; empty if there is none.
    """
    problems: list[str] = []
    layout = _layout(opts)
    if layout is None:  # the scenes are drawn; there are no files
        return problems
    for train in (True, False):
        source = FileSource(layout, _root(opts), train, problems)
        shown, found = source.inspect(np.arange(len(source)))
        if task.domain:
            shown = source.domains()
        ids = task.new if train and not opts.val_on_trainset else task.seen
        # whether the step uses an image is not known if its mask cannot be read
        bad = np.array([bool(problem) for problem in found], dtype=bool)
        looked_at = np.union1d(np.flatnonzero(bad), select(shown, _wanted(task, ids))).astype(np.int64)
        for index, problem in zip(looked_at, source.inspect(looked_at, decode=True)[1]):
            found[index] = problem
        problems += condense([line for problem in found for line in problem.splitlines()], len(source), source.title)
    return problems


def _masking(opts: Namespace) -> str:
    """Which classes the labels of training and validation images keep (see `Task.label_table`)."""
    return "current+old" if opts.no_mask else opts.data_masking


def _layout(opts: Namespace) -> Layout | None:
    if opts.dataset not in DATASETS:
        raise UserError(f"--dataset {opts.dataset!r} is not one of {', '.join(DATASETS)}")
    layout = DATASETS[opts.dataset]
    return None if layout is None else layout.configured(opts)


def _root(opts: Namespace) -> Path:
    root = Path(opts.data_root)
    if not root.is_dir():
        raise UserError(f"--data_root {opts.data_root} is not a folder")
    return root


def _source(opts: Namespace, train: bool) -> Source:
    layout = _layout(opts)
    if layout is not None:
        return FileSource(layout, _root(opts), train)
    split, count = ("train", opts.shapes_train) if train else ("val", opts.shapes_val)
    return shapes.ShapesSource(split, count, opts.crop_size)


def _wanted(task: Task, ids: tuple[int, ...]) -> list[int]:
    """The ids by which images are selected. Background is left out, because every image shows it."""
    return [class_id for class_id in ids if class_id != 0 or task.domain]


def _trained_on(opts: Namespace, source: Source, task: Task) -> np.ndarray:
    """Indices of the training images of a step; see `build`."""
    return _chosen(source, task, task.new, not opts.overlap, opts.exclude_old)


def _chosen(
    source: Source, task: Task, ids: tuple[int, ...], disjoint: bool = False, exclude_old: bool = False
) -> np.ndarray:
    """Indices of the images that show one of the ids; UserError if there are none.

    Args:
        disjoint: and no id of a later step.
        exclude_old: and no id of an earlier step.
    """
    allowed = [0, *task.order] if disjoint and not task.domain else None
    excluded = _wanted(task, task.old) if exclude_old else []
    indices = select(source.presence(), _wanted(task, ids), allowed, excluded)
    if len(indices) == 0:
        rule = " and no class of a later step (the disjoint setup; --overlap lifts this)" if allowed else ""
        rule += " and no class of an earlier step (--exclude_old)" if excluded else ""
        raise UserError(
            f"step {task.step} of task {task.name}: no image of the {source.title} shows "
            f"one of the classes {_wanted(task, ids)}{rule}"
        )
    return indices


def _four_fifths(indices: np.ndarray, seed: int, title: str) -> tuple[np.ndarray, np.ndarray]:
    """A random 80 % of the indices and the rest, each in order."""
    cut = int(0.8 * len(indices))
    if cut in (0, len(indices)):
        raise UserError(f"--cross_val cannot hold out a fifth of {len(indices)} image(s) of the {title}")
    shuffled = np.random.default_rng(seed).permutation(indices)
    return np.sort(shuffled[:cut]), np.sort(shuffled[cut:])


def _share(indices: np.ndarray, train: bool, title: str) -> np.ndarray:
    """`--test_on_val`: the first 80 % of the shuffled indices for training images, the last 20 % for validation images.

    Reference: the official program, which shuffles with RandomState(1) whatever `--random_seed` is.
    """
    shuffled = indices.tolist()
    np.random.RandomState(1).shuffle(shuffled)
    cut = int(0.8 * len(shuffled))
    kept = shuffled[:cut] if train else shuffled[cut:]
    if not kept:
        raise UserError(
            f"--test_on_val keeps 80 % of {len(indices)} image(s) of the {title}, which is none; leave --test_on_val out"
        )
    return np.array(kept, dtype=np.int64)


def _labelled(
    source: Source, indices: np.ndarray, labels: np.ndarray, transform: Transform, seed: int = 0, step: int = 0
) -> SegmentationSet:
    """A data set whose look-up table maps the values of a mask directly to labels."""
    classes = source.class_table
    table = np.where(classes >= 0, labels[classes], IGNORE)
    return SegmentationSet(source, indices, table, transform, seed, step)
