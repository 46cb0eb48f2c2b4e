"""folder: a data set of your own.

    DATA_ROOT/classes.txt       one name per line, background first; the number of a class's line, from 0, is its id
              images/           NAME.jpg (or .png, .bmp, .tif, .webp); folders within are allowed
              masks/            NAME.png: 8 bits, one channel (palette or grey), each value a class id, 255 is ignored
              splits/train.txt  one NAME per line, with or without the suffix of the image
              splits/val.txt

With colours of the classes, `name R G B` in every line of classes.txt or of the file that `--palette` names, masks are stored as colours:
RGB or palette images, in which every pixel has the colour of its class. Grey masks still have class ids as values. Lines of the name
`ignored` give colours of ignored pixels.

Its one built-in task is `offline` (all classes at once); others come with `--task_file`.
"""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

from dataset.files import MaskColours
from dataset.layout import IMAGE_SUFFIXES, FilePair, Layout, inside, read_pairs
from dataset.palette import ClassFile, Colour, read_class_file, read_palette
from utils.errors import UserError


class Folder(Layout):
    """See the module.

    Args:
        palette_file: file with the colours of the classes; None: those of classes.txt, if it has some.
    """

    name = "folder"
    hint = "--dataset folder needs classes.txt, images/, masks/, splits/train.txt and splits/val.txt under --data_root"

    def __init__(self, palette_file: Path | None = None) -> None:
        self.palette_file = palette_file

    def configured(self, opts: Namespace) -> Folder:
        """The data set with the file of `--palette`."""
        return Folder(Path(opts.palette)) if opts.palette is not None else self

    def read_classes(self, root: Path) -> tuple[str, ...]:
        """The names in classes.txt."""
        return read_class_file(root / "classes.txt", self.hint).names

    def read_colours(self, root: Path) -> tuple[Colour, ...]:
        """The colours of the classes, or nothing."""
        return self._class_file(root).colours

    def mask_colours(self, root: Path) -> MaskColours | None:
        """The mask value of each colour, if classes have colours."""
        return self._class_file(root).mask_colours()

    def _class_file(self, root: Path) -> ClassFile:
        found = read_class_file(root / "classes.txt", self.hint)
        return found if self.palette_file is None else read_palette(self.palette_file, found.names)

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
