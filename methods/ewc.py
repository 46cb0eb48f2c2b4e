"""EWC: elastic weight consolidation; and the part that EWC, PI and RW share.

regularizer   --reg_importance · Σ importance · (p − p_old)², part of the total loss, its gradient added after the main backward pass
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dataset.sampler import TrainingBatches
from dataset.tasks import Task
from methods.base import Method, Part, Previous, Rules
from methods.regularizer import REGULARIZERS
from segmentation_module import SegmentationModel
from utils.checkpointing import structure
from utils.options.groups import add_switch, option_group
from utils.options.rules import LARGE
from utils.runtime import distributed
from utils.types import Batch


class WeightPenalty(Part):
    """Measures the importance of weights at every step, step 0 included, and penalises changes of earlier steps' important weights."""

    gated = True
    state_key = "regularizer"
    rules = Rules(
        ranges={"reg_importance": (0, LARGE), "reg_alpha": (0, 1), "reg_iterations": (1, LARGE)},
        idle=[
            ("--regularizer", lambda o: o.regularizer is not None, ["reg_importance", "reg_no_normalize"]),
            ("--regularizer ewc or rw", lambda o: o.regularizer in ("ewc", "rw"), ["reg_alpha"]),
            ("--regularizer rw", lambda o: o.regularizer == "rw", ["reg_iterations"]),
        ],
        later=["reg_importance", "reg_no_normalize"],  # step 0 only measures the importance
        for_later=["regularizer"],
    )

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Add the measure of importance and the factor of the penalty."""
        group = option_group(parser, "regularisation of weights")
        add = group.add_argument
        add("--regularizer", type=str, default=None, choices=["ewc", "rw", "pi"], help="penalty on changed weights")
        add("--reg_importance", type=float, default=1.0, help="factor of the penalty")
        add("--reg_alpha", type=float, default=0.9, help="moving average of the Fisher information (ewc, rw)")
        add_switch(group, "--reg_no_normalize", help="do not scale the importances to 0..1")
        add("--reg_iterations", type=int, default=10, help="iterations between two updates of the score (rw)")

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """With --regularizer."""
        return opts.regularizer is not None

    def attach(self, model: SegmentationModel, teacher: nn.Module | None, previous: Previous) -> None:
        """Read the importance measured by earlier steps. If it is missing, the step has no penalty, and a note is printed."""
        self.regularizer = REGULARIZERS[self.opts.regularizer](model, previous, self.opts)
        if self.regularizer.absent and distributed.is_main():
            kinds, step = " and no ".join(self.regularizer.absent), self.task.step
            print(
                f"note: no {kinds} in the checkpoint of step {step - 1}: --regularizer {self.opts.regularizer} of step {step} "
                f"has no penalty; train step {step - 1} with the same --regularizer"
            )
        self.largest_stable = self._largest_stable()
        if self.opts.reg_importance > self.largest_stable and distributed.is_main():
            print(f"note: --reg_importance {self.opts.reg_importance:g} may diverge: {self.remedies()['regularizer']}")

    def _largest_stable(self) -> float:
        """The --reg_importance up to which gradient descent on the penalty is stable.

        The penalty of a parameter of importance w has the curvature h = 2 · reg_importance · w. SGD with Nesterov momentum μ converges
        on it if lr · h < 2 (1 + μ) / (1 + 2 μ), which is 1.36 for μ = 0.9 and 2 without momentum.
        """
        momentum, largest = self.opts.momentum, self.regularizer.largest_weight
        bound = 2 * (1 + momentum) / (1 + 2 * momentum)
        return bound / (2 * self.opts.lr_of_step * largest) if largest > 0 else math.inf

    def remedies(self) -> dict[str, str]:
        """Advice with the largest factor for which the penalty does not diverge at this learning rate."""
        lr, most = self.opts.lr_of_step, self.largest_stable
        return {
            "regularizer": f"the penalty is stable at --lr {lr:g} up to --reg_importance {most:.3g}: lower one of the two"
        }

    def penalties(self, model: SegmentationModel) -> dict[str, Tensor]:
        """{"regularizer": scalar}; empty if no earlier step measured an importance."""
        return {"regularizer": self.regularizer.penalty(model)} if self.regularizer.weights else {}

    @property
    def assigned(self) -> Iterable[Any]:
        """The measurement counts iterations."""
        return (self, self.regularizer)

    def after_backward(self, model: SegmentationModel) -> None:
        """Measure the importance from the gradients of the loss, then add those of the penalty."""
        self.regularizer.update(model, self.accepted)
        self.regularizer.add_gradient(model)

    def after_step(self, model: SegmentationModel, batch: Batch) -> None:
        """Measure how much the optimiser changed the parameters."""
        self.regularizer.after_step(model, self.accepted)

    def end_step(self, model: SegmentationModel, loader: TrainingBatches, device: torch.device) -> None:
        """Finish the measurement of this step."""
        self.regularizer.finish(model)

    def state_dict(self) -> dict[str, Any]:
        """The importance, which the next step reads, and the measurement so far, which a resume continues."""
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
    stores = "the importance of each weight"
    step0 = "its own, else there is no penalty"
    preset = {"regularizer": "ewc", "reg_importance": 100.0}
