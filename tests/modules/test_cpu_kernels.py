"""modules/cpu_kernels.py: used on the CPU alone. That they equal torch's calls is tested beside the modules that call them."""

import pytest
import torch

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
