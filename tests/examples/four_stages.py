"""four_stages: the smallest body, with one conv in each stage.

In modules/backbones.py it needs one line: "four_stages": Backbone(FourStages).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from modules.body import Body, BodyOutput, Norm

#: Channels of the four stages.
WIDTHS = (16, 24, 32, 48)

#: By output stride: stride and dilation of each stage's conv; the stem has taken a fourth of the size.
STRIDES = {16: ((1, 1), (2, 1), (2, 1), (1, 2)), 8: ((1, 1), (2, 1), (1, 2), (1, 4))}


class FourStages(Body):
    """A stem and four stages of a 3×3 conv, a norm and the leaky ReLU.

    Args:
        norm: callable (num_features, activation) -> norm module.
        output_stride: input size over the size of the last map, 16 or 8.
    """

    out_channels = WIDTHS[-1]

    def __init__(self, norm: Norm, output_stride: int = 16) -> None:
        super().__init__()
        self.mod1 = nn.Sequential(nn.Conv2d(3, WIDTHS[0], 8, stride=4, padding=2, bias=False), norm(WIDTHS[0]))
        channels = WIDTHS[0]
        for number, (width, (stride, dilation)) in enumerate(zip(WIDTHS, STRIDES[output_stride]), start=2):
            conv = nn.Conv2d(channels, width, 3, stride, dilation, dilation, bias=False)
            # a conv followed by its norm in a Sequential becomes one conv in the frozen teacher
            self.add_module(f"mod{number}", nn.Sequential(conv, norm(width, activation="identity")))
            channels = width

    def forward(self, images: Tensor) -> BodyOutput:
        """(B, 3, H, W) -> (B, 48, h, w), and the stages' outputs before their activation."""
        x, taps = self.mod1(images), []
        for stage in self.stages():
            taps.append(stage(x))
            x = F.leaky_relu(taps[-1], self.slope)
        return x, tuple(taps)
