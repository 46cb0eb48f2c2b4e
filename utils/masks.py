"""LSKD's erased views of a batch, and the masks of the features that LSKD distils.

The frozen teacher computes the features of an image x three times: of the whole image, with the old pixels erased (x_o), and with the
new pixels erased (x_n). A feature is kept where erasing the old pixels changes it little, or erasing the new pixels changes it much.
This is the released rule; a small change is a high cosine, or a low distance. On drawn scenes it keeps the features of new objects and
few of old ones (docs/results, "What the masks cover").

Reference:
    "Layer-Specific Knowledge Distillation for Class Incremental Semantic Segmentation", IEEE TIP 2024, mask-guided
    distillation. What its text does not specify follows numbers of the released program.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import UserError
from utils.runtime.amp import at_least_float32
from utils.types import IGNORE

#: `--dis`: how a position of an erased view is compared with the whole view.
DISTANCES = ("L1_mean", "mean_L1", "L2", "cos")
#: `--sigmoid`: how the two comparisons are combined to a mask.
RULES = ("old", "newnone", "none", "gt", "whc")
#: `--channel_rule`: the inequalities of the channel mask of `whc`.
CHANNEL_RULES = ("released", "mended")


def old_pixels(labels: Tensor, num_old: int) -> Tensor:
    """Pixels of an old class, background included.

    Args:
        labels: (B, H, W) after pseudo-labelling.
        num_old: number of old classes, background included.

    Returns:
        (B, H, W) bool.
    """
    return labels < num_old


def new_pixels(labels: Tensor, num_old: int) -> Tensor:
    """Pixels of a class that this step adds; arguments and result as in `old_pixels`, `IGNORE` is no class."""
    return (labels >= num_old) & (labels != IGNORE)


def erased_views(images: Tensor, labels: Tensor, num_old: int) -> tuple[Tensor, Tensor]:
    """The two erased views of a batch.

    Args:
        images: (B, 3, H, W), normalised; an erased pixel is 0, the data set's mean colour.
        labels: (B, H, W) after pseudo-labelling; `IGNORE` pixels are erased in neither view.
        num_old: number of old classes, background included.

    Returns:
        without_old: images with old pixels set to 0 (x_o).
        without_new: images with new pixels set to 0 (x_n).
    """
    old = old_pixels(labels, num_old)[:, None]  # (B, 1, H, W)
    new = new_pixels(labels, num_old)[:, None]  # (B, 1, H, W)
    return images.masked_fill(old, 0), images.masked_fill(new, 0)


def batch_quantile(values: Tensor, fraction: Tensor) -> Tensor:
    """The quantile of each row at its own fraction, interpolated linearly.

    Equal to torch.quantile row by row, but in one call, without its limit of 16 million values.

    Args:
        values: (B, n).
        fraction: (B,) in [0, 1].

    Returns:
        (B, 1).
    """
    ordered = values.sort(dim=1).values
    place = fraction.to(values.dtype)[:, None] * (values.shape[1] - 1)  # (B, 1)
    below = place.floor().long()
    return torch.lerp(ordered.gather(1, below), ordered.gather(1, place.ceil().long()), place - below)


def check_rule(rule: str | None, distance: str | None) -> None:
    """Refuse combinations of `--sigmoid` and `--dis` that cannot work.

    Raises:
        UserError: an unknown name; a rule other than `gt` without a distance; a distance without a rule.
    """
    if rule is not None and rule not in RULES:
        raise UserError(f"--sigmoid {rule!r} is unknown; use one of {', '.join(RULES)}.")
    if distance is not None and distance not in DISTANCES:
        raise UserError(f"--dis {distance!r} is unknown; use one of {', '.join(DISTANCES)}.")
    if rule not in (None, "gt") and distance is None:
        raise UserError(f"--sigmoid {rule} compares features and needs a --dis ({', '.join(DISTANCES)}).")
    if rule is None and distance is not None:
        raise UserError(f"--dis {distance} has no effect without a --sigmoid ({', '.join(RULES)}); give one.")


def differences(features: Tensor, erased: tuple[Tensor, Tensor], distance: str) -> list[Tensor]:
    """Difference of a tap from each of its two erased views, at every position.

    Args:
        features: (B, c, h, w), the tap of the whole images.
        erased: the taps of the erased views.
        distance: `cos`: minus the cosine over channels; `mean_L1`: |mean over channels of the difference|; `L1_mean`:
            the mean over channels of |difference|; `L2`: the length of the difference. Numbers of the released program
            exist for `cos` and `mean_L1`.

    Returns:
        Two tensors (B, h·w); higher is more different.
    """
    if distance == "cos":
        # Equal to torch.cosine_similarity, in half its time: the length of the whole view is computed once
        length, *lengths = (view.square().sum(1).sqrt().clamp(min=1e-8) for view in (features, *erased))
        found = [-(features * view).sum(1) / (length * other) for view, other in zip(erased, lengths)]
    elif distance == "mean_L1":
        mean = features.mean(1)
        found = [(mean - view.mean(1)).abs() for view in erased]
    elif distance == "L1_mean":
        found = [(features - view).abs().mean(1) for view in erased]
    else:
        assert distance == "L2", distance
        found = [(features - view).square().sum(1).sqrt() for view in erased]
    return [value.flatten(1) for value in found]


def spatial_mask(
    features: Tensor, erased: tuple[Tensor, Tensor], shares: tuple[Tensor, Tensor], rule: str, distance: str
) -> Tensor:
    """The positions of a tap that are kept.

    With s_o, s_n the similarities to the views without old and without new pixels, and Q(v, r) the r-quantile of v
    over positions: o = [s_o ≥ Q(s_o, r_o)], n = [s_n ≤ Q(s_n, r_n)]; `whc` keeps o or n, `none` keeps o and n, `old`
    keeps o, `newnone` keeps n. On distances the release reverses both inequalities and exchanges the fractions:
    o = [d_o ≤ Q(d_o, r_n)], n = [d_n ≥ Q(d_n, r_o)]. Numbers of the release exist for `cos` with `whc` and `none`, and for
    `mean_L1` with `whc`; `old` and `newnone` follow from their names.

    Args:
        features: (B, c, h, w).
        erased: taps of the views without old and without new pixels.
        shares: (B,) r_o and r_n, shares of old and of new pixels in each label map.
        rule: `whc`, `none`, `old` or `newnone`.
        distance: see `differences`.

    Returns:
        (B, 1, h, w) bool.
    """
    share_old, share_new = shares
    far_old, far_new = differences(features, erased, distance)  # (B, h·w)
    if distance == "cos":
        kept_old = -far_old >= batch_quantile(-far_old, share_old)
        kept_new = -far_new <= batch_quantile(-far_new, share_new)
    else:
        kept_old = far_old <= batch_quantile(far_old, share_new)
        kept_new = far_new >= batch_quantile(far_new, share_old)
    kept = {
        "whc": kept_old | kept_new,
        "none": kept_old & kept_new,
        "old": kept_old,
        "newnone": kept_new,
    }[rule]
    return kept.unflatten(1, features.shape[-2:])[:, None]  # (B, 1, h, w)


def channel_mask(
    features: Tensor, erased: tuple[Tensor, Tensor], shares: tuple[Tensor, Tensor], rule: str = "released"
) -> Tensor:
    """The channels of a tap that are kept (`whc`).

    d_o, d_n are the absolute changes of each channel's mean over positions. A channel is kept if d_o ≥ Q(d_o, r_o) or
    d_n ≤ Q(d_n, r_n). These are the inequalities for cosines, although d_o and d_n are distances: as released, likely a mistake.

    Args:
        features: (B, c, h, w).
        erased: taps of the views without old and without new pixels.
        shares: (B,) r_o and r_n.
        rule: `released`, or `mended`: the rule of distances, [d_o ≤ Q(d_o, r_n)] or [d_n ≥ Q(d_n, r_o)], which agrees with the
            spatial mask.

    Returns:
        (B, c, 1, 1) bool.
    """
    assert rule in CHANNEL_RULES, rule
    share_old, share_new = shares
    whole = features.mean((2, 3))  # (B, c)
    change_old, change_new = ((view.mean((2, 3)) - whole).abs() for view in erased)
    if rule == "mended":
        kept = change_old <= batch_quantile(change_old, share_new)
        kept |= change_new >= batch_quantile(change_new, share_old)
    else:
        kept = change_old >= batch_quantile(change_old, share_old)
        kept |= change_new <= batch_quantile(change_new, share_new)
    return kept[:, :, None, None]


def label_mask(labels: Tensor, num_old: int, size: torch.Size | tuple[int, int], dtype: torch.dtype) -> Tensor:
    """`gt`: the new pixels of the label map, bilinearly resized to a tap; between 0 and 1 at the border of new pixels.

    Args:
        labels: (B, H, W) after pseudo-labelling.
        num_old: number of old classes, background included.
        size: h, w of the tap.
        dtype: of the result.

    Returns:
        (B, 1, h, w) in [0, 1].
    """
    new = new_pixels(labels, num_old)[:, None].to(dtype)  # (B, 1, H, W)
    return F.interpolate(new, size=size, mode="bilinear", align_corners=False)


@torch.no_grad()
def tap_mask(
    teacher: Tensor,
    erased: tuple[Tensor, Tensor] | None,
    labels: Tensor,
    num_old: int,
    rule: str,
    distance: str | None = None,
    channels: str | None = "released",
) -> Tensor:
    """The mask M of one tap; the teacher's and the student's features are both multiplied by it.

    Args:
        teacher: (B, c, h, w), tap of the whole images.
        erased: the taps of x_o and x_n, in the order of `erased_views`; unused (may be None) under the rule `gt`.
        labels: (B, H, W) after pseudo-labelling.
        num_old: number of old classes, background included.
        rule: `--sigmoid`, one of `RULES`; `whc` multiplies the spatial by the channel mask, the others are spatial.
        distance: `--dis`, one of `DISTANCES`; unused under `gt`.
        channels: rule of `channel_mask`; None leaves it out, as on the small logits, whose channels are classes.

    Returns:
        (B, 1 or c, h, w) in the dtype of the (widened) tap, values 0 and 1, in between only under `gt`.

    Raises:
        UserError: see `check_rule`.
    """
    check_rule(rule, distance)
    teacher = at_least_float32(teacher)
    if rule == "gt":
        return label_mask(labels, num_old, teacher.shape[-2:], teacher.dtype)
    assert erased is not None and distance is not None, "all rules except gt need them"
    erased = (at_least_float32(erased[0]), at_least_float32(erased[1]))
    old, new = (pixels(labels, num_old).to(teacher.dtype).mean((1, 2)) for pixels in (old_pixels, new_pixels))
    shares = (old, new)  # each (B,)
    mask = spatial_mask(teacher, erased, shares, rule, distance)
    if rule == "whc" and channels is not None:
        mask = mask & channel_mask(teacher, erased, shares, channels)
    return mask.to(teacher.dtype)
