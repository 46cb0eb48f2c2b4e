"""Pictures of a user, without masks: which files are meant, where their class maps go, and what those look like.

A class map goes to a file of the picture's name, `a/frame.001.jpg` to `OUT/a/frame.001.png`. `OUT/legend.png` and `OUT/areas.json` belong
to all pictures together. No picture, and no file that this
program did not write, is ever overwritten, and no two pictures share a result; that is known before the first one is read.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dataset.layout import IMAGE_SUFFIXES
from utils.errors import UserError
from utils.reporting.pictures import draw_legend

#: Text that marks a PNG of this program, and what its JSON begins with.
_MARK = ("Software", "class map of scripts/predict.py")
_AREAS_BEGIN = b'{\n "written_by": "scripts/predict.py",'


#: What can be written of a picture, and the ends of the names of these files.
KINDS = {"overlay": ".overlay.png", "mask": ".png", "color": ".color.png"}


class Picture(NamedTuple):
    """A picture, and the files of its results.

    Attributes:
        path: of the picture.
        name: path below the folder of the results, with the suffix of the picture.
        results: by kind, some of `KINDS`.
    """

    path: Path
    name: str
    results: dict[str, Path]


class Look(NamedTuple):
    """What class ids look like.

    Attributes:
        names: by class id, of the classes that can be predicted.
        colours: (256, 3) uint8 by class id.
        background: class id whose pixels show the picture itself in an overlay, or None.
        opacity: of the colours in an overlay, from 0 to 1.
    """

    names: dict[int, str]
    colours: np.ndarray
    background: int | None
    opacity: float


def find(paths: Sequence[Path], out: Path, kinds: Sequence[str]) -> list[Picture]:
    """The pictures among some paths and in the folders among them, each once.

    Args:
        paths: files, patterns of the shell such as `trip/*.jpg`, and folders, which are searched with all folders in them.
        out: folder of the results. Below it, files keep the folders in which they lie, seen from the folder that all paths share.
        kinds: keys of `KINDS`.

    Raises:
        UserError: a path that does not exist, no picture at all, two pictures with one result, or a result that would take the place
            of a picture or of a file which is no result.
    """
    found: dict[str, Path] = {}
    homes = []
    for path in (match for given in paths for match in _matches(given)):
        folder = path.is_dir()
        homes.append(os.path.abspath(path if folder else path.parent))
        found.update((os.path.abspath(picture), picture) for picture in (_inside(path) if folder else [path]))
    if not found:
        raise UserError(f"no picture in {', '.join(map(str, paths))}; known suffixes: {', '.join(IMAGE_SUFFIXES)}")
    home = os.path.commonpath(homes)
    pictures = [_with_results(path, out, os.path.relpath(place, home), kinds) for place, path in found.items()]
    _check_results(pictures, [legend_path(out), areas_path(out)])
    return pictures


def legend_path(out: Path) -> Path:
    """The legend of all results of a folder."""
    return out / "legend.png"


def areas_path(out: Path) -> Path:
    """The areas of the classes in all pictures of a folder of results."""
    return out / "areas.json"


def _matches(path: Path) -> list[Path]:
    """The path itself, or what a pattern stands for: folders, and pictures that are no results."""
    if path.exists():
        return [path]
    if not glob.has_magic(str(path)):
        raise UserError(f"{path} does not exist; give pictures, or folders that hold some")
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    matches = [match for match in matches if match.is_dir() or (_is_picture(match) and not _is_result(match))]
    if not matches:
        raise UserError(f"no picture matches {path}; known suffixes: {', '.join(IMAGE_SUFFIXES)}")
    return matches


def _is_picture(path: Path) -> bool:
    """Whether the suffix is one of a picture."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def _inside(folder: Path) -> list[Path]:
    """The pictures in a folder and in those below it, without results of this program, which may lie among them."""
    return [path for path in sorted(folder.rglob("*")) if _is_picture(path) and not _is_result(path)]


def _with_results(path: Path, out: Path, name: str, kinds: Sequence[str]) -> Picture:
    """A picture with the names of its results; a stem may have dots, so the suffix is cut off as text."""
    stem = os.path.splitext(name)[0]
    return Picture(path, name, {kind: out / f"{stem}{KINDS[kind]}" for kind in kinds})


def _check_results(pictures: Sequence[Picture], shared: Sequence[Path]) -> None:
    """Refuse results that would take the place of anything else; `shared` are those of all pictures together."""
    inputs = {os.path.realpath(picture.path): picture.path for picture in pictures}
    taken: dict[str, Path] = {}
    for result in shared:
        _check_place(result, inputs, "the results")
        taken[os.path.realpath(result)] = result
    for picture in pictures:
        for result in picture.results.values():
            _check_place(result, inputs, f"the result of {picture.path}")
            place = os.path.realpath(result)
            if place in taken:
                raise UserError(
                    f"{taken[place]} and {picture.path} would both be segmented into {result}; rename one, or segment them "
                    "one by one into folders of their own (--out)"
                    if taken[place] not in shared
                    else f"the result of {picture.path} would have the name of {result}, which is written for all pictures together; "
                    "rename the picture"
                )
            taken[place] = picture.path


