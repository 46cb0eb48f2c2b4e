"""UCD's contrastive distillation: makes features of positions with the same label similar, weighted by the teacher's certainty.

The matrix of all pairs of positions is not stored: `contrastive_distillation` computes blocks of its rows, and the gradient of a block
with its value. With n anchors, m contrasts (m ≤ 2n) of D channels, and C_old classes, `memory` returns the number of values in memory at
a time. The whole matrix has n·m values, and several matrices of its size would be needed. 24 images of 512 px at stride 16 have n ≤ 24576.

Reference: Yang et al., "Uncertainty-aware Contrastive Distillation for Incremental Semantic Segmentation" (UCD), TPAMI 2022.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from utils.latent_space import at_size
from utils.runtime.amp import at_least_float32
from utils.runtime.gate import asynchronous
from utils.types import IGNORE

#: τ, divides the cosines.
TEMPERATURE = 0.07
#: Greatest label that the release counts as a class: VOC's last one.
LAST_OF_VOC = 20
#: Greatest number of pairs in a block of rows; a matrix of them has 16 MiB in float32.
BLOCK = 2**22
#: Similarity of a contrast that does not count: below every other, and finite, so that 0 times it is 0.
_ABSENT = -1e6
#: Added to averaged labels before they are truncated; rounding may leave an average of equal labels slightly too small.
_ROUNDING = 1e-6


def memory(anchors: int, contrasts: int, channels: int, classes: int, block: int = BLOCK) -> int:
    """Greatest number of values that the pairs and their comparison keep in memory, without the features and logits of the networks.

    Args:
        anchors, contrasts: n and m.
        channels: D.
        classes: C_old.
        block: as for `contrastive_distillation`.
    """
    vectors = (anchors + contrasts) * channels + 2 * contrasts * classes
    return vectors + 3 * anchors * channels + 9 * min(block, anchors * contrasts)


def given_labels(labels: Tensor, size: torch.Size, last: int = LAST_OF_VOC, nearest: bool = False) -> Tensor:
    """The annotation at the size of the features; 0 where it has no class.

    Args:
        labels: (B, H, W).
        size: h, w.
        last: the greatest label that counts; greater ones become 0.
        nearest: the label of one pixel is taken, and 255 becomes 0. In the release labels are interpolated (bilinear), 255 included, and
            truncated to integers, so borders between classes get the labels of other classes.

    Returns:
        (B, h, w) int64.
    """
    if nearest:
        small = at_size(labels, size)
        return small.masked_fill(small == IGNORE, 0)
    averaged = F.interpolate(labels[:, None].double(), size=size, mode="bilinear", align_corners=False)[:, 0]
    small = (averaged + _ROUNDING).long()
    return small.masked_fill(small > last, 0)


class Pairs(NamedTuple):
    """Anchors, and the contrasts that each of them is compared with; the first n contrasts are the anchors.

    Attributes:
        anchors: (n, D) of length 1, of the student, with gradient.
        contrasts: (m, D) of length 1, constants: the anchors, then the teacher's features where the teacher gave the label.
        labels: (m,) of the contrasts, those of the anchors first; 0 where `masked` leaves a position out.
        probabilities: (m, C_old) the teacher's at each contrast's position.
        first_new: 0-d, the smallest label of the annotation.
        masked: whether there are anchors and contrasts that do not count.
    """

    anchors: Tensor
    contrasts: Tensor
    labels: Tensor
    probabilities: Tensor
    first_new: Tensor
    masked: bool = False


def make_pairs(student: Tensor, teacher: Tensor, teacher_logits: Tensor, given: Tensor) -> Pairs | None:
    """The pairs of a batch.

    How many there are is known to the host only if it waits for the device. On CUDA all positions are therefore anchors and all of them
    contrasts twice, and those that do not count are masked.

    Args:
        student, teacher: (B, D, h, w) features before the classifiers.
        teacher_logits: (B, C_old, h, w) small logits; they label the positions without annotation.
        given: (B, h, w) of `given_labels`.

    Returns:
        The pairs, positions in row-major order; None, or none that counts, without any annotated position, where the release stops with
        an error.
    """
    annotated = given > 0
    masked = asynchronous(given.device)
    if not masked and not bool(annotated.any()):
        return None
    student, teacher, teacher_logits = (
        at_least_float32(maps).movedim(1, -1) for maps in (student, teacher, teacher_logits)
    )  # (B, h, w, …)
    labels = torch.where(annotated, given, teacher_logits.argmax(-1))
    if masked:
        labels = torch.where(annotated.any(), labels, 0)
    kept = labels > 0
    twins = kept & ~annotated

    def rows(maps: Tensor, chosen: Tensor) -> Tensor:
        return maps.flatten(0, 2) if masked else maps[chosen]

    anchors = F.normalize(rows(student, kept), dim=1)
    contrasts = torch.cat([anchors.detach(), F.normalize(rows(teacher, twins), dim=1)])
    probabilities = torch.cat([rows(teacher_logits, kept), rows(teacher_logits, twins)]).softmax(1)
    first_new = torch.where(annotated, given, IGNORE).amin()
    joined = torch.cat([rows(labels, kept), rows(torch.where(twins, labels, 0), twins)])
    return Pairs(anchors, contrasts, joined, probabilities, first_new, masked)


def joint_probability(pairs: Pairs, rows: slice) -> Tensor:
    """Probability that anchor and contrast have the same class: the scalar product of the teacher's probabilities, 1 if both are new.

    Args:
        pairs: of `make_pairs`.
        rows: of the anchors.

    Returns:
        (b, m).
    """
    new = pairs.labels >= pairs.first_new
    product = pairs.probabilities[rows] @ pairs.probabilities.T
    return product.masked_fill_(new[rows, None] & new, 1)


def contrastive_distillation(
    pairs: Pairs | None, temperature: float = TEMPERATURE, mended: bool = False, block: int = BLOCK
) -> Tensor | float:
    """UCD's contrastive loss.

    With s_ij = a_i·c_j/τ, positives j of anchor i those of its label but itself, negatives those of another label, M_i = max_j s_ij and
    P of `joint_probability`:

        ℓ_ij = (s_ij − M_i) − ln(exp(s_ij − M_i) + Σ_negatives exp(s_ik)),    mean over anchors of −mean over positives of P_ij ℓ_ij

    Args:
        pairs: of `make_pairs`; None gives 0.
        temperature: τ.
        mended: the negatives are shifted by M_i like the positive. In the release they are not, which multiplies them by e^(1/τ).
        block: greatest number of pairs that are compared at once.

    Returns:
        Scalar, without its factor; anchors without a positive do not count, and 0 where no anchor has one (released: NaN). Only the
        anchors get a gradient.
    """
    if pairs is None:
        return 0.0
    value: Tensor = _Contrastive.apply(pairs.anchors, pairs, temperature, mended, block)
    return value


class _Contrastive(torch.autograd.Function):
    """The mean of `_block` over all anchors, whose gradient is computed with the value."""

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, pairs: Pairs, temperature: float, mended: bool, block: int) -> Tensor:
        with torch.autocast(anchors.device.type, enabled=False):
            total, counted = anchors.new_zeros(()), anchors.new_zeros(())
            gradient = torch.empty_like(anchors)
            for rows in _rows(len(anchors), len(pairs.contrasts), block):
                similarities = anchors[rows] @ pairs.contrasts.T / temperature  # (b, m)
                values, positive, slopes = _block(similarities, pairs, rows, mended)
                total += values.sum()
                counted += positive.sum()
                gradient[rows] = slopes @ pairs.contrasts / temperature
        counted = counted.clamp(min=1)
        ctx.save_for_backward(gradient.div_(counted))
        return total / counted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output, None, None, None, None


def _rows(count: int, columns: int, block: int) -> Iterator[slice]:
    """Blocks of the rows of a matrix."""
    step = max(1, block // max(1, columns))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _block(similarities: Tensor, pairs: Pairs, rows: slice, mended: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Values of the anchors of a block, which of them have a positive, and the gradient by the similarities.

    With N_i the negatives' sum and t_ij = N_i / (exp(s_ij − M_i) + N_i), the derivative of −mean_j P_ij ℓ_ij is −P_ij t_ij / (number of
    positives) for a positive, and the negatives share Σ_j P_ij t_ij / (number of positives) like a softmax.

    Returns:
        (b,), (b,) bool, (b, m).
    """
    same = pairs.labels[rows, None] == pairs.labels  # (b, m)
    if pairs.masked:
        absent = pairs.labels == 0
        similarities.masked_fill_(absent, _ABSENT)
        negatives = similarities.masked_fill(same | absent, -torch.inf)
        same &= ~absent  # then an anchor that does not count has no positive
    else:
        negatives = similarities.masked_fill(same, -torch.inf)
    logarithm = negatives.logsumexp(1, keepdim=True)  # ln Σ exp(s_ik), −inf without a negative
    some = logarithm > -torch.inf
    share = (negatives - torch.where(some, logarithm, 0.0)).exp_()  # the negatives' softmax; 0 for the others
    same[:, rows.start : rows.stop].fill_diagonal_(False)  # an anchor and itself
    number = same.sum(1, keepdim=True)
    largest = similarities.amax(1, keepdim=True)
    shifted = similarities.sub_(largest)
    if mended:
        logarithm = logarithm - largest
    below = torch.logaddexp(shifted, logarithm)  # ln of the denominator
    joint = joint_probability(pairs, rows).mul_(same).div_(number.clamp(min=1))  # 0 where j is no positive
    values = -(joint * (shifted - below)).sum(1)
    joint.mul_((logarithm - below).exp_())
    return values, number[:, 0] > 0, share.mul_(joint.sum(1, keepdim=True)).sub_(joint)
