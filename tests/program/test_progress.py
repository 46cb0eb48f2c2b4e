"""Progress bars and what is said of the place of a run, in a run that is stopped and continued."""

import io
import itertools
import os
import signal

import pytest
from tqdm import tqdm

import run
from tests.support import thin
from train import Trainer

WORDS = "--task 6-2 --step 0 --epochs 3"


pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture
def bars(monkeypatch):
    """The bars of a run, drawn into a buffer."""
    drawn = []

    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, file=io.StringIO(), **kwargs)
            drawn.append(self)

    monkeypatch.setattr("utils.reporting.logger.tqdm", Bar)
    return drawn


def launch(folder, text):
    return run.main([word for word in thin.words(folder, text) if word != "--no_progress"])


def of_epochs(bars):
    """(title, first position, last position, total) of the bars of epochs; the list is emptied."""
    found = [
        (bar.desc.removesuffix(": "), bar.initial, bar.n, bar.total) for bar in bars if bar.desc.startswith("step")
    ]
    bars.clear()
    return found


def stop_before(monkeypatch, iteration):
    """A stop request of the system, seen in this iteration of the run and obeyed after it."""
    count, train = itertools.count(1), Trainer.train_iteration

    def train_iteration(trainer, *batch):
        if next(count) == iteration:
            os.kill(os.getpid(), signal.SIGTERM)
        return train(trainer, *batch)

    monkeypatch.setattr(Trainer, "train_iteration", train_iteration)


def test_a_run_counts_every_epoch_from_its_start(tmp_path, bars):
    assert launch(tmp_path, WORDS) == 0
    assert of_epochs(bars) == [(f"step 0 epoch {epoch}/3", 0, 6, 6) for epoch in (1, 2, 3)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_counts_on_where_it_was_stopped(tmp_path, bars, monkeypatch, capsys, workers):
    words = f"{WORDS} --num_workers {workers}"
    with monkeypatch.context() as patch:
        stop_before(patch, 10)  # six iterations an epoch: the fourth of the second
        assert launch(tmp_path, words) == 143
    bars.clear()
    capsys.readouterr()
    assert launch(tmp_path, f"{words} --resume") == 0
    assert of_epochs(bars) == [("step 0 epoch 2/3", 4, 6, 6), ("step 0 epoch 3/3", 0, 6, 6)]
    assert "resumed step 0 at epoch 2/3, iteration 5/6\n" in capsys.readouterr().out


def test_a_run_that_was_stopped_in_its_last_validation_says_so(tmp_path, bars, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        evaluate = Trainer.evaluate

        def stopped(trainer, *args, **rest):
            if trainer.epoch == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(trainer, *args, **rest)

        patch.setattr(Trainer, "evaluate", stopped)
        assert launch(tmp_path, WORDS) == 143
    bars.clear()
    assert launch(tmp_path, f"{WORDS} --resume") == 0
    assert of_epochs(bars) == []
    assert "resumed step 0 at the end of epoch 3/3\n" in capsys.readouterr().out
