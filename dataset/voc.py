"""voc: PASCAL VOC 2012 with the masks of SBD (10,582 training, 1,449 validation images), 20 classes and background.

    DATA_ROOT/PascalVOC12/SegmentationClassAug/*.png
                          splits/{train_aug,train,val}.txt     lines "/JPEGImages/ID.jpg /SegmentationClassAug/ID.png"
                          VOCdevkit/VOC2012/JPEGImages/*.jpg

scripts/prepare_voc.py builds this from the original archives.
"""

from __future__ import annotations

from pathlib import Path

from dataset.layout import FilePair, Layout, inside, read_pairs
from utils.errors import UserError


class Voc(Layout):
    """See the module."""

    name = "voc"
    hint = "scripts/prepare_voc.py builds PascalVOC12 from VOC 2012 and SBD, --data_root is the folder that contains it"
    split_names = ("train_aug", "val")
    classes = (
        "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
        "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
    )  # fmt: skip

    def pairs(self, root: Path, train: bool) -> list[FilePair]:
        """Pairs of splits/train_aug.txt or splits/val.txt, whose paths start with "/" and are relative to the folders above."""
        base = root / "PascalVOC12"
        split = base / "splits" / f"{self.split_names[0 if train else 1]}.txt"

        def parse(line: str, place: str) -> FilePair:
            words = line.split()
            if len(words) != 2:
                raise UserError(f"{place}: {line!r:.200} must be the path of an image and the path of its mask")
            image, mask = (word.removeprefix("/") for word in words)
            return FilePair(inside(base / "VOCdevkit" / "VOC2012", image, place), inside(base, mask, place))

        return read_pairs(split, self.hint, parse)
