"""The check that a data set on the disk is complete, which the scripts/prepare_*.py share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dataset import DATASETS
from dataset.archives import Archive, check_archive, unpack
from dataset.source import FileSource
from utils.errors import UserError


def verify(name: str, root: Path, official: tuple[int, int]) -> list[str]:
    """Read every mask and the header of every image of a data set, and print the counts of each split.

    Args:
        name: `--dataset`.
        root: `--data_root`.
        official: numbers of training and validation images of the published data set.

    Returns:
        A sentence for each difference from the published data set and for each file that cannot be used.
    """
    layout, problems = DATASETS[name], list[str]()
    assert layout is not None, "the embedded data set has no files"
    for train, expected in zip((True, False), official):
        source = FileSource(layout, root, train)
        shown, found = source.inspect(np.arange(len(source)))
        problems += [problem for problem in found if problem]
        count = len(layout.classes)
        classes = int(shown[:, :count].any(axis=0).sum())
        print(f"{source.title}: {len(source)} images (published: {expected}), {classes} of {count} labels")
        if len(source) != expected:
            problems.append(f"the {source.title} has {len(source)} images, the published one {expected}")
    return problems


def add_verify(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add the option `--verify`, under the names that the script gives it."""
    parser.add_argument(
        *names, action="store_true", help="write nothing: only check the data, and the checksums of archives"
    )


def unpack_or_check(archives: Sequence[tuple[Archive, Path | None]], folder: Path, verify_only: bool) -> list[str]:
    """Unpack the archives that are given, or only check their checksums.

    Args:
        archives: each with its file, None where it is not given.
        folder: where they are unpacked.
        verify_only: write nothing.

    Returns:
        A sentence for each archive whose checksum is not the published one.

    Raises:
        UserError: as `unpack`.
    """
    problems = []
    for archive, path in archives:
        if path is None:
            continue
        problems += check_archive(archive, path, folder)[1] if verify_only else unpack(archive, path, folder)
    return problems


def run(work: Callable[[], list[str]]) -> int:
    """Run the work of a script and print its problems; the exit code: 0, 1 with problems, 2 after a user's error."""
    try:
        problems = work()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    print("complete" if not problems else f"{len(problems)} problems")
    return 1 if problems else 0
