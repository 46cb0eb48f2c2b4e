"""Every method on two processes: killed in the middle of a step and resumed, to the bit."""

import os
import shlex

import torch

import methods
import run
import train
from tests.methods.test_methods import free_ports
from tests.support import interrupted, thin
from utils.checkpointing import checkpoint_files

#: Command lines, and the iteration of the step, those of its phases included, before which both processes are killed.
COMMANDS = {
    "FT": 1,
    "Joint --task offline": 1,
    "LWF": 1,
    "LWF-MC": 1,
    "ILT": 1,
    "EWC": 1,
    "RW": 1,
    "PI": 1,
    "MiB": 1,
    "PLOP": 1,
    "LSKD": 1,
    "REMINDER": 1,
    "SDR": 1,
    "UCD": 1,
    "RCIL": 1,
    "ALIFE": 1,
    # Without a validation no statistics of norms have been broadcast when the rotations begin
    "ALIFE-M --alife_memory 3 --alife_rotation_epochs 2 --val_interval 9": 3,
    "MiB+AWT --crop_size 64 --shapes_train 40": 1,
    "MiB+EWF": 1,
    "MiB+NeST --warm_epochs 2": 3,
}
#: Methods that are one of these with the fusion or the pre-tuning of another.
COMPOSED = {"PLOP+EWF", "LSKD+EWF", "PLOP+NeST", "LSKD+NeST"}
#: Methods that need what their own step 0 leaves; the others start from that of FT.
OWN_STEP_0 = ("EWC", "RW", "PI", "REMINDER", "SDR", "RCIL", "ALIFE-M", "MiB+AWT")
KEYS = ("model_state", "method_state", "trainer_state", "optimizer_state", "history")


def checkpoint(folder, words):
    """The file of the step that is killed."""
    task, step = ("offline", 0) if words.startswith("Joint") else ("6-2", 1)
    return folder / "checkpoints" / f"{task}-shapes_n_{step}.pth"


def process(rank, folder, ports):
    """One of two processes: for each method a whole step, one that is killed, and its continuation."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    ports = iter(ports)

    def launch(name, words):
        os.environ["MASTER_PORT"] = str(next(ports))
        return thin.launch(folder / name, f"--task 6-2 --shapes_train 24 --method {words}")

    with thin.program():
        for words, at in COMMANDS.items():
            name = words.split()[0]
            text = f"{words} --step {0 if name == 'Joint' else 1} --ckpt_minutes 1e-9"
            if name != "Joint":
                own = name if name in OWN_STEP_0 else "FT"
                if own == name:
                    assert launch(name, f"{words} --step 0") == 0
                text += f" --step_ckpt {shlex.quote(str(folder / own / 'checkpoints' / '6-2-shapes_n_0.pth'))}"
            assert launch(name, text) == 0
            with interrupted.killed(at):  # both processes, at the same iteration
                launch(f"{name} killed", text)
            assert launch(f"{name} killed", f"{text} --resume") == 0


def test_two_processes_are_killed_and_resumed_to_the_bit(tmp_path):
    """One test for all methods, because starting the processes takes longer than what they do."""
    assert {words.split()[0] for words in COMMANDS} | COMPOSED == set(methods.METHODS)
    torch.multiprocessing.spawn(process, (tmp_path, free_ports(4 * len(COMMANDS))), nprocs=2)
    for words in COMMANDS:
        name = words.split()[0]
        whole, parts = (
            checkpoint_files.load(checkpoint(tmp_path / folder, words)) for folder in (name, f"{name} killed")
        )
        for key in KEYS:
            assert checkpoint_files.digest(whole[key]) == checkpoint_files.digest(parts[key]), (name, key)
    assert run.Trainer is train.Trainer
