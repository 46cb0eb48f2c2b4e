"""folder: a data set of your own.

    DATA_ROOT/classes.txt       one name per line, background first; the number of a class's line, from 0, is its id
              images/           NAME.jpg (or .png, .bmp, .tif, .webp); folders within are allowed
              masks/            NAME.png: 8 bits, one channel (palette or grey), each value a class id, 255 is ignored
              splits/train.txt  one NAME per line, with or without the suffix of the image
              splits/val.txt

Its one built-in task is `offline` (all classes at once); others come with `--task_file`.
"""

from __future__ import annotations

import os
from pathlib import Path

from dataset.layout import IMAGE_SUFFIXES, FilePair, Layout, inside, read_lines, read_pairs
from utils.errors import UserError


class Folder(Layout):
    """See the module."""

    name = "folder"
    hint = "--dataset folder needs classes.txt, images/, masks/, splits/train.txt and splits/val.txt under --data_root"

    def read_classes(self, root: Path) -> tuple[str, ...]:
        """The lines of classes.txt."""
        path = root / "classes.txt"
        names = read_lines(path, self.hint)
        if not 2 <= len(names) <= 255:
            raise UserError(f"{path} names {len(names)} classes, it must be 2 (background is one) to 255")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"{path} names the class {twice[0]!r} twice")
        return tuple(names)

    def pairs(self, root: Path, train: bool) -> list[FilePair]:
        """Pairs of splits/train.txt or splits/val.txt."""
        split = root / "splits" / f"{self.split_names[0 if train else 1]}.txt"

        def parse(name: str, place: str) -> FilePair:
            image, mask = inside(root / "images", name, place), inside(root / "masks", name, place)
            suffix = os.path.splitext(image)[1]
            if suffix.lower() in IMAGE_SUFFIXES:
                return FilePair(image, f"{os.path.splitext(mask)[0]}.png")
            return FilePair(self._with_suffix(image, place), f"{mask}.png")

        return read_pairs(split, self.hint, parse)

    @staticmethod
    def _with_suffix(path: str, place: str) -> str:
        """The image of that name, whatever its suffix."""
        for suffix in IMAGE_SUFFIXES:
            if os.path.exists(path + suffix):
                return path + suffix
        raise UserError(f"{place}: image {path} does not exist, with none of the suffixes {', '.join(IMAGE_SUFFIXES)}")
