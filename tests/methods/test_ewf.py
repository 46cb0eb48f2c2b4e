"""EWF: fusion by hand, frozen classifiers, combinations, and runs through the command line."""

import math
import shlex

import pytest
import torch

import train
from methods import ewf
from tests.support import interrupted, thin
from tests.support.command_lines import parse, refusal
from utils.checkpointing import checkpoint_files
from utils.checkpointing.store import read

pytestmark = pytest.mark.usefixtures("small")


def checkpoint(folder, name):
    return folder / "checkpoints" / f"6-2-shapes_{name}.pth"


# ---------------------------------------------------------------------- by hand


def test_fusion_by_hand():
    before = {"weight": torch.tensor([1.0, -2.0]), "count": torch.tensor(7)}
    after = {"weight": torch.tensor([5.0, 2.0]), "count": torch.tensor(8), "new": torch.tensor([9.0])}
    found = ewf.fused(before, after, 0.25)
    assert found["weight"].tolist() == [2.0, -1.0]
    assert found["count"].tolist() == 7 and found["count"].dtype is torch.int64  # 7.25, truncated
    assert set(found) == {"weight", "count"}


def test_only_what_moved_furthest_is_fused_by_hand():
    """9 elements of two entries: the 4 that moved furthest, by 9, 8, 7 and 6, are fused; those that moved less stay as trained."""
    before = {"a": torch.zeros(5), "b": torch.zeros(2, 2)}
    after = {"a": torch.tensor([1.0, -9.0, 3.0, 7.0, 5.0]), "b": torch.tensor([[-2.0, 8.0], [6.0, 4.0]])}
    found = ewf.fused(before, after, 0.5, furthest_only=True)
    assert found["a"].tolist() == [1.0, -4.5, 3.0, 3.5, 5.0]
    assert found["b"].tolist() == [[-2.0, 4.0], [3.0, 4.0]]


def test_too_few_elements_to_choose_from_stay_as_trained():
    assert ewf.fused({"a": torch.zeros(2)}, {"a": torch.ones(2)}, 0.5, furthest_only=True)["a"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("steps", "factor"), [((tuple(range(16)), (16,)), 0.2425), (((0, 1), (2, 3)), 0.7071)])
def test_factor_by_hand(steps, factor):
    (part,) = (part for part in thin.Step("--ewf", steps).method.parts if isinstance(part, ewf.WeightFusion))
    assert part.factor == pytest.approx(factor, abs=5e-5)


def parts_of(words, steps=((0, 1, 2), (3,), (4, 5))):
    return {type(part).__name__ for part in thin.Step(words, steps).method.parts}


def test_switches():
    names = {"FrozenClassifiers", "WeightFusion"}
    assert parts_of("--ewf") & names == parts_of("--weight_fusion --fix_pre_cls") & names == names
    assert parts_of("--weight_fusion") & names == {"WeightFusion"}
    assert parts_of("--fix_pre_cls") & names == {"FrozenClassifiers"}
    assert not parts_of("--method MiB+EWF", steps=((0, 1, 2),)) & names  # step 0


def test_earlier_classifiers_do_not_learn_and_do_not_decay():
    step = thin.Step("--method MiB+EWF --weight_decay 0.1")
    images, labels = thin.images(2), thin.bands(0, 4, 5)
    before = [parameter.detach().clone() for parameter in step.model.cls.parameters()]
    trainer = step.trainer()
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    trainer.train_iteration(images, labels)
    after = list(step.model.cls.parameters())
    assert [torch.equal(a, b) for a, b in zip(after, before)] == [True] * 4 + [False] * 2
    assert [id(parameter) in trained for parameter in after] == [False] * 4 + [True] * 2
    assert all(parameter.grad is None for parameter in after[:4])


@pytest.mark.parametrize(("task", "factor"), [("100-50", 10), ("100-10", 100), ("100-5", 100)])
def test_published_factors_on_ade(task, factor):
    assert parse(f"--method MiB+EWF --dataset ade --task {task}").loss_kd == factor
    assert parse(f"--method PLOP+EWF --dataset ade --task {task}").pod_factor == 0.001
    assert parse("--method MiB+EWF --dataset voc --task 15-5s").loss_kd == 10


