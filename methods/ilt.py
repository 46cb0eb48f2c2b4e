"""ILT: LwF, and the mean squared error between the outputs of the two bodies.

kd     as in methods/lwf.py
body   --loss_de · MSE(body of the student, body of the teacher)
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from torch import Tensor

from dataset.tasks import Task
from methods.base import Method, Part, Rules
from utils import distillation
from utils.balance.equilibrium import TermSpec
from utils.options.groups import option_group
from utils.options.rules import LARGE
from utils.types import Batch


class BodyDistillation(Part):
    """Distil the output of the body."""

    needs_teacher = True
    rules = Rules(ranges={"loss_de": (0, LARGE)}, later=["loss_de"])

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Add `--loss_de`."""
        add = option_group(parser, "distillation of outputs").add_argument
        add("--loss_de", type=float, default=0.0, help="factor of the distillation of the body's output (ILT)")

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """From step 1 on, with --loss_de."""
        return opts.loss_de > 0 and task.step > 0

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """{"body": scalar}."""
        return {"body": self.opts.loss_de * distillation.body_distillation(batch.student.body, batch.teacher.body)}

    def term_specs(self) -> list[TermSpec]:
        """The distance of the bodies, measured at the head."""
        return [TermSpec("body")]


class ILT(Method):
    """Incremental Learning Techniques for semantic segmentation."""

    name = "ILT"
    paper = "Michieli and Zanuttigh, Incremental Learning Techniques for Semantic Segmentation, ICCVW"
    year = 2019
    preset = {"loss_kd": 100.0, "loss_de": 100.0}
