"""Taps detached from the network, so that the gradient of each loss with respect to the taps is computed once and used twice.

RGE measures mean(∂ℓ_i/∂W_i) of every term, and the optimiser needs the gradient of Σ λ_i ℓ_i. Both backward passes begin with the
gradients at the taps. So the losses are computed from detached copies of the taps. Each loss is differentiated with respect to these
copies once, and the backward passes through the network start from the resulting gradients:

    detached = DetachedTaps(taps)
    gradients = [detached.gradients(loss) for loss in losses_of(detached.taps)]   # ∂ℓ_i/∂taps
    mean_gradient(gradients[0], W)                                                # backward from the taps to W
    weighted_sum(value, gradients, weights).backward()                            # one pass through the network for all losses
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
    """Copies of the taps of a forward pass that are leaves of the graph.

    Args:
        taps: of the student; with None the losses stay connected to the network and are differentiated down to its parameters.

    Attributes:
        taps: what the losses are computed from; a tap that needs no gradient is not detached.
    """

    def __init__(self, taps: Taps | None = None) -> None:
        self._origin: dict[Tensor, Tensor] = {}
        self.taps: Taps | None = None
        if taps is not None:
            # logits may be the same tensor as logits_small, and the last attention the same as body: a tensor has one leaf
            leaves = {tap: self._leaf(tap) for tap in {taps.logits, taps.body, *taps.features}}
            self.taps = taps._replace(
                logits=leaves[taps.logits],
                logits_small=leaves[taps.logits_small],
                body=leaves[taps.body],
                pre_logits=leaves[taps.pre_logits],
                attentions=tuple(leaves[tap] for tap in taps.attentions),
            )

    def _leaf(self, tap: Tensor) -> Tensor:
        if not tap.requires_grad:
            return tap
        leaf = tap.detach().requires_grad_()
        self._origin[leaf] = tap
        return leaf

    def gradients(self, loss: Tensor) -> TapGradients:
        """Gradients of a loss with respect to the taps and to the parameters that it reads.

        Args:
            loss: scalar.

        Returns:
            Empty for a constant loss.
        """
        leaves = _leaves(loss)
        if not leaves:
            return {}
        found = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        return {self._origin.get(leaf, leaf): value for leaf, value in zip(leaves, found) if value is not None}


def _leaves(loss: Tensor) -> list[Tensor]:
    """The leaves of the graph of a loss."""
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


def mean_gradient(gradients: TapGradients, watched: nn.Parameter) -> Tensor:
    """mean(∂ℓ/∂W), by a backward pass from the taps that computes no gradient of another parameter.

    Args:
        gradients: of ℓ.
        watched: W.

    Returns:
        Scalar; 0 where ℓ does not depend on W, or W takes no gradient (--freeze, --fix_bn).
    """
    gradient = gradients.get(watched)
    taps = [tensor for tensor in gradients if not tensor.is_leaf]
    if watched.requires_grad and taps:
        (through,) = torch.autograd.grad(
            taps, watched, [gradients[tap] for tap in taps], retain_graph=True, allow_unused=True
        )
        gradient = through if gradient is None or through is None else gradient + through
    if gradient is None:
        return torch.zeros((), device=watched.device, dtype=watched.dtype)
    return gradient.mean()


class _WeightedSum(torch.autograd.Function):
    """A scalar whose gradients with respect to other tensors are given."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, gradients: Sequence[TapGradients], weights: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.gradients, ctx.weights, ctx.tensors = gradients, weights, tensors
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        total: dict[Tensor, Tensor] = {}
        for gradients, weight in zip(ctx.gradients, (grad * ctx.weights).unbind()):
            while gradients:  # released one by one: they are as large as the taps, and memory use is highest here
                tensor, gradient = gradients.popitem()
                part = weight * gradient
                total[tensor] = total[tensor].add_(part) if tensor in total else part
        tensors, ctx.tensors = ctx.tensors, ()
        return None, None, None, *(total[tensor] for tensor in tensors)


def weighted_sum(value: Tensor, gradients: Sequence[TapGradients], weights: Tensor) -> Tensor:
    """Σ w_i ℓ_i, whose backward pass starts at the taps. The backward pass can run once, and releases the gradients.

    Args:
        value: scalar, the sum itself.
        gradients: of every ℓ_i.
        weights: (n,) w_i.

    Returns:
        Scalar.
    """
    tensors = {tensor: None for one in gradients for tensor in one}  # a dict keeps their order
    return _WeightedSum.apply(value, gradients, weights, *tensors)
