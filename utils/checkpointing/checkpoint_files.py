"""Reading and writing of checkpoints, safe against kills, full disks, damaged files and files that contain code.

A file is written under another name, flushed to the disk, read back and verified, and only then renamed over the previous one, so
a good checkpoint is never replaced by a damaged one. It contains a checksum. Before a file is read with `weights_only=True`,
its pickle is scanned (`pickle_scan`): it must contain tensors and plain Python values only, as the official checkpoints do.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import io
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from utils.checkpointing.pickle_scan import PickleScan, Refused
from utils.errors import UserError

#: Prefix of the official parameter names: their model was saved inside its distributed wrapper.
PREFIX = "module."

#: Official name of LSKD's λ, which is not part of the network in this program.
LOSS_WEIGHTS = "head.lossweights"

CHECKSUM = "checksum"

#: Key of files of this program. A file that has it needs a checksum, so damage of the checksum entry is noticed.
FORMAT, FORMAT_VERSION = "format", "class-incremental-1"

#: Keys that no official file has; they identify files of this program whose format key is damaged.
OWN_KEYS = frozenset(("options", "task", "state"))

#: Bytes of a file for each tensor besides its numbers: name in the weights, entry in the archive, padding.
RECORD_BYTES = 512

#: Largest size of the pickle in a checkpoint, in bytes; that of a ResNet-101 with its momenta has 0.1 MB.
LARGEST_PICKLE = 1 << 26

#: First bytes of the format of torch < 1.6: the pickle of a constant, the first of five pickles before the bytes of the tensors.
LEGACY_START, LEGACY_PICKLES = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2), 5


def _numpy_scalars() -> list:
    """Types in official files beside tensors: numpy numbers, in which scores are stored. They contain no code."""
    multiarray = importlib.import_module(f"numpy.{'_core' if hasattr(np, '_core') else 'core'}.multiarray")
    allowed: list = [multiarray.scalar, np.dtype]
    if hasattr(torch.serialization, "safe_globals"):  # torch >= 2.5 accepts (object, name)
        # Files written with numpy 1 name the module numpy.core, with numpy 2 numpy._core; the function is the same.
        allowed += [(multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return allowed + [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)]


@contextlib.contextmanager
def _allowing_numpy_scalars() -> Iterator[None]:
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
            sha.update(plain.view(torch.uint8).numpy().data if plain.numel() else b"")
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
        path: of the file; missing folders are created.
        state: tensors and plain values. A "checksum" entry is added to the file.
        before: where the previous file is kept, or None. After a kill between the two renames it is there, and no file is at the path.

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
            f"the checkpoint cannot be written ({reason}); free some space or repair the disk, then repeat the command",
            str(path),
        ) from error
    finally:
        aside.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _serialise(state: dict, file: IO[bytes]) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:
        # The writer of torch reports a failing disk as a RuntimeError ("enforce fail ... unexpected pos").
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise OSError(errno.EIO, str(error).splitlines()[0]) from error


def _read_back(path: Path) -> None:
    try:
        load(path)
    except UserError as error:
        raise OSError(errno.EIO, "it is damaged when it is read back") from error


def discard(path: str | os.PathLike) -> None:
    """Remove a checkpoint, and the unfinished next version that a killed process may have left."""
    path = Path(path)
    for file in (path, _aside(path)):
        file.unlink(missing_ok=True)


def keep(path: Path, kept: Path) -> Path | None:
    """Give a checkpoint a second name, under which it is kept when it is replaced. A file that had this name is deleted.

    Args:
        path: of the checkpoint.
        kept: the second name, in the same folder.

    Returns:
        The second name; None if there is no checkpoint.

    Raises:
        OSError: the file system has no hard links, and no space for a copy.
    """
    if not path.is_file():
        return None
    aside = _aside(kept)
    aside.unlink(missing_ok=True)
    try:
        try:
            os.link(path, aside)
        except OSError:
            shutil.copy2(path, aside)
        os.replace(aside, kept)
    finally:
        aside.unlink(missing_ok=True)  # renaming between two hard links of one file has no effect
    return kept


def _aside(path: Path) -> Path:
    """The name under which a checkpoint is written before it is renamed."""
    return path.with_name(f".{path.name}.writing")


def _sync_folder(folder: Path) -> None:
    """Flush a rename to the disk, on systems that can open folders."""
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
        Its dictionary, without checksum and format key.

    Raises:
        UserError: missing, truncated or damaged, not a checkpoint, or holding more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    try:
        state = _read(path)
    except Refused as error:
        raise UserError(
            f"checkpoint {path} is refused: it holds {error}; take the file from its source again"
        ) from error
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, pickle.UnpicklingError, LookupError, ValueError, TypeError,
            AttributeError, OverflowError, MemoryError, AssertionError, ImportError) as error:  # fmt: skip
        raise UserError(
            f"checkpoint {path} is truncated or damaged, or no checkpoint at all ({type(error).__name__}); "
            "restore it or train the step again"
        ) from error
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


def _read(path: Path) -> Any:
    """Content of a file, read after its pickle was scanned."""
    with open(path, "rb") as file:
        start = file.read(len(LEGACY_START))
    source: Path | io.BytesIO = path
    if start.startswith(b"PK\x03\x04"):
        _scan_archive(path)
    elif start == LEGACY_START:
        # From memory: torch would check whether a file is a tar archive, the oldest format, and unpack it to disk
        source = io.BytesIO(path.read_bytes())
        scan = PickleScan(path.stat().st_size)
        for _ in range(LEGACY_PICKLES):
            scan.follow(source)
        source.seek(0)
    else:
        raise ValueError("its first bytes are not those of a file of torch")
    with _allowing_numpy_scalars(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and numpy may warn of the values in a damaged file
        return torch.load(source, map_location="cpu", weights_only=True)


def _scan_archive(path: Path) -> None:
    """Refuse an archive whose records or pickle are not those of a checkpoint."""
    file_size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        sizes = {record.filename.partition("/")[2]: record.file_size for record in archive.infolist()}
        packed = any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist())
        if packed or sum(record.file_size for record in archive.infolist()) > file_size:  # torch does not compress
            raise Refused("records that unpack to more than its size")
    # The reader of `torch.load`; another reader might read another pickle from a crafted archive
    reader = torch._C.PyTorchFileReader(str(path))
    if sorted(reader.get_all_records()) != sorted(sizes) or sizes["data.pkl"] > LARGEST_PICKLE:
        raise Refused("strange records")
    records = {name.removeprefix("data/"): size for name, size in sizes.items() if name.startswith("data/")}
    PickleScan(file_size, records).follow(io.BytesIO(reader.get_record("data.pkl")))


def require_places(*paths: Path) -> None:
    """Refuse to start if a file could not be written because something else, such as a folder, has its name.

    Args:
        paths: of files that will be written, checkpoints or others; the names of temporary files are checked too.

    Raises:
        UserError: names the folder or other file that has the name.
    """
    for place in (place for path in paths for place in (path, _aside(path))):
        if place.exists() and not place.is_file():
            raise UserError(f"{place} is not a file, and a file must be written there; move it away")


def size(state: Any) -> int:
    """Bytes of the tensors in a nested structure and of their entries in a file: the size of its checkpoint up to some kilobytes.

    Args:
        state: dicts, lists, tuples, tensors and plain values.
    """
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size() + RECORD_BYTES
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(size, parts))


def require_space(folder: str | os.PathLike, needed: int) -> None:
    """Refuse to start if the disk has too little space.

    Args:
        folder: of the checkpoints; the space of its nearest existing parent is measured.
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
    """Add the prefix "module." to the names of a state dict, as in official files."""
    return {PREFIX + name: value for name, value in state.items()}


def without_prefix(state: dict[str, Any]) -> dict[str, Any]:
    """Remove the prefix "module." from the names of a state dict that have it."""
    return {name.removeprefix(PREFIX): value for name, value in state.items()}
