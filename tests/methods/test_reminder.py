"""methods/reminder.py: numbers by hand, the state of the checkpoint, refusals, a kill and a resume."""

import math

import pytest
import torch
import torch.nn.functional as F

import argparser
import run
from methods.plop import PLOP
from methods.reminder import REMINDER, SimilarityDistillation
from tests.support import interrupted, thin
from utils import class_similarity, pseudo
from utils.checkpointing.store import read
from utils.errors import UserError

TEXT = "--method REMINDER --task 6-2"
#: Prototypes of four old classes for `thin.Step`, whose features have 42 channels.
PROTOTYPES = torch.randn(4, thin.FEATURES, generator=torch.Generator().manual_seed(3))


pytestmark = pytest.mark.usefixtures("small")


def part_of(step):
    return next(part for part in step.method.parts if isinstance(part, SimilarityDistillation))


def a_step(words="", prototypes=PROTOTYPES):
    """Step 2 of the small task, step 1 with these prototypes before it."""
    state = {} if prototypes is None else {"reminder": {"prototypes": prototypes}}
    return thin.Step(f"{TEXT} {words}", checkpoint={"model_state": {}, "method_state": state, "file": "one.pth"})


# ------------------------------------------------------------------------- by hand


def test_similarity_weights_by_hand():
    means = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    prototypes = torch.tensor(
        [[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    )  # cosines 1, 0, and 0 for a class without a prototype
    weights = class_similarity.similarity_weights(means, prototypes, 0)
    one = math.e / (math.e + 2)
    torch.testing.assert_close(weights, torch.tensor([[one, (1 - one) / 2, (1 - one) / 2], [1 / 3] * 3]))
    # δ = 1 keeps what is at least 1/3, and does not normalise again
    assert class_similarity.similarity_weights(means[:1], prototypes, 1).tolist() == [[pytest.approx(one), 0, 0]]


def test_distillation_by_hand(counted):
    """One new pixel of class 2, two old classes: τ = 1, teacher (ln 3, 0), student (0, 0, 9)."""
    teacher = torch.tensor([math.log(3), 0.0]).view(1, 2, 1, 1).expand(1, 2, 1, 3)
    student = torch.tensor([0.0, 0.0, 9.0]).view(1, 3, 1, 1).repeat(1, 1, 1, 3).requires_grad_()
    labels = torch.tensor([[[2, 0, 255]]])
    weights = torch.tensor([[0.5, 0.25]])
    value = class_similarity.class_similarity_distillation(student, teacher, labels, weights, temperature=1.0)
    assert value.item() == pytest.approx((0.75 * 0.5 + 0.25 * 0.25 + 2e-7) * math.log(2))
    value.backward()
    assert student.grad[0, :, 0, 1:].abs().max() == 0 and student.grad[0, 2].abs().max() == 0
    # τ = 3 divides the logits, and multiplies the value by 9
    mild = class_similarity.class_similarity_distillation(student, teacher, labels, weights)
    shares = torch.tensor([math.log(3) / 3, 0]).softmax(0)
    assert mild.item() == pytest.approx(9 * float((shares * weights[0]).sum() + 2e-7) * math.log(2))


@pytest.mark.parametrize("size", [(7, 9), (12, 12), (3, 4)])
def test_sums_are_those_of_the_enlarged_features(counted, size):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, 3, 4, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 5, (2, *size), generator=generator)
    labels[labels == 4] = 255
    labels[labels == 1] = 0
    sums, pixels = class_similarity.class_sums(features, labels, 1, 4)
    enlarged = F.interpolate(features, size=size, mode="bilinear", align_corners=True).movedim(1, -1)
    for row, label in enumerate((1, 2, 3)):
        assert int(pixels[row]) == int((labels == label).sum())
        torch.testing.assert_close(sums[row], enlarged[labels == label].sum(0), rtol=1e-12, atol=1e-12)
    assert sums[0].abs().max() == 0 and class_similarity.class_means(features, labels, 1, 4)[0].abs().max() == 0


def test_prototypes_are_means_over_batches_not_over_pixels():
    means = class_similarity.PrototypeMeans(0, 3, 1)
    for value, label in ((1.0, [0, 0, 0, 1]), (3.0, [0, 255, 255, 255]), (9.0, [1, 1, 1, 1])):
        means.update(torch.full((1, 1, 2, 2), value), torch.tensor(label).view(1, 2, 2))
    assert means.values.flatten().tolist() == [2.0, 5.0, 0.0]  # the last class has no pixel


def test_the_factor_has_no_damping_and_is_0_without_old_pixels():
    valid = torch.zeros(2, 2, 2, dtype=torch.bool)
    valid[0, 0, 0] = True
    labels = torch.tensor([[[0, 0], [0, 5]], [[5, 5], [5, 255]]])
    of_plop, own = (pseudo.adaptive_factor(valid, labels, 4, 0, torch.float64, d).flatten() for d in (1e-6, 0.0))
    assert own.tolist() == [1 / 3, 0] and of_plop.tolist() == [1 / (3 + 1e-6), 0]
    step, images = a_step(), thin.images(2)
    labels = torch.stack([thin.bands(0, 4, count=1)[0], thin.bands(4, 5, count=1)[0]])
    step.begin(images, labels)
    batch = step.batch(images, labels)
    trusted = batch.pseudo_mask[0].sum() / 512  # half of the 32 x 32 pixels are old
    assert batch.pixel_weights.flatten().tolist() == [pytest.approx(float(trusted), abs=1e-12), 0]


# -------------------------------------------------------------------------- the part


def test_terms_of_a_batch():
    images, labels = thin.images(2), thin.bands(0, 1, 4, 5, 255)
    step, plop = a_step("--delta_csw 1"), thin.Step("--method PLOP --task 6-2")
    terms = step.terms(images, labels)
    assert set(terms) == {"ce", "csw", "pod"}
    torch.testing.assert_close(terms["pod"], plop.terms(images, labels)["pod"])
    batch = step.batch(images, labels)
    means = class_similarity.class_means(batch.student.pre_logits, batch.labels, 4, 6)
    weights = class_similarity.similarity_weights(means, PROTOTYPES, 1)
    assert (weights == 0).any() and (weights > 0).any()
    value = class_similarity.class_similarity_distillation(
        batch.student.logits, batch.teacher.logits, batch.labels, weights
    )
    torch.testing.assert_close(step.method.terms(batch)["csw"], 0.5 * value)


def test_no_gradient_reaches_the_features_through_the_prototypes():
    step = a_step()
    step.begin(thin.images(2), thin.bands(0, 4))
    batch = step.batch(thin.images(2), thin.bands(4, 5))
    batch.student = batch.student._replace(pre_logits=batch.student.pre_logits.detach().requires_grad_())
    part_of(step).terms(batch)["csw"].backward()
    assert batch.student.pre_logits.grad is None


@pytest.mark.parametrize("values", [(0, 1), (255,), (4, 5)])
def test_finite_without_new_pixels_and_without_old_ones(counted, values):
    step = a_step()
    images, labels = thin.images(2), thin.bands(*values)
    terms = step.terms(images, labels)
    sum(terms.values()).backward()
    assert all(term.isfinite() for term in terms.values())
    assert (terms["csw"].item() == 0) == (4 not in values)
    assert all(p.grad.isfinite().all() for p in step.model.parameters() if p.grad is not None)


def test_preset_is_plop_with_one_factor(monkeypatch):
    assert REMINDER.preset == PLOP.preset | {"csw_kd": 0.5}
    voc = argparser.parse(["--method", "REMINDER", "--task", "15-5s"])
    ade = argparser.parse(["--method", "REMINDER", "--dataset", "ade", "--task", "100-10"])
    assert (voc.pod_factor, voc.delta_csw, voc.pod_options["switch"]["after"]["factor"]) == (0.01, 0.0, 0.0005)
    assert (ade.pod_factor, ade.delta_csw, ade.pod_options["switch"]["after"]["factor"]) == (0.001, 1.0, 1e-5)


@pytest.mark.parametrize("words", ["--unkd", "--kd_bce_sig", "--exkd_gt", "--exkd_sum"])
def test_another_distillation_of_outputs_is_refused(words):
    message = rf"--csw_kd( 0.5)? \(of --method REMINDER\) and {words} exclude each other.*leave one out"
    with pytest.raises(UserError, match=message):
        thin.options(f"{TEXT} --loss_kd 1 {words}", step=1)


# ------------------------------------------------------------------ the command line


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Steps 0 and 1, and step 0 of PLOP."""
    folder = tmp_path_factory.mktemp("reminder")
    with thin.program():
        assert thin.launch(folder, f"{TEXT} --step 0 1") == 0
        assert thin.launch(folder / "plop", "--method PLOP --task 6-2 --step 0") == 0
    return folder


def prototypes(folder, step):
    return read(thin.checkpoint(folder, step))["method_state"]["reminder"]["prototypes"]


def test_prototypes_of_each_step_are_in_its_checkpoint(finished):
    first, second = prototypes(finished, 0), prototypes(finished, 1)
    assert first.shape == (7, thin.FEATURES) and second.shape == (9, thin.FEATURES)
    assert torch.equal(second[:7], first)  # old classes are not estimated again
    assert (first.norm(dim=1) > 0).all() and (second[7:].norm(dim=1) > 0).any()
    assert [path.name for path in (finished / "checkpoints").glob("*prototypes*")] == []


def test_prototypes_are_those_of_the_final_network(finished):
    """Estimated again with the stored weights over the same batches: the same rows."""
    opts = thin.options(f"{TEXT} --step 0")
    task = run.dataset.load_task(opts, 0)
    model = run.segmentation_module.build_network(opts, task.classes_per_step, False)
    model.load_state_dict(read(thin.checkpoint(finished, 0))["model_state"])
    data = run.StepData(opts, task, torch.device("cpu"))
    part = SimilarityDistillation(opts, task)
    part.attach(model, None, run.methods.base.Previous())
    data.batches.set_position(0, purpose=part.purpose)
    part.end_step(model, data.batches, torch.device("cpu"))
    assert torch.equal(part.prototypes, prototypes(finished, 0)) and model.training


@pytest.mark.parametrize("method", ["PLOP", "FT --csw_kd 0.1 --delta_csw 1"])
def test_a_step_0_without_prototypes_is_refused(finished, tmp_path, capsys, method):
    words = f"--method {method} --csw_kd 0.5 --task 6-2 --step 1"
    plop = thin.checkpoint(finished / "plop", 0)
    assert thin.launch(tmp_path, f"{words} --step_ckpt '{plop}'") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"--csw_kd 0.5 needs the class prototypes of step 0, but {plop} has none" in error
    assert "--method REMINDER" in error
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.parametrize("value", [torch.zeros(3, thin.FEATURES), torch.full((4, thin.FEATURES), math.nan), [1.0], "x"])
def test_prototypes_that_do_not_fit_are_refused(value):
    with pytest.raises(UserError, match=r"--csw_kd: the prototypes in one\.pth are not 4 rows of 42 finite numbers"):
        a_step(prototypes=value)


@pytest.mark.parametrize("state", [[1], "x", torch.ones(2), {}])
def test_a_state_of_step_t_1_that_is_no_dictionary_of_prototypes_is_refused(state):
    checkpoint = {"model_state": {}, "method_state": {"reminder": state}, "file": "one.pth"}
    with pytest.raises(UserError, match=r"prototypes of step 1, but one\.pth has none"):
        thin.Step(TEXT, checkpoint=checkpoint)


@pytest.mark.parametrize("state", [{"prototypes": torch.zeros(2, 2)}, {"other": 1}, "x"])
def test_a_crafted_state_is_refused_by_a_resume(state):
    with pytest.raises(UserError, match="--resume: state/method/reminder"):
        part_of(a_step()).load_state_dict(state)


@pytest.mark.parametrize(
    ("at", "targets"), [(2, interrupted.ITERATIONS), (1, [(class_similarity.PrototypeMeans, "update")])]
)
def test_killed_and_resumed_to_the_bit(tmp_path, at, targets):
    """In the middle of the training, and while the prototypes are gathered."""
    whole, parts = interrupted.run_twice(tmp_path, f"{TEXT} --epochs 1 --shapes_train 24", 1, at, targets)
    interrupted.assert_equal_to_the_bit(whole, parts)
    assert parts["method_state"]["reminder"]["prototypes"].shape == (9, thin.FEATURES)
