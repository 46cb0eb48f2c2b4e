"""Processes that load data: how they start, which signals they obey, how they end.

A server process forks them, and not the training process: a copy of a process with several threads, such as those of a communication
back end, can wait for ever for a thread that only the original has. The server has one thread, and has imported the program already.
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

#: How the processes are started, by its name in `multiprocessing`.
START_METHOD = "forkserver"

#: What the server imports before it forks: the program, so that its forks import the main module again within milliseconds, and what
#: the transforms of images import when they are first called.
PRELOADED = ("run", "torchvision.transforms.v2")
ROOT = Path(__file__).resolve().parents[2]

#: How often a process that loads data looks whether its training process is still there.
ORPHAN_SECONDS = 0.25

#: Where the processes that load data deliver no batch for so long, the run ends.
STALLED_SECONDS = 300.0


def start_server() -> None:
    """Start the server, unless it runs. It imports for seconds, which it does beside the training process: call it early.

    The server and its forks never receive SIGTERM and SIGINT, which a batch system and a terminal send to all processes of a run: the
    training process still needs them.
    """
    multiprocessing.set_forkserver_preload(list(PRELOADED))
    with _in_folder(
        ROOT
    ):  # the server imports what lies in its working folder; up to Python 3.12 it ignores this process's sys.path
        with _environment("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning"):
            # Here, because it unblocks SIGNALS once it has started its process. That process removes the semaphores that a killed training
            # leaves, which is nothing to warn of.
            resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def _environment(name: str, added: str) -> Iterator[None]:
    """Processes started within it have this, too, in a variable whose values are separated by commas."""
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
    """Make a process that loads data end when its training process says so with SIGTERM, or is gone; a `worker_init_fn`.

    Args:
        worker: number of the worker, as a DataLoader hands it over.
    """
    if hasattr(signal, "sigtimedwait"):
        threading.Thread(target=_follow, daemon=True).start()
    else:  # a process does not learn who signals it: it obeys everybody, and torch notices within seconds that the parent is gone
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
    """Wait for a batch within it: it ends the wait after `STALLED_SECONDS`, in the main thread of the process.

    Time in which the process itself was stopped does not count.

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
    """End every process that loads data: one that is stuck does not hear SIGTERM, and Python would wait for it at its exit."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
            process.join()
