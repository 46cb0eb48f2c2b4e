"""The sums of `utils.latent_space` over all classes at once, without a number that the host has to read.

The functions of that module go through the classes that a batch shows and select their features. Which these are, and how many positions
each has, the host would have to wait for. Here every feature number is given its class and the channel of the prototype that it belongs
to, and the classes that are absent have weights of 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
    """Where each feature number belongs in a table of C classes and D channels.

    Attributes:
        entry: (B, D, h, w) place in the table of (C + 1) · D numbers, whose last row takes the labels from C on.
        label: (B, h, w) row of the table.
        numbers: (C,) positions of each class.
    """

    entry: Tensor
    label: Tensor
    numbers: Tensor


def places(features: Tensor, labels: Tensor, classes: int, tall: bool, exact: bool) -> Places:
    """Places of all feature numbers; the arguments are those of `utils.latent_space.rows_of_class`, and C."""
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
        at: their places.
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
    """Flags of classes, one cleared: "first": the smallest that is set, "background": class 0; None: as they are."""
    if left_out is None:
        return present
    position = present.cumsum(0) if left_out == "first" else torch.arange(1, len(present) + 1, device=present.device)
    return present & (position > 1)


def largest_of_label(values: Tensor, labels: Tensor, count: int) -> Tensor:
    """(…) for each position the largest value of all positions with its label.

    Args:
        values: (…).
        labels: (…) below the count.
        count: of labels.
    """
    table = values.new_full((count,), -torch.inf)
    return table.scatter_reduce(0, labels.flatten(), values.flatten(), "amax")[labels]
