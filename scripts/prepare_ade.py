"""Checks that ADE20K (scene parsing challenge 2016) lies where `--dataset ade` looks for it, whole and readable.

    python scripts/prepare_ade.py --data_root DATA

The archive is ADEChallengeData2016.zip of http://sceneparsing.csail.mit.edu, unpacked under DATA. Nothing is downloaded
and nothing is written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.verify import run, verify


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, required=True, help="the folder with ADEChallengeData2016")
    opts = parser.parse_args(argv)
    return run(lambda: verify("ade", opts.data_root, (20210, 2000)))


if __name__ == "__main__":
    sys.exit(main())