def test_refusals(tmp_path, capsys):
    assert "--threshold_choice needs --weight_fusion or --ewf" in refusal("--threshold_choice --step 1")
    words = f"--data_root '{tmp_path}' --dataset cityscapes_domain --task 11-5 --step 1"
    for flag in ("--ewf", "--weight_fusion", "--fix_pre_cls"):
        assert thin.launch(tmp_path, f"{words} {flag}") == 2
        assert f"{flag} cannot work on cityscapes_domain" in capsys.readouterr().err


# ------------------------------------------------------------------ command line


@pytest.mark.parametrize("words", ["--method MiB --ewf", "--method MiB --ewf --threshold_choice"])
def test_the_checkpoint_is_the_mean_of_both_ends(words, tmp_path):
    """Of step 0, and of step 1 trained from the same weights without the fusion."""
    common = "--task 6-2 --shapes_train 24"
    assert thin.launch(tmp_path, f"{common} {words} --step 0 1") == 0
    base = f"--step_ckpt {shlex.quote(str(checkpoint(tmp_path, 'n_0')))} --name plain"
    assert thin.launch(tmp_path, f"{common} --method MiB --fix_pre_cls --step 1 {base}") == 0
    first, second, plain = (read(checkpoint(tmp_path, name)) for name in ("n_0", "n_1", "plain_1"))
    expected = plain["model_state"] | ewf.fused(
        first["model_state"], plain["model_state"], math.sqrt(2 / 9), "choice" in words
    )
    assert checkpoint_files.digest(second["model_state"]) == checkpoint_files.digest(expected)
    assert checkpoint_files.digest(second["optimizer_state"]) == checkpoint_files.digest(plain["optimizer_state"])


def test_bias_of_the_background_after_a_step(tmp_path):
    """b − α·ln(C_new + 1); frozen weights come out unchanged."""
    assert thin.launch(tmp_path, "--task 6-2 --method MiB+EWF --step 0 1") == 0
    first, second = (read(checkpoint(tmp_path, name))["model_state"] for name in ("n_0", "n_1"))
    lowered = first["cls.0.bias"].clone()
    lowered[0] -= math.sqrt(2 / 9) * math.log(3)
    torch.testing.assert_close(second["cls.0.bias"], lowered)
    torch.testing.assert_close(second["cls.0.weight"], first["cls.0.weight"])


@pytest.mark.parametrize("words", ["--method MiB+AWT --ewf", "--method LSKD+EWF"])
def test_three_steps_with_other_methods(words, tmp_path):
    assert thin.launch(tmp_path, f"--task 6-2 {words} --step 0 1 2") == 0
    assert all(value.isfinite().all() for value in read(checkpoint(tmp_path, "n_2"))["model_state"].values())


@pytest.mark.parametrize("targets", [interrupted.ITERATIONS, ((ewf.WeightFusion, "fuse"),)])
def test_a_resume_continues_to_the_bit(targets, tmp_path):
    """Killed in the middle of the training, and after it before the fusion."""
    at = 1 if targets is interrupted.ITERATIONS else 0
    words = "--task 6-2 --method MiB+EWF --epochs 2"
    interrupted.assert_equal_to_the_bit(*interrupted.run_twice(tmp_path, words, step=1, at=at, targets=targets))


def test_the_fused_network_is_tested(tmp_path, monkeypatch):
    tested = []
    evaluate = train.Trainer.evaluate

    def remember(trainer, loader, title="test", **rest):
        if title == "test":
            tested.append(checkpoint_files.digest(trainer.network.state_dict()))
        return evaluate(trainer, loader, title, **rest)

    monkeypatch.setattr(train.Trainer, "evaluate", remember)
    assert thin.launch(tmp_path, "--task 6-2 --method MiB+EWF --step 0 1") == 0
    assert tested == [
        checkpoint_files.digest(read(checkpoint(tmp_path, f"n_{step}"))["model_state"]) for step in (0, 1)
    ]
