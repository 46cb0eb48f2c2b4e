"""methods/ucd.py: the term of a batch, the frozen classifier, the command line, a kill and a resume."""

import pytest
import torch

from methods.mib import MiB
from methods.ucd import SLIPS, UCD
from tests.support import interrupted, thin
from utils import contrastive
from utils.checkpointing.store import read

TEXT = "--method UCD --task 6-2"


pytestmark = pytest.mark.usefixtures("small")


def a_step(words="", steps=((0, 1, 2), (3,), (4, 5))):
    return thin.Step(f"{TEXT} {words}", steps)


def test_terms_of_a_batch():
    images, labels = thin.images(2, 64), thin.bands(0, 4, 5, 255, size=64)
    step, mib = a_step(), thin.Step("--method MiB --task 6-2")
    batch = step.batch(images, labels)
    terms, plain = step.method.terms(batch), mib.terms(images, labels)
    assert set(terms) == {"ce", "kd", "contrastive"}
    torch.testing.assert_close([terms["ce"], terms["kd"]], [plain["ce"], plain["kd"]])
    student, teacher = batch.student, batch.teacher
    given = contrastive.given_labels(labels, student.pre_logits.shape[-2:])
    pairs = contrastive.make_pairs(student.pre_logits, teacher.pre_logits, teacher.logits_small, given)
    value = contrastive.contrastive_distillation(pairs, 0.07)
    assert len(pairs.contrasts) > len(pairs.anchors) and value > 0
    torch.testing.assert_close(terms["contrastive"], 0.01 * value)


@pytest.mark.parametrize("slip", SLIPS)
def test_a_mended_slip_changes_the_term(slip):
    images, labels = thin.images(2, 64), thin.bands(0, 4, 255, 5, 1, size=64)
    released, mended = (
        step.method.terms(step.batch(images, labels)) for step in (a_step(), a_step(f"--ucd_mend {slip}"))
    )
    assert released["ce"] == mended["ce"] and released["contrastive"] != mended["contrastive"]


def test_labels_above_vocs_last_class_count_where_the_task_has_them():
    steps = (tuple(range(30)), (30, 31))
    images, labels = thin.images(2, 64), thin.bands(0, 31, size=64)
    part = next(part for part in a_step(steps=steps).method.parts if type(part).__name__ == "ContrastiveDistillation")
    few, many = a_step(), a_step(steps=steps)
    assert many.method.terms(many.batch(images, labels))["contrastive"] > 0
    assert part.task.num_total == 32
    labels = thin.bands(0, 21, size=64)  # no class of a task of six: averaged labels above 20 are dropped
    assert part.terms(many.batch(images, labels))["contrastive"] > 0
    own = next(part for part in few.method.parts if type(part).__name__ == "ContrastiveDistillation")
    assert own.terms(few.batch(images, labels))["contrastive"] == 0


@pytest.mark.parametrize("values", [(0,), (255,), (4,), (0, 4)])
@pytest.mark.parametrize("method", ["UCD", "LSKD --ucd 1"])
def test_finite_whatever_a_batch_shows(values, method):
    step = thin.Step(f"--method {method} --task 6-2")
    images, labels = thin.images(2), thin.bands(*values)
    step.begin(images, labels)
    losses = step.trainer().train_iteration(images, labels)
    assert "contrastive" in losses and all(abs(value) < 1e6 for value in losses.values())
    assert all(p.isfinite().all() for p in step.model.parameters())


@pytest.mark.parametrize(
    ("words", "frozen"),
    [("", [True, True]), ("--ucd_freeze later", [False, True]), ("--ucd_freeze never", [False, False])],
)
def test_when_the_first_classifier_is_trained(words, frozen):
    for steps, expected in zip((((0, 1, 2),), ((0, 1, 2), (3,))), frozen, strict=True):
        step = a_step(words, steps)
        trainer = step.trainer()
        trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        first = list(step.model.cls[0].parameters())
        assert all((id(p) in trained) != expected and p.requires_grad != expected for p in first)
        assert all(id(p) in trained for classifier in list(step.model.cls)[1:] for p in classifier.parameters())


def test_background_modes_are_frozen_with_the_other_classes_of_step_0():
    step = a_step("--nb_background_modes 2", ((0, 1, 2), (3,)))
    step.trainer()
    assert [classifier.weight.requires_grad for classifier in step.model.cls] == [False, False, True]


def test_preset_is_mib_with_a_factor_and_a_frozen_classifier():
    assert UCD.preset == MiB.preset | {"ucd": 0.01, "ucd_freeze": "always"}


# ------------------------------------------------------------------ the command line


def weights(folder, step):
    return read(thin.checkpoint(folder, step))["model_state"]


def test_all_steps_from_a_step_0_of_another_method(tmp_path, capsys):
    """The background's bias is lowered by the balanced initialisation, the rest of the first classifier stays as it is."""
    assert thin.launch(tmp_path, "--method FT --task 6-2 --step 0") == 0
    assert thin.launch(tmp_path, f"{TEXT} --step 1 2 --crop_size 64") == 0
    first, second, third = (weights(tmp_path, step) for step in range(3))
    assert torch.equal(first["cls.0.weight"], third["cls.0.weight"])
    assert torch.equal(first["cls.0.bias"][1:], third["cls.0.bias"][1:])
    assert second["cls.0.bias"][0] == pytest.approx(float(first["cls.0.bias"][0]) - torch.tensor(3.0).log().item())
    assert not torch.equal(second["cls.1.weight"], third["cls.1.weight"])  # later classifiers go on learning
    losses = [entry["epochs"][0]["losses"] for entry in thin.document(tmp_path)["steps"].values()]
    assert [set(step) - {"loss"} for step in losses] == [{"ce"}, *[{"ce", "kd", "contrastive"}] * 2]


def test_step_0_as_released_keeps_the_random_start(tmp_path):
    assert thin.launch(tmp_path / "released", f"{TEXT} --step 0") == 0
    assert thin.launch(tmp_path / "mended", f"{TEXT} --step 0 --ucd_freeze later") == 0
    released, mended = (weights(tmp_path / name, 0) for name in ("released", "mended"))
    assert not torch.equal(released["cls.0.weight"], mended["cls.0.weight"])
    opts = thin.options(f"{TEXT} --step 0")
    thin.run.seed_everything(opts.random_seed)
    start = thin.segmentation_module.make_model(opts, [7], pretrained=False)
    assert torch.equal(start.cls[0].weight, released["cls.0.weight"])


def test_domains_are_refused(tmp_path, capsys):
    words = f"--dataset cityscapes_domain --data_root '{tmp_path}' --task 11-5 --step 0"
    assert thin.launch(tmp_path, f"{words} --ucd 0.1") == 2
    assert "--ucd 0.1 cannot work on cityscapes_domain" in capsys.readouterr().err


def test_killed_and_resumed_to_the_bit(tmp_path):
    whole, parts = interrupted.run_twice(tmp_path, f"{TEXT} --epochs 1 --shapes_train 24 --crop_size 64", 1, 2)
    interrupted.assert_equal_to_the_bit(whole, parts)
    assert whole["history"][0]["losses"]["contrastive"] > 0
