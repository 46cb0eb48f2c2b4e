"""Checks that ADE20K (scene parsing challenge 2016) lies where `--dataset ade` looks for it, whole and readable.

    python scripts/prepare_ade.py --data_root DATA
    python scripts/prepare_ade.py --data_root DATA --archive ADEChallengeData2016.zip

With --archive, ADEChallengeData2016.zip of http://sceneparsing.csail.mit.edu is unpacked under DATA before. A second start continues an
interrupted one. With --verify, or without --archive, nothing is written. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.archives import ADE
from dataset.verify import add_verify, run, unpack_or_check, verify


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, required=True, help="the folder with ADEChallengeData2016")
    parser.add_argument("--archive", type=Path, help=f"{ADE.file} as it is downloaded from {ADE.page}")
    add_verify(parser, "--verify")
    opts = parser.parse_args(argv)

    def work() -> list[str]:
        problems = unpack_or_check([(ADE, opts.archive)], opts.data_root, opts.verify)
        return problems + verify("ade", opts.data_root, (20210, 2000))

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
