"""EWC: elastic weight consolidation; and the part that every penalty on weights shares (EWC, PI, RW).

regularizer   --reg_importance · Σ importance · (p − p_old)², its gradient added after the main backward pass
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from torch import Tensor, nn

from dataset.sampler import TrainingBatches
from dataset.tasks import Task
from methods.base import Method, Part, Previous
from methods.regularizer import REGULARIZERS
from segmentation_module import SegmentationModel
from utils.checkpointing import structure
from utils.runtime import distributed
from utils.types import Batch


class WeightPenalty(Part):
    """Measures importance at every step, step 0 included, and penalises moving what was important before."""

    state_key = "regularizer"

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """With --regularizer."""
        return opts.regularizer is not None

    def attach(self, model: SegmentationModel, teacher: nn.Module | None, previous: Previous) -> None:
        """Read the importance of earlier steps; a missing one is reported, because nothing then holds the old weights."""
        self.regularizer = REGULARIZERS[self.opts.regularizer](model, previous, self.opts)
        if self.regularizer.absent and distributed.is_main():
            kinds, step = " and no ".join(self.regularizer.absent), self.task.step
            print(
                f"note: no {kinds} in the checkpoint of step {step - 1}: --regularizer {self.opts.regularizer} of step {step} "
                f"does without; train step {step - 1} with the same --regularizer"
            )

    def after_backward(self, model: SegmentationModel) -> dict[str, Tensor]:
        """Measure on the loss's own gradients, then add the penalty's."""
        self.regularizer.update(model)
        if not self.regularizer.weights:
            return {}
        return {"regularizer": self.regularizer.penalise(model)}

    def after_step(self, model: SegmentationModel, batch: Batch) -> None:
        """Measure how far the optimiser moved the parameters."""
        self.regularizer.after_step(model)

    def end_step(self, model: SegmentationModel, loader: TrainingBatches, device: torch.device) -> None:
        """Close the measurement of this step."""
        self.regularizer.finish(model)

    def state_dict(self) -> dict[str, Any]:
        """Importance for the next step, measurement for a resume."""
        return self.regularizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue an interrupted measurement."""
        structure.require_fit(self.state_dict(), state, f"state/method/{self.state_key}")
        self.regularizer.load_state_dict(state)


class EWC(Method):
    """Elastic weight consolidation."""

    name = "EWC"
    paper = "Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, PNAS"
    year = 2017
    preset = {"regularizer": "ewc", "reg_importance": 100.0}
