"""Pictures of a user, without masks: which files are meant, where their class maps go, and what those look like.

A class map goes to a file of the picture's name, `a/frame.001.jpg` to `OUT/a/frame.001.png`. No picture, and no file that this
program did not write, is ever overwritten, and no two pictures share a result; that is known before the first one is read.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dataset.layout import IMAGE_SUFFIXES
from utils.errors import UserError

#: Text that marks a PNG of this program.
_MARK = ("Software", "class map of scripts/predict.py")


class Picture(NamedTuple):
    """A picture, and the files of its results: class ids as a palette PNG, and their colours over the picture."""

    path: Path
    ids: Path
    overlay: Path


def find(paths: Sequence[Path], out: Path) -> list[Picture]:
    """The pictures among some paths and in the folders among them, each once.

    Args:
        paths: files, and folders that are searched with all folders in them.
        out: folder of the results. Below it, files keep the folders in which they lie, seen from the folder that all paths share.

    Raises:
        UserError: a path that does not exist, no picture at all, two pictures with one result, or a result that would take the place
            of a picture or of a file which is no result.
    """
    found: dict[str, Path] = {}
    homes = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist; give pictures, or folders that hold some")
        folder = path.is_dir()
        homes.append(os.path.abspath(path if folder else path.parent))
        found.update((os.path.abspath(picture), picture) for picture in (_inside(path) if folder else [path]))
    if not found:
        raise UserError(f"no picture in {', '.join(map(str, paths))}; known suffixes: {', '.join(IMAGE_SUFFIXES)}")
    home = os.path.commonpath(homes)
    pictures = [_with_results(path, out / os.path.relpath(place, home)) for place, path in found.items()]
    _check_results(pictures)
    return pictures


def _inside(folder: Path) -> list[Path]:
    """The pictures in a folder and in those below it, without results of this program, which may lie among them."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return [path for path in files if not _is_result(path)]


def _with_results(path: Path, place: Path) -> Picture:
    """A picture with the names of its results; a stem may have dots, so the suffix is cut off as text."""
    stem = os.path.splitext(place.name)[0]
    return Picture(path, place.with_name(f"{stem}.png"), place.with_name(f"{stem}.overlay.png"))


def _check_results(pictures: Sequence[Picture]) -> None:
    inputs = {os.path.realpath(picture.path): picture.path for picture in pictures}
    taken: dict[str, Path] = {}
    for picture in pictures:
        for result in picture[1:]:
            place = os.path.realpath(result)
            if place in inputs:
                raise UserError(
                    f"the result of {picture.path} would overwrite the picture {inputs[place]}; name another folder with --out"
                )
            if place in taken:
                raise UserError(
                    f"{taken[place]} and {picture.path} would both be segmented into {result}; rename one, or segment them "
                    "one by one into folders of their own (--out)"
                )
            if os.path.lexists(result) and not _is_result(result):
                raise UserError(f"{result} exists and is no result of this program; name another folder with --out")
            taken[place] = picture.path


def _is_result(path: Path) -> bool:
    """Whether a file was written by `write`."""
    if not path.is_file():  # reading a pipe would wait for ever
        return False
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return image.info.get(_MARK[0]) == _MARK[1]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def write(picture: Picture, pixels: np.ndarray, ids: np.ndarray, colours: np.ndarray) -> None:
    """Write the results of a picture; each file appears complete or not at all.

    Args:
        picture: names of the files; their folders are made.
        pixels: (H, W, 3) uint8.
        ids: (H, W) uint8, class ids of the data set.
        colours: (256, 3) uint8, of each id.

    Raises:
        UserError: a file cannot be written.
    """
    mask = Image.fromarray(ids)
    mask.putpalette(colours.tobytes())
    overlay = Image.blend(Image.fromarray(pixels), mask.convert("RGB"), 0.5)
    try:
        picture.ids.parent.mkdir(parents=True, exist_ok=True)
        _save(mask, picture.ids)
        _save(overlay, picture.overlay)
    except OSError as error:
        raise UserError(
            f"the result of {picture.path} cannot be written: {error.strerror or error}; make room, or name another folder with --out"
        ) from error


def _save(image: Image.Image, path: Path) -> None:
    note = PngInfo()
    note.add_text(*_MARK)
    aside = path.with_name(f".{path.name}.writing")
    try:
        image.save(aside, format="PNG", pnginfo=note)
        os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
