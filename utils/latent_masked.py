"""The sums of `utils.latent_space` for all classes at once, computed without copying a value from the device to the host.

The functions of that module loop over the classes of a batch and select their features, for which the host has to know these classes and
their numbers of positions. Here each value of the features is assigned its class and its channel of the prototype, and classes that the
batch does not show have the weight 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
    """Assignment of each value of the features to an entry of a table of C classes and D channels.

    Attributes:
        entry: (B, D, h, w) index into the flattened table of C + 1 rows; the last row is for labels from C on.
        label: (B, h, w) row of the table of each position.
        numbers: (C,) number of positions of each class.
    """

    entry: Tensor
    label: Tensor
    numbers: Tensor


def places(features: Tensor, labels: Tensor, classes: int, tall: bool, exact: bool) -> Places:
    """Assign all values of the features. `classes` is C; the other arguments are those of `utils.latent_space.rows_of_class`."""
    channels = features.shape[1]
    label = torch.where(labels < classes, labels, classes)
    flat = label.flatten(1)  # (B, h·w)
    rows = torch.arange(classes + 1, device=labels.device)[:, None]
    shown = flat[:, None] == rows  # (B, C+1, h·w)
    per_image = shown.sum(2)  # (B, C+1)
    numbers = per_image.sum(0)
    channel = torch.arange(channels, device=labels.device)[:, None]  # (D, 1)
    if not exact:
        # Place in the vector of the class: image by image, channel by channel, position by position
        rank = shown.cumsum(2).gather(1, flat[:, None]) - 1  # (B, 1, h·w)
        before = (per_image.cumsum(0) - per_image).gather(1, flat)[:, None]
        place = channels * before + channel * per_image.gather(1, flat)[:, None] + rank  # (B, D, h·w)
        channel = place % channels if tall else place // numbers[flat][:, None]
    entry = flat[:, None] * channels + channel
    return Places(entry.view_as(features), label, numbers[:classes])


def sums(features: Tensor, at: Places) -> Tensor:
    """(C, D) sums of the features of each class."""
    channels, classes = features.shape[1], len(at.numbers)
    table = features.new_zeros((classes + 1) * channels)
    return table.index_add(0, at.entry.flatten(), features.flatten()).view(-1, channels)[:classes]


def weighted_squares(features: Tensor, at: Places, prototypes: Tensor, weights: Tensor) -> Tensor:
    """Σ over classes of weight · mean of (feature − prototype)².

    Args:
        features: (B, D, h, w).
        at: their assignment.
        prototypes: (C, D), constants.
        weights: (C,), 0 for a class that is left out.

    Returns:
        Scalar.
    """
    table = torch.cat([prototypes.to(features), features.new_zeros(1, features.shape[1])]).flatten()
    share = weights / (at.numbers.clamp(min=1) * features.shape[1])
    share = torch.cat([share, share.new_zeros(1)]).to(features)
    squares = (features - table[at.entry]).square()
    return (squares * share[at.label][:, None]).sum()


def without(present: Tensor, left_out: str | None) -> Tensor:
    """Flags of classes with one cleared: "first": the smallest set one, "background": class 0; None: no flag is cleared."""
    if left_out is None:
        return present
    position = present.cumsum(0) if left_out == "first" else torch.arange(1, len(present) + 1, device=present.device)
    return present & (position > 1)


def largest_of_label(values: Tensor, labels: Tensor, count: int) -> Tensor:
    """For each position, the largest value of all positions with the same label.

    Args:
        values: (…).
        labels: (…) below the count.
        count: of labels.
    """
    table = values.new_full((count,), -torch.inf)
    return table.scatter_reduce(0, labels.flatten(), values.flatten(), "amax")[labels]
