"""Joint transforms of an image and its mask: the official ones, by the kernels of torchvision.transforms.v2.

Images and masks are resized, cropped and flipped as uint8 tensors, before the conversion to float. That moves a quarter of
the bytes, and the uint8 kernels agree with Pillow's, which the official program uses. Images are resized bilinearly with
antialiasing; a colour differs from Pillow's by at most 1 of 255. Masks get exactly the labels of Pillow's NEAREST at every
size (`nearest_positions`), for training and for evaluation: torchvision's NEAREST_EXACT chooses another pixel where a
position is on the border between two, which is 0.2 to 0.4 % of the pixels at some sizes. No transform pads: a random crop
is inside the image, and the centre crop follows a resize of the short side to the same size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# torchvision is imported by the transforms when they are first called: it takes as long to import as torch, and a training process whose
# images are loaded by others does not need it.

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_SCALE = torch.tensor([1 / (255 * std) for std in IMAGENET_STD]).view(3, 1, 1)
_SHIFT = torch.tensor([-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD)]).view(3, 1, 1)


class Pair(NamedTuple):
    """An image (3, H, W) and its mask (H, W), both uint8."""

    image: Tensor
    mask: Tensor


def normalise(image: Tensor) -> Tensor:
    """(3, H, W) uint8 → contiguous float32 with ImageNet's mean and deviation, in one pass over the memory."""
    out = torch.empty(image.shape, dtype=torch.float32)
    return out.copy_(image).mul_(_SCALE).add_(_SHIFT)


def denormalise(image: Tensor) -> Tensor:
    """The inverse of `normalise`, for pictures: (..., 3, H, W) float → uint8."""
    scale, shift = _SCALE.to(image), _SHIFT.to(image)
    return ((image - shift) / scale).round().clamp(0, 255).to(torch.uint8)


def nearest_positions(length: int, size: int) -> np.ndarray:
    """Positions of the pixels that Pillow's NEAREST takes along an axis.

    Position i is floor((i + ½)·length/size). Pillow adds length/size in double precision from one position to the next. Where
    the exact value is an integer, the rounding of this sum decides; this function therefore adds in the same order.

    Args:
        length: pixels of the axis.
        size: pixels wanted.

    Returns:
        (size,) int64, each from 0 to length - 1.
    """
    steps = np.full(size, length / size)
    steps[0] *= 0.5
    return np.cumsum(steps).astype(np.int64)


def resize_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Mask (H, W) uint8 resized to `size` (height, width) as Pillow's NEAREST does."""
    rows, columns = (nearest_positions(length, wanted) for length, wanted in zip(mask.shape, size))
    return torch.from_numpy(mask.numpy().take(rows, axis=0).take(columns, axis=1))  # a third of indexing in torch


class TrainTransform:
    """RandomResizedCrop(size, scale=(0.5, 2)) and RandomHorizontalFlip, drawn from torch's global generator."""

    scale = (0.5, 2.0)
    ratio = (3 / 4, 4 / 3)

    def __init__(self, size: int) -> None:
        self.size = [size, size]

    def __call__(self, image: Tensor, mask: Tensor) -> Pair:
        """Image (3, H, W) and mask (H, W) uint8 → the same crop of both, (3, size, size) and (size, size)."""
        from torchvision.transforms.v2 import RandomResizedCrop
        from torchvision.transforms.v2 import functional as F

        box = RandomResizedCrop.get_params(image, list(self.scale), list(self.ratio))
        image = F.resized_crop(image, *box, self.size, antialias=True)
        top, left, height, width = box
        mask = resize_mask(mask[top : top + height, left : left + width], self.size)
        if torch.rand(1) < 0.5:
            image, mask = F.horizontal_flip(image), F.horizontal_flip(mask)
        return Pair(image, mask)


class EvalTransform:
    """Resize(size) of the short side and CenterCrop(size)."""

    def __init__(self, size: int) -> None:
        self.size = [size]

    def __call__(self, image: Tensor, mask: Tensor) -> Pair:
        """Image (3, H, W) and mask (H, W) uint8 → (3, size, size) and (size, size)."""
        from torchvision.transforms.v2 import functional as F

        image = F.resize(image, self.size, antialias=True)
        mask = resize_mask(mask, image.shape[1:])[None]
        return Pair(F.center_crop(image, self.size), F.center_crop(mask, self.size)[0])


class FullImage:
    """The whole image (`--crop_val` crops instead). Images differ in size, so the loader makes batches of one."""

    def __call__(self, image: Tensor, mask: Tensor) -> Pair:
        """Image (3, H, W) and mask (H, W) uint8, unchanged."""
        return Pair(image, mask)
