"""The losses of the articles, as pure functions: tensors in, tensors out, no options of the command line.

First LSKD's two distillations of features, mask-guided distillation (MD) and mask-guided context distillation (MCD). Then the
classification losses, per pixel, in which `IGNORE` pixels give 0. Distillation of outputs is in utils/distillation.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.distillation import one_hot
from utils.errors import UserError
from utils.pod.embedding import embedding_distance
from utils.pod.options import TapOptions
from utils.pseudo import entropy
from utils.runtime.amp import at_least_float32
from utils.types import IGNORE

#: PLOP's local POD of squared features at the scales 1, 2, 4.
LOCAL_POD = TapOptions()


def mask_guided_distillation(
    teacher: Tensor,
    student: Tensor,
    mask: Tensor | None = None,
    tap: TapOptions = LOCAL_POD,
    image_weights: Tensor | None = None,
) -> Tensor:
    """LSKD's mask-guided distillation (MD) of one tap: local POD of masked features. Without a mask it is PLOP's local POD.

    The teacher's tap a and the student's tap b are both multiplied by the mask M. The value is the mean over images of
    ‖pod((a·M)²) − pod((b·M)²)‖, where pod concatenates the row means and column means of every cell of every scale.

    Args:
        teacher: (B, c, h, w), tap of the frozen teacher, a constant.
        student: (B, c, h, w); the gradient is finite (zero) where it equals the teacher.
        mask: (B, 1 or c, h, w) from `utils.masks.tap_mask`, or None.
        tap: scales, preprocessing and difference; local POD with the scales 1, 2, 4 by default. Its factor is not applied.
        image_weights: (B,) factor of each image's distance, or None.

    Returns:
        Scalar.

    Reference: LSKD, IEEE TIP 2024, mask-guided distillation; PLOP, CVPR 2021, eq. 4-6, for the pooling.
    """
    distance = embedding_distance(teacher, student, tap, mask)  # (B,)
    if image_weights is not None:
        distance = distance * image_weights
    return distance.mean()


def context_distillation(teacher: Tensor, student: Tensor, groups: int, mask: Tensor | None = None) -> Tensor:
    """LSKD's mask-guided context distillation (MCD) of pre_logits: `context_distance` of the masked features.

    Args:
        teacher: (B, c, h, w), pre_logits of the frozen teacher.
        student: (B, c, h, w).
        groups: number of channel groups (`--mmm`).
        mask: from `utils.masks.tap_mask`, or None.

    Returns:
        Scalar, mean over images; `--aaaaaa` is not included.

    Reference: LSKD, IEEE TIP 2024, mask-guided context distillation.
    """
    if mask is not None:
        teacher, student = at_least_float32(teacher) * mask, at_least_float32(student) * mask
    return context_distance(teacher, student, groups).mean()


def context_distance(teacher: Tensor, student: Tensor, groups: int) -> Tensor:
    """L2 distance per image between second-order pooled features, without outer products.

    The channels are split into `groups` groups of k = c // groups (the last c − k·groups are dropped), each group is
    average-pooled 5×5 with stride 2 and padding 2, and the vector v at every position is replaced by the k×k matrix v vᵀ. The
    norm of the difference of two such matrices is ‖uuᵀ − vvᵀ‖² = ½(‖u+v‖²‖u−v‖² + ⟨u+v, u−v⟩²). This form subtracts no
    nearly equal numbers if the student is close to the teacher.

    Args:
        teacher: (B, c, h, w), already masked.
        student: (B, c, h, w), already masked.
        groups: `--mmm`.

    Returns:
        (B,); its gradient is finite (zero) where the two are equal.

    Raises:
        UserError: groups < 1 or more groups than channels.
    """
    channels = teacher.shape[1]
    if not 1 <= groups <= channels:
        raise UserError(f"--mmm {groups} does not split {channels} channels; use a number from 1 to {channels}.")
    size = channels // groups
    known, change = (
        F.avg_pool2d(features[:, : size * groups], kernel_size=5, stride=2, padding=2).unflatten(1, (groups, size))
        for features in (at_least_float32(teacher), at_least_float32(teacher) - at_least_float32(student))
    )  # (B, g, k, h', w') each; the difference is pooled, not the pooled maps subtracted, so that nothing cancels
    total = 2 * known - change
    lengths = torch.linalg.vector_norm(total, dim=2) * torch.linalg.vector_norm(change, dim=2)  # (B, g, h', w')
    products = (total * change).sum(2)
    return torch.linalg.vector_norm(torch.stack([lengths, products], dim=1).flatten(1), dim=1) / 2**0.5


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy per pixel.

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W), 0..C−1 or `IGNORE`.

    Returns:
        (B, H, W), 0 where ignored.
    """
    return F.cross_entropy(at_least_float32(logits), labels.long(), ignore_index=IGNORE, reduction="none")


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross entropy against the one-hot label, summed over classes.

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W).

    Returns:
        (B, H, W), 0 where ignored.
    """
    logits = at_least_float32(logits)
    loss = F.binary_cross_entropy_with_logits(logits, one_hot(labels, logits), reduction="none").sum(1)
    return loss.masked_fill(labels == IGNORE, 0)


def _focus(loss: Tensor, gamma: float, alpha: float) -> Tensor:
    """Focal weighting of a cross entropy: α(1−p)^γ·loss with p = exp(−loss)."""
    missing = -torch.expm1(-loss)
    return alpha * missing**gamma * loss


def focal(logits: Tensor, labels: Tensor, gamma: float = 2.0, alpha: float = 1.0) -> Tensor:
    """Focal loss per pixel, α(1−p_t)^γ·CE.

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W).
        gamma: focusing exponent.
        alpha: factor.

    Returns:
        (B, H, W), 0 where ignored.

    Reference: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, eq. 4.
    """
    return _focus(cross_entropy(logits, labels), gamma, alpha)


def _merge_old(logits: Tensor, labels: Tensor, num_old: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and labels over {any old class} ∪ new classes: (B, 1 + C_new, H, W) and (B, H, W)."""
    old, new = logits.split([num_old, logits.shape[1] - num_old], dim=1)
    merged = torch.cat([old.logsumexp(1, keepdim=True), new], dim=1).log_softmax(1)
    labels = torch.where(labels == IGNORE, IGNORE, (labels.long() - num_old + 1).clamp(min=0))
    return merged, labels


