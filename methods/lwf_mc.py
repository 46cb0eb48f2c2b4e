"""LWF-MC: LwF with sigmoids instead of a softmax, which is iCaRL without its memory of samples.

combined (default)      ce: binary cross entropy; icarl: --icarl_importance · C_old · BCE with the teacher's sigmoids
--icarl_disjoint        icarl, without ce: one BCE with the teacher's sigmoids for old classes and the labels for new ones
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from torch import Tensor

from dataset.tasks import Task
from methods.base import Method, Part, Rules
from utils import distillation
from utils.balance.equilibrium import TermSpec
from utils.options.groups import add_switch, option_group
from utils.options.rules import LARGE
from utils.types import Batch


class ICarl(Part):
    """iCaRL's distillation by sigmoids."""

    needs_teacher = True
    rules = Rules(
        ranges={"icarl_importance": (0, LARGE)},
        one_of=[
            (["icarl", "unce", "focal_loss", "focal_loss_new"], "the classification loss"),
            (["icarl", "nca"], "the classification loss"),
        ],
        idle=[
            ("--icarl", lambda o: o.icarl, ["icarl_disjoint"]),
            ("--icarl --icarl_disjoint", lambda o: o.icarl and o.icarl_disjoint, ["icarl_bkg"]),
            ("--icarl without --icarl_disjoint", lambda o: o.icarl and not o.icarl_disjoint, ["icarl_importance"]),
        ],
        later=["icarl_importance", "icarl_disjoint", "icarl_bkg"],
        for_later=["icarl"],
    )

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Add the two variants of the loss and their factor."""
        group = option_group(parser, "distillation of outputs")
        add_switch(group, "--icarl", help="distillation and classification by sigmoids (iCaRL)")
        group.add_argument("--icarl_importance", type=float, default=1.0, help="factor of iCaRL's distillation")
        disjoint = "iCaRL: sum of two losses on separate classes, not a combined one"
        add_switch(group, "--icarl_disjoint", help=disjoint)
        add_switch(group, "--icarl_bkg", help="iCaRL: background is a new class too")

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """From step 1 on, with --icarl."""
        return opts.icarl and task.step > 0

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """{"icarl": scalar}; the sum over classes, mean over pixels."""
        student, teacher = batch.student.logits, batch.teacher.logits
        if self.opts.icarl_disjoint:
            value = distillation.icarl_disjoint(
                student, batch.labels, teacher, background_from_labels=self.opts.icarl_bkg
            )
            return {"icarl": value}
        return {"icarl": self.opts.icarl_importance * distillation.icarl_combined(student, teacher)}

    def term_specs(self) -> list[TermSpec]:
        """iCaRL's loss, measured at the head."""
        return [TermSpec("icarl")]


class LWFMC(Method):
    """LwF, multi-class."""

    name = "LWF-MC"
    paper = "Rebuffi et al., iCaRL, CVPR"
    year = 2017
    preset = {"icarl": True, "icarl_importance": 10.0}
