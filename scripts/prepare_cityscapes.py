"""Checks that Cityscapes lies where `--dataset cityscapes_domain` looks for it, whole and readable.

    python scripts/prepare_cityscapes.py --data_root DATA
    python scripts/prepare_cityscapes.py --data_root DATA --images leftImg8bit_trainvaltest.zip --labels gtFine_trainvaltest.zip

With --images and --labels, the archives of https://www.cityscapes-dataset.com are unpacked under DATA before. A second start continues an
interrupted one. The 3,475 images of their train and val folders make 21 domains, 80 % of each for training. With --verify, or without
archives, nothing is written. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.archives import CITYSCAPES
from dataset.verify import add_verify, run, unpack_or_check, verify


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, required=True, help="the folder with leftImg8bit and gtFine")
    for option, archive in zip(("--images", "--labels"), CITYSCAPES):
        parser.add_argument(option, type=Path, help=f"{archive.file} as it is downloaded from {archive.page}")
    add_verify(parser, "--verify")
    opts = parser.parse_args(argv)

    def work() -> list[str]:
        archives = list(zip(CITYSCAPES, (opts.images, opts.labels)))
        problems = unpack_or_check(archives, opts.data_root, opts.verify)
        return problems + verify("cityscapes_domain", opts.data_root, (2772, 703))

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
