"""Standard output and standard error whose errors (a closed pipe, a full disk) do not end the program."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class TolerantStream:
    """A text stream that writes nothing more after its first error: a full disk, a pipe whose reader ended, a closed file.

    Characters that the encoding lacks are written as escapes.

    Args:
        stream: to write to. Python gives None for a stream that was closed before the start; the text is then discarded.
        name: of the stream, for the note.
    """

    def __init__(self, stream: TextIO | None, name: str):
        self._stream: TextIO = stream if stream is not None else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        self.name = name
        #: The stream to which an error of this stream is reported.
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
        # Buffered text would raise the error again at the exit of the program
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
    """Context in which an error of standard output or standard error is reported once, on the other one, and does not end the program."""
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
