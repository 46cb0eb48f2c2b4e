"""Importance of weights for earlier steps, and the penalty on changing important weights.

    penalty = Σ_p importance_p · (p − p_old)²,   importance min-max normalised per parameter tensor

EWC measures importance by the Fisher information, path integral (PI) by the decrease of the loss that the changes of each parameter
caused, RW by both. methods/ewc.py, pi.py and rw.py define the methods. The state has the official parameter names and is passed from step
to step. Parameters of new classifiers start with importance 0; the importance of parameters that a step does not train is kept.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from methods.base import Previous
from utils.checkpointing import checkpoint_files
from utils.errors import UserError

#: Added to the range of an importance in its normalisation, as in the release; a constant importance would be divided by 0.
RANGE_DAMPING = 1e-8
#: ξ, added to the denominator of the path integral, which is 0 where a parameter did not change.
PATH_DAMPING = 1e-3
#: The same for RW, whose denominator is a KL divergence.
SCORE_DAMPING = 1e-8


def normalised(importance: Tensor) -> Tensor:
    """Importance scaled linearly to [0, 1]; a constant tensor becomes 0."""
    low, high = importance.min(), importance.max()
    return (importance - low) / (high - low + RANGE_DAMPING)


class Regularizer:
    """The penalty from the importance that earlier steps measured, and the measurement of this step.

    Args:
        model: the student, not wrapped.
        previous: the importance that step t−1 stored, by kind and official parameter name, and p_old, its weights.
        opts: reg_importance, reg_alpha, reg_iterations, reg_no_normalize.

    Raises:
        UserError: the importance cannot be that of these weights.
    """

    #: Kinds of importance that it measures, in the order in which the penalty adds them.
    kinds: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: nn.Module, previous: Previous, opts: Namespace):
        self.opts = opts
        self.old = _read_importance(previous, self.kinds)
        measured = list(self.old)
        #: Kinds of importance that step t-1 should have left and did not.
        self.absent = [kind for kind in self.kinds if previous.weights and kind not in measured]
        self.anchor: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            importances = [self.old[kind][name] for kind in measured if name in self.old[kind]]
            if parameter.requires_grad and importances:
                shaped = [
                    value.to(parameter) if opts.reg_no_normalize else normalised(value.to(parameter))
                    for value in importances
                ]
                self.weights[name] = torch.stack(shaped).sum(dim=0)
                self.anchor[name] = previous.weights[name].to(parameter)
        self.current = {kind: self._start(model, kind) for kind in self.kinds}

    def _start(self, model: nn.Module, kind: str) -> dict[str, Tensor]:
        """Initial values of this step's measurement."""
        return {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def penalty(self, model: nn.Module) -> Tensor:
        """The penalty on the current parameters.

        Returns:
            Scalar, `--reg_importance` included.
        """
        total = next(model.parameters()).new_zeros(())
        for name, parameter in model.named_parameters():
            if name in self.weights:
                moved = parameter - self.anchor[name]
                total += (self.opts.reg_importance * self.weights[name] * moved * moved).sum()
        return total

    @torch.no_grad()
    def add_gradient(self, model: nn.Module) -> None:
        """Add the penalty's gradient to the parameters'.

        The gradient is computed in closed form, without a graph and without a second reduction by the distributed wrapper. All
        processes have equal parameters and importances, so the gradient is equal on all of them.
        """
        for name, parameter in model.named_parameters():
            if name in self.weights and parameter.grad is not None:
                weighted = self.opts.reg_importance * self.weights[name] * (parameter - self.anchor[name])
                parameter.grad.add_(weighted, alpha=2.0)

    @property
    def largest_weight(self) -> float:
        """The largest importance of a parameter, 0 where there is none."""
        return max((float(weight.max()) for weight in self.weights.values()), default=0.0)

    def update(self, model: nn.Module, accepted: Tensor | None = None) -> None:
        """Measure from the gradients of the loss, before those of the penalty are added.

        Args:
            model: the student, not wrapped.
            accepted: as in `methods.part_types.GatedHooks`; where it is false, nothing is measured.
        """

    def after_step(self, model: nn.Module, accepted: Tensor | None = None) -> None:
        """Measure from the parameters after the step of the optimiser. The arguments are those of `update`."""

    def finish(self, model: nn.Module) -> None:
        """Compute the importance that the next step reads from the measurement of this step."""

    def state_dict(self) -> dict[str, Any]:
        """Importances by official parameter name."""
        known = {kind: self.old.get(kind, {}) | _on_cpu(values) for kind, values in self.current.items()}
        return {kind: checkpoint_files.with_prefix(values) for kind, values in known.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the measurement of an interrupted step."""
        for kind, values in self.current.items():
            _restore(values, checkpoint_files.without_prefix(state[kind]))


def _read_importance(previous: Previous, kinds: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    """Importance by kind and parameter name, of the kinds that step t-1 measured.

    The file is checked: importance of another shape than its weight, or with NaN, would end or spoil the training.
    """
    state = previous.state
    if not isinstance(state, dict):
        raise _misfit(previous, f"it is a {type(state).__name__}, not a dictionary")
    found = {}
    for kind in kinds:
        importance = state.get(kind)
        if importance is None:
            continue
        if not isinstance(importance, dict) or not all(isinstance(name, str) for name in importance):
            raise _misfit(previous, f"{kind} is no dictionary of parameter names")
        found[kind] = checkpoint_files.without_prefix(importance)
        found[kind].pop(checkpoint_files.LOSS_WEIGHTS, None)  # official files have it among the weights
        for name, value in found[kind].items():
            weight = previous.weights.get(name)
            if weight is None or not isinstance(value, Tensor) or value.shape != weight.shape:
                raise _misfit(previous, f"the {kind} of {name} has not the shape of its weight")
            if not (value.is_floating_point() and bool(value.isfinite().all())):
                raise _misfit(previous, f"the {kind} of {name} is not of finite numbers")
    return found


def _misfit(previous: Previous, what: str) -> UserError:
    return UserError(
        f"--regularizer: {previous.file} has no usable importance ({what}); train that step again with "
        "--regularizer, or go on without"
    )


def _on_cpu(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in values.items()}


def _restore(values: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    for name, value in values.items():
        value.copy_(saved[name])


def _carried(start: dict[str, Tensor], old: dict[str, Tensor]) -> dict[str, Tensor]:
    """The old importance of known parameters, zeros for new ones."""
    return {name: old[name].to(value).clone() if name in old else value for name, value in start.items()}


class FisherRegularizer(Regularizer):
    """EWC with a moving average of the squared gradients: F ← α g² + (1 − α) F, continued over all steps.

    Reference: Kirkpatrick et al., PNAS 2017; online form as in Chaudhry et al. (RWalk), ECCV 2018, eq. 5, and in MiB's release.
    """

    kinds: ClassVar[tuple[str, ...]] = ("fisher",)

    def _start(self, model: nn.Module, kind: str) -> dict[str, Tensor]:
        return _carried(super()._start(model, kind), self.old.get(kind, {}))

    @torch.no_grad()
    def update(self, model: nn.Module, accepted: Tensor | None = None) -> None:
        """Update the moving average; gradients that overflowed in half precision are skipped."""
        fisher = self.current["fisher"]
        for name, parameter in model.named_parameters():
            if name in fisher and parameter.grad is not None:
                square = parameter.grad.square()
                usable = square.isfinite() if accepted is None else square.isfinite() & accepted
                fisher[name].lerp_(torch.where(usable, square, fisher[name]), self.opts.reg_alpha)


class _PathMixin(Regularizer):
    """Sums −g·Δp over the iterations, the decrease of the loss by the changes of each parameter."""

    def _begin_path(self, model: nn.Module) -> None:
        self.path = Regularizer._start(self, model, "path")
        self.before = {name: p.detach().clone() for name, p in model.named_parameters() if name in self.path}
        self.gradients: dict[str, Tensor] = {}

    @torch.no_grad()
    def _remember_gradients(self, model: nn.Module) -> None:
        self.gradients = {
            n: p.grad.clone() for n, p in model.named_parameters() if n in self.path and p.grad is not None
        }
        self._here = {n: p.detach().clone() for n, p in model.named_parameters() if n in self.gradients}

    @torch.no_grad()
    def _add_to_path(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if name in self.gradients:
                decrease = self.gradients[name] * (self._here[name] - parameter)
                self.path[name].add_(torch.where(decrease.isfinite(), decrease, 0.0))


class PathRegularizer(_PathMixin):
    """Path integral: score = old score + max(0, Σ −g·Δp / ((p_end − p_start)² + ξ)).

    Reference: Zenke et al., "Continual Learning Through Synaptic Intelligence", ICML 2017, eq. 4 and 5.
    """

    kinds = ("score",)

    def __init__(self, model: nn.Module, previous: Previous, opts: Namespace):
        super().__init__(model, previous, opts)
        self._begin_path(model)

    def _start(self, model: nn.Module, kind: str) -> dict[str, Tensor]:
        return _carried(super()._start(model, kind), self.old.get(kind, {}))

    def update(self, model: nn.Module, accepted: Tensor | None = None) -> None:
        """Keep the gradients of the loss until the optimiser's step."""
        self._remember_gradients(model)

    def after_step(self, model: nn.Module, accepted: Tensor | None = None) -> None:
        """Add the decrease of this iteration, which is 0 where the optimiser moved nothing."""
        self._add_to_path(model)

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        """Divide the path integral by the squared change of the parameter."""
        for name, parameter in model.named_parameters():
            if name in self.path:
                distance = (parameter - self.before[name]).square()
                self.current["score"][name] += (self.path[name] / (distance + PATH_DAMPING)).clamp(min=0)
                self.path[name].zero_()

    def state_dict(self) -> dict[str, Any]:
        """Scores, and the sums of this step so far."""
        return super().state_dict() | {"path": _on_cpu(self.path), "before": _on_cpu(self.before)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the scores and the sums of the interrupted step."""
        super().load_state_dict(state)
        _restore(self.path, state["path"])
        _restore(self.before, state["before"])


class RiemannianRegularizer(_PathMixin, FisherRegularizer):
    """RW: Fisher information plus a score, the decrease of the loss per unit of KL divergence, read every few iterations.

    After the step the score is averaged with that of earlier steps.

    Reference: Chaudhry et al., "Riemannian Walk for Incremental Learning", ECCV 2018, eq. 5, 7 and 8.
    """

    kinds = ("fisher", "score")

    def __init__(self, model: nn.Module, previous: Previous, opts: Namespace):
        super().__init__(model, previous, opts)
        self._begin_path(model)
        self.iterations = 0

    def _start(self, model: nn.Module, kind: str) -> dict[str, Tensor]:
        return super()._start(model, kind) if kind == "fisher" else Regularizer._start(self, model, kind)

    def update(self, model: nn.Module, accepted: Tensor | None = None) -> None:
        """Update the moving average of the Fisher information; keep the gradients until the optimiser's step."""
        super().update(model, accepted)
        self._remember_gradients(model)

    def after_step(self, model: nn.Module, accepted: Tensor | None = None) -> None:
        """Add the decrease of this iteration; every `--reg_iterations` iterations add the sum to the score."""
        self._add_to_path(model)
        self.iterations += 1
        if self.iterations % self.opts.reg_iterations == 0:
            self._score(model, accepted)

    @torch.no_grad()
    def _score(self, model: nn.Module, accepted: Tensor | None = None) -> None:
        for name, parameter in model.named_parameters():
            if name in self.path:
                score, path, before = self.current["score"][name], self.path[name], self.before[name]
                divergence = 0.5 * self.current["fisher"][name] * (parameter - before).square()
                gain = (path / (divergence + SCORE_DAMPING)).clamp(min=0)
                if accepted is None:
                    score += gain
                    path.zero_()
                    before.copy_(parameter)
                else:
                    score += torch.where(accepted, gain, 0.0)
                    path.copy_(torch.where(accepted, 0.0, path))
                    before.copy_(torch.where(accepted, parameter, before))

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        """Average the score with that of earlier steps."""
        self._score(model)
        for name, score in self.current["score"].items():
            old = self.old.get("score", {}).get(name)
            if old is not None:
                score.add_(old.to(score)).mul_(0.5)

    def state_dict(self) -> dict[str, Any]:
        """Importances, and the sums of this step so far."""
        extra = {"path": _on_cpu(self.path), "before": _on_cpu(self.before), "iterations": self.iterations}
        return super().state_dict() | extra

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the scores and the sums of the interrupted step."""
        super().load_state_dict(state)
        _restore(self.path, state["path"])
        _restore(self.before, state["before"])
        self.iterations = state["iterations"]


REGULARIZERS: dict[str, type[Regularizer]] = {
    "ewc": FisherRegularizer,
    "pi": PathRegularizer,
    "rw": RiemannianRegularizer,
}
