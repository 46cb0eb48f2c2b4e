"""scripts/prepare_voc.py: SBD's MAT files by the specification of the format, and the splits that it builds."""

import importlib.util
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.support.paths import ROOT
from tests.support.tiny_folder import save_image, save_mask
from utils.errors import UserError

SCRIPTS = ROOT / "scripts"


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def prepare_voc():
    return script("prepare_voc")


def element(kind, content):
    return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)


def matrix(array_class, dimensions, rest):
    head = (
        element(6, struct.pack("<II", array_class, 0)) + element(5, struct.pack("<2i", *dimensions)) + element(1, b"")
    )
    return element(14, head + rest)


def sbd_file(mask, compress=True):
    """GTcls of an SBD file: a struct with the fields Categories and Segmentation."""
    fields = matrix(9, (1, 1), element(2, b"\x0f")) + matrix(9, mask.shape, element(2, mask.T.tobytes()))
    names = b"Categories".ljust(16, b"\0") + b"Segmentation".ljust(16, b"\0")
    width = struct.pack("<HHI", 5, 4, 16)  # a small element: type and size share a word
    content = matrix(2, (1, 1), width + element(1, names) + fields)
    if compress:
        packed = zlib.compress(content)
        content = struct.pack("<II", 15, len(packed)) + packed
    return b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<HH", 0x0100, 0x4D49) + content


@pytest.mark.parametrize("compress", [True, False])
def test_sbd_mask(prepare_voc, tmp_path, compress):
    mask = np.arange(35, dtype=np.uint8).reshape(5, 7) % 21
    path = tmp_path / "a.mat"
    content = sbd_file(mask, compress)
    path.write_bytes(content)
    assert np.array_equal(prepare_voc.read_sbd_mask(path), mask)
    for length in range(0, len(content) - 8, 11):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"a.mat is not a class mask"):
            prepare_voc.read_sbd_mask(path)


def test_a_file_that_unpacks_to_gigabytes_is_refused(prepare_voc, tmp_path):
    path = tmp_path / "a.mat"
    path.write_bytes(sbd_file(np.zeros((1 << 14, 1 << 13), dtype=np.uint8)))
    assert path.stat().st_size < 1 << 18
    tracemalloc.start()
    with pytest.raises(UserError, match=r"a.mat is not a class mask"):
        prepare_voc.read_sbd_mask(path)
    assert tracemalloc.get_traced_memory()[1] < 4 * prepare_voc._LARGEST_MATRIX
    tracemalloc.stop()


def test_build(prepare_voc, tmp_path, capsys):
    voc, sbd, out = tmp_path / "VOC2012", tmp_path / "sbd", tmp_path / "data"
    for folder in (voc / "JPEGImages", voc / "SegmentationClass", voc / "ImageSets/Segmentation", sbd / "cls"):
        folder.mkdir(parents=True)
    for name in "abcd":  # a: VOC train, b: VOC val, c: only SBD, d: SBD, but in VOC's val
        save_image(voc / "JPEGImages" / f"{name}.jpg", 0)
    for name in "abd":
        save_mask(voc / "SegmentationClass" / f"{name}.png", [1])
    for name in "acd":
        (sbd / "cls" / f"{name}.mat").write_bytes(sbd_file(np.full((20, 24), 7, dtype=np.uint8)))
    (voc / "ImageSets/Segmentation/train.txt").write_text("a\n")
    (voc / "ImageSets/Segmentation/val.txt").write_text("b\nd\n")

    status = prepare_voc.main(["--voc", str(voc), "--sbd", str(sbd), "--data_root", str(out)])
    said = capsys.readouterr()
    assert status == 1  # four images are not the published data set
    assert "split train_aug of voc: 2 images (published: 10582)" in said.out
    assert "a.png shows the classes [0, 1, 255], in the published set None" in said.err
    masks = out / "PascalVOC12" / "SegmentationClassAug"
    assert sorted(path.stem for path in masks.iterdir()) == list("abcd")
    assert set(np.unique(Image.open(masks / "a.png"))) == {0, 1, 255}
    assert np.unique(Image.open(masks / "c.png")).tolist() == [7]
    assert Image.open(masks / "c.png").mode == "P"
    splits = out / "PascalVOC12" / "splits"
    line = "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png\n"
    assert (splits / "train_aug.txt").read_text() == line.format("a") + line.format("c")
    assert (splits / "val.txt").read_text() == line.format("b") + line.format("d")


@pytest.mark.parametrize("name", ["prepare_voc", "prepare_ade", "prepare_cityscapes"])
def test_missing_data_is_an_error_in_a_line(name, tmp_path, capsys):
    check = ["--check"] if name == "prepare_voc" else []
    assert script(name).main(["--data_root", str(tmp_path), *check]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
