"""Stop requests by SIGTERM and SIGINT: the iteration is finished, the state is saved, and the program ends. A second signal ends it at
once."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from utils.runtime import distributed

SIGNALS = (signal.SIGTERM, signal.SIGINT)

#: A launcher forwards a signal that the process group has received already; a second signal within this time is the same request.
FORWARDING_SECONDS = 5.0


class Stopped(Exception):
    """Raised by the trainer once the state is saved after a stop request.

    Args:
        signum: the signal that asked for it.
    """

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        #: 128 + the number of the signal, as for a process that a signal ended: 130 for Ctrl-C, 143 for SIGTERM.
        self.exit_code = 128 + signum


class StopRequest:
    """Context that records the first stop signal; a second one ends the program at once.

    Attributes:
        signum: number of the signal; 0 before one is received.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._received_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {signum: signal.signal(signum, self._receive) for signum in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def raise_on_all(self) -> None:
        """Stop all processes if any of them got a stop request; all processes must call this. No state is saved.

        Raises:
            Stopped: on all processes.
        """
        if signum := distributed.max_over_ranks(self.signum):
            raise Stopped(signum)

    def _receive(self, signum: int, frame: object) -> None:
        now = time.monotonic()
        if not self.signum:
            self.signum, self._received_at = signum, now
        elif "LOCAL_WORLD_SIZE" not in os.environ or now - self._received_at > FORWARDING_SECONDS:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
