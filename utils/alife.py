"""ALIFE's losses and its rotations of remembered features.

With z the student's logits (C), q the teacher's probabilities (C_old), Ω_b the pixels labelled background and Ω_n all others:

    ali         mean over Ω_b of log Σ_k exp z_k − Σ_{k<C_old} q_k z_k
    kd          mean over Ω_n of −(1/C_old) Σ_{k<C_old} q_k log softmax(z_0 … z_{C_old−1})_k
    rotation    R = (I − S)(I + S)⁻¹ with a skew-symmetric S: orthogonal for all values of its parameters

Reference: Oh et al., "ALIFE: Adaptive Logit Regularizer and Feature Replay for Incremental Semantic Segmentation", NeurIPS 2022.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.runtime.amp import at_least_float32
from utils.types import IGNORE


def adaptive_logit_regulariser(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """ALI: raises the logits of old classes on background pixels in proportion to the teacher's probabilities.

    Args:
        student_logits: (B, C, H, W).
        teacher_logits: (B, C_old, H, W).
        labels: (B, H, W).

    Returns:
        Scalar, the mean over the pixels of the whole batch that are labelled background; 0 without any (the release has NaN).

    Reference: eq. 5; the old logits are the student's first C_old channels, and the background is not merged with the new classes.
    """
    z, q = at_least_float32(student_logits), at_least_float32(teacher_logits).softmax(1)
    value = z.logsumexp(1) - (q * z[:, : q.shape[1]]).sum(1)  # (B, H, W)
    return _mean_where(value, labels == 0)


def foreground_distillation(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, with_ignored: bool = True
) -> Tensor:
    """Distillation of the old classes on the pixels that are not labelled background.

    Args:
        student_logits: (B, C, H, W).
        teacher_logits: (B, C_old, H, W).
        labels: (B, H, W).
        with_ignored: ignored pixels count, as in the release.

    Returns:
        Scalar, the mean over these pixels of the whole batch; 0 without any (the release has NaN).
    """
    q = at_least_float32(teacher_logits).softmax(1)
    log_p = at_least_float32(student_logits)[:, : q.shape[1]].log_softmax(1)
    chosen = labels != 0 if with_ignored else (labels != 0) & (labels != IGNORE)
    return _mean_where(-(q * log_p).mean(1), chosen)


def _mean_where(value: Tensor, chosen: Tensor) -> Tensor:
    """Mean of the chosen pixels, 0 if there are none."""
    return torch.where(chosen, value, 0.0).sum() / chosen.sum().clamp(min=1)


# ------------------------------------------------------------------ features and their rotation


def mean_feature(features: Tensor, mask: Tensor) -> Tensor:
    """Mean over the pixels of a mask of features that are interpolated (bilinear, aligned corners) to the size of the image.

    The mean is linear in the features. The mask is therefore reduced to their size, and no enlarged features are computed.

    Args:
        features: (D, h, w).
        mask: (H, W) bool with at least one pixel.

    Returns:
        (D,).
    """
    rows, columns = (_enlargement(small, large, features) for small, large in zip(features.shape[1:], mask.shape))
    weights = rows @ mask.to(features.dtype) @ columns.T  # (h, w)
    return (features * (weights / mask.sum())).sum((1, 2))


def _enlargement(small: int, large: int, like: Tensor) -> Tensor:
    """(small, large) coefficients of a linear interpolation with aligned corners."""
    identity = torch.eye(small, dtype=like.dtype, device=like.device)[None]
    return F.interpolate(identity, size=large, mode="linear", align_corners=True)[0]


def rotations(parameters: Tensor, size: int) -> Tensor:
    """Orthogonal matrices, one for each class.

    Args:
        parameters: (C, D(D−1)/2), the part above the diagonal of B, row by row; S = ½(B − Bᵀ).
        size: D.

    Returns:
        (C, D, D), (I − S)(I + S)⁻¹. I + S is never singular.
    """
    rows, columns = torch.triu_indices(size, size, offset=1, device=parameters.device)
    upper = parameters.new_zeros(len(parameters), size, size).index_put(
        (torch.arange(len(parameters), device=parameters.device)[:, None], rows, columns), parameters
    )
    skew = (upper - upper.transpose(1, 2)) / 2
    identity = torch.eye(size, dtype=parameters.dtype, device=parameters.device)
    return torch.linalg.solve(identity + skew, identity - skew)  # the two factors commute


def positions_of(features: Tensor) -> Tensor:
    """(B, D, h, w) -> (B·h·w, D)."""
    return features.movedim(1, 3).flatten(0, 2)


def attention(memory: Tensor, features: Tensor, temperature: float) -> Tensor:
    """Similarity of each position to the remembered features of each class, normalised over the positions.

    Args:
        memory: (C, M, D).
        features: (N, D), of all positions of a batch.
        temperature: τ, multiplies the similarities before the soft-max over positions.

    Returns:
        (C, N), each row sums to 1.
    """
    directions = F.normalize(features, dim=1)
    similar = [(F.normalize(vectors, dim=1) @ directions.T).clamp(min=0).sum(0) for vectors in memory]  # C × (N,)
    return (temperature * torch.stack(similar)).softmax(1)


def representations(memory: Tensor, before: Tensor, after: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean feature of each class in a batch, weighted by `attention`, for two networks.

    Args:
        memory: (C, M, D), features of the network before.
        before, after: (N, D) features of the same positions.
        temperature: as in `attention`.

    Returns:
        p̃ and p̃' (C, D), without their means over classes, and the mean o' (D,) of p'.
    """
    weights = attention(memory, before, temperature)  # (C, N)
    p, p_after = weights @ before, weights @ after
    mean = p_after.mean(0)
    return p - p.mean(0), p_after - mean, mean
