"""Start run.py in several processes as torchrun does, with the exit code and the messages of run.py instead of those of the launcher.

    python scripts/launch.py --standalone --nproc_per_node=4 run.py --data_root DATA --dataset voc --task 15-5s --overlap --step 0

The arguments are those of torchrun. Before anything is started, the number of processes is compared with the number of GPUs.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch.distributed import run as launcher
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

#: Exit code for a mistake of the user, as in utils/runtime/errors.py.
USER_ERROR = 2


def lack_of_gpus(processes: str, words: Sequence[str]) -> str:
    """A sentence if this machine has too few GPUs for the processes, else "".

    Args:
        processes: `--nproc_per_node`, a number or a word such as "gpu".
        words: of run.py.
    """
    on_cpu = "--device=cpu" in words or ("--device", "cpu") in pairwise(words)
    count = torch.cuda.device_count()
    if on_cpu or not processes.isdecimal() or int(processes) <= count:
        return ""
    return (
        f"{processes} processes on this machine, but torch sees {count} GPU(s); start at most that many (GPUS=N, "
        "--nproc_per_node), or add --device cpu"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Start the processes and wait for them; the exit code of the first that failed."""
    options = launcher.parse_args(list(sys.argv[1:] if argv is None else argv))
    if lack := lack_of_gpus(options.nproc_per_node, options.training_script_args):
        print(f"error: {lack}", file=sys.stderr)
        return USER_ERROR
    logging.disable(logging.ERROR)  # of the launcher only; run.py prints its own errors
    try:
        launcher.run(options)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
    except SignalException as error:
        code = -int(error.sigval)
    else:
        return 0
    return code if code > 0 else 128 - code  # as a shell reports a process that a signal ended


if __name__ == "__main__":
    sys.exit(main())
