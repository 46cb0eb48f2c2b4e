"""Distillation of outputs: values by hand, gradients, masks and temperatures."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.gradients import slopes_agree
from utils import distillation
from utils.types import IGNORE


def logits_of(*values: float) -> Tensor:
    """(1, C, 1, 1) float64."""
    return torch.tensor(values, dtype=torch.float64)[None, :, None, None]


def random_pair(classes: int = 5, old: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, c, 3, 4, dtype=torch.float64, generator=generator) for c in (classes, old))


def random_labels(classes: int = 5) -> Tensor:
    labels = torch.randint(0, classes, (2, 3, 4), generator=torch.Generator().manual_seed(1))
    labels[0, 0, 0] = IGNORE
    return labels


LABELS = random_labels()
DISTILLATIONS = {
    "kd": distillation.knowledge_distillation,
    "kd alpha": lambda s, t, **k: distillation.knowledge_distillation(s, t, 2.0, **k),
    "unkd": distillation.unbiased_knowledge_distillation,
    "exkd sum": lambda s, t, **k: distillation.excluded_knowledge_distillation(s, t, LABELS, "sum", **k),
    "exkd gt": lambda s, t, **k: distillation.excluded_knowledge_distillation(s, t, LABELS, "gt", **k),
    "sigmoid trim": distillation.sigmoid_distillation,
    "sigmoid sum": lambda s, t, **k: distillation.sigmoid_distillation(s, t, shape="sum", **k),
    "icarl": lambda s, t, **k: distillation.icarl_disjoint(s, LABELS, t, **k),
    "icarl bkg": lambda s, t, **k: distillation.icarl_disjoint(s, LABELS, t, True, **k),
    "icarl combined": distillation.icarl_combined,
}
MASKED = [name for name in DISTILLATIONS if "icarl" not in name]


class TestByHand:
    def test_knowledge_distillation(self):
        value = distillation.knowledge_distillation(logits_of(0, 0, 9), logits_of(0, math.log(3)))
        assert value.item() == pytest.approx(math.log(2) / 2)  # the third class takes no part; mean over 2 classes

    def test_alpha_sharpens_the_teacher(self):
        value = distillation.knowledge_distillation(logits_of(0, math.log(3)), logits_of(0, math.log(3)), alpha=2.0)
        assert value.item() == pytest.approx((0.1 * math.log(4) + 0.9 * math.log(4 / 3)) / 2)

    def test_unbiased_counts_new_classes_as_background(self):
        # student: 1/4, 1/2, 1/4; its background is class 0 and class 2
        value = distillation.unbiased_knowledge_distillation(logits_of(0, math.log(2), 0), logits_of(0, math.log(3)))
        assert value.item() == pytest.approx((1 / 4 * math.log(2) + 3 / 4 * math.log(2)) / 2)

    def test_unbiased_without_new_classes_is_plain(self):
        student, teacher = random_pair(3, 3)
        plain = distillation.knowledge_distillation(student, teacher)
        torch.testing.assert_close(distillation.unbiased_knowledge_distillation(student, teacher), plain)

    def test_unbiased_with_large_logits(self):
        student, teacher = logits_of(1e4, 0, 0).float(), logits_of(0, 1e4).float()
        assert distillation.unbiased_knowledge_distillation(student, teacher).item() == pytest.approx(5e3)

    def test_excluded_on_an_old_pixel(self):
        # teacher with a slot of logit 0: 1/4, 1/2, 1/4; student with the slot 0 + 0: 1/3 each
        student, teacher = logits_of(0, 0, 0, 0), logits_of(0, math.log(2))
        value = distillation.excluded_knowledge_distillation(student, teacher, torch.tensor([[[1]]]), "sum")
        assert value.item() == pytest.approx(math.log(3))

    def test_excluded_on_a_new_pixel_replaces_the_teacher_background(self):
        student, teacher = logits_of(0, 0, math.log(2), math.log(3)), logits_of(50, math.log(2))
        new = torch.tensor([[[3]]])
        value = distillation.excluded_knowledge_distillation(student, teacher, new, "sum")  # slot ln 6: 1/8, 1/8, 6/8
        assert value.item() == pytest.approx(3 / 4 * math.log(8) + 1 / 4 * math.log(8 / 6))
        value = distillation.excluded_knowledge_distillation(student, teacher, new, "gt")  # slot ln 3: 1/5, 1/5, 3/5
        assert value.item() == pytest.approx(3 / 4 * math.log(5) + 1 / 4 * math.log(5 / 3))

    def test_excluded_gt_has_no_slot_on_old_pixels(self):
        student, teacher = logits_of(0, 0, 7), logits_of(0, math.log(3))
        value = distillation.excluded_knowledge_distillation(student, teacher, torch.tensor([[[0]]]), "gt")
        assert value.item() == pytest.approx(math.log(2))

    def test_sigmoid(self):
        student, teacher = logits_of(0, 0, math.log(3)), logits_of(math.log(3), 0)
        assert distillation.sigmoid_distillation(student, teacher).item() == pytest.approx(math.log(2))
        expected = (-3 / 4 * math.log(3 / 4) - 1 / 4 * math.log(1 / 4) + math.log(2)) / 2
        assert distillation.sigmoid_distillation(student, teacher, shape="sum").item() == pytest.approx(expected)

    def test_icarl(self):
        student, teacher = logits_of(0, 0, math.log(3)), logits_of(math.log(3), 0)
        new, old = torch.tensor([[[2]]]), torch.tensor([[[0]]])
        half, quarter = -math.log(1 / 2), -math.log(1 / 4)
        assert distillation.icarl_disjoint(student, new, teacher).item() == pytest.approx(2 * half - math.log(3 / 4))
        assert distillation.icarl_disjoint(student, old, teacher).item() == pytest.approx(2 * half + quarter)
        assert distillation.icarl_combined(student, teacher).item() == pytest.approx(2 * half)

    def test_icarl_background_from_labels(self):
        student, teacher = logits_of(math.log(3), 0), logits_of(50.0)
        old, new = torch.tensor([[[0]]]), torch.tensor([[[1]]])
        half = -math.log(1 / 2)
        assert distillation.icarl_disjoint(student, old, teacher, True).item() == pytest.approx(half - math.log(3 / 4))
        assert distillation.icarl_disjoint(student, new, teacher, True).item() == pytest.approx(half - math.log(1 / 4))

    def test_body(self):
        assert distillation.body_distillation(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 5.0])).item() == 4.5


@pytest.mark.parametrize("name", DISTILLATIONS)
class TestEveryDistillation:
    def test_gradient(self, name):
        student, teacher = random_pair()
        assert slopes_agree(lambda s: DISTILLATIONS[name](s, teacher), student.requires_grad_())

    def test_reductions(self, name):
        per_pixel = DISTILLATIONS[name](*random_pair(), reduction="none")
        assert per_pixel.shape == (2, 3, 4)
        torch.testing.assert_close(DISTILLATIONS[name](*random_pair()), per_pixel.mean())
        torch.testing.assert_close(DISTILLATIONS[name](*random_pair(), reduction="sum"), per_pixel.sum())

    def test_half_precision_is_widened(self, name):
        student, teacher = (100 * logits.half() for logits in random_pair())
        value = DISTILLATIONS[name](student, teacher)
        assert value.dtype == torch.float32
        assert value.isfinite()

    def test_the_student_is_not_changed(self, name):
        student, teacher = random_pair()
        before = student.clone()
        DISTILLATIONS[name](student, teacher)
        assert torch.equal(student, before)


@pytest.mark.parametrize("name", MASKED)
def test_mask_zeroes_pixels_and_keeps_the_denominator(name):
    mask = distillation.distillation_mask(LABELS, 3, "oldbackground")
    full, masked = (DISTILLATIONS[name](*random_pair(), mask=m, reduction="none") for m in (None, mask))
    torch.testing.assert_close(masked, full * mask)
    torch.testing.assert_close(DISTILLATIONS[name](*random_pair(), mask=mask), (full * mask).sum() / mask.numel())


def test_distillation_masks():
    labels = torch.tensor([[[0, 2, 3, 4, IGNORE]]])
    assert distillation.distillation_mask(labels, 3, None) is None
    assert distillation.distillation_mask(labels, 3, "oldbackground").int().tolist() == [[[1, 1, 0, 0, 0]]]
    assert distillation.distillation_mask(labels, 3, "new").int().tolist() == [[[0, 0, 1, 1, 0]]]


def test_adaptive_distillation_weighs_images_by_their_mask():
    values = torch.tensor([[[4.0, 0.0]], [[6.0, 2.0]]])
    mask = torch.tensor([[[True, False]], [[True, True]]])
    assert distillation.adaptive_distillation(values, mask).item() == (2 * 0.5 + 4 * 1) / 2


@pytest.mark.parametrize(
    "apply,divided",
    [("all", [1, 1, 1]), ("old", [1, 0, 0]), ("new", [0, 1, 0]), (None, [0, 0, 0])],
)
def test_temperature(apply, divided):
    logits, labels = torch.full((1, 2, 1, 3), 6.0), torch.tensor([[[0, 3, IGNORE]]])
    expected = [2.0 if yes else 6.0 for yes in divided]
    assert distillation.soften(logits, labels, 3, 3.0, apply)[0, 1, 0].tolist() == expected


def test_semi_old_temperature():
    softened = distillation.soften_semi_old(torch.full((1, 5, 1, 1), 6.0), num_initial=2, num_old=4, temperature=3.0)
    assert softened.flatten().tolist() == [6, 6, 2, 2, 6]
    same = torch.ones(1, 5, 1, 1)
    assert distillation.soften_semi_old(same, 4, 4, 3.0) is same  # at step 1 no class is semi-old


def test_all_ignored_excluded_distillation_is_zero():
    student, teacher = random_pair()
    labels = torch.full((2, 3, 4), IGNORE)
    for slot in ("sum", "gt"):
        value = distillation.excluded_knowledge_distillation(student.requires_grad_(), teacher, labels, slot)
        assert value.item() == 0
        assert not torch.autograd.grad(value, student)[0].any()


def test_icarl_ignores_no_teacher_on_ignored_pixels():
    student, teacher = random_pair()
    value = distillation.icarl_disjoint(student, torch.full((2, 3, 4), IGNORE), teacher, reduction="none")
    target = torch.cat([teacher.sigmoid(), torch.zeros(2, 2, 3, 4)], 1)
    torch.testing.assert_close(value, F.binary_cross_entropy_with_logits(student, target, reduction="none").sum(1))


def test_unknown_choices_are_refused():
    student, teacher = random_pair()
    with pytest.raises(ValueError, match="'sum' and 'gt'"):
        distillation.excluded_knowledge_distillation(student, teacher, LABELS, "both")
    with pytest.raises(ValueError, match="kd_bce_sig_shape 'cut'"):
        distillation.sigmoid_distillation(student, teacher, shape="cut")
    with pytest.raises(ValueError, match="kd_mask 'old'"):
        distillation.distillation_mask(LABELS, 3, "old")
    with pytest.raises(ValueError, match="temperature_apply 'some'"):
        distillation.soften(student, LABELS, 3, 2.0, "some")
