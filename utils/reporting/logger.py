"""TensorBoard and the terminal, on the main process alone."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from tqdm import tqdm

from utils.errors import UserError
from utils.reporting.events import next_number, scalars_at
from utils.runtime import distributed

#: Seconds between two flushes of the log to the disk.
FLUSH_SECONDS = 30.0

Item = TypeVar("Item")


class Logger:
    """Scalars, pictures and lines of a run.

    Args:
        progress: whether to draw progress bars.
    """

    #: Whether the user was told that there will be no TensorBoard files.
    missing_said: ClassVar[bool] = False

    def __init__(self, progress: bool = True):
        self.writer: Any = None
        self.flushed_at = 0.0
        self.before = 0
        self.progress = progress and distributed.is_main()

    def open(self, folder: Path, first_iteration: int | None = None, before: int = 0) -> None:
        """Start writing TensorBoard files. Without tensorboardX none are written, and a note is printed once.

        Args:
            folder: for the files.
            first_iteration: number of iterations done before. Values that an earlier run logged after them are superseded, so that no
                curve has two values at one place. Its validation after this iteration is superseded too, because it is repeated.
                None: nothing is superseded.
            before: iterations of the steps before this one, which are added to every abscissa: curves continue over steps.

        Raises:
            UserError: the folder cannot be written.
        """
        if not distributed.is_main():
            return
        self.before = before
        # Imported here because it is slow, and a dry run does not need it. The SummaryWriter of the library is not used: its thread
        # ends on a full disk, and later calls wait for ever.
        try:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import SessionLog
        except ImportError:
            self._note_missing_tensorboard()
            return

        kept: dict[str, float] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if first_iteration:
                kept = {
                    n: v
                    for n, v in scalars_at(folder, before + first_iteration).items()
                    if not n.startswith(("val/", "test/"))
                }
            # Readers sort the files by name, and the library's names follow the clock, which may have been set back.
            self.writer = EventsWriter(str(folder / f"events.out.tfevents.{next_number(folder):010}"))
        except OSError as error:
            raise UserError(f"--logdir: {folder} cannot be written ({error.strerror}); name another folder") from error
        self.flushed_at = time.monotonic()
        if first_iteration is not None:
            # Readers drop all values from this iteration on, also those of this iteration, which are therefore written again
            start = first_iteration or -before  # a step that begins anew supersedes all, wherever earlier values are
            self._write(start, session_log=SessionLog(status=SessionLog.START))
            self.scalars(kept, first_iteration)

    def _note_missing_tensorboard(self) -> None:
        """Print the note once in a program, whatever the number of its steps."""
        if not Logger.missing_said:
            Logger.missing_said = True
            self.info(
                "note: tensorboardX is not installed, so no TensorBoard files are written; pip install tensorboardX"
            )

    def _write(self, iteration: int, **content: Any) -> None:
        """Append an event to the file, unless a fault has ended the log."""
        if self.writer is None:
            return
        from tensorboardX.proto.event_pb2 import Event

        with self._tolerating_faults():
            self.writer.write_event(Event(wall_time=time.time(), step=self.before + iteration, **content))
            if time.monotonic() - self.flushed_at > FLUSH_SECONDS:
                self.writer.flush()
                self.flushed_at = time.monotonic()

    @contextlib.contextmanager
    def _tolerating_faults(self) -> Iterator[None]:
        """Context in which an error of the disk ends the TensorBoard log with a note and does not end the training."""
        try:
            yield
        except OSError as error:
            self.writer = None
            self.info(
                f"note: --logdir cannot be written any more ({error.strerror}); no TensorBoard for the rest of this step"
            )

    def info(self, text: str) -> None:
        """Print a line above the progress bars."""
        if distributed.is_main():
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def bar(self, iterable: Iterable[Item], title: str, total: int | None = None, initial: int = 0) -> tqdm[Item]:
        """A progress bar around an iterable.

        Args:
            iterable: what is iterated.
            title: text before the bar.
            total: number of items, including those before a resume; None: the length of the iterable.
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
        if self.writer is not None and values:
            from tensorboardX.proto.summary_pb2 import Summary

            listed = [Summary.Value(tag=name, simple_value=float(value)) for name, value in values.items()]
            self._write(iteration, summary=Summary(value=listed))

    def image(self, name: str, picture: np.ndarray, iteration: int) -> None:
        """Log a picture, (H, W, 3) uint8."""
        if self.writer is not None:
            from tensorboardX import summary

            self._write(iteration, summary=summary.image(name, picture, dataformats="HWC"))

    def hyperparameters(self, values: Mapping[str, str | float]) -> None:
        """Log what distinguishes this run from others: text, numbers, and True and False."""
        if self.writer is not None:
            from tensorboardX import summary

            # The list of all hyperparameters is not written: TensorBoard makes it from all runs, and would take that of one run alone
            _, start, end = summary.hparams(dict(values), {})
            self._write(0, summary=start)
            self._write(0, summary=end)

    def flush(self) -> None:
        """Write all logged values to the file, so that they are kept if the process is killed."""
        if self.writer is not None:
            with self._tolerating_faults():
                self.writer.flush()
            self.flushed_at = time.monotonic()

    def close(self) -> None:
        """Write pending events and close the file."""
        if self.writer is not None:
            with self._tolerating_faults():
                self.writer.close()
            self.writer = None
