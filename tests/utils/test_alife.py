"""ALIFE's losses and rotations by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from utils import alife
from utils.types import IGNORE


def logits(*pixels):
    """(1, C, 1, n) of the pixels' logits."""
    return torch.tensor(pixels, dtype=torch.float64).T[None, :, None]


def labels(*values):
    return torch.tensor(values)[None, None]


def test_the_regulariser_by_hand():
    """One background pixel: z = (0, ln 2, ln 5), q = (¼, ¾): ln 8 − ¾ ln 2; the other pixels do not count."""
    student = logits((0, math.log(2), math.log(5)), (9, 9, 9), (5, 4, 3))
    teacher = logits((0, math.log(3)), (1, 2), (3, 4))
    value = alife.adaptive_logit_regulariser(student, teacher, labels(0, 2, IGNORE))
    assert float(value) == pytest.approx(math.log(8) - 0.75 * math.log(2))


def test_the_distillation_by_hand():
    """Old channels of z = (0, ln 3): log p = (ln ¼, ln ¾); q = (½, ½). The mean is over ignored pixels too, as released."""
    student, teacher = logits((0, math.log(3), 7), (0, 0, 0), (5, 5, 5)), logits((1, 1), (2, 2), (0, 4))
    one = -(math.log(1 / 4) + math.log(3 / 4)) / 2 / 2
    even = math.log(2) / 2
    mask = labels(2, IGNORE, 0)
    assert float(alife.foreground_distillation(student, teacher, mask)) == pytest.approx((one + even) / 2)
    assert float(alife.foreground_distillation(student, teacher, mask, with_ignored=False)) == pytest.approx(one)


@pytest.mark.parametrize("value", [0, 2, IGNORE])
def test_finite_without_background_and_without_foreground(value):
    student = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    teacher, mask = torch.zeros(1, 2, 2, 2), torch.full((1, 2, 2), value)
    terms = [
        alife.adaptive_logit_regulariser(student, teacher, mask),
        alife.foreground_distillation(student, teacher, mask),
        alife.foreground_distillation(student, teacher, mask, with_ignored=False),
    ]
    (grad,) = torch.autograd.grad(sum(terms), student)
    assert all(term.isfinite() for term in terms) and grad.isfinite().all()
    is_zero = [not term.detach() for term in terms]
    assert is_zero == [value != 0, value == 0, value != 2]


def test_half_precision_is_widened():
    student, teacher = torch.full((1, 2, 300, 300), 8.0, dtype=torch.float16), torch.zeros(1, 2, 300, 300)
    value = alife.adaptive_logit_regulariser(student, teacher, torch.zeros(1, 300, 300))
    assert float(value) == pytest.approx(math.log(2), abs=1e-5)


def test_the_mean_feature_is_that_of_the_enlarged_features():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5, 4, 3, generator=generator, dtype=torch.float64)
    mask = torch.rand(33, 20, generator=generator) < 0.2
    large = F.interpolate(features[None], size=mask.shape, mode="bilinear", align_corners=True)[0]
    torch.testing.assert_close(alife.mean_feature(features, mask), large[:, mask].mean(1))


def test_a_rotation_of_the_plane_by_hand():
    """D = 2, B = (0 2t; 0 0): S = (0 t; −t 0), (I − S)(I + S)⁻¹ = (1−t², −2t; 2t, 1−t²) / (1+t²)."""
    t = 0.5
    expected = torch.tensor([[1 - t * t, -2 * t], [2 * t, 1 - t * t]], dtype=torch.float64) / (1 + t * t)
    torch.testing.assert_close(alife.rotations(torch.tensor([[2 * t]], dtype=torch.float64), 2)[0], expected)


def test_rotations_are_orthogonal_and_parameters_stand_row_by_row():
    parameters = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrices = alife.rotations(parameters, 4)
    identity = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(matrices @ matrices.transpose(1, 2), identity.expand(3, -1, -1))
    upper = torch.zeros(4, 4, dtype=torch.float64)
    upper[0, 1:], upper[1, 2:], upper[2, 3:] = parameters[0, :3], parameters[0, 3:5], parameters[0, 5:]
    skew = (upper - upper.T) / 2
    torch.testing.assert_close(matrices[0], (identity - skew) @ (identity + skew).inverse())


def test_attention_by_hand():
    """Cosines of (1, 0) with the two features: 1 and −1, which counts as 0; twice for two remembered vectors."""
    memory = torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])
    features = torch.tensor([[5.0, 0.0], [-2.0, 0.0]])
    expected = torch.tensor([math.exp(20) / (math.exp(20) + 1), 1 / (math.exp(20) + 1)])
    torch.testing.assert_close(alife.attention(memory, features, 10.0)[0], expected)


def test_representations_are_centred_over_classes():
    generator = torch.Generator().manual_seed(0)
    memory, before = torch.randn(3, 4, 5, generator=generator), torch.randn(6, 5, generator=generator)
    after = before + 1
    p, p_after, mean = alife.representations(memory, before, after, 10.0)
    torch.testing.assert_close(p.sum(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(p, p_after, atol=1e-5, rtol=1e-5)  # a shift of all features is in the means alone
    torch.testing.assert_close(mean, (alife.attention(memory, before, 10.0) @ after).mean(0))


def test_features_of_zero_are_finite():
    memory, features = torch.zeros(2, 3, 4), torch.zeros(5, 4, requires_grad=True)
    weights = alife.attention(memory, features, 10.0)
    assert torch.equal(weights, torch.full((2, 5), 0.2))
    assert torch.autograd.grad(weights[0, 0], features)[0].isfinite().all()
