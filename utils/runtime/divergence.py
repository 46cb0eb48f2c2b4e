"""When a loss counts as diverging, and the state of the training before it did."""

from __future__ import annotations

from typing import Any

import torch

#: A total loss diverges when it exceeds this many times that of the step's first iteration ...
FACTOR = 100.0
#: ... which counts as one of these, if it lies outside them.
LEAST_REFERENCE, GREATEST_REFERENCE = 1.0, 1000.0


class DivergenceWatch:
    """Notices when the total loss of a step leaves the range in which it began.

    An iteration diverges if |total| > 100 · r, where r is |total| of the step's first iteration, at least 1 and at most 1000. The loss
    of a training that learns stays far below that; one above it is finite, but its next steps destroy the weights.

    Attributes:
        reference: |total| of the first iteration; None before it.
        warned: whether the user was told in this step.
        values: losses of the iteration in which the loss began to diverge; empty while it does not.
        state: state of the trainer before that iteration; None while the loss does not diverge.
    """

    def __init__(self) -> None:
        self.reference: float | None = None
        self.warned = False
        self.values: dict[str, float] = {}
        self.state: dict[str, Any] | None = None

    def begins(self, values: dict[str, float]) -> bool:
        """Look at an iteration.

        Args:
            values: finite losses by name, the total as "loss".

        Returns:
            Whether the loss diverges in this iteration and did not in the one before.
        """
        total = abs(values["loss"])
        if self.reference is None:
            self.reference = total
        diverged = bool(self.values)
        if total <= FACTOR * min(max(self.reference, LEAST_REFERENCE), GREATEST_REFERENCE):
            self.values, self.state = {}, None
        elif not diverged:
            self.values = dict(values)
        return bool(self.values) and not diverged


def copy_to_cpu(state: Any) -> Any:
    """A copy of a nested state of dicts, lists, tuples, tensors and plain values, in the memory of the CPU."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: copy_to_cpu(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(copy_to_cpu(value) for value in state)
    return state
