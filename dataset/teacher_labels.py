"""Validation of old classes on images of a step, whose annotation does not have them: the frozen teacher labels them where it is sure."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dataset.sampler import EvaluationBatches
from utils import pseudo


class TeacherLabelled:
    """Batches of a validation set with the labels of `utils.pseudo.teacher_labels`.

    Args:
        batches: (images, labels) of the step.
        teacher: the frozen model of step t−1 on its device, in evaluation mode.
        least: `--val_by_teacher`.
    """

    def __init__(self, batches: EvaluationBatches, teacher: nn.Module, least: float):
        self.batches, self.teacher, self.least = batches, teacher, least

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        weight = next(self.teacher.parameters())
        for images, labels in self.batches:
            with torch.no_grad():
                logits = self.teacher(images.to(weight.device, weight.dtype, non_blocking=True)).logits
            yield images, pseudo.teacher_labels(labels.to(weight.device), logits, self.least)
