"""EveryHook: a method of no scientific value that uses every hook of `methods.base.Part`, to show how each is written.

wrap_model      a channel-wise scale (1 at first) behind the head's last norm, as a layer of the network
attach          read how many images step t−1 saw
replay          the first images of step t−1 join the training set
init_classifier new classifiers start as the mean feature of their pixels
frozen          the stem of the body
parameter_groups the classifiers learn twice as fast
phases          before the training: tune the scale alone; after it: tune the biases of the classifiers
begin_step      count the pixels of each class, for class weights
prepare, terms  a classification loss of its own, weighted by the counts, and a distance from the teacher's features
penalties, after_backward, remedies  a penalty on the scale, its gradient added by hand
after_step      count the images
end_epoch, end_validation, end_step, state_dict, load_state_dict
begin_test      the test sees no factor of the scale below 0
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset.base import SegmentationSet
from dataset.sampler import TrainingBatches
from dataset.tasks import Task
from methods.base import Method, Part, Previous, Rules
from methods.phase import Phase
from segmentation_module import SegmentationModel
from utils.balance.equilibrium import TermSpec
from utils.optimizer import Group
from utils.options.groups import option_group
from utils.runtime import distributed
from utils.types import IGNORE, Batch

#: Images of step t−1 that step t replays.
REPLAYED = 2


class Scale(nn.Module):
    """A learned factor of every channel; 1 changes nothing."""

    def __init__(self, channels: int):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, h, w) -> (B, c, h, w)."""
        return x * self.factor[:, None, None]