def unbiased_cross_entropy(logits: Tensor, labels: Tensor, num_old: int, mask: Tensor | None = None) -> Tensor:
    """Unbiased cross entropy of MiB: the background's probability is that of all old classes together.

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W); labels below num_old count as background.
        num_old: number of old classes, background included.
        mask: (B, H, W) bool, pixels to ignore besides `IGNORE` (PLOP's `--ce_on_pseudo`), or None.

    Returns:
        (B, H, W), 0 where ignored.

    Reference: Cermelli et al., MiB, CVPR 2020, eq. 6-7.
    """
    if mask is not None:
        labels = labels.masked_fill(mask, IGNORE)
    merged, labels = _merge_old(at_least_float32(logits), labels, num_old)
    return F.nll_loss(merged, labels, ignore_index=IGNORE, reduction="none")


def unbiased_focal(
    logits: Tensor, labels: Tensor, num_old: int, gamma: float = 2.0, alpha: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """Focal loss on the unbiased cross entropy (`--focal_loss_new`): new classes and one background of all old ones.

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W).
        num_old: number of old classes.
        gamma: focusing exponent.
        alpha: factor.
        mask: as in `unbiased_cross_entropy`.

    Returns:
        (B, H, W), 0 where ignored.
    """
    return _focus(unbiased_cross_entropy(logits, labels, num_old, mask), gamma, alpha)


def _nca(similarities: Tensor, labels: Tensor, margin: Tensor | float) -> Tensor:
    """Per pixel max(0, −log(exp(s_y − margin) / Σ_{c≠y} exp(s_c))), 0 where ignored or where no other class exists."""
    valid = labels != IGNORE
    index = labels.masked_fill(~valid, 0).long()[:, None]  # (B, 1, H, W)
    positive = similarities.gather(1, index)[:, 0] - margin
    # The most negative finite number leaves a class out without the NaN gradients of −inf
    others = similarities.scatter(1, index, torch.finfo(similarities.dtype).min / 4).logsumexp(1)
    return ((others - positive) * valid).clamp(min=0)


def nca(similarities: Tensor, labels: Tensor, scale: Tensor | float = 1.0, margin: float = 0.0) -> Tensor:
    """NCA loss with margin, for the cosine classifier.

    Args:
        similarities: (B, C, H, W) cosines (or what the classifier gives).
        labels: (B, H, W).
        scale: the classifier's factor η, learned or fixed.
        margin: δ, subtracted from the target's cosine.

    Returns:
        (B, H, W): max(0, −log(exp(η(s_y − δ)) / Σ_{c≠y} exp(η s_c))).

    Reference: PODNet, ECCV 2020, eq. 8.
    """
    return _nca(scale * at_least_float32(similarities), labels, scale * margin)


def unbiased_nca(
    similarities: Tensor, labels: Tensor, num_old: int, scale: Tensor | float = 1.0, margin: float = 0.0
) -> Tensor:
    """NCA loss in which all old classes together are the background, as in the unbiased cross entropy.

    Args:
        similarities: (B, C, H, W).
        labels: (B, H, W); labels below num_old count as background.
        num_old: number of old classes.
        scale: factor η.
        margin: δ, subtracted from the target's value.

    Returns:
        (B, H, W).
    """
    merged, labels = _merge_old(scale * at_least_float32(similarities), labels, num_old)
    return _nca(merged, labels, scale * margin)


def soft_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor,
    certain: Tensor,
    factor: float = 1.0,
    mended: bool = False,
) -> Tensor:
    """Cross entropy on certain pixels, a loss with the teacher's soft labels on the others (`--pseudo_soft`).

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W) after pseudo-labelling.
        teacher_logits: (B, C_old, H, W).
        certain: (B, H, W) bool; for `soft_certain` the pixels labelled new, for `soft_uncertain` those and the old
            pixels with a valid pseudo-label.
        factor: of the soft part (`--pseudo_soft_factor`).
        mended: the soft part as a cross entropy, −Σ q_teacher log p. The release computes +Σ p log q_teacher, with the two
            exchanged and without the minus sign, so that minimising it moves the student away from the teacher.

    Returns:
        (B, H, W); p is the student's softmax over its first C_old logits.
    """
    logits, teacher_logits = at_least_float32(logits), at_least_float32(teacher_logits)
    hard = cross_entropy(logits, labels)
    old_logits = logits[:, : teacher_logits.shape[1]]
    if mended:
        soft = -(teacher_logits.softmax(1) * old_logits.log_softmax(1)).sum(1)
    else:
        soft = (teacher_logits.log_softmax(1) * old_logits.softmax(1)).sum(1)
    return torch.where(certain, hard, factor * soft)


def entropy_minimisation(logits: Tensor, labels: Tensor, mean_pixels: bool = False) -> Tensor:
    """Mean of `utils.pseudo.entropy` of the student's predictions on background pixels (`--entropy_min`).

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W); label 0 is background, an image without background gives 0.
        mean_pixels: sum over background pixels divided by all pixels, not by the background's
            (`--entropy_min_mean_pixels`).

    Returns:
        Scalar, mean over images.
    """
    logits = at_least_float32(logits)
    background = (labels == 0).to(logits.dtype)
    entropies = entropy(logits.softmax(1)) * background  # (B, H, W)
    if mean_pixels:
        return entropies.mean()
    return (entropies.sum((1, 2)) / background.sum((1, 2)).clamp(min=1)).mean()
