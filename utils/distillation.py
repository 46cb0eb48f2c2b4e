"""Distillation of outputs: losses between the logits of student and teacher.

In all functions the student's logits are (B, C, H, W), the teacher's (B, C_old, H, W), and background is channel 0 of both. A loss is
returned per pixel (B, H, W) with reduction="none", or as its mean over pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.runtime.amp import at_least_float32
from utils.types import IGNORE


def reduce(loss: Tensor, reduction: str = "mean") -> Tensor:
    """Reduce a loss.

    Args:
        loss: of any shape.
        reduction: `none` returns the loss, `mean` its mean, `sum` its sum.
    """
    if reduction == "none":
        return loss
    assert reduction in ("mean", "sum"), reduction
    return loss.mean() if reduction == "mean" else loss.sum()


def _masked(loss: Tensor, mask: Tensor | None) -> Tensor:
    """Zero outside the mask; the mean that follows still divides by all pixels, as released."""
    return loss if mask is None else loss * mask.to(loss.dtype)


def knowledge_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    alpha: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """KD of LwF: cross entropy between softmaxes over the old classes, averaged over classes.

    Args:
        student_logits: (B, C, H, W); only the first C_old channels are used.
        teacher_logits: (B, C_old, H, W).
        alpha: multiplies the teacher's logits, so the inverse of a temperature.
        mask: (B, H, W), pixels that count (`--kd_mask`), or None for all.
        reduction: `mean`, `sum`, `none`.

    Returns:
        Scalar, or (B, H, W) for `none`.

    Reference: Li & Hoiem, "Learning without Forgetting", TPAMI 2018; as released, the sum over classes is divided by
        their number.
    """
    student_logits, teacher_logits = at_least_float32(student_logits), at_least_float32(teacher_logits)
    log_probabilities = student_logits[:, : teacher_logits.shape[1]].log_softmax(1)
    loss = -((alpha * teacher_logits).softmax(1) * log_probabilities).mean(1)
    return reduce(_masked(loss, mask), reduction)


def unbiased_knowledge_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    alpha: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Unbiased KD of MiB: the student's background is the background together with all new classes.

    Args:
        student_logits: (B, C, H, W).
        teacher_logits: (B, C_old, H, W).
        alpha: multiplies the teacher's logits.
        mask: (B, H, W), pixels that count, or None for all.
        reduction: `mean`, `sum`, `none`.

    Returns:
        Scalar, or (B, H, W) for `none`: −(1/C_old) Σ_c q_c log p_c.

    Reference: Cermelli et al., "Modeling the Background for Incremental Learning in Semantic Segmentation", CVPR 2020,
        eq. 8.
    """
    student_logits, teacher_logits = at_least_float32(student_logits), at_least_float32(teacher_logits)
    num_old = teacher_logits.shape[1]
    target = (alpha * teacher_logits).softmax(1)
    # A split instead of slices: its gradient is one tensor, whereas the gradient of each slice is a map of zeros of full size
    first, old, new = student_logits.split([1, num_old - 1, student_logits.shape[1] - num_old], dim=1)
    background = torch.cat([first, new], dim=1).logsumexp(1)
    total = torch.logaddexp(background, old.logsumexp(1)) if num_old > 1 else background
    # Σ_c q_c log p_c with Σ_c q_c = 1: the log-partition is subtracted once, not from every channel
    expected = target[:, 0] * background + (target[:, 1:] * old).sum(1)
    return reduce(_masked((total - expected) / num_old, mask), reduction)


