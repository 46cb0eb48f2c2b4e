"""SIGTERM and SIGINT as a request: the iteration is finished, the state saved, and the program ends. A second one ends it at once."""

from __future__ import annotations

import os
import signal


class Stopped(Exception):
    """Raised by the trainer once the state is saved after a stop request.

    Args:
        signum: the signal that asked for it.
    """

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        #: What a shell expects of a process ended by this signal: 130 for Ctrl-C, 143 for SIGTERM.
        self.exit_code = 128 + signum


class StopRequest:
    """Remembers the first stop signal.

    Attributes:
        signum: 0 until a signal came, then its number.
    """

    def __init__(self) -> None:
        self.signum = 0

    def install(self) -> None:
        """Listen to SIGTERM and SIGINT from now on."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._receive)

    def _receive(self, signum: int, frame: object) -> None:
        if self.signum:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self.signum = signum
