"""The cache of the scan of a split: which classes each mask shows.

The file is in DATA_ROOT/.cisscache, or in the user's cache folder if the data set is read-only. It contains a fingerprint of
the data files (names, sizes, modification times) and is replaced if the fingerprint differs. It is written under another
name and renamed, under a lock, so that only one of several processes or jobs scans.

It is a line with the fingerprint and the SHA-256 of the rest, followed by 32 bytes for each image, a bit for each class. The file may
come with data from an unknown source; the format contains no sizes or types that a reader would have to trust.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from utils.errors import UserError

FOLDER = ".cisscache"
_ROW, _LONGEST_HEADER = 256 // 8, 200  # bytes of the classes of one image, and of the first line
_FORMAT = 3  # of the file, and of what a scan refuses
_LOCK_SECONDS = 1800  # after this wait for the lock a job scans the masks itself


def fingerprint(paths: Sequence[str], what: str) -> str:
    """Hash of the names, sizes and modification times of the files.

    Args:
        paths: of the files.
        what: text for everything else that the result of the scan depends on.

    Raises:
        UserError: a file is missing or not a regular file; the message names the first ones.
    """
    digest = hashlib.sha256(f"{_FORMAT} {what}".encode())
    problems = []
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:  # also a loop of symbolic links
            problems.append(f"{path} cannot be opened: {error.strerror}")
            continue
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
    if problems:
        raise UserError(first_few(problems))
    return digest.hexdigest()


def condense(problems: Sequence[str], files: int, title: str) -> list[str]:
    """The problems of a split. A fault that nine of ten files or more have is listed three times and counted.

    Args:
        problems: a sentence for each; sentences that differ in the name of the file and in numbers alone are one fault.
        files: of the split.
        title: of the split.
    """
    faults: dict[str, list[str]] = {}
    for problem in problems:
        faults.setdefault(
            re.sub(r"\d+", "#", re.sub(r"(image|mask) .+? (has|is|does|cannot)\b", r"\1 \2", problem)), []
        ).append(problem)
    lines = []
    for same in faults.values():
        counted = len(same) > 3 and len(same) >= 0.9 * files
        lines += same[:3] if counted else same
        if counted:
            lines.append(f"{len(same) - 3} more of the {files} files of the {title} have the same fault")
    return lines


def first_few(problems: Sequence[str], most: int = 3) -> str:
    """The first few problems in one message."""
    rest = len(problems) - most
    return "; ".join(problems[:most]) + (f"; and {rest} more (--check_data lists all)" if rest > 0 else "")


def cached(root: Path, name: str, key: str, rows: int, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """The (rows, 256) bool table that `compute` returns, read from the cache if the cached fingerprint is `key`."""
    folder = _writable_folder(root)
    if folder is None:
        return compute()
    path = folder / f"{name}-{hashlib.sha256(os.path.abspath(root).encode()).hexdigest()[:8]}.scan"
    found = _load(path, key, rows)
    if found is not None:
        return found
    with _lock(path.with_suffix(".lock")):
        found = _load(path, key, rows)  # another job may have scanned the masks in the meantime
        if found is None:
            found = compute()
            _store(path, key, found)
    return found


def _writable_folder(root: Path) -> Path | None:
    """The folder of the cache: beside the data, else in the user's cache folder, else none."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    beside = root / FOLDER
    # The superuser can write everywhere, but should not change a data set for which nobody has write permission
    candidates = [beside] if beside.is_dir() or root.stat().st_mode & 0o222 else []
    for folder in (*candidates, user / FOLDER.removeprefix(".")):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK | os.X_OK):
                return folder
    return None


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """The lock of a cache file. On a file system without locks each job scans by itself."""
    lock = FileLock(path, timeout=_LOCK_SECONDS)
    try:
        lock.acquire()
    except (Timeout, OSError, NotImplementedError):
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _load(path: Path, key: str, rows: int) -> np.ndarray | None:
    """The table in the file, or None if the file is missing, is damaged, or has another fingerprint."""
    try:
        with path.open("rb") as stream:
            header = stream.readline(_LONGEST_HEADER)
            packed = stream.read(rows * _ROW + 1)
    except OSError:
        return None
    if header != _header(key, packed) or len(packed) != rows * _ROW:
        return None
    return np.unpackbits(np.frombuffer(packed, dtype=np.uint8).reshape(rows, _ROW), axis=1).astype(bool)


def _header(key: str, packed: bytes) -> bytes:
    return f"{key} {hashlib.sha256(packed).hexdigest()}\n".encode()


def _store(path: Path, key: str, presence: np.ndarray) -> None:
    """Write the table under another name and rename it; if the disk is full, the next run scans again."""
    with contextlib.suppress(OSError):
        temporary = path.with_suffix(f".{uuid.uuid4().hex[:8]}.tmp")
        try:
            with temporary.open("xb") as stream:
                packed = np.packbits(presence, axis=1).tobytes()
                stream.write(_header(key, packed) + packed)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