def excluded_knowledge_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    new_class: str = "sum",
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """KD over the old classes and one additional channel for "a new class". Where the label is a new class, the teacher's logits of
    background and of the additional channel are both 0, because the teacher predicts a new object as background.

    Args:
        student_logits: (B, C, H, W).
        teacher_logits: (B, C_old, H, W).
        labels: (B, H, W); `IGNORE` pixels give 0.
        new_class: the student's logit of the additional channel: `sum` of the logits of all new classes (`--exkd_sum`), or `gt`,
            the logit of the labelled new class (`--exkd_gt`); pixels of old classes then have no additional channel.
        mask: (B, H, W), pixels that count, or None for all.
        reduction: `mean`, `sum`, `none`.

    Returns:
        Scalar, or (B, H, W) for `none`; a sum over classes, not divided by their number.

    Raises:
        ValueError: another `new_class`.

    Reference: ExcludedKnowledgeDistillation in PLOP's release; no paper describes it. `sum` is tested against numbers of that
        program; the treatment of old pixels under `gt` is defined here.
    """
    if new_class not in ("sum", "gt"):
        raise ValueError(f"Excluded distillation knows 'sum' and 'gt' (--exkd_sum, --exkd_gt), not {new_class!r}.")
    student_logits, teacher_logits = at_least_float32(student_logits), at_least_float32(teacher_logits)
    num_old = teacher_logits.shape[1]
    old, valid = (labels < num_old)[:, None], labels != IGNORE  # (B, 1, H, W), (B, H, W)
    zero = torch.zeros_like(teacher_logits[:, :1])
    background = torch.where(old, teacher_logits[:, :1], zero)
    teacher_slot, student_slot = zero, student_logits[:, num_old:].sum(1, keepdim=True)
    if new_class == "gt":
        index = labels.clamp(0, student_logits.shape[1] - 1).long()[:, None]
        # The most negative finite logit gives probability 0 without the NaN of 0·(−inf)
        absent = torch.full_like(zero, torch.finfo(zero.dtype).min / 4)
        teacher_slot = torch.where(old, absent, zero)
        student_slot = torch.where(old, absent, student_logits.gather(1, index))
    target = torch.cat([background, teacher_logits[:, 1:], teacher_slot], dim=1).softmax(1)
    log_probabilities = torch.cat([student_logits[:, :num_old], student_slot], dim=1).log_softmax(1)
    loss = -(target * log_probabilities).sum(1)
    return reduce(_masked(loss, valid if mask is None else valid & mask.bool()), reduction)


