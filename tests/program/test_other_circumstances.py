"""--resume with other training images is refused, with another number of threads it is noted."""

import os
import shutil
import signal

import pytest
import torch

from tests.support import thin, tiny_folder
from train import Trainer
from utils.checkpointing import checkpoint_files

pytestmark = pytest.mark.usefixtures("small")


def interrupted(folder, text, monkeypatch):
    """A run that is asked to stop in its second iteration."""
    train = Trainer.train_iteration

    def train_iteration(trainer, *batch):
        if trainer.iteration == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train(trainer, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_iteration", train_iteration)
        assert thin.launch(folder, text) == 143


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """An interrupted run on a folder of images: the folder of the data, the command."""
    (tmp_path / "data").mkdir()
    data = tiny_folder.write_folder(tmp_path / "data")
    text = f"--dataset folder --task_file '{data}/task.json' --crop_size 24 --step 0 --method FT"
    interrupted(tmp_path, f"{text} --data_root '{data}'", monkeypatch)
    return data, text


CHANGES = {"reversed": lambda lines: lines[::-1], "halved": lambda lines: lines[:5]}


@pytest.mark.parametrize("change", CHANGES)
def test_another_list_of_images_is_refused(tmp_path, stopped, capsys, change):
    data, text = stopped
    split = data / "splits" / "train.txt"
    split.write_text("\n".join(CHANGES[change](split.read_text().splitlines())))
    state = next((tmp_path / "checkpoints").glob("*.resume.pth")).read_bytes()
    capsys.readouterr()
    assert thin.launch(tmp_path, f"{text} --data_root '{data}' --resume") == 2
    err = capsys.readouterr().err
    assert "another list of training images (" in err and "without --resume" in err and err.count("\n") == 1
    assert next((tmp_path / "checkpoints").glob("*.resume.pth")).read_bytes() == state


def test_the_same_list_in_another_place_is_continued(tmp_path, stopped, capsys):
    data, text = stopped
    shutil.copytree(data, tmp_path / "elsewhere")
    capsys.readouterr()
    assert thin.launch(tmp_path, f"{text} --data_root '{tmp_path}/elsewhere' --resume") == 0
    assert "resumed step 0 at epoch 1/1, iteration 3/" in capsys.readouterr().out


def test_another_number_of_threads_is_noted(tmp_path, monkeypatch, capsys):
    """Given, or as many as the machine has cores."""
    text = "--task 6-2 --step 0 --method FT"
    interrupted(tmp_path, f"{text} --threads 2", monkeypatch)
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "again" / "checkpoints")
    torch.set_num_threads(1)
    capsys.readouterr()
    assert thin.launch(tmp_path, f"{text} --resume") == 0
    out = capsys.readouterr().out
    assert "note: the interrupted run computed with 2 threads, this one has 1" in out and "--threads 2 continues" in out
    assert thin.launch(tmp_path / "again", f"{text} --resume --threads 2") == 0
    assert "the interrupted run computed" not in capsys.readouterr().out


def test_what_was_logged_is_on_the_disk_with_each_saved_state(tmp_path, monkeypatch):
    """A process that is killed right after leaves curves up to the iteration that its state continues at."""
    from tests.support.events import curves
    from utils.checkpointing.store import Store

    save, seen = Store.save_unfinished, []

    def save_unfinished(store, state):
        seen.append((state["iterations"], max(step for step, _ in curves(tmp_path / "logs").get("loss/ce", [(0, 0)]))))
        return save(store, state)

    monkeypatch.setattr(Store, "save_unfinished", save_unfinished)
    assert thin.launch(tmp_path, "--task 6-2 --step 0 --method FT --epochs 3 --print_interval 1") == 0
    assert seen == [(6, 6), (12, 12)]
    assert not list((tmp_path / "checkpoints").glob("*.resume.pth"))
    assert checkpoint_files.load(tmp_path / "checkpoints" / "6-2-shapes_n_0.pth")["iterations"] == 18
