"""Pseudo-labels: entropy, thresholds from histograms, relabelling in every mode, the adaptive factor."""

import math

import pytest
import torch
from torch import Tensor

from tests.support import thin
from utils import pseudo
from utils.types import IGNORE


def logits_of(*probabilities: list[float]) -> Tensor:
    """(1, C, 1, n) float64 logits whose softmax is given, one list a pixel."""
    return torch.tensor(probabilities, dtype=torch.float64).log().T[None, :, None, :].clone()


def labels_of(*labels: int) -> Tensor:
    return torch.tensor(labels)[None, None]


def test_entropy_of_even_probabilities_is_one_over_the_classes():
    assert pseudo.entropy(torch.full((1, 4, 1, 1), 0.25, dtype=torch.float64)).item() == pytest.approx(1 / 4, rel=1e-6)


def test_entropy_of_a_sure_pixel_is_zero_and_finite():
    sure = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    assert pseudo.entropy(sure).item() == pytest.approx(0, abs=1e-6)


def test_entropy_by_hand():
    value = pseudo.entropy(torch.tensor([0.25, 0.75], dtype=torch.float64).view(1, 2, 1, 1))
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / 2 / math.log(2)
    assert value.item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("mode", [None, "naive", "confidence", "median", "entropy"])
def test_modes(mode):
    assert pseudo.parse_mode(mode) == (mode, None)


def test_threshold_mode():
    assert pseudo.parse_mode("threshold_0.7") == ("threshold", 0.7)


@pytest.mark.parametrize(
    "mode", ["entropie", "threshold_", "threshold_high", "threshold", "", "threshold_1.5", "threshold_nan"]
)
def test_unknown_modes_are_refused(mode):
    with pytest.raises(ValueError, match=f"--pseudo '{mode}' is unknown.*threshold_X with X from 0 to 1"):
        pseudo.parse_mode(mode)


class TestReadOut:
    def test_released_in_the_first_bins(self):
        # n/2 = 5: bin 0 holds 6 ≥ 5; second row: bin 0 holds 2, in bin 1 S is still 0 and 8 ≥ 5
        counts = torch.tensor([[6, 4, 0, 0], [2, 8, 0, 0]])
        assert pseudo.released_median(counts).tolist() == pytest.approx([5 / 6 / 4, (1 + 5 / 8) / 4])

    def test_released_slip(self):
        # The true median is in bin 2; S is 0, 0, 1, 3 at the bins, and only bin 3 has 3 ≤ 5 ≤ 3 + 4
        counts = torch.tensor([[3, 1, 2, 4]])
        assert pseudo.released_median(counts).item() == pytest.approx((3 + (5 - 3) / 4) / 4)
        assert pseudo.exact_median(counts).item() == pytest.approx((2 + (5 - 4) / 2) / 4)

    def test_released_past_the_last_bin(self):
        # No bin fits: the last one with S = 0 + 1 + 2 + 3, an infinity if it is empty
        counts = torch.tensor([[4, 4, 8, 4], [3, 4, 4, 0], [100, 100, 100, 0]])
        expected = [(3 + (10 - 6) / 4) / 4, -math.inf, math.inf]
        assert pseudo.released_median(counts).tolist() == pytest.approx(expected)

    def test_nothing_counted_is_zero(self):
        counts = torch.zeros(2, 5, dtype=torch.int64)
        assert pseudo.released_median(counts).tolist() == [0, 0]
        assert pseudo.exact_median(counts).tolist() == [0, 0]

    def test_no_nan_where_both_sides_vanish(self):
        # n/2 = 6 = S past the last bin, which is empty
        assert pseudo.released_median(torch.tensor([[4, 4, 4, 0]])).isfinite().all()

    def test_exact_equals_the_median_of_values(self):
        values = torch.rand(10_001, generator=torch.Generator().manual_seed(0))
        counts = torch.histc(values, 100, 0, 1).long()[None]
        assert pseudo.exact_median(counts).item() == pytest.approx(values.median().item(), abs=0.001)

    def test_exact_by_hand(self):
        counts = torch.tensor([[1, 2, 1, 0], [0, 0, 0, 5], [2, 0, 2, 0]])
        assert pseudo.exact_median(counts).tolist() == pytest.approx([(1 + 1 / 2) / 4, (3 + 1 / 2) / 4, 1 / 4])


