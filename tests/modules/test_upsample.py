"""modules/upsample.py: the numbers of torch's own upsampling."""

import pytest
import torch
import torch.nn.functional as F

from modules.upsample import upsample


@pytest.mark.parametrize("size", [(24, 40), (5, 3), (7, 31)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_upsampling_is_bilinear(size, dtype):
    torch.manual_seed(0)
    small = torch.randn(2, 3, 5, 7, dtype=dtype, requires_grad=True)
    expected = F.interpolate(small, size=size, mode="bilinear", align_corners=False)
    found, target = upsample(small, size), torch.randn_like(expected)
    assert found.dtype is dtype
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad((large * target).sum(), small)[0] for large in (found, expected)]
    torch.testing.assert_close(*slopes)
    with torch.autocast("cpu", torch.bfloat16):
        assert upsample(small, size).dtype is dtype
