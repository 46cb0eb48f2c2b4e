"""POD, pooled outputs distillation: embeddings of a feature map by pooling, and distances of two embeddings.

PLOP and LSKD compare taps by local POD; spatial and global POD pool differently. Every embedding is linear in its (already
squared) input, so the two maps are subtracted first and only the difference is pooled.

Reference:
    Douillard et al., "PODNet: Pooled Outputs Distillation for Small-Tasks Incremental Learning", ECCV 2020, eq. 4-6.
    Douillard et al., "PLOP: Learning without Forgetting for Continual Semantic Segmentation", CVPR 2021, eq. 3-6.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.pod.distance import (
    PREPROCESS,
    cell_size,
    column_sums,
    pod_distance,
    preprocessed_difference,
    row_sums,
    usable_scales,
)
from utils.pod.options import TapOptions
from utils.runtime.amp import at_least_float32


def _local_parts(features: Tensor, scales: Sequence[int]) -> list[Tensor]:
    """Local POD, one embedding per scale: cells in row-major order, and for each cell the means of its rows, then of its columns."""
    parts = []
    for scale in usable_scales(features, scales):
        kh, kw = cell_size(features, scale)
        rows = (row_sums(features, scale) / kw).unflatten(2, (scale, kh))  # (B, c, i, kh, j)
        columns = (column_sums(features, scale) / kh).unflatten(3, (scale, kw))  # (B, c, i, j, kw)
        rows = rows.permute(0, 2, 4, 1, 3).flatten(3)  # (B, i, j, c·kh)
        columns = columns.permute(0, 2, 3, 1, 4).flatten(3)  # (B, i, j, c·kw)
        parts.append(torch.cat([rows, columns], dim=3).flatten(1))  # (B, s²·c·(kh+kw))
    return parts


def _global_parts(features: Tensor, scales: Sequence[int]) -> list[Tensor]:
    """Global POD: average-pool to cells, then sum the grid of cells over its columns and over its rows."""
    parts = []
    for scale in usable_scales(features, scales):
        cells = F.avg_pool2d(features, kernel_size=cell_size(features, scale))  # (B, c, rows, columns)
        parts.append(torch.cat([cells.sum(2).flatten(1), cells.sum(3).flatten(1)], dim=1))
    return parts


def _spatial_parts(features: Tensor, scales: Sequence[int]) -> list[Tensor]:
    """Spatial POD (PODNet): sums over the columns and over the rows of the whole map; it has no scales."""
    return [torch.cat([features.sum(3).flatten(1), features.sum(2).flatten(1)], dim=1)]  # (B, c·(h+w))


EMBEDDINGS = {"local": _local_parts, "global": _global_parts, "spatial": _spatial_parts}


def local_pod(features: Tensor, scales: Sequence[int] = (1, 2, 4)) -> Tensor:
    """Local POD embedding.

    For each scale s the map is cut into s² cells of (h // s)×(w // s) pixels; each cell gives its means over columns
    and its means over rows, flattened. Losses use `pod_distance`, which needs no explicit embedding.

    Args:
        features: (B, c, h, w), already squared where that is wanted.
        scales: sides of the grids.

    Returns:
        (B, n) embedding in the official order.

    Reference: PLOP, eq. 4-5.
    """
    return torch.cat(_local_parts(at_least_float32(features), scales), dim=1)


def _scale_weights(scales: Sequence[int], tap: TapOptions) -> list[float]:
    """Factor of each scale's embedding: 1; `true`: one over its number of cells; `spm`: spatial pyramid matching."""
    if tap.normalize_per_scale == "spm":  # Lazebnik et al., CVPR 2006, eq. 3: 1/2^L at level 0, 1/2^(L-l+1) at level l
        levels = len(scales) - 1
        return [2.0 ** -min(levels, levels - level + 1) for level in range(len(scales))]
    return [1 / scale**2 if tap.normalize_per_scale else 1.0 for scale in scales]


def _embed(features: Tensor, tap: TapOptions) -> Tensor:
    """(B, n) embedding of preprocessed features."""
    scales = [1] if tap.type == "spatial" else usable_scales(features, tap.spp_scales)
    parts = EMBEDDINGS[tap.type](features, scales)
    return torch.cat([part * weight for part, weight in zip(parts, _scale_weights(scales, tap))], dim=1)


def embedding_distance(teacher: Tensor, student: Tensor, tap: TapOptions, mask: Tensor | None = None) -> Tensor:
    """Distance per image between two taps, as `--pod_options` defines it.

    Args:
        teacher: (B, c, h, w).
        student: (B, c, h, w).
        tap: which embedding, preprocessing, normalisation and difference function.
        mask: multiplies both, broadcastable, or None.

    Returns:
        (B,): `frobenius` the L2 norm of the embeddings' difference, `l1` its L1 norm; `kl` the divergence of the
        student's embedding from the teacher's, both scaled to sum 1 (made non-negative by abs); `bce` the mean binary
        cross entropy between their sigmoids. Only `frobenius` has published numbers.
    """
    teacher, student = at_least_float32(teacher), at_least_float32(student)
    plain = not tap.norm and not tap.normalize_per_scale
    if plain and tap.type == "local" and tap.difference_function == "frobenius":
        return pod_distance(teacher, student, tap.spp_scales, tap.prepro, mask)
    if not tap.norm and tap.difference_function in ("frobenius", "l1"):
        difference = _embed(preprocessed_difference(teacher, student, tap.prepro, mask), tap)
    else:
        known, seen = (
            _embed(PREPROCESS[tap.prepro](features if mask is None else features * mask), tap)
            for features in (teacher, student)
        )
        if tap.norm:
            known, seen = F.normalize(known, dim=1), F.normalize(seen, dim=1)
        if tap.difference_function == "kl":
            known, seen = F.normalize(known.abs() + 1e-8, p=1, dim=1), F.normalize(seen.abs() + 1e-8, p=1, dim=1)
            return (known * (known / seen).log()).sum(1)
        if tap.difference_function == "bce":
            return F.binary_cross_entropy_with_logits(seen, known.sigmoid(), reduction="none").mean(1)
        difference = known - seen
    return torch.linalg.vector_norm(difference, ord=1 if tap.difference_function == "l1" else 2, dim=1)
