"""The data set of a step: which images belong to it, and how an image and its mask become a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from dataset.transform import Pair, normalise
from utils.random_streams import TRAINING, stream_seed
from utils.types import IGNORE

Transform = Callable[[Tensor, Tensor], Pair]


class Source(Protocol):
    """All images and masks of a split in a fixed order, read from files or drawn; independent of the task."""

    #: Its name in messages, such as "split train_aug of voc".
    title: str
    #: (256,) int: class id by value of a mask, -1 where a value is ignored.
    class_table: np.ndarray

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W, 3) and mask (H, W), uint8, the mask in the class ids of the data set."""
        ...

    def files(self, index: int) -> tuple[str, ...]:
        """Names of the files of a sample, for messages."""
        ...

    def presence(self) -> np.ndarray:
        """(N, 256) bool: which ids each mask shows; in a domain-incremental data set, the domain of each image."""
        ...


class Splits(NamedTuple):
    """The three data sets of one step."""

    train: SegmentationSet
    val: SegmentationSet
    test: SegmentationSet


class SegmentationSet(Dataset):
    """Some images of a source, with the labels of a step.

    The random draws of a sample depend only on the seed, the purpose, the step, the epoch and the image. They do not depend
    on the number of worker processes or on the order in which samples are read, so no state of the workers has to be
    saved for a resume.

    Args:
        source: images and masks.
        indices: which of them, in this order.
        table: (256,) uint8, from class ids to labels (`Task.label_table`).
        transform: of image and mask, jointly.
        seed: of the random draws.
        step: of the task; an image that belongs to two steps has other random draws in each.
    """

    def __init__(
        self,
        source: Source,
        indices: Sequence[int] | np.ndarray,
        table: np.ndarray,
        transform: Transform,
        seed: int = 0,
        step: int = 0,
    ) -> None:
        self.source = source
        self.indices = np.asarray(indices, dtype=np.int64)
        self.transform = transform
        self.seed, self.step = seed, step
        self._table = table.astype(np.uint8).tobytes()
        # In shared memory, so that persistent workers read what the main process sets
        self._stream = torch.zeros((), dtype=torch.int64).share_memory_()
        self.set_epoch(0)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        """Image (3, H, W) float32, normalised, and labels (H, W) uint8, which take an eighth of the memory of int64."""
        return self.crop(position, int(self._stream))

    def crop(self, position: int, stream: int) -> tuple[Tensor, Tensor]:
        """The sample with random draws from the given stream instead of that of `set_epoch`."""
        index = int(self.indices[position])
        image, mask = self.source.read(index)
        state = torch.default_generator.get_state()
        torch.default_generator.manual_seed(stream_seed(stream, index))
        try:
            pair = self.transform(torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask))
        finally:
            torch.default_generator.set_state(state)
        return normalise(pair.image), self._labels(pair.mask)

    def _labels(self, mask: Tensor) -> Tensor:
        """Labels of a mask (H, W) by the look-up table; `translate` is four times as fast as indexing."""
        labels = bytearray(mask.contiguous().numpy()).translate(self._table)
        return torch.frombuffer(labels, dtype=torch.uint8).view(mask.shape)

    def class_shares(self, position: int) -> np.ndarray:
        """(256,) share of each class id in the annotation of a sample, of classes of other steps too."""
        _, mask = self.source.read(int(self.indices[position]))
        counts = np.bincount(mask.ravel(), minlength=256)
        ids = self.source.class_table
        return np.bincount(ids[ids >= 0], counts[ids >= 0], minlength=256) / mask.size

    def set_epoch(self, epoch: int, purpose: str = TRAINING) -> None:
        """Choose the random draws of the next samples, in running workers too.

        Args:
            epoch: number of the pass over the images.
            purpose: what the samples are read for; each purpose has its own random draws.
        """
        self._stream.fill_(stream_seed(self.seed, "crops", purpose, self.step, epoch))

    def files(self, position: int) -> tuple[str, ...]:
        """Names of the files behind a sample."""
        return self.source.files(int(self.indices[position]))


class JoinedSet(Dataset):
    """Several sets, one after the other: the samples of a step and those of a replay memory.

    Args:
        parts: in this order.
    """

    def __init__(self, parts: Sequence[SegmentationSet]) -> None:
        self.parts = list(parts)
        self._samples: ConcatDataset[tuple[Tensor, Tensor]] = ConcatDataset(self.parts)

    @property
    def indices(self) -> np.ndarray:
        """Indices of the samples of the step itself, the first part."""
        return self.parts[0].indices

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        return self._samples[position]

    def set_epoch(self, epoch: int, purpose: str = TRAINING) -> None:
        """See `SegmentationSet.set_epoch`."""
        for part in self.parts:
            part.set_epoch(epoch, purpose)

    def files(self, position: int) -> tuple[str, ...]:
        """Names of the files behind a sample."""
        for part in self.parts:
            if position < len(part):
                return part.files(position)
            position -= len(part)
        raise IndexError("the joined set has no such sample")


def select(
    presence: np.ndarray, wanted: Sequence[int], allowed: Sequence[int] | None = None, excluded: Sequence[int] = ()
) -> np.ndarray:
    """Indices of the images that belong to a step, by the classes that they show.

    Args:
        presence: (N, 256) bool, which ids each image shows.
        wanted: an image must show at least one of these ids.
        allowed: an image must show no other ids than these and 255 (disjoint setup); None: any other ids.
        excluded: an image must show none of these ids.

    Returns:
        (M,) int64, sorted.

    Reference:
        MiB (CVPR 2020), section 5.1: overlapped and disjoint setup.
    """
    chosen = presence[:, list(wanted)].any(axis=1) & ~presence[:, list(excluded)].any(axis=1)
    if allowed is not None:
        foreign = np.ones(256, dtype=bool)
        foreign[[*allowed, IGNORE]] = False
        chosen &= ~presence[:, foreign].any(axis=1)
    return np.flatnonzero(chosen)
