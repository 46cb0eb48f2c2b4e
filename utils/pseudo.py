"""Pseudo-labels: predictions of the frozen teacher for pixels that are annotated as background in this step.

An "old pixel" has a label below C_old, which is background in the ground truth of a step. Everything is computed before the losses and
without gradient.

Reference:
    Douillard et al., "PLOP: Learning without Forgetting for Continual Semantic Segmentation", CVPR 2021, section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from utils.errors import UserError
from utils.runtime.amp import at_least_float32
from utils.types import IGNORE

#: `--pseudo`; besides these, `threshold_X` with a number X.
MODES = ("naive", "confidence", "median", "entropy")
#: `--pseudo` modes that compare with a threshold per class, and what they measure.
MEASURES = {"median": "probability", "entropy": "entropy"}
#: Bins of the histograms that thresholds are read from, unless `--pseudo_nb_bins` says otherwise.
NUM_BINS = {"probability": 20, "entropy": 100}
#: Added to the number of old pixels in PLOP's adaptive factor, which is 0 in an image without old pixels.
DAMPING = 1e-6
#: `--pseudo_ablation`, for labels that contain the old classes (`--data_masking current+old`).
ABLATIONS = ("corrected_errors", "removed_errors")
#: `--pseudo_soft`.
SOFT_MODES = ("soft_certain", "soft_uncertain")


class PseudoLabels(NamedTuple):
    """Result of relabelling.

    Attributes:
        labels: (B, H, W) int64, new classes as annotated, old pixels with the class that the teacher predicts, or `IGNORE`.
        valid: (B, H, W) bool, old pixels whose pseudo-label is trusted.
        pixel_weights: (B, H, W) factor of the classification loss, or None for ones.
    """

    labels: Tensor
    valid: Tensor
    pixel_weights: Tensor | None


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy per pixel divided by its maximum, and averaged over classes: −mean_c q_c ln(q_c + 1e-8) / ln(C).

    Args:
        probabilities: (B, C, H, W).

    Returns:
        (B, H, W) in [0, 1/C].

    Reference: PLOP, eq. 9, whose sum over classes is a mean in the release; the release adds 1e-8 to C as well.
    """
    probabilities = at_least_float32(probabilities)
    spread = -(probabilities * (probabilities + 1e-8).log()).mean(1)
    return spread / math.log(probabilities.shape[1] + 1e-8)


def parse_mode(mode: str | None) -> tuple[str | None, float | None]:
    """Split `--pseudo` into a mode and, for `threshold_X`, the number X.

    Raises:
        UserError: an unknown mode, or an X that is no number from 0 to 1.
    """
    if mode is None or mode in MODES:
        return mode, None
    name, _, number = mode.partition("_")
    try:
        if name == "threshold" and 0 <= float(number) <= 1:
            return "threshold", float(number)
    except ValueError:
        pass
    raise UserError(
        f"--pseudo {mode[:80]!r} is unknown; choose one of {', '.join(MODES)}, or threshold_X with X from 0 to 1"
    )


def max_value(measure: str, num_total: int) -> float:
    """The value that the measure is divided by before it is compared: ln(C) for entropy, 1 for a probability."""
    return math.log(num_total) if measure == "entropy" else 1.0


def measure_pixels(teacher_logits: Tensor, measure: str, num_total: int) -> tuple[Tensor, Tensor]:
    """The teacher's confidence in its prediction.

    Args:
        teacher_logits: (B, C_old, H, W).
        measure: `entropy` (low: certain) or `probability` (high: certain).
        num_total: C, classes of this step.

    Returns:
        (B, H, W) measure in [0, 1] and (B, H, W) predicted classes.
    """
    probabilities = at_least_float32(teacher_logits).softmax(1)
    largest, predicted = probabilities.max(1)
    value = entropy(probabilities) if measure == "entropy" else largest
    return value / max_value(measure, num_total), predicted


def teacher_labels(labels: Tensor, teacher_logits: Tensor, least: float) -> Tensor:
    """Labels of a validation that counts old classes too (`--val_by_teacher`).

    Args:
        labels: (B, H, W) of the step, background 0.
        teacher_logits: (B, C_old, H, W).
        least: probability from which a prediction counts as the truth.

    Returns:
        (B, H, W) int64. A pixel of another label than background keeps it. A background pixel gets the class that the teacher
        predicts, background or an old class, where its probability is at least `least`, and is `IGNORE` elsewhere.
    """
    probability, predicted = measure_pixels(teacher_logits, "probability", teacher_logits.shape[1])
    return torch.where(labels == 0, torch.where(probability >= least, predicted, IGNORE), labels.long())


