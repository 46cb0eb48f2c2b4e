"""RCIL's layers: two branches of 3×3 convs, mixed at random in training, and their merge into one.

    v = leaky(mix(p, p')),   p = norm(conv x),   p' = norm_new(conv_new x)

In training each channel is p, p' or their mean, chosen at random for the whole batch (`shares`). In evaluation it is the mean, which is
an affine map of x. `merge` writes this map into the old branch, which is frozen from then on.

The 3×3 conv of a bottleneck (conv2), the first conv of a basic block (conv1; the release has bottlenecks only) and the four parallel
convs of the head are doubled. State dict names are those of the release: conv2_new, bn2_new, map_convs_new, map_bn_new, and from step 1
on the biases of the old branch.

Reference: Zhang et al., "Representation Compensation Networks for Continual Semantic Segmentation", CVPR 2022, sections 3.2 and 3.3.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.deeplab import DeeplabV3, xavier_
from modules.norm import ABN, SLOPE

#: A draw below the first number selects the old branch, a draw between the two the new branch, a higher draw the mean.
BOUNDS = (0.33, 0.66)


class Branch(NamedTuple):
    """Parallel convs, and the norm of their concatenated outputs."""

    convs: list[nn.Conv2d]
    norm: ABN

    def __call__(self, x: Tensor) -> Tensor:
        """(B, c, H, W) -> (B, C, h, w), not activated."""
        return self.norm(
            torch.cat([conv(x) for conv in self.convs], dim=1) if len(self.convs) > 1 else self.convs[0](x)
        )


class TwoBranches(nn.Module):
    """Base class of the doubled layers; subclasses name their layers as in the release.

    Attributes:
        share: (C,) part of the old branch in each channel in training: 1, 0 or ½.
    """

    share: Tensor

    def branch(self, new: bool) -> Branch:
        """The old or the new branch."""
        raise NotImplementedError

    def drop_new_branch(self) -> None:
        """Remove the new branch; the forward pass is that of the old one from now on."""
        raise NotImplementedError

    @property
    def doubled(self) -> bool:
        """Whether the new branch is there."""
        raise NotImplementedError

    def mixture(self, x: Tensor) -> Tensor:
        """Both branches of a map, mixed and activated."""
        old = self.branch(new=False)(x)
        if not self.doubled:
            return F.leaky_relu(old, SLOPE)
        new = self.branch(new=True)(x)
        if not self.training:
            return F.leaky_relu_((old + new) / 2, SLOPE)
        share = self.share.to(old.dtype)[:, None, None]
        # Products by 1 and 0 are exact, and autograd keeps neither branch for the backward pass
        return F.leaky_relu_(torch.addcmul((1 - share) * new, old, share), SLOPE)

    def add_biases(self) -> list[nn.Parameter]:
        """Give the convs of the old branch biases of 0, which a merge sets, and return the biases."""
        convs = self.branch(new=False).convs
        biases = [nn.Parameter(conv.weight.new_zeros(conv.out_channels)) for conv in convs]
        for conv, bias in zip(convs, biases):
            conv.bias = bias
        return biases

    @torch.no_grad()
    def merge(self) -> None:
        """Write the mean of both branches in evaluation mode into the convs of the old branch, and make its norm the identity.

        The new branch is not changed. The products are computed in float64 and rounded once.
        """
        old, new = self.branch(new=False), self.branch(new=True)
        sizes = [conv.out_channels for conv in old.convs]
        (scale, shift), (scale_new, shift_new) = (_half_of(branch.norm) for branch in (old, new))
        parts = zip(old.convs, new.convs, scale.split(sizes), scale_new.split(sizes), (shift + shift_new).split(sizes))
        for conv, conv_new, s, s_new, b in parts:
            assert conv.bias is not None, "the old branch needs biases"
            bias = b + s * conv.bias.double()
            weight = conv.weight.double() * s.view(-1, 1, 1, 1) + conv_new.weight.double() * s_new.view(-1, 1, 1, 1)
            conv.weight.copy_(weight)
            conv.bias.copy_(bias)
        neutralise(old.norm)

    def merge_into_one(self) -> None:
        """Merge, then remove the new branch. In evaluation mode the layer computes the same as before."""
        if self.branch(new=False).convs[0].bias is None:
            self.add_biases()
        self.merge()
        self.drop_new_branch()

    @torch.no_grad()
    def make_plain(self) -> None:
        """Merge into one branch whose convs have no bias, so that the weights fit a layer that was never doubled."""
        eps = self.branch(new=True).norm.eps
        self.merge_into_one()
        convs, norm = self.branch(new=False)
        norm.bias.copy_(torch.cat([conv.bias for conv in convs if conv.bias is not None]))
        norm.eps = eps
        for conv in convs:
            conv.bias = None
        # scale / sqrt(1 + eps) = 1; in-place norms add their eps to the weight
        added = norm.scale().double() - norm.weight.double()
        norm.weight.copy_(math.sqrt(1 + eps) - added)


def shares(draws: Tensor) -> Tensor:
    """The part of the old branch in each channel: 1, 0 or ½.

    Args:
        draws: (C,) uniform on [0, 1).

    Returns:
        (C,) of the same type.
    """
    return (draws < BOUNDS[0]).to(draws) + (draws >= BOUNDS[1]).to(draws) / 2


@torch.no_grad()
def neutralise(norm: ABN) -> None:
    """Make a norm the identity in evaluation mode: weight 1, bias 0, mean 0, variance 1, eps 0.

    The eps is not stored in a checkpoint. After loading one, the norm divides by sqrt(1 + 1e-5), as in the release.
    """
    norm.weight.fill_(1)
    norm.bias.zero_()
    norm.running_mean.zero_()
    norm.running_var.fill_(1)
    norm.eps = 0.0


def _half_of(norm: ABN) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) of half a norm in evaluation mode, in float64."""
    scale = norm.scale().double() / (2 * (norm.running_var.double() + norm.eps).sqrt())
    return scale, norm.bias.double() / 2 - norm.running_mean.double() * scale


