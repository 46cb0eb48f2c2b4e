"""Combination of named loss terms into one loss: the plain sum, or the sum weighted with LSKD's λ, which are balanced by gradients.

taps = balancer.detach_taps(taps)   # what the losses are computed from
...
loss = balancer.combine(terms)      # Σ λ_i ℓ_i
loss.backward()
balancer.after_backward()           # sets ∂L̃/∂λ as the gradient of λ
...
balancer.end_epoch()                # λ rescaled to sum to the number of terms
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from utils.balance.detached_taps import DetachedTaps, TapGradients, mean_gradient, weighted_sum
from utils.runtime import distributed
from utils.types import Taps

#: Factor of the gradient-equilibrium part of L̃ against its two regularisers.
EQUILIBRIUM_FACTOR = 10.0
#: The weight of a tap should be at least this many times that of the tap before it.
DEPTH_RATIO = 1.25


class TermSpec(NamedTuple):
    """A loss term, and how a balancer measures it.

    Attributes:
        name: the term's name in the dictionary of losses.
        tap: the tap whose weight W_i measures the term (`SegmentationModel.watched_weights`).
        group: "A" (deep taps and outputs) or "B" (shallow taps); each group is balanced separately.
        depth: position in the order of taps by depth; None for terms that are not ordered.
    """

    name: str
    tap: str = "pre_logits"
    group: str = "A"
    depth: int | None = None


class Balancer(Protocol):
    """Combines the named terms of an iteration into one loss."""

    #: Whether it differentiates parts of the network, which a compiled network does not allow: it has one backward pass.
    needs_partial_backward: bool

    def detach_taps(self, taps: Taps) -> Taps:
        """The taps from which the losses are computed."""
        ...

    def combine(self, terms: dict[str, Tensor], gradient_scale: Tensor | float = 1.0) -> Tensor:
        """The loss of the terms.

        Args:
            terms: scalars by name.
            gradient_scale: multiplies the losses while their gradients are measured; float16 would lose small ones without it.
        """
        ...

    def after_backward(self) -> None:
        """Set the gradients of the balancer's own parameters."""
        ...

    def end_epoch(self) -> None:
        """Called after every epoch."""
        ...

    def parameters(self) -> list[nn.Parameter]:
        """The balancer's own parameters, for the optimiser."""
        ...

    @property
    def loss_weights(self) -> dict[str, Tensor]:
        """λ by term, 0-d, for the checkpoint; empty where there is no λ."""
        ...

    def inherit(self, weights: Mapping[str, Tensor]) -> None:
        """Start from λ of the previous step."""
        ...

    def log_values(self) -> dict[str, Tensor]:
        """0-d tensors to log, by name."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        ...


class Sum:
    """The loss is the sum of its terms, in every method except LSKD."""

    needs_partial_backward = False

    def detach_taps(self, taps: Taps) -> Taps:
        """The taps themselves."""
        return taps

    def combine(self, terms: dict[str, Tensor], gradient_scale: Tensor | float = 1.0) -> Tensor:
        """Σ_i ℓ_i.

        Args:
            terms: scalars by name.
            gradient_scale: unused, no gradient is measured.

        Returns:
            Scalar.
        """
        return torch.stack([value.reshape(()) for value in terms.values()]).sum()

    def after_backward(self) -> None:
        """Does nothing."""

    def end_epoch(self) -> None:
        """Does nothing."""

    def parameters(self) -> list[nn.Parameter]:
        """No parameters."""
        return []

    @property
    def loss_weights(self) -> dict[str, Tensor]:
        """Empty: there is no λ."""
        return {}

    def inherit(self, weights: Mapping[str, Tensor]) -> None:
        """Does nothing, because there is no λ."""

    def log_values(self) -> dict[str, Tensor]:
        """No values."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """No state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing."""


@dataclass
class _Measured:
    """Measurements of one iteration, averaged over processes: vectors over the terms.

    Attributes:
        losses: ℓ_i.
        mean_gradients: mean(∂ℓ_i/∂W_i).
        gradients: G_i, or None before `GradientEquilibrium.after_backward`.
        ratios: ρ_i, or None before it.
    """

    losses: Tensor
    mean_gradients: Tensor
    gradients: Tensor | None = None
    ratios: Tensor | None = None


class Coefficients(NamedTuple):
    """How λ is balanced.

    Attributes:
        alpha: exponent of ρ.
        beta, gamma: factors in L̃ of the penalty on the order of the taps' weights and of that between cross entropy and distillation.
        interval: iterations from one measurement of the gradients to the next.
    """

    alpha: float
    beta: float
    gamma: float
    interval: int = 1


class GradientEquilibrium:
    """Regularised gradient equilibrium (RGE): λ is trained by a loss of its own, L̃.

    With G_i = λ_i · mean(∂ℓ_i/∂W_i), L_i(0) the value of ℓ_i at the last iteration of epoch 0, and in each group
    ρ_i = (ℓ_i/L_i(0)) / mean over the group, Ḡ = mean of G_i:

        L̃ = 10 Σ_i |G_i − Ḡ ρ_i^α| + γ |λ_ce − (C_new/C_old) λ_kd| + β Σ_k max(0, 1.25 λ_k − λ_{k+1}),

    the last sum over taps of increasing depth. Ḡ and ρ are constants to the gradient, G_i is linear in λ_i, so ∂L̃/∂λ has a closed
    form. λ belongs to the optimiser (weight decay included) and is rescaled to sum to the number of terms after every epoch.

    With an interval N above 1, ℓ_i and mean(∂ℓ_i/∂W_i) are measured at every Nth iteration and used again in the N − 1 that follow,
    which need no partial backward passes; λ is updated in each. L_i(0) is then from the last measurement of epoch 0.

    Args:
        terms: in the order of λ.
        watched: W by tap.
        coefficients: α, β, γ, and the interval.
        class_ratio: C_new / C_old.
        dtype: of λ.

    Reference: LSKD (IEEE TIP 2024), regularised gradient equilibrium. In the release each process uses its own gradients and
    losses, so each has a different λ; here they are averaged over processes first. With one process the results are equal.
    """

    needs_partial_backward = True

    def __init__(
        self,
        terms: Sequence[TermSpec],
        watched: Mapping[str, nn.Parameter],
        coefficients: Coefficients,
        class_ratio: float,
        dtype: torch.dtype = torch.float32,
    ):
        self.terms = tuple(terms)
        self.names = tuple(term.name for term in self.terms)
        self.watched = [watched[term.tap] for term in self.terms]
        self.alpha, self.beta, self.gamma, self.interval = coefficients
        self.class_ratio = class_ratio
        device = self.watched[0].device
        self.weights = nn.Parameter(torch.ones(len(self.terms), dtype=dtype, device=device))
        self.initial_losses = torch.zeros(len(self.terms), dtype=dtype, device=device)
        self.epoch = 0
        self.iteration = 0
        self._group_rows = self._rows_of_groups(device)
        self._depth_pairs = self._pairs_of_depth(device)
        self._measured: _Measured | None = None
        self._detached = DetachedTaps()

    def _rows_of_groups(self, device: torch.device) -> Tensor:
        """(n, n) matrix that replaces each entry of a vector over the terms by the mean over the term's group."""
        groups = [term.group for term in self.terms]
        equal = [[float(a == b) for b in groups] for a in groups]
        same = torch.tensor(equal, dtype=self.weights.dtype, device=device)  # n×n
        return same / same.sum(dim=1, keepdim=True)

    def _pairs_of_depth(self, device: torch.device) -> Tensor:
        """(2, pairs) indices of neighbouring taps, shallower first."""
        chain = sorted((term.depth, row) for row, term in enumerate(self.terms) if term.depth is not None)
        rows = [row for _, row in chain]
        return torch.tensor([rows[:-1], rows[1:]], dtype=torch.int64, device=device).reshape(2, -1)

    @property
    def measures(self) -> bool:
        """Whether this iteration measures the gradients, or takes those of an earlier one."""
        return self._measured is None or self.iteration % self.interval == 0

    def detach_taps(self, taps: Taps) -> Taps:
        """Detached copies of the taps, see `utils.balance.detached_taps`; the taps themselves where nothing is measured."""
        if not self.measures:
            return taps
        self._detached = DetachedTaps(taps)
        assert self._detached.taps is not None
        return self._detached.taps

    def combine(self, terms: dict[str, Tensor], gradient_scale: Tensor | float = 1.0) -> Tensor:
        """Σ λ_i ℓ_i, with λ a constant; also measures mean(∂ℓ_i/∂W_i), which needs the graph of the losses.

        Args:
            terms: scalars by name: all balanced terms, and others, which have the weight 1.
            gradient_scale: see `Balancer.combine`.

        Returns:
            Scalar.
        """
        missing = sorted(set(self.names) - set(terms))
        assert not missing, f"balanced terms {missing} are missing"
        ordered = [terms[name].reshape(()) for name in self.names]
        ordered += [value.reshape(()) for name, value in terms.items() if name not in self.names]
        if not self.measures:
            others = sum(ordered[len(self.terms) :])
            return (self.weights.detach() * torch.stack(ordered[: len(self.terms)])).sum() + others
        balanced = torch.stack(ordered[: len(self.terms)]).detach()  # n
        # Each loss is differentiated by itself: a backward pass from an element of a stack would run through the graphs of all
        gradients = [self._detached.gradients(loss * gradient_scale) for loss in ordered]
        if any(gradients):
            self._measure(balanced, gradients, gradient_scale)
        self._detached = DetachedTaps()  # releases the taps: the logits at full size are no longer needed
        weights = self.weights.detach().to(balanced.dtype)
        value = (weights * balanced).sum() + sum(loss.detach() for loss in ordered[len(self.terms) :])
        weights = torch.cat([weights, weights.new_ones(len(ordered) - len(self.terms))])  # one weight a term
        return weighted_sum(value, gradients, weights / gradient_scale)

    def _measure(self, losses: Tensor, gradients: Sequence[TapGradients], gradient_scale: Tensor | float) -> None:
        means = [mean_gradient(found, weight) for found, weight in zip(gradients, self.watched)]
        packed = torch.stack([losses, torch.stack(means) / gradient_scale]).to(self.weights.dtype)  # 2×n
        losses_now, mean_gradients = distributed.mean_(packed).unbind()
        self._measured = _Measured(losses_now, mean_gradients)

    def after_backward(self) -> None:
        """Set the gradient of λ to ∂L̃/∂λ."""
        measured = self._measured
        if measured is None:
            return
        weights = self.weights.detach()
        if self.epoch == 0:
            self.initial_losses = measured.losses.clone()
        gradients = weights * measured.mean_gradients
        ratios = self._ratios(measured.losses)
        target = (self._group_rows @ gradients) * ratios**self.alpha
        self._measured = replace(measured, gradients=gradients, ratios=ratios)
        slope = EQUILIBRIUM_FACTOR * torch.sign(gradients - target) * measured.mean_gradients
        # In float16 the gradient of one term may overflow although that of the sum does not
        slope = torch.where(measured.mean_gradients.isfinite().all(), slope, 0.0)
        self.weights.grad = slope + self._regulariser_gradient(weights)
        self.iteration += 1

    def _ratios(self, losses: Tensor) -> Tensor:
        """ρ_i = (ℓ_i/L_i(0)) / mean of that over the group.

        To avoid 0/0 and roots of negative numbers: ℓ_i/L_i(0) is 1 for a term that was 0 from the start, ρ is 1 in a group whose
        losses are all 0, and a negative loss (released --pseudo_soft) counts as 0.
        """
        progress = losses / self.initial_losses
        progress = torch.where(progress.isfinite(), progress, 1.0).clamp(min=0)
        average = self._group_rows @ progress
        return torch.where(average > 0, progress / average, 1.0)

    def _regulariser_gradient(self, weights: Tensor) -> Tensor:
        gradient = torch.zeros_like(weights)
        if "ce" in self.names and "kd" in self.names:
            ce, kd = self.names.index("ce"), self.names.index("kd")
            sign = torch.sign(weights[ce] - self.class_ratio * weights[kd])
            gradient[ce] += self.gamma * sign
            gradient[kd] -= self.gamma * self.class_ratio * sign
        shallow, deep = self._depth_pairs
        violated = self.beta * (DEPTH_RATIO * weights[shallow] - weights[deep] > 0).to(weights.dtype)
        gradient.index_add_(0, shallow, DEPTH_RATIO * violated)
        gradient.index_add_(0, deep, -violated)
        return gradient

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Rescale λ to sum to the number of terms, and fix L_i(0) after epoch 0."""
        self._rescale()
        self.epoch += 1

    def parameters(self) -> list[nn.Parameter]:
        """λ, for the optimiser."""
        return [self.weights]

    @property
    def loss_weights(self) -> dict[str, Tensor]:
        """λ by term, in their order."""
        return dict(zip(self.names, self.weights.detach().clone()))

    @torch.no_grad()
    def inherit(self, weights: Mapping[str, Tensor]) -> None:
        """Start from λ of the previous step.

        Args:
            weights: λ by term. Terms that it does not name start at 1, and λ is then rescaled to sum to the number of terms.
        """
        known = [name for name in self.names if name in weights]
        for name in known:
            self.weights[self.names.index(name)] = weights[name]
        if 0 < len(known) < len(self.names):
            self._rescale()

    def _rescale(self) -> None:
        self.weights.mul_(len(self.terms) / self.weights.sum())

    def log_values(self) -> dict[str, Tensor]:
        """λ_i, G_i, ℓ_i and ρ_i of the last iteration by name, as 0-d tensors."""
        values = {f"lambda/{name}": weight for name, weight in zip(self.names, self.weights.detach().clone())}
        measured = self._measured
        if measured is not None and measured.gradients is not None and measured.ratios is not None:
            vectors = {"gradient": measured.gradients, "loss": measured.losses, "rho": measured.ratios}
            for kind, vector in vectors.items():
                values |= {f"{kind}/{name}": value for name, value in zip(self.names, vector)}
        return values

    def state_dict(self) -> dict:
        """λ, L_i(0), the names of the terms, the position, and the last measurements, which are logged at the end of the epoch."""
        measured = self._measured if self._measured is not None and self._measured.ratios is not None else None
        return {
            "names": list(self.names),
            "weights": self.weights.detach().cpu().clone(),
            "initial_losses": self.initial_losses.cpu().clone(),
            "epoch": self.epoch,
            "iteration": self.iteration,
            "measured": {name: value.cpu().clone() for name, value in vars(measured).items()} if measured else None,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Continue where `state_dict` was taken."""
        assert tuple(state["names"]) == self.names, "the balanced terms changed between checkpoint and run"
        self.weights.copy_(state["weights"])
        self.initial_losses = state["initial_losses"].to(self.initial_losses)
        self.epoch, self.iteration = state["epoch"], state["iteration"]
        self._measured = None
        if state["measured"] is not None:
            vectors = {name: value.to(self.initial_losses) for name, value in state["measured"].items()}
            self._measured = _Measured(**vectors)