def released_median(counts: Tensor) -> Tensor:
    """The median of each row of a histogram over [0, 1], as the official program reads it.

    It takes the first bin with S ≤ n/2 ≤ S + count, where S is the sum of the indices of the bins before it, and returns
    left border + (n/2 − S) / count / bins. S should be the sum of the counts; the result is therefore the median only if that is
    in one of the first two bins. If no bin satisfies the condition, the last one is used, with S the sum of all indices; if that
    bin is empty, the result is an infinity.

    Args:
        counts: (C, bins) int64.

    Returns:
        (C,) float64, 0 for empty rows.
    """
    num_bins = counts.shape[1]
    index = torch.arange(num_bins, dtype=torch.float64, device=counts.device)
    running = index * (index - 1) / 2  # S before each bin
    half = counts.sum(1, keepdim=True).double() / 2  # (C, 1)
    fits = (running <= half) & (half <= running + counts)
    found = fits.any(1, keepdim=True)
    chosen = torch.where(
        found, fits.int().argmax(1, keepdim=True), num_bins - 1
    )  # argmax: the first bin that satisfies it
    start = torch.where(found, running[chosen], num_bins * (num_bins - 1) / 2)
    inside = ((half - start) / counts.gather(1, chosen)).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
    return torch.where(half > 0, (chosen + inside) / num_bins, 0.0)[:, 0]


def exact_median(counts: Tensor) -> Tensor:
    """The median of each row of a histogram over [0, 1], interpolated linearly in its bin.

    Args:
        counts: (C, bins) int64.

    Returns:
        (C,) float64, 0 for empty rows.
    """
    half = counts.sum(1, keepdim=True).double() / 2  # (C, 1)
    upto = counts.cumsum(1)
    chosen = (upto < half).sum(1, keepdim=True).clamp(max=counts.shape[1] - 1)
    count = counts.gather(1, chosen)
    inside = (half - (upto.gather(1, chosen) - count)) / count.clamp(min=1)
    return torch.where(half > 0, (chosen + inside) / counts.shape[1], 0.0)[:, 0]


