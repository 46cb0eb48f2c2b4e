"""modules/cpu_kernels.py: used on the CPU alone, where they equal torch's calls (upsampling: test_upsample.py)."""

import pytest
import torch
import torch.nn.functional as F

from modules import cpu_kernels
from modules.atrous import AtrousConv2d
from modules.upsample import upsample


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_only_the_cpu_uses_them(device, monkeypatch):
    """Tensors without values stand for those of any other device."""
    called = []
    for name in ("atrous_conv2d", "upsample"):
        kernel = getattr(cpu_kernels, name)
        monkeypatch.setattr(cpu_kernels, name, lambda *args, f=kernel, n=name: called.append(n) or f(*args))
    with torch.device(device):
        features = AtrousConv2d(4, 3, 6)(torch.randn(2, 4, 5, 7))
        assert features.shape == (2, 3, 5, 7) and upsample(features, (10, 14)).shape == (2, 3, 10, 14)
    assert called == (["atrous_conv2d", "upsample"] if device == "cpu" else [])


@pytest.mark.parametrize("size", [(5, 20), (6, 6), (3, 4), (8, 9), (7, 30), (16, 16), (17, 18)])
def test_atrous_conv_is_the_whole_conv(size):
    torch.manual_seed(0)
    conv = AtrousConv2d(4, 3, 6).double()
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    whole = F.conv2d(x, conv.weight, padding=6, dilation=6)
    target = torch.randn_like(whole)
    torch.testing.assert_close(conv(x), whole, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad((conv(x) * target).sum(), (x, conv.weight))
    expected = torch.autograd.grad((whole * target).sum(), (x, conv.weight))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert (type(conv(x).grad_fn).__name__ == "_SeenOnlyBackward") == (min(size) in (7, 8, 16))


def test_atrous_conv_of_a_frozen_network_and_in_half_precision_is_the_plain_one():
    conv, x = AtrousConv2d(4, 3, 6), torch.randn(1, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype is torch.bfloat16 and type(conv(x).grad_fn).__name__ != "_SeenOnlyBackward"
    conv.requires_grad_(False)
    assert conv(x).grad_fn is None
