"""scripts/make_subset.py on tiny folders in the layout of VOC, and the task files of the table that it belongs to."""

import gzip
import json

import numpy as np
import pytest
from PIL import Image

from dataset import tasks
from dataset.source import FileSource
from dataset.voc import Voc
from scripts import make_subset
from tests.support.paths import ROOT
from tests.support.tiny_folder import save_image, save_mask

CAT, DOG, PERSON = (Voc.classes.index(name) for name in ("cat", "dog", "person"))


def large_set(folder, sizes=None):
    """Six training and two validation images in VOC's layout; train.txt has the first three of them."""
    base = folder / "PascalVOC12"
    images, masks = base / "VOCdevkit" / "VOC2012" / "JPEGImages", base / "SegmentationClassAug"
    for path in (images, masks, base / "splits"):
        path.mkdir(parents=True)
    shown = {"a": [CAT], "b": [PERSON], "c": [DOG, PERSON], "d": [DOG], "e": [PERSON], "f": [CAT], "v": [CAT], "w": [1]}
    for number, (name, ids) in enumerate(shown.items()):
        size = (sizes or {}).get(name, (96, 64))
        save_image(images / f"{name}.jpg", number, size)
        save_mask(masks / f"{name}.png", ids, size, mode="L" if name == "d" else "P")
    line = "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png\n"
    for split, names in {"train_aug": "abcdef", "train": "abc", "val": "vw"}.items():
        (base / "splits" / f"{split}.txt").write_text("".join(line.format(name) for name in names))
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(source, out, *classes, short_side=32):
    words = ["--data_root", source, "--classes", *classes, "--short_side", short_side, "--out", out]
    return make_subset.main([str(word) for word in words])


def test_images_of_the_classes_at_the_new_size(tmp_path, capsys):
    source, out = large_set(tmp_path / "large"), tmp_path / "small"
    before = contents(source)
    assert run(source, out, "cat", "dog") == 0
    assert contents(source) == before
    assert "split train_aug of voc: 4 of 6 images" in capsys.readouterr().out
    base = out / "PascalVOC12"
    line = "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png\n"
    for split, names in {"train_aug": "acdf", "train": "ac", "val": "v"}.items():
        assert (base / "splits" / f"{split}.txt").read_text() == "".join(line.format(name) for name in names)
    assert sorted(path.stem for path in (base / "SegmentationClassAug").iterdir()) == list("acdfv")
    small, large = (FileSource(Voc(), root, train=True) for root in (out, source))
    for index, original in enumerate([0, 2, 3, 5]):
        image, mask = small.read(index)
        assert image.shape == (32, 48, 3) and mask.shape == (32, 48)
        assert set(np.unique(mask)) == set(np.unique(large.read(original)[1]))  # other classes keep their values
    assert Image.open(base / "SegmentationClassAug" / "a.png").getpalette()[:6] == [0, 255, 128, 1, 254, 128]


def test_images_are_averaged_and_masks_are_not(tmp_path):
    """Stripes of one pixel become grey in the image; a mask of two values has no third one."""
    source, out = large_set(tmp_path / "large"), tmp_path / "small"
    base = source / "PascalVOC12"
    stripes = np.zeros((64, 96), dtype=np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(np.stack([stripes] * 3, axis=2)).save(base / "VOCdevkit/VOC2012/JPEGImages/a.jpg", quality=100)
    Image.fromarray(np.where(stripes > 0, CAT, DOG).astype(np.uint8)).save(base / "SegmentationClassAug/a.png")
    assert run(source, out, "cat", "dog", short_side=16) == 0
    image, mask = FileSource(Voc(), out, train=True).read(0)
    assert image[4:-4, 4:-4].min() > 100 and image[4:-4, 4:-4].max() < 155
    assert set(np.unique(mask)) <= {CAT, DOG}


def test_the_same_input_gives_the_same_files_and_small_images_are_copied(tmp_path):
    source = large_set(tmp_path / "large", sizes={"c": (40, 20)})
    for name in ("one", "two"):
        assert run(source, tmp_path / name, "cat", "dog") == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert run(tmp_path / "one", tmp_path / "again", "cat", "dog") == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "one")
    for name in ("VOCdevkit/VOC2012/JPEGImages/c.jpg", "SegmentationClassAug/c.png"):
        assert (tmp_path / "one/PascalVOC12" / name).read_bytes() == (source / "PascalVOC12" / name).read_bytes()


