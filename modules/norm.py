"""Batch norms fused with their activation: plain, in-place, and in-place with statistics over all processes.

The in-place norms keep only their output for the backward pass and recover the normalised input from it, which halves
the activation memory of norm + activation. They are computed by torch. If the `inplace_abn` package is installed and
supports the tensors (CUDA, float32 or float16), the same classes call its kernels. No other module imports it.

Reference: Rota Bulò et al., "In-Place Activated BatchNorm for Memory-Optimized Training of DNNs", CVPR 2018,
variant II: the gradient of the input is a function of the output alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from utils.errors import UserError
from utils.runtime import distributed

try:
    import inplace_abn
except (ImportError, OSError, RuntimeError):  # absent, or built against another torch or CUDA
    inplace_abn = None

_aten = torch.ops.aten

#: Negative slope of the leaky ReLU after every norm; official checkpoints were trained with it.
SLOPE = 0.01


class _Settings(NamedTuple):
    """The arguments of the in-place function that have no gradient."""

    running_mean: Tensor
    running_var: Tensor
    training: bool
    momentum: float
    eps: float
    slope: float  # 1 is the identity
    shared: bool  # statistics over all processes


def _one_value(x: Tensor) -> bool:
    """Whether every channel has a single value, from which no variance can be estimated."""
    return x.numel() == x.shape[1]


def _like(x: Tensor, reference: Tensor) -> Tensor:
    """The tensor in the memory format of the reference: the fused kernels are fast only where the two agree."""
    if reference.is_contiguous() or not reference.is_contiguous(memory_format=torch.channels_last):
        return x.contiguous()
    return x.contiguous(memory_format=torch.channels_last)


def _normalise(x: Tensor, scale: Tensor, bias: Tensor, s: _Settings) -> tuple[Tensor, Tensor]:
    """Statistics of this process: the affine output and 1/std (C,); the running statistics are updated."""
    if not s.training:
        out = F.batch_norm(x, s.running_mean, s.running_var, scale, bias, False, 0.0, s.eps)
        return out, torch.rsqrt(s.running_var + s.eps)
    if _one_value(x):
        # The unbiased variance of one value is 0/0, so the running variance is not updated.
        out, mean, inv_std = torch.native_batch_norm(x, scale, bias, None, None, True, s.momentum, s.eps)
        s.running_mean.lerp_(mean.to(s.running_mean.dtype), s.momentum)
        return out, inv_std
    out, _, inv_std = torch.native_batch_norm(x, scale, bias, s.running_mean, s.running_var, True, s.momentum, s.eps)
    return out, inv_std


def _normalise_shared(x: Tensor, scale: Tensor, bias: Tensor, s: _Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of all processes: the affine output, 1/std (C,) and the number of values per channel (a tensor).

    Every process sends its count, means and sums of squared deviations. They are combined by the pairwise formula of Chan
    et al. (1979), which subtracts no large squares and is therefore accurate for means far from zero.
    """
    channels = x.shape[1]
    kind = s.running_var.dtype
    # Copies of the running statistics, which the call overwrites; without them float16 inputs would give float16 statistics.
    mean, var = _aten.batch_norm_update_stats(x, s.running_mean.clone(), s.running_var.clone(), s.momentum)
    count = torch.full((1,), x.numel() // channels, dtype=torch.float64, device=x.device)
    local = torch.cat([count, mean.double(), var.double() * count])  # (1 + 2C,)
    everyone = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, local)
    counts, means, deviations = torch.stack(everyone).split([1, channels, channels], dim=1)  # (P, 1), (P, C), (P, C)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    deviation = (deviations + counts * (means - mean).square()).sum(0)
    var = deviation / total
    unbiased = torch.where(total > 1, deviation / (total - 1).clamp(min=1), s.running_var.double())
    s.running_mean.lerp_(mean.to(kind), s.momentum)
    s.running_var.lerp_(unbiased.to(kind), s.momentum)
    out = F.batch_norm(x, mean.to(kind), var.to(kind), scale, bias, False, 0.0, s.eps)
    return out, torch.rsqrt(var + s.eps).to(kind), total.to(kind)


