"""What the scan of a split found, kept in a file from run to run.

The file lies in DATA_ROOT/.cisscache, or in the user's cache folder where the data set is read-only. It carries a
fingerprint of the files (names, sizes, times of change), and one that does not match is replaced. It is written aside
and renamed, under a lock, so that several processes and jobs scan once between them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from utils.errors import UserError

FOLDER = ".cisscache"
_FORMAT = 2  # of the file, and of what a scan refuses
_LOCK_SECONDS = 1800  # a job that waits longer scans for itself


def fingerprint(paths: Sequence[str], what: str) -> str:
    """Hash of the names, sizes and times of change of the files.

    Args:
        paths: of the files.
        what: whatever else the result of the scan depends on.

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


def first_few(problems: Sequence[str], most: int = 5) -> str:
    """The first few problems in one message."""
    rest = len(problems) - most
    return "; ".join(problems[:most]) + (f"; and {rest} more (--check_data lists all)" if rest > 0 else "")


def cached(root: Path, name: str, key: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """The (N, 256) bool table that `compute` returns, from the cache where its fingerprint is `key`."""
    folder = _writable_folder(root)
    if folder is None:
        return compute()
    path = folder / f"{name}-{hashlib.sha256(os.path.abspath(root).encode()).hexdigest()[:8]}.npz"
    found = _load(path, key)
    if found is not None:
        return found
    with _lock(path.with_suffix(".lock")):
        found = _load(path, key)  # another job may have scanned while this one waited
        if found is None:
            found = compute()
            _store(path, key, found)
    return found


def _writable_folder(root: Path) -> Path | None:
    """The folder of the cache: beside the data, else in the user's cache folder, else none."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    beside = root / FOLDER
    # the superuser may write anywhere: that nobody has the right to is still a wish to be respected
    candidates = [beside] if beside.is_dir() or root.stat().st_mode & 0o222 else []
    for folder in (*candidates, user / FOLDER.removeprefix(".")):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK | os.X_OK):
                return folder
    return None


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """The lock of a cache file; without one (a file system that has none) the jobs only scan more than once."""
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


def _load(path: Path, key: str) -> np.ndarray | None:
    """The table in the file, or None if the file is missing, damaged or about other files."""
    try:
        with np.load(path, allow_pickle=False) as content:
            if str(content["key"]) != key:
                return None
            packed = content["presence"]
        return np.unpackbits(packed, axis=1, count=256).astype(bool)
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
        return None


def _store(path: Path, key: str, presence: np.ndarray) -> None:
    """Writes the table aside and renames it; a full disk costs the next run a scan, nothing else."""
    with contextlib.suppress(OSError):
        temporary = path.with_suffix(f".{uuid.uuid4().hex[:8]}.tmp")
        try:
            with temporary.open("xb") as stream:
                np.savez(stream, key=np.array(key), presence=np.packbits(presence, axis=1))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
