"""A list of texts that processes share."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch


class SharedTexts:
    """Texts, such as the paths of a data set, in shared memory: another process is sent two handles, however many there are.

    Args:
        texts: as the operating system names files; also those that are not valid UTF-8.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        encoded = [os.fsencode(text) for text in texts]
        self._ends = torch.from_numpy(np.cumsum([0, *map(len, encoded)])).share_memory_()  # n+1
        self._bytes = torch.from_numpy(np.frombuffer(b"".join(encoded), np.uint8).copy()).share_memory_()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        start, end = self._ends[index : index + 2].tolist()
        return os.fsdecode(self._bytes[start:end].numpy().tobytes())
