"""The body MobileNetV2, with dilated last stages."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from modules.body import Body, BodyOutput, Norm
from modules.resnet import DILATIONS
from utils.errors import UserError


class Group(NamedTuple):
    """Consecutive blocks with the same number of channels: t, c, n and s in table 2 of the paper."""

    expansion: int
    channels: int
    blocks: int
    stride: int


#: Channels of the first conv, and the block between it and the first stage, at half the input's size.
STEM = Group(1, 16, 1, 1)
STEM_CHANNELS = 32

#: Groups of the four stages, at a fourth, an eighth, a sixteenth and a sixteenth of the input's size.
STAGES = (
    (Group(6, 24, 2, 2),),
    (Group(6, 32, 3, 2),),
    (Group(6, 64, 4, 2), Group(6, 96, 3, 1)),
    (Group(6, 160, 3, 2), Group(6, 320, 1, 1)),
)


class InvertedResidual(nn.Module):
    """1×1 expansion (none where it is 1), 3×3 depthwise conv, 1×1 projection without activation; the input is added if shapes agree.

    Args:
        in_channels: channels of the input.
        channels: channels of the output.
        norm: callable (num_features, activation) -> norm module.
        expansion: channels of the depthwise conv over those of the input.
        stride: stride of the depthwise conv.
        dilation: dilation of the depthwise conv.

    Reference: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, table 1; the leaky
        ReLU of this program's norms replaces ReLU6.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        norm: Norm,
        expansion: int,
        stride: int = 1,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        depthwise = nn.Conv2d(hidden, hidden, 3, stride, dilation, dilation, groups=hidden, bias=False)
        convs = [depthwise, nn.Conv2d(hidden, channels, 1, bias=False)]
        if expansion != 1:
            convs.insert(0, nn.Conv2d(in_channels, hidden, 1, bias=False))
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, conv in enumerate(convs, 1):
            layers[f"conv{i}"] = conv
            activation = "identity" if i == len(convs) else "leaky_relu"
            layers[f"bn{i}"] = norm(conv.out_channels, activation=activation)
        self.convs = nn.Sequential(layers)
        self.residual = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, channels, H/stride, W/stride)."""
        y = self.convs(x)
        if not self.residual:
            return y
        # In training the backward pass of the norm needs its output; without gradients the sum may overwrite it.
        return y + x if torch.is_grad_enabled() else y.add_(x)


class MobileNetV2(Body):
    """The body: a stem (mod1) and four stages (mod2 to mod5), named as those of `ResNet`.

    In a stage that must not halve the map, the stride is replaced by a dilation of the convs after the strided one. On every
    other row and column the map is then that of the classification network. (In `ResNet`, as in the official program, the
    strided conv itself is dilated too.) The convs have PyTorch's default initialisation, as in `ResNet`.

    Args:
        norm: callable (num_features, activation) -> norm module.
        output_stride: input size over the size of the last map, 16 or 8.

    Attributes:
        out_channels: channels of the last map, 320: the 1280-channel conv belongs to the ImageNet classifier.
        slope: 1, because the stages end in linear bottlenecks without an activation.

    Raises:
        UserError: no such output stride.

    Reference: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, table 2 and, for
        segmentation, section 6.3.
    """

    slope = 1.0

    def __init__(self, norm: Norm, output_stride: int = 16) -> None:
        super().__init__()
        if output_stride not in DILATIONS:
            raise UserError(f"--output_stride {output_stride}: choose 8 or 16")
        self.mod1 = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(3, STEM_CHANNELS, 3, stride=2, padding=1, bias=False),
                bn1=norm(STEM_CHANNELS),
                block1=InvertedResidual(STEM_CHANNELS, STEM.channels, norm, STEM.expansion),
            )
        )
        channels, reached, dilation = STEM.channels, 2, 1
        for i, groups in enumerate(STAGES):
            stage: OrderedDict[str, nn.Module] = OrderedDict()
            for group in groups:
                for j in range(group.blocks):
                    wanted = group.stride if j == 0 else 1
                    stride = wanted if reached < output_stride else 1
                    block = InvertedResidual(channels, group.channels, norm, group.expansion, stride, dilation)
                    stage[f"block{len(stage) + 1}"] = block
                    channels, reached, dilation = group.channels, reached * stride, dilation * wanted // stride
            self.add_module(f"mod{i + 2}", nn.Sequential(stage))
        self.out_channels = channels

    def forward(self, images: Tensor) -> BodyOutput:
        """(B, 3, H, W) -> the last map (B, 320, h, w), and the four attentions: the stages' outputs.

        The bottlenecks are linear: no activation follows a stage, and the last attention is the last map itself.
        """
        x = self.mod1(images)
        attentions = []
        for stage in self.stages():
            x = stage(x)
            attentions.append(x)
        return x, tuple(attentions)

    @staticmethod
    def from_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Rename a torchvision MobileNetV2's weights to the names of the body.

        The ImageNet classifier (classifier.*) and its 1280-channel conv (features.18.*) are dropped. A name that is not one of
        MobileNetV2 is kept; the check against the body then refuses it.
        """
        if "features.0.0.weight" not in state:
            return None
        names = torchvision_names()
        renamed = {}
        for key, value in state.items():
            module, _, parameter = key.rpartition(".")
            if module not in ("classifier.1", "features.18.0", "features.18.1"):
                renamed[f"{names[module]}.{parameter}" if module in names else key] = value
        return renamed


def torchvision_names() -> dict[str, str]:
    """Module names of torchvision's MobileNetV2 and of the body: "features.2.conv.0.0" -> "mod2.block1.convs.conv1"."""
    names = {"features.0.0": "mod1.conv1", "features.0.1": "mod1.bn1"}
    blocks = [("mod1.block1", STEM.expansion)]
    for i, groups in enumerate(STAGES):
        expansions = [group.expansion for group in groups for _ in range(group.blocks)]
        blocks += [(f"mod{i + 2}.block{j}", expansion) for j, expansion in enumerate(expansions, 1)]
    for index, (block, expansion) in enumerate(blocks, 1):
        last = (
            2 if expansion == 1 else 3
        )  # number of the projection; the convs before it are in a Sequential with their norm
        for j in range(1, last):
            names[f"features.{index}.conv.{j - 1}.0"] = f"{block}.convs.conv{j}"
            names[f"features.{index}.conv.{j - 1}.1"] = f"{block}.convs.bn{j}"
        names[f"features.{index}.conv.{last - 1}"] = f"{block}.convs.conv{last}"
        names[f"features.{index}.conv.{last}"] = f"{block}.convs.bn{last}"
    return names
