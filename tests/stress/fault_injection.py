"""Kill runs, break their disks and their input, and count what they lose: nothing, it should be.

    python tests/stress/fault_injection.py --kills 20 --processes 1 2 --faults --inputs 200 --seed 0 --out runs/faults

kills    SIGKILL at random moments of every phase of a run, the same command again each time, the end compared to the bit
peers    one of two processes dies, or the launcher is asked to stop: all end with a message within a minute
jobs     two runs at once on one data set, results folder and checkpoint folder
processes  runs that are paused, that lose a process which loads data, or that are killed while they scan a data set
faults   full and broken disks, cut, flipped, crafted and hostile checkpoints
inputs   mutated command lines and task files, pairs of options, several faults in one command line

It prints a table and writes it, with every detail, to OUT/faults.json. Exit code 1 if anything was not survived.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.stress import fault_hostile, fault_inputs, fault_options, fault_processes, fault_saving  # noqa: E402  (the project is run from its folder, not installed)
from tests.stress.fault_parts import (  # noqa: E402
    BETWEEN,
    FINISHING,
    PLACES,
    RECORDING,
    SAVING,
    START,
    TEST,
    TRACEBACK,
    TRAINING,
    VALIDATION,
    Job,
    outcome,
    words,
)
from utils.reporting.tables import Table  # noqa: E402

#: How often a place is entered in a run, so that a kill does not always hit the first time.
TIMES = {TRAINING: 4, SAVING: 4, VALIDATION: 3, BETWEEN: 1, START: 1, FINISHING: 2, TEST: 2, RECORDING: 2}

#: Seconds in which the others must end when one process is gone.
MINUTE = 60.0


# ----------------------------------------------------------------------- kills


def plan(kills: int, rng: random.Random) -> list[str]:
    """Where the kills are to fall: every place equally often, in random order."""
    places = [PLACES[k % len(PLACES)] for k in range(kills)]
    rng.shuffle(places)
    return places


class Kills:
    """SIGKILL at the planned places, and the same command again until the run finishes.

    Args:
        folder: of this study.
        processes: how many train together.
        kills: how many.
        seed: of places and moments.
        more: options of run.py after the small command line.
    """

    def __init__(self, folder: Path, processes: int, kills: int, seed: int, more: tuple[str, ...] = ()):
        self.folder, self.processes, self.more = folder, processes, (*more, "--resume")
        self.rng = random.Random(f"{seed} {processes}")
        self.wanted = plan(kills, self.rng)
        self.lasted = dict.fromkeys(PLACES, 0.2)
        self.fallen: list[dict[str, Any]] = []
        self.failures: list[str] = []

    def _job(self, folder: Path) -> Job:
        return Job(words(folder, *self.more), folder / "jobs", self.processes)

    def go(self) -> dict[str, Any]:
        """Run without kills, then with them, and compare.

        Returns:
            What fell where, and what differed.
        """
        calm = self.folder / "calm"
        job = self._job(calm)
        codes = job.finish()
        assert codes == [0] * self.processes, job.output()
        self.lasted |= job.lasted()
        expected, lives = outcome(calm), 0
        while self.wanted and not self.failures:
            lives += 1
            folder = self.folder / f"life{lives}"
            self._live(folder)
            if not self.failures:
                found = outcome(folder)
                differing = sorted(key for key in expected | found if expected.get(key) != found.get(key))
                self.failures += [f"life {lives}: {key} differs from the run without kills" for key in differing]
        return {"kills": self.fallen, "lives": lives, "failures": self.failures}

    def _live(self, folder: Path) -> None:
        """One run from its start to its end, killed on the way as often as its places come."""
        while True:
            job = self._job(folder)
            if self.wanted and job.wait_for(self.wanted[0], self.rng.randint(1, TIMES[self.wanted[0]])):
                time.sleep(self.rng.uniform(0, 1) * min(2.0, self.lasted.get(self.wanted[0], 0.2)))
                if job.running():
                    half_written = bool(list(folder.glob("*/.*.writing")))
                    self._note(job.kill(), half_written, folder.name)
                    self._check_output(job)
                    continue
            codes = job.finish()
            if self.wanted:
                self.wanted.append(self.wanted.pop(0))  # it ended before that place; another life has it
            self._check_output(job)
            if codes != [0] * self.processes:
                self.failures.append(f"{folder.name}: exit codes {codes}: {job.output()[-1500:]}")
            return

    def _note(self, place: str, half_written: bool, life: str) -> None:
        self.fallen.append({"place": place, "half_written": half_written, "life": life})
        self.wanted.remove(place if place in self.wanted else self.wanted[0])
        print(f"  {self.processes} process(es), kill {len(self.fallen)}: {place}", flush=True)

    def _check_output(self, job: Job) -> None:
        if TRACEBACK in job.output():
            self.failures.append(f"traceback: {job.output()[-1500:]}")


# ----------------------------------------------------------------------- peers


def peer_dies(folder: Path, place: str, victim: int, more: tuple[str, ...] = ()) -> dict[str, Any]:
    """SIGKILL one of two processes.

    Args:
        folder: of this case.
        place: what the main process does then.
        victim: rank of the process that dies.
        more: options of run.py.

    Returns:
        Seconds until the other ended, its exit code, and what was wrong ("" if nothing).
    """
    job = Job(words(folder, *more), folder / "jobs", processes=2)
    reached = job.wait_for(place)
    job.processes[victim].kill()
    began = time.monotonic()
    code = job.finish(MINUTE)[1 - victim]
    seconds, text = time.monotonic() - began, job.output()
    wrong = "" if reached else f"{place} was not reached"
    if code is None:
        wrong = "the other process hangs"
    elif code != 4 or "another process ended" not in text or TRACEBACK in text:
        wrong = f"exit code {code}: {text[-1500:]}"
    return {"case": f"process {victim} dies, {place}", "seconds": round(seconds, 1), "wrong": wrong}


def launcher_stops(folder: Path, place: str, more: tuple[str, ...] = ()) -> dict[str, Any]:
    """SIGTERM to torchrun with two processes; then the same command again, which must finish."""
    options = words(folder, *more, "--resume")
    job = Job(options, folder / "jobs", processes=2, launcher=True)
    reached = job.wait_for(place)
    began = time.monotonic()
    job.processes[0].send_signal(signal.SIGTERM)
    code = job.finish(MINUTE)[0]
    seconds, text = time.monotonic() - began, job.output()
    wrong = "" if reached else f"{place} was not reached"
    if code in (0, None) or "stopped by SIGTERM" not in text:
        wrong = f"exit code {code}: {text[-1500:]}"
    again = Job(options, folder / "jobs", processes=2, launcher=True)
    if again.finish()[0] != 0 or "resumed step" not in again.output():
        wrong = wrong or f"not resumed: {again.output()[-1500:]}"
    return {"case": f"SIGTERM to torchrun, {place}", "seconds": round(seconds, 1), "wrong": wrong}


def launched_peer_dies(folder: Path, place: str, more: tuple[str, ...] = ()) -> dict[str, Any]:
    """SIGKILL of one of two processes under torchrun."""
    job = Job(words(folder, *more), folder / "jobs", processes=2, launcher=True)
    reached = job.wait_for(place)
    while not (pids := {pid for _, rank, pid, _ in job.noted() if rank == 1}) and job.running():
        time.sleep(0.05)
    began = time.monotonic()
    os.kill(pids.pop(), signal.SIGKILL)
    code = job.finish(MINUTE)[0]
    wrong = "" if reached else f"{place} was not reached"
    if code in (0, None):
        wrong = f"exit code {code}: {job.output()[-1500:]}"
    return {
        "case": f"process 1 dies under torchrun, {place}",
        "seconds": round(time.monotonic() - began, 1),
        "wrong": wrong,
    }


def peers(folder: Path) -> list[dict[str, Any]]:
    """Every case of a lost process or a stopped launcher."""
    cases = [peer_dies(folder / "a", TRAINING, 1), peer_dies(folder / "b", SAVING, 0)]
    cases += [peer_dies(folder / "c", VALIDATION, 1), peer_dies(folder / "d", BETWEEN, 0)]
    cases += [launched_peer_dies(folder / "e", START), launched_peer_dies(folder / "f", TRAINING)]
    return cases + [launcher_stops(folder / "g", TRAINING), launcher_stops(folder / "h", VALIDATION)]


# ------------------------------------------------------------------------- jobs


def two_jobs(folder: Path) -> list[dict[str, Any]]:
    """Two runs at once: with names of their own both finish, with the same name and step one of them refuses.

    Both read one data set on disk, whose index cache neither finds, and share all folders.
    """
    data = fault_saving.write_data_set(folder / "data")
    step = ("--dataset", "folder", "--data_root", str(data), "--task_file", str(data / "task.json"), "--step", "0")
    both = [Job(words(folder, *step, "--name", name), folder / "jobs") for name in ("first", "second")]
    codes = [job.finish()[0] for job in both]
    tables = sorted((folder / "results").glob("*.csv"))
    whole = len(tables) == 2 and all(len(table.read_text().splitlines()) == 1 for table in tables)
    caches = list((data / ".cisscache").glob("*.scan"))
    wrong = "" if codes == [0, 0] and whole and len(caches) == 2 else f"{codes}, {tables}, {caches}"
    cases = [{"case": "two names at once", "wrong": wrong}]
    first = Job(words(folder, *step, "--name", "twin", "--epochs", "50"), folder / "jobs")
    first.wait_for(TRAINING)
    second = Job(words(folder, *step, "--name", "twin", "--epochs", "50"), folder / "jobs")
    code, text = second.finish()[0], second.output()
    refused = code == 2 and "another run named 'twin'" in text and TRACEBACK not in text
    cases.append({"case": "one name twice", "wrong": "" if refused and first.running() else f"{code}: {text[-1500:]}"})
    first.kill()
    return cases


# ------------------------------------------------------------------------ table


def rows(report: dict[str, Any]) -> list[list[str]]:
    """Lines of the table: what was tried, how often, how often it was not survived."""
    table = []
    for processes, study in report.get("kills", {}).items():
        places = [kill["place"] for kill in study["kills"]]
        counted = ", ".join(f"{places.count(place)} {place}" for place in PLACES if place in places)
        table.append([f"SIGKILL, {processes} process(es): {counted}", str(len(places)), str(len(study["failures"]))])
    for key, title in (
        ("peers", "a process of two dies, a launcher is stopped"),
        ("jobs", "two jobs at once"),
        ("processes", "pauses, killed loading processes, killed and damaged scans"),
        ("faults", "faults of disks and checkpoints"),
        ("hostile", "hostile checkpoints, to all that read one"),
        ("inputs", "command lines and task files"),
        ("pairs", "pairs of options"),
        ("several", "command lines with several faults at once"),
    ):
        if key in report:
            table.append([title, str(len(report[key])), str(sum(bool(case["wrong"]) for case in report[key]))])
    return table


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of this script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=0, help="kills for each number of processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes to kill")
    parser.add_argument(
        "--faults", action="store_true", help="lost processes, two jobs, broken disks and damaged checkpoints"
    )
    parser.add_argument(
        "--inputs",
        type=int,
        default=0,
        help="mutated command lines, as many task files, and half as many more pairs of options",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all random choices")
    parser.add_argument("--out", default="runs/faults", help="new folder of the runs and of the report")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the studies that are asked for and print the table."""
    arguments = parse(argv)
    out, report = Path(arguments.out).absolute(), {}
    if out.exists() and any(out.iterdir()):
        print(f"error: --out {out} is not empty; name a new folder", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    if arguments.kills:
        report["kills"] = {
            str(n): Kills(out / f"kills{n}", n, arguments.kills, arguments.seed).go() for n in arguments.processes
        }
    if arguments.faults:
        report["peers"], report["jobs"] = peers(out / "peers"), two_jobs(out / "jobs")
        report["processes"] = fault_processes.study(out / "processes")
        report["faults"] = fault_saving.study(out / "faults", arguments.seed)
        report["hostile"] = fault_hostile.study(out / "hostile")
    if arguments.inputs:
        report["inputs"] = fault_inputs.study(out / "inputs", arguments.inputs, arguments.seed)
        report["pairs"] = fault_options.pairs(out / "pairs", arguments.inputs * 3 // 2)
        report["several"] = fault_options.several(out / "several", arguments.inputs, arguments.seed)
    (out / "faults.json").write_text(json.dumps(report, indent=1))
    table = rows(report)
    print(Table(["what", "tried", "not survived"], table).markdown())
    return int(any(row[-1] != "0" for row in table))


if __name__ == "__main__":
    sys.exit(main())
