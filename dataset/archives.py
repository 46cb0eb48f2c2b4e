"""Archives of data sets as they are downloaded (.tar, .tgz, .zip): known checksums, safe unpacking, continued after an interruption.

All members are checked before the first file is written. Only plain files and folders are taken, with names that stay inside the folder;
the numbers of files and of unpacked bytes are limited. A file appears complete or not at all, so that a second start continues where the
first was interrupted. The SHA-256 of each unpacked archive is kept in `.cissarchives.json` beside the data.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from lzma import LZMAError
from pathlib import Path
from typing import IO, NamedTuple

from dataset.layout import inside
from utils.errors import UserError

RECORD = ".cissarchives.json"
_BLOCK = 1 << 20
_GIB = 1 << 30


class Archive(NamedTuple):
    """An archive that is published.

    Attributes:
        file: its name.
        page: where it comes from.
        prefixes: folders in it that are unpacked; all other members are left out.
        md5: published checksum; "" if none is known.
        most_bytes: limit of the unpacked files, all together.
        most_files: limit of the members.
    """

    file: str
    page: str
    prefixes: tuple[str, ...]
    md5: str = ""
    most_bytes: int = 8 * _GIB
    most_files: int = 300_000


#: The checksums are those that torchvision's data sets VOCSegmentation and SBDataset check.
VOC = Archive(
    "VOCtrainval_11-May-2012.tar",
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
    ("VOCdevkit/VOC2012/",),
    "6cd6e144f989b92b3379bac3b3de84fd",
)
SBD = Archive(
    "benchmark.tgz",
    "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/",
    ("benchmark_RELEASE/dataset/cls/",),
    "82b4d87ceb2ed10f6038a1cba92111cb",
)
ADE = Archive("ADEChallengeData2016.zip", "http://sceneparsing.csail.mit.edu", ("ADEChallengeData2016/",))
CITYSCAPES = tuple(
    Archive(
        f"{name}_trainvaltest.zip",
        "https://www.cityscapes-dataset.com/downloads/",
        (f"{name}/train/", f"{name}/val/"),
        most_bytes=32 * _GIB,
    )
    for name in ("leftImg8bit", "gtFine")
)


class Member(NamedTuple):
    """A file in an archive: its name, its size in bytes, and what opens it."""

    name: str
    size: int
    open: Callable[[], IO[bytes] | None]


def unpack(archive: Archive, path: Path, folder: Path) -> list[str]:
    """Unpack an archive into a folder; files that are already there with the right size stay.

    Args:
        archive: what the file should be.
        path: the file.
        folder: where its members go; it is made.

    Returns:
        A sentence if the checksum is not the published one.

    Raises:
        UserError: the file is no archive, is damaged, has a member that is refused, or is another file than the one that was unpacked
            before; nothing is written unless the archive is damaged.
        OSError: a file cannot be written.
    """
    sha256, problems = check_archive(archive, path, folder)
    recorded = _read_record(folder)
    if recorded.get(archive.file) == sha256:
        print(f"{path}: unpacked before")
        return problems
    with _members(path) as members:
        chosen = _check_members(archive, path, folder, members())
        print(f"{path}: {len(chosen)} files", flush=True)
        for member in members():
            if member.name in chosen:
                _write(member, folder / member.name, path)
    _write_record(folder, {**recorded, archive.file: sha256})
    return problems


def check_archive(archive: Archive, path: Path, folder: Path) -> tuple[str, list[str]]:
    """Print the SHA-256 of an archive and compare it with the one recorded in the folder, and the MD5 with the published one.

    Returns:
        The SHA-256, and a sentence if the MD5 differs.

    Raises:
        UserError: there is no such file, or an archive of this name with another checksum was unpacked into the folder.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file; {archive.file} comes from {archive.page}")
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            md5.update(block)
            sha256.update(block)
    print(f"{path}: SHA-256 {sha256.hexdigest()}", flush=True)
    recorded = _read_record(folder).get(archive.file, sha256.hexdigest())
    if recorded != sha256.hexdigest():
        raise UserError(
            f"{path} has another SHA-256 than the {archive.file} that was unpacked into {folder} before ({recorded}); "
            f"use that one, or delete its files and {folder / RECORD}"
        )
    if archive.md5 and md5.hexdigest() != archive.md5:
        problem = (
            f"{path} has the MD5 {md5.hexdigest()}, the published {archive.file} {archive.md5} (from {archive.page})"
        )
        return sha256.hexdigest(), [problem]
    return sha256.hexdigest(), []