def sigmoid_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    alpha: float = 1.0,
    shape: str = "trim",
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Binary cross entropy between the student's and the teacher's sigmoids (`--kd_bce_sig`).

    Args:
        student_logits: (B, C, H, W).
        teacher_logits: (B, C_old, H, W).
        alpha: multiplies the teacher's logits.
        shape: `trim` removes the student's new classes; `sum` replaces the background's logit by the sum of their logits
            (`--kd_bce_sig_shape`).
        mask: (B, H, W), pixels that count, or None for all.
        reduction: `mean`, `sum`, `none`.

    Returns:
        Scalar, or (B, H, W) for `none`: the mean over old classes.

    Raises:
        ValueError: another `shape`.
    """
    if shape not in ("trim", "sum"):
        raise ValueError(f"--kd_bce_sig_shape {shape!r} is unknown; use 'trim' or 'sum'.")
    student_logits, teacher_logits = at_least_float32(student_logits), at_least_float32(teacher_logits)
    num_old = teacher_logits.shape[1]
    logits = student_logits[:, :num_old]
    if shape == "sum" and student_logits.shape[1] > num_old:
        logits = torch.cat([student_logits[:, num_old:].sum(1, keepdim=True), logits[:, 1:]], dim=1)
    target = (alpha * teacher_logits).sigmoid()
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
    return reduce(_masked(loss, mask), reduction)


def body_distillation(student_body: Tensor, teacher_body: Tensor) -> Tensor:
    """Mean squared error between the outputs of the two bodies.

    Args:
        student_body: (B, c, h, w).
        teacher_body: (B, c, h, w).

    Returns:
        Scalar.

    Reference: Michieli & Zanuttigh, "Incremental Learning Techniques for Semantic Segmentation", ICCVW 2019, eq. 6.
    """
    return F.mse_loss(at_least_float32(student_body), at_least_float32(teacher_body))


def icarl_disjoint(
    student_logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor,
    background_from_labels: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """iCaRL's loss as one binary cross entropy: the teacher's sigmoids on old classes, labels on new ones.

    Args:
        student_logits: (B, C, H, W).
        labels: (B, H, W); `IGNORE` pixels have no positive new class.
        teacher_logits: (B, C_old, H, W).
        background_from_labels: takes the background's target from the labels too (`--icarl_bkg`).
        reduction: `mean` over pixels, `sum`, `none`.

    Returns:
        Scalar, or (B, H, W) for `none`; a sum over classes.

    Reference: Rebuffi et al., "iCaRL", CVPR 2017, as extended to segmentation by MiB.
    """
    student_logits, teacher_logits = at_least_float32(student_logits), at_least_float32(teacher_logits)
    target = one_hot(labels, student_logits)
    first = 1 if background_from_labels else 0
    target[:, first : teacher_logits.shape[1]] = teacher_logits[:, first:].sigmoid()
    return reduce(F.binary_cross_entropy_with_logits(student_logits, target, reduction="none").sum(1), reduction)


def icarl_combined(student_logits: Tensor, teacher_logits: Tensor, reduction: str = "mean") -> Tensor:
    """iCaRL's distillation alone, to be added to a classification loss: BCE of old classes with the teacher's sigmoids.

    Args:
        student_logits: (B, C, H, W).
        teacher_logits: (B, C_old, H, W).
        reduction: `mean` over pixels, `sum`, `none`.

    Returns:
        Scalar, or (B, H, W) for `none`; a sum over old classes.
    """
    student_logits, teacher_logits = at_least_float32(student_logits), at_least_float32(teacher_logits)
    logits = student_logits[:, : teacher_logits.shape[1]]
    loss = F.binary_cross_entropy_with_logits(logits, teacher_logits.sigmoid(), reduction="none")
    return reduce(loss.sum(1), reduction)


def one_hot(labels: Tensor, logits: Tensor) -> Tensor:
    """Labels as zeros and ones.

    Args:
        labels: (B, H, W), 0..C−1 or `IGNORE`.
        logits: (B, C, H, W), gives shape and type.

    Returns:
        (B, C, H, W), 0 in all channels of `IGNORE` pixels.
    """
    target = torch.zeros_like(logits)
    valid = (labels != IGNORE)[:, None]
    index = labels.masked_fill(labels == IGNORE, 0).long()[:, None]
    return target.scatter_(1, index, valid.to(target.dtype))


def distillation_mask(labels: Tensor, num_old: int, where: str | None) -> Tensor | None:
    """`--kd_mask`: pixels that the distillation of outputs uses.

    Args:
        labels: (B, H, W).
        num_old: number of old classes.
        where: `oldbackground` (label below num_old), `new` (the rest, `IGNORE` left out), or None.

    Returns:
        (B, H, W) bool, or None for all pixels.

    Raises:
        ValueError: another `where`.
    """
    if where is None:
        return None
    if where not in ("oldbackground", "new"):
        raise ValueError(f"--kd_mask {where!r} is unknown; use 'oldbackground' or 'new'.")
    return labels < num_old if where == "oldbackground" else (labels >= num_old) & (labels != IGNORE)


def adaptive_distillation(loss: Tensor, mask: Tensor) -> Tensor:
    """`--kd_mask_adaptative_factor`: each image's mean times the share of its pixels in the mask, averaged.

    Args:
        loss: (B, H, W), already masked.
        mask: (B, H, W).

    Returns:
        Scalar.
    """
    return (loss.mean((1, 2)) * mask.to(loss.dtype).mean((1, 2))).mean()


def soften(logits: Tensor, labels: Tensor, num_old: int, temperature: float, apply: str | None) -> Tensor:
    """Logits divided by a temperature on some pixels (`--temperature`, `--temperature_apply`).

    Args:
        logits: (B, c, H, W) of student or teacher; the same is done to both.
        labels: (B, H, W).
        num_old: number of old classes.
        temperature: above 1 for softer probabilities.
        apply: `all` pixels, those labelled `old` or `new`, or None for no pixel.

    Returns:
        (B, c, H, W).

    Raises:
        ValueError: another `apply`.
    """
    if apply is None or temperature == 1.0:
        return logits
    if apply not in ("all", "old", "new"):
        raise ValueError(f"--temperature_apply {apply!r} is unknown; use 'all', 'old' or 'new'.")
    if apply == "all":
        return at_least_float32(logits) / temperature
    softened = distillation_mask(labels, num_old, "oldbackground" if apply == "old" else "new")
    assert softened is not None
    return torch.where(softened[:, None], at_least_float32(logits) / temperature, at_least_float32(logits))


def soften_semi_old(logits: Tensor, num_initial: int, num_old: int, temperature: float) -> Tensor:
    """Divide the logits of classes learned after step 0 and before this step by a temperature (`--temperature_semiold`).

    Args:
        logits: (B, c, H, W) with c ≥ num_old.
        num_initial: classes of step 0.
        num_old: classes before this step.
        temperature: above 1 for softer probabilities.

    Returns:
        (B, c, H, W).
    """
    if temperature == 1.0 or num_initial >= num_old:
        return logits
    divisor = torch.ones(logits.shape[1], dtype=at_least_float32(logits).dtype, device=logits.device)
    divisor[num_initial:num_old] = temperature
    return at_least_float32(logits) / divisor[:, None, None]