class TestMedianThresholds:
    logits = logits_of([0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.3, 0.7])
    labels = labels_of(0, 0, 0, 2)

    def filled(self, **options) -> pseudo.MedianThresholds:
        medians = pseudo.MedianThresholds(2, 3, "probability", num_bins=10, **options)
        medians.update(self.logits, self.labels)
        return medians

    def test_counts_background_pixels_by_predicted_class(self):
        counts = self.filled().counts
        assert counts.dtype == torch.int64
        assert counts.sum(1).tolist() == [2, 1, 0]  # the last pixel is not background

    def test_ignored_pixels_do_not_count(self):
        medians = pseudo.MedianThresholds(2, 3)
        medians.update(self.logits, torch.full((1, 1, 4), IGNORE))
        assert medians.counts.sum() == 0
        assert medians.finish(0.001).tolist() == [0.001] * 3

    def test_probability_thresholds_have_a_ceiling(self):
        thresholds = self.filled().finish(0.5, exact=True)
        assert thresholds.tolist() == [0.5, 0.5, 0]
        assert thresholds.dtype == torch.float64

    def test_entropy_thresholds_have_a_floor(self):
        medians = pseudo.MedianThresholds(2, 3)
        medians.update(self.logits, self.labels)
        assert (medians.finish(0.3, exact=True) >= 0.3).all()
        lower = medians.finish(0.0, exact=True)
        value, predicted = pseudo.measure_pixels(self.logits, "entropy", 3)
        first = value[0, 0, :2]
        assert predicted[0, 0].tolist() == [0, 0, 1, 1]
        assert first.min() <= lower[0] <= first.max()

    def test_bins_are_the_official_numbers(self):
        assert pseudo.MedianThresholds(2, 3, "entropy").num_bins == 100
        assert pseudo.MedianThresholds(2, 3, "probability").num_bins == 20

    def test_processes_are_summed(self):
        one, two = self.filled(), self.filled()
        two.update(self.logits, self.labels)
        assert torch.equal(one.finish(1.0, reduce=lambda counts: 2 * counts), two.finish(1.0))

    def test_batches_add_up(self):
        halves = pseudo.MedianThresholds(2, 3, "probability", num_bins=10)
        halves.update(self.logits[..., :2], self.labels[..., :2])
        halves.update(self.logits[..., 2:], self.labels[..., 2:])
        assert torch.equal(halves.counts, self.filled().counts)


