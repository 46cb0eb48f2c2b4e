"""Bilinear upsampling of logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from modules import cpu_kernels


def upsample(logits: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Bilinear upsampling, align_corners=False.

    Args:
        logits: (B, C, h, w).
        size: H, W.

    Returns:
        (B, C, H, W).
    """
    full_precision = logits.dtype in (torch.float32, torch.float64)
    if logits.device.type != "cpu" or not full_precision or torch.compiler.is_compiling():
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    return cpu_kernels.upsample(logits, size)


def upsampling_mass(small: torch.Size | tuple[int, int], large: torch.Size | tuple[int, int], like: Tensor) -> Tensor:
    """For each input position of a bilinear upsampling, the sum of its coefficients over all output positions.

    It equals the gradient of the sum of the upsampled map, and is k² everywhere if H = k·h and W = k·w with a whole number k.

    Args:
        small: h, w.
        large: H, W.
        like: a tensor of the result's type and device.

    Returns:
        (h, w).
    """
    rows, columns = (cpu_kernels.upsampling_matrix(a, b, torch.float64).sum(1) for a, b in zip(small, large))
    return torch.outer(rows, columns).to(like)


def upsample_bands(logits: Tensor, size: tuple[int, int], rows: int) -> Iterator[tuple[int, Tensor]]:
    """The result of `upsample` in bands of rows, for maps that are too large for the memory.

    Args:
        logits: (C, h, w) in float32 or float64.
        size: H, W.
        rows: greatest height of a band.

    Yields:
        Number of the first row, and (C, rows, W); equal to those rows of the whole map up to rounding.
    """
    (height, width), dtype = logits.shape[1:], logits.dtype
    matrix = cpu_kernels.upsampling_matrix.__wrapped__  # not cached, because the sizes of images vary
    down = matrix(height, size[0], dtype).T.to(logits.device)  # (H, h)
    right = matrix(width, size[1], dtype).to(logits.device)  # (w, W)
    for start in range(0, size[0], rows):
        band = down[start : start + rows]
        used = band.any(dim=0).nonzero()  # the rows of the map that the band depends on
        first, last = int(used[0]), int(used[-1]) + 1
        wide = logits[:, first:last].contiguous() @ right  # (C, last - first, W)
        yield start, band[:, first:last] @ wide  # (C, rows, W)
