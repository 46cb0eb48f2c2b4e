"""Norms of a frozen network folded into its convs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.compensation import TwoBranches
from modules.deeplab import DeeplabV3
from modules.norm import ABN
from modules.residual import ResidualBlock

#: Number of filters that are rescaled at a time, which limits the memory of the float64 products.
FILTERS_AT_ONCE = 32


class Activation(nn.Module):
    """Replaces a norm whose affine map was folded into the conv: applies the activation in place."""

    def __init__(self, activation: str, slope: float) -> None:
        super().__init__()
        self.activation = activation
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        """The activated map; overwrites x."""
        return F.leaky_relu_(x, self.slope) if self.activation == "leaky_relu" else x


def fold_frozen(model: nn.Module, in_place: bool = False) -> nn.Module:
    """Fold the affine map of every norm of a frozen network into its conv, so that the network computes the same without norms.

    In evaluation a norm is x ↦ a·x + b per channel, so conv and norm are one conv with weight a·w and bias b. The two branches of a
    layer of RCIL become one.

    Args:
        model: a network in evaluation mode whose parameters take no gradient. A norm is folded if it follows its conv in an
            `nn.Sequential`, if the two are named `proj_conv` and `proj_bn`, or if it belongs to a `DeeplabV3` head.
        in_place: fold the given network instead of a copy, which saves the memory of a second set of weights.

    Returns:
        The folded network, equal up to rounding. Its state dict is no longer the official one: do not save it.
    """
    assert not model.training, "a norm is an affine map in evaluation mode only"
    model = model if in_place else copy.deepcopy(model)
    for module in list(model.modules()):
        if isinstance(module, TwoBranches):
            module.merge_into_one()
        if isinstance(module, DeeplabV3):
            _fold_head(module)
        elif isinstance(module, nn.Sequential):
            names = list(dict(module.named_children()))
            for first, second in pairwise(names):
                _fold_pair(module, first, second)
        elif isinstance(module, ResidualBlock) and module.proj_conv is not None:
            _fold_pair(module, "proj_conv", "proj_bn")
    return model.requires_grad_(False)


def _fold_pair(parent: nn.Module, conv: str, norm: str) -> None:
    """Fold the norm of that name into the conv of that name, if the children are a norm and a conv."""
    first, second = getattr(parent, conv), getattr(parent, norm)
    if isinstance(first, nn.Conv2d) and isinstance(second, ABN):
        _fold([first], second)
        setattr(parent, norm, Activation(second.activation, second.slope))


def _fold_head(head: DeeplabV3) -> None:
    """Fold the head's norms: map_bn normalises four concatenated convs, red_bn the sum of two."""
    map_convs = [conv for conv in head.map_convs if isinstance(conv, nn.Conv2d)]
    _fold(map_convs, head.map_bn)
    _fold([head.global_pooling_conv], head.global_pooling_bn)
    scale, shift = _affine(head.red_bn)
    _scale_filters(head.red_conv, scale, shift)
    _scale_filters(head.pool_red_conv, scale, None)  # the sum gets the shift from red_conv
    for name in ("map_bn", "global_pooling_bn", "red_bn"):
        norm = getattr(head, name)
        setattr(head, name, Activation(norm.activation, norm.slope))


def _fold(convs: Sequence[nn.Conv2d], norm: ABN) -> None:
    """Fold a norm into the convs whose concatenated outputs it normalises."""
    widths = [conv.out_channels for conv in convs]
    scale, shift = _affine(norm)
    for conv, a, b in zip(convs, scale.split(widths), shift.split(widths), strict=True):
        _scale_filters(conv, a, b)


@torch.no_grad()
def _affine(norm: ABN) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) of an evaluation-mode norm, in float64, so that the result is rounded once."""
    scale = norm.scale().double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    return scale, norm.bias.double() - norm.running_mean.double() * scale


@torch.no_grad()
def _scale_filters(conv: nn.Conv2d, scale: Tensor, shift: Tensor | None) -> None:
    """Give a conv the output scale·conv(x) + shift."""
    bias = shift
    if conv.bias is not None:
        moved = conv.bias.double() * scale
        bias = moved if shift is None else shift + moved
    for filters, factor in zip(conv.weight.split(FILTERS_AT_ONCE), scale.split(FILTERS_AT_ONCE)):
        filters.copy_(filters.double() * factor.view(-1, 1, 1, 1))
    if bias is not None:
        conv.bias = nn.Parameter(bias.to(conv.weight.dtype))
