"""Residual blocks whose norms contain the activation."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.norm import SLOPE


class ResidualBlock(nn.Module):
    """A basic (two 3×3 convs) or bottleneck (1×1, 3×3, 1×1) block without its final activation.

    Args:
        in_channels: channels of the input.
        channels: output channels of each conv: two of them make a basic block, three a bottleneck.
        norm: callable (num_features, activation) -> norm module.
        stride: stride of the first 3×3 conv.
        dilation: dilation of the 3×3 convs.

    Reference: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016; the 3×3 conv has the stride.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        norm: Callable[..., nn.Module],
        stride: int = 1,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        kernels = (3, 3) if len(channels) == 2 else (1, 3, 1)
        strided = kernels.index(3)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        inputs = (in_channels, *channels)
        for i, kernel in enumerate(kernels):
            spread = dilation if kernel == 3 else 1
            layers[f"conv{i + 1}"] = nn.Conv2d(
                inputs[i],
                channels[i],
                kernel,
                stride=stride if i == strided else 1,
                padding=spread if kernel == 3 else 0,
                dilation=spread,
                bias=False,
            )
            last = i == len(kernels) - 1
            layers[f"bn{i + 1}"] = norm(channels[i], activation="identity" if last else "leaky_relu")
        self.convs = nn.Sequential(layers)
        self.proj_conv: nn.Module | None = None
        self.proj_bn: nn.Module | None = None
        if stride != 1 or in_channels != channels[-1]:
            self.proj_conv = nn.Conv2d(in_channels, channels[-1], 1, stride=stride, bias=False)
            self.proj_bn = norm(channels[-1], activation="identity")

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, channels[-1], H/stride, W/stride), before the final activation."""
        shortcut = x if self.proj_conv is None or self.proj_bn is None else self.proj_bn(self.proj_conv(x))
        y = self.convs(x)
        # In training the backward pass of the norm needs its output; without gradients the sum may overwrite it.
        return y + shortcut if torch.is_grad_enabled() else y.add_(shortcut)


class Stage(nn.Sequential):
    """The blocks of one residual stage; returns the activated output and the attention, the same before activation."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, in_channels, H, W) -> the activated output (B, channels, h, w), and the same before the activation."""
        for block in self:
            attention = block(x)
            # The activation may overwrite the sum of an inner block, which nothing else reads; distillation reads that of the last block.
            x = F.leaky_relu(attention, SLOPE, inplace=block is not self[-1])
        return x, attention
