"""A tiny `folder` data set for the tests of dataset/: ten training and four validation images of 24 x 20 pixels."""

from argparse import Namespace

import numpy as np
from PIL import Image

import dataset

#: Class ids in the masks of the ten training and the four validation images.
SHOWN = [[1], [1, 2], [2], [2, 3], [3], [1, 3], [4], [1, 4], [1], [2]]
SHOWN_VAL = [[1], [2, 3], [3], [4]]


def save_mask(path, ids, size=(24, 20), mode="P"):
    """Bands of background, the ids and 255."""
    bands = np.resize(np.array([0, *ids, 255], dtype=np.uint8).repeat(3), size[0])
    mask = Image.fromarray(np.tile(bands, (size[1], 1)))
    if mode == "P":
        mask.putpalette([value for grey in range(256) for value in (grey, 255 - grey, 128)])
    mask.save(path)


def save_image(path, number, size=(24, 20)):
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_folder(tmp_path):
    """A `folder` data set of background and four classes under tmp_path, with a task file; returns tmp_path."""
    for name in ("images", "masks", "splits"):
        (tmp_path / name).mkdir()
    (tmp_path / "classes.txt").write_text("background\ncat\ndog\ncow\nhorse\n")
    for split, shown in (("train", SHOWN), ("val", SHOWN_VAL)):
        for number, ids in enumerate(shown):
            save_image(tmp_path / "images" / f"{split}{number}.png", number)
            save_mask(tmp_path / "masks" / f"{split}{number}.png", ids, mode="P" if number % 2 else "L")
        (tmp_path / "splits" / f"{split}.txt").write_text("\n".join(f"{split}{n}" for n in range(len(shown))))
    (tmp_path / "task.json").write_text('{"name": "2-1-1", "steps": [[0, 2, 1], [4], [3]]}')
    return tmp_path


def options(root, **changed):
    values = {
        "dataset": "folder", "data_root": str(root), "task": None, "task_file": str(root / "task.json"),
        "palette": None,
        "crop_size": 16, "crop_val": True, "overlap": True, "exclude_old": False, "data_masking": "current", "no_mask": False,
        "cross_val": False, "val_on_trainset": False, "test_on_val": False, "disable_background": False,
        "ignore_test_bg": False, "no_test": False, "random_seed": 42,
    }  # fmt: skip
    return Namespace(**{**values, **changed})


def build(root, step=0, **changed):
    opts = options(root, **changed)
    return dataset.build(opts, dataset.load_task(opts, step))


def labels(data):
    return {int(value) for position in range(len(data)) for value in data[position][1].unique()}
