"""Detection of a diverging loss and of a network that is not finite, and the state of the training before a loss diverged."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from utils.runtime import distributed
from utils.runtime.errors import NonFiniteNetwork

#: Remedy in messages about a loss that diverges or is not finite, unless the method has its own.
REMEDY = "lower --lr, --pod_factor or --loss_kd"

#: A loss diverges if the total exceeds this many times that of the step's first iteration.
FACTOR = 100.0
#: Range to which that first total is clamped.
LEAST_REFERENCE, GREATEST_REFERENCE = 1.0, 1000.0


class DivergenceWatch:
    """Detects that the total loss of a step diverges.

    It diverges in an iteration if |total| > 100 · r, where r is |total| of the step's first iteration, at least 1 and at most 1000. A
    training that converges stays far below it. A loss above it is finite, but the next steps would spoil the weights.

    Attributes:
        reference: |total| of the first iteration; None before it.
        warned: whether the warning of this step was logged.
        values: losses of the iteration in which the loss began to diverge; empty while it does not.
        state: state of the trainer before that iteration; None while the loss does not diverge.
    """

    def __init__(self) -> None:
        self.reference: float | None = None
        self.warned = False
        self.values: dict[str, float] = {}
        self.state: dict[str, Any] | None = None

    @property
    def limit(self) -> float:
        """Greatest |total| that does not diverge, after the first iteration."""
        assert self.reference is not None, "the first iteration sets the reference"
        return FACTOR * min(max(self.reference, LEAST_REFERENCE), GREATEST_REFERENCE)

    @property
    def calm(self) -> bool:
        """Whether the first iteration is over and the loss does not diverge."""
        return self.reference is not None and not self.values

    def begins(self, values: dict[str, float]) -> bool:
        """Check an iteration.

        Args:
            values: finite losses by name, the total as "loss".

        Returns:
            Whether the loss diverges in this iteration and did not in the one before.
        """
        total = abs(values["loss"])
        if self.reference is None:
            self.reference = total
        diverged = bool(self.values)
        if total <= self.limit:
            self.values, self.state = {}, None
        elif not diverged:
            self.values = dict(values)
        return bool(self.values) and not diverged

    def warning(self, values: dict[str, float], where: str, remedy: Callable[[dict[str, float]], str]) -> str:
        """Message for an iteration in which the loss begins to diverge.

        Args:
            values: losses by name, the total as "loss".
            where: number and losses of the iteration, as text.
            remedy: the method's advice for losses, "" if it has none.
        """
        advice = remedy(values) or REMEDY
        return f"warning: the loss diverges, {where}; it was {self.reference:.6g} in the first iteration; {advice}"

    def failure(self, values: dict[str, float], where: str, remedy: Callable[[dict[str, float]], str]) -> str:
        """Message for an iteration whose loss is NaN or infinite; the arguments are those of `warning`."""
        if self.values:  # the cause is the term that began to grow, not this batch
            return f"non-finite loss after it diverged, at {where}; {remedy(self.values) or REMEDY}"
        advice = remedy(values) or f"{REMEDY}, or skip such batches with --skip_nonfinite N"
        return f"non-finite loss at {where}; {advice}"


def require_finite(network: nn.Module, place: str) -> None:
    """Refuse a network that has NaN or infinite weights or statistics on any process. Call it on all processes.

    Args:
        network: all its parameters and buffers are read.
        place: where in the training this is, for the message.

    Raises:
        NonFiniteNetwork: names the first such tensor and the remedy.
    """
    named = [*itertools.chain(network.named_parameters(), network.named_buffers())]
    named = [(name, tensor.detach()) for name, tensor in named if tensor.is_floating_point()]
    finite = torch.stack([tensor.isfinite().all() for _, tensor in named]).tolist()  # one transfer from the device
    wrong = next((name for (name, _), good in zip(named, finite) if not good), "")
    found = [name for name in distributed.gather_objects(wrong) if name]
    if found:
        raise NonFiniteNetwork(f"the network is not finite ({found[0]}) at {place}; start the step anew and {REMEDY}")


def copy_to_cpu(state: Any) -> Any:
    """A copy of a nested state of dicts, lists, tuples, tensors and plain values, in the memory of the CPU."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: copy_to_cpu(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(copy_to_cpu(value) for value in state)
    return state