class DoubledConvs(TwoBranches, nn.Sequential):
    """The convs of a residual block, its first 3×3 conv doubled.

    Args:
        convs: the `convs` of a `ResidualBlock`. Its layers are used, not copied; the new conv and norm are copies of the old ones.
    """

    def __init__(self, convs: nn.Sequential) -> None:
        super().__init__()
        names = list(convs._modules)
        for name in names:
            self.add_module(name, convs.get_submodule(name))
        at = next(i for i, layer in enumerate(self) if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3))
        self.before, self.old, self.after = names[:at], names[at : at + 2], names[at + 2 :]
        self.new = [f"{name}_new" for name in self.old]
        cast(ABN, self.get_submodule(self.old[1])).activation = "identity"  # the mixture is activated
        for old, new in zip(self.old, self.new):
            self.add_module(new, copy.deepcopy(getattr(self, old)))
        _prepare_norms(self)
        share = torch.full_like(self.branch(new=False).norm.running_mean, 0.5)
        self.register_buffer("share", share, persistent=False)

    @property
    def doubled(self) -> bool:
        """See `TwoBranches`."""
        return self.new[0] in self._modules

    def branch(self, new: bool) -> Branch:
        """See `TwoBranches`."""
        conv, norm = (self.get_submodule(name) for name in (self.new if new else self.old))
        return Branch([cast(nn.Conv2d, conv)], cast(ABN, norm))

    def drop_new_branch(self) -> None:
        """See `TwoBranches`."""
        for name in self.new:
            delattr(self, name)

    def forward(self, x: Tensor) -> Tensor:
        """The residual path of the block, without its final activation."""
        for name in self.before:
            x = getattr(self, name)(x)
        x = self.mixture(x)
        for name in self.after:
            x = getattr(self, name)(x)
        return x


class DoubledHead(TwoBranches, DeeplabV3):
    """The DeepLabV3 head with its four parallel convs doubled; both branches start from their own random weights.

    The arguments are those of `DeeplabV3`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: Callable[..., ABN],
        output_stride: int = 16,
        pooling: int | None = 32,
    ) -> None:
        super().__init__(in_channels, out_channels, norm, output_stride, pooling)
        self.map_bn.activation = "identity"
        self.map_convs_new = copy.deepcopy(self.map_convs)
        self.map_bn_new = copy.deepcopy(self.map_bn)
        _prepare_norms(self)
        xavier_(self, gain=1.0)  # the gain of a norm without activation, as in the release
        self.register_buffer("share", torch.full_like(self.map_bn.running_mean, 0.5), persistent=False)

    @property
    def doubled(self) -> bool:
        """See `TwoBranches`."""
        return "map_convs_new" in self._modules

    def branch(self, new: bool) -> Branch:
        """See `TwoBranches`."""
        convs, norm = (self.map_convs_new, self.map_bn_new) if new else (self.map_convs, self.map_bn)
        return Branch([cast(nn.Conv2d, conv) for conv in convs], norm)

    def drop_new_branch(self) -> None:
        """See `TwoBranches`."""
        del self.map_convs_new, self.map_bn_new

    def pyramid(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, 4·hidden, h, w), activated."""
        return self.mixture(x)


def _prepare_norms(module: nn.Module) -> None:
    """Set the slope as in the release, which uses torch's leaky ReLU; the in-place norms round it to float32."""
    for norm in module.modules():
        if isinstance(norm, ABN):
            norm.slope = SLOPE
