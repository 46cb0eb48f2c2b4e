"""Checks that Cityscapes lies where `--dataset cityscapes_domain` looks for it, whole and readable.

    python scripts/prepare_cityscapes.py --data_root DATA

The archives are leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of https://www.cityscapes-dataset.com,
unpacked under DATA. The 3,475 images of their train and val folders make 21 domains, 80 % of each for training. Nothing
is downloaded and nothing is written.
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
    parser.add_argument("--data_root", type=Path, required=True, help="the folder with leftImg8bit and gtFine")
    opts = parser.parse_args(argv)
    return run(lambda: verify("cityscapes_domain", opts.data_root, (2772, 703)))


if __name__ == "__main__":
    sys.exit(main())
