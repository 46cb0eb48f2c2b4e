"""UCD: the contrastive loss, and traces whose flags are the MiB part."""

from __future__ import annotations

import numpy as np
import torch

from tests.support.golden_ops import Arrays, Meta
from tests.support.golden_trace import Trace
from utils import contrastive


def ucd_contrastive(arrays: Arrays, meta: Meta) -> Arrays:
    student = arrays["in_pre_logits"].requires_grad_()
    given = contrastive.given_labels(arrays["in_labels"], student.shape[-2:])
    pairs = contrastive.make_pairs(student, arrays["in_teacher_pre_logits"], arrays["in_teacher_small_logits"], given)
    value = contrastive.contrastive_distillation(pairs, meta["temperature"])
    (grad,) = torch.autograd.grad(value, student)
    anchors = len(pairs.anchors)
    return {
        "out_anchor_labels": pairs.labels[:anchors],
        "out_contrast_labels": pairs.labels,
        "out_joint": contrastive.joint_probability(pairs, slice(0, anchors)),
        "out_value": value.detach(),
        "out_grad_student": grad,
    }


class UCDTrace(Trace):
    """The case's flags leave the method's name out; the log's cross entropy has the contrastive term in it."""

    def words(self) -> list[str]:
        assert self.meta["frozen"] == "cls.0", self.meta["frozen"]
        return ["--method", "UCD", *super().words()]

    def after_training(self) -> None:
        super().after_training()
        self.out["out_contrastive"] = np.array([values["contrastive"] for values in self.trainer.recorded])

    def log_line(self, values: dict[str, float]) -> dict[str, float]:
        return super().log_line(values) | {"CE": values["ce"] + values["contrastive"]}

    def epoch_row(self, means: dict[str, float]) -> list[float]:
        return [means["ce"] + means["contrastive"], means["kd"]]


OPS = {"ucd_contrastive": ucd_contrastive}
TRACES = {"ucd": UCDTrace}