@contextmanager
def _members(path: Path) -> Iterator[Callable[[], Iterator[Member]]]:
    """What lists the members of an archive, as often as it is called; damage anywhere becomes a UserError."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as packed:
                yield lambda: _zip_members(packed, path)
        else:
            yield lambda: _tar_members(path)
    except (
        tarfile.TarError,
        gzip.BadGzipFile,
        zipfile.BadZipFile,
        zlib.error,
        LZMAError,
        EOFError,
        NotImplementedError,
    ) as error:
        raise UserError(f"{path} is no archive, or a damaged one: {error}; download it again") from None


def _tar_members(path: Path) -> Iterator[Member]:
    with tarfile.open(path, "r:*") as packed:
        for member in packed:
            if member.isdir():
                continue
            if not member.isreg():
                raise UserError(
                    f"{path}: {member.name!r:.200} is a link or a device, no plain file; the archive is refused"
                )
            yield Member(member.name.removeprefix("./"), member.size, lambda: packed.extractfile(member))  # noqa: B023
        _check_end(packed)


def _check_end(packed: tarfile.TarFile) -> None:
    """Read what follows the last member, whose absence tarfile does not notice: the mark of the end, and the checksum of a .tgz."""
    stream = packed.fileobj
    assert stream is not None
    stream.seek(packed.offset)
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("its end is missing")
    while stream.read(_BLOCK):
        pass


def _zip_members(packed: zipfile.ZipFile, path: Path) -> Iterator[Member]:
    for member in packed.infolist():
        kind = stat.S_IFMT(member.external_attr >> 16)
        if member.is_dir():
            continue
        if kind not in (0, stat.S_IFREG):
            raise UserError(
                f"{path}: {member.filename!r:.200} is a link or a device, no plain file; the archive is refused"
            )
        if member.flag_bits & 1:
            raise UserError(f"{path}: {member.filename!r:.200} is encrypted; the archive is refused")
        yield Member(member.filename.removeprefix("./"), member.file_size, lambda: packed.open(member))  # noqa: B023


def _check_members(archive: Archive, path: Path, folder: Path, members: Iterator[Member]) -> set[str]:
    """Names of the members to unpack; UserError for an archive with a member that is refused, before anything is written."""
    chosen: set[str] = set()
    size = 0
    for count, member in enumerate(members, 1):
        inside(folder, member.name, str(path))
        if "\\" in member.name or ":" in member.name:
            raise UserError(
                f"{path}: {member.name!r:.200} is no name of a file on every system; the archive is refused"
            )
        if count > archive.most_files:
            raise UserError(f"{path} has more than {archive.most_files} members; it is not {archive.file}")
        if not member.name.startswith(archive.prefixes):
            continue
        if member.name in chosen:
            raise UserError(f"{path} has {member.name!r:.200} twice; the archive is refused")
        chosen.add(member.name)
        size += member.size
        if size > archive.most_bytes:
            raise UserError(f"{path} unpacks to more than {archive.most_bytes} bytes; it is not {archive.file}")
        parent = os.path.realpath((folder / member.name).parent)
        if os.path.commonpath([parent, os.path.realpath(folder)]) != os.path.realpath(folder):
            raise UserError(
                f"{(folder / member.name).parent} is a link out of {folder}; nothing is unpacked through it"
            )
    if not chosen:
        raise UserError(
            f"{path} has no file in {' or '.join(archive.prefixes)}; {archive.file} comes from {archive.page}"
        )
    return chosen


def _write(member: Member, target: Path, path: Path) -> None:
    """Write one file under another name and rename it; one that is there with the right size is left as it is."""
    if target.is_file() and not target.is_symlink() and target.stat().st_size == member.size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.part")
    aside.unlink(missing_ok=True)
    source = member.open()
    assert source is not None, "a plain file can be opened"
    try:
        with source, aside.open("xb") as stream:
            left = member.size
            while left > 0 and (block := source.read(min(_BLOCK, left))):
                stream.write(block)
                left -= len(block)
            if left > 0 or source.read(1):
                raise UserError(
                    f"{path}: {member.name!r:.200} has another size than the archive says; download it again"
                )
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def _read_record(folder: Path) -> dict[str, str]:
    """SHA-256 by name of the archives that were unpacked into the folder."""
    path = folder / RECORD
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise UserError(f"{path} is damaged; delete it, and the archives are unpacked again") from None
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise UserError(f"{path} is damaged; delete it, and the archives are unpacked again")
    return content


def _write_record(folder: Path, record: dict[str, str]) -> None:
    aside = folder / f"{RECORD}.part"
    aside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, folder / RECORD)
