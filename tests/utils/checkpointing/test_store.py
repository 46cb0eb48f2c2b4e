"""Which checkpoint a step may build on, which state it may continue, and who may write."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

import argparser
from dataset import tasks
from tests.support import thin
from utils.checkpointing import checkpoint_files, header, store
from utils.checkpointing.store import Store

#: What `Trainer.state_dict` returns, as far as the store looks at it.
STATE = {"model": {"body.w": torch.ones(2), "head.w": torch.ones(1), "cls.w": torch.ones(1)}, "optimizer": {},
         "scheduler": {"last_epoch": 6}, "position": [3, 0, 3, 0], "best_score": 0.5, "method": {"regularizer": {}, "other": {}},
         "history": [], "iterations": 6}  # fmt: skip


def make(folder, step=0, text="", task="6-2"):
    opts = thin.options(f"--checkpoint '{folder}' --task {task} --step {step} {text}")
    loaded = tasks.load("shapes", task, step)
    return Store(argparser.options_of_step(opts, loaded), loaded)


def refusal(action):
    with pytest.raises(ValueError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------ file names


def test_file_names_are_the_official_ones(tmp_path):
    before = make(tmp_path, 2, "--name exp.v1")
    assert before.finished(2) == tmp_path / "6-2-shapes_exp.v1_2.pth"
    assert before.previous() == tmp_path / "6-2-shapes_exp.v1_1.pth"
    assert before.unfinished(2) != before.finished(2)


def test_step_ckpt_is_for_the_first_step_of_the_command(tmp_path):
    (tmp_path / "base.pth").write_bytes(b"")
    text = f"--step 1 2 --step_ckpt '{tmp_path}/base.pth'"
    assert make(tmp_path, 1, text).previous() == tmp_path / "base.pth"
    assert make(tmp_path, 2, text).previous() == tmp_path / "6-2-shapes_n_1.pth"


# ------------------------------------------------------------ finished and next


def test_finished_checkpoint_has_the_official_keys(tmp_path):
    mine = make(tmp_path)
    mine.save_unfinished(STATE)
    mine.save_finished(STATE, {})
    state = checkpoint_files.load(mine.finished(0))
    assert {"epoch", "model_state", "optimizer_state", "scheduler_state", "best_score", "trainer_state"} <= set(state)
    assert (
        state["epoch"] == 2 and state["trainer_state"] == {"regularizer": {}} and state["method_state"] == {"other": {}}
    )
    assert list(state["model_state"]) == ["module.body.w", "module.head.w", "module.cls.w"]
    assert "loss_weights" not in state
    assert state["task"] == {"dataset": "shapes", "name": "6-2", "step": 0, "steps": [[0, 1, 2, 3, 4, 5, 6]]}
    assert state["options"]["backbone"] == "resnet18" and state["options"]["lr_of_step"] == 0.01
    assert not mine.unfinished(0).exists()


NAMED = {"ce": torch.tensor(0.5), "kd": torch.tensor(1.5)}


def test_the_next_step_reads_it(tmp_path):
    make(tmp_path).save_finished(STATE, NAMED, {"ce": torch.tensor(7.0)})
    written = checkpoint_files.load(make(tmp_path).finished(0))
    assert list(written["model_state"])[1:3] == ["module.head.lossweights", "module.head.w"]
    assert torch.equal(written["model_state"]["module.head.lossweights"], torch.tensor([0.5, 1.5]))
    state = make(tmp_path, 1).load_previous()
    assert list(state["model_state"]) == ["body.w", "head.w", "cls.w"]
    assert state["loss_weights"] == NAMED


def test_a_step_without_lambda_hands_it_on(tmp_path):
    make(tmp_path).save_finished(STATE, {}, NAMED)
    assert "module.head.lossweights" not in checkpoint_files.load(make(tmp_path).finished(0))["model_state"]
    assert make(tmp_path, 1).load_previous()["loss_weights"] == NAMED


def test_official_checkpoints_are_taken(tmp_path):
    mine = make(tmp_path, 1)
    torch.save({"epoch": 1, "model_state": {"module.body.w": torch.ones(2)}, "trainer_state": None}, mine.previous())
    assert mine.load_previous()["loss_weights"] == {}


def test_a_missing_previous_step_says_what_to_do(tmp_path):
    text = refusal(make(tmp_path, 1).load_previous)
    assert "6-2-shapes_n_0.pth does not exist" in text and "train --step 0 first" in text


@pytest.mark.parametrize(
    ("step", "other", "expected"),
    [
        (1, "--backbone resnet34", "--backbone resnet18, this run has resnet34"),
        (1, "--norm_act abn", "--norm_act iabn, this run has abn; give all steps the same --norm_act"),
        (1, "--norm_act std", "--norm_act iabn, this run has std; give all steps the same --norm_act"),
        (1, "--output_stride 8", "--output_stride 16, this run has 8"),
        (1, "--cosine", "--cosine False, this run has True"),
        (1, "--nb_background_modes 2", "--nb_background_modes 1, this run has 2"),
        (2, "", "is step 0 of 6-2 on shapes, not step 1 of 6-2 on shapes"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(tmp_path, step, other, expected):
    make(tmp_path).save_finished(STATE, {})
    text = refusal(make(tmp_path, step, f"{other} --step_ckpt '{tmp_path}/6-2-shapes_n_0.pth'").load_previous)
    assert expected in text and "6-2-shapes_n_0.pth" in text


@pytest.mark.parametrize("norms", [("iabn", "iabn_sync", "iabn_sync_test"), ("abn", "std")])
def test_a_norm_that_reads_the_weights_alike_is_taken(tmp_path, norms):
    """Such as one that synchronises them; the official files, which name no norm, are taken with every one."""
    for trained in norms:
        make(tmp_path, 0, f"--norm_act {trained}").save_finished(STATE, {})
        for norm in norms:
            text = f"--norm_act {norm} --step_ckpt '{tmp_path}/6-2-shapes_n_0.pth'"
            assert make(tmp_path, 1, text).load_previous()["options"]["norm_act"] == trained
    torch.save({"model_state": {"module.body.w": torch.ones(2)}}, tmp_path / "official.pth")
    for norm in norms:
        make(tmp_path, 1, f"--norm_act {norm} --step_ckpt '{tmp_path}/official.pth'").load_previous()


def test_another_fusion_of_background_modes_is_refused(tmp_path):
    """It has no weights, but the same weights give other logits; with one mode there is nothing to fuse."""
    make(tmp_path, 0, "--nb_background_modes 2 --multimodal_fusion max").save_finished(STATE, {})
    assert "--multimodal_fusion max, this run has sum" in refusal(
        make(tmp_path, 1, "--nb_background_modes 2").load_previous
    )
    make(tmp_path, 0, "--multimodal_fusion max").save_finished(STATE, {})
    make(tmp_path, 1).load_previous()


def test_another_overlap_setting_is_refused(tmp_path):
    make(tmp_path).save_finished(STATE, {})
    disjoint = make(tmp_path, 1)
    disjoint.opts.overlap = False
    assert "--overlap True, this run has False; give all steps the same --overlap" in refusal(disjoint.load_previous)
    disjoint.task = disjoint.task.at(0)
    disjoint.load_tested(disjoint.finished(0))  # a test does not depend on it


def test_another_order_of_classes_is_refused(tmp_path):
    make(tmp_path).save_finished(STATE, {})
    (tmp_path / "order.json").write_text('{"name": "6-2b", "steps": [[0, 2, 1, 3, 4, 5, 6], [7, 8], [9, 10]]}')
    text = f"--task_file '{tmp_path}/order.json' --step_ckpt '{tmp_path}/6-2-shapes_n_0.pth'"
    opts = thin.options(f"--checkpoint '{tmp_path}' --step 1 {text}")
    other = Store(opts, tasks.load("shapes", None, 1, opts.task_file))
    assert "learned the classes [[0, 1, 2, 3, 4, 5, 6]], task 6-2b has [[0, 2, 1, 3, 4, 5, 6]]" in refusal(
        other.load_previous
    )
    other.task = other.task.at(0)
    assert "learned the classes" in refusal(lambda: other.load_tested(tmp_path / "6-2-shapes_n_0.pth"))


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"model_state": None},
        {"model_state": {"a": 1}},
        {"model_state": {}, "task": 3},
        {"model_state": {}, "task": {"name": "6-2"}},
        {"model_state": {}, "options": []},
        {"model_state": {}, "options": {1: 2}},
        {"model_state": {}, "options": {"date": "../../elsewhere"}},
        {"model_state": {}, "options": {"date": 3}},
        {"model_state": {}, "scheduler_state": torch.zeros(2)},
        {"model_state": {}, "scheduler_state": {"last_epoch": "x"}},
        {"model_state": {}, "history": torch.zeros(2)},
    ],
)
def test_what_is_no_checkpoint_of_a_step_is_refused(tmp_path, state):
    mine = make(tmp_path, 1)
    checkpoint_files.save(mine.previous(), state)
    assert "name a file that a finished step wrote" in refusal(mine.load_previous)


# ---------------------------------------------------------------------- resume


def test_an_unfinished_step_is_continued_with_the_same_options_only(tmp_path):
    mine = make(tmp_path)
    assert mine.load_unfinished() is None
    mine.save_unfinished(STATE)
    assert mine.load_unfinished()["state"]["position"] == [3, 0, 3, 0]
    allowed = (
        "--num_workers 3 --print_interval 2 --ckpt_interval 4 --lr 0.01 0.5 --step 0 1 --resume --skip_nonfinite 2"
    )
    assert make(tmp_path, 0, allowed).load_unfinished() is not None
    text = refusal(make(tmp_path, 0, "--lr 0.02 --batch_size 3 --random_seed 1 --threshold 0.5").load_unfinished)
    for part in (
        "threshold was 0.9, is 0.5",
        "batch_size was 2, is 3",
        "lr_of_step was 0.01, is 0.02",
        "random_seed was 42, is 1",
        "--resume",
    ):
        assert part in text


def test_a_step_begun_anew_hides_older_states(tmp_path):
    mine = make(tmp_path)
    mine.save_unfinished(STATE)
    mine.begin()
    assert mine.unfinished(0).is_file() and mine.load_unfinished() is None


def test_a_damaged_state_is_refused(tmp_path):
    mine = make(tmp_path)
    mine.save_finished(STATE, {})
    os.replace(mine.finished(0), mine.unfinished(0))
    assert "not the state of an interrupted run" in refusal(mine.load_unfinished)
    mine.unfinished(0).write_bytes(b"PK")
    assert "damaged" in refusal(mine.load_unfinished)


def test_a_finished_step_of_other_options_is_not_taken_for_this_one(tmp_path):
    make(tmp_path).save_finished(STATE, {})
    assert make(tmp_path).check_finished()["epoch"] == 2
    assert "epochs was 1, is 2" in refusal(make(tmp_path, 0, "--epochs 2").check_finished)


def test_a_file_of_an_earlier_version_was_trained_with_the_defaults_of_newer_options(tmp_path):
    store = make(tmp_path)
    store.save_finished(STATE, {})
    path = store.finished(0)
    state = checkpoint_files.load(path)
    for newer in ("exclude_old", "loss_kd"):
        del state["options"][newer]
    checkpoint_files.save(path, state | {"options": state["options"] | {"gone": 1}})
    assert "(gone was 1, is None)" in refusal(make(tmp_path).check_finished)
    checkpoint_files.save(path, state)
    assert make(tmp_path).check_finished()["epoch"] == 2
    assert "loss_kd was None, is 3.0" in refusal(make(tmp_path, 0, "--loss_kd 3").check_finished)
    assert "loss_kd was None, is 10.0" in refusal(make(tmp_path, 0, "--method MiB").check_finished)


def test_every_option_that_may_change_exists():
    known = set(header.plain_options(thin.options())) | {"lr_of_step"}
    assert known >= header.MAY_CHANGE_ON_RESUME


def test_plain_options_load_without_code(tmp_path):
    opts = thin.options("--method PLOP --step 0 1")
    opts.path = Path("x")
    plain = header.plain_options(opts)
    assert (
        plain["step"] == [0, 1] and plain["path"] == "x" and plain["pod_options"]["switch"]["after"]["type"] == "local"
    )
    assert not {"explicit", "preset_applied", "task_preset"} & set(plain)
    checkpoint_files.save(tmp_path / "a.pth", plain)
    assert checkpoint_files.load(tmp_path / "a.pth") == plain


# ------------------------------------------------------------ two runs at once


def test_one_run_of_a_name_and_step(tmp_path):
    lock = make(tmp_path).lock()
    assert "another run named 'n' trains step 0 of 6-2" in refusal(make(tmp_path).lock)
    make(tmp_path, 1).lock().release()
    make(tmp_path, 0, "--name other").lock().release()
    lock.release()
    make(tmp_path).lock().release()  # a lock file that is left over locks nothing
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]


def test_the_lock_of_a_killed_run_locks_nothing(tmp_path):
    read, write = os.pipe()
    training = os.fork()
    if training == 0:
        lock = make(tmp_path).lock()
        os.write(write, b"x" * lock.is_locked)
        time.sleep(30)
        os._exit(1)
    assert os.read(read, 1) == b"x"
    assert "another run named" in refusal(make(tmp_path).lock)
    os.kill(training, signal.SIGKILL)
    os.waitpid(training, 0)
    make(tmp_path).lock().release()
    os.close(read), os.close(write)


def test_folders_that_cannot_be_written_are_named(tmp_path, monkeypatch):
    mine = make(tmp_path / "new" / "checkpoints")
    mine.check_writable(str(tmp_path / "new" / "logs"))
    assert sorted(path.name for path in (tmp_path / "new").rglob("*")) == ["checkpoints", "logs"]
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file/logs cannot be written" in refusal(
        lambda: mine.check_writable(str(tmp_path / "file" / "logs"))
    )

    def fail(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(store.tempfile, "TemporaryFile", fail)
    assert "(Read-only file system); name another with --checkpoint" in refusal(mine.check_writable)
