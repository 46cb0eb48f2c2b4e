"""shapes: the embedded data set. Its scenes are drawn, not read from files; a seed and an index give the same scene on every machine.

Every picture shows two to four objects of different classes on a textured background, so that old, current and future
classes occur in one picture. A class is a silhouette with a texture. The colours of objects and background are random and do
not depend on the class. Each silhouette and nearly each texture belongs to two or more classes, so that a class can only be
recognised by both. A border of one or two pixels around objects is ignored (255), as in VOC.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from utils.types import IGNORE

#: Texture and silhouette of classes 1 to 10: each of the five textures and five silhouettes belongs to two classes.
_LOOKS = (
    ("solid", "disk"), ("barred", "square"), ("lined", "triangle"), ("checked", "disk"), ("dotted", "square"),
    ("solid", "triangle"), ("barred", "ring"), ("lined", "cross"), ("checked", "cross"), ("dotted", "ring"),
)  # fmt: skip
CLASSES = ("background", *(f"{texture} {silhouette}" for texture, silhouette in _LOOKS))

#: Pictures are drawn at the crop size, but at most at this size; for a larger crop they are enlarged, as photographs are.
MAX_SIZE = 128


def _inside(silhouette: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the edge of a silhouette of radius 1, positive inside, at the rotated coordinates (x, y)."""
    if silhouette == "disk":
        return 1 - np.hypot(x, y)
    if silhouette == "square":
        return 0.82 - np.maximum(np.abs(x), np.abs(y))
    if silhouette == "triangle":
        return 0.55 - np.maximum(y, np.abs(x) * (math.sqrt(3) / 2) - y / 2)
    if silhouette == "ring":
        return 0.27 - np.abs(np.hypot(x, y) - 0.73)
    assert silhouette == "cross"
    x, y = np.abs(x), np.abs(y)
    return np.minimum(0.95 - np.maximum(x, y), 0.3 - np.minimum(x, y))


def _texture(texture: str, x: np.ndarray, y: np.ndarray, dark: bool) -> np.ndarray:
    """Where a texture of period 1 is dark: on half of its area, so that all textures have the same mean colour; "solid" is uniform."""
    if texture == "solid":
        return np.full(x.shape, dark)
    if texture == "barred":
        return y % 1 < 0.5
    if texture == "lined":
        return x % 1 < 0.5
    if texture == "checked":
        return (x % 1 < 0.5) ^ (y % 1 < 0.5)
    assert texture == "dotted"
    return np.hypot(x % 1 - 0.5, y % 1 - 0.5) < 0.4


def _two_colours(rng: np.random.Generator) -> np.ndarray:
    """A light and a dark colour (2, 3), far enough apart that a texture of them can be seen."""
    return np.stack([rng.uniform(130, 255, 3), rng.uniform(0, 90, 3)]).astype(np.float32)


@lru_cache(maxsize=4)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32)
    return rows, columns


def _ground(rng: np.random.Generator, size: int) -> np.ndarray:
    """A background (size, size, 3) float32: two colours mixed by a smooth random wave."""
    rows, columns = _grid(size)
    angles, periods = rng.uniform(0, math.tau, 2), rng.uniform(0.3, 1.5, 2) * size
    wave = sum(np.sin((rows * math.sin(a) + columns * math.cos(a)) * (math.tau / p)) for a, p in zip(angles, periods))
    mix = (0.5 + 0.25 * wave)[..., None]
    first, second = rng.uniform(40, 190, (2, 3)).astype(np.float32)
    return first * mix + second * (1 - mix)


def _draw_object(rng: np.random.Generator, image: np.ndarray, mask: np.ndarray, class_id: int, box: tuple) -> None:
    """Draws an object of that class within the square cell (top, left, side) of image (S, S, 3) and mask (S, S)."""
    top, left, side = box
    texture, silhouette = _LOOKS[class_id - 1]
    radius = rng.uniform(0.36, 0.49) * side
    centre = rng.uniform(radius, side - radius, 2)
    here = np.s_[top : top + side, left : left + side]
    rows, columns = _grid(side)
    rows, columns = (rows + 0.5 - centre[0]) / radius, (columns + 0.5 - centre[1]) / radius
    angle = rng.uniform(0, math.tau)
    x = columns * math.cos(angle) + rows * math.sin(angle)
    y = rows * math.cos(angle) - columns * math.sin(angle)

    depth = _inside(silhouette, x, y) * radius  # pixels
    period = rng.uniform(0.4, 0.55)
    dark, *shift = rng.uniform(size=3)
    pattern = _texture(texture, columns / period + shift[0], rows / period + shift[1], dark < 0.5)
    colours = _two_colours(rng)
    image[here] = np.where((depth > 0)[..., None], colours[pattern.astype(np.intp)], image[here])
    border = max(0.8, side / 64)  # one or two pixels wide
    mask[here][depth > -border] = IGNORE
    mask[here][depth > border] = class_id


def _plan(seed: int, index: int) -> tuple[np.random.Generator, np.ndarray, np.ndarray]:
    """Contents of a scene: its random generator, the classes of its objects, and the quarter of the picture of each object."""
    rng = np.random.Generator(np.random.PCG64([seed, index]))
    count = int(rng.integers(2, 5))
    classes = 1 + rng.permutation(len(CLASSES) - 1)[:count]
    return rng, classes, rng.permutation(4)[:count]


def draw(seed: int, index: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Scene number `index` of a seed.

    Args:
        seed: of the data set.
        index: number of the scene.
        size: side of the picture in pixels, at least 16.

    Returns:
        image (size, size, 3) uint8 and mask (size, size) uint8 with class ids 0 to 10, and 255 around objects.
    """
    rng, classes, quarters = _plan(seed, index)
    image = _ground(rng, size)
    mask = np.zeros((size, size), dtype=np.uint8)
    half = size // 2
    for class_id, quarter in zip(classes, quarters):
        _draw_object(rng, image, mask, int(class_id), (quarter // 2 * half, quarter % 2 * half, half))
    image += rng.standard_normal(image.shape, dtype=np.float32) * 6
    return np.clip(image, 0, 255).astype(np.uint8), mask


class ShapesSource:
    """`count` scenes of a seed as a source of `dataset.base`."""

    def __init__(self, split: str, count: int, size: int) -> None:
        self.title = f"split {split} of shapes"
        self.class_table = np.arange(256)  # masks are drawn in class ids
        self.split, self.count, self.size = split, count, min(size, MAX_SIZE)
        self.seed = {"train": 1, "val": 2}[split]

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (S, S, 3) and mask (S, S), uint8."""
        return draw(self.seed, index, self.size)

    def files(self, index: int) -> tuple[str, ...]:
        """A name of the scene for messages; there is no file."""
        return (f"shapes/{self.split}/{index}",)

    def presence(self) -> np.ndarray:
        """(N, 256) bool from the plans of the scenes, without drawing them: objects never cover each other."""
        shown = np.zeros((self.count, 256), dtype=bool)
        shown[:, [0, IGNORE]] = True
        for index in range(self.count):
            shown[index, _plan(self.seed, index)[1]] = True
        return shown