def _check_place(result: Path, inputs: Mapping[str, Path], what: str) -> None:
    """Refuse a result in the place of a picture, or of a file that this program did not write."""
    if (place := os.path.realpath(result)) in inputs:
        raise UserError(f"{what} would overwrite the picture {inputs[place]}; name another folder with --out")
    if os.path.lexists(result) and not _is_result(result):
        raise UserError(f"{result} exists and is no result of this program; name another folder with --out")


def _is_result(path: Path) -> bool:
    """Whether this program wrote a file."""
    if not path.is_file():  # reading a pipe would wait for ever
        return False
    try:
        if path.suffix == ".json":
            with path.open("rb") as file:
                return file.read(len(_AREAS_BEGIN)) == _AREAS_BEGIN
        with Image.open(path, formats=("PNG",)) as image:
            return image.info.get(_MARK[0]) == _MARK[1]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def write(picture: Picture, pixels: np.ndarray, ids: np.ndarray, look: Look) -> None:
    """Write the results of a picture; each file appears complete or not at all.

    Args:
        picture: names of the files; their folders are made.
        pixels: (H, W, 3) uint8.
        ids: (H, W) uint8, class ids of the data set.
        look: of the class ids.

    Raises:
        UserError: a file cannot be written.
    """
    mask = Image.fromarray(ids)
    mask.putpalette(look.colours.tobytes())
    with _writing(f"the result of {picture.path}"):
        for kind, path in picture.results.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "overlay":
                _save(_overlay(pixels, ids, mask.convert("RGB"), look), path)
            else:
                _save(mask if kind == "mask" else mask.convert("RGB"), path)


def _overlay(pixels: np.ndarray, ids: np.ndarray, colours: Image.Image, look: Look) -> Image.Image:
    """The colours over the picture, which shows unchanged where the background is."""
    picture = Image.fromarray(pixels)
    blended = Image.blend(picture, colours, look.opacity)
    if look.background is None:
        return blended
    return Image.composite(blended, picture, Image.fromarray((ids != look.background).astype(np.uint8) * 255))


def write_legend(out: Path, present: Sequence[int], look: Look) -> None:
    """Write the names and colours of the classes that occur.

    Args:
        out: folder of the results.
        present: class ids.
        look: of the class ids.

    Raises:
        UserError: the file cannot be written.
    """
    entries = [(look.names[label], tuple(look.colours[label].tolist())) for label in present]
    with _writing("the legend"):
        _save(draw_legend(entries), legend_path(out))


def areas(picture: Picture, ids: np.ndarray, look: Look) -> dict[str, Any]:
    """How much of a picture each class covers, as plain values.

    Args:
        picture: of `find`.
        ids: (H, W) uint8, class ids of the data set.
        look: of the class ids.

    Returns:
        The picture, its size in pixels, and by the name of each class that occurs its pixels and its share in percent.
    """
    counts = np.bincount(ids.reshape(-1), minlength=256).tolist()
    covered = {
        look.names[label]: {"pixels": count, "percent": round(100 * count / ids.size, 4)}
        for label, count in enumerate(counts)
        if count
    }
    return {"picture": picture.name, "width": ids.shape[1], "height": ids.shape[0], "areas": covered}


def write_areas(out: Path, checkpoint: Path, found: Sequence[dict[str, Any]], look: Look) -> None:
    """Write the areas of all pictures.

    Args:
        out: folder of the results.
        checkpoint: what segmented the pictures.
        found: of `areas`.
        look: of the class ids.

    Raises:
        UserError: the file cannot be written.
    """
    classes = [
        {"id": label, "name": name, "colour": "#" + bytes(look.colours[label].tolist()).hex()}
        for label, name in sorted(look.names.items())
    ]
    content = {"checkpoint": str(checkpoint), "classes": classes, "pictures": list(found)}
    raw = _AREAS_BEGIN + json.dumps(content, indent=1).encode()[1:] + b"\n"
    with _writing("the areas"), _replacing(areas_path(out)) as aside:
        aside.write_bytes(raw)


@contextlib.contextmanager
def _writing(what: str) -> Iterator[None]:
    """Context in which a failing disk is a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{what} cannot be written: {error.strerror or error}; make room, or name another folder with --out"
        ) from error


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Context with the name under which a file is written; it then takes its place, or disappears after an error."""
    aside = path.with_name(f".{path.name}.writing")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def _save(image: Image.Image, path: Path) -> None:
    note = PngInfo()
    note.add_text(*_MARK)
    with _replacing(path) as aside:
        image.save(aside, format="PNG", pnginfo=note)
