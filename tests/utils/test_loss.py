"""Classification losses, mask-guided distillation and context distillation: values by hand, gradients, edges."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.gradients import slopes_agree
from utils import loss
from utils.pod.embedding import local_pod
from utils.types import IGNORE


def pixels(*logits: list[float]) -> Tensor:
    """(1, C, 1, n) float64 logits from one list of C values a pixel."""
    return torch.tensor(logits, dtype=torch.float64).T[None, :, None, :].clone()


def labels_of(*labels: int) -> Tensor:
    return torch.tensor(labels)[None, None, :]


def random_logits(classes: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, classes, 3, 4, dtype=torch.float64, generator=generator)


def random_labels(classes: int = 5, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (2, 3, 4), generator=generator)
    labels[0, 0, 0] = IGNORE
    return labels


CLASSIFICATION = {
    "cross_entropy": loss.cross_entropy,
    "binary_cross_entropy": loss.binary_cross_entropy,
    "focal": loss.focal,
    "unbiased_cross_entropy": lambda z, y: loss.unbiased_cross_entropy(z, y, 3),
    "unbiased_focal": lambda z, y: loss.unbiased_focal(z, y, 3),
    "nca": lambda z, y: loss.nca(z, y, 2.0, 0.1),
    "unbiased_nca": lambda z, y: loss.unbiased_nca(z, y, 3, 2.0, 0.1),
}


class TestByHand:
    """Two classes with logits 0 and ln 3 have probabilities 1/4 and 3/4."""

    logits = pixels([0, math.log(3)], [0, math.log(3)], [0, math.log(3)])
    labels = labels_of(0, 1, IGNORE)

    def test_cross_entropy(self):
        expected = [math.log(4), math.log(4 / 3), 0]
        assert loss.cross_entropy(self.logits, self.labels).flatten().tolist() == pytest.approx(expected)

    def test_focal(self):
        expected = [(3 / 4) ** 2 * math.log(4), (1 / 4) ** 2 * math.log(4 / 3), 0]
        assert loss.focal(self.logits, self.labels, gamma=2).flatten().tolist() == pytest.approx(expected)

    def test_focal_without_focus_is_cross_entropy(self):
        assert torch.equal(loss.focal(self.logits, self.labels, gamma=0), loss.cross_entropy(self.logits, self.labels))

    def test_binary_cross_entropy(self):
        # sigmoid(0) = 1/2, sigmoid(ln 3) = 3/4
        expected = [-math.log(1 / 2) - math.log(1 / 4), -math.log(1 / 2) - math.log(3 / 4), 0]
        assert loss.binary_cross_entropy(self.logits, self.labels).flatten().tolist() == pytest.approx(expected)

    def test_nca_has_the_others_alone_below(self):
        expected = [math.log(3), 0, 0]  # −ln(1/3), and −ln(3/1) below 0
        assert loss.nca(self.logits, self.labels).flatten().tolist() == pytest.approx(expected)

    def test_nca_margin_is_scaled(self):
        value = loss.nca(self.logits, self.labels, scale=2.0, margin=0.5)
        assert value.flatten()[0].item() == pytest.approx(2 * math.log(3) + 1)

    def test_unbiased_cross_entropy_sums_the_old_classes(self):
        logits = pixels([0, 0, math.log(2)], [0, 0, math.log(2)], [0, 0, math.log(2)])  # 1/4, 1/4, 1/2
        value = loss.unbiased_cross_entropy(logits, labels_of(0, 1, 2), num_old=2)
        assert value.flatten().tolist() == pytest.approx([math.log(2)] * 3)

    def test_unbiased_cross_entropy_ignores_a_mask(self):
        mask = torch.tensor([[[True, False, False]]])
        value = loss.unbiased_cross_entropy(self.logits, self.labels, 1, mask)
        assert value.flatten().tolist() == pytest.approx([0, math.log(4 / 3), 0])

    def test_unbiased_focal(self):
        value = loss.unbiased_focal(pixels([0, 0, math.log(2)]), labels_of(1), num_old=2, gamma=2)
        assert value.item() == pytest.approx(math.log(2) / 4)

    def test_unbiased_nca(self):
        value = loss.unbiased_nca(pixels([0, 0, math.log(6)]), labels_of(1), num_old=2)
        assert value.item() == pytest.approx(math.log(3))  # old: 1 + 1, new: 6

    def test_soft_cross_entropy_as_released_and_mended(self):
        student, teacher = pixels([0, 0, 5]), pixels([0, math.log(3)])
        certain, labels = torch.tensor([[[False]]]), labels_of(0)
        released = loss.soft_cross_entropy(student, labels, teacher, certain, factor=2.0)
        assert released.item() == pytest.approx(math.log(1 / 4) + math.log(3 / 4))
        mended = loss.soft_cross_entropy(student, labels, teacher, certain, mended=True)
        assert mended.item() == pytest.approx(math.log(2))
        hard = loss.soft_cross_entropy(student, labels, teacher, ~certain)
        assert hard.item() == pytest.approx(math.log(2 + math.exp(5)))

    def test_entropy_minimisation(self):
        logits = pixels([0, 0], [0, 100], [0, 0], [0, 0])
        labels = labels_of(0, 0, 1, IGNORE)
        # an even pixel has −mean(½ ln ½)/ln 2 = ½; the second pixel 0; the others are no background
        assert loss.entropy_minimisation(logits, labels).item() == pytest.approx(1 / 4, rel=1e-6)
        assert loss.entropy_minimisation(logits, labels, mean_pixels=True).item() == pytest.approx(1 / 8, rel=1e-6)


@pytest.mark.parametrize("name", CLASSIFICATION)
class TestEveryClassification:
    def test_gradient(self, name):
        labels = random_labels()
        assert slopes_agree(lambda z: CLASSIFICATION[name](z, labels), random_logits().requires_grad_())

    def test_all_ignored_is_zero(self, name):
        logits = random_logits().requires_grad_()
        value = CLASSIFICATION[name](logits, torch.full((2, 3, 4), IGNORE))
        (grad,) = torch.autograd.grad(value.sum(), logits)
        assert value.shape == (2, 3, 4)
        assert not value.any()
        assert not grad.any()

    def test_uint8_labels(self, name):
        logits, labels = random_logits(), random_labels()
        assert torch.equal(CLASSIFICATION[name](logits, labels.byte()), CLASSIFICATION[name](logits, labels))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_widened(self, name, dtype):
        logits = (1000 * random_logits()).to(dtype)
        value = CLASSIFICATION[name](logits, random_labels())
        assert value.dtype == torch.float32
        assert value.isfinite().all()
        assert torch.equal(value, CLASSIFICATION[name](logits.float(), random_labels()))


@pytest.mark.parametrize("function", [loss.cross_entropy, loss.binary_cross_entropy, loss.focal, loss.nca])
def test_one_class(function):
    logits = random_logits(1).requires_grad_()
    (grad,) = torch.autograd.grad(function(logits, torch.zeros(2, 3, 4, dtype=torch.int64)).sum(), logits)
    assert grad.isfinite().all()


def test_other_gradients():
    teacher, labels, certain = random_logits(3, seed=2), random_labels(), random_labels() > 2
    logits = random_logits().requires_grad_()
    for mended in (False, True):
        assert slopes_agree(lambda z, m=mended: loss.soft_cross_entropy(z, labels, teacher, certain, 0.5, m), logits)
    for mean_pixels in (False, True):
        assert slopes_agree(lambda z, m=mean_pixels: loss.entropy_minimisation(z, labels, m), logits)


def test_entropy_minimisation_without_background():
    logits = random_logits().requires_grad_()
    value = loss.entropy_minimisation(logits, torch.ones(2, 3, 4))
    assert value.item() == 0
    assert not torch.autograd.grad(value, logits)[0].any()


def explicit_context_distance(teacher: Tensor, student: Tensor, groups: int) -> Tensor:
    """The definition, with outer products."""

    def second_order(features: Tensor) -> Tensor:
        size = features.shape[1] // groups
        pooled = [F.avg_pool2d(features[:, group * size : (group + 1) * size], 5, 2, 2) for group in range(groups)]
        return torch.stack([torch.einsum("bihw,bjhw->bijhw", v, v) for v in pooled], dim=1)  # (B, g, k, k, h', w')

    return (second_order(teacher) - second_order(student)).flatten(1).norm(dim=1)


def feature_pair(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, dtype=torch.float64, generator=generator) for _ in range(2))


class TestContext:
    @pytest.mark.parametrize("channels,groups", [(12, 3), (13, 3), (7, 7), (5, 1), (256, 20)])
    def test_equals_the_outer_products(self, channels, groups):
        teacher, student = feature_pair(2, channels, 6, 7)
        expected = explicit_context_distance(teacher, student, groups)
        torch.testing.assert_close(loss.context_distance(teacher, student, groups), expected, rtol=1e-10, atol=0)
        total = loss.context_distillation(teacher, student, groups)
        torch.testing.assert_close(total, expected.mean(), rtol=1e-10, atol=0)

    def test_by_hand(self):
        # One pixel, pooled to 1/25 of itself: uuᵀ − vvᵀ with u = (1, 0), v = (0, 1) is diag(1, −1)
        teacher, student = torch.tensor([[[[25.0]], [[0.0]]]]), torch.tensor([[[[0.0]], [[25.0]]]])
        assert loss.context_distance(teacher, student, 1).item() == pytest.approx(math.sqrt(2))

    def test_no_cancellation_close_to_the_teacher(self):
        teacher, step = feature_pair(1, 8, 6, 6)
        tiny = loss.context_distance(teacher, teacher + 2.0**-40 * step, 2)
        # The first-order distance: twice the change, half the change twice as exact
        half = loss.context_distance(teacher, teacher + 2.0**-41 * step, 2)
        torch.testing.assert_close(tiny, 2 * half, rtol=1e-4, atol=0)
        single = loss.context_distance(teacher.float(), (teacher + 2.0**-10 * step).float(), 2)
        exact = loss.context_distance(teacher.float().double(), (teacher + 2.0**-10 * step).float().double(), 2)
        torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=0)

    def test_gradient(self):
        teacher, student = feature_pair(2, 5, 4, 3)
        mask = (feature_pair(2, 5, 4, 3, seed=1)[0] > 0).double()
        assert slopes_agree(lambda b: loss.context_distillation(teacher, b, 2, mask), student.requires_grad_())

    @pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4), (5, 5)])
    def test_smaller_than_the_window(self, size):
        teacher, student = feature_pair(1, 6, *size)
        student.requires_grad_()
        value = loss.context_distillation(teacher, student, 2)
        assert value.isfinite()
        assert torch.autograd.grad(value, student)[0].isfinite().all()

    def test_equal_features_have_a_zero_gradient(self):
        teacher, _ = feature_pair(1, 6, 5, 5)
        student = teacher.clone().requires_grad_()
        value = loss.context_distillation(teacher, student, 2)
        assert value.item() == 0
        assert not torch.autograd.grad(value, student)[0].any()

    def test_everything_masked(self):
        teacher, student = feature_pair(1, 6, 5, 5)
        student.requires_grad_()
        value = loss.context_distillation(teacher, student, 2, torch.zeros(1, 1, 5, 5))
        assert value.item() == 0
        assert not torch.autograd.grad(value, student)[0].any()

    @pytest.mark.parametrize("groups", [0, 7])
    def test_impossible_groups_are_refused(self, groups):
        with pytest.raises(ValueError, match=f"--mmm {groups} does not split 6 channels"):
            loss.context_distillation(*feature_pair(1, 6, 5, 5), groups)

    def test_half_precision(self):
        teacher, student = (100 * features.half() for features in feature_pair(1, 8, 8, 8))
        value = loss.context_distillation(teacher, student, 2)
        assert value.dtype == torch.float32
        assert value.isfinite()


def test_mask_guided_distillation_is_local_pod_of_masked_features():
    teacher, student = feature_pair(2, 5, 8, 8)
    mask = (feature_pair(2, 5, 8, 8, seed=1)[0] > 0).double()
    difference = local_pod((teacher * mask).square()) - local_pod((student * mask).square())
    expected = difference.norm(dim=1).mean()
    torch.testing.assert_close(loss.mask_guided_distillation(teacher, student, mask), expected, rtol=1e-12, atol=0)
    assert slopes_agree(lambda b: loss.mask_guided_distillation(teacher, b, mask), student.requires_grad_())
