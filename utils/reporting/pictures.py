"""Pictures of a run: the same test images after every step, kept beside the results, and drawn as panels for TensorBoard.

results/DATE_DATASET_TASK_NAME_pictures/
    0_image.png     the image as the network sees it
    0_truth.png     its labels with all classes of the task, a palette PNG of positions in the order of learning
    0_step1.png     the prediction after step 1, likewise
    legend.json     [name, colour] of each class by position
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.types import IGNORE

_STEP = re.compile(r"(\d{1,4})_step(\d{1,4})\.png")
_OF_STEP = re.compile(r"\d{1,4}_step(\d{1,4})(_panel)?\.png")
#: Sides of the margin and of the squares of a legend, and height of a line of text, in pixels.
_MARGIN, _LINE = 6, 16


class Sample(NamedTuple):
    """A test image, its labels and the prediction of the network.

    Attributes:
        image: (H, W, 3) uint8.
        truth, prediction: (H, W) uint8, positions in the order of learning, 255 where a pixel is ignored.
    """

    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray


class Legend(NamedTuple):
    """Names and colours of the values of a mask.

    Attributes:
        names: of the classes by position.
        colours: (256, 3) uint8 by position; ignored pixels are white.
    """

    names: list[str]
    colours: np.ndarray

    @classmethod
    def of_task(cls, names: Sequence[str], label_ids: Sequence[int], colours: np.ndarray) -> Legend:
        """The legend of a task, whose positions have the colours that the data set gives to their class ids.

        Args:
            names: of the classes by position.
            label_ids: class ids by position.
            colours: (256, 3) uint8 by class id.
        """
        by_position = np.full((256, 3), 128, dtype=np.uint8)
        by_position[: len(label_ids)] = colours[list(label_ids)]
        by_position[IGNORE] = 255
        return cls(list(names), by_position)

    def hexadecimal(self, position: int) -> str:
        """The colour of a class, such as #ff0080."""
        return "#" + bytes(self.colours[position].tolist()).hex()


class Shown(NamedTuple):
    """The pictures of a run.

    Attributes:
        steps: numbers of the steps.
        rows: for each image the files of the image, of its truth, and of the prediction after each step; None where one is missing.
        legend: colours by the names of the classes that occur in the pictures.
    """

    steps: list[int]
    rows: list[list[Path | None]]
    legend: dict[str, str]


def folder_of(results_file: Path) -> Path:
    """Where the pictures of a run are.

    Args:
        results_file: its CSV or JSON.
    """
    return results_file.with_name(f"{results_file.stem}_pictures")


