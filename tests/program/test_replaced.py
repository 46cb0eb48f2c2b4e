"""A finished step that is trained again without --resume: it runs, says so, and keeps the checkpoint that it replaces."""

import os

import pytest

import dataset
from tests.support import thin
from utils.checkpointing.store import Store

TEXT = "--task 6-2 --method FT --step 0"


pytestmark = pytest.mark.usefixtures("small")


def files(folder):
    return {
        path.name.removeprefix("6-2-shapes_n_0").removesuffix(".pth"): path.read_bytes()
        for path in (folder / "checkpoints").iterdir()
        if "lock" not in path.name
    }


@pytest.mark.parametrize("links", [True, False])
def test_one_generation_is_kept(tmp_path, capsys, monkeypatch, links):
    if not links:  # a file system without hard links
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(1, "Operation not permitted")))
    assert thin.launch(tmp_path, TEXT) == 0
    first = files(tmp_path)
    assert set(first) == {""} and "trained again" not in capsys.readouterr().out
    assert thin.launch(tmp_path, f"{TEXT} --lr 0.02 --date e") == 0
    second = files(tmp_path)
    assert set(second) == {"", ".replaced"} and second[".replaced"] == first[""] != second[""]
    said = [line for line in capsys.readouterr().out.splitlines() if "trained again" in line]
    assert said == [
        "step 0 of 6-2 is trained again: its last checkpoint is kept as "
        f"{tmp_path / 'checkpoints' / '6-2-shapes_n_0.replaced.pth'}"
    ]
    assert thin.launch(tmp_path, f"{TEXT} --lr 0.03 --date f") == 0
    third = files(tmp_path)
    assert set(third) == {"", ".replaced"} and third[".replaced"] == second[""] != third[""]


def test_a_resume_of_a_finished_step_keeps_and_replaces_nothing(tmp_path):
    assert thin.launch(tmp_path, TEXT) == 0
    first = files(tmp_path)
    assert thin.launch(tmp_path, f"{TEXT} --resume") == 0
    assert files(tmp_path) == first


def test_it_is_refused_while_another_run_trains_the_step(tmp_path, capsys):
    assert thin.launch(tmp_path, TEXT) == 0
    first = files(tmp_path)
    opts = thin.options(f"--step 0 --checkpoint '{tmp_path}/checkpoints'")
    with Store(opts, dataset.load_task(opts, 0)).lock():
        assert thin.launch(tmp_path, TEXT) == 2
    assert "another run named 'n' trains step 0 of 6-2" in capsys.readouterr().err
    assert files(tmp_path) == first


def test_what_was_kept_survives_an_interruption(tmp_path, monkeypatch):
    """Stopped twice, started anew and resumed: the checkpoint of the training before is kept until the end."""
    assert thin.launch(tmp_path, TEXT) == 0
    first = files(tmp_path)[""]

    def fail(*_):
        raise OSError(28, "No space left on device")

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr("utils.checkpointing.store.Store.save_finished", fail)
            assert thin.launch(tmp_path, f"{TEXT} --lr 0.02 --date e --epochs 2") == 2
        assert files(tmp_path)[""] == files(tmp_path)[".replaced"] == first
    assert thin.launch(tmp_path, f"{TEXT} --lr 0.02 --date e --epochs 2 --resume") == 0
    assert set(files(tmp_path)) == {"", ".replaced"}
    assert files(tmp_path)[".replaced"] == first != files(tmp_path)[""]
