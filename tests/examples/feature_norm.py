"""FeatureNorm: MiB that also keeps the length of the features which the classifiers see.

norm   --norm_factor · mean over positions of (‖pre_logits of the student‖ − ‖pre_logits of the teacher‖)²
"""

from __future__ import annotations

from argparse import ArgumentParser

from torch import Tensor

from methods.base import Method
from methods.mib import MiB
from utils.runtime.amp import at_least_float32
from utils.types import Batch


class FeatureNorm(Method):
    """Unbiased cross entropy and distillation, and a term of its own."""

    name = "FeatureNorm"
    paper = "you, A method in one file"
    year = 2026
    preset = MiB.preset | {"norm_factor": 0.1}
    needs_teacher = True

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Options of this method alone."""
        parser.add_argument("--norm_factor", type=float, default=0.0, help="factor of FeatureNorm's term")

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """MiB's {"ce", "kd"} and, from step 1 on, {"norm"}."""
        terms = super().terms(batch)
        if batch.teacher is not None:
            mine, theirs = (
                at_least_float32(taps.pre_logits).norm(dim=1) for taps in (batch.student, batch.teacher)
            )  # (B, h, w)
            terms["norm"] = self.opts.norm_factor * (mine - theirs).square().mean()
        return terms
