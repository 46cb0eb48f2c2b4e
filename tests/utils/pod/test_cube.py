"""RCIL's pooled cubes by hand."""

import math

import pytest
import torch

from utils.pod import cube


def test_new_classes_join_the_background():
    logits = torch.tensor([1.0, 2.0, 3.0, 5.0]).view(1, 4, 1, 1)
    assert cube.fold_new_classes(logits, 2).flatten().tolist() == [1 + 3 + 5, 2]
    assert torch.equal(cube.fold_new_classes(logits, 4), logits)  # a domain adds no class


def test_spatial_distance_of_one_position():
    """Every window sees the only position: four values of (a² − b²)/k², whose norm is twice that."""
    a, b = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 1.0)
    expected = [2 * (4 - 1) / side**2 for side in (4, 8, 12, 16, 20, 24)]
    torch.testing.assert_close(cube.spatial_distances(a, b), torch.tensor(expected))


def test_spatial_distance_counts_the_padding():
    """Three positions in a row, window 4: rows of sums 1+2, 1+2+3, 1+2+3, 2+3 (padding on the left first), twice, over 16."""
    a = torch.tensor([1.0, 2.0, 3.0]).sqrt().view(1, 1, 1, 3)
    sums = [1 + 2, 1 + 2 + 3, 1 + 2 + 3, 2 + 3]
    expected = math.sqrt(2 * sum((total / 16) ** 2 for total in sums))
    assert float(cube.spatial_distances(a, torch.zeros_like(a))[0]) == pytest.approx(expected)


def test_channel_distance_by_hand():
    """Squares 3, 0, 0 over three channels: averages 1, 1, 0."""
    a = torch.tensor([3.0, 0.0, 0.0]).sqrt().view(1, 3, 1, 1)
    assert float(cube.channel_distance(a, torch.zeros_like(a))) == pytest.approx(math.sqrt(2))


def test_distances_are_means_over_images():
    a = torch.zeros(2, 3, 1, 1)
    a[0, 0] = 2.0
    alone = a[:1]
    for distance in (
        lambda x: cube.spatial_distances(x, torch.zeros_like(x)).sum(),
        lambda x: cube.channel_distance(x, 0 * x),
    ):
        torch.testing.assert_close(distance(a), distance(alone) / 2)


def test_terms_are_means_over_taps_with_their_factors():
    a, b = [torch.full((1, 3, 1, 1), 2.0)] * 3, [torch.full((1, 3, 1, 1), 1.0)] * 3
    one = cube.spatial_distances(a[0], b[0]).mean()
    torch.testing.assert_close(cube.spatial(a, b, [1.0, 2.0, 6.0]), 3 * one)
    torch.testing.assert_close(cube.channel(a, b, [1.0, 2.0, 6.0]), 3 * cube.channel_distance(a[0], b[0]))


def test_equal_taps_have_a_finite_gradient():
    a = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    student = a.clone().requires_grad_()
    value = cube.spatial([a], [student], [1.0]) + cube.channel([a], [student], [1.0])
    (grad,) = torch.autograd.grad(value, student)
    assert value == 0 and torch.equal(grad, torch.zeros_like(grad))


def test_half_precision_does_not_overflow():
    a = torch.full((1, 3, 2, 2), 300.0, dtype=torch.float16)  # 300² is beyond float16
    value = cube.spatial([a], [0 * a], [1.0]) + cube.channel([a], [0 * a], [1.0])
    assert value.dtype == torch.float32 and value.isfinite()
