"""LSKD's erased views and masks: by hand, for every rule and distance, and on degenerate label maps."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from utils import loss, masks
from utils.types import IGNORE

#: (rule, distance) pairs that work.
PAIRS = [(rule, distance) for rule in masks.RULES for distance in masks.DISTANCES] + [("gt", None)]


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def views(*shape: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    return features(*shape), (features(*shape, seed=1), features(*shape, seed=2))


def labels_with_shares(old: int, new: int, ignored: int, num_old: int = 2) -> Tensor:
    """(1, 1, n) labels with so many old, new and ignored pixels."""
    return torch.tensor([0] * old + [num_old] * new + [IGNORE] * ignored)[None, None]


def test_erased_views():
    images = torch.arange(1.0, 13.0).view(1, 3, 1, 4)
    labels = torch.tensor([[[0, 1, 2, IGNORE]]])
    without_old, without_new = masks.erased_views(images, labels, num_old=2)
    assert without_old[0, 0, 0].tolist() == [0, 0, 3, 4]
    assert without_new[0, 0, 0].tolist() == [1, 2, 0, 4]
    assert without_old[0, 2, 0].tolist() == [0, 0, 11, 12]


class TestBatchQuantile:
    @pytest.mark.parametrize("fractions", [[0.0, 1.0], [0.5, 0.25], [1 / 3, 0.99]])
    def test_equals_torch_quantile_by_row(self, fractions):
        values = features(2, 37)
        fraction = torch.tensor(fractions, dtype=torch.float64)
        expected = [torch.quantile(row, share) for row, share in zip(values, fraction)]
        torch.testing.assert_close(masks.batch_quantile(values, fraction)[:, 0], torch.stack(expected))

    def test_by_hand(self):
        values = torch.tensor([[30.0, 10.0, 20.0]])
        assert masks.batch_quantile(values, torch.tensor([0.75])).item() == 25

    def test_one_value(self):
        assert masks.batch_quantile(torch.tensor([[7.0]]), torch.tensor([0.3])).item() == 7

    def test_float32_ends_are_the_extremes(self):
        values = features(3, 1000).float()
        assert torch.equal(masks.batch_quantile(values, torch.ones(3))[:, 0], values.amax(1))
        assert torch.equal(masks.batch_quantile(values, torch.zeros(3))[:, 0], values.amin(1))


class TestByHand:
    """One channel pair on four positions; the whole view points along the first channel."""

    whole = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]).view(1, 2, 1, 4)
    # cosines 1, 0.8, 0.6, 0 without old pixels, and 0, 0.6, 0.8, 1 without new ones
    without_old = torch.tensor([[1.0, 0.8, 0.6, 0.0], [0.0, 0.6, 0.8, 1.0]]).view(1, 2, 1, 4)
    without_new = without_old.flip(-1)

    def mask(self, rule: str, old: int, new: int, ignored: int = 0, distance: str = "cos") -> list[int]:
        labels, erased = labels_with_shares(old, new, ignored), (self.without_old, self.without_new)
        found = masks.tap_mask(self.whole, erased, labels, 2, rule, distance, channels=None)
        assert found.shape == (1, 1, 1, 4)
        return found.int().flatten().tolist()

    def test_cosine(self):
        # r_o = r_n = ½: thresholds 0.7 and 0.7; positions 0, 1 are like the view without old, 0, 1 unlike the other
        assert self.mask("whc", 2, 2) == [1, 1, 0, 0]
        # r_o = ¾, threshold 0.85: position 0; r_n = ¼, threshold 0.45: position 0
        assert self.mask("old", 3, 1) == [1, 0, 0, 0]
        assert self.mask("newnone", 3, 1) == [1, 0, 0, 0]
        # r_o = ¼, threshold 0.45: three positions; r_n = ½
        assert self.mask("old", 1, 2, 1) == [1, 1, 1, 0]
        assert self.mask("newnone", 1, 2, 1) == [1, 1, 0, 0]
        assert self.mask("none", 1, 2, 1) == [1, 1, 0, 0]
        assert self.mask("whc", 1, 2, 1) == [1, 1, 1, 0]

    def test_distances_swap_the_fractions(self):
        # L2 distances without old: 0, √0.4, √0.8, √2; r_n = ¼ keeps those up to the first quarter
        assert self.mask("old", 2, 1, 1, "L2") == [1, 0, 0, 0]
        # without new: √2, √0.8, √0.4, 0; r_o = ½ keeps the upper half
        assert self.mask("newnone", 2, 1, 1, "L2") == [1, 1, 0, 0]
        assert self.mask("whc", 2, 1, 1, "L2") == [1, 1, 0, 0]
        assert self.mask("none", 2, 1, 1, "L2") == [1, 0, 0, 0]

    def test_the_two_l1_distances(self):
        difference = (self.whole - self.without_old)[0, :, 0]  # (2, 4)
        erased = (self.without_old, self.without_new)
        by_mean, _ = masks.differences(self.whole, erased, "mean_L1")
        by_channel, _ = masks.differences(self.whole, erased, "L1_mean")
        torch.testing.assert_close(by_mean[0], difference.mean(0).abs())
        torch.testing.assert_close(by_channel[0], difference.abs().mean(0))

    def test_channels(self):
        # Channel means: whole 2, 2, 2; without old 2, 3, 5, so changes 0, 1, 3; without new 5, 3, 2: changes 3, 1, 0
        whole = torch.full((1, 3, 2, 2), 2.0)
        without_old = torch.tensor([2.0, 3.0, 5.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
        labels = labels_with_shares(3, 1, 0)
        kept = masks.tap_mask(whole, (without_old, without_old.flip(1)), labels, 2, "whc", "cos")
        # d_o ≥ Q(¾) = 2: channel 2; d_n ≤ Q(¼) = 0.5: channel 2
        assert kept.amax((2, 3)).tolist() == [[0, 0, 1]]
        labels = labels_with_shares(1, 2, 1)
        kept = masks.tap_mask(whole, (without_old, without_old.flip(1)), labels, 2, "whc", "cos")
        # d_o ≥ Q(¼) = 0.5: channels 1, 2; d_n ≤ Q(½) = 1: channels 1, 2
        assert kept.amax((2, 3)).tolist() == [[0, 1, 1]]

    def test_channels_by_the_rule_of_distances(self):
        whole = torch.full((1, 3, 2, 2), 2.0)
        without_old = torch.tensor([2.0, 3.0, 5.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
        erased, labels = (without_old, without_old.flip(1)), labels_with_shares(3, 1, 0)
        kept = masks.tap_mask(whole, erased, labels, 2, "whc", "cos", channels="mended")
        # d_o = 0, 1, 3 ≤ Q(¼) = 0.5: channel 0; d_n = 3, 1, 0 ≥ Q(¾) = 2: channel 0
        assert kept.amax((2, 3)).tolist() == [[1, 0, 0]]

    def test_ground_truth_is_soft_between_pixels(self):
        labels = torch.tensor([[[0, 2], [2, IGNORE]]])
        full_size = masks.tap_mask(torch.zeros(1, 3, 2, 2), None, labels, 2, "gt")
        assert full_size.flatten().tolist() == [0, 1, 1, 0]
        assert masks.tap_mask(torch.zeros(1, 3, 1, 1), None, labels, 2, "gt").item() == 0.5


def test_cosine_is_that_of_torch():
    whole, erased = views(2, 7, 3, 4)
    found = masks.differences(whole, erased, "cos")
    for mine, view in zip(found, erased):
        torch.testing.assert_close(-mine, F.cosine_similarity(whole, view, dim=1).flatten(1))


def test_images_do_not_mix():
    whole, erased = views(3, 6, 5, 5)
    labels = torch.randint(0, 4, (3, 9, 9), generator=torch.Generator().manual_seed(0))
    for rule, distance in PAIRS:
        together = masks.tap_mask(whole, erased, labels, 2, rule, distance)
        for image in range(3):
            one = slice(image, image + 1)
            alone = masks.tap_mask(whole[one], (erased[0][one], erased[1][one]), labels[one], 2, rule, distance)
            torch.testing.assert_close(together[one], alone)


def test_without_channels_leaves_the_channel_mask_out():
    whole, erased = views(2, 6, 5, 5)
    labels = torch.randint(0, 4, (2, 9, 9), generator=torch.Generator().manual_seed(0))
    full = masks.tap_mask(whole, erased, labels, 2, "whc", "cos")
    spatial = masks.tap_mask(whole, erased, labels, 2, "whc", "cos", channels=None)
    assert full.shape == (2, 6, 5, 5)
    assert spatial.shape == (2, 1, 5, 5)
    kept_channels = full.amax((2, 3), keepdim=True)
    assert 0 < kept_channels.sum() < 12
    assert torch.equal(full, spatial * kept_channels)


LABEL_MAPS = {
    "no pixel new": torch.zeros(1, 6, 6, dtype=torch.int64),
    "every pixel new": torch.full((1, 6, 6), 3),
    "every pixel ignored": torch.full((1, 6, 6), IGNORE),
    "ordinary": torch.arange(36).view(1, 6, 6) % 5,
}


@pytest.mark.parametrize("rule,distance", PAIRS)
@pytest.mark.parametrize("situation", LABEL_MAPS)
@pytest.mark.parametrize("same_views", [False, True])
def test_losses_and_gradients_are_finite(rule, distance, situation, same_views):
    """Batch of one, a tap smaller than the 5×5 window, channels that the groups do not divide."""
    whole, erased = views(1, 7, 3, 3)
    erased = (whole, whole) if same_views else erased
    student = features(1, 7, 3, 3, seed=3).requires_grad_()
    mask = masks.tap_mask(whole, erased, LABEL_MAPS[situation], 3, rule, distance)
    assert mask.isfinite().all()
    assert ((mask >= 0) & (mask <= 1)).all()
    total = loss.mask_guided_distillation(whole, student, mask) + loss.context_distillation(whole, student, 2, mask)
    (grad,) = torch.autograd.grad(total, student)
    assert total.isfinite()
    assert grad.isfinite().all()


@pytest.mark.parametrize("situation", LABEL_MAPS)
def test_one_old_class_and_a_single_position(situation):
    whole, erased = views(1, 1, 1, 1)
    student = features(1, 1, 1, 1, seed=3).requires_grad_()
    for rule, distance in PAIRS:
        mask = masks.tap_mask(whole, erased, LABEL_MAPS[situation], 1, rule, distance)
        total = loss.mask_guided_distillation(whole, student, mask)
        assert torch.autograd.grad(total, student)[0].isfinite().all()


def test_features_of_zero():
    zero = torch.zeros(2, 4, 3, 3)
    for rule, distance in PAIRS:
        mask = masks.tap_mask(zero, (zero, zero), torch.randint(0, 4, (2, 6, 6)), 2, rule, distance)
        assert mask.isfinite().all()


def test_half_precision_taps():
    whole, erased = views(2, 6, 4, 4)
    labels = torch.randint(0, 4, (2, 8, 8), generator=torch.Generator().manual_seed(0))
    half = masks.tap_mask(whole.half(), (erased[0].half(), erased[1].half()), labels, 2, "whc", "cos")
    assert half.dtype == torch.float32
    widened = masks.tap_mask(
        whole.half().float(), (erased[0].half().float(), erased[1].half().float()), labels, 2, "whc", "cos"
    )
    assert torch.equal(half, widened)


@pytest.mark.parametrize("rule,distance", [*PAIRS, (None, None)])
def test_working_pairs_are_accepted(rule, distance):
    masks.check_rule(rule, distance)


@pytest.mark.parametrize(
    "rule,distance,message",
    [
        ("whc", None, "--sigmoid whc compares features and needs a --dis"),
        ("old", None, "--sigmoid old compares features and needs a --dis"),
        ("newnone", None, "needs a --dis"),
        ("none", None, "needs a --dis"),
        (None, "cos", "--dis cos has no effect without a --sigmoid"),
        ("soft", "cos", "--sigmoid 'soft' is unknown; use one of old, newnone, none, gt, whc"),
        ("whc", "L3", "--dis 'L3' is unknown; use one of L1_mean, mean_L1, L2, cos"),
    ],
)
def test_impossible_pairs_are_refused(rule, distance, message):
    with pytest.raises(ValueError, match=message):
        masks.check_rule(rule, distance)
