"""The boundary between losses and network: gradients at the taps are taken once, and used twice.

RGE measures mean(∂ℓ_i/∂W_i) of every term, and the optimiser wants the gradient of Σ λ_i ℓ_i. Both lead from the losses back to the
taps first. So the losses look at leaves with the values of the taps; each loss is differentiated with respect to them once, its graph
is not needed again, and what enters the network are the taps' gradients:

    boundary = DetachedTaps(taps)
    slopes = [boundary.slopes(loss) for loss in losses_of(boundary.taps)]       # ∂ℓ_i/∂taps
    mean_gradient(slopes[0], W)                                                 # from the taps back to W, and no further
    weighted_sum(value, slopes, weights).backward()                             # once through the network, for all
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from utils.types import Taps

#: Gradients of one loss, by the tensor they belong to: taps of the network, and parameters that the loss reads itself.
TapGradients = dict[Tensor, Tensor]


class DetachedTaps:
    """Leaves in the place of a forward pass's taps.

    Args:
        taps: of the student; None leaves the losses connected with the network, each is then differentiated all the way.

    Attributes:
        taps: what the losses are to look at; a tap without gradient stays what it is.
    """

    def __init__(self, taps: Taps | None = None) -> None:
        self._origin: dict[Tensor, Tensor] = {}
        self.taps = None
        if taps is not None:
            leaves = {tap: self._leaf(tap) for tap in {*taps[:-1], *taps.attentions}}  # logits may be logits_small
            self.taps = Taps(*(leaves[tap] for tap in taps[:-1]), tuple(leaves[tap] for tap in taps.attentions))

    def _leaf(self, tap: Tensor) -> Tensor:
        if not tap.requires_grad:
            return tap
        leaf = tap.detach().requires_grad_()
        self._origin[leaf] = tap
        return leaf

    def slopes(self, loss: Tensor) -> TapGradients:
        """Gradients of a loss with respect to the taps and to the parameters that it reads.

        Args:
            loss: scalar.

        Returns:
            Empty for a constant loss.
        """
        leaves = _leaves(loss)
        if not leaves:
            return {}
        gradients = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        return {self._origin.get(leaf, leaf): slope for leaf, slope in zip(leaves, gradients) if slope is not None}


def _leaves(loss: Tensor) -> list[Tensor]:
    """The leaves that the graph of a loss leads to."""
    nodes, seen, found = [loss.grad_fn], {loss.grad_fn}, []
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):
            found.append(node.variable)
        fresh = [following for following, _ in node.next_functions if following not in seen]
        seen.update(fresh)
        nodes += fresh
    return found


def mean_gradient(slopes: TapGradients, watched: nn.Parameter) -> Tensor:
    """mean(∂ℓ/∂W): from the taps back to W; the pass computes no other parameter's gradient.

    Args:
        slopes: of ℓ.
        watched: W.

    Returns:
        Scalar; 0 where ℓ does not depend on W, or W takes no gradient (--freeze, --fix_bn).
    """
    gradient = slopes.get(watched)
    taps = [tensor for tensor in slopes if not tensor.is_leaf]
    if watched.requires_grad and taps:
        (through,) = torch.autograd.grad(
            taps, watched, [slopes[tap] for tap in taps], retain_graph=True, allow_unused=True
        )
        gradient = through if gradient is None or through is None else gradient + through
    if gradient is None:
        return torch.zeros((), device=watched.device, dtype=watched.dtype)
    return gradient.mean()


class _WeightedSum(torch.autograd.Function):
    """A number, and the gradients that are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, slopes: Sequence[TapGradients], weights: Tensor, *tensors: Tensor) -> Tensor:
        ctx.slopes, ctx.weights, ctx.tensors = slopes, weights, tensors
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        total: dict[Tensor, Tensor] = {}
        for slopes, weight in zip(ctx.slopes, (grad * ctx.weights).unbind()):
            while slopes:  # taken out one by one: they are as large as the taps, and this is where memory is scarce
                tensor, slope = slopes.popitem()
                part = weight * slope
                total[tensor] = total[tensor].add_(part) if tensor in total else part
        tensors, ctx.tensors = ctx.tensors, ()
        return None, None, None, *(total[tensor] for tensor in tensors)


def weighted_sum(value: Tensor, slopes: Sequence[TapGradients], weights: Tensor) -> Tensor:
    """Σ w_i ℓ_i, whose backward pass starts at the taps; it can run once, and uses the slopes up.

    Args:
        value: scalar, the sum itself.
        slopes: of every ℓ_i.
        weights: (n,) w_i.

    Returns:
        Scalar.
    """
    tensors = {tensor: None for one in slopes for tensor in one}  # a dict keeps their order
    return _WeightedSum.apply(value, slopes, weights, *tensors)
