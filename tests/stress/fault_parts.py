"""What the studies of tests/stress/fault_injection.py share: the small run, its processes, and marks of what a run is doing.

python tests/stress/fault_parts.py MARKS [options of run.py]      run.py as it is, noting in MARKS what it does
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

#: What a run can be doing when it is killed.
START, BETWEEN, TRAINING, SAVING, FINISHING, VALIDATION, TEST, RECORDING = (
    "starting", "between steps", "training", "saving the state", "saving the finished step", "validation", "test",
    "recording results",
)  # fmt: skip
PLACES = (START, BETWEEN, TRAINING, SAVING, FINISHING, VALIDATION, TEST, RECORDING)

#: Three steps of LSKD on small pictures: a network of full size, seconds of training.
SMALL = shlex.split(
    "--dataset shapes --task 6-2 --overlap --method LSKD --backbone resnet18 --no_pretrained --crop_size 32 --batch_size 2 "
    "--shapes_train 24 --shapes_val 8 --num_workers 1 --device cpu --threads 1 --lr 0.01 --epochs 2 --step 0 1 2 "
    "--ckpt_interval 1 --ckpt_minutes 0.02 --no_progress --visualize --date d --name n"
)

#: Seconds after which a run counts as hanging.
PATIENCE = 300.0

TRACEBACK = "Traceback (most recent call last)"


def words(folder: Path, *more: str) -> list[str]:
    """The small command line with its outputs in a folder; what comes last wins."""
    folders = [f"--{kind}={folder / kind}" for kind in ("checkpoint", "results", "logdir")]
    return [*SMALL, *folders, *more]


def outcome(folder: Path) -> dict[str, str]:
    """Digests of all that a finished run leaves and that must not depend on how often it was killed.

    Args:
        folder: as given to `words`.

    Returns:
        By file: weights, momentum, λ, schedule, method state and history of every checkpoint; the CSV's text; the tests in the JSON.
    """
    from utils.checkpointing import checkpoint_files

    found = {}
    for path in sorted((folder / "checkpoint").glob("[!.]*")):
        state = checkpoint_files.load(path)
        state.pop("options", None)  # hold paths
        found[path.name] = checkpoint_files.digest(state)
    for path in sorted((folder / "results").glob("[!.]*.csv")):
        found[path.name] = path.read_text()
        entries = json.loads(path.with_suffix(".json").read_text())["steps"]
        found[f"{path.stem}.json"] = checkpoint_files.digest(entries)
    return found


# ----------------------------------------------------------------------- marks


class Marks:
    """Appends what this process begins to do to a file, one line each: time, rank, process id, doing.

    Args:
        path: the file, shared by all processes of a run.
    """

    def __init__(self, path: str):
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.doing = [START]
        self.write()

    def write(self) -> None:
        """Note what is being done now."""
        line = f"{time.time():.4f}\t{os.environ.get('RANK', '0')}\t{os.getpid()}\t{self.doing[-1]}\n"
        os.write(self.file, line.encode())

    def around(self, function: Callable, doing: Callable[..., str]) -> Callable:
        """The function, noted while it runs; `doing` is asked with its arguments."""

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.doing.append(doing(*args, **kwargs))
            self.write()
            try:
                return function(*args, **kwargs)
            finally:
                self.doing.pop()
                self.write()

        return noted


def main(argv: list[str]) -> int:
    """Run run.py with marks."""
    marks = Marks(argv[0])
    import run
    from train import Trainer
    from utils.checkpointing import checkpoint_files
    from utils.reporting import results

    def saving(path: Path, state: dict, *_: Any) -> str:
        return SAVING if ".resume" in Path(path).name else FINISHING

    def evaluating(trainer: Trainer, loader: Any, title: str = "test", **_: Any) -> str:
        return TEST if title == "test" else VALIDATION

    run.StepRun.go = marks.around(run.StepRun.go, lambda step: BETWEEN if step.task.step else START)
    Trainer.train_epoch = marks.around(Trainer.train_epoch, lambda *_: TRAINING)
    Trainer.evaluate = marks.around(Trainer.evaluate, evaluating)
    checkpoint_files.save = marks.around(checkpoint_files.save, saving)
    results.write = marks.around(results.write, lambda *_: RECORDING)
    return run.main(argv[1:])


# -------------------------------------------------------------------- processes


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Job:
    """The processes of one run.

    Args:
        argv: options of run.py.
        folder: of its marks and its output.
        processes: how many train together.
        launcher: start them by torch.distributed.run, not by themselves.
    """

    count = 0

    def __init__(self, argv: list[str], folder: Path, processes: int = 1, launcher: bool = False):
        Job.count += 1
        folder.mkdir(parents=True, exist_ok=True)
        self.marks, self.log = folder / f"marks{Job.count}.txt", folder / f"output{Job.count}.txt"
        program = [str(ROOT / "tests" / "stress" / "fault_parts.py"), str(self.marks), *argv]
        common = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.began = time.monotonic()
        if launcher:
            command = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
            self.processes = [self._start([*command, *program], common)]
            return
        ranks = [
            {"RANK": f"{k}", "LOCAL_RANK": f"{k}", "WORLD_SIZE": f"{processes}", "LOCAL_WORLD_SIZE": f"{processes}"}
            for k in range(processes)
        ]
        self.processes = [self._start(program, common | (rank if processes > 1 else {})) for rank in ranks]

    def _start(self, command: list[str], variables: dict[str, str]) -> subprocess.Popen:
        inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                [sys.executable, *command],
                stdout=log,
                stderr=log,
                env=inherited | variables,
                start_new_session=True,  # its workers die with it
            )

    def output(self) -> str:
        """What the processes printed."""
        return self.log.read_text(errors="replace")

    def noted(self) -> list[tuple[float, int, int, str]]:
        """Marks so far: time, rank, process id, doing."""
        lines = self.marks.read_text().splitlines() if self.marks.exists() else []
        split = [line.split("\t") for line in lines]
        return [(float(at), int(rank), int(pid), doing) for at, rank, pid, doing in split]

    def doing(self) -> str:
        """What the main process did last."""
        own = [doing for _, rank, _, doing in self.noted() if rank == 0]
        return own[-1] if own else START

    def running(self) -> bool:
        """Whether a process is left."""
        return any(process.poll() is None for process in self.processes)

    def wait_for(self, place: str, times: int = 1) -> bool:
        """Wait until the main process comes to a place for the n-th time; False if the run ended, or hangs, before."""
        while self.running() and time.monotonic() - self.began < PATIENCE:
            own = [doing for _, rank, _, doing in self.noted() if rank == 0]
            entered = [doing for doing, before in zip(own, [None, *own]) if doing == place != before]
            if len(entered) >= times:
                return True
            time.sleep(0.005)
        return False

    def lasted(self) -> dict[str, float]:
        """Seconds that the main process spent at each place at a time, on average."""
        own = [(at, doing) for at, rank, _, doing in self.noted() if rank == 0]
        spans: dict[str, list[float]] = {}
        for (at, doing), (then, _) in itertools.pairwise(own):
            spans.setdefault(doing, []).append(then - at)
        return {doing: sum(span) / len(span) for doing, span in spans.items()}

    def kill(self) -> str:
        """SIGKILL every process and every worker of theirs; returns what the run was doing."""
        pids = {process.pid for process in self.processes} | {pid for _, _, pid, _ in self.noted()}
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()
        return self.doing()

    def finish(self, patience: float = PATIENCE) -> list[int | None]:
        """Wait for the end; the exit codes, None for a process that hangs (and is killed)."""
        end = time.monotonic() + patience
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, end - time.monotonic()))
        codes = [process.poll() for process in self.processes]
        if None in codes:
            self.kill()
        return codes


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
