"""Worker processes that load data: their start, their signals and their end.

They are forked by a server process (forkserver), not by the training process: a fork of a process with several threads, such as those
of a communication back end, can wait forever for a thread that exists only in the parent. The server has one thread, and has imported
the program already.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

from utils.errors import UserError
from utils.runtime.signals import SIGNALS

#: Start method of the processes, by its name in `multiprocessing`.
START_METHOD = "forkserver"

#: What the server imports before it forks: the program, so that its forks import the main module again within milliseconds, and what
#: the transforms of images import when they are first called.
PRELOADED = ("run", "torchvision.transforms.v2")
ROOT = Path(__file__).resolve().parents[2]

#: Interval in seconds at which a worker checks whether its training process still runs.
ORPHAN_SECONDS = 0.25

#: The run ends if the workers deliver no batch for this many seconds.
STALLED_SECONDS = 300.0


def start_server() -> None:
    """Start the server unless it runs. Its imports take seconds, in parallel with the training process, so call it early.

    The server and its forks never receive SIGTERM and SIGINT, which a batch system and a terminal send to all processes of a run: the
    training process still needs them.
    """
    multiprocessing.set_forkserver_preload(list(PRELOADED))
    with _in_folder(
        ROOT
    ):  # the server imports from its working folder; up to Python 3.12 it ignores the sys.path of this process
        with _environment("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning"):
            # It is started here, because it unblocks SIGNALS after its start. Its process removes the semaphores that a killed training
            # leaves, which needs no warning.
            resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def _environment(name: str, added: str) -> Iterator[None]:
    """Context that adds a value to an environment variable whose values are separated by commas, for processes that are started in it."""
    before = os.environ.get(name)
    os.environ[name] = f"{before},{added}" if before else added
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


@contextlib.contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    here = os.open(os.curdir, os.O_RDONLY)
    os.chdir(folder)
    try:
        yield
    finally:
        os.fchdir(here)
        os.close(here)


def follow_training(worker: int) -> None:
    """Make a worker end when its training process sends SIGTERM or has ended; a `worker_init_fn`.

    Args:
        worker: number of the worker, which DataLoader passes.
    """
    if hasattr(signal, "sigtimedwait"):
        threading.Thread(target=_follow, daemon=True).start()
    else:  # the sender of a signal is not known here: every SIGTERM is obeyed, and torch notices within seconds that the parent ended
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _follow() -> None:
    training = multiprocessing.parent_process()
    assert training is not None
    while training.is_alive():
        told = signal.sigtimedwait({signal.SIGTERM}, ORPHAN_SECONDS)
        if told is not None and told.si_pid == training.pid:
            break
    os._exit(0)


@contextlib.contextmanager
def stall_watch() -> Iterator[None]:
    """Context for waiting for a batch in the main thread; raises after `STALLED_SECONDS`.

    Time in which the process itself was suspended does not count.

    Raises:
        UserError: with the remedy.
    """
    left = 10

    def tick(*_: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise UserError(
                f"the processes that load data have delivered nothing for {STALLED_SECONDS:g} seconds (is the disk out of reach?); "
                "repeat the command with --resume"
            )

    before = signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, STALLED_SECONDS / left, STALLED_SECONDS / left)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def kill_workers() -> None:
    """Kill every worker: one that hangs does not react to SIGTERM, and Python would wait for it at exit."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
            process.join()
