"""The DeepLabV3 head."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.atrous import AtrousConv2d
from modules.norm import ABN, SLOPE

#: Dilations of the three 3×3 convs by output stride.
DILATIONS = {16: (6, 12, 18), 8: (12, 24, 32)}


def xavier_(module: nn.Module, gain: float | None = None) -> None:
    """Fill the convs with Xavier-normal weights, biases with zero.

    Args:
        module: holds the convs.
        gain: of the weights; None: the gain of the leaky ReLU that follows the convs.
    """
    gain = nn.init.calculate_gain("leaky_relu", SLOPE) if gain is None else gain
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.xavier_normal_(m.weight, gain)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


class DeeplabV3(nn.Module):
    """Atrous spatial pyramid pooling: four parallel convs and a pooled branch, reduced to one map.

    Args:
        in_channels: channels of the body's output.
        out_channels: channels of the result.
        norm: callable (num_features, activation) -> norm module.
        output_stride: 16 or 8; a key of `DILATIONS`.
        pooling: window of the pooled branch in evaluation, in cells of the map; None pools over the whole map.

    Reference: Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017. As in the official
        release, evaluation pools over a window of the size of the training maps rather than over the whole map.
    """

    hidden_channels = 256

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: Callable[..., ABN],
        output_stride: int = 16,
        pooling: int | None = 32,
    ) -> None:
        super().__init__()
        hidden = self.hidden_channels
        self.pooling = pooling
        self.map_convs = nn.ModuleList([nn.Conv2d(in_channels, hidden, 1, bias=False)])
        for d in DILATIONS[output_stride]:
            self.map_convs.append(AtrousConv2d(in_channels, hidden, d))
        self.map_bn = norm(4 * hidden)
        self.global_pooling_conv = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.global_pooling_bn = norm(hidden)
        self.red_conv = nn.Conv2d(4 * hidden, out_channels, 1, bias=False)
        self.pool_red_conv = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.red_bn = norm(out_channels)
        xavier_(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h, w)."""
        return self.red_bn(self.red_conv(self.pyramid(x)).add_(self._pooled_branch(x)))

    def pyramid(self, x: Tensor) -> Tensor:
        """The four parallel convs: (B, in_channels, h, w) -> (B, 4·hidden, h, w), activated."""
        return self.map_bn(torch.cat([conv(x) for conv in self.map_convs], dim=1))

    def _pooled_branch(self, x: Tensor) -> Tensor:
        """Mean of the map in training, of a sliding window in evaluation, through its two convs.

        Returns:
            (B, out_channels, 1, 1) where one window covers the map, to be broadcast, else (B, out_channels, h, w).
        """
        height, width = x.shape[2:]
        if not self.training and self.pooling is not None:
            height, width = min(self.pooling, height), min(self.pooling, width)
        if (height, width) == tuple(x.shape[2:]):
            pooled = x.mean((2, 3), keepdim=True)
        else:
            # One axis after the other: height + width additions for each value instead of height · width
            pooled = F.avg_pool2d(F.avg_pool2d(x, (height, 1), stride=1), (1, width), stride=1)
            # (B, c, h - height + 1, w - width + 1)
        pooled = self.pool_red_conv(self.global_pooling_bn(self.global_pooling_conv(pooled)))
        if pooled.shape[2:] == (1, 1):
            return pooled
        # Replicating the border after the convs instead of before gives the same numbers for less work.
        left, top = (width - 1) // 2, (height - 1) // 2
        return F.pad(pooled, (left, width - 1 - left, top, height - 1 - top), mode="replicate")
