"""A step goes on only from the step t-1 that it was begun from."""

import pytest

import train
from tests.support import thin
from utils.checkpointing import checkpoint_files

STEP0 = "--task 6-2 --step 0 --method FT"
STEP1 = "--task 6-2 --step 1 --method PLOP --epochs 2"


pytestmark = pytest.mark.usefixtures("small")


def train_again(folder):
    """Another training of step 0 under the same name, with results of its own."""
    assert thin.launch(folder, f"{STEP0} --random_seed 1 --results '{folder}/again'") == 0


def interrupt(folder, text, monkeypatch):
    """A run that ends in its third iteration, after a saved state."""
    real, calls = train.Trainer.train_iteration, []

    def iteration(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "train_iteration", iteration)
        with pytest.raises(KeyboardInterrupt):
            thin.launch(folder, f"{text} --ckpt_minutes 0")


def test_a_finished_step_of_another_step_before_it_is_refused(tmp_path, capsys):
    assert thin.launch(tmp_path, STEP0) == thin.launch(tmp_path, STEP1) == 0
    train_again(tmp_path)
    before = thin.rows(tmp_path)
    capsys.readouterr()
    assert thin.launch(tmp_path, f"{STEP1} --resume") == 2
    said = capsys.readouterr().err
    assert "6-2-shapes_n_1.pth was trained from another step 0" in said and "train step 1 anew without --resume" in said
    assert thin.rows(tmp_path) == before
    assert thin.launch(tmp_path, STEP1) == 0
    assert thin.launch(tmp_path, f"{STEP1} --resume") == 0


def test_an_interrupted_step_of_another_step_before_it_is_refused(tmp_path, monkeypatch, capsys):
    assert thin.launch(tmp_path, STEP0) == 0
    interrupt(tmp_path, STEP1, monkeypatch)
    first = (tmp_path / "checkpoints" / "6-2-shapes_n_0.pth").read_bytes()
    train_again(tmp_path)
    capsys.readouterr()
    assert thin.launch(tmp_path, f"{STEP1} --resume") == 2
    assert "6-2-shapes_n_1.resume.pth was trained from another step 0" in capsys.readouterr().err
    (tmp_path / "checkpoints" / "6-2-shapes_n_0.pth").write_bytes(first)  # it was refused only, not touched
    assert thin.launch(tmp_path, f"{STEP1} --resume") == 0


def test_the_step_before_may_be_moved_deleted_or_trained_again_to_the_same_weights(tmp_path, monkeypatch, capsys):
    assert thin.launch(tmp_path, STEP0) == 0
    interrupt(tmp_path, STEP1, monkeypatch)
    assert thin.launch(tmp_path, STEP0) == 0
    assert thin.launch(tmp_path, f"{STEP1} --resume") == 0
    (tmp_path / "checkpoints" / "6-2-shapes_n_0.pth").unlink()
    capsys.readouterr()
    assert thin.launch(tmp_path, f"{STEP1} --resume") == 0
    assert "step 1 of 6-2 is finished" in capsys.readouterr().out


def test_checkpoints_without_the_digest_are_taken(tmp_path):
    """Those of earlier versions, and official ones."""
    assert thin.launch(tmp_path, STEP0) == thin.launch(tmp_path, STEP1) == 0
    path = tmp_path / "checkpoints" / "6-2-shapes_n_1.pth"
    state = checkpoint_files.load(path)
    before = checkpoint_files.load(tmp_path / "checkpoints" / "6-2-shapes_n_0.pth")
    weights = checkpoint_files.without_prefix(before["model_state"])
    assert state.pop("previous_sha256") == checkpoint_files.digest(weights)
    assert "previous_sha256" not in before
    checkpoint_files.save(path, state)
    train_again(tmp_path)
    assert thin.launch(tmp_path, f"{STEP1} --resume") == 0
