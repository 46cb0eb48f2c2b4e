"""Reading of TensorBoard files, to continue the curves of an earlier part of a run."""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def events(path: Path) -> Iterator[Any]:
    """The events of a file, up to the first incomplete one, which a killed process or a broken disk may have left.

    Args:
        path: records of 8 bytes length, 4 bytes checksum, the event, 4 bytes checksum.

    Yields:
        tensorboardX's `Event`.
    """
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event  # slow to import, and not needed by a dry run

    left = path.stat().st_size
    with path.open("rb") as file:
        while len(head := file.read(12)) == 12:
            (size,) = struct.unpack("<Q", head[:8])
            left -= 16 + size
            if left < 0:
                return
            try:
                yield Event.FromString(file.read(size))
            except DecodeError:
                return
            file.read(4)


def next_number(folder: Path) -> int:
    """Number for the name of a new file that sorts after all files of a folder: the time, or one more than that of the last file.

    Args:
        folder: of the files of one step.
    """
    names = (re.match(r"events\.out\.tfevents\.(\d{1,10})\b", path.name) for path in folder.iterdir())
    return max([int(time.time()), *(int(name[1]) + 1 for name in names if name)])


def scalars_at(folder: Path, iteration: int) -> dict[str, float]:
    """The values that the runs of a folder logged at an iteration, without those that a later run superseded.

    Args:
        folder: of the files of one step; need not exist.
        iteration: their abscissa.

    Returns:
        By name.
    """
    found: dict[str, float] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):  # in the order in which TensorBoard reads them
        for event in events(path):
            if event.HasField("session_log") and event.step <= iteration:
                found = {}
            if event.step == iteration:
                found |= {v.tag: v.simple_value for v in event.summary.value if v.HasField("simple_value")}
    return found
