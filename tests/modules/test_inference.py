"""Class maps from several views of an image, compared with torch's own interpolation and softmax."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as transforms

from modules import inference
from modules.inference import PLAIN, View, class_map, make_views, most_likely, seen
from modules.upsample import upsample
from tests.support import thin


@pytest.fixture
def network():
    with thin.program():
        yield thin.network(thin.options(), [7], seed=3).eval()


def test_views_by_hand():
    assert make_views(None, False) == PLAIN == (View(1.0, False),)
    assert make_views([0.5, 2], True) == ((0.5, False), (0.5, True), (2, False), (2, True))
    image = torch.arange(3 * 2 * 4, dtype=torch.uint8).view(3, 2, 4)
    assert torch.equal(seen(image, View(1, True)), image[..., [3, 2, 1, 0]])
    assert seen(image, View(1.3)).shape == (3, 3, 5)  # 2.6 and 5.2 pixels
    assert seen(image, View(0.1)).shape == (3, 2, 2)
    assert seen(image[None].float(), View(2)).dtype == torch.float32


def test_class_map_is_the_arg_max(monkeypatch):
    monkeypatch.setattr(inference, "_BAND", 5 * 207 * 10)  # bands of ten rows
    logits = torch.randn(5, 9, 13, dtype=torch.float64)
    classes = class_map([logits], (131, 207))
    assert classes.dtype == torch.uint8
    assert torch.equal(classes.long(), upsample(logits[None], (131, 207))[0].argmax(dim=0))


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("band", [1 << 24, 1000])
def test_probabilities_of_views_are_summed(monkeypatch, background, band):
    """Not logits: a view that is sure outvotes one that is not, but no more than by its probability."""
    monkeypatch.setattr(inference, "_BAND", band)
    views = [4 * torch.randn(5, *size, dtype=torch.float64) for size in ((9, 13), (5, 7), (18, 26))]
    whole = [F.interpolate(v[None], size=(70, 100), mode="bilinear", align_corners=False)[0] for v in views]
    if not background:
        for logits in whole:
            logits[0] = float("-inf")
    expected = sum(logits.softmax(0) for logits in whole).argmax(0)
    assert torch.equal(class_map(views, (70, 100), background).long(), expected)
    assert not torch.equal(sum(whole).argmax(0), expected)


@pytest.mark.parametrize("background", [True, False])
@torch.no_grad()
def test_a_plain_view_is_the_network_itself(network, background):
    images = thin.images(2, size=48)
    logits = network(images).logits
    expected = logits.argmax(1) if background else 1 + logits[:, 1:].argmax(1)
    assert torch.equal(most_likely(network, images, PLAIN, background), expected)


@pytest.mark.parametrize("background", [True, False])
@torch.no_grad()
def test_a_batch_seen_at_scales_and_mirrored(network, background):
    images, scales = thin.images(2, size=48), (0.75, 1.5)
    total = 0
    for scale in scales:
        scaled = transforms.resize(images, [round(48 * scale)] * 2, antialias=True)
        for logits in (network(scaled).logits_small, network(scaled.flip(-1)).logits_small.flip(-1)):
            large = F.interpolate(logits, size=(48, 48), mode="bilinear", align_corners=False)
            if not background:
                large[:, 0] = float("-inf")
            total = total + large.softmax(1)
    found = most_likely(network, images, make_views(scales, True), background)
    best = total.topk(2, dim=1).values
    decided = best[:, 0] - best[:, 1] > 1e-5
    assert found.dtype == torch.int64 and decided.float().mean() > 0.95
    assert torch.equal(found[decided], total.argmax(1)[decided])
    assert not torch.equal(found, most_likely(network, images, PLAIN, background))


@torch.no_grad()
def test_mixed_precision_interpolates_in_float32(network):
    images, views = thin.images(1, size=32), make_views([1], True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        small = [network(images).logits_small[0].float(), network(images.flip(-1)).logits_small[0].float().flip(-1)]
        found = most_likely(network, images, views)
    assert torch.equal(found[0], class_map(small, (32, 32)).long())
