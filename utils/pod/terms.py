"""The POD terms of a forward pass: the taps of teacher and student are brought to equal shapes and compared.

Reference:
    Douillard et al., "PLOP: Learning without Forgetting for Continual Semantic Segmentation", CVPR 2021, eq. 3-6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from utils import loss
from utils.pod.options import PodOptions, TapOptions, TapPlace
from utils.runtime.amp import at_least_float32


def fold_extra_channels(student: Tensor, num_old: int, how: str = "sum") -> Tensor:
    """The student's (B, C, h, w) logits with the num_old channels of the teacher.

    Args:
        student: (B, C, h, w) with C ≥ num_old.
        num_old: channels of the teacher.
        how: `sum` adds the logits of new classes to that of the background, `trim` removes them.

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


class AlignedTap(NamedTuple):
    """One tap of teacher and student, ready to be compared.

    Attributes:
        teacher: (B, c, h, w).
        student: (B, c, h, w).
        mask: multiplies both, broadcastable to (B, c, h, w), or None.
        image_weights: (B,) factor of each image's distance, or None.
        factor: of the term.
    """

    teacher: Tensor
    student: Tensor
    mask: Tensor | None
    image_weights: Tensor | None
    factor: float


def _background_only(
    teacher: Tensor, student: Tensor, mask: Tensor | None, old: Tensor, downscale: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Both taps and a mask that keeps old pixels, at one size (`--pod_deeplab_mask`).

    With `downscale` the mask is resized to the tap. Otherwise the maximum over the channels of each tap is resized to the labels;
    all channels at this size would not fit into memory.
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


def align_tap(
    teacher: Tensor,
    student: Tensor,
    mask: Tensor | None,
    tap: TapOptions,
    place: TapPlace,
    labels: Tensor | None = None,
    num_old: int | None = None,
) -> AlignedTap:
    """Bring one tap of teacher and student to the same channels and size, as `--pod_options` and related flags define.

    Args:
        teacher: (B, c, h, w) of the frozen model; small logits have one channel for each old class.
        student: (B, C, h, w) of the model in training.
        mask: as in `utils.loss.mask_guided_distillation`, or None.
        tap: options of this tap.
        place: settings for the position of the tap.
        labels: (B, H, W), needed by background masks, adaptive factors and `interpolate_last`.
        num_old: number of old classes, needed by background masks and adaptive factors.

    Returns:
        The tap; half precision is widened.
    """
    teacher, student = at_least_float32(teacher), at_least_float32(student)
    if teacher.shape[1] != student.shape[1]:
        student = fold_extra_channels(student, teacher.shape[1], tap.extra_channels)
    factor, image_weights = tap.factor, None
    if place.background_mask or tap.use_adaptative_factor:
        assert labels is not None and num_old is not None, "background masks and adaptive factors need labels"
        old = (labels < num_old)[:, None].to(student.dtype)  # (B, 1, H, W)
        if tap.use_adaptative_factor:
            image_weights = old.mean((1, 2, 3))  # (B,)
        if place.background_mask:
            teacher, student, mask = _background_only(teacher, student, mask, old, place.downscale)
            factor = factor if place.factor is None else place.factor
    if place.interpolate and not place.background_mask:
        assert labels is not None, "interpolate_last needs labels"
        size = labels.shape[-2:]
        teacher, student = _enlarged(teacher, size), _enlarged(student, size)
        mask = None if mask is None else F.interpolate(mask, size=size)
    return AlignedTap(teacher, student, mask, image_weights, factor)


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
        masks: per tap a mask as in `utils.loss.mask_guided_distillation`, or None.
        labels: as in `align_tap`.
        num_old: as in `align_tap`.

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
        mask = None if masks is None else masks[index]
        tap = options.tap(index, last)
        pair = align_tap(teacher, student, mask, tap, options.at(index, last), labels, num_old)
        distance = loss.mask_guided_distillation(pair.teacher, pair.student, pair.mask, tap, pair.image_weights)
        terms.append(pair.factor * distance)
    return terms


def pod_loss(terms: Sequence[Tensor | None], schedule: float = 1.0) -> Tensor:
    """PLOP's loss from `pod_terms`.

    Args:
        terms: None for taps that are left out.
        schedule: factor that grows with the steps, sqrt(C / C_new) in PLOP.

    Returns:
        Scalar: the mean over the taps in use, times the schedule.
    """
    return torch.stack([term for term in terms if term is not None]).mean() * schedule
