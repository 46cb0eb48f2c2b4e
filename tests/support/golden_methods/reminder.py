"""REMINDER: class similarity weighted distillation, class prototypes, and traces that start from prototypes."""

from __future__ import annotations

import torch
from torch import nn

from methods.reminder import SimilarityDistillation
from tests.support.golden_ops import Arrays, Meta
from tests.support.golden_trace import Trace
from utils import class_similarity


def csw_kd(arrays: Arrays, meta: Meta) -> Arrays:
    student, labels = arrays["in_student_logits"].requires_grad_(), arrays["in_labels"]
    old, total = meta["old_classes"], meta["old_classes"] + meta["new_classes"]
    means = class_similarity.class_means(arrays["in_pre_logits"], labels, old, total)
    weights = class_similarity.similarity_weights(means, arrays["in_prototypes"], meta["delta"])
    value = class_similarity.class_similarity_distillation(
        student, arrays["in_teacher_logits"], labels, weights, meta["temperature"]
    )
    (grad,) = torch.autograd.grad(value, student)
    batch_prototypes = torch.cat([means.new_zeros(old, means.shape[1]), means])
    return {"out_batch_prototypes": batch_prototypes, "out_value": value.detach(), "out_grad_student": grad}


def prototypes(arrays: Arrays, meta: Meta) -> Arrays:
    old, total = meta["old_classes"], meta["old_classes"] + meta["new_classes"]
    means = class_similarity.PrototypeMeans(old, total, arrays["in_pre_logits_0"].shape[1])
    index = 0
    while f"in_labels_{index}" in arrays:
        means.update(arrays[f"in_pre_logits_{index}"], arrays[f"in_labels_{index}"])
        index += 1
    earlier = arrays.get("in_prototypes", means.values[:0])
    return {"out_prototypes": torch.cat([earlier, means.values])}


class ReminderTrace(Trace):
    """Step t−1 left prototypes, and the trained step leaves its own."""

    def previous_checkpoint(self, teacher: nn.Module) -> dict:
        state = {"prototypes": torch.as_tensor(self.case["in_prototypes"])}
        return super().previous_checkpoint(teacher) | {"method_state": {SimilarityDistillation.state_key: state}}

    def after_training(self) -> None:
        super().after_training()
        # Other batches than the trained ones, whose labels have become pseudo-labels
        self.method.end_step(self.trainer.network, self.batches(), torch.device("cpu"))
        state = self.method.state_dict()[SimilarityDistillation.state_key]
        self.out["out_prototypes"] = state["prototypes"].numpy()

    def log_line(self, values: dict[str, float]) -> dict[str, float]:
        return super().log_line(values) | {"CSW": values["csw"]}

    def epoch_row(self, means: dict[str, float]) -> list[float]:
        return [means["ce"], means["csw"]]


OPS = {"reminder_csw_kd": csw_kd, "reminder_prototypes": prototypes}
TRACES = {"reminder": ReminderTrace}
