"""POD, pooled-outputs distillation: how a feature map is summarised, and how far two summaries are apart.

Local POD is PLOP's and LSKD's way to compare two taps; spatial and global POD are its relatives. Every embedding here
is linear in its (already squared) input, so the two maps are subtracted first and only the difference is pooled.

Reference:
    Douillard et al., "PODNet: Pooled Outputs Distillation for Small-Tasks Incremental Learning", ECCV 2020, eq. 4-6.
    Douillard et al., "PLOP: Learning without Forgetting for Continual Semantic Segmentation", CVPR 2021, eq. 3-6.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.amp import full
from utils.pod_distance import (
    PREPROCESS,
    cell_size,
    column_sums,
    pod_distance,
    preprocessed_difference,
    row_sums,
    usable_scales,
)
from utils.pod_options import PodOptions, TapOptions, TapPlace


def _local_parts(features: Tensor, scales: Sequence[int]) -> list[Tensor]:
    """Local POD, one embedding a scale, cells in row-major order, in each first the rows' then the columns' means."""
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
    return torch.cat(_local_parts(full(features), scales), dim=1)


def fold_extra_channels(student: Tensor, num_old: int, how: str = "sum") -> Tensor:
    """The student's (B, C, h, w) logits in the teacher's num_old channels.

    Args:
        student: (B, C, h, w) with C ≥ num_old.
        num_old: channels of the teacher.
        how: `sum` adds the new classes to the background, `trim` cuts them off.

    Returns:
        (B, num_old, h, w).

    Raises:
        ValueError: another `how`.
    """
    if how not in ("sum", "trim"):
        raise ValueError(f"extra_channels={how!r} in --pod_options is unknown; use 'sum' or 'trim'.")
    if student.shape[1] == num_old:
        return student
    if how == "trim":
        return student[:, :num_old]
    background = student[:, :1] + student[:, num_old:].sum(1, keepdim=True)
    return torch.cat([background, student[:, 1:num_old]], dim=1)


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
    """Distance per image between two taps in any of the ways `--pod_options` can ask for.

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
    teacher, student = full(teacher), full(student)
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


def _background_only(
    teacher: Tensor, student: Tensor, mask: Tensor | None, old: Tensor, downscale: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Both taps and a mask that keeps old pixels, at one size (`--pod_deeplab_mask`).

    With `downscale` the mask comes to the tap; else the largest channel of each tap is enlarged to the labels, one
    channel because all of them at image size would not fit.
    """
    if downscale:
        kept = F.interpolate(old, size=student.shape[-2:])
        return teacher, student, kept if mask is None else kept * mask
    size = old.shape[-2:]
    teacher, student = (_enlarged(features.amax(1, keepdim=True), size) for features in (teacher, student))
    if mask is not None:
        old = old * F.interpolate(mask.amax(1, keepdim=True), size=size)
    return teacher, student, old


def _enlarged(features: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(features, size=size, mode="bilinear", align_corners=False)


def pod_terms(
    teacher_features: Sequence[Tensor],
    student_features: Sequence[Tensor],
    options: PodOptions,
    masks: Sequence[Tensor | None] | None = None,
    labels: Tensor | None = None,
    num_old: int | None = None,
) -> list[Tensor | None]:
    """One distillation loss per tap, its factor included, neither averaged over taps nor scheduled.

    Args:
        teacher_features: taps of the frozen model, each (B, c, h, w); the last may have fewer channels.
        student_features: the same taps of the model in training.
        options: what to compare and how.
        masks: per tap a mask as in `pod_distance`, or None.
        labels: (B, H, W), needed by background masks, adaptive factors and `interpolate_last`.
        num_old: number of old classes, needed by background masks and adaptive factors.

    Returns:
        A list as long as the taps: a scalar, or None where `--pod_apply` leaves the tap out.

    Reference: PLOP, eq. 6; per image the norm, then the mean over images.
    """
    last = len(student_features) - 1
    terms: list[Tensor | None] = []
    for index, (teacher, student) in enumerate(zip(teacher_features, student_features, strict=True)):
        if not options.applies(index, last):
            terms.append(None)
            continue
        tap = options.tap(index, last)
        mask = None if masks is None else masks[index]
        terms.append(_pod_term(teacher, student, mask, tap, options.at(index, last), labels, num_old))
    return terms


def _pod_term(
    teacher: Tensor,
    student: Tensor,
    mask: Tensor | None,
    tap: TapOptions,
    place: TapPlace,
    labels: Tensor | None,
    num_old: int | None,
) -> Tensor:
    """One entry of `pod_terms`."""
    teacher, student = full(teacher), full(student)
    if teacher.shape[1] != student.shape[1]:
        student = fold_extra_channels(student, teacher.shape[1], tap.extra_channels)
    factor = tap.factor
    if place.background_mask or tap.use_adaptative_factor:
        assert labels is not None and num_old is not None, "background masks and adaptive factors need labels"
        old = (labels < num_old)[:, None].to(student.dtype)  # (B, 1, H, W)
    if place.background_mask:
        teacher, student, mask = _background_only(teacher, student, mask, old, place.downscale)
        factor = factor if place.factor is None else place.factor
    elif place.interpolate:
        assert labels is not None, "interpolate_last needs labels"
        size = labels.shape[-2:]
        teacher, student = _enlarged(teacher, size), _enlarged(student, size)
        mask = None if mask is None else F.interpolate(mask, size=size)
    distance = embedding_distance(teacher, student, tap, mask)
    if tap.use_adaptative_factor:
        distance = distance * old.mean((1, 2, 3))
    return factor * distance.mean()


def pod_loss(terms: Sequence[Tensor | None], schedule: float = 1.0) -> Tensor:
    """PLOP's loss from `pod_terms`.

    Args:
        terms: None for taps that are left out.
        schedule: growing factor, sqrt(C / C_new) in PLOP.

    Returns:
        Scalar: the mean over the taps in use, times the schedule.
    """
    return torch.stack([term for term in terms if term is not None]).mean() * schedule
