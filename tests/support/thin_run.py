"""run.py on a network of few channels, for a launcher: torchrun … -m tests.support.thin_run OPTIONS."""

import sys

import run
from tests.support import thin

if __name__ == "__main__":
    with thin.program():
        sys.exit(run.main())
