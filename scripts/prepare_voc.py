"""Builds what `--dataset voc` reads from VOC 2012 and the Semantic Boundaries Dataset (SBD), counts it and verifies it.

    python scripts/prepare_voc.py --voc VOCtrainval_11-May-2012.tar --sbd benchmark.tgz --data_root DATA
    python scripts/prepare_voc.py --voc VOCdevkit/VOC2012 --sbd benchmark_RELEASE/dataset --data_root DATA
    python scripts/prepare_voc.py --data_root DATA --verify

--voc is VOCtrainval_11-May-2012.tar (http://host.robots.ox.ac.uk/pascal/VOC/voc2012/) or the folder VOC2012 of it, --sbd is benchmark.tgz
(https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/) or the folder of it that has cls/*.mat. Archives
are unpacked into DATA/PascalVOC12; a second start continues an interrupted one. Under
DATA/PascalVOC12 it writes SegmentationClassAug (12,031 masks: those of VOC where there is one, SBD's elsewhere), splits
and, where it is missing, a link to VOC's folder. train_aug is every mask that is not in VOC's val: 10,582 images. With
--verify (or its old name --check) it writes nothing. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.archives import SBD, VOC
from dataset.layout import read_lines
from dataset.source import FileSource
from dataset.verify import add_verify, run, unpack_or_check, verify
from dataset.voc import Voc
from utils.errors import UserError

#: The classes of every mask of the published set; the check compares with it.
REFERENCE = Path(__file__).resolve().parents[1] / "tests" / "facts" / "voc_classes.json.gz"
_MATRIX, _COMPRESSED, _STRUCT = 14, 15, 2
#: Bytes of an unpacked file of SBD; its masks have at most 500 x 500 pixels.
_LARGEST_MATRIX = 1 << 24


def _elements(data: bytes) -> list[tuple[int, bytes]]:
    """Types and contents of the data elements in a part of a MAT 5 file (little endian)."""
    found, at = [], 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<II", data, at)
        if kind >> 16:  # small element: type and size share a word, up to four bytes follow
            found.append((kind & 0xFFFF, data[at + 4 : at + 4 + (kind >> 16)]))
            at += 8
        else:
            found.append((kind, data[at + 8 : at + 8 + size]))
            at += 8 + size + (0 if kind == _COMPRESSED else -size % 8)
    return found


def _field(struct_matrix: bytes, name: str) -> bytes:
    """The matrix in the field `name` of a 1 x 1 struct."""
    flags, _, _, length, names, *fields = (content for _, content in _elements(struct_matrix))
    if flags[0] != _STRUCT:
        raise ValueError("not a struct")
    width = struct.unpack("<I", length[:4])[0]
    labels = [names[k : k + width].rstrip(b"\0").decode() for k in range(0, len(names), width)]
    return fields[labels.index(name)]


def read_sbd_mask(path: Path) -> np.ndarray:
    """(H, W) uint8 class ids of GTcls.Segmentation in a cls/*.mat of SBD.

    Raises:
        UserError: the file is not such a one; names it.
    """
    try:
        kind, content = _elements(path.read_bytes()[128:])[0]  # the text header has 128 bytes
        if kind == _COMPRESSED:
            kind, content = _elements(zlib.decompressobj().decompress(content, _LARGEST_MATRIX))[0]
        if kind != _MATRIX:
            raise ValueError("not a matrix")
        _, dimensions, _, values = (content for _, content in _elements(_field(content, "Segmentation")))
        height, width = struct.unpack("<2i", dimensions[:8])
        return np.frombuffer(values, dtype=np.uint8).reshape(width, height).T.copy()  # columns first
    except (ValueError, IndexError, struct.error, zlib.error) as error:
        raise UserError(f"{path} is not a class mask of SBD: {error}") from None


def write_masks(voc: Path, sbd: Path, folder: Path) -> list[str]:
    """Writes every mask into the folder; returns the names, sorted."""
    segmentation = {path.stem: path for path in sorted((voc / "SegmentationClass").glob("*.png"))}
    boundaries = {path.stem: path for path in sorted((sbd / "cls").glob("*.mat"))}
    if not segmentation or not boundaries:
        empty = sbd / "cls/*.mat" if segmentation else voc / "SegmentationClass/*.png"
        raise UserError(f"no file {empty}: see --help for what --voc and --sbd are")
    palette = Image.open(next(iter(segmentation.values()))).getpalette()
    folder.mkdir(parents=True, exist_ok=True)
    for path in segmentation.values():
        shutil.copyfile(path, folder / path.name)
    for name in boundaries.keys() - segmentation.keys():
        mask = Image.fromarray(read_sbd_mask(boundaries[name]))
        if palette is not None:
            mask.putpalette(palette)
        mask.save(folder / f"{name}.png")
    return sorted(segmentation.keys() | boundaries.keys())


def write_splits(voc: Path, names: list[str], folder: Path) -> None:
    """Writes train, val (those of VOC) and train_aug (every name that is not in val)."""
    lists = voc / "ImageSets" / "Segmentation"
    hint = "--voc is the folder VOC2012 of the unpacked archive"
    splits = {split: read_lines(lists / f"{split}.txt", hint) for split in ("train", "val")}
    splits["train_aug"] = sorted(set(names) - set(splits["val"]))
    folder.mkdir(parents=True, exist_ok=True)
    for split, members in splits.items():
        lines = (f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png\n" for name in members)
        (folder / f"{split}.txt").write_text("".join(lines))


def compare(data_root: Path) -> list[str]:
    """A sentence for every mask whose classes are not those of the published set."""
    if not REFERENCE.exists():
        return [f"{REFERENCE} is missing: the classes of the masks were not compared"]
    with gzip.open(REFERENCE, "rt") as stream:
        published = json.load(stream)
    problems = []
    for train in (True, False):
        source = FileSource(Voc(), data_root, train)
        shown, _ = source.inspect(np.arange(len(source)))
        for index, row in enumerate(shown):
            path = Path(source.files(index)[1])
            expected, found = published[source.split].get(path.stem), np.flatnonzero(row).tolist()
            if expected != found:
                problems.append(f"{path} shows the classes {found}, in the published set {expected}")
    return problems


def prepare(opts: argparse.Namespace) -> list[str]:
    """Builds (without --check), counts and verifies; returns what is not as it should be."""
    base = opts.data_root / "PascalVOC12"
    archives = [(known, path) for known, path in ((VOC, opts.voc), (SBD, opts.sbd)) if path and not path.is_dir()]
    if not opts.verify and (opts.voc is None or opts.sbd is None):
        raise UserError("--voc and --sbd are needed to build the data set; --verify only looks at one")
    problems = unpack_or_check(archives, base, opts.verify)
    if not opts.verify:
        unpacked = [known for known, _ in archives]
        opts.voc = base / "VOCdevkit" / "VOC2012" if VOC in unpacked else opts.voc
        opts.sbd = base / "benchmark_RELEASE" / "dataset" if SBD in unpacked else opts.sbd
        names = write_masks(opts.voc, opts.sbd, base / "SegmentationClassAug")
        write_splits(opts.voc, names, base / "splits")
        images = base / "VOCdevkit" / "VOC2012"
        if not images.exists():
            images.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(opts.voc.resolve(), images)
    return problems + verify("voc", opts.data_root, (10582, 1449)) + compare(opts.data_root)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc", type=Path, help=f"{VOC.file}, or its folder VOCdevkit/VOC2012")
    parser.add_argument("--sbd", type=Path, help=f"{SBD.file}, or its folder benchmark_RELEASE/dataset, with cls/*.mat")
    parser.add_argument("--data_root", type=Path, required=True, help="where PascalVOC12 is, or shall be")
    add_verify(parser, "--verify", "--check")
    opts = parser.parse_args(argv)
    return run(lambda: prepare(opts))


if __name__ == "__main__":
    sys.exit(main())
