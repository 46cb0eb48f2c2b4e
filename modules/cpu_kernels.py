"""Faster CPU versions of functions of torch. The modules that use them (atrous.py, upsample.py) contain torch's call too.

Values and gradients equal those of torch up to rounding. A GPU uses torch's call.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def atrous_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """`F.conv2d(x, weight, bias, 1, dilation, dilation)` that skips the taps of the kernel that read padding alone.

    On a map no larger than the dilation only the centre row (column) of the kernel reads the map: at 256 px and stride 16 the conv of
    the head with the largest dilation takes a ninth of the multiplications. Where the dilation is a large part of the map, the gradient
    of the weights is computed for each tap on the part of the map that the tap reads (`_SeenOnly`).

    Args:
        x: (B, C, h, w).
        weight: (O, C, 3, 3).
        bias: (O,) or None.
        dilation: of the kernel; the padding is equal to it.

    Returns:
        (B, O, h, w).
    """
    whole = [size > dilation for size in x.shape[2:]]
    if all(whole):
        if _mostly_padding(x, weight, bias, dilation):
            return _SeenOnly.apply(x, weight, dilation)
        return F.conv2d(x, weight, bias, 1, dilation, dilation)
    rows, columns = (slice(None) if w else slice(1, 2) for w in whole)
    padding = [dilation if w else 0 for w in whole]
    return F.conv2d(x, weight[:, :, rows, columns], bias, 1, padding, dilation)


def _mostly_padding(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> bool:
    """Whether `_SeenOnly` is faster than torch's gradient of the weights; it is not used in half precision."""
    trained = torch.is_grad_enabled() and weight.requires_grad and bias is None
    plain = x.dtype == weight.dtype and not torch.is_autocast_enabled("cpu")
    wide = 8 * dilation >= 3 * min(x.shape[2:])  # from this ratio on it was measured to be faster
    return trained and plain and wide and x.dtype in (torch.float32, torch.float64)


class _SeenOnly(torch.autograd.Function):
    """A dilated 3×3 conv whose gradient of the weights leaves padding out.

    torch's gradient also multiplies the padding, and allocates a hundred megabytes temporarily.
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
    taps = x.new_empty(3, 3, len(grad), len(x))  # every tap reads a part of the map
    for i, (out_rows, in_rows) in enumerate(_seen(x.shape[2], dilation)):
        for j, (out_columns, in_columns) in enumerate(_seen(x.shape[3], dilation)):
            behind = grad[:, :, out_rows, out_columns].flatten(1)  # (O, n)
            torch.mm(behind, x[:, :, in_rows, in_columns].flatten(1).T, out=taps[i, j])
    return taps.permute(2, 3, 0, 1).contiguous()


def _seen(size: int, dilation: int) -> Iterator[tuple[slice, slice]]:
    """For each of the three taps along a side: the outputs for which it reads the map, and the inputs it reads; dilation < size."""
    for offset in (-dilation, 0, dilation):
        first, last = max(0, -offset), min(size, size - offset)
        yield slice(first, last), slice(first + offset, last + offset)


def upsample(logits: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """`F.interpolate(logits, size=size, mode="bilinear", align_corners=False)` by two matrix products.

    The interpolation is linear in rows and in columns. It takes a third of the time of torch's forward pass and a tenth of its backward
    pass.

    Args:
        logits: (B, C, h, w), float32 or float64; half precision would be rounded between the two products.
        size: H, W.

    Returns:
        (B, C, H, W).
    """
    (height, width), (rows, columns) = logits.shape[2:], size
    with torch.autocast("cpu", enabled=False):
        wide = logits.contiguous() @ upsampling_matrix(width, columns, logits.dtype)  # (B, C, h, W)
        return upsampling_matrix(height, rows, logits.dtype).T @ wide


@lru_cache(maxsize=64)
def upsampling_matrix(small: int, large: int, dtype: torch.dtype) -> Tensor:
    """(small, large) matrix of linear upsampling: row i is the upsampled i-th unit vector."""
    return F.interpolate(torch.eye(small, dtype=dtype)[None], size=large, mode="linear", align_corners=False)[0]
