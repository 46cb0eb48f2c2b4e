"""Logits of large images: the network sees them tile by tile, or in windows that slide over them.

A tile is cut so that its cells lie where those of the whole image would lie, and the small logits of all tiles are joined into those of
the whole image before they are upsampled. Where a cell sees the same pixels in its tile as in the whole image, the result is the same
but for rounding. Near a seam it differs slightly, because a tile is padded where the whole image has further pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Tiling(NamedTuple):
    """How an image is cut.

    Attributes:
        side: greatest side of a tile in pixels; a larger image is cut.
        overlap: least number of pixels that neighbouring tiles share, below `side`. The seam is in its middle.
        stride: pixels a cell of the small logits, which divides `side` and `overlap`.
    """

    side: int
    overlap: int
    stride: int


class Span(NamedTuple):
    """A tile along one axis, in cells: where it begins and ends, and the part of it that is used."""

    start: int
    stop: int
    first: int
    last: int


def spans(length: int, tiling: Tiling) -> list[Span]:
    """The tiles along an axis: as few as possible, of equal length, each used to the middle of its overlap with the next.

    Args:
        length: of the axis, in pixels.
        tiling: how to cut.
    """
    cells, overlap = -(-length // tiling.stride), tiling.overlap // tiling.stride
    side = tiling.side // tiling.stride
    count = max(1, -(-(cells - overlap) // (side - overlap)))
    size = -(-(cells + (count - 1) * overlap) // count)
    starts = [min(number * (size - overlap), max(cells - size, 0)) for number in range(count)]
    seams = [(start + size + following) // 2 for start, following in pairwise(starts)]
    return [
        Span(start, min(start + size, cells), first, last)
        for start, first, last in zip(starts, [0, *seams], [*seams, cells])
    ]


def joined_logits(small_logits: Callable[[Tensor], Tensor], image: Tensor, tiling: Tiling) -> Tensor:
    """Small logits of an image, from those of its tiles.

    Args:
        small_logits: from pixels (3, H, W) of the type of `image` to logits (C, ceil(H/stride), ceil(W/stride)).
        image: (3, H, W).
        tiling: how to cut.

    Returns:
        (C, ceil(H/stride), ceil(W/stride)).
    """
    rows, columns = (spans(length, tiling) for length in image.shape[1:])
    stride, joined = tiling.stride, None
    for row in rows:
        for column in columns:
            top, left = row.start * stride, column.start * stride
            tile = small_logits(image[:, top : row.stop * stride, left : column.stop * stride])
            if joined is None:
                joined = tile.new_empty(len(tile), rows[-1].stop, columns[-1].stop)
            cut = tile[
                :,
                row.first - row.start : row.last - row.start,
                column.first - column.start : column.last - column.start,
            ]
            joined[:, row.first : row.last, column.first : column.last] = cut
    assert joined is not None
    return joined


class Windows(NamedTuple):
    """Windows of one size at equal distances.

    Attributes:
        side: of a window in pixels.
        step: pixels from one window to the next, at most `side`.
        stride: pixels a cell of the small logits; `side` and `step` are rounded down to multiples of it.
    """

    side: int
    step: int
    stride: int


def averaged_logits(small_logits: Callable[[Tensor], Tensor], image: Tensor, windows: Windows) -> Tensor:
    """Small logits of an image: the mean of those of the windows that see a cell.

    Args:
        small_logits, image: as for `joined_logits`.
        windows: the last window of a row or column ends at the border of the image.

    Returns:
        (C, ceil(H/stride), ceil(W/stride)).

    Reference: `EncoderDecoder.slide_inference` of mmsegmentation, which averages the logits after they are upsampled.
    """
    stride = windows.stride
    side, step = (max(1, length // stride) for length in (windows.side, windows.step))
    height, width = (-(-length // stride) for length in image.shape[1:])
    count = torch.zeros(height, width, device=image.device)
    total = None
    for top in _starts(height, side, step):
        for left in _starts(width, side, step):
            rows, columns = slice(top, top + side), slice(left, left + side)
            logits = small_logits(
                image[:, top * stride : (top + side) * stride, left * stride : (left + side) * stride]
            )
            if total is None:
                total, count = logits.new_zeros(len(logits), height, width), count.to(logits)
            total[:, rows, columns] += logits
            count[rows, columns] += 1
    assert total is not None
    return total / count


def _starts(cells: int, side: int, step: int) -> list[int]:
    """First cells of the windows along an axis."""
    count = 1 + max(0, -(-(cells - side) // step))
    return [min(number * step, max(0, cells - side)) for number in range(count)]
