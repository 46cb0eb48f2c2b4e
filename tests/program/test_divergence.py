"""Losses that diverge: said once, with what helps, and the weights before it kept."""

import itertools
import os
import re
import signal

import pytest

from tests.support import thin
from train import Trainer
from utils.checkpointing import checkpoint_files

pytestmark = pytest.mark.usefixtures("small")


PENALTY = ("regularizer", "the penalty is stable at --lr 0.01 up to --reg_importance ", 10)
CASES = {
    **{method: (f"--step 1 --method {method} --reg_importance 1e6", *PENALTY) for method in ("EWC", "PI", "RW")},
    "lr": ("--step 0 --method FT --lr 1000", "ce", "lower --lr, --pod_factor or --loss_kd", 1e5),
}


@pytest.mark.parametrize(("words", "term", "remedy", "healthy"), CASES.values(), ids=CASES)
def test_a_diverging_loss_is_warned_of_once_and_its_state_kept(tmp_path, capsys, words, term, remedy, healthy):
    words = f"--task 6-2 {words}"
    if "--step 1" in words:
        assert thin.launch(tmp_path, words.replace("--step 1", "--step 0")) == 0
    capsys.readouterr()
    assert thin.launch(tmp_path, f"{words} --epochs 8 --val_interval 9") == 3
    out, err = capsys.readouterr()
    (warning,) = (line for line in out.splitlines() if line.startswith("warning: "))
    place, losses = re.fullmatch(
        rf"warning: the loss diverges, (step \d, epoch \d, iteration \d): (.*); it was [0-9.]+ in the first iteration; {remedy}.*",
        warning,
    ).groups()
    values = {name: float(value) for name, value in (pair.split() for pair in losses.split(", "))}
    assert max(value for name, value in values.items() if name != "loss") == values[term]
    assert values["loss"] == pytest.approx(sum(value for name, value in values.items() if name != "loss"), rel=1e-5)
    assert err.startswith("error: non-finite loss after it diverged, at step ") and remedy in err
    assert "--skip_nonfinite" not in err
    (aside,) = (tmp_path / "checkpoints").glob("*.nonfinite.pth")
    assert f"the state before the iteration in which it began to diverge is in {aside}" in out
    state = checkpoint_files.load(aside)["state"]
    epoch, iteration = state["position"][:2]
    assert place.endswith(f"epoch {epoch + 1}, iteration {iteration + 1}")
    weights = [value for value in state["model"].values() if value.is_floating_point()]
    assert all(value.isfinite().all() and value.abs().max() < healthy for value in weights)


def test_a_warning_of_divergence_is_not_repeated_after_a_resume(tmp_path, capsys, monkeypatch):
    words = "--task 6-2 --step 0 --method FT --lr 30 --epochs 4 --val_interval 9"
    with monkeypatch.context() as patch:
        iterations = itertools.count(1)
        train = Trainer.train_iteration

        def train_iteration(trainer, *batch):
            if next(iterations) == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return train(trainer, *batch)

        patch.setattr(Trainer, "train_iteration", train_iteration)
        assert thin.launch(tmp_path, words) == 143
    assert capsys.readouterr().out.count("warning: the loss diverges") == 1
    assert thin.launch(tmp_path, f"{words} --resume") in (0, 3)
    assert "warning: the loss diverges" not in capsys.readouterr().out
