"""Seeds of the random streams. A seed depends on names only, so no state of a generator has to be saved.

docs/reliability.md lists the streams of the program.
"""

from __future__ import annotations

import hashlib

#: Purposes of random crops, beside those of the parts of methods (`methods.base.Part.purpose`).
TRAINING = "training"


def stream_seed(*names: int | str) -> int:
    """Seed of the stream with these names.

    Args:
        names: such as the seed of the run, a purpose, the step and the epoch, in a fixed order.

    Returns:
        A number from 0 to 2⁶³ − 1. Streams with different names have independent seeds.
    """
    text = "/".join(map(str, names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
