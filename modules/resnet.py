"""ResNet bodies with dilated last stages."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from modules.body import Body, BodyOutput, Norm
from modules.residual import ResidualBlock, Stage
from utils.errors import UserError


class Architecture(NamedTuple):
    """Blocks of each of the four stages, and whether they are bottlenecks."""

    blocks: tuple[int, int, int, int]
    bottleneck: bool


ARCHITECTURES = {
    "resnet18": Architecture((2, 2, 2, 2), False),
    "resnet34": Architecture((3, 4, 6, 3), False),
    "resnet50": Architecture((3, 4, 6, 3), True),
    "resnet101": Architecture((3, 4, 23, 3), True),
    "resnet152": Architecture((3, 8, 36, 3), True),
}

#: Dilation of each stage by output stride. A stage of dilation 1 halves the map, except the first, before which the stem does.
DILATIONS = {16: (1, 1, 1, 2), 8: (1, 1, 2, 4)}


class Stem(nn.Sequential):
    """conv1, bn1, pool1: (B, 3, H, W) -> (B, 64, H/4, W/4)."""

    conv1: nn.Module
    bn1: nn.Module
    pool1: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 64, H/4, W/4)."""
        x = self.conv1(x)
        if x.device.type != "cpu" or not x.is_contiguous():
            return self.pool1(self.bn1(x))
        # On a CPU max pooling is ten times faster in channels_last; this saves 5 % of a forward pass.
        return self.pool1(self.bn1(x.contiguous(memory_format=torch.channels_last))).contiguous()


class ResNet(Body):
    """The body: a stem (mod1) and four residual stages (mod2 to mod5).

    The convs have PyTorch's default initialisation (Kaiming uniform, a = √5), as in the official programs, which initialise only
    the convs of the head otherwise (`modules.deeplab`). This matters where no pretrained weights are loaded.

    Args:
        backbone: a key of `ARCHITECTURES`.
        norm: callable (num_features, activation) -> norm module.
        output_stride: input size over the size of the last map, 16 or 8.

    Raises:
        UserError: no such output stride.

    Reference: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016; dilations as in Chen et al.,
        "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017.
    """

    def __init__(self, backbone: str, norm: Norm, output_stride: int = 16) -> None:
        super().__init__()
        if output_stride not in DILATIONS:
            raise UserError(f"--output_stride {output_stride}: choose 8 or 16")
        blocks, bottleneck = ARCHITECTURES[backbone]
        self.mod1 = Stem(
            OrderedDict(
                conv1=nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
                bn1=norm(64),
                pool1=nn.MaxPool2d(3, stride=2, padding=1),
            )
        )
        in_channels = 64
        for i, dilation in enumerate(DILATIONS[output_stride]):
            width = 64 << i
            channels = (width, width, 4 * width) if bottleneck else (width, width)
            stage: OrderedDict[str, nn.Module] = OrderedDict()
            for j in range(blocks[i]):
                stride = 2 if i > 0 and j == 0 and dilation == 1 else 1
                stage[f"block{j + 1}"] = ResidualBlock(in_channels, channels, norm, stride, dilation)
                in_channels = channels[-1]
            self.add_module(f"mod{i + 2}", Stage(stage))
        self.out_channels = in_channels

    def forward(self, images: Tensor) -> BodyOutput:
        """(B, 3, H, W) -> the last map (B, out_channels, h, w), and the four attentions: the stages' outputs before
        their final activation."""
        x = self.mod1(images)
        attentions = []
        for stage in self.stages():
            x, attention = stage(x)
            attentions.append(attention)
        return x, tuple(attentions)

    @staticmethod
    def from_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Rename a torchvision ResNet's weights to the official names of the body; the classifier is dropped.

        conv1, bn1 -> mod1.conv1, mod1.bn1; layerN.I.convJ -> mod(N+1).block(I+1).convs.convJ, bnJ alike;
        downsample.0, .1 -> proj_conv, proj_bn.
        """
        if "conv1.weight" not in state:
            return None
        renamed = {}
        for key, value in state.items():
            if key.startswith("fc."):
                continue
            if match := re.fullmatch(r"layer(\d)\.(\d+)\.(.+)", key):
                stage, block, rest = int(match[1]), int(match[2]), match[3]
                rest = rest.replace("downsample.0", "proj_conv").replace("downsample.1", "proj_bn")
                rest = rest if rest.startswith("proj_") else f"convs.{rest}"
                key = f"mod{stage + 1}.block{block + 1}.{rest}"
            else:
                key = f"mod1.{key}"
            renamed[key] = value
        return renamed
