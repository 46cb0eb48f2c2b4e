"""Messages for the user if the memory of the machine or of the GPU is full, which torch reports in many ways."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from utils.errors import UserError

#: Parts of the messages of torch if memory is full, or if the system ended a process because of that.
_SIGNS = ("out of memory", "can't allocate memory", "not enough memory")

#: What is said of a process that loads data and has ended by itself.
WORKER_ENDED = (
    "a process that loads data ended (did the system end it because the memory is full?); "
    "lower --num_workers, then repeat the command with --resume"
)


def shortage(error: BaseException) -> str:
    """A message for an error whose cause is full memory or a worker process that ended.

    Args:
        error: that ended the program.

    Returns:
        The message with its remedy; "" for any other error.
    """
    text = str(error)
    if (
        "DataLoader worker (pid" in text
    ):  # "DataLoader worker process" is in the message of an exception raised in a worker
        return WORKER_ENDED
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or any(sign in text for sign in _SIGNS):
        return "the memory is full; lower --batch_size or --crop_size, or use --opt_level O1 (--trial_batch checks this at the start)"
    return ""


@contextlib.contextmanager
def trial(batch_size: int, pixels: int) -> Iterator[None]:
    """Context that turns errors about full memory, of any device, into a UserError about the trial batch.

    Args:
        batch_size: images of a batch.
        pixels: height and width of the images.

    Raises:
        UserError: with the remedy.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not shortage(error):
            raise
        raise UserError(
            f"--trial_batch: a batch of {batch_size} at {pixels} px does not fit into the memory; "
            "lower --batch_size or --crop_size, or use --opt_level O1"
        ) from error