def _input_gradient(grad: Tensor, y: Tensor, sums: tuple[Tensor, ...], factors: tuple[Tensor, ...]) -> Tensor:
    """Gradient of the input where the fused kernel does not apply: sums over all processes, or fixed statistics.

    Args:
        grad: (B, C, H, W) gradient of the affine output y.
        y: (B, C, H, W) affine output.
        sums: Σ grad·x̂ and Σ grad, each (C,), divided by the number of values per channel; empty for fixed statistics.
        factors: scale, bias and 1/std, each (C,).
    """
    scale, bias, inv_std = factors
    per_channel = (1, -1, 1, 1)
    gain = (scale * inv_std).view(per_channel)
    if not sums:
        return (grad * gain).to(grad.dtype)
    mean_grad_normal, mean_grad = sums
    slope = inv_std * mean_grad_normal
    offset = slope * bias - scale * inv_std * mean_grad
    result = torch.addcmul(offset.view(per_channel), y, slope.view(per_channel), value=-1)
    return result.addcmul_(grad, gain).to(grad.dtype)


class _InPlaceABN(torch.autograd.Function):
    """z = activation((x - mean)/std · (|weight| + eps) + bias); the backward pass uses z alone.

    With y = activation⁻¹(z), the normalised input is (y - bias)/(|weight| + eps). The fused backward kernel of batch norm computes the
    same from an "input" y with "mean" bias and "1/std" 1/(|weight| + eps), so that kernel is called.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, s: _Settings) -> Tensor:
        scale = weight.abs().add_(s.eps)
        total = None
        if s.shared:
            out, inv_std, total = _normalise_shared(x, scale, bias, s)
        else:
            out, inv_std = _normalise(x, scale, bias, s)
        if s.slope != 1.0:
            F.leaky_relu_(out, s.slope)
        ctx.save_for_backward(out, weight, bias, inv_std, total)
        ctx.eps, ctx.slope, ctx.training = s.eps, s.slope, s.training
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, weight, bias, inv_std, total = ctx.saved_tensors
        need_input, need_weight, need_bias, _ = ctx.needs_input_grad
        fused = ctx.training and total is None
        scale = weight.abs().add_(ctx.eps).to(inv_std.dtype)
        bias = bias.to(inv_std.dtype)
        grad, y = _like(grad, out), out
        if ctx.slope != 1.0:
            grad = _aten.leaky_relu_backward(grad, out, ctx.slope, True)
            y = F.leaky_relu(out, 1 / ctx.slope)
        # The kernel multiplies by its weight and its 1/std = 1/scale, and d input = scale·inv_std·(...).
        mask = [need_input and fused, need_weight or total is not None, need_bias or total is not None]
        grad_input, grad_weight, grad_bias = _aten.native_batch_norm_backward(
            grad, y, scale.square() * inv_std, None, None, bias, scale.reciprocal(), True, ctx.eps, mask
        )
        if need_input and not fused:
            sums: tuple[Tensor, ...] = ()
            if total is not None:
                sums = tuple(distributed.sum_(torch.stack([grad_weight, grad_bias])) / total)  # 2 × (C,)
            grad_input = _input_gradient(grad, y, sums, (scale, bias, inv_std))
        if need_weight:
            grad_weight = torch.where(weight < 0, -grad_weight, grad_weight).to(weight.dtype)
        return grad_input, grad_weight, grad_bias.to(weight.dtype) if need_bias else None, None


class ABN(nn.BatchNorm2d):
    """Batch norm followed by its activation, as two operations of torch.

    Parameters and buffers are those of `nn.BatchNorm2d`, which are also the official names. One value per channel (a
    pooled batch of one) is normalised to zero in training, instead of an exception.

    Args:
        num_features: number of channels C.
        activation: "leaky_relu" or "identity"; may be changed later through the attribute.
    """

    slope = SLOPE
    # `nn.BatchNorm2d` allows None for each of them
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, num_features: int, activation: str = "leaky_relu") -> None:
        super().__init__(num_features, eps=1e-5, momentum=0.1)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and activate a (B, C, H, W) map of any floating type; the type of the result is that of x."""
        if self.training:
            self.num_batches_tracked.add_(1)
        y = self._batch_norm(x)
        return F.leaky_relu_(y, self.slope) if self.activation == "leaky_relu" else y

    def _batch_norm(self, x: Tensor) -> Tensor:
        if self.training and _one_value(x):
            self.running_mean.lerp_(x.detach().flatten().to(self.running_mean.dtype), self.momentum)
            return torch.batch_norm(
                x, self.weight, self.bias, None, None, True, self.momentum, self.eps, torch.backends.cudnn.enabled
            )
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )

    def scale(self) -> Tensor:
        """(C,) factor of the normalised input."""
        return self.weight

    def extra_repr(self) -> str:
        return f"{self.num_features}, activation={self.activation}"


