"""EWF: endpoints weight fusion, a mean of the networks before and after a step.

training   the base method's, with the earlier classifiers frozen (--fix_pre_cls)
fusion     after the last epoch of a step t ≥ 1:  θ ← (1 − α)·θ_{t−1} + α·θ_t,  α = sqrt(C_new / C)  (--weight_fusion)

θ_{t−1} is the checkpoint of step t−1. Every entry of it is fused: weights, norms with their running statistics, and the earlier
classifiers; the newest classifier has no counterpart and is not changed. The fused weights are the step's checkpoint: they are tested,
and the next step starts from them and takes them as its teacher and as θ_{t−1}. The optimiser's state is that of the training. Phases of
other parts after the training, and `end_step` of all parts, get the fused network.

Reference: Xiao et al., "Endpoints Weight Fusion for Class Incremental Semantic Segmentation", CVPR 2023.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from dataset.tasks import Task
from methods.base import Method, Part, Previous, Rules
from methods.lskd import LSKD
from methods.mib import MiB
from methods.phase import Phase
from methods.plop import PLOP
from segmentation_module import SegmentationModel
from utils.options.groups import add_switch, option_group

GROUP = "endpoints weight fusion (EWF)"
#: The share of all elements that --threshold_choice fuses, those with the largest change.
FUSED_SHARE = 0.45


def fused(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], factor: float, furthest_only: bool = False
) -> dict[str, Tensor]:
    """(1 − factor)·before + factor·after.

    Args:
        before: weights and statistics of step t−1 by name.
        after: those of the trained network; has every name of `before`.
        factor: α.
        furthest_only: fuse the elements with the largest change, `FUSED_SHARE` of all entries together, and do not change the others
            (`--threshold_choice`; the paper does not have it).

    Returns:
        The fused tensors, one for each name of `before`, with type and device of `after`; integer tensors are truncated.
    """
    pairs = {name: (value.to(after[name].device), after[name]) for name, value in before.items()}
    least = _least_change(pairs.values()) if furthest_only else 0.0
    found = {}
    for name, (old, new) in pairs.items():
        mean = (1 - factor) * old + factor * new
        found[name] = torch.where((old - new).abs() < least, new, mean).to(new.dtype)
    return found


def _least_change(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The smallest change among the elements with the largest change."""
    changes = torch.cat([(old - new).abs().double().flatten() for old, new in pairs])
    chosen = int(FUSED_SHARE * len(changes))
    return float(changes.kthvalue(len(changes) - chosen + 1).values) if chosen else math.inf


class FrozenClassifiers(Part):
    """The classifiers of earlier steps, including the background, are not trained (--fix_pre_cls)."""

    rules = Rules(later=["fix_pre_cls"], classes_only={"fix_pre_cls": bool})

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Add `--fix_pre_cls`."""
        add_switch(
            option_group(parser, "classifier"), "--fix_pre_cls", help="do not train classifiers of earlier steps"
        )

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """From step 1 on, with --fix_pre_cls or --ewf."""
        return (opts.fix_pre_cls or opts.ewf) and task.step > 0 and not task.domain

    def frozen(self, model: SegmentationModel) -> Iterable[nn.Module | nn.Parameter]:
        """All classifiers except the newest."""
        return list(model.cls)[:-1]


class Fusion(Phase):
    """The fusion, a phase without an epoch: it comes after the training and before what other parts do with the trained network.

    Args:
        opts, task: as for `Phase`.
        part: which fuses.
    """

    name = "fusion"
    when = "after"
    training_mode = False
    epochs = 0

    def __init__(self, opts: Namespace, task: Task, part: WeightFusion):
        super().__init__(opts, task)
        self.part = part

    def parameters(self) -> list[nn.Parameter]:
        """Nothing is trained."""
        return []

    def end(self) -> None:
        """Fuse; the same on every process."""
        self.part.fuse(self.model)


class WeightFusion(Part):
    """Fuse the trained network with that of step t−1 (--weight_fusion, and --ewf, which also freezes the earlier classifiers).

    Attributes:
        factor: α.
    """

    rules = Rules(
        requires=[("threshold_choice", "--weight_fusion or --ewf", lambda opts: opts.weight_fusion or opts.ewf)],
        later=["ewf", "weight_fusion", "threshold_choice"],
        classes_only={"ewf": bool, "weight_fusion": bool},
    )

    def __init__(self, opts: Namespace, task: Task):
        super().__init__(opts, task)
        self.factor = math.sqrt(task.num_new / task.num_total)
        self.before: Mapping[str, Tensor] = {}

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Add the options of the release, and --ewf, which sets the two that its scripts use."""
        group = option_group(parser, GROUP)
        add_switch(group, "--ewf", help="--weight_fusion and --fix_pre_cls")
        add_switch(group, "--weight_fusion", help="after each step, the mean of the networks before and after it")
        add_switch(group, "--threshold_choice", help="fuse only the 45 %% of all weights that moved furthest")

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """From step 1 on, with --weight_fusion or --ewf; domains add no class, so that α would be 0."""
        return (opts.weight_fusion or opts.ewf) and task.step > 0 and not task.domain

    def attach(self, model: SegmentationModel, teacher: nn.Module | None, previous: Previous) -> None:
        """Keep the weights of step t−1; they are in memory for the teacher in any case."""
        self.before = previous.weights

    def phases(self) -> list[Phase]:
        """The fusion."""
        return [Fusion(self.opts, self.task, self)]

    @torch.no_grad()
    def fuse(self, model: nn.Module) -> None:
        """Replace the weights and statistics of a trained network by their mean with those of step t−1."""
        after = model.state_dict()
        before = {name: value for name, value in self.before.items() if name in after}
        for name, value in fused(before, after, self.factor, self.opts.threshold_choice).items():
            after[name].copy_(value)


class MiBEWF(Method):
    """MiB with weight fusion."""

    name = "MiB+EWF"
    paper = "Xiao et al., Endpoints Weight Fusion, with MiB, CVPR"
    year = 2023
    own_parts = (FrozenClassifiers, WeightFusion)
    preset = MiB.preset | {"ewf": True}
    task_presets = {("ade", task): {"loss_kd": 100.0} for task in ("100-10", "100-5")}


class PLOPEWF(Method):
    """PLOP with weight fusion."""

    name = "PLOP+EWF"
    paper = "Xiao et al., Endpoints Weight Fusion, with PLOP, CVPR"
    year = 2023
    own_parts = MiBEWF.own_parts
    preset = PLOP.preset | {"ewf": True}
    task_presets = PLOP.task_presets


class LSKDEWF(Method):
    """LSKD with weight fusion. No article has this combination."""

    name = "LSKD+EWF"
    paper = "no article: LSKD with the fusion of Xiao et al., CVPR"
    year = 2023
    own_parts = MiBEWF.own_parts
    preset = LSKD.preset | {"ewf": True}
    task_presets = LSKD.task_presets
