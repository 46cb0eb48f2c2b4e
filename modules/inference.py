"""Class maps from several views of an image: scaled, mirrored, or cut into windows, whose class probabilities are summed.

The test of a step (`train.py`) and `scripts/predict.py` use the same functions. An image that has one plain view gets the most likely
channel of its logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from modules.upsample import upsample_bands
from utils.runtime.amp import at_least_float32

#: Values of logits that are upsampled at a time, 64 MB in float32.
_BAND = 1 << 24


class View(NamedTuple):
    """How the network sees an image.

    Attributes:
        scale: factor of both sides.
        flipped: left and right are exchanged.
    """

    scale: float = 1.0
    flipped: bool = False


#: The image as it is.
PLAIN = (View(),)


def make_views(scales: Sequence[float] | None, flip: bool) -> tuple[View, ...]:
    """The views that the options `--scales` and `--flip` ask for.

    Args:
        scales: factors of the sides of the image; None: 1 alone.
        flip: whether each is also seen mirrored.
    """
    return tuple(View(scale, flipped) for scale in scales or (1.0,) for flipped in (False, True)[: 1 + flip])


def seen(images: Tensor, view: View) -> Tensor:
    """Transform images as a view defines.

    Args:
        images: (..., 3, H, W), uint8 or floating point.
        view: how the network sees them.

    Returns:
        (..., 3, H', W') of the same type, H' and W' rounded to the nearest pixel; resized as the transforms of the data do.
    """
    if view.scale != 1:
        from torchvision.transforms.v2 import functional as F  # slow to import, and not needed by a plain view

        # At least two pixels: torch cannot resize uint8 images to a single pixel
        size = [max(2, math.floor(length * view.scale + 0.5)) for length in images.shape[-2:]]
        images = F.resize(images, size, antialias=True)
    return images.flip(-1) if view.flipped else images


def logits_of_views(small_logits: Callable[[Tensor], Tensor], images: Tensor, views: Sequence[View]) -> list[Tensor]:
    """Logits of each view, those of mirrored images mirrored back.

    Args:
        small_logits: maps images (..., 3, H, W) to logits (..., C, h, w).
        images: (..., 3, H, W).
        views: how the network sees them.

    Returns:
        (..., C, h, w) of each view.
    """
    found = []
    for view in views:
        logits = small_logits(seen(images, view))
        found.append(logits.flip(-1) if view.flipped else logits)
    return found


def class_map(logits: Sequence[Tensor], size: tuple[int, int], background: bool = True) -> Tensor:
    """The most likely channel of every pixel; upsampled logits of a band are in memory, not those of the whole image.

    The logits of each view are upsampled to the size of the image, and the softmax probabilities of all views are summed.

    Args:
        logits: (C, h, w) of each view in at least float32, C up to 256.
        size: H, W of the image.
        background: whether channel 0 may be predicted.

    Returns:
        (H, W) uint8 on the CPU.

    Reference: `EncoderDecoder.aug_test` of mmsegmentation, which upsamples to the size of the scaled image before that of the image.
    """
    classes = torch.empty(size, dtype=torch.uint8)
    first = 0 if background else 1
    rows = max(1, _BAND // (len(logits) * len(logits[0]) * size[1]))
    for bands in zip(*(upsample_bands(view[first:], size, rows) for view in logits)):
        start, scores = bands[0]
        if len(bands) > 1:
            scores = torch.stack([band.softmax(dim=0) for _, band in bands]).sum(dim=0)  # views×C×rows×W → C×rows×W
        best = scores.argmax(dim=0) + first
        classes[start : start + len(best)] = best.to(torch.uint8).cpu()
    return classes


def most_likely(network: nn.Module, images: Tensor, views: Sequence[View], background: bool = True) -> Tensor:
    """The most likely channel of every pixel of a batch.

    Args:
        network: a `SegmentationModel` in evaluation mode.
        images: (B, 3, H, W) normalised.
        views: how the network sees them.
        background: whether channel 0 may be predicted.

    Returns:
        (B, H, W) int64 on the device of the images.
    """
    if tuple(views) == PLAIN:
        scores = network(images).logits
        if not background:
            scores[:, 0] = -math.inf
        return scores.argmax(dim=1)
    small = logits_of_views(lambda batch: network(batch, full_size=False).logits_small, images, views)
    size = (images.shape[2], images.shape[3])
    with torch.autocast(images.device.type, enabled=False):  # interpolation in half precision makes close logits equal
        maps = [class_map([at_least_float32(view[i]) for view in small], size, background) for i in range(len(images))]
    return torch.stack(maps).to(images.device, torch.int64)
