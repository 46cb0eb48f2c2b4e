"""Exit codes and the message with which the program ends."""

from __future__ import annotations

import re
import sys
import traceback

from utils.errors import UserError
from utils.runtime import distributed, memory
from utils.runtime.signals import Stopped

#: Exit codes: a user's error, a loss that is not finite, another process that ended.
USER_ERROR, NON_FINITE, PEER_LOST = 2, 3, 4


class NonFiniteLoss(ArithmeticError):
    """A loss term is NaN or infinite, more often than `--skip_nonfinite` allows."""


class NonFiniteNetwork(NonFiniteLoss):
    """A weight or a statistic of the network is NaN or infinite, so that training cannot continue."""


def report(error: Exception, debug: bool) -> int | None:
    """Print on stderr, once over all processes, why the program ends.

    Args:
        error: the exception that ends it.
        debug: also print the traceback.

    Returns:
        The exit code; None for a bug, which the caller raises again.
    """
    said, code = distributed.is_main(), NON_FINITE
    text = f"error: {error}"
    if isinstance(error, Stopped):
        text, code = f"{error}; the same command with --resume continues", error.exit_code
    elif isinstance(error, (UserError, OSError)):
        said, code = distributed.should_print(error), USER_ERROR
        # The text of an error of a process that loads data is a traceback, whose last line is the message.
        last_line = re.compile(rf"\n[\w.]*{type(error).__name__}: ")
        text = f"error: {last_line.split(str(error))[-1].strip()}"
    elif lack := memory.shortage(error):
        said, code, text = True, USER_ERROR, f"error: {lack}"
    elif distributed.peer_lost(error):
        said, code = True, PEER_LOST
        text = f"error: process {distributed.rank()} ends because another process ended ({str(error).splitlines()[0]})"
    elif not isinstance(error, NonFiniteLoss):
        return None
    if debug:
        traceback.print_exc()
    if said:
        print(text, file=sys.stderr)
    return code
