"""Standard output and standard error that never end the program, whatever becomes of the terminal, the pipe or the file behind them."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class TolerantStream:
    """A text stream that is silent from the first error on: a full disk, a pipe whose reader is gone, a closed file.

    Characters that the encoding lacks are written as escapes.

    Args:
        stream: where the text goes; None, which Python gives where the stream was closed before the start: nowhere.
        name: of the stream, for the note.
    """

    def __init__(self, stream: TextIO | None, name: str):
        self._stream: TextIO = stream if stream is not None else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        self.name = name
        #: Where the loss of this stream is said.
        self.other: TolerantStream | None = None
        self.lost = False
        if isinstance(self._stream, io.TextIOWrapper):
            self._stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or do nothing once the stream is lost."""
        if not self.lost:
            try:
                self._stream.write(text)
            except (OSError, ValueError) as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Flush, or do nothing once the stream is lost."""
        if not self.lost:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._lose(error)

    def _lose(self, error: Exception) -> None:
        self.lost = True
        # What is still buffered would fail again at the exit of the program
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        if self.other is not None:
            reason = getattr(error, "strerror", None) or error
            self.other.write(f"note: {self.name} takes no more text ({reason}); the program goes on without it\n")
            self.other.flush()


@contextlib.contextmanager
def tolerant() -> Iterator[None]:
    """Within it an error of standard output or standard error is said once, on the other one, and ends nothing."""
    before = sys.stdout, sys.stderr
    out, err = TolerantStream(sys.stdout, "standard output"), TolerantStream(sys.stderr, "standard error")
    out.other, err.other = err, out
    sys.stdout, sys.stderr = out, err
    try:
        yield
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before
