"""Layout: where the images and masks of a data set are on the disk, and the names of its classes."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from dataset.cache import first_few
from dataset.files import MaskColours
from utils.errors import UserError
from utils.types import IGNORE

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


class FilePair(NamedTuple):
    """Paths of an image and its mask, and their domain in a domain-incremental data set."""

    image: str
    mask: str
    domain: int = 0


class Layout:
    """A data set on disk. A new one is a file with a subclass, and a line in `dataset.DATASETS`.

    Attributes:
        name: the `--dataset` value.
        hint: where to get the files, for the message if they are missing.
        classes: names of the classes by id, background first; of the labels in a domain-incremental data set.
        domains: names of the domains, or empty.
        split_names: names of the training and the validation split.
        palette: colour (red, green, blue) of each class id; empty: those of Pascal VOC.
    """

    name: str
    hint: str
    classes: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    split_names: tuple[str, str] = ("train", "val")
    palette: tuple[tuple[int, int, int], ...] = ()

    def read_classes(self, root: Path) -> tuple[str, ...]:
        """Names of the classes; a data set that reads them from a file overrides this."""
        return self.classes

    def configured(self, opts: Namespace) -> Layout:
        """This data set with the options of a run; a data set that has options of its own overrides this."""
        return self

    def read_colours(self, root: Path) -> tuple[tuple[int, int, int], ...]:
        """Colours of the classes by id; a data set that reads them from a file overrides this."""
        return self.palette

    def mask_colours(self, root: Path) -> MaskColours | None:
        """The mask value of each colour, for masks that are stored as colours; None: the values of masks are class ids."""
        return None

    def pairs(self, root: Path, train: bool) -> list[FilePair]:
        """Every image of the training or the validation split with its mask, in a fixed order."""
        raise NotImplementedError

    def class_table(self, classes: int) -> np.ndarray:
        """(256,) int16, the class id of each value of a mask; -1 for a value that no mask may have."""
        table = np.full(256, -1, dtype=np.int16)
        table[:classes] = np.arange(classes)
        table[[0, IGNORE]] = 0, IGNORE
        return table


def read_lines(path: Path, hint: str) -> list[str]:
    """Read the non-empty lines of a text file, without spaces around them.

    A byte order mark at the start, which some editors on Windows write, is removed.

    Args:
        path: of the file.
        hint: end of the message if there is no such file.

    Raises:
        UserError: there is no such file, or it is not text in UTF-8, or it is empty.
    """
    if path.exists() and not path.is_file():  # reading a pipe might never end
        raise UserError(f"{path} is not a file: {hint}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {hint}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8: {error}") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty: {hint}")
    return lines


class BadEntries(UserError):
    """Lines of a split file that cannot be used.

    Args:
        problems: a sentence for each line; the message contains the first few.
        good: pairs of the lines that can be used.
    """

    def __init__(self, problems: list[str], good: list[FilePair]):
        super().__init__(first_few(problems))
        self.problems, self.good = problems, good


def read_pairs(split: Path, hint: str, parse: Callable[[str, str], FilePair]) -> list[FilePair]:
    """The pairs that the lines of a split file name.

    Args:
        split: the file.
        hint: end of the message if the file is missing.
        parse: maps a line and its place (file and number, for messages) to a pair.

    Raises:
        BadEntries: `parse` raised UserError for some lines.
        UserError: there is no such file, or nothing in it.
    """
    good, problems = [], []
    for number, line in enumerate(read_lines(split, hint), 1):
        try:
            good.append(parse(line, f"{split}, entry {number}"))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise BadEntries(problems, good)
    return good


def inside(folder: Path, name: str, place: str) -> str:
    """`folder`/`name`. The path must be inside the folder: a split file must not name files outside its data set.

    Args:
        folder: that the name is relative to.
        name: a relative path.
        place: file and line, for the message.

    Raises:
        UserError: for an absolute path, one with "..", or one with a control character.
    """
    if os.path.isabs(name) or PurePosixPath(name).is_absolute():
        raise UserError(f"{place}: {name!r:.200} is an absolute path: paths are relative to {folder}")
    if ".." in name.replace("\\", "/").split("/"):
        raise UserError(f"{place}: {name!r:.200} leads out of {folder}: '..' is not allowed")
    if not name.isprintable():
        raise UserError(f"{place}: {name!r:.200} has a control character")
    return os.path.join(folder, name)


def list_files(folder: Path, suffixes: tuple[str, ...], hint: str) -> list[str]:
    """List the files of a folder.

    Args:
        folder: searched without the folders in it.
        suffixes: of the files.
        hint: end of the messages.

    Returns:
        Sorted names.

    Raises:
        UserError: there is no such folder, or no such file in it.
    """
    endings = tuple(suffix.lower() for suffix in suffixes)
    try:
        names = sorted(name for name in os.listdir(folder) if name.lower().endswith(endings))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"the folder {folder} does not exist: {hint}") from None
    if not names:
        raise UserError(f"the folder {folder} has no file {' or '.join('*' + suffix for suffix in suffixes)}: {hint}")
    return names


def list_images(folder: Path, hint: str) -> dict[str, str]:
    """File names of the images of a folder, by name without suffix, sorted."""
    return {os.path.splitext(name)[0]: name for name in list_files(folder, IMAGE_SUFFIXES, hint)}
