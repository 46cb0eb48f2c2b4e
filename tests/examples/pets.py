"""pets: a data set whose pairs of image and mask stand in a table.

DATA_ROOT/pets/train.csv, val.csv     lines "path of an image,path of its mask", from DATA_ROOT/pets on
"""

from __future__ import annotations

from pathlib import Path

from dataset.layout import FilePair, Layout, inside, read_lines


class Pets(Layout):
    """See the module."""

    name = "pets"
    hint = "the folder pets with train.csv and val.csv belongs under --data_root"
    classes = ("background", "cat", "dog", "cow", "horse")

    def pairs(self, root: Path, train: bool) -> list[FilePair]:
        """Pairs of train.csv or val.csv."""
        table = root / "pets" / ("train.csv" if train else "val.csv")
        found = []
        for line in read_lines(table, self.hint):
            image, _, mask = line.partition(",")
            found.append(FilePair(inside(table.parent, image, str(table)), inside(table.parent, mask, str(table))))
        return found
