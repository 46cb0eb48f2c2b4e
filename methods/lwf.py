"""LwF: distil the teacher's outputs. The part below holds every distillation of outputs of the family, MiB's included.

kd   --loss_kd · distillation(student, teacher), one of
         default        softmax over the old classes (LwF)
         --unkd         new classes count as background (MiB)
         --kd_bce_sig   sigmoids
         --exkd_gt/sum  excluded distillation
     on the pixels of --kd_mask or --kd_new, at --temperature, scheduled by --kd_scheduling
"""

from __future__ import annotations

from argparse import Namespace

from torch import Tensor

from dataset.tasks import Task
from methods.base import Method, Part
from methods.ft import class_growth
from utils import distillation
from utils.balance.equilibrium import TermSpec
from utils.types import Batch


class OutputDistillation(Part):
    """Keep the student's outputs close to the teacher's."""

    needs_teacher = True

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """From step 1 on, with --loss_kd."""
        return opts.loss_kd > 0 and task.step > 0

    def per_pixel(self, batch: Batch, mask: Tensor | None) -> Tensor:
        """(B, H, W) distillation of the kind that the flags choose."""
        opts, task = self.opts, self.task

        def softened(logits: Tensor) -> Tensor:
            logits = distillation.soften(logits, batch.labels, task.num_old, opts.temperature, opts.temperature_apply)
            if opts.exkd_gt or opts.exkd_sum:
                return distillation.soften_semi_old(
                    logits, task.at(0).num_total, task.num_old, opts.temperature_semiold
                )
            return logits

        student, teacher = softened(batch.student.logits), softened(batch.teacher.logits)
        if opts.unkd:
            return distillation.unbiased_knowledge_distillation(student, teacher, opts.alpha, mask, reduction="none")
        if opts.kd_bce_sig:
            return distillation.sigmoid_distillation(
                student, teacher, opts.alpha, opts.kd_bce_sig_shape, mask, reduction="none"
            )
        if opts.exkd_gt or opts.exkd_sum:
            slot = "gt" if opts.exkd_gt else "sum"
            return distillation.excluded_knowledge_distillation(
                student, teacher, batch.labels, slot, mask, reduction="none"
            )
        return distillation.knowledge_distillation(student, teacher, opts.alpha, mask, reduction="none")

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """{"kd": scalar}."""
        mask = distillation.distillation_mask(batch.labels, self.task.num_old, self.opts.kd_mask)
        value = self.per_pixel(batch, mask)
        if self.opts.kd_new:
            background = (batch.labels == 0).to(value.dtype)
            mean = (value * background).sum() / background.sum().clamp(min=1)
        elif mask is not None and self.opts.kd_mask_adaptative_factor:
            mean = distillation.adaptive_distillation(value, mask)
        else:
            mean = value.mean()
        schedule = class_growth(self.task) if self.opts.kd_scheduling else 1.0
        return {"kd": self.opts.loss_kd * schedule * mean}

    def term_specs(self) -> list[TermSpec]:
        """The distillation of outputs, measured at the head."""
        return [TermSpec("kd")]


class LWF(Method):
    """Learning without Forgetting."""

    name = "LWF"
    paper = "Li and Hoiem, Learning without Forgetting, TPAMI"
    year = 2018
    preset = {"loss_kd": 100.0}