class MedianThresholds:
    """Collects a histogram of the teacher's confidence for each predicted class, and computes thresholds from them.

    Args:
        num_old: classes of the teacher.
        num_total: C, classes of this step.
        measure: `entropy` or `probability`.
        num_bins: bins on [0, 1], or None for `NUM_BINS`.

    Example:
        medians = MedianThresholds(num_old, num_total, "entropy")
        for images, labels in loader:
            medians.update(teacher(images).logits, labels)
        thresholds = medians.finish(0.001, reduce=sum_over_processes)
    """

    def __init__(self, num_old: int, num_total: int, measure: str = "entropy", num_bins: int | None = None) -> None:
        assert measure in NUM_BINS, measure
        self.num_old, self.num_total, self.measure = num_old, num_total, measure
        self.num_bins = num_bins or NUM_BINS[measure]
        self.counts: Tensor | None = None  # (C, bins) int64, on the device of the logits

    @torch.no_grad()
    def update(self, teacher_logits: Tensor, labels: Tensor) -> None:
        """Count the background pixels of a batch.

        Args:
            teacher_logits: (B, C_old, H, W).
            labels: (B, H, W) as annotated; only pixels of label 0 count.
        """
        value, predicted = measure_pixels(teacher_logits, self.measure, self.num_total)
        bins = (value * self.num_bins).long().clamp(0, self.num_bins - 1)
        counted = (labels == 0).long()
        if self.counts is None:
            self.counts = torch.zeros(self.num_total, self.num_bins, dtype=torch.int64, device=bins.device)
        # Pixels that do not count add 0; a boolean index would synchronise with the device
        self.counts.view(-1).index_add_(0, (predicted * self.num_bins + bins).flatten(), counted.flatten())

    def finish(self, base: float, exact: bool = False, reduce: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Compute the thresholds.

        Args:
            base: `--threshold`: the minimum of thresholds on entropy, the maximum of thresholds on probability.
            exact: the true median instead of the released read-out.
            reduce: sums the histograms over processes (returns the sum), or None in one process.

        Returns:
            (C,) float64 on the device of the logits; classes that the teacher never predicts have median 0.
        """
        assert self.counts is not None, "`update` is called before `finish`"
        counts = self.counts if reduce is None else reduce(self.counts)
        median = exact_median(counts) if exact else released_median(counts)
        return median.clamp(min=base) if self.measure == "entropy" else median.clamp(max=base)


@torch.no_grad()
def relabel(
    labels: Tensor,
    teacher_logits: Tensor,
    num_total: int,
    mode: str,
    thresholds: Tensor | None = None,
    soft: str | None = None,
    ablation: str | None = None,
) -> PseudoLabels:
    """Replace the labels of old pixels by the teacher's predictions.

    Args:
        labels: (B, H, W) as annotated.
        teacher_logits: (B, C_old, H, W) at the labels' size.
        num_total: C, classes of this step.
        mode: `naive` (arg-max everywhere), `confidence` (the same, weighted by its probability), `threshold_X` (where
            the probability is at least X), `median` (at least its class's threshold), `entropy` (entropy below it).
        thresholds: (C,) from `MedianThresholds`, for `median` and `entropy`.
        soft: `--pseudo_soft` with `entropy`: untrusted old pixels keep their label for the soft loss; `soft_certain`
            keeps those of trusted pixels too.
        ablation: `corrected_errors` keeps the annotated class on trusted pixels; `removed_errors` ignores trusted
            pixels where the teacher is wrong.

    Returns:
        Labels, trusted pixels and pixel weights; see `PseudoLabels`.

    Raises:
        ValueError: an unknown mode.

    Reference: PLOP, eq. 7-8 for `entropy`.
    """
    name, minimum = parse_mode(mode)
    labels = labels.long()
    old = labels < teacher_logits.shape[1]
    measure = MEASURES.get(name or "", "probability")
    value, predicted = measure_pixels(teacher_logits, measure, num_total)
    if name in MEASURES:
        assert thresholds is not None, "median and entropy need thresholds"
        of_class = thresholds.to(value.device)[predicted]
        sure = value < of_class if name == "entropy" else value >= of_class
    elif minimum is not None:
        sure = value >= minimum
    else:
        sure = torch.ones_like(old)
    valid = old & sure
    weights = torch.where(old, value, 1.0) if name == "confidence" else None
    return PseudoLabels(_rewrite(labels, predicted, old, valid, soft, ablation), valid, weights)


def _rewrite(
    labels: Tensor, predicted: Tensor, old: Tensor, valid: Tensor, soft: str | None, ablation: str | None
) -> Tensor:
    """The new label map: predicted where valid, `IGNORE` on other old pixels, as `soft` and `ablation` allow."""
    assert soft in (None, *SOFT_MODES) and ablation in (None, *ABLATIONS), (soft, ablation)
    if soft == "soft_certain":
        return labels
    trusted = predicted
    if ablation == "corrected_errors":
        trusted = labels
    elif ablation == "removed_errors":
        trusted = torch.where(predicted == labels, predicted, IGNORE)
    untrusted = labels if soft == "soft_uncertain" else torch.full_like(labels, IGNORE)
    return torch.where(valid, trusted, torch.where(old, untrusted, labels))


def certain_pixels(labels: Tensor, valid: Tensor, num_old: int, soft: str) -> Tensor:
    """Where the soft loss uses a hard label: annotated new pixels, and for `soft_uncertain` trusted old ones.

    Args:
        labels: (B, H, W) as annotated.
        valid: from `relabel`.
        num_old: number of old classes.
        soft: `--pseudo_soft`.

    Returns:
        (B, H, W) bool; `IGNORE` pixels count as certain, where their loss is 0.
    """
    certain = labels >= num_old
    return certain | valid if soft == "soft_uncertain" else certain


def adaptive_factor(
    valid: Tensor,
    labels: Tensor,
    num_old: int,
    minimum: float = 0.0,
    dtype: torch.dtype = torch.float32,
    damping: float = DAMPING,
) -> Tensor:
    """`--classif_adaptive_factor`: the share of old pixels that are trusted, which lowers the loss if few old pixels contribute.

    Args:
        valid: (B, H, W) bool, from `relabel`.
        labels: (B, H, W) as annotated.
        num_old: number of old classes.
        minimum: smallest factor (`--classif_adaptive_min_factor`).
        dtype: of the loss that the factor multiplies.
        damping: added to the number of old pixels: PLOP's 1e-6, or 0 as in REMINDER.

    Returns:
        (B, 1, 1): trusted old pixels / (old pixels + damping), 0 or `minimum` for an image without old pixels.

    Reference: PLOP, eq. 11.
    """
    # In float64, because 1e-6 added to a count of pixels has no effect in float32
    trusted = valid.double().sum((1, 2), keepdim=True)
    old = (labels < num_old).double().sum((1, 2), keepdim=True)
    return (trusted / torch.where(old > 0, old + damping, 1.0)).clamp(min=minimum).to(dtype)
