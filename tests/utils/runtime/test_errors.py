"""A user's mistake is one line and exit code 2; every other exception is a bug and shows its traceback."""

import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch

import train
from dataset.sampler import Loader
from tests.support import thin
from tests.support.paths import ROOT
from utils.errors import UserError
from utils.runtime import errors, memory

BUGS = {
    "numpy": lambda *_: np.zeros(6).reshape(4, 2),  # ValueError
    "torch": lambda *_: torch.zeros(2).item(),  # RuntimeError
    "optimiser": lambda *_: torch.optim.SGD([torch.zeros(1)], lr=-1.0),  # ValueError
}


@pytest.mark.parametrize("bug", BUGS)
def test_an_exception_of_a_library_within_a_step_is_raised(tmp_path, monkeypatch, capsys, bug):
    monkeypatch.setattr(train.Trainer, "train_iteration", BUGS[bug])
    with thin.program(), pytest.raises((ValueError, RuntimeError)) as caught:
        thin.launch(tmp_path, "--task 6-2 --step 0")
    assert not isinstance(caught.value, UserError)
    assert "error: " not in capsys.readouterr().err


def test_a_users_mistake_within_a_step_is_one_line(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise UserError("image b.png cannot be read; restore it")

    monkeypatch.setattr(train.Trainer, "train_iteration", refuse)
    with thin.program():
        assert thin.launch(tmp_path, "--task 6-2 --step 0") == 2
    assert capsys.readouterr().err == "error: image b.png cannot be read; restore it\n"


def test_a_bug_ends_the_program_with_a_traceback_and_exit_code_1(tmp_path):
    code = (
        "import sys, numpy, run\n"
        "run.StepRun.go = lambda self: numpy.zeros(6).reshape(4, 2)\n"
        "sys.exit(run.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *thin.words(tmp_path, "--task 6-2 --step 0")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("Traceback (most recent call last)")
    assert ended.stderr.endswith("ValueError: cannot reshape array of size 6 into shape (4,2)\n")
    assert "error: " not in ended.stderr.replace("ValueError: ", "")


def bug(*_):
    raise ValueError("operands could not be broadcast together")


def mistake(*_):
    raise UserError("mask a.png is damaged")


@pytest.mark.parametrize("planted", [bug, mistake])
def test_the_same_holds_in_a_process_that_loads_data(planted):
    loader = Loader(_Set(planted), range(2), 1, Namespace(num_workers=1, random_seed=0), pin_memory=False)
    with pytest.raises(ValueError) as caught:
        next(iter(loader))
    if planted is bug:
        assert errors.report(caught.value, debug=False) is None
        assert memory.shortage(caught.value) == ""
    else:
        assert errors.report(caught.value, debug=False) == 2


class _Set(torch.utils.data.Dataset):
    def __init__(self, planted):
        self.planted = planted

    def __len__(self):
        return 2

    def __getitem__(self, index):
        self.planted()


def test_a_lost_process_that_loads_data_is_told_from_an_exception_in_one():
    lost = RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly")
    raised = RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback")
    assert "--num_workers" in memory.shortage(lost)
    assert memory.shortage(raised) == ""
