"""Colours of classes: lines `name R G B`, and what they mean in masks that are stored as colours."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from dataset.files import MaskColours
from dataset.layout import read_lines
from utils.errors import UserError
from utils.types import IGNORE

#: Name of the lines that give the colours of pixels which are neither learned nor tested.
IGNORED = "ignored"

Colour = tuple[int, int, int]

_COLOURED = re.compile(r"(.*\S)\s+(\d+)\s+(\d+)\s+(\d+)", re.ASCII)


class ClassFile(NamedTuple):
    """Content of a file of classes.

    Attributes:
        path: of the file.
        names: of the classes, in the order of their lines.
        colours: of each class; empty if the file has no colours.
        ignored: colours of ignored pixels.
    """

    path: Path
    names: tuple[str, ...]
    colours: tuple[Colour, ...] = ()
    ignored: tuple[Colour, ...] = ()

    def mask_colours(self) -> MaskColours | None:
        """The mask value of each colour; None if the file has no colours."""
        if not self.colours:
            return None
        values = dict.fromkeys(map(_packed, self.ignored), IGNORE)
        values.update((_packed(colour), number) for number, colour in enumerate(self.colours))
        return MaskColours(values, str(self.path))


def read_class_file(path: Path, hint: str) -> ClassFile:
    """Read a file with a class a line: `name`, or `name R G B` in every line.

    With colours, lines of the name `ignored` are no classes: they give colours of ignored pixels.

    Args:
        path: the file, in UTF-8.
        hint: end of the message if the file is missing.

    Raises:
        UserError: the file cannot be read, a line is not as above, or a name or a colour stands twice; names the file and the line.
    """
    lines = read_lines(path, hint)
    found = [_COLOURED.fullmatch(line) for line in lines]
    if not any(found):
        return _checked(ClassFile(path, tuple(lines)))
    names: list[str] = []
    name_of: dict[Colour, str] = {}
    for line, match in zip(lines, found):
        if match is None:
            raise UserError(
                f"{path}: the line {line!r:.80} has no colour, but others have; write NAME RED GREEN BLUE in every line"
            )
        colour = _colour(match, path)
        if colour in name_of:
            raise UserError(f"{path}: {name_of[colour]!r} and {match[1]!r} have the same colour {colour}")
        name_of[colour] = match[1]
        if match[1] != IGNORED:
            names.append(match[1])
    colours = tuple(colour for colour, name in name_of.items() if name != IGNORED)
    ignored = tuple(colour for colour, name in name_of.items() if name == IGNORED)
    return _checked(ClassFile(path, tuple(names), colours, ignored))


def read_palette(path: Path, names: tuple[str, ...]) -> ClassFile:
    """The colours of the named classes from a file of their own, which may list them in another order.

    Raises:
        UserError: the file cannot be used, or its names are not those of the data set; names the file and the first of them.
    """
    found = read_class_file(path, "--palette names a file with lines NAME RED GREEN BLUE")
    if not found.colours:
        raise UserError(f"{path} has no colours; write NAME RED GREEN BLUE in every line")
    colours = dict(zip(found.names, found.colours))
    if missing := [name for name in names if name not in colours]:
        raise UserError(f"{path} has no colour for the class {missing[0]!r}")
    if foreign := [name for name in found.names if name not in names]:
        raise UserError(
            f"{path} names {foreign[0]!r}, which is not a class of the data set; pixels that are not used have the name {IGNORED!r}"
        )
    return ClassFile(path, names, tuple(colours[name] for name in names), found.ignored)


def _colour(match: re.Match[str], path: Path) -> Colour:
    red, green, blue = (int(value) if len(value) < 5 else 9999 for value in match.groups()[1:])
    if max(red, green, blue) > 255:
        raise UserError(f"{path}: the line {match[0]!r:.80} has a value above 255; red, green and blue are 0 to 255")
    return red, green, blue


def _packed(colour: Colour) -> int:
    red, green, blue = colour
    return red << 16 | green << 8 | blue


def _checked(found: ClassFile) -> ClassFile:
    names, path = found.names, found.path
    if not 2 <= len(names) <= 255:
        raise UserError(f"{path} names {len(names)} classes, it must be 2 (background is one) to 255")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path} names the class {twice[0]!r} twice")
    return found