def test_an_image_whose_object_is_lost_at_the_new_size_is_left_out(tmp_path):
    source, out = large_set(tmp_path / "large"), tmp_path / "small"
    mask = np.zeros((64, 96), dtype=np.uint8)
    mask[0, 0] = CAT  # the nearest pixel of the first new one is (2, 2)
    Image.fromarray(mask).save(source / "PascalVOC12" / "SegmentationClassAug" / "a.png")
    assert run(source, out, "cat", short_side=16) == 0
    assert "/a.jpg" not in (out / "PascalVOC12" / "splits" / "train_aug.txt").read_text()


@pytest.mark.parametrize(
    ("size", "expected"), [((500, 281), (285, 160)), ((375, 500), (160, 213)), ((160, 200), (160, 200))]
)
def test_sizes(size, expected):
    assert make_subset.reduced_size(size, 160) == expected


def refused(source, out, message, capsys, *classes, **options):
    """A refusal in one line that writes nothing."""
    before = contents(source.parent)
    assert run(source, out, *(classes or ("cat",)), **options) == 2
    said = capsys.readouterr().err
    assert message in said and said.splitlines()[-1].startswith("error: ")
    assert contents(source.parent) == before
    assert not list(source.parent.rglob(".PascalVOC12*"))


def test_refusals(tmp_path, capsys):
    source, out = large_set(tmp_path / "large"), tmp_path / "small"
    refused(source, source / "PascalVOC12" / "part", "where nothing is written", capsys)
    (tmp_path / "link").symlink_to(source)
    refused(source, tmp_path / "link" / "part", "where nothing is written", capsys)
    refused(source, out, "'catt' is no class of voc; did you mean cat?", capsys, "catt")
    refused(source, out, "--short_side 0 is no size", capsys, short_side=0)
    refused(source, out, "no image of the split val of voc shows one of the classes dog", capsys, "dog")
    refused(tmp_path / "large" / "nowhere", out, "scripts/prepare_voc.py builds PascalVOC12", capsys)
    (source / "PascalVOC12/VOCdevkit/VOC2012/JPEGImages/f.jpg").write_bytes(b"no image")
    refused(source, out, "f.jpg cannot be read", capsys)


def test_a_data_set_is_not_replaced(tmp_path, capsys):
    source, out = large_set(tmp_path / "large"), tmp_path / "small"
    assert run(source, out, "cat") == 0
    refused(source, out, "PascalVOC12 exists; name another folder with --out, or delete it", capsys)


def test_counts_of_the_published_masks_in_docs_results():
    with gzip.open(ROOT / "tests" / "facts" / "voc_classes.json.gz", "rt") as stream:
        published = json.load(stream)
    animals = {Voc.classes.index(name) for name in ("cat", "cow", "dog", "horse", "sheep")}
    page = " ".join((ROOT / "docs" / "results" / "README.md").read_text().split())
    for sentence, ids in (
        ("{:,} training and {:,} validation images show one of the five animals", animals),
        ("`person` among the classes the subset has {:,} and {:,} images", animals | {PERSON}),
    ):
        counts = [sum(bool(ids & set(shown)) for shown in published[split].values()) for split in ("train_aug", "val")]
        assert sentence.format(*counts) in page


@pytest.mark.parametrize("name", ["animals_task", "animals_task_b", "animals_table_task"])
def test_task_files(name):
    task = tasks.load("voc", None, 0, str(ROOT / "scripts" / "studies" / f"{name}.json"))
    assert [Voc.classes[label] for label in task.steps[0]] == ["background", "cat", "cow", "dog"]
    later = {Voc.classes[label] for step in task.steps[1:] for label in step}
    assert later == {"horse", "sheep", "person"}
