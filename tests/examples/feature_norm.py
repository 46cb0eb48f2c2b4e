"""FeatureNorm: MiB that also keeps the length of the features which the classifiers see.

norm   --norm_factor · mean over positions of (‖pre_logits of the student‖ − ‖pre_logits of the teacher‖)²
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from torch import Tensor

from dataset.tasks import Task
from methods.base import Method, Part, Rules
from methods.mib import MiB
from utils.balance.equilibrium import TermSpec
from utils.runtime.amp import at_least_float32
from utils.types import Batch


class LengthOfFeatures(Part):
    """Keep the length of the features at every position."""

    needs_teacher = True
    rules = Rules(ranges={"norm_factor": (0, 1e6)})

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """The part's own option."""
        parser.add_argument("--norm_factor", type=float, default=0.0, help="factor of FeatureNorm's term")

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """From step 1 on, with --norm_factor."""
        return opts.norm_factor > 0 and task.step > 0

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """{"norm": factor · mean squared difference of the lengths}."""
        mine, theirs = (
            at_least_float32(taps.pre_logits).norm(dim=1) for taps in (batch.student, batch.teacher)
        )  # (B, h, w)
        return {"norm": self.opts.norm_factor * (mine - theirs).square().mean()}

    def term_specs(self) -> list[TermSpec]:
        """The term, measured at the head: LSKD's balance can weigh it."""
        return [TermSpec("norm")]


class FeatureNorm(Method):
    """Unbiased cross entropy and distillation, and a term of its own."""

    name = "FeatureNorm"
    paper = "you, A method in one file"
    year = 2026
    own_parts = (LengthOfFeatures,)
    preset = MiB.preset | {"norm_factor": 0.1}
