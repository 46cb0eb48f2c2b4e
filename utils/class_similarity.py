"""Class means of features, and the distillation of outputs that is weighted by how similar classes are (REMINDER's CSW-KD)."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.latent_space import label_counts, worth_a_visit
from utils.runtime.amp import at_least_float32
from utils.runtime.gate import asynchronous
from utils.types import IGNORE

#: τ, divides the logits of both networks.
TEMPERATURE = 3.0
#: Added to every weight, so that no class is left out altogether.
FLOOR = 1e-7


@lru_cache(maxsize=64)
def _interpolation(small: int, large: int, dtype: torch.dtype) -> Tensor:
    """(small, large) matrix: row i is what a unit at position i becomes under linear interpolation with align_corners=True."""
    return F.interpolate(torch.eye(small, dtype=dtype)[None], size=large, mode="linear", align_corners=True)[0]


def class_sums(features: Tensor, labels: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Sums over the pixels of each class of features that are interpolated to the size of the labels.

    Bilinear interpolation is linear, so the sum over pixels of the enlarged features is a weighted sum of the small ones; the
    weights are the mask of the class, reduced to the small size by the transposed interpolation. No enlarged map is computed.

    Args:
        features: (B, D, h, w); interpolated with align_corners=True, as REMINDER's release does.
        labels: (B, H, W).
        first, last: the classes first, …, last − 1.

    Returns:
        (K, D) sums and (K,) int64 numbers of pixels, K = last − first; both 0 for a class without a pixel.
    """
    features = at_least_float32(features)
    pixels = label_counts(labels)[first:last]  # (K,)
    sums = features.new_zeros(last - first, features.shape[1])
    with torch.autocast(features.device.type, enabled=False):
        down, across = (
            _interpolation(small, large, features.dtype).to(features.device)
            for small, large in zip(features.shape[2:], labels.shape[1:])
        )  # (h, H), (w, W)
        for row in worth_a_visit(pixels):
            mask = (labels == first + row).to(features.dtype)  # (B, H, W)
            sums[row] = torch.einsum("bdhw,bhw->d", features, down @ mask @ across.T)
    return sums, pixels


def class_means(features: Tensor, labels: Tensor, first: int, last: int) -> Tensor:
    """Means over the pixels of each class of the enlarged features, as `class_sums`; 0 for a class without a pixel.

    Returns:
        (K, D).
    """
    sums, pixels = class_sums(features, labels, first, last)
    return sums / pixels.clamp(min=1)[:, None]


class PrototypeMeans:
    """The prototype of each class: the mean over batches of its mean feature in the batch. Every batch has the same weight.

    Args:
        first, last: the classes first, …, last − 1.
        channels: D, of the features.
        reduce: sums a tensor over the processes, so that a batch is that of all of them; None in one process.

    Attributes:
        values: (K, D) float64 prototypes, 0 for a class without a pixel.

    Reference: REMINDER's release, which counts a batch as one however many pixels of the class it has.
    """

    def __init__(self, first: int, last: int, channels: int, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        self.first, self.last, self.reduce = first, last, reduce
        self.values = torch.zeros(last - first, channels, dtype=torch.float64)
        self.batches = torch.zeros(last - first, 1, dtype=torch.float64)

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            features: (B, D, h, w).
            labels: (B, H, W).
        """
        sums, pixels = class_sums(features, labels, self.first, self.last)
        joined = torch.cat([sums, pixels[:, None]], dim=1).double()  # (K, D+1)
        joined = (joined if self.reduce is None else self.reduce(joined)).to(self.values)
        present = joined[:, -1:] > 0
        self.batches += present
        mean = ((self.batches - 1) * self.values + joined[:, :-1] / joined[:, -1:]) / self.batches
        self.values = torch.where(present, mean, self.values)


def similarity_weights(means: Tensor, prototypes: Tensor, delta: float) -> Tensor:
    """Similarity of each new class to each old one.

    Args:
        means: (C_new, D) means of the new classes' features.
        prototypes: (C_old, D) stored means of the old classes, background included.
        delta: δ, weights below δ/C_old become 0 (`--delta_csw`).

    Returns:
        (C_new, C_old): softmax over the old classes of the cosines; a class of zeros has the cosine 0. Not normalised again after
        the filter, as released.

    Reference: REMINDER (Phan et al., CVPR 2022), class similarity.
    """
    means, prototypes = at_least_float32(means), at_least_float32(prototypes).to(means)
    lengths = means.norm(dim=1)[:, None] * prototypes.norm(dim=1)  # (C_new, C_old)
    weights = ((means @ prototypes.T) / lengths).nan_to_num(nan=0.0).softmax(1)
    return weights.masked_fill(weights < delta / len(prototypes), 0)


def class_similarity_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """REMINDER's CSW-KD: distillation on the pixels of new classes, weighted by the similarity of each old class to that of the pixel.

    Args:
        student_logits: (B, C, H, W); the channels of new classes are cut off before the softmax.
        teacher_logits: (B, C_old, H, W).
        labels: (B, H, W) after pseudo-labelling.
        weights: (C_new, C_old) from `similarity_weights`, constants.
        temperature: τ, divides both logits.

    Returns:
        Scalar, without its factor: τ² times the mean over new pixels of −Σ_c (q_c·r_c + 1e-7) log p_c, where q is the teacher's and
        p the student's softmax and r the row of the pixel's class; 0 without a new pixel, where the release has NaN.

    Reference: REMINDER (Phan et al., CVPR 2022), class similarity weighted knowledge distillation.
    """
    old = teacher_logits.shape[1]
    new = (labels >= old) & (labels != IGNORE)  # (B, H, W)
    # The number N of new pixels is known to the host only if it waits. On CUDA all pixels are computed, and those of old classes count as 0
    masked = asynchronous(new.device)

    def rows(maps: Tensor) -> Tensor:
        return maps.flatten(0, 2) if masked else maps[new]  # (B·H·W, …) or (N, …)

    student, teacher = (
        rows(at_least_float32(logits[:, :old]).movedim(1, -1)) / temperature
        for logits in (student_logits, teacher_logits)
    )  # (N, C_old)
    target = teacher.softmax(1) * weights[rows(torch.where(new, labels - old, 0))] + FLOOR
    products = target * student.log_softmax(1)
    if masked:
        products = torch.where(rows(new)[:, None], products, 0.0)
        return -(temperature**2) * products.sum() / new.sum().clamp(min=1)
    return -(temperature**2) * products.sum() / max(len(student), 1)
