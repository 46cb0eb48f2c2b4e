"""Structures shared by the packages: result of a forward pass, batch, and the interface of a task for the packages below dataset/."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast

import torch.nn.functional as F
from torch import Tensor

#: Label of pixels that losses and metrics ignore.
IGNORE = 255

#: Names of the six feature-distillation taps, in the order of `Taps.features`.
TAP_NAMES = ("stage1", "stage2", "stage3", "stage4", "pre_logits", "logits")


class Taps(NamedTuple):
    """The result of every forward pass of the network.

    Attributes:
        logits: (B, C, H, W) classifier output at the size of the input (bilinear, align_corners=False), at least float32.
        logits_small: (B, C, h, w) the same before upsampling.
        body: (B, c, h, w) output of the last residual stage, after its activation.
        pre_logits: (B, 256, h, w) output of the DeepLabV3 head, input of the classifiers.
        attentions: four tensors, the output of the last block of each residual stage BEFORE its final activation.
        slope: negative slope of that activation, a leaky ReLU; 1 for a body whose stages end without one.
    """

    logits: Tensor
    logits_small: Tensor
    body: Tensor
    pre_logits: Tensor
    attentions: tuple[Tensor, ...]
    slope: float = 1.0

    @property
    def stages(self) -> tuple[Tensor, ...]:
        """The outputs of the four stages AFTER their activation; computed at each access, because few methods use them."""
        return tuple(F.leaky_relu(attention, self.slope) for attention in self.attentions)

    @property
    def features(self) -> tuple[Tensor, ...]:
        """The six taps of feature distillation: stage 1, 2, 3, 4, pre_logits, small logits (see `TAP_NAMES`)."""
        return (*self.attentions, self.pre_logits, self.logits_small)


@dataclass
class Batch:
    """One training batch.

    Attributes:
        images: (B, 3, H, W) normalised images.
        truth: (B, H, W) int64 labels as the data set gives them (positions in learning order, `IGNORE` = 255).
        labels: (B, H, W) int64 labels after pseudo-labelling; the same tensor as `truth` without pseudo-labels.
        pixel_weights: factor of the classification loss, broadcastable to (B, H, W), or None for ones.
        pseudo_mask: (B, H, W) bool, pixels with a confident pseudo-label, or None without pseudo-labels.
        student: forward pass of the model in training; None before it.
        teacher: forward pass of the frozen model of step t-1; None at step 0, and where no part needs it.
        teacher_views: the six taps of further teacher passes by name, such as LSKD's two erased views.
        extras: values that a hook of a part stores for later hooks, by name.
    """

    images: Tensor
    truth: Tensor
    labels: Tensor
    pixel_weights: Tensor | None = None
    pseudo_mask: Tensor | None = None
    # Typed without None: terms are computed after the student's pass, and a part that reads the teacher says `needs_teacher`.
    student: Taps = None  # type: ignore[assignment]
    teacher: Taps = None  # type: ignore[assignment]
    teacher_views: dict[str, tuple[Tensor | None, ...]] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)

    def release_taps(self) -> None:
        """Release all taps: after the losses are computed, only their graph needs them."""
        self.student = self.teacher = cast(Taps, None)
        self.teacher_views = {}

    def with_student(self, student: Taps) -> Batch:
        """This batch with the student's forward pass attached."""
        self.student = student
        return self


class TaskLike(Protocol):
    """The part of `dataset.tasks.Task` that checkpoints and results need; the packages below dataset/ cannot import the class."""

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        ...

    @property
    def name(self) -> str:
        """Name of the task."""
        ...

    @property
    def step(self) -> int:
        """Number of the step."""
        ...

    @property
    def steps(self) -> tuple[tuple[int, ...], ...]:
        """Class ids of each step."""
        ...

    @property
    def last_step(self) -> int:
        """Number of the last step."""
        ...

    @property
    def label_ids(self) -> tuple[int, ...]:
        """For each output channel the id of its label in the data set."""
        ...

    @property
    def num_total(self) -> int:
        """Number of classes known after the step."""
        ...

    def at(self, step: int) -> TaskLike:
        """The same task at another step."""
        ...
