"""FileSource: the images and masks of a layout, with the scan that finds which classes each mask shows."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from dataset.cache import cached, fingerprint, first_few
from dataset.files import inspect, read_pair
from dataset.layout import BadEntries, FilePair, Layout
from dataset.shared_texts import SharedTexts
from utils.errors import UserError

_LOG = logging.getLogger(__name__)
#: Scans of fewer masks than this are not logged.
_LOGGED_FROM = 500


class FileSource:
    """One split of a data set on disk as a source of `dataset.base`.

    Args:
        layout: where the files are.
        root: `--data_root`.
        train: the training split, or the validation split.
        problems: a list to which a sentence is added for each entry of the split that cannot be used; None: such an entry raises.

    Raises:
        UserError: the split is missing or empty, or has entries that cannot be used.
    """

    def __init__(self, layout: Layout, root: Path, train: bool, problems: list[str] | None = None) -> None:
        self.layout, self.root = layout, root
        self.split = layout.split_names[0 if train else 1]
        self.title = f"split {self.split} of {layout.name}"
        try:
            pairs: list[FilePair] = layout.pairs(root, train)
        except BadEntries as error:
            if problems is None:
                raise
            problems += error.problems
            pairs = error.good
        self._paths = SharedTexts([path for pair in pairs for path in (pair.image, pair.mask)])  # 2N
        self._domains = np.array([pair.domain for pair in pairs], dtype=np.int64)
        #: (256,) int16, from the values of a mask to class ids, -1 for values no mask may have
        self.class_table = layout.class_table(len(layout.read_classes(root)))
        self._colours = layout.mask_colours(root)

    def __len__(self) -> int:
        return len(self._domains)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W, 3) and mask (H, W), uint8; UserError that names the file if one of them is damaged."""
        return read_pair(*self.files(index), self._colours)

    def files(self, index: int) -> tuple[str, str]:
        """Paths of the image and the mask."""
        return self._paths[2 * index], self._paths[2 * index + 1]

    def presence(self) -> np.ndarray:
        """(N, 256) bool: which class ids each mask shows (its domain in a domain-incremental data set).

        The masks are read once, and again only when a file has changed.

        Raises:
            UserError: a file is missing, a mask cannot be used or does not fit its image; names the files.
        """
        if self.layout.domains:
            return self.domains()
        meaning = f"{self.class_table.tolist()}"
        if self._colours is not None:
            meaning += f" {sorted(self._colours.values.items())}"
        key = fingerprint([self._paths[i] for i in range(len(self._paths))], meaning)
        return cached(self.root, f"{self.layout.name}-{self.split}", key, len(self), self._scan)

    def domains(self) -> np.ndarray:
        """(N, 256) bool: the domain of each image, without reading the files."""
        shown = np.zeros((len(self), 256), dtype=bool)
        shown[np.arange(len(self)), self._domains] = True
        return shown

    def _scan(self) -> np.ndarray:
        if len(self) >= _LOGGED_FROM:
            _LOG.info("reading the %d masks of %s, once", len(self), self.title)
        shown, problems = self.inspect(np.arange(len(self)))
        problems = [problem for problem in problems if problem]
        if problems:
            raise UserError(first_few(problems))
        return shown

    def inspect(self, indices: np.ndarray, decode: bool = False) -> tuple[np.ndarray, list[str]]:
        """Read the masks and the headers of the images (with `decode`, whole images) of some samples.

        Returns:
            (M, 256) bool, the class ids that each mask shows, all False for a sample with a problem; and M texts, the problem of each
            sample or "".
        """
        pairs = [self.files(index) for index in indices]
        valid = frozenset(np.flatnonzero(self.class_table >= 0).tolist())
        found = inspect(pairs, valid, decode, colours=self._colours)
        shown = np.zeros((len(pairs), 256), dtype=bool)
        for row, (values, _) in zip(shown, found):
            row[self.class_table[values]] = True
        return shown, [problem for _, problem in found]
