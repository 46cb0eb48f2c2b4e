"""SDR's losses on the body's output: running class means, attraction, repulsion, matching, sparsity.

Features are F (B, D, h, w); labels ỹ (B, h, w) are those of the images at the size of the features (`at_size`).

The release takes the features of a class as a flat vector, image by image, channel by channel, position by position, and reshapes it
to a matrix without a transpose. `rows_of_class` does the same unless `exact` is true.

Reference: Michieli and Zanuttigh, "Continual Semantic Segmentation via Repulsion-Attraction of Sparse and Disentangled Latent
    Representations" (SDR), CVPR 2021.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from utils import latent_masked
from utils.runtime.amp import at_least_float32
from utils.runtime.gate import asynchronous
from utils.types import IGNORE

#: Added to the denominators of the sparsity; the value of the release.
DAMPING = 1e-15
#: `--lfs_normalization`: what the features are divided by; `--lfs_shrinkingfn`: the function of them that is compared with their sum.
NORMALISATIONS = ("max_maskedforclass", "max_foreachfeature")
SHRINKINGS = ("exponential", "squared")


def at_size(labels: Tensor, size: torch.Size | Sequence[int]) -> Tensor:
    """Labels at the size of the features: row ⌊iH/h⌋ and column ⌊jW/w⌋.

    Args:
        labels: (…, H, W), or anything else of that size, such as logits.
        size: h, w.

    Returns:
        (…, h, w).
    """
    rows, columns = (
        torch.arange(small, device=labels.device) * large // small for small, large in zip(size, labels.shape[-2:])
    )
    return labels[..., rows[:, None], columns]


def label_counts(labels: Tensor) -> Tensor:
    """How often each label occurs, `IGNORE` included: (256,) int64."""
    if not asynchronous(labels.device):
        return torch.bincount(labels.flatten(), minlength=IGNORE + 1)
    # bincount reads the greatest label to know its size
    counts = torch.zeros(IGNORE + 1, dtype=torch.int64, device=labels.device)
    return counts.index_add_(0, labels.flatten(), torch.ones_like(labels).flatten())


def worth_a_visit(counts: Tensor) -> Sequence[int]:
    """Rows of a vector of counts that a loop visits: those above 0; on CUDA all, because the host would have to read which these are."""
    return range(len(counts)) if asynchronous(counts.device) else counts.nonzero().flatten().tolist()


def classes_present(labels: Tensor) -> list[int]:
    """The labels that occur, ascending, `IGNORE` left out."""
    counts = torch.bincount(labels.flatten(), minlength=IGNORE + 1)[:IGNORE]
    return counts.nonzero().flatten().tolist()


def rows_of_class(features: Tensor, chosen: Tensor, tall: bool, exact: bool = False) -> Tensor:
    """The features of a class as a matrix.

    Args:
        features: (B, D, h, w).
        chosen: (B, h, w) bool, the N positions of the class.
        tall: (N, D); otherwise wide, (D, N).
        exact: a row (a column) is a position. Released: the flat vector of all images, channels and positions in this order is
            reshaped row by row. Wide is then right only if a single image holds the class, tall only for N = 1; otherwise
            images and channels mix.

    Returns:
        The matrix, differentiable with respect to the features.
    """
    if exact:
        matrix = features.movedim(1, -1)[chosen]  # (N, D)
        return matrix if tall else matrix.T
    flat = features.masked_select(chosen[:, None])  # (B·D·N_b), image by image
    channels = features.shape[1]
    return flat.view(-1, channels) if tall else flat.view(channels, -1)


def class_sums(features: Tensor, labels: Tensor, num_classes: int, exact: bool = False) -> tuple[Tensor, Tensor]:
    """Sums of the features of each class, and numbers of their positions.

    Args:
        features: (B, D, h, w).
        labels: (B, h, w).
        num_classes: C.
        exact: see `rows_of_class`.

    Returns:
        (C, D) sums and (C,) int64 numbers, 0 for classes that are absent.
    """
    features = at_least_float32(features)
    if asynchronous(features.device):
        at = latent_masked.places(features, labels, num_classes, tall=False, exact=exact)
        return latent_masked.sums(features, at), at.numbers
    counts = torch.bincount(labels.flatten(), minlength=IGNORE + 1)[:num_classes]
    sums = features.new_zeros(num_classes, features.shape[1])
    for label in counts.nonzero().flatten().tolist():
        sums[label] = rows_of_class(features, labels == label, tall=False, exact=exact).sum(1)
    return sums, counts


def leaves_background_out(step: int, overlap: bool, sequential: bool) -> bool:
    """Whether the running means leave the background out, because it contains other classes.

    Args:
        step: of the task.
        overlap: images show classes of later steps.
        sequential: labels keep the classes of earlier steps (`--no_mask`).
    """
    return overlap or (step > 0 and not sequential)


def updated_prototypes(
    prototypes: Tensor, counts: Tensor, sums: Tensor, numbers: Tensor, skip: str | None
) -> tuple[Tensor, Tensor]:
    """Running class means after a batch: P ← (sum of the features + n·P) / (n + N), n ← n + N.

    Args:
        prototypes: (C, D).
        counts: (C,) int64, n.
        sums, numbers: of `class_sums`.
        skip: None; "first": leave out the smallest class of the batch, as released; "background": leave out class 0.

    Returns:
        New prototypes and counts; a class that the batch does not have keeps its own.
    """
    numbers = torch.where(latent_masked.without(numbers > 0, skip), numbers, 0)
    total = counts + numbers
    means = (sums.to(prototypes) + counts[:, None] * prototypes) / total.clamp(min=1)[:, None]
    return torch.where(numbers[:, None] > 0, means, prototypes), total


def attraction(
    features: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    without_background: str | None = None,
    exact: bool = False,
    mean: bool = False,
) -> Tensor:
    """Distance of the features of each class from its prototype.

    Args:
        features: (B, D, h, w).
        labels: (B, h, w).
        prototypes: (C, D), constants.
        without_background: as `skip` of `updated_prototypes` (`--lfc_nobgr`).
        exact: see `rows_of_class`.
        mean: the mean over classes. Released: the running sum is divided by K at every class, a ← (a + ℓ_k)/K, which weighs the
            k-th of K classes by K^−(K−k+1).

    Returns:
        Scalar, without its factor; 0 without a class.

    Reference: SDR, section 3.3; ℓ_k is the mean over all numbers of the class of (feature − prototype)².
    """
    features = at_least_float32(features)
    if asynchronous(features.device):
        at = latent_masked.places(features, labels, len(prototypes), tall=False, exact=exact)
        shown = latent_masked.without(at.numbers > 0, without_background)
        number, position = shown.sum().clamp(min=1).double(), shown.cumsum(0) - 1
        weights = torch.where(shown, 1 / number if mean else number ** (position - shown.sum()), 0.0)
        return latent_masked.weighted_squares(features, at, prototypes, weights)
    present = _kept(classes_present(labels), without_background)
    total = features.new_zeros(())
    for label in present:
        wide = rows_of_class(features, labels == label, tall=False, exact=exact)  # (D, N)
        distance = (wide - prototypes[label][:, None].to(wide)).square().mean()
        total = total + distance / len(present) if mean else (total + distance) / len(present)
    return total


def repulsion(
    features: Tensor,
    labels: Tensor,
    without_background: str | None = None,
    exact: bool = False,
    num_classes: int = IGNORE,
) -> Tensor:
    """Closeness of the mean features of the batch's classes: the mean over pairs of 1 / distance.

    Args:
        features, labels, without_background, exact: as in `attraction`.
        num_classes: above every label but 255.

    Returns:
        Scalar, without its factor; 0 with fewer than two classes. Pairs at distance 0 are left out.

    Reference: SDR, section 3.3.
    """
    features = at_least_float32(features)
    shown: Tensor | None = None
    if asynchronous(features.device):
        at = latent_masked.places(features, labels, num_classes, tall=False, exact=exact)
        shown = latent_masked.without(at.numbers > 0, without_background)
        means = latent_masked.sums(features, at) / at.numbers.clamp(min=1)[:, None]  # (C, D)
    else:
        present = _kept(classes_present(labels), without_background)
        if len(present) < 2:
            return features.new_zeros(())
        means = torch.stack(
            [rows_of_class(features, labels == label, tall=False, exact=exact).mean(1) for label in present]
        )  # (K, D)
    first, second = torch.triu_indices(len(means), len(means), offset=1, device=means.device)
    squares = (means[first] - means[second]).square().sum(1)  # (K(K−1)/2): each pair once, the mean is the same
    apart = squares > 0 if shown is None else (squares > 0) & shown[first] & shown[second]
    closeness = torch.where(apart, squares, 1.0).rsqrt() * apart
    return closeness.sum() / apart.sum().clamp(min=1)


def _kept(present: list[int], without_background: str | None) -> list[int]:
    if without_background == "first":
        return present[1:]
    return [label for label in present if label] if without_background == "background" else present


def old_labels(labels: Tensor, teacher_logits: Tensor, sequential: bool = False) -> Tensor:
    """The teacher's class at the positions whose label is background, 0 at all others.

    Args:
        labels: (B, h, w).
        teacher_logits: (B, C_old, H, W) full-size.
        sequential: the labels contain the old classes, which are returned instead of the teacher's; 0 elsewhere.

    Returns:
        (B, h, w) int64.
    """
    if sequential:
        return labels.masked_fill(labels >= teacher_logits.shape[1], 0)
    predicted = at_size(teacher_logits, labels.shape[-2:]).argmax(1)
    return predicted.masked_fill(labels != 0, 0)


def prototype_matching(
    features: Tensor, labels: Tensor, prototypes: Tensor, sum_after: bool, exact: bool = False
) -> Tensor:
    """Distance of the features that the teacher assigns to old classes from the prototypes of these classes.

    Args:
        features: (B, D, h, w).
        labels: (B, h, w) from `old_labels`; 0 is left out.
        prototypes: (C, D), constants.
        sum_after: compare the mean feature of each class with the prototype, and average over classes
            (`--loss_de_prototypes_sumafter`); otherwise every feature, and sum over classes.
        exact: see `rows_of_class`.

    Returns:
        Scalar, without its factor; 0 without an old class.

    Reference: SDR, section 3.2.
    """
    features = at_least_float32(features)
    if asynchronous(features.device):
        at = latent_masked.places(features, labels, len(prototypes), tall=True, exact=exact)
        shown = latent_masked.without(at.numbers > 0, "background")
        if not sum_after:
            return latent_masked.weighted_squares(features, at, prototypes, shown.double())
        means = latent_masked.sums(features, at) / at.numbers.clamp(min=1)[:, None]  # (C, D)
        distances = (means - prototypes.to(means)).square().mean(1)
        return torch.where(shown, distances, 0.0).sum() / shown.sum().clamp(min=1)
    present = [label for label in classes_present(labels) if label]
    total = features.new_zeros(())
    for label in present:
        tall = rows_of_class(features, labels == label, tall=True, exact=exact)  # (N, D)
        prototype = prototypes[label].to(tall)
        if sum_after:
            total = total + (tall.mean(0) - prototype).square().mean() / len(present)
        else:
            total = total + (tall - prototype).square().mean()
    return total


def sparsity(
    features: Tensor,
    labels: Tensor,
    normalisation: str = "max_maskedforclass",
    shrinking: str = "exponential",
    ignore: bool = False,
) -> Tensor:
    """Measure of how evenly the features of a position are distributed over the channels.

    Args:
        features: (B, D, h, w).
        labels: (B, h, w).
        normalisation: `max_maskedforclass` divides by the largest feature of the position's class in the batch, `max_foreachfeature`
            by the largest of the position.
        shrinking: `exponential` or `squared`, of the normalised features.
        ignore: leave positions of the label 255 out. Released: 255 is a class like any other.

    Returns:
        Scalar, without its factor: the mean over positions of Σ_d shrink(F̄) / Σ_d F̄, F̄ being the normalised features; 0 where the
        sum of all F̄ is not above 0, and, normalised by class, without any label but background, as released.

    Reference: SDR, section 3.4.
    """
    assert normalisation in NORMALISATIONS and shrinking in SHRINKINGS, (normalisation, shrinking)
    features = at_least_float32(features)
    kept = (labels != IGNORE) if ignore else torch.ones_like(labels, dtype=torch.bool)
    if asynchronous(features.device):
        return _sparsity_masked(features, labels, kept, normalisation, shrinking)
    if normalisation == "max_foreachfeature":
        largest = features.amax(1, keepdim=True)  # (B, 1, h, w)
    else:
        counts = torch.bincount(labels[kept].flatten(), minlength=IGNORE + 1)
        present = counts.nonzero().flatten().tolist()
        if not any(present):
            return features.new_zeros(())
        largest = features.new_zeros(labels.shape)
        of_position = features.amax(1)  # (B, h, w)
        for label in present:
            chosen = labels == label
            largest = torch.where(chosen, of_position[chosen].max(), largest)
        largest = largest[:, None]
    normalised = features / (largest + DAMPING)
    sums = normalised.sum(1)[kept]  # (positions)
    if not bool(sums.sum() > 0):
        return features.new_zeros(())
    shrunk = normalised.exp() if shrinking == "exponential" else normalised.square()
    return (shrunk.sum(1)[kept] / (sums + DAMPING)).mean()


def _sparsity_masked(features: Tensor, labels: Tensor, kept: Tensor, normalisation: str, shrinking: str) -> Tensor:
    """`sparsity` without a number that the host has to read."""
    some = torch.ones_like(kept).any()
    if normalisation == "max_foreachfeature":
        largest = features.amax(1)
    else:
        largest = latent_masked.largest_of_label(features.amax(1), labels, IGNORE + 1)
        some = ((labels != 0) & kept).any()
    normalised = features / (largest + DAMPING)[:, None]
    sums = torch.where(kept, normalised.sum(1), 0.0)  # (B, h, w)
    counts = some & (sums.sum() > 0)
    # Where the value does not count, that of other numbers is computed: the gradient of 0 times infinity is not finite
    usable = (counts & kept)[:, None]
    safe = torch.where(usable, normalised, 1.0)
    shrunk = safe.exp() if shrinking == "exponential" else safe.square()
    ratios = shrunk.sum(1) / (safe.sum(1) + DAMPING)
    return torch.where(usable[:, 0], ratios, 0.0).sum() / kept.sum().clamp(min=1)
