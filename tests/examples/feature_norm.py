"""FeatureNorm: MiB that also keeps the length of the features which the classifiers see.

norm   --norm_factor · mean over positions of (‖pre_logits of the student‖ − ‖pre_logits of the teacher‖)²
       --norm_relative divides the difference by the teacher's length
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from torch import Tensor

from dataset.tasks import Task
from methods.base import Method, Part, Rules
from methods.mib import MiB
from utils.balance.equilibrium import TermSpec
from utils.options.groups import add_switch, option_group
from utils.runtime.amp import at_least_float32
from utils.types import Batch


class LengthOfFeatures(Part):
    """Keep the length of the features at every position."""

    needs_teacher = True
    rules = Rules(
        ranges={"norm_factor": (0, 1e6)},
        exclusive=[
            (
                "--norm_factor {norm_factor}",
                lambda o: o.norm_factor > 0,
                "--cosine (whose classifiers do not see the length)",
                lambda o: o.cosine,
            )
        ],
        idle=[("--norm_factor above 0", lambda o: o.norm_factor > 0, ["norm_relative"])],
        later=["norm_factor", "norm_relative"],
    )

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """The part's own options, in a group of their own in `--help`."""
        group = option_group(parser, "length of features (FeatureNorm)")
        group.add_argument("--norm_factor", type=float, default=0.0, help="factor of FeatureNorm's term")
        add_switch(group, "--norm_relative", help="divide the difference by the teacher's length")

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """From step 1 on, with --norm_factor."""
        return opts.norm_factor > 0 and task.step > 0

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """{"norm": factor · mean squared difference of the lengths}."""
        mine, theirs = (
            at_least_float32(taps.pre_logits).norm(dim=1) for taps in (batch.student, batch.teacher)
        )  # (B, h, w)
        difference = mine - theirs
        if self.opts.norm_relative:
            difference = difference / theirs.clamp(min=1e-6)
        return {"norm": self.opts.norm_factor * difference.square().mean()}

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
