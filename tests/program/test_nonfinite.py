"""A network with NaN, or one that learned nothing, is never recorded as a finished step."""

import itertools

import pytest
import torch

from tests.support import thin
from train import Trainer
from utils.checkpointing import checkpoint_files

STEP = "--task 6-2 --step 0 --method FT"


pytestmark = pytest.mark.usefixtures("small")


def files(folder):
    """Checkpoints, states and results of a run."""
    return sorted(path.name for name in ("checkpoints", "results") for path in (folder / name).glob("[!.]*"))


def bad_gradient(monkeypatch, iteration):
    """A NaN among the gradients of an iteration whose loss is finite."""
    count = itertools.count(1)

    def after_backward(self, network):
        if next(count) == iteration:
            next(iter(network.parameters())).grad.view(-1)[0] = torch.nan

    monkeypatch.setattr(thin.methods.Method, "after_backward", after_backward)


@pytest.mark.parametrize("iteration", [3, 6])
@pytest.mark.parametrize("skip", [0, 100])
def test_a_gradient_that_is_not_finite_ends_the_step(tmp_path, monkeypatch, capsys, iteration, skip):
    """Whether it is seen in the next loss or at the end of the epoch; skipping batches does not help."""
    bad_gradient(monkeypatch, iteration)
    assert thin.launch(tmp_path, f"{STEP} --skip_nonfinite {skip}") == 3
    out, err = capsys.readouterr()
    assert err.startswith("error: the network is not finite (body.") and err.count("\n") == 1
    assert f"step 0, epoch 1, iteration {iteration + 1}" in err or (iteration == 6 and "end of the training" in err)
    assert "start the step anew and lower --lr" in err
    assert "skipped a non-finite loss" not in out and ".nonfinite.pth" not in out
    assert files(tmp_path) == ["6-2-shapes_n_0.resume.pth"]  # which says that the step was begun


def test_the_saved_state_is_always_finite(tmp_path, monkeypatch):
    bad_gradient(monkeypatch, 12)
    assert thin.launch(tmp_path, f"{STEP} --epochs 3") == 3
    state = checkpoint_files.load(tmp_path / "checkpoints" / "6-2-shapes_n_0.resume.pth")["state"]
    assert state["position"][0] == 1
    assert all(value.isfinite().all() for value in state["model"].values())


def test_a_statistic_that_is_not_finite_ends_the_step(tmp_path, monkeypatch, capsys):
    def after_backward(self, network):
        network.body.mod2.block1.convs.bn1.running_var[0] = torch.inf

    monkeypatch.setattr(thin.methods.Method, "after_backward", after_backward)
    assert thin.launch(tmp_path, f"{STEP} --epochs 2") == 3
    assert "(body.mod2.block1.convs.bn1.running_var) at step 0, epoch 2, before iteration 1" in capsys.readouterr().err
    assert files(tmp_path) == ["6-2-shapes_n_0.resume.pth"]


def test_a_step_whose_every_batch_was_skipped_is_not_finished(tmp_path, monkeypatch, capsys):
    terms = thin.methods.Method.terms
    monkeypatch.setattr(
        thin.methods.Method, "terms", lambda self, batch: {k: v * torch.nan for k, v in terms(self, batch).items()}
    )
    assert thin.launch(tmp_path, f"{STEP} --skip_nonfinite 6") == 3
    assert "step 0 learned nothing" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints" / "6-2-shapes_n_0.pth").exists()


def test_the_state_set_aside_is_that_before_the_iteration(tmp_path, monkeypatch):
    seen, count = [], itertools.count(1)
    terms = thin.methods.Method.terms
    iteration = Trainer.train_iteration

    def train_iteration(trainer, *batch):
        seen.append(checkpoint_files.digest(trainer.network.state_dict()))
        return iteration(trainer, *batch)

    def poisoned(self, batch):
        factor = torch.nan if next(count) == 4 else 1
        return {name: value * factor for name, value in terms(self, batch).items()}

    monkeypatch.setattr(Trainer, "train_iteration", train_iteration)
    monkeypatch.setattr(thin.methods.Method, "terms", poisoned)
    assert thin.launch(tmp_path, STEP) == 3
    state = checkpoint_files.load(tmp_path / "checkpoints" / "6-2-shapes_n_0.nonfinite.pth")["state"]
    assert state["position"] == [0, 3, 0, 0]  # no batch was skipped
    assert checkpoint_files.digest(state["model"]) == seen[3]
