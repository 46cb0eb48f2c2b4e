"""Two torchrun agents, as on two machines, that meet by the c10d rendezvous: one is killed, both are started again with --resume."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import thin
from tests.support.paths import ROOT
from tests.utils.runtime.test_distributed import free_ports
from utils.checkpointing import checkpoint_files

STEP = "--task 6-2 --step 0 --method FT --epochs 8 --norm_act iabn_sync --shapes_train 16"
SECONDS = 90


def agents(folder: Path, options: str) -> list[subprocess.Popen]:
    """Start one process on each of two nodes; the first one holds the store of the rendezvous."""
    (port,) = free_ports(1)
    words = thin.words(folder, f"{STEP} {options}")
    found = []
    for node in (0, 1):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            "--nproc_per_node=1",
            "--max_restarts=0",
        ]
        command += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=two_nodes"]
        command += [f"--rdzv_conf=is_host={1 - node}", "--local_addr=127.0.0.1", "-m", "tests.support.thin_run", *words]
        output = (folder / f"{node}.log").open("a")
        found.append(subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT))
    return found


def finish(started: list[subprocess.Popen]) -> list[int]:
    """Exit codes; no agent is left running."""
    try:
        return [one.wait(timeout=SECONDS) for one in started]
    finally:
        for one in started:
            kill(one)


def kill(agent: subprocess.Popen) -> None:
    """As a machine that loses its power: agent and worker end without a word."""
    if agent.poll() is None:
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        for pid in (agent.pid, *map(int, children)):
            os.kill(pid, signal.SIGKILL)
        agent.wait()


def epoch_of(state: Path) -> int:
    """Epochs that a saved state has behind it; 0 without one."""
    found = checkpoint_files.load(state)["state"] if state.is_file() else None
    return found["position"][0] if found else 0


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the processes of an agent are found in /proc")
def test_a_node_that_is_lost_costs_nothing_but_time(tmp_path):
    for name in ("whole", "lost"):
        (tmp_path / name).mkdir()
    assert finish(agents(tmp_path / "whole", "")) == [0, 0], (tmp_path / "whole" / "0.log").read_text()[-2000:]

    checkpoints = tmp_path / "lost" / "checkpoints"
    started = agents(tmp_path / "lost", "")
    try:
        ends = time.monotonic() + SECONDS
        while epoch_of(checkpoints / "6-2-shapes_n_0.resume.pth") < 2:
            assert time.monotonic() < ends and started[0].poll() is None, (tmp_path / "lost" / "0.log").read_text()[
                -2000:
            ]
            time.sleep(0.02)
        kill(started[1])
    finally:
        codes = finish(started)
    assert codes[0] != 0 and codes[1] == -signal.SIGKILL
    assert not (checkpoints / "6-2-shapes_n_0.pth").exists()

    assert finish(agents(tmp_path / "lost", "--resume")) == [0, 0], (tmp_path / "lost" / "0.log").read_text()[-2000:]
    assert "resumed step 0 at epoch" in "".join((tmp_path / "lost" / f"{node}.log").read_text() for node in (0, 1))
    weights = [
        checkpoint_files.digest(
            checkpoint_files.load(tmp_path / name / "checkpoints" / "6-2-shapes_n_0.pth")["model_state"]
        )
        for name in ("whole", "lost")
    ]
    assert weights[0] == weights[1]
