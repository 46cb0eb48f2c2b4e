"""Tiles: how an axis is cut, and the equality with the whole image; windows that slide over it."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modules.tiles import Tiling, Windows, averaged_logits, joined_logits, spans
from modules.upsample import upsample, upsample_bands


def test_cuts_by_hand():
    tiling = Tiling(side=64, overlap=32, stride=16)
    assert spans(64, tiling) == [(0, 4, 0, 4)]
    assert spans(65, tiling) == [(0, 4, 0, 2), (1, 5, 2, 5)]
    # 10 cells in tiles of up to 4 that share 2: four tiles
    assert spans(160, tiling) == [(0, 4, 0, 3), (2, 6, 3, 5), (4, 8, 5, 7), (6, 10, 7, 10)]


@given(
    length=st.integers(1, 5000), side=st.integers(1, 40), overlap=st.integers(0, 39), stride=st.sampled_from([8, 16])
)
def test_tiles_cover_the_axis_once_and_share_the_overlap(length, side, overlap, stride):
    if overlap >= side:
        return
    tiling = Tiling(side * stride, overlap * stride, stride)
    found, cells = spans(length, tiling), -(-length // stride)
    assert [cell for span in found for cell in range(span.first, span.last)] == list(range(cells))
    assert all(span.stop - span.start <= side and span.start <= span.first < span.last <= span.stop for span in found)
    for span, following in pairwise(found):
        assert span.stop - following.start >= overlap
        assert span.stop - span.last >= overlap // 2 and following.first - following.start >= overlap // 2
    assert len(found) == 1 or length > side * stride


class Convs(nn.Module):
    """Stride 4, and a cell sees 3 cells to each side."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(8, 5, 3, padding=2, dilation=2),
        )  # fmt: skip

    def forward(self, image):
        return self.layers(image[None].float())[0]


@pytest.mark.parametrize("size", [(90, 131), (128, 64), (37, 300), (20, 20)])
@torch.no_grad()
def test_logits_of_tiles_are_those_of_the_whole_image(size):
    """Overlap of twice what a cell sees: equal everywhere. Without: equal but near the seams."""
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    network = Convs()
    whole = network(image)
    torch.testing.assert_close(joined_logits(network, image, Tiling(64, 24, 4)), whole)
    tiling = Tiling(64, 0, 4)
    near = torch.zeros(whole.shape[1:], dtype=torch.bool)
    for axis, length in enumerate(size):
        for span in spans(length, tiling)[1:]:
            near.narrow(axis, max(span.first - 3, 0), min(6, near.shape[axis] - max(span.first - 3, 0)))[:] = True
    cut = joined_logits(network, image, tiling)
    torch.testing.assert_close(cut[:, ~near], whole[:, ~near])
    assert near.any() == (max(size) > 64) == (not torch.allclose(cut, whole))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_bands_are_rows_of_the_whole_map(dtype, rows):
    logits = torch.randn(5, 9, 13, dtype=dtype)
    whole = upsample(logits[None], (131, 207))[0]
    bands = list(upsample_bands(logits, (131, 207), rows))
    assert [start for start, _ in bands] == list(range(0, 131, rows))
    torch.testing.assert_close(torch.cat([band for _, band in bands], dim=1), whole)


@pytest.mark.parametrize("size", [(90, 131), (40, 300), (20, 20)])
@torch.no_grad()
def test_logits_of_windows_are_averaged(size):
    """Every cell by hand: the mean over the windows that see it, the last one at the border."""
    image, network = torch.randint(0, 256, (3, *size), dtype=torch.uint8), Convs()
    found = averaged_logits(network, image, Windows(side=66, step=34, stride=4))  # 16 cells, every 8
    cells = [-(-length // 4) for length in size]
    places = [sorted({min(8 * n, max(0, length - 16)) for n in range(length)}) for length in cells]
    total, count = torch.zeros(5, *cells), torch.zeros(cells)
    for top in places[0]:
        for left in places[1]:
            part = network(image[:, 4 * top : 4 * top + 64, 4 * left : 4 * left + 64])
            total[:, top : top + 16, left : left + 16] += part
            count[top : top + 16, left : left + 16] += 1
    torch.testing.assert_close(found, total / count)
    assert count.min() >= 1 and (count.max() > 1) == (max(size) > 64)
    assert torch.allclose(found, network(image)) == (max(size) <= 64)
