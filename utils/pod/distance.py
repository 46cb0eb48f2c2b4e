"""Distance of two feature maps in local POD, without computing the embeddings.

Local POD is linear in its squared input, so the difference of the squared maps is pooled once, in the cells of the finest scale.
The sums of coarser cells are sums of these, and the squared distance is a quadratic form: with R (f, n) the sums over the
columns of each of the f finest cells and C (f, n) those over the rows,

    distance² = Σ R ∘ (Q R) / w² + Σ C ∘ (Q C) / h²,    Q_ij = Σ over scales s of s² [cells i and j are in the same cell of s].

Reference:
    Douillard et al., "PLOP: Learning without Forgetting for Continual Semantic Segmentation", CVPR 2021, eq. 4-6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from utils.runtime.amp import at_least_float32

#: `--pod_prepro`; all are homogeneous, so a mask may be applied before or after.
PREPROCESS: dict[str, Callable[[Tensor], Tensor]] = {
    "pow": torch.square,
    "none": lambda features: features,
    "abs": torch.abs,
    "relu": torch.relu,
}


def cell_size(features: Tensor, scale: int) -> tuple[int, int]:
    """Size of a cell of the scale×scale grid.

    Args:
        features: (B, c, h, w).
        scale: side of the grid.

    Returns:
        Height kh and width kw; rows and columns at the end that fill no cell are unused.
    """
    return features.shape[-2] // scale, features.shape[-1] // scale


def usable_scales(features: Tensor, scales: Sequence[int]) -> list[int]:
    """The scales whose cells have at least one pixel; a map of 3×3 pixels has no 4×4 grid."""
    return [scale for scale in scales if scale <= min(features.shape[-2:])]


def row_sums(features: Tensor, scale: int) -> Tensor:
    """Sums over the columns of each cell: (B, c, scale·kh, scale)."""
    kh, kw = cell_size(features, scale)
    grid = features[..., : scale * kh, : scale * kw].unflatten(-1, (scale, kw))  # (B, c, scale·kh, scale, kw)
    return grid.sum(-1)


def column_sums(features: Tensor, scale: int) -> Tensor:
    """Sums over the rows of each cell: (B, c, scale, scale·kw)."""
    kh, kw = cell_size(features, scale)
    grid = features[..., : scale * kh, : scale * kw].unflatten(-2, (scale, kh))  # (B, c, scale, kh, scale·kw)
    return grid.sum(-2)


def masked_weight(mask: Tensor | None, prepro: str) -> Tensor | None:
    """The factor of the preprocessed map that has the same effect as a mask ≥ 0 on the map itself."""
    return mask.square() if mask is not None and prepro == "pow" and mask.dtype != torch.bool else mask


def preprocessed_difference(teacher: Tensor, student: Tensor, prepro: str, mask: Tensor | None) -> Tensor:
    """prepro(teacher·mask) − prepro(student·mask), for a mask of values ≥ 0."""
    difference = PREPROCESS[prepro](teacher) - PREPROCESS[prepro](student)
    weight = masked_weight(mask, prepro)
    return difference if weight is None else difference * weight


@lru_cache(maxsize=64)
def _nesting(scales: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix Q (f, f) of the module's docstring."""
    finest = max(scales)
    cell = torch.arange(finest)
    nested = [scale**2 * (cell[:, None] * scale // finest == cell * scale // finest) for scale in scales]
    return torch.stack(nested).sum(0).to(device, dtype)


@lru_cache(maxsize=64)
def _pooling(finest: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(width, f) zeros and ones: the finest cell of each column."""
    return torch.eye(finest, dtype=dtype).repeat_interleave(width // finest, 0).to(device)


class _NestedDistance(torch.autograd.Function):
    """`pod_distance` for squared maps whose cells nest.

    It has its own backward pass, which needs one buffer of the size of the map in each direction, where autograd needs about
    five; and it chooses the order of the sums by the memory layout, which determines their speed.
    """

    @staticmethod
    def forward(ctx: Any, teacher: Tensor, student: Tensor, weight: Tensor | None, scales: tuple[int, ...]) -> Tensor:
        batch, channels, height, width = student.shape
        finest = max(scales)
        difference = teacher - student
        difference *= teacher + student  # a² − b², exactly 0 where a = b, and without cancellation where they are close
        if weight is not None:
            difference *= weight
        ctx.channels_last = not student.is_contiguous() and student.is_contiguous(memory_format=torch.channels_last)
        if ctx.channels_last:
            pixels = difference.permute(0, 2, 3, 1)  # (B, h, w, c), contiguous
            rows = pixels.unflatten(2, (finest, -1)).sum(3).movedim(2, 0)  # (f, B, h, c)
            columns = pixels.unflatten(1, (finest, -1)).sum(2).movedim(1, 0)  # (f, B, w, c)
        else:
            difference = difference.contiguous()
            pooling = _pooling(finest, width, student.dtype, student.device)
            rows = (difference.view(-1, width) @ pooling).view(batch, channels, height, finest).movedim(3, 0)
            columns = difference.unflatten(2, (finest, -1)).sum(3).movedim(2, 0)  # (f, B, c, w)
        rows, columns = rows.reshape(finest, -1), columns.reshape(finest, -1)  # (f, n) each
        nesting = _nesting(scales, student.dtype, student.device)
        row_slope, column_slope = nesting @ rows / width**2, nesting @ columns / height**2
        squared = (rows * row_slope).view(finest, batch, -1).sum((0, 2))
        squared += (columns * column_slope).view(finest, batch, -1).sum((0, 2))
        distance = squared.clamp(min=0).sqrt()
        ctx.save_for_backward(student, weight, row_slope, column_slope, distance)
        return distance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        student, weight, row_slope, column_slope, distance = ctx.saved_tensors
        batch, channels, _, width = student.shape
        finest = row_slope.shape[0]
        factor = torch.where(distance > 0, -2 * grad / distance, 0)[:, None]  # 0: the subgradient where they are equal
        rows = row_slope.view(finest, batch, -1) * factor
        columns = column_slope.view(finest, batch, -1) * factor
        if ctx.channels_last:
            slope = torch.empty_like(student)
            cells = slope.permute(0, 2, 3, 1).unflatten(2, (finest, -1)).unflatten(1, (finest, -1))  # (B,f,kh,f,kw,c)
            rows = rows.view(finest, batch, finest, -1, 1, channels).permute(1, 2, 3, 0, 4, 5)  # (B, f, kh, f, 1, c)
            columns = columns.view(finest, batch, 1, finest, -1, channels).transpose(0, 1)  # (B, f, 1, f, kw, c)
            torch.add(rows, columns, out=cells)
        else:
            pooling = _pooling(finest, width, student.dtype, student.device)
            slope = (rows.view(finest, -1).T @ pooling.T).view(student.shape)
            columns = columns.view(finest, batch, channels, 1, width).permute(1, 2, 0, 3, 4)  # (B, c, f, 1, w)
            slope.unflatten(2, (finest, -1)).add_(columns)
        slope *= student
        if weight is not None:
            slope *= weight
        return None, slope, None, None


def _direct_distance(difference: Tensor, scales: Sequence[int]) -> Tensor:
    """The distance from a difference of preprocessed maps, with each scale pooled separately."""
    norms = []
    for scale in scales:
        kh, kw = cell_size(difference, scale)
        norms.append(torch.linalg.vector_norm(row_sums(difference, scale).flatten(1), dim=1) / kw)
        norms.append(torch.linalg.vector_norm(column_sums(difference, scale).flatten(1), dim=1) / kh)
    return torch.linalg.vector_norm(torch.stack(norms), dim=0)


def pod_distance(
    teacher: Tensor,
    student: Tensor,
    scales: Sequence[int] = (1, 2, 4),
    prepro: str = "pow",
    mask: Tensor | None = None,
) -> Tensor:
    """L2 distance between the local POD embeddings of two feature maps.

    Exact for every size: if the finest scale does not divide the map, cells of different scales do not nest, and each scale
    is pooled separately.

    Args:
        teacher: (B, c, h, w), a constant.
        student: (B, c, h, w); the gradient is finite (zero) where it equals the teacher.
        scales: sides of the grids; those larger than the map have no pixels and are left out.
        prepro: `pow` (square, PLOP), `none`, `abs`, `relu`; applied after the mask.
        mask: multiplies both maps, ≥ 0, broadcastable to (B, c, h, w), or None.

    Returns:
        (B,) distances.

    Reference: PLOP, eq. 5-6; LSKD's mask-guided distillation where a mask is given.
    """
    teacher, student = at_least_float32(teacher.detach()), at_least_float32(student)
    usable = tuple(usable_scales(student, scales))
    finest = max(usable)
    nested = all(side % finest == 0 for side in student.shape[-2:]) and all(finest % scale == 0 for scale in usable)
    # Without autocast, because sums of squares overflow in half precision
    with torch.autocast(student.device.type, enabled=False):
        if nested and prepro == "pow":
            weight = masked_weight(mask, prepro)
            return _NestedDistance.apply(teacher, student, None if weight is None else weight.to(student.dtype), usable)
        return _direct_distance(preprocessed_difference(teacher, student, prepro, mask), usable)
