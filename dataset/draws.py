"""Random crops of single classes, for parts of methods that look at one class after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset.base import SegmentationSet
from utils.random_streams import stream_seed


class ClassDraws(Dataset):
    """Random crops of some images, drawn with replacement. Draw k is the same on all processes and after a resume.

    Args:
        data: the images of a step with their training transform.
        positions: of the images to draw from, at least one.
        label: one of the step's labels; each label has its own draws.
        length: number of draws.
    """

    def __init__(self, data: SegmentationSet, positions: Sequence[int], label: int, length: int) -> None:
        self.data, self.positions, self.label, self.length = data, positions, label, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """As `SegmentationSet.__getitem__`."""
        stream = stream_seed(self.data.seed, "draws of a class", self.data.step, self.label, number)
        return self.data.crop(self.positions[stream % len(self.positions)], stream)


class ClassShares(Dataset):
    """The shares of all class ids in the annotation of each image of a step.

    Args:
        data: the images.
    """

    def __init__(self, data: SegmentationSet) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        """(256,) float64, and the position."""
        return torch.from_numpy(self.data.class_shares(position)), torch.tensor(position)
