"""dataset/shapes.py: deterministic, mixed, not solved by colour, quick to draw."""

from argparse import Namespace

import numpy as np
import pytest

import dataset
from dataset import shapes


def options(**changed):
    values = {
        "dataset": "shapes", "data_root": None, "task": "6-2", "task_file": None, "crop_size": 48, "crop_val": True,
        "overlap": True, "exclude_old": False, "data_masking": "current", "no_mask": False, "cross_val": False, "no_test": False,
        "val_on_trainset": False, "test_on_val": False, "disable_background": False, "ignore_test_bg": False, "random_seed": 42,
        "shapes_train": 60, "shapes_val": 20,
    }  # fmt: skip
    return Namespace(**{**values, **changed})


def test_a_scene_depends_on_seed_and_index_alone():
    image, mask = shapes.draw(1, 5, 64)
    assert image.shape == (64, 64, 3)
    assert mask.shape == (64, 64)
    assert image.dtype == mask.dtype == np.uint8
    again = shapes.draw(1, 5, 64)
    assert np.array_equal(again[0], image)
    assert np.array_equal(again[1], mask)
    assert not np.array_equal(shapes.draw(1, 6, 64)[0], image)
    assert not np.array_equal(shapes.draw(2, 5, 64)[0], image)


@pytest.mark.parametrize("size", [32, 49, 96])
def test_presence_is_what_is_drawn(size):
    source = shapes.ShapesSource("train", 80, size)
    shown = source.presence()
    for index in range(len(source)):
        assert np.flatnonzero(shown[index]).tolist() == np.unique(source.read(index)[1]).tolist()


def test_old_current_and_future_classes_meet():
    shown = shapes.ShapesSource("train", 300, 64).presence()
    base, middle, last = shown[:, 1:7].any(1), shown[:, 7:9].any(1), shown[:, 9:11].any(1)
    assert (base & middle & last).sum() > 50
    assert shown[:, 1:11].sum(axis=0).min() > 50


def test_colour_alone_gives_nothing_away():
    """The classes' mean colours over many scenes differ less than the colours of one class do."""
    colours = {class_id: [] for class_id in range(1, 11)}
    for index in range(300):
        image, mask = shapes.draw(1, index, 48)
        for class_id in set(np.unique(mask)) - {0, 255}:
            colours[class_id].append(image[mask == class_id].mean(axis=0))
    means = np.array([np.mean(c, axis=0) for c in colours.values()])
    within = np.array([np.std(c, axis=0) for c in colours.values()])
    assert means.std(axis=0).max() < 0.25 * within.min()


def test_splits_and_labels():
    task = dataset.load_task(options(), 1)
    splits = dataset.build(options(), task)
    assert dataset.class_names(options()) == shapes.CLASSES
    source = splits.train.source
    for position in range(len(splits.train)):
        shown = np.unique(source.read(int(splits.train.indices[position]))[1])
        assert {7, 8} & set(shown.tolist())
    seen = {int(v) for position in range(len(splits.train)) for v in splits.train[position][1].unique()}
    assert seen == {0, 7, 8, 255}
    tested = {int(v) for position in range(len(splits.test)) for v in splits.test[position][1].unique()}
    assert tested == {*range(9), 255}
    assert splits.train.files(0) == (f"shapes/train/{splits.train.indices[0]}",)


def test_disjoint_shows_no_future_class():
    task = dataset.load_task(options(), 0)
    both = [dataset.build(options(overlap=overlap), task).train for overlap in (True, False)]
    assert 0 < len(both[1]) < len(both[0])
    shown = both[1].source.presence()[both[1].indices]
    assert not shown[:, 7:11].any()


def test_large_crops_enlarge_the_drawing():
    source = shapes.ShapesSource("val", 1, 512)
    assert source.read(0)[1].shape == (shapes.MAX_SIZE, shapes.MAX_SIZE)
    splits = dataset.build(options(crop_size=160), dataset.load_task(options(), 0))
    assert splits.train[0][0].shape == splits.test[0][0].shape == (3, 160, 160)