class TuneScale(Phase):
    """Before the training: the scale alone, by cross entropy, in evaluation mode."""

    name = "scale"
    when = "before"
    training_mode = False
    epochs = 1

    def parameters(self) -> list[nn.Parameter]:
        """The factors."""
        return [self.model.head.scale.factor]

    def terms(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """{"ce": cross entropy on the labels as they are}."""
        return {"ce": F.cross_entropy(self.model(images).logits, labels, ignore_index=IGNORE)}


class TuneBiases(Phase):
    """After the training: an offset of the logits, learned by Adam, then added to the biases of the classifiers."""

    name = "biases"
    when = "after"
    training_mode = False
    epochs = 2

    def attach(self, model: SegmentationModel, teacher: nn.Module | None, device: torch.device) -> None:
        """Make the offset."""
        super().attach(model, teacher, device)
        self.offset = nn.Parameter(torch.zeros(self.task.num_total, device=device, dtype=model.cls[0].weight.dtype))

    def begin(self, loader: TrainingBatches) -> None:
        """Start from how often the classes occur."""
        counts = torch.ones_like(self.offset)
        for _, labels in loader:
            known = labels[labels != IGNORE].long().to(counts.device)
            counts.detach().add_(torch.bincount(known, minlength=len(counts)).to(counts))
        counts = distributed.sum_(counts.detach())
        self.offset.data = 0.01 * (counts / counts.sum()).log()

    def parameters(self) -> list[nn.Parameter]:
        """The offset."""
        return [self.offset]

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def terms(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """{"ce": cross entropy of the shifted logits}."""
        with torch.no_grad():
            logits = self.model(images).logits
        return {"ce": F.cross_entropy(logits + self.offset[:, None, None], labels, ignore_index=IGNORE)}

    @torch.no_grad()
    def end(self) -> None:
        """Add the offset to the biases."""
        for classifier, offset in zip(self.model.cls, self.offset.split(list(self.model.classes))):
            classifier.bias += offset

    def state_dict(self) -> dict[str, Any]:
        """The offset."""
        return {"offset": self.offset.detach().cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the offset."""
        self.offset.data.copy_(state["offset"])


class UsesEveryHook(Part):
    """The part behind EveryHook."""

    needs_teacher = True
    state_key = "every_hook"
    rules = Rules(ranges={"hook_factor": (0, 1000)})

    def __init__(self, opts: Namespace, task: Task):
        super().__init__(opts, task)
        self.images = 0
        self.earlier_images = 0
        self.epochs_ended = 0
        self.validations = 0
        self.remembered: list[int] = []
        self.class_weights = torch.ones(task.num_total)

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """The part's own option."""
        group = option_group(parser, "every hook (EveryHook)")
        group.add_argument("--hook_factor", type=float, default=0.0, help="factor of EveryHook's terms")

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """At every step, with --hook_factor."""
        return opts.hook_factor > 0

    def wrap_model(self, model: SegmentationModel) -> None:
        """Put the scale behind the head's last norm."""
        model.head.scale = Scale(model.head.red_bn.num_features)
        model.head.register_forward_hook(lambda head, inputs, output: head.scale(output))

    def attach(self, model: SegmentationModel, teacher: nn.Module | None, previous: Previous) -> None:
        """Read what step t−1 left."""
        self.earlier_images = previous.state.get("images", 0)
        self.remembered = list(previous.state.get("remembered", []))

    def replay(self, make: Callable[[Sequence[int]], SegmentationSet]) -> SegmentationSet | None:
        """The images that step t−1 remembered."""
        return make(self.remembered) if self.remembered else None

    @torch.no_grad()
    def init_classifier(
        self, model: SegmentationModel, teacher: nn.Module | None, loader: TrainingBatches, device: torch.device
    ) -> None:
        """New classes start as the mean feature of their pixels."""
        if self.task.step == 0:
            return
        model.eval()
        weight = model.cls[-1].weight
        sums, counts = torch.zeros_like(weight[:, :, 0, 0]), weight.new_zeros(len(weight))
        for images, labels in loader:
            features = model(images.to(device, weight.dtype), full_size=False).pre_logits
            small = F.interpolate(labels[:, None].float(), size=features.shape[2:]).long()[:, 0]  # (B, h, w)
            for k in range(len(weight)):
                chosen = (small == self.task.num_old + k).to(weight)  # (B, h, w)
                sums[k] += torch.einsum("bchw,bhw->c", features, chosen)
                counts[k] += chosen.sum()
        distributed.sum_(sums)
        distributed.sum_(counts)
        weight[:, :, 0, 0] = 0.01 * sums / counts.clamp(min=1)[:, None]
        model.train()

    def frozen(self, model: SegmentationModel):
        """The stem."""
        return [model.body.mod1]

    def parameter_groups(self, groups: list[Group], model: SegmentationModel) -> list[Group]:
        """Twice the learning rate for the classifiers."""
        return [group | {"lr": group["lr"] * (2 if group["name"] == "cls" else 1)} for group in groups]

    def phases(self) -> list[Phase]:
        """One before, one after the training."""
        return [TuneScale(self.opts, self.task), TuneBiases(self.opts, self.task)]

    def begin_step(self, loader: TrainingBatches, teacher: nn.Module | None, device: torch.device) -> None:
        """Weights of the classes: less for those with many pixels."""
        counts = torch.ones(self.task.num_total, dtype=torch.float64)
        for _, labels in loader:
            counts += torch.bincount(labels[labels != IGNORE].long().flatten().cpu(), minlength=len(counts))
        counts = distributed.sum_(counts.to(device))
        self.class_weights = (1 / counts.log1p()).float().cpu()

    def prepare(self, batch: Batch, teacher: nn.Module | None) -> None:
        """Count the images that the loss sees."""
        batch.extras["images"] = len(batch.images)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """{"weighted": weighted cross entropy} and, with a teacher, {"features": squared distance of the stages}."""
        weights = self.class_weights.to(batch.student.logits)
        value = F.cross_entropy(batch.student.logits, batch.labels, weights, ignore_index=IGNORE)
        named = {"weighted": self.opts.hook_factor * value}
        if batch.teacher is not None:
            pairs = zip(batch.student.stages, batch.teacher.stages)
            named["features"] = self.opts.hook_factor * sum(F.mse_loss(a, b) for a, b in pairs)
        return named

    def term_specs(self) -> list[TermSpec]:
        """Both are measured at the head."""
        return [TermSpec("weighted"), *([TermSpec("features")] if self.task.step else [])]

    def penalties(self, model: SegmentationModel) -> dict[str, Tensor]:
        """{"scale": squared distance of the scale from 1}."""
        return {"scale": self.opts.hook_factor * (model.head.scale.factor - 1).square().sum()}

    def after_backward(self, model: SegmentationModel) -> None:
        """The gradient of the penalty."""
        factor = model.head.scale.factor
        if factor.grad is not None:
            factor.grad += 2 * self.opts.hook_factor * (factor.detach() - 1)

    def remedies(self) -> dict[str, str]:
        """The factor of the penalty."""
        return {"scale": "lower --hook_factor"}

    def after_step(self, model: SegmentationModel, batch: Batch) -> None:
        """Count."""
        self.images += batch.extras["images"]

    def end_epoch(self, model: SegmentationModel, epoch: int) -> None:
        """Count."""
        self.epochs_ended = epoch + 1

    def end_validation(self, model: SegmentationModel) -> None:
        """Count."""
        self.validations += 1

    def end_step(self, model: SegmentationModel, loader: TrainingBatches, device: torch.device) -> None:
        """Remember the first images of the step."""
        self.remembered = [int(index) for index in loader.indices[:REPLAYED]]

    def export(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Everything is stored, the scale too."""
        return state

    def state_dict(self) -> dict[str, Any]:
        """Counts, weights and the memory."""
        return {
            "images": self.images,
            "epochs_ended": self.epochs_ended,
            "validations": self.validations,
            "remembered": self.remembered,
            "class_weights": self.class_weights.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue counting."""
        self.images, self.epochs_ended = state["images"], state["epochs_ended"]
        self.validations = state["validations"]
        self.remembered, self.class_weights = list(state["remembered"]), state["class_weights"]

    @torch.no_grad()
    def begin_test(self, model: SegmentationModel) -> None:
        """The test alone sees no negative factor."""
        model.head.scale.factor.clamp_(min=0)


class EveryHook(Method):
    """Plain training with one part that uses every hook."""

    name = "EveryHook"
    paper = "nobody, An example"
    year = 2026
    own_parts = (UsesEveryHook,)
    preset = {"hook_factor": 0.5}
