"""Runs that are paused, that lose a process which loads data, or that are killed while they write the scan of a data set.

Part of tests/stress/fault_injection.py.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from dataset import cache
from tests.stress import fault_saving
from tests.stress.fault_inputs import execute
from tests.stress.fault_parts import FINISHING, SAVING, TEST, TRACEBACK, TRAINING, VALIDATION, Job, outcome, words
from tests.support import thin

#: One step, with a process that loads data.
SHORT = ("--step", "0", "--method", "FT", "--epochs", "3")

#: Where runs of so many processes are paused.
PLACES = {1: (TRAINING, SAVING, VALIDATION, FINISHING, TEST), 2: (TRAINING, VALIDATION)}

#: Seconds of a pause.
PAUSE = 2.0


def paused(folder: Path) -> list[dict[str, Any]]:
    """SIGSTOP and, after a while, SIGCONT: to a run with its process that loads data, and to one of two processes.

    Args:
        folder: of the runs.

    Returns:
        One entry a pause: what it was, and what was wrong ("" if nothing).
    """
    cases = []
    for processes, places in PLACES.items():
        expected = _calm(folder / f"calm{processes}", processes)
        for place in places:
            here = folder / f"{processes} {place}".replace(" ", "_")
            job = Job(words(here, *SHORT), here / "jobs", processes)
            reached = job.wait_for(place)
            group = job.processes[-1].pid  # all of one process, or the second of two with its own
            os.killpg(group, signal.SIGSTOP)
            time.sleep(PAUSE)
            os.killpg(group, signal.SIGCONT)
            codes = job.finish()
            good = reached and codes == [0] * processes and TRACEBACK not in job.output() and outcome(here) == expected
            wrong = "" if good else f"reached {reached}, exit codes {codes}: {job.output()[-1000:]}"
            print(f"  paused, {processes} process(es), {place}", flush=True)
            cases.append({"case": f"paused, {processes} process(es), {place}", "wrong": wrong})
    return cases


def _calm(folder: Path, processes: int = 1) -> dict[str, str]:
    """What a run leaves to which nothing happens."""
    job = Job(words(folder, *SHORT), folder / "jobs", processes)
    assert job.finish() == [0] * processes, job.output()
    return outcome(folder)


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):  # it has ended
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def loaders(pid: int) -> list[int]:
    """The processes that load data for a training process: forks of its server."""
    return [loader for server in _children(pid) for loader in _children(server)]


def loaders_killed(folder: Path) -> list[dict[str, Any]]:
    """SIGKILL of the processes that load data, as a system without memory does it: a sentence, and --resume goes on."""
    expected, cases = _calm(folder / "calm"), []
    for place in (TRAINING, VALIDATION, TEST):
        here = folder / place
        argv = words(here, *SHORT, "--num_workers", "2")
        job = Job(argv, here / "jobs")
        reached = job.wait_for(place)
        while not (found := loaders(job.processes[0].pid)) and job.running():
            time.sleep(0.005)
        for loader in found:
            os.kill(loader, signal.SIGKILL)
        (code,) = job.finish(60)
        # A run that needs no more batches may end well
        good = code == 0 or (code == 2 and "a process that loads data ended" in job.output())
        wrong = (
            "" if reached and good and TRACEBACK not in job.output() else f"exit code {code}: {job.output()[-1000:]}"
        )
        again = Job([*argv, "--resume"], here / "jobs")
        if again.finish() != [0] or outcome(here) != expected:
            wrong = wrong or f"not resumed to the same end: {again.output()[-1000:]}"
        cases.append({"case": f"loading processes killed, {place}", "wrong": wrong})
    return cases


def scan_killed(folder: Path, flips: int = 20, cuts: int = 10) -> list[dict[str, Any]]:
    """A run that is killed while it keeps what it found in a data set; the cache is then also cut and changed.

    Args:
        folder: of the data and the runs.
        flips, cuts: of `fault_saving.damages`.

    Returns:
        One entry a kill or damage: what it was, and what was wrong ("" if nothing).
    """
    data = fault_saving.write_data_set(folder / "data")
    more = ("--dataset", "folder", "--data_root", str(data), "--task_file", str(data / "task.json"))
    argv = words(folder, *fault_saving.STEP0, *more, "--dry_run")
    cases = []
    for call in ("write", "replace"):
        child = os.fork()
        if child == 0:
            _die_in_cache(call)
            execute(argv)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        code, _, said = execute(argv)
        good = os.WIFSIGNALED(status) and code == 0 and len(_caches(data)) == 2
        cases.append(
            {"case": f"killed in {call} of the scan", "wrong": "" if good else f"{status}, {code}: {said[-1000:]}"}
        )
        for path in _caches(data):
            path.unlink()
    code, printed, _ = execute(argv)
    rng = random.Random(0)
    for path in _caches(data):
        raw = path.read_bytes()
        for name, damaged in fault_saving.damages(raw, rng, flips, cuts):
            path.write_bytes(damaged)
            code, again, said = execute(argv)
            good = code == 0 and again == printed
            cases.append({"case": f"scan: {name}", "wrong": "" if good else f"exit code {code}: {said[-1000:]}"})
    return cases


def _caches(data: Path) -> list[Path]:
    return sorted((data / ".cisscache").glob("*.scan"))


def _die_in_cache(call: str) -> None:
    """SIGKILL this process when the file of the cache is opened and not yet written, or before it is renamed."""
    kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    if call == "write":
        cache._header = kill
    else:
        os.replace = kill


def study(folder: Path) -> list[dict[str, Any]]:
    """Everything above.

    Args:
        folder: of the runs.
    """
    with thin.program():
        scans = scan_killed(folder / "scan")
    return paused(folder / "paused") + loaders_killed(folder / "loaders") + scans
