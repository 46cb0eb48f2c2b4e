"""Runs the jobs of a study: some at a time, each a process of run.py, with one line of progress."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from scripts.studies.plan import Job

ROOT = Path(__file__).resolve().parents[2]
_EPOCH = re.compile(r"step (\d+) epoch (\d+)/(\d+): (?!validation)")


class Progress:
    """One line: epochs done of all, time left, and what each running job does.

    Args:
        jobs: of the study.
        at_once: processes at a time.
    """

    def __init__(self, jobs: Sequence[Job], at_once: int):
        self.jobs, self.at_once = list(jobs), at_once
        self.done: dict[str, int] = dict.fromkeys((job.title for job in jobs), 0)
        self.finished: set[str] = set()
        self.state: dict[str, str] = {}
        self.seconds: dict[str, list[float]] = {}
        self.lock = threading.Lock()
        total = sum(job.epochs for job in jobs)
        shape = "{l_bar}{bar}| {n_fmt}/{total_fmt} epochs, {elapsed} gone, {postfix}"
        self.bar = tqdm(total=total, desc="study", bar_format=shape, dynamic_ncols=True, mininterval=0)
        self.closing = threading.Event()
        self.ticker = threading.Thread(target=self._tick, daemon=True)
        self.ticker.start()

    def epoch(self, job: Job, text: str, seconds: float) -> None:
        """A job has trained an epoch; `text` says which."""
        with self.lock:
            self.done[job.title] = min(job.epochs, self.done[job.title] + 1)
            self.seconds.setdefault(job.kind, []).append(seconds)
            self.state[job.title] = text
            self._show()

    def begin(self, job: Job) -> None:
        """A job has started."""
        with self.lock:
            self.state[job.title] = "starting"
            self._show()

    def end(self, job: Job, line: str) -> None:
        """A job has ended; `line` is printed above the progress."""
        with self.lock:
            self.finished.add(job.title)
            self.done[job.title] = job.epochs
            self.state.pop(job.title, None)
            self.bar.write(line, file=sys.stdout)
            sys.stdout.flush()
            self._show()

    def seconds_left(self) -> float | None:
        """Estimate from the epochs done so far; None before the first of them."""
        known = [s for times in self.seconds.values() for s in times]
        if not known:
            return None
        mean = sum(known) / len(known)
        left = 0.0
        for job in self.jobs:
            times = self.seconds.get(job.kind)
            left += (job.epochs - self.done[job.title]) * (sum(times) / len(times) if times else mean)
        return left / min(self.at_once, max(1, len(self.jobs) - len(self.finished)))

    def _show(self) -> None:
        left = self.seconds_left()
        said = "time left unknown yet" if left is None else f"about {round(left) // 60}:{round(left) % 60:02d} left"
        running = "; ".join(f"{title}: {state}" for title, state in self.state.items())
        self.bar.n = sum(self.done.values())
        self.bar.set_postfix_str(f"{said} | {running}", refresh=False)
        self.bar.refresh()

    def _tick(self) -> None:
        """The clock moves where the line can be drawn anew; a file gets lines from finished jobs alone."""
        while sys.stderr.isatty() and not self.closing.wait(1.0):
            with self.lock:
                self._show()

    def close(self) -> None:
        """Leave the last line as it is."""
        self.closing.set()
        self.ticker.join()
        self.bar.close()


def run_all(jobs: Sequence[Job], at_once: int) -> tuple[dict[str, float], list[str]]:
    """Run jobs, each after the one that it starts from.

    Args:
        jobs: those that others start from included; the long ones first.
        at_once: processes at a time.

    Returns:
        Seconds of each job, by title; and a sentence for each that failed, or was left out because the one before it failed.
    """
    progress = Progress(jobs, at_once)
    first = [job for job in jobs if job.after is None]
    failed: dict[str, str] = {}
    seconds: dict[str, float] = {}

    def run(job: Job) -> None:
        if job.after is not None and job.after.title in failed:
            failed[job.title] = f"{job.title} was left out, because {job.after.title} failed"
            progress.end(job, failed[job.title])
            return
        began = time.monotonic()
        try:
            said = _run(job, progress)
        except (RuntimeError, OSError) as error:
            failed[job.title] = str(error)
            said = f"{job.title} failed, see {job.log}"
        seconds[job.title] = time.monotonic() - began
        progress.end(job, said)

    try:
        with ThreadPoolExecutor(at_once) as pool:
            started = {job.title: pool.submit(run, job) for job in first}
            waiting = [job for job in jobs if job.after is not None]
            while waiting:
                for job in [job for job in waiting if job.after and started[job.after.title].done()]:
                    waiting.remove(job)
                    started[job.title] = pool.submit(run, job)
                time.sleep(0.2)
    finally:
        progress.close()
    return seconds, list(failed.values())


def launch(words: Sequence[str], log: Path, hear: Callable[[str], object], mode: str = "w") -> int:
    """One process of run.py, whose output goes to a log.

    Args:
        words: its command line.
        log: the file; its folder is made.
        hear: called with every line; a true result asks the process to stop, which saves its state first.
        mode: "w", or "a" to keep what the log has.

    Returns:
        Its exit code.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-u", str(ROOT / "run.py"), *words]
    with (
        open(log, mode, encoding="utf-8") as file,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8") as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            file.flush()
            if hear(line):
                process.terminate()
    return process.returncode


def end_of(log: Path) -> str:
    """The last words of a log, for messages."""
    return log.read_text(encoding="utf-8", errors="replace").strip()[-1500:]


def _run(job: Job, progress: Progress) -> str:
    """One process of run.py, whose output goes to the job's log; returns the line that says its scores.

    Raises:
        RuntimeError: it failed; holds the end of what it said.
    """
    progress.begin(job)
    listener = _Listener(job, progress)
    if code := launch(job.words, job.log, listener):
        raise RuntimeError(f"{job.title} ended with exit code {code}, see {job.log}:\n{end_of(job.log)}")
    return listener.last


class _Listener:
    """Tells the progress of the epochs that a process prints, and keeps the line with its last scores."""

    def __init__(self, job: Job, progress: Progress):
        self.job, self.progress = job, progress
        self.last, self.before = f"{job.title}: finished before", time.monotonic()

    def __call__(self, line: str) -> None:
        if match := _EPOCH.match(line):
            now = time.monotonic()
            self.progress.epoch(self.job, f"step {match[1]} epoch {match[2]}/{match[3]}", now - self.before)
            self.before = now
        elif "test mIoU" in line:
            self.last = f"{self.job.title}: {line.split(' (%')[0].strip()}"
            self.before = time.monotonic()