class StdNorm(ABN):
    """The official choice "std": the arithmetic of `ABN`, never replaced by an in-place kernel."""


class InPlaceABN(ABN):
    """Batch norm and activation that keep only their output for the backward pass; the scale is |weight| + eps.

    Slope and eps are rounded to float32, in which the official kernels take them whatever the type of the tensors; in
    float64 the difference would show.
    """

    slope = float(np.float32(SLOPE))
    shared = False

    def __init__(self, num_features: int, activation: str = "leaky_relu") -> None:
        super().__init__(num_features, activation)
        self.eps = float(np.float32(self.eps))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and activate a (B, C, H, W) map of any floating type; the type of the result is that of x."""
        if self.training:
            self.num_batches_tracked.add_(1)
        shared = self.shared and self.training and distributed.active()
        slope = self.slope if self.activation == "leaky_relu" else 1.0
        if _package_takes(x, self.training):
            return self._package(x, shared)
        settings = _Settings(self.running_mean, self.running_var, self.training, self.momentum, self.eps, slope, shared)
        return _InPlaceABN.apply(x, self.weight, self.bias, settings)

    def _package(self, x: Tensor, shared: bool) -> Tensor:
        # The group is named at every call: the package's default is read at import, before any group exists.
        function = partial(inplace_abn.inplace_abn_sync, group=dist.group.WORLD) if shared else inplace_abn.inplace_abn
        return function(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
            activation=self.activation,
            activation_param=self.slope,
        )

    def scale(self) -> Tensor:
        """(C,) factor of the normalised input."""
        return self.weight.abs() + self.eps


class InPlaceABNSync(InPlaceABN):
    """`InPlaceABN` with the statistics of all processes of the default group; equal to `InPlaceABN` with one process.

    The gradients of weight and bias stay sums over this process's values: DistributedDataParallel averages them.
    """

    shared = True


def _package_takes(x: Tensor, training: bool) -> bool:
    """Whether the `inplace_abn` kernels can do this call: CUDA, float32 or float16, at least two values a channel."""
    if inplace_abn is None or not x.is_cuda or x.dtype not in (torch.float32, torch.float16):
        return False
    overwritable = not (x.is_leaf and x.requires_grad)  # the package writes its result into x
    return overwritable and x.is_contiguous() and not (training and _one_value(x))


#: The official `--norm_act` choices.
NORMS: dict[str, type[ABN]] = {
    "iabn_sync": InPlaceABNSync,
    "iabn": InPlaceABN,
    "abn": ABN,
    "std": StdNorm,
    "iabn_sync_test": InPlaceABNSync,
}


def make_norm(name: str) -> Callable[..., ABN]:
    """Look up a norm.

    Args:
        name: a key of `NORMS`.

    Returns:
        A callable (num_features, activation="leaky_relu") -> module.

    Raises:
        UserError: no norm has that name.
    """
    if name not in NORMS:
        raise UserError(f"--norm_act {name}: unknown norm; choose one of {', '.join(NORMS)}")
    return NORMS[name]
