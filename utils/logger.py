"""TensorBoard and the terminal, on the main process alone."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils import distributed


class Logger:
    """Scalars, pictures and lines of a run.

    Args:
        progress: whether to draw progress bars.
    """

    def __init__(self, progress: bool = True):
        self.writer = None
        self.progress = progress and distributed.is_main()

    def open(self, folder: Path, first_iteration: int = 0) -> None:
        """Start writing TensorBoard files.

        Args:
            folder: where they go.
            first_iteration: what an interrupted run logged from this iteration on is superseded.

        Raises:
            ValueError: the folder cannot be written.
        """
        if not distributed.is_main():
            return
        from tensorboardX import SummaryWriter  # slow to import, and not needed by a dry run

        try:
            self.writer = SummaryWriter(str(folder), purge_step=first_iteration or None)
        except OSError as error:
            raise ValueError(f"--logdir: {folder} cannot be written ({error.strerror}); name another folder") from error

    def info(self, text: str) -> None:
        """Print a line above the progress bars."""
        if distributed.is_main():
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def bar(self, iterable, title: str, total: int | None = None, initial: int = 0):
        """A progress bar around an iterable.

        Args:
            iterable: what is iterated.
            title: text before the bar.
            total: number of items, where the iterable does not know it.
            initial: items done before a resume.

        Returns:
            The iterable, wrapped; `set_postfix` shows values.
        """
        return tqdm(
            iterable,
            desc=title,
            total=total,
            initial=initial,
            disable=not self.progress,
            leave=False,
            dynamic_ncols=True,
        )

    def scalars(self, values: dict[str, float], iteration: int) -> None:
        """Log numbers by name."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, float(value), iteration)

    def image(self, name: str, picture: np.ndarray, iteration: int) -> None:
        """Log a picture, (H, W, 3) uint8."""
        if self.writer is not None:
            self.writer.add_image(name, picture, iteration, dataformats="HWC")

    def close(self) -> None:
        """Write out what is pending."""
        if self.writer is not None:
            self.writer.close()
