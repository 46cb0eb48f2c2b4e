"""cityscapes_domain: Cityscapes, its 21 annotated cities as the domains of the steps; 19 labels at every step.

    DATA_ROOT/leftImg8bit/{train,val}/CITY/*_leftImg8bit.png
              gtFine/{train,val}/CITY/*_gtFine_labelIds.png

Domains 0 to 17 are the cities of train/, 18 to 20 those of val/, each in alphabetical order. The files of each city are
shuffled by RandomState(1); the first 80 % are for training, the rest for validation. Each city is split separately, so
the split is the same for every task and no test image is a training image of another step.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dataset.layout import FilePair, Layout, list_files
from utils.types import IGNORE

_IMAGE, _MASK = "_leftImg8bit.png", "_gtFine_labelIds.png"
#: For each of the 34 label ids of Cityscapes its training id; the others are ignored.
_TRAIN_IDS = dict(zip((7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33), range(19)))


class CityscapesDomain(Layout):
    """See the module."""

    name = "cityscapes_domain"
    hint = (
        "scripts/prepare_cityscapes.py unpacks leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of cityscapes-dataset.com "
        "under --data_root"
    )
    classes = (
        "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
        "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
    )  # fmt: skip
    domains = (
        "aachen", "bochum", "bremen", "cologne", "darmstadt", "dusseldorf", "erfurt", "hamburg", "hanover", "jena",
        "krefeld", "monchengladbach", "strasbourg", "stuttgart", "tubingen", "ulm", "weimar", "zurich",
        "frankfurt", "lindau", "munster",
    )  # fmt: skip

    palette = (
        (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30),
        (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142),
        (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
    )  # fmt: skip

    def pairs(self, root: Path, train: bool) -> list[FilePair]:
        """80 % (train) or 20 % of the files of every city."""
        found = []
        for domain, city in enumerate(self.domains):
            place = Path("train" if domain < 18 else "val", city)
            names = list_files(root / "leftImg8bit" / place, (_IMAGE,), self.hint)
            np.random.RandomState(1).shuffle(names)
            cut = int(0.8 * len(names))
            for name in names[:cut] if train else names[cut:]:
                mask = root / "gtFine" / place / (name.removesuffix(_IMAGE) + _MASK)
                found.append(FilePair(str(root / "leftImg8bit" / place / name), str(mask), domain))
        return found

    def class_table(self, classes: int) -> np.ndarray:
        """(256,) int16, from label ids 0 to 33 (and 255, how -1 is stored) to training ids."""
        table = np.full(256, -1, dtype=np.int16)
        table[:34] = IGNORE
        table[IGNORE] = IGNORE
        for label, train_id in _TRAIN_IDS.items():
            table[label] = train_id
        return table
