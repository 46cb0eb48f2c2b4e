"""PLOP: pseudo-labels for pixels that are annotated as background, and local POD on six taps.

pseudo-labels   an old pixel gets the class that the teacher predicts if the entropy of the prediction is below the class's threshold
                max(median over the training set, --threshold), and is ignored otherwise            (utils.pseudo)
ce              times the share of old pixels with a pseudo-label (--classif_adaptive_factor)      (methods/ft.py)
pod             mean over taps of factor · ‖pooled(a²) − pooled(b²)‖ · sqrt(C / C_new)             (utils.pod.terms)
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dataset.sampler import TrainingBatches
from dataset.tasks import Task
from methods.base import Method, Part, Rules
from methods.ft import class_growth
from utils import pseudo
from utils.balance.equilibrium import TermSpec
from utils.checkpointing import structure
from utils.errors import UserError
from utils.options.groups import add_switch, option_group
from utils.options.rules import LARGE
from utils.pod import terms as pod
from utils.pod.distance import PREPROCESS
from utils.pod.options import PodOptions, TapOptions, loads
from utils.runtime import distributed
from utils.types import Batch, Taps


class PseudoLabels(Part):
    """Replaces the labels of old pixels, which are annotated as background, by the teacher's predictions (--pseudo)."""

    needs_teacher = True
    state_key = "pseudo_labels"
    purpose = "thresholds"
    rules = Rules(
        ranges={
            "threshold": (0, 1),
            "step_threshold": (-1, 1),
            "pseudo_nb_bins": (1, 10**6),
            "classif_adaptive_min_factor": (0, 1),
            "pseudo_soft_factor": (0, LARGE),
        },
        one_of=[
            (["pseudo_soft", "bce", "unce", "focal_loss", "focal_loss_new"], "the classification loss"),
            (["pseudo_soft", "nca"], "the classification loss"),
            (["pseudo_soft", "icarl"], "the classification loss"),
            (["pseudo_soft", "ce_on_pseudo", "ce_on_new"], "the pixels of the cross entropy"),
        ],
        requires=[
            (dest, "--pseudo entropy", lambda o: o.pseudo == "entropy")
            for dest in ("ce_on_pseudo", "pseudo_soft", "pseudo_ablation")
        ],
        idle=[
            ("--pseudo entropy", lambda o: o.pseudo == "entropy", ["classif_adaptive_factor"]),
            ("--classif_adaptive_factor", lambda o: o.classif_adaptive_factor, ["classif_adaptive_min_factor"]),
            (
                "--pseudo entropy or median",
                lambda o: o.pseudo in pseudo.MEASURES,
                ["threshold", "step_threshold", "pseudo_nb_bins", "median"],
            ),
            ("--pseudo_soft", lambda o: o.pseudo_soft is not None, ["pseudo_soft_factor", "soft_loss"]),
            (
                "--data_masking current+old",
                lambda o: o.data_masking == "current+old" or o.no_mask,
                ["pseudo_ablation"],
            ),
        ],
        later=[
            *("pseudo", "threshold", "step_threshold", "pseudo_nb_bins", "median", "ce_on_pseudo"),
            *("classif_adaptive_factor", "classif_adaptive_min_factor"),
            *("pseudo_soft", "pseudo_soft_factor", "soft_loss", "pseudo_ablation"),
        ],
        nothing_at_step_0={"pseudo": "has nothing to label at step 0: there is no earlier model"},
        classes_only={"pseudo": lambda mode: mode is not None},
        check=lambda o: pseudo.parse_mode(o.pseudo),
    )

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Add the kind of pseudo-labels, their thresholds, and their use in the classification loss."""
        group = option_group(parser, "pseudo-labels")
        add, switch = group.add_argument, partial(add_switch, group)
        modes = "naive, confidence, threshold_X (0 <= X <= 1), median or entropy"
        add("--pseudo", type=str, default=None, help=modes)
        bounds = "least entropy threshold, or greatest probability threshold"
        add("--threshold", type=float, default=0.9, help=bounds)
        add("--step_threshold", type=float, default=None, help="added to the threshold with every step")
        bins = "bins of the histogram; none: 100 for entropy, 20 for median"
        add("--pseudo_nb_bins", type=int, default=None, help=bins)
        ways = ["released", "exact"]
        add("--median", default="released", choices=ways, help="read-out of the median from the histogram")
        switch("--classif_adaptive_factor", help="scale the classification by the share of valid pseudo-labels")
        add("--classif_adaptive_min_factor", type=float, default=0.0, help="least such factor")
        switch("--ce_on_pseudo", help="cross entropy on pseudo-labels, unbiased cross entropy elsewhere")
        soft = ["soft_certain", "soft_uncertain"]
        pixels = "soft labels on certain, or on uncertain, pixels"
        add("--pseudo_soft", type=str, default=None, choices=soft, help=pixels)
        add("--pseudo_soft_factor", type=float, default=1.0, help="factor of the loss of soft labels")
        swapped = "soft labels: as released, where teacher and student have changed places, or a cross entropy"
        add("--soft_loss", default="released", choices=["released", "mended"], help=swapped)
        errors = ["corrected_errors", "removed_errors"]
        add("--pseudo_ablation", default=None, choices=errors, help="ablation: mend or drop wrong pseudo-labels")

    def __init__(self, opts: Namespace, task: Task):
        super().__init__(opts, task)
        self.mode, _ = pseudo.parse_mode(opts.pseudo)
        self.thresholds: Tensor | None = None

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """From step 1 on, with --pseudo; not in a domain-incremental task, where all pixels are labelled."""
        return opts.pseudo is not None and task.step > 0 and not task.domain

    @torch.no_grad()
    def begin_step(self, loader: TrainingBatches, teacher: nn.Module | None, device: torch.device) -> None:
        """Thresholds from the teacher's confidence on the background of the training set.

        In the release every process uses its own histogram; here the histograms of all processes are added.
        """
        if self.mode not in pseudo.MEASURES:
            return
        opts, task = self.opts, self.task
        threshold = opts.threshold + task.step * (opts.step_threshold or 0.0)
        medians = pseudo.MedianThresholds(task.num_old, task.num_total, pseudo.MEASURES[self.mode], opts.pseudo_nb_bins)
        assert teacher is not None
        weight = next(teacher.parameters())
        for images, labels in loader:
            logits = teacher(images.to(device, weight.dtype, non_blocking=True)).logits
            medians.update(logits, labels.to(device, non_blocking=True))
        self.thresholds = medians.finish(threshold, opts.median == "exact", distributed.sum_)

    def prepare(self, batch: Batch, teacher: nn.Module | None) -> None:
        """Replace the labels of the batch, and set the weights of its pixels."""
        opts, task = self.opts, self.task
        if self.thresholds is not None:
            self.thresholds = self.thresholds.to(batch.truth.device)  # after a resume they are on the CPU
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
            damping = 0.0 if opts.csw_kd > 0 else pseudo.DAMPING  # REMINDER has none (methods/reminder.py)
            factor = pseudo.adaptive_factor(result.valid, batch.truth, task.num_old, least, dtype, damping)
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
        opts: pod, pod_factor, pod_prepro, spp_scales, pod_apply, pod_options, and the options whose names begin with pod_deeplab_mask.

    Returns:
        Checked options.
    """
    default = TapOptions(
        opts.pod or "local", factor=opts.pod_factor, prepro=opts.pod_prepro, spp_scales=tuple(opts.spp_scales)
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


def check_pod_options(opts: Namespace) -> None:
    """Refuse misspelt keys and values in `--pod_options`, which the official program ignores silently.

    Raises:
        UserError: an unknown key or value, or a factor below 0.
    """
    options = pod_options(opts)
    for place, taps in (("before", options.before), ("after", options.after)):
        if not 0 <= taps.factor <= LARGE:
            raise UserError(
                f"--pod_options: the factor {taps.factor:.10g} of {place!r} is out of range; give one from 0"
            )


class PodDistillation(Part):
    """Distillation of the taps by pooled outputs (POD). LSKD has its own part (methods/lskd.py)."""

    needs_teacher = True
    rules = Rules(
        ranges={
            "pod_factor": (0, LARGE),
            "pod_coef": (0, LARGE),
            "pod_deeplab_mask_factor": (0, LARGE),
            "spp_scales": (1, 2**12),
        },
        choices={"pod_prepro": tuple(PREPROCESS)},
        requires=[
            (dest, "--pod", lambda o: o.pod is not None)
            for dest in ("pod_logits", "pod_large_logits", "pod_deeplab_mask", "pod_options")
        ],
        idle=[
            (
                "--pod",
                lambda o: o.pod is not None,
                ["pod_factor", "pod_prepro", "pod_apply", "pod_interpolate_last"],
            ),
            (
                "--pod without --mask_rule",
                lambda o: o.pod is not None and o.mask_rule is None,
                ["no_pod_schedule", "pod_coef"],
            ),
            ("--pod without --pod_logits", lambda o: not o.pod_logits, ["pod_large_logits"]),
            ("--pod local or global", lambda o: o.pod in ("local", "global"), ["spp_scales"]),
            (
                "--pod_deeplab_mask",
                lambda o: o.pod_deeplab_mask,
                ["pod_deeplab_mask_factor", "deeplab_mask_downscale"],
            ),
        ],
        later=[
            *(
                "pod",
                "pod_factor",
                "pod_coef",
                "pod_options",
                "pod_prepro",
                "no_pod_schedule",
                "pod_apply",
                "spp_scales",
            ),
            *("pod_deeplab_mask", "pod_deeplab_mask_factor", "deeplab_mask_downscale", "pod_interpolate_last"),
            *("pod_logits", "pod_large_logits"),
        ],
        check=check_pod_options,
    )

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Add the choice of the taps, their pooling and their comparison."""
        group = option_group(parser, "distillation of features (POD)")
        add, switch = group.add_argument, partial(add_switch, group)
        kinds = ["spatial", "local", "global"]
        add("--pod", type=str, default=None, choices=kinds, help="pooling of the features")
        add("--pod_factor", type=float, default=5.0, help="factor of the distillation")
        add("--pod_coef", type=float, default=1.0, help="factor of the whole term, as in NeST's release")
        add("--pod_options", type=loads, default=None, help='JSON: {"switch": {"before": {...}, "after": {...}}}')
        add("--pod_prepro", type=str, default="pow", help="applied to features first: pow, none, abs or relu")
        switch("--no_pod_schedule", help="no factor sqrt(classes / new classes)")
        places = ["all", "backbone", "deeplab"]
        add("--pod_apply", type=str, default="all", choices=places, help="taps that are distilled")
        switch("--pod_deeplab_mask", help="mask the head's features by the pixels of old classes")
        add("--pod_deeplab_mask_factor", type=float, default=None, help="factor of the masked features")
        shrink = "shrink the mask to the features, not the features' images to the mask"
        switch("--deeplab_mask_downscale", help=shrink)
        switch("--pod_interpolate_last", help="interpolate the last tap to the size of the others")
        switch("--pod_logits", help="also distil the small logits")
        switch("--pod_large_logits", help="also distil the full-size logits")
        scales = "scales of local POD: cells a side"
        add("--spp_scales", type=int, default=[1, 2, 4], nargs="+", help=scales)

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """From step 1 on, with --pod and without LSKD's masks."""
        return opts.pod is not None and opts.mask_rule is None and task.step > 0

    def __init__(self, opts: Namespace, task: Task):
        super().__init__(opts, task)
        self.options = pod_options(opts)

    def taps(self, forward: Taps) -> tuple[Tensor, ...]:
        """The taps that are compared: stages, pre_logits, and small (--pod_logits), full-size (--pod_large_logits) or no logits."""
        features = (*forward.attentions, forward.pre_logits)
        if self.opts.pod_logits:
            return (*features, forward.logits_small)
        return (*features, forward.logits) if self.opts.pod_large_logits else features

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """{"pod": mean over taps, times the factor of the schedule}."""
        distances = pod.pod_terms(
            self.taps(batch.teacher), self.taps(batch.student), self.options, None, batch.labels, self.task.num_old
        )
        schedule = 1.0 if self.opts.no_pod_schedule else class_growth(self.task)
        return {"pod": pod.pod_loss(distances, schedule * self.opts.pod_coef)}

    def term_specs(self) -> list[TermSpec]:
        """The mean over the taps, measured at the head."""
        return [TermSpec("pod")]


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
    # Smaller factors on ADE. In the tasks of Cityscapes every pixel has a label, so they need no pseudo-labels.
    task_presets = {("ade", task): _factors(0.001, 1e-5) for task in ("100-50", "100-10", "100-5", "50", None)} | {
        ("cityscapes_domain", task): _factors(1e-4, factor) | {"pseudo": None, "classif_adaptive_factor": False}
        for task, factor in (("offline", 1e-4), ("11-5", 1e-4), ("11-1", 1e-4), ("1-1", 1e-3), (None, 1e-4))
    }
