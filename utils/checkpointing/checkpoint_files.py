"""Checkpoints that survive a kill, a full disk and a flipped bit, and that run no code when they are read.

A file is written beside its place, flushed to the disk, read back and verified, and only then renamed over the previous one,
so the last good checkpoint is never replaced by a bad one. Its content carries a checksum. Files are read with
`weights_only=True`: tensors and plain Python values only, which the official checkpoints satisfy.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.errors import UserError

#: Prefix of the official parameter names: their model was saved inside its distributed wrapper.
PREFIX = "module."

#: Official name of LSKD's λ, which lives outside the network here.
LOSS_WEIGHTS = "head.lossweights"

CHECKSUM = "checksum"

#: Marks files of this program, so that one whose checksum entry itself was damaged is not taken for an official file.
FORMAT, FORMAT_VERSION = "format", "class-incremental-1"

#: What no official file holds, for files in which the mark was damaged as well.
OWN_KEYS = frozenset(("options", "task", "state"))

#: Deeper or larger structures are no checkpoint: a few hundred bytes of pickle can stand for more lists than there are atoms.
DEEPEST, MOST_ITEMS = 50, 10_000_000

#: What a training computes and counts in; for others torch lacks half of its functions.
PLAIN_TYPES = frozenset(
    (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    + (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
)

#: What a file needs beside the numbers of a tensor: its name in the weights, its place in the archive, padding.
RECORD_BYTES = 512

#: A tensor of more bytes than its file repeats its elements, or has none; below this size that does no harm.
HARMLESS_BYTES = 1 << 20


def _numpy_scalars() -> list:
    """What the official files hold beside tensors: numpy floats as scores. Plain data, no code."""
    multiarray = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray
    allowed: list = [multiarray.scalar, np.dtype]
    if hasattr(torch.serialization, "safe_globals"):  # torch >= 2.5 takes names beside objects
        # Files written by numpy 1 name numpy.core, those of numpy 2 numpy._core: both stand for the same function.
        allowed += [(multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return allowed + [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)]


@contextlib.contextmanager
def _allowing_numpy_scalars():
    if hasattr(torch.serialization, "safe_globals"):
        with torch.serialization.safe_globals(_numpy_scalars()):
            yield
    else:
        torch.serialization.add_safe_globals(_numpy_scalars())
        yield


def digest(value: Any) -> str:
    """SHA-256 over a nested structure of tensors and plain values.

    Args:
        value: dicts, lists, tuples, tensors, numbers, strings, None; dicts are hashed in the order of their keys' text.

    Returns:
        Hexadecimal digest.
    """
    sha = hashlib.sha256()

    def feed(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            sha.update(f"tensor {item.dtype} {tuple(item.shape)}".encode())
            plain = item.detach().cpu().contiguous().reshape(-1)
            sha.update(memoryview(plain.view(torch.uint8).numpy()) if plain.numel() else b"")
        elif isinstance(item, dict):
            sha.update(f"dict {len(item)}".encode())
            for key in sorted(item, key=repr):
                sha.update(repr(key).encode())
                feed(item[key])
        elif isinstance(item, (list, tuple)):
            sha.update(f"sequence {len(item)}".encode())
            for element in item:
                feed(element)
        else:
            sha.update(repr(item).encode())

    feed(value)
    return sha.hexdigest()


def save(path: str | os.PathLike, state: dict[str, Any], before: Path | None = None) -> None:
    """Write a checkpoint so that the path holds either the previous file or this one, complete and verified.

    Args:
        path: where it goes; missing folders are made.
        state: tensors and plain values. A "checksum" entry is added to the file.
        before: where the previous file is kept, or None; a kill at the wrong moment leaves it there and nothing at the path.

    Raises:
        OSError: the disk is full or broken; the previous file is untouched and no partial file is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    try:
        with open(aside, "wb") as file:
            state = {**state, FORMAT: FORMAT_VERSION}
            _serialise({**state, CHECKSUM: digest(state)}, file)
            file.flush()
            os.fsync(file.fileno())
        _read_back(aside)
        if before is not None and path.is_file():
            os.replace(path, before)
        os.replace(aside, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno,
            f"the checkpoint cannot be written ({reason}); make room or mend the disk, then repeat the command",
            str(path),
        ) from error
    finally:
        aside.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _serialise(state: dict, file) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:
        # torch's writer reports a failing disk as a RuntimeError of its own ("enforce fail ... unexpected pos").
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise OSError(errno.EIO, str(error).splitlines()[0]) from error


def _read_back(path: Path) -> None:
    try:
        load(path)
    except UserError as error:
        raise OSError(errno.EIO, "it reads back damaged") from error


def discard(path: str | os.PathLike) -> None:
    """Remove a checkpoint, and what a killed process left of its next version."""
    path = Path(path)
    for file in (path, _aside(path)):
        file.unlink(missing_ok=True)


