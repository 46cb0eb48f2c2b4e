"""RCIL's distillation of features by pooled cubes: squared features, averaged over squares of positions and over neighbouring channels.

With a, b a tap of teacher and student, P_k the average over k×k positions and Q the average over three neighbouring channels, both at
stride 1 and with zero padding that the average counts:

    spatial   mean over taps of φ · mean over k ∈ SIDES of D(P_k(a²), P_k(b²))
    channel   mean over taps without the logits of ψ · D(Q(a²), Q(b²))

D is the mean over images of the Euclidean distance. Both averages are linear, so the difference a² − b² is averaged.

Reference: Zhang et al., "Representation Compensation Networks for Continual Semantic Segmentation", CVPR 2022, section 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.runtime.amp import at_least_float32

#: Sides of the pooling windows, in positions.
SIDES = (4, 8, 12, 16, 20, 24)


def fold_new_classes(logits: Tensor, num_old: int) -> Tensor:
    """The student's logits with as many channels as the teacher's: the background takes the sum of the new classes.

    Args:
        logits: (B, C, h, w).
        num_old: C_old.

    Returns:
        (B, C_old, h, w).
    """
    background = logits[:, :1] + logits[:, num_old:].sum(1, keepdim=True)
    return torch.cat([background, logits[:, 1:num_old]], dim=1)


def spatial_distances(teacher: Tensor, student: Tensor) -> Tensor:
    """Distance of the squared features, averaged over k×k positions, for every k of `SIDES`.

    Args:
        teacher, student: (B, c, h, w).

    Returns:
        (6,), means over images; the gradient is 0 where the two are equal.
    """
    change = _squared_change(teacher, student)  # (B, c, h, w)
    return torch.stack([_mean_norm(_pool_square(change, side)) for side in SIDES])


def channel_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """Distance of the squared features, averaged over three neighbouring channels.

    Args:
        teacher, student: (B, c, h, w).

    Returns:
        Scalar, mean over images; the gradient is 0 where the two are equal.
    """
    change = _squared_change(teacher, student).flatten(2)[:, None]  # (B, 1, c, h·w)
    return _mean_norm(F.avg_pool2d(change, (3, 1), stride=1, padding=(1, 0)))


def spatial(teacher: Sequence[Tensor], student: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """The spatial term over all taps.

    Args:
        teacher, student: taps (B, c, h, w), each of both networks with the same channels.
        factors: φ of each tap.

    Returns:
        Scalar.
    """
    terms = [factor * spatial_distances(a, b).mean() for a, b, factor in zip(teacher, student, factors, strict=True)]
    return torch.stack(terms).mean()


def channel(teacher: Sequence[Tensor], student: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """The term over neighbouring channels.

    Args:
        teacher, student: as in `spatial`, without the logits.
        factors: ψ of each tap.

    Returns:
        Scalar.
    """
    terms = [factor * channel_distance(a, b) for a, b, factor in zip(teacher, student, factors, strict=True)]
    return torch.stack(terms).mean()


def _squared_change(teacher: Tensor, student: Tensor) -> Tensor:
    """a² − b², computed as (a − b)(a + b), which avoids the cancellation of nearly equal squares."""
    a, b = at_least_float32(teacher), at_least_float32(student)
    return (a - b) * (a + b)


def _pool_square(x: Tensor, side: int) -> Tensor:
    """Averages over side×side positions, (B, c, h, w) -> (B, c, h+1, w+1), as products with matrices of rows and of columns.

    With windows of up to 24 positions these are four to eight times as fast on a CPU as the pooling of torch, with the same rounding.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _windows(x.shape[2], side, x) @ x @ _windows(x.shape[3], side, x).T


def _windows(size: int, side: int, like: Tensor) -> Tensor:
    """(size + 1, size) share of each position in the windows along one axis, the first of which begins side/2 before it."""
    positions = torch.arange(size + 1, device=like.device)
    offset = positions[None, :-1] - positions[:, None] + side // 2
    return ((offset >= 0) & (offset < side)).to(like.dtype) / side


def _mean_norm(x: Tensor) -> Tensor:
    """Mean over images of the Euclidean norm over all other dimensions."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).mean()