class TestRelabel:
    """Two old classes; pixels: sure background, sure class 1, unsure class 1, new, ignored."""

    logits = logits_of([0.9, 0.1], [0.1, 0.9], [0.4, 0.6], [0.1, 0.9], [0.1, 0.9])
    labels = labels_of(0, 0, 0, 2, IGNORE)

    def relabel(self, mode: str, thresholds=None, **options) -> pseudo.PseudoLabels:
        thresholds = None if thresholds is None else torch.tensor(thresholds)
        return pseudo.relabel(self.labels, self.logits, 3, mode, thresholds, **options)

    def test_naive(self):
        found = self.relabel("naive")
        assert found.labels.flatten().tolist() == [0, 1, 1, 2, IGNORE]
        assert found.valid.flatten().tolist() == [True, True, True, False, False]
        assert found.pixel_weights is None

    def test_confidence(self):
        found = self.relabel("confidence")
        assert found.labels.flatten().tolist() == [0, 1, 1, 2, IGNORE]
        assert found.pixel_weights.flatten().tolist() == pytest.approx([0.9, 0.9, 0.6, 1, 1])

    def test_threshold(self):
        found = self.relabel("threshold_0.7")
        assert found.labels.flatten().tolist() == [0, 1, IGNORE, 2, IGNORE]
        assert found.valid.flatten().tolist() == [True, True, False, False, False]

    def test_median_keeps_what_reaches_its_class_threshold(self):
        found = self.relabel("median", [0.95, 0.5, 0.0])
        assert found.labels.flatten().tolist() == [IGNORE, 1, 1, 2, IGNORE]

    def test_entropy_keeps_what_is_below_its_class_threshold(self):
        sure = pseudo.measure_pixels(self.logits, "entropy", 3)[0][0, 0, 1].item()
        found = self.relabel("entropy", [sure / 2, 1.01 * sure, 0.0])
        assert found.labels.flatten().tolist() == [IGNORE, 1, IGNORE, 2, IGNORE]
        assert found.valid.flatten().tolist() == [False, True, False, False, False]

    def test_infinite_threshold_keeps_all(self):
        assert self.relabel("entropy", [math.inf] * 3).labels.flatten().tolist() == [0, 1, 1, 2, IGNORE]

    def test_entropy_is_divided_by_the_log_of_all_classes(self):
        value, _ = pseudo.measure_pixels(self.logits, "entropy", 3)
        torch.testing.assert_close(value, pseudo.entropy(self.logits.softmax(1)) / math.log(3))

    def test_soft_uncertain_keeps_the_labels_of_untrusted_pixels(self):
        found = self.relabel("entropy", [1.0, 0.0, 0.0], soft="soft_uncertain")
        assert found.labels.flatten().tolist() == [0, 0, 0, 2, IGNORE]
        assert found.valid.flatten().tolist() == [True, False, False, False, False]
        certain = pseudo.certain_pixels(self.labels, found.valid, 2, "soft_uncertain")
        assert certain.flatten().tolist() == [True, False, False, True, True]

    def test_soft_certain_changes_no_label(self):
        found = self.relabel("entropy", [1.0, 1.0, 1.0], soft="soft_certain")
        assert found.labels.flatten().tolist() == [0, 0, 0, 2, IGNORE]
        certain = pseudo.certain_pixels(self.labels, found.valid, 2, "soft_certain")
        assert certain.flatten().tolist() == [False, False, False, True, True]

    def test_corrected_errors_keeps_the_annotation(self):
        found = self.relabel("threshold_0.7", ablation="corrected_errors")
        assert found.labels.flatten().tolist() == [0, 0, IGNORE, 2, IGNORE]

    def test_removed_errors_ignores_wrong_pseudo_labels(self):
        found = self.relabel("threshold_0.7", ablation="removed_errors")
        assert found.labels.flatten().tolist() == [0, IGNORE, IGNORE, 2, IGNORE]

    def test_the_annotation_is_not_changed(self):
        before = self.labels.clone()
        for mode in ("naive", "confidence", "threshold_0.5"):
            assert self.relabel(mode).labels is not self.labels
        assert torch.equal(self.labels, before)

    def test_uint8_and_half_precision(self):
        found = pseudo.relabel(self.labels.byte(), self.logits.half(), 3, "confidence")
        assert found.labels.dtype == torch.int64
        assert found.labels.flatten().tolist() == [0, 1, 1, 2, IGNORE]
        assert found.pixel_weights.dtype == torch.float32


class TestAdaptiveFactor:
    def test_share_of_trusted_old_pixels(self):
        labels = torch.tensor([[[0, 0, 1, 2]], [[0, 2, 2, IGNORE]]])
        valid = torch.tensor([[[True, False, False, False]], [[True, False, False, False]]])
        factor = pseudo.adaptive_factor(valid, labels, 2, dtype=torch.float64)
        assert factor.shape == (2, 1, 1)
        assert factor.flatten().tolist() == pytest.approx([1 / (3 + 1e-6), 1 / (1 + 1e-6)], rel=1e-12)

    def test_no_old_pixel(self):
        labels, valid = torch.full((1, 2, 2), 3), torch.zeros(1, 2, 2, dtype=torch.bool)
        assert pseudo.adaptive_factor(valid, labels, 2).item() == 0
        assert pseudo.adaptive_factor(valid, labels, 2, minimum=0.3).item() == pytest.approx(0.3)

    def test_dtype_follows_the_loss(self):
        labels, valid = torch.zeros(1, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool)
        assert pseudo.adaptive_factor(valid, labels, 2).dtype == torch.float32
        assert pseudo.adaptive_factor(valid, labels, 2, dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize(
    ("state", "fits"),
    [
        ({"thresholds": torch.zeros(4, dtype=torch.float64)}, True),
        ({"thresholds": torch.zeros(3, dtype=torch.float64)}, False),
        ({"thresholds": torch.zeros(4)}, False),
        ({"thresholds": None}, False),
        ({"thresholds": 0.5}, False),
        ({}, False),
        (None, False),
    ],
)
def test_thresholds_of_another_run_are_refused(state, fits):
    with thin.program():
        step = thin.Step("--method PLOP", steps=((0, 1, 2), (3,)))
    if fits:
        step.method.load_state_dict({"pseudo_labels": state})
    else:
        with pytest.raises(ValueError, match=r"^--resume: state/method/pseudo_labels.* start anew without it$"):
            step.method.load_state_dict({"pseudo_labels": state})
