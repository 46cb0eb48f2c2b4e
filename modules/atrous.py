"""The dilated 3×3 convs of the DeepLabV3 head, which on small maps mostly see padding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class AtrousConv2d(nn.Conv2d):
    """Dilated 3×3 conv with padding = dilation that spends no work on taps which see nothing but padding.

    On a map no larger than the dilation only the centre row (column) of the kernel ever meets the map: at 256 px and stride 16 the
    widest conv costs a ninth. Where the dilation is a good part of the map, the CPU's gradient of the weights is taken tap by tap
    on the part of the map that the tap sees (`_SeenOnly`). Values and gradients are those of the whole kernel, up to rounding.
    """

    def __init__(self, in_channels: int, out_channels: int, dilation: int) -> None:
        super().__init__(in_channels, out_channels, 3, dilation=dilation, padding=dilation, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h, w)."""
        reach = self.dilation[0]
        whole = [size > reach for size in x.shape[2:]]
        if all(whole):
            return _SeenOnly.apply(x, self.weight, reach) if self._mostly_padding(x) else super().forward(x)
        rows, columns = (slice(None) if w else slice(1, 2) for w in whole)
        padding = [reach if w else 0 for w in whole]
        return F.conv2d(x, self.weight[:, :, rows, columns], self.bias, 1, padding, self.dilation)

    def _mostly_padding(self, x: Tensor) -> bool:
        """Whether products of the seen parts beat the CPU's conv kernel at the gradient of the weights; half precision has its own."""
        trained = torch.is_grad_enabled() and self.weight.requires_grad and self.bias is None
        plain = x.device.type == "cpu" and x.dtype == self.weight.dtype and not torch.is_autocast_enabled("cpu")
        wide = 8 * self.dilation[0] >= 3 * min(x.shape[2:])  # where they are equally fast, by measurement
        return trained and plain and wide and x.dtype in (torch.float32, torch.float64)


class _SeenOnly(torch.autograd.Function):
    """A dilated 3×3 conv whose gradient of the weights looks at nothing but the map.

    The CPU's kernel multiplies padding too, and takes a hundred megabytes on the way.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        return F.conv2d(x, weight, None, 1, dilation, dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        spread = [ctx.dilation] * 2
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.convolution_backward(
                grad, x, weight, None, [1, 1], spread, spread, False, [0, 0], 1, [True, False, False]
            )[0]
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(grad.transpose(0, 1), x.transpose(0, 1), ctx.dilation)
        return grad_x, grad_weight, None


def _weight_gradient(grad: Tensor, x: Tensor, dilation: int) -> Tensor:
    """Gradient of the weights, tap by tap.

    Args:
        grad: (O, B, h, w) gradient of the output.
        x: (C, B, h, w) input.
        dilation: of the 3×3 kernel.

    Returns:
        (O, C, 3, 3).
    """
    grad, x = grad.contiguous(), x.contiguous()
    taps = x.new_empty(3, 3, len(grad), len(x))  # every tap sees some of the map
    for i, (out_rows, in_rows) in enumerate(_seen(x.shape[2], dilation)):
        for j, (out_columns, in_columns) in enumerate(_seen(x.shape[3], dilation)):
            behind = grad[:, :, out_rows, out_columns].flatten(1)  # (O, n)
            torch.mm(behind, x[:, :, in_rows, in_columns].flatten(1).T, out=taps[i, j])
    return taps.permute(2, 3, 0, 1).contiguous()


def _seen(size: int, dilation: int) -> Iterator[tuple[slice, slice]]:
    """For each of three taps along a side: the outputs that see the map, and the inputs they see; dilation < size."""
    for offset in (-dilation, 0, dilation):
        first, last = max(0, -offset), min(size, size - offset)
        yield slice(first, last), slice(first + offset, last + offset)