def write(folder: Path, step: int, samples: Sequence[Sample], legend: Legend) -> None:
    """Write the pictures of a step. Those of other steps are not changed.

    Args:
        folder: of `folder_of`.
        step: that was tested.
        samples: the same images in every step.
        legend: of the whole task.

    Raises:
        OSError: they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, sample in enumerate(samples):
        _write_image(Image.fromarray(sample.image), folder / f"{number}_image.png")
        for name, mask in (("truth", sample.truth), (f"step{step}", sample.prediction)):
            picture = Image.fromarray(mask.astype(np.uint8), mode="P")
            picture.putpalette(legend.colours.reshape(-1).tolist())
            _write_image(picture, folder / f"{number}_{name}.png")
    described = [[name, legend.hexadecimal(position)] for position, name in enumerate(legend.names)]
    (folder / "legend.json").write_text(json.dumps(described), encoding="utf-8")


def write_panels(folder: Path, step: int, panels: Sequence[np.ndarray]) -> None:
    """Write the panels of a step, pictures for people: `N_stepT_panel.png`.

    Args:
        folder: of `folder_of`, where `write` has written.
        step: that was tested.
        panels: of `panel`, in the order of the images.

    Raises:
        OSError: they cannot be written.
    """
    for number, picture in enumerate(panels):
        _write_image(Image.fromarray(picture), folder / f"{number}_step{step}_panel.png")


def _write_image(picture: Image.Image, path: Path) -> None:
    """Write under another name and rename, so that an interrupted run leaves no incomplete picture."""
    aside = path.with_suffix(".writing")
    picture.save(aside, format="PNG")
    aside.replace(path)


def copy_steps(source: Path, target: Path, last_step: int) -> None:
    """Copy the pictures of another run up to a step, for a run that starts from that step.

    Args:
        source, target: folders, of `folder_of`; nothing happens if there is no source.
        last_step: the last step that is copied.
    """
    found = [
        path for path in source.glob("*_step*.png") if (m := _OF_STEP.fullmatch(path.name)) and int(m[1]) <= last_step
    ]
    if not found:
        return
    target.mkdir(parents=True, exist_ok=True)
    for path in (*found, *source.glob("*_image.png"), *source.glob("*_truth.png"), source / "legend.json"):
        if path.is_file() and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)


def read(results_file: Path) -> Shown | None:
    """The pictures of a run, or None if it has none or its folder contains other files.

    Args:
        results_file: its CSV or JSON.
    """
    folder = folder_of(results_file)
    found = {(int(m[1]), int(m[2])) for path in folder.glob("*_step*.png") if (m := _STEP.fullmatch(path.name))}
    if not found:
        return None
    steps = sorted({step for _, step in found})
    rows: list[list[Path | None]] = []
    for number in sorted({number for number, _ in found}):
        names = [f"{number}_image.png", f"{number}_truth.png", *(f"{number}_step{step}.png" for step in steps)]
        rows.append([path if (path := folder / name).is_file() else None for name in names])
    try:
        described = json.loads((folder / "legend.json").read_text(encoding="utf-8"))
        legend = {str(name): colour for name, colour in described if re.fullmatch("#[0-9a-f]{6}", colour)}
        present = {
            int(v)
            for row in rows
            for path in row[1:]
            if path is not None
            for v in np.unique(np.asarray(Image.open(path)))
        }
    except (OSError, ValueError, TypeError):
        return None
    return Shown(steps, rows, {name: colour for i, (name, colour) in enumerate(legend.items()) if i in present})


def panel(sample: Sample, legend: Legend, title: str) -> np.ndarray:
    """Image, truth and prediction side by side at their own size, with titles and a legend of the classes that occur.

    Args:
        sample: what is drawn.
        legend: of the task.
        title: of the whole panel.

    Returns:
        (H', W', 3) uint8.
    """
    parts = [sample.image, legend.colours[sample.truth], legend.colours[sample.prediction]]
    height, width = sample.image.shape[:2]
    font = ImageFont.load_default()
    present = sorted({*np.unique(sample.truth).tolist(), *np.unique(sample.prediction).tolist()} - {IGNORE})
    names = [legend.names[position] for position in present if position < len(legend.names)]
    column = max(width, 72)  # titles need this width
    total = _MARGIN + 3 * (column + _MARGIN)
    lines = _wrap([_LINE + round(font.getlength(name)) + _MARGIN for name in names], total - 2 * _MARGIN)
    top = _MARGIN + 2 * _LINE
    canvas = Image.new("RGB", (total, top + height + _MARGIN + _LINE * len(lines) + _MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, _MARGIN), title, fill="black", font=font)
    for index, (name, part) in enumerate(zip(("image", "truth", "prediction"), parts)):
        left = _MARGIN + index * (column + _MARGIN)
        draw.text((left, _MARGIN + _LINE), name, fill="black", font=font)
        canvas.paste(Image.fromarray(part.astype(np.uint8)), (left, top))
    for line, entries in enumerate(lines):
        y = top + height + _MARGIN + line * _LINE
        for index, x in entries:
            colour = tuple(legend.colours[present[index]].tolist())
            draw.rectangle((_MARGIN + x, y + 2, _MARGIN + x + 10, y + 12), fill=colour, outline="gray")
            draw.text((_MARGIN + x + 14, y + 1), names[index], fill="black", font=font)
    return np.asarray(canvas)


def draw_legend(entries: Sequence[tuple[str, tuple[int, ...]]], per_column: int = 30) -> Image.Image:
    """Names beside their colours, in columns.

    Args:
        entries: (name, (red, green, blue)) of each class.
        per_column: greatest number of entries of a column.
    """
    font, line, box = ImageFont.load_default(15), 24, 16
    columns = [entries[start : start + per_column] for start in range(0, len(entries), per_column)]
    widths = [box + 22 + round(max(font.getlength(name) for name, _ in column)) for column in columns]
    rows = max(map(len, columns), default=0)
    picture = Image.new("RGB", (_MARGIN + sum(widths), 2 * _MARGIN + line * rows), "white")
    draw = ImageDraw.Draw(picture)
    left = _MARGIN
    for column, width in zip(columns, widths):
        for number, (name, colour) in enumerate(column):
            top = _MARGIN + number * line
            draw.rectangle((left, top + 3, left + box, top + 3 + box), fill=colour, outline="gray")
            draw.text((left + box + 8, top + 2), name, fill="black", font=font)
        left += width
    return picture


def _wrap(widths: Sequence[int], limit: int) -> list[list[tuple[int, int]]]:
    """Lines of (index, abscissa) into which items of these widths fit."""
    lines: list[list[tuple[int, int]]] = [[]]
    used = 0
    for index, width in enumerate(widths):
        if lines[-1] and used + width > limit:
            lines.append([])
            used = 0
        lines[-1].append((index, used))
        used += width
    return lines
