"""LWF-MC: LwF for many classes, which is iCaRL without its memory: sigmoids instead of a softmax.

combined (default)      ce: binary cross entropy; icarl: --icarl_importance · C_old · BCE with the teacher's sigmoids
--icarl_disjoint        icarl: one BCE, the teacher's sigmoids on old classes, labels on new ones, in place of ce
"""

from __future__ import annotations

from argparse import Namespace

from torch import Tensor

from dataset.tasks import Task
from methods.base import Method, Part
from utils import distillation
from utils.balance.equilibrium import TermSpec
from utils.types import Batch


class ICarl(Part):
    """iCaRL's distillation by sigmoids."""

    needs_teacher = True

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
