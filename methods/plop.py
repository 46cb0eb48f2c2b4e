"""PLOP: pseudo-labels for what this step's annotation calls background, and local POD on six taps.

pseudo-labels   old pixels take the teacher's class where it is sure, else are ignored; "sure" is per class: entropy below
                max(median over the training set, --threshold)                                      (utils.pseudo)
ce              times the share of old pixels that are sure (--classif_adaptive_factor)            (methods/ft.py)
pod             mean over taps of factor · ‖pooled(a²) − pooled(b²)‖ · sqrt(C / C_new)             (utils.pod.terms)
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from torch import Tensor, nn

from dataset.sampler import TrainingBatches
from dataset.tasks import Task
from methods.base import Method, Part
from methods.ft import class_growth
from utils import pseudo
from utils.checkpointing import structure
from utils.pod import terms as pod
from utils.pod.options import PodOptions, TapOptions
from utils.runtime import distributed
from utils.types import Batch


class PseudoLabels(Part):
    """Old pixels take the teacher's opinion (--pseudo)."""

    needs_teacher = True
    state_key = "pseudo_labels"
    purpose = "thresholds"

    def __init__(self, opts: Namespace, task: Task):
        super().__init__(opts, task)
        self.mode, _ = pseudo.parse_mode(opts.pseudo)
        self.thresholds: Tensor | None = None

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """From step 1 on, with --pseudo; in a domain-incremental task nothing is unlabelled."""
        return opts.pseudo is not None and task.step > 0 and not task.domain

    @torch.no_grad()
    def begin_step(self, loader: TrainingBatches, teacher: nn.Module | None, device: torch.device) -> None:
        """Thresholds from the teacher's confidence on the background of the training set.

        The release lets every process read its own histogram; here the histogram is that of all processes.
        """
        if self.mode not in pseudo.MEASURES:
            return
        opts, task = self.opts, self.task
        medians = pseudo.MedianThresholds(task.num_old, task.num_total, pseudo.MEASURES[self.mode], opts.pseudo_nb_bins)
        weight = next(teacher.parameters())
        for images, labels in loader:
            logits = teacher(images.to(device, weight.dtype, non_blocking=True)).logits
            medians.update(logits, labels.to(device, non_blocking=True))
        self.thresholds = medians.finish(opts.threshold_of_step, opts.median == "exact", distributed.sum_)

    def prepare(self, batch: Batch, teacher: nn.Module | None) -> None:
        """Relabel the batch, and weigh its pixels."""
        opts, task = self.opts, self.task
        result = pseudo.relabel(
            batch.truth,
            batch.teacher.logits,
            task.num_total,
            opts.pseudo,
            self.thresholds,
            opts.pseudo_soft,
            opts.pseudo_ablation,
        )
        batch.labels, batch.pseudo_mask, batch.pixel_weights = result.labels, result.valid, result.pixel_weights
        if opts.classif_adaptive_factor and self.mode == "entropy":
            least, dtype = opts.classif_adaptive_min_factor, torch.promote_types(batch.images.dtype, torch.float32)
            factor = pseudo.adaptive_factor(result.valid, batch.truth, task.num_old, least, dtype)
            batch.pixel_weights = factor if batch.pixel_weights is None else factor * batch.pixel_weights

    def state_dict(self) -> dict[str, Any]:
        """The thresholds."""
        return {"thresholds": None if self.thresholds is None else self.thresholds.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the thresholds."""
        measured = self.mode in pseudo.MEASURES
        mine = {"thresholds": torch.zeros(self.task.num_total, dtype=torch.float64) if measured else None}
        structure.require_fit(mine, state, f"state/method/{self.state_key}")
        self.thresholds = state["thresholds"] if measured else None


def pod_options(opts: Namespace) -> PodOptions:
    """How each tap is compared, from --pod_options and the flags beside it.

    Args:
        opts: pod, pod_factor, pod_prepro, spp_scales, pod_apply, pod_deeplab_mask and companions, pod_options.

    Returns:
        Checked options.
    """
    default = TapOptions(
        type=opts.pod, factor=opts.pod_factor, prepro=opts.pod_prepro, spp_scales=tuple(opts.spp_scales)
    )
    return PodOptions.parse(
        opts.pod_options,
        default,
        apply=opts.pod_apply,
        deeplab_mask=opts.pod_deeplab_mask,
        deeplab_mask_factor=opts.pod_deeplab_mask_factor,
        deeplab_mask_downscale=opts.deeplab_mask_downscale,
        interpolate_last=opts.pod_interpolate_last,
    )


class PodDistillation(Part):
    """Pooled outputs distillation of the taps; LSKD brings its own (methods/lskd.py)."""

    needs_teacher = True

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """From step 1 on, with --pod and without LSKD's masks."""
        return opts.pod is not None and opts.mask_rule is None and task.step > 0

    def __init__(self, opts: Namespace, task: Task):
        super().__init__(opts, task)
        self.options = pod_options(opts)

    def taps(self, forward) -> tuple[Tensor, ...]:
        """Stages and pre_logits, then the logits that the flags ask for: small (--pod_logits), full-size, or none."""
        features = (*forward.attentions, forward.pre_logits)
        if self.opts.pod_logits:
            return (*features, forward.logits_small)
        return (*features, forward.logits) if self.opts.pod_large_logits else features

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """{"pod": mean over taps, scheduled}."""
        distances = pod.pod_terms(
            self.taps(batch.teacher), self.taps(batch.student), self.options, None, batch.labels, self.task.num_old
        )
        return {"pod": pod.pod_loss(distances, 1.0 if self.opts.no_pod_schedule else class_growth(self.task))}


PLOP_PRESET: dict[str, Any] = {
    "pod": "local",
    "pod_factor": 0.01,
    "pod_logits": True,
    "pseudo": "entropy",
    "threshold": 0.001,
    "classif_adaptive_factor": True,
    "init_balanced": True,
    "pod_options": {"switch": {"after": {"extra_channels": "sum", "factor": 0.0005, "type": "local"}}},
}


def _factors(pod_factor: float, logits_factor: float) -> dict[str, Any]:
    after = {"extra_channels": "sum", "factor": logits_factor, "type": "local"}
    return {"pod_factor": pod_factor, "pod_options": {"switch": {"after": after}}}


class PLOP(Method):
    """Learning without forgetting by pooled outputs and pseudo-labels."""

    name = "PLOP"
    paper = "Douillard et al., PLOP: Learning without Forgetting for Continual Semantic Segmentation, CVPR"
    year = 2021
    preset = PLOP_PRESET
    # Smaller factors on ADE; on Cityscapes domains every pixel has its label, so there is nothing to pseudo-label.
    task_presets = {("ade", task): _factors(0.001, 1e-5) for task in ("100-50", "100-10", "100-5", "50", None)} | {
        ("cityscapes_domain", task): _factors(1e-4, factor) | {"pseudo": None, "classif_adaptive_factor": False}
        for task, factor in (("offline", 1e-4), ("11-5", 1e-4), ("11-1", 1e-4), ("1-1", 1e-3), (None, 1e-4))
    }
