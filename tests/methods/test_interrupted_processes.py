"""Methods whose processes exchange state, on two processes: killed in the middle of a step and resumed, to the bit."""

import os

import torch

import run
import train
from tests.methods.test_methods import free_ports
from tests.support import interrupted, thin
from utils.checkpointing import checkpoint_files

#: The method, and the iteration of step 1, those of its phases included, before which both processes are killed.
METHODS = {"REMINDER": 1, "SDR": 2, "MiB+AWT": 1, "MiB+EWF": 1, "MiB+NeST": 3}
KEYS = ("model_state", "method_state", "optimizer_state", "history")


def process(rank, folder, ports):
    """One of two processes: for each method a whole run, one that is killed, and its continuation."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    ports = iter(ports)

    def launch(name, words):
        os.environ["MASTER_PORT"] = str(next(ports))
        return thin.launch(folder / name, f"--task 6-2 --crop_size 64 --shapes_train 40 {words}")

    with thin.program():
        for method, at in METHODS.items():
            step0 = folder / method / "checkpoints" / "6-2-shapes_n_0.pth"
            words = f"--method {method} --step 1 --ckpt_minutes 1e-9 --step_ckpt '{step0}'"
            assert launch(method, f"--method {method} --step 0") == 0
            assert launch(method, words) == 0
            with interrupted.killed(at):  # both processes, at the same iteration
                launch(f"{method} killed", words)
            assert launch(f"{method} killed", f"{words} --resume") == 0


def test_two_processes_are_killed_and_resumed_to_the_bit(tmp_path):
    torch.multiprocessing.spawn(process, (tmp_path, free_ports(4 * len(METHODS))), nprocs=2)
    for method in METHODS:
        whole, parts = (
            checkpoint_files.load(tmp_path / name / "checkpoints" / "6-2-shapes_n_1.pth")
            for name in (method, f"{method} killed")
        )
        for key in KEYS:
            assert checkpoint_files.digest(whole[key]) == checkpoint_files.digest(parts[key]), (method, key)
    assert run.Trainer is train.Trainer
