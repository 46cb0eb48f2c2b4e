"""`Context`: what the trainer and the phases of a method share: device, log, stop request, and the time of the last save."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from utils.reporting.logger import Logger
from utils.runtime.gate import Requests
from utils.runtime.signals import StopRequest


@dataclass
class Context:
    """Device, log and requests of a training.

    Attributes:
        device: where to compute.
        log: terminal and TensorBoard.
        stop: the process's stop request.
        files_of_batch: names the files of a batch of the current epoch, by its number, for messages.
        save_minutes: minutes after which the state is saved within an epoch; 0: at the end of epochs only.
        saved_at: when the state was saved last, on the monotonic clock.
    """

    device: torch.device
    log: Logger
    stop: StopRequest = field(default_factory=StopRequest)
    files_of_batch: Callable[[int], list[str]] = lambda number: []
    save_minutes: float = 0.0
    saved_at: float = field(default_factory=lambda: time.monotonic())

    def requests(self) -> Requests:
        """What this process asks of all: a stop after a signal, and a save after `save_minutes`."""
        due = self.save_minutes > 0 and time.monotonic() - self.saved_at > 60 * self.save_minutes
        return Requests(self.stop.signum, due)

    def saved(self) -> None:
        """Record that the state was saved now."""
        self.saved_at = time.monotonic()
