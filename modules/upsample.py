"""Bilinear upsampling of logits."""

from __future__ import annotations

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
    """Sum, over all output positions of a bilinear upsampling, of the coefficient of each input position.

    It is what a backward pass of the upsampling gives for a map of ones; k² everywhere if H = k·h and W = k·w with a whole number k.

    Args:
        small: h, w.
        large: H, W.
        like: a tensor of the result's type and device.

    Returns:
        (h, w).
    """
    rows, columns = (cpu_kernels.upsampling_matrix(a, b, torch.float64).sum(1) for a, b in zip(small, large))
    return torch.outer(rows, columns).to(like)
