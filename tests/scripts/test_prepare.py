"""scripts/prepare_voc.py: SBD's MAT files by the specification of the format, and the splits that it builds."""

import importlib.util
import shutil
import struct
import tarfile
import tracemalloc
import zipfile
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


def originals(folder):
    """VOC's and SBD's folders with four images; a: VOC train, b: VOC val, c: only SBD, d: SBD, but in VOC's val."""
    voc, sbd = folder / "VOCdevkit" / "VOC2012", folder / "benchmark_RELEASE" / "dataset"
    for path in (voc / "JPEGImages", voc / "SegmentationClass", voc / "ImageSets/Segmentation", sbd / "cls"):
        path.mkdir(parents=True)
    for name in "abcd":
        save_image(voc / "JPEGImages" / f"{name}.jpg", 0)
    for name in "abd":
        save_mask(voc / "SegmentationClass" / f"{name}.png", [1])
    for name in "acd":
        (sbd / "cls" / f"{name}.mat").write_bytes(sbd_file(np.full((20, 24), 7, dtype=np.uint8)))
    (voc / "ImageSets/Segmentation/train.txt").write_text("a\n")
    (voc / "ImageSets/Segmentation/val.txt").write_text("b\nd\n")
    return voc, sbd


@pytest.mark.parametrize("packed", [False, True])
def test_build(prepare_voc, tmp_path, capsys, packed):
    out = tmp_path / "data"
    voc, sbd = originals(tmp_path / "original")
    if packed:
        archives = tmp_path / "VOCtrainval_11-May-2012.tar", tmp_path / "benchmark.tgz"
        for path, mode, top in zip(archives, ("w", "w:gz"), (voc.parent, sbd.parent)):
            with tarfile.open(path, mode) as archive:
                archive.add(top, top.name)
        shutil.rmtree(tmp_path / "original")
        voc, sbd = archives

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
    assert ("has the MD5" in said.err) == packed
    assert (out / "PascalVOC12/VOCdevkit/VOC2012").is_symlink() != packed
    assert (splits / "val.txt").read_text() == line.format("b") + line.format("d")


@pytest.mark.parametrize("verify_only", [False, True])
def test_archives_of_ade(tmp_path, capsys, verify_only):
    path, out = tmp_path / "ADEChallengeData2016.zip", tmp_path / "data"
    for split in ("training", "validation"):
        for part in ("images", "annotations"):
            (tmp_path / "ADEChallengeData2016" / part / split).mkdir(parents=True)
        save_image(tmp_path / f"ADEChallengeData2016/images/{split}/a.jpg", 0)
        save_mask(tmp_path / f"ADEChallengeData2016/annotations/{split}/a.png", [1])
    pack(path, tmp_path / "ADEChallengeData2016")
    out.mkdir()
    words = ["--data_root", str(out), "--archive", str(path), *(["--verify"] if verify_only else [])]
    assert script("prepare_ade").main(words) == (2 if verify_only else 1)  # no data; not the published data
    assert bool(list(out.iterdir())) != verify_only
    assert verify_only or "split training of ade: 1 images (published: 20210)" in capsys.readouterr().out


def pack(path, folder):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder.parent))


def test_archives_of_cityscapes(tmp_path, capsys):
    cities = script("prepare_cityscapes")
    words = ["--data_root", str(tmp_path / "data")]
    for option, kind, suffix in (("--images", "leftImg8bit", "leftImg8bit"), ("--labels", "gtFine", "gtFine_labelIds")):
        for place in ("train/aachen", "val/munster", "test/berlin"):
            folder = tmp_path / kind / place
            folder.mkdir(parents=True)
            save_mask(folder / f"x_{suffix}.png", [7], mode="L")
        pack(tmp_path / f"{kind}_trainvaltest.zip", tmp_path / kind)
        words += [option, str(tmp_path / f"{kind}_trainvaltest.zip")]
    assert cities.main(words) == 2  # the other cities are missing
    assert "bochum" in capsys.readouterr().err
    found = sorted(str(path.relative_to(tmp_path / "data")) for path in (tmp_path / "data").rglob("*.png"))
    assert found == [
        f"{kind}/{place}/x_{suffix}.png"
        for kind, suffix in (("gtFine", "gtFine_labelIds"), ("leftImg8bit", "leftImg8bit"))
        for place in ("train/aachen", "val/munster")
    ]


@pytest.mark.parametrize("name", ["prepare_voc", "prepare_ade", "prepare_cityscapes"])
def test_missing_data_is_an_error_in_a_line(name, tmp_path, capsys):
    check = ["--verify"]
    assert script(name).main(["--data_root", str(tmp_path), *check]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