def _aside(path: Path) -> Path:
    """Where a checkpoint is written before it takes its place."""
    return path.with_name(f".{path.name}.writing")


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where the system can open folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without running any code of it.

    Args:
        path: a file of this program or an official one.

    Returns:
        The dictionary it holds, without checksum and format mark.

    Raises:
        UserError: missing, truncated or damaged, not a checkpoint, or holding more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    try:
        state, strange = _read(path)
    except pickle.UnpicklingError as error:
        raise UserError(_unpickling_message(path, error)) from error
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, KeyError, ValueError, TypeError, AttributeError, IndexError,
            OverflowError, MemoryError, UnicodeDecodeError, AssertionError, ImportError) as error:  # fmt: skip
        raise UserError(
            f"checkpoint {path} is truncated or damaged, or no checkpoint at all ({type(error).__name__}); "
            "restore it or train the step again"
        ) from error
    if strange:
        raise UserError(
            f"checkpoint {path} is refused: it holds {strange}, which no training writes; take the file from its source again"
        )
    if not isinstance(state, dict):
        raise UserError(
            f"checkpoint {path} holds a {type(state).__name__}, not a dictionary; it is no checkpoint of this program"
        )
    expected = state.pop(CHECKSUM, None)
    ours = expected is not None or FORMAT in state or not OWN_KEYS.isdisjoint(state)
    if ours and digest(state) != expected:
        raise UserError(
            f"checkpoint {path} is damaged: its content does not match its checksum; restore it or train the step again"
        )
    state.pop(FORMAT, None)
    return state


def _read(path: Path) -> tuple[Any, str]:
    """What a file holds, and what of it no checkpoint has ("" for nothing)."""
    file_size = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:  # torch packs nothing: an archive that unpacks to more is a bomb
            if sum(record.file_size for record in archive.infolist()) > file_size:
                return {}, "records that unpack to more than its size"
    with _allowing_numpy_scalars(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a damaged file may be unpickled into what torch or numpy warn of
        state = torch.load(path, map_location="cpu", weights_only=True)
    return state, _strange(state, file_size + HARMLESS_BYTES)


def _strange(state: Any, most_bytes: int) -> str:
    """What of a structure would stop or exhaust the program that works with it; "" for nothing."""
    waiting, count = [(state, 0)], 0
    while waiting:
        item, depth = waiting.pop()
        count += 1
        if depth > DEEPEST or count > MOST_ITEMS:
            return "lists in lists beyond measure"
        if isinstance(item, dict):
            waiting += [(value, depth + 1) for value in item.values()]
        elif isinstance(item, (list, tuple)):
            waiting += [(value, depth + 1) for value in item]
        elif isinstance(item, torch.Tensor):
            plain = item.layout == torch.strided and item.device.type == "cpu" and item.dtype in PLAIN_TYPES
            if not plain or item.is_neg():
                return "a tensor that is not plain (sparse, quantised, without data or of a strange type)"
            if item.numel() * item.element_size() > most_bytes:
                return "a tensor larger than the file"
    return ""


def _unpickling_message(path: Path, error: Exception) -> str:
    text = str(error)
    if "GLOBAL" in text or "Unsupported class" in text:
        return f"checkpoint {path} is refused: it holds Python objects beside tensors, which could run code when loaded"
    return f"checkpoint {path} is truncated or damaged, or no checkpoint at all; restore it or train the step again"


def require_places(*paths: Path) -> None:
    """Refuse to start what could not be written because something else, such as a folder, stands in its place.

    Args:
        paths: of files that will be written, checkpoints or others; they and what is written beside them are looked at.

    Raises:
        UserError: names what is in the way.
    """
    for place in (place for path in paths for place in (path, _aside(path))):
        if place.exists() and not place.is_file():
            raise UserError(f"{place} is not a file, and a file must be written there; move it away")


def size(state: Any) -> int:
    """Bytes of the tensors in a nested structure and of their places in a file: the size of its checkpoint, but for some kilobytes.

    Args:
        state: dicts, lists, tuples, tensors and plain values.
    """
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size() + RECORD_BYTES
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(size, parts))


def require_space(folder: str | os.PathLike, needed: int) -> None:
    """Refuse to start what could not be saved.

    Args:
        folder: where checkpoints go; its nearest existing parent is asked.
        needed: bytes.

    Raises:
        UserError: less is free, or the folder cannot be written.
    """
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(
            f"--checkpoint {folder}: {place} is not a folder that can be written; name another with --checkpoint"
        )
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"--checkpoint {folder}: {free / 1e6:.0f} MB free, the checkpoints need {needed / 1e6:.0f} MB; "
            "free some space or name another folder with --checkpoint"
        )


def with_prefix(state: dict[str, Any]) -> dict[str, Any]:
    """Parameter names as the official files have them."""
    return {PREFIX + name: value for name, value in state.items()}


def without_prefix(state: dict[str, Any]) -> dict[str, Any]:
    """Parameter names without the distributed wrapper's prefix, where they have it."""
    return {name.removeprefix(PREFIX): value for name, value in state.items()}
