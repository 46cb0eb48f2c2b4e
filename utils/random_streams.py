"""Seeds of the random streams: each is a function of names alone, so that no generator has to be saved or handed on.

docs/reliability.md lists the streams of the program.
"""

from __future__ import annotations

import hashlib

#: Purposes of random crops, beside those that parts of methods name (`methods.base.Part.purpose`).
TRAINING = "training"


def stream_seed(*names: int | str) -> int:
    """Seed of the stream that the names stand for.

    Args:
        names: such as the seed of the run, a purpose, the step and the epoch, in a fixed order.

    Returns:
        A number from 0 to 2⁶³ − 1. Streams whose names differ in one place have seeds that have nothing in common.
    """
    text = "/".join(map(str, names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
