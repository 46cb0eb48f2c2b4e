"""LwF: distil the teacher's outputs. The part contains all distillations of outputs of these methods, also that of MiB.

kd   --loss_kd · distillation(student, teacher), one of
         default        softmax over the old classes (LwF)
         --unkd         new classes count as background (MiB)
         --kd_bce_sig   sigmoids
         --exkd_gt/sum  excluded distillation
     on the pixels of --kd_mask or --kd_new, at --temperature, scheduled by --kd_scheduling
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from functools import partial

from torch import Tensor

from dataset.tasks import Task
from methods.base import Method, Part, Rules
from methods.ft import class_growth
from utils import distillation
from utils.balance.equilibrium import TermSpec
from utils.options.groups import add_switch, option_group
from utils.options.rules import LARGE
from utils.types import Batch


class OutputDistillation(Part):
    """Keep the student's outputs close to the teacher's."""

    needs_teacher = True
    rules = Rules(
        ranges={"loss_kd": (0, LARGE)},
        positive={"alpha": LARGE, "temperature": LARGE, "temperature_semiold": LARGE},
        one_of=[
            (["unkd", "kd_bce_sig", "exkd_gt", "exkd_sum", "icarl"], "the distillation of outputs"),
            (["kd_new", "kd_mask"], "the pixels of the distillation"),
        ],
        idle=[
            (
                "--loss_kd above 0",
                lambda o: o.loss_kd > 0,
                [
                    "unkd",
                    "kd_bce_sig",
                    "exkd_gt",
                    "exkd_sum",
                    "kd_new",
                    "kd_mask",
                    "kd_scheduling",
                    "temperature_apply",
                ],
            ),
            ("--kd_mask", lambda o: o.kd_mask is not None, ["kd_mask_adaptative_factor"]),
            ("--kd_bce_sig", lambda o: o.kd_bce_sig, ["kd_bce_sig_shape"]),
            ("--exkd_gt or --exkd_sum", lambda o: o.exkd_gt or o.exkd_sum, ["temperature_semiold"]),
            ("--temperature_apply", lambda o: o.temperature_apply is not None, ["temperature"]),
            (
                "--focal_loss, --focal_loss_new, or --loss_kd without --exkd_*",
                lambda o: o.focal_loss or o.focal_loss_new or (o.loss_kd > 0 and not (o.exkd_gt or o.exkd_sum)),
                ["alpha"],
            ),
        ],
        later=[
            *("loss_kd", "unkd", "kd_new", "kd_mask", "kd_mask_adaptative_factor", "kd_scheduling"),
            *("temperature", "temperature_apply", "temperature_semiold"),
            *("kd_bce_sig", "kd_bce_sig_shape", "exkd_gt", "exkd_sum"),
        ],
        classes_only={
            "kd_new": bool,
            "kd_mask": lambda pixels: pixels == "new",
            "temperature_apply": lambda logits: logits == "new",
        },
    )

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Add the kinds of distillation, their pixels and temperatures."""
        group = option_group(parser, "distillation of outputs")
        add, switch = group.add_argument, partial(add_switch, group)
        add("--loss_kd", type=float, default=0.0, help="factor of the distillation of outputs")
        add("--alpha", type=float, default=1.0, help="hardness of the teacher's soft-max in distillation")
        switch("--unkd", help="unbiased distillation: background stands for all new classes (MiB)")
        switch("--kd_new", help="distil the outputs of background pixels only")
        add("--kd_mask", default=None, choices=["oldbackground", "new"], help="pixels whose outputs are distilled")
        switch("--kd_mask_adaptative_factor", help="scale the masked distillation by the share of its pixels")
        switch("--kd_scheduling", help="scale the distillation by sqrt(classes / new classes)")
        add("--temperature", type=float, default=1.0, help="temperature of logits in distillation")
        kinds = ["all", "new", "old"]
        add("--temperature_apply", default=None, choices=kinds, help="logits that the temperature divides")
        semi_old = "temperature of classes learned after step 0 (--exkd_*)"
        add("--temperature_semiold", type=float, default=1.0, help=semi_old)
        switch("--kd_bce_sig", help="binary cross entropy of sigmoids")
        shapes = ["trim", "sum"]
        add("--kd_bce_sig_shape", default="trim", choices=shapes, help="new channels are cut, or join background")
        switch("--exkd_gt", help="excluded distillation, new classes by ground truth")
        switch("--exkd_sum", help="excluded distillation, new classes summed")

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
