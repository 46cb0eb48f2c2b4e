"""LSKD: layer-specific knowledge distillation. Each tap has its own kind of distillation and its own weight.

With x the images, y the pseudo-labels, a and b a tap of teacher and student, and M a mask of the features that are distilled:

    views   x_o = x without its old pixels, x_n = x without its new ones; inputs of the teacher            (utils.masks)
    mask    M keeps features that change little without old pixels, or much without new pixels             (utils.masks)
    pod     local POD of a and b                                       stages 1, 2                         (utils.pod.terms)
    md      local POD of a·M and b·M                                   stages 3, 4, pre_logits, logits     (utils.loss)
    mcd     --mcd_factor · distance of second-order pooled a·M, b·M    pre_logits                          (utils.loss)
    ce, kd  cross entropy and unbiased distillation of outputs         (methods/ft.py, methods/lwf.py)
    loss    Σ λ_i ℓ_i, λ balanced by gradients (RGE)                   (utils.balance.equilibrium)

`--tap_schemes` sets none, pod, md, mcd or md+mcd for each of the six taps. The terms are neither scheduled as in PLOP nor averaged over
taps. At step 0 there is no teacher, and LSKD is plain training.

Reference: "Layer-Specific Knowledge Distillation for Class Incremental Semantic Segmentation", IEEE TIP 2024. Where its release differs
from its text, the docstring of the function says so.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dataset.tasks import Task
from methods.base import Method, Part, Rules
from methods.plop import PLOP, pod_options
from segmentation_module import HEAD_CHANNELS, SegmentationModel
from utils import loss, masks
from utils.balance.equilibrium import Balancer, Coefficients, GradientEquilibrium, TermSpec
from utils.errors import UserError
from utils.options.groups import option_group
from utils.options.rules import LARGE
from utils.pod import terms as pod
from utils.types import TAP_NAMES, Batch

#: Names of the erased views of the teacher.
WITHOUT_OLD, WITHOUT_NEW = "without_old", "without_new"

#: The taps whose λ should increase with depth, shallow first; not the logits.
DEPTH = TAP_NAMES[:5]
#: Index of the last tap, the small logits.
LAST_TAP = len(TAP_NAMES) - 1
#: RGE's group B, the shallow taps; all other terms are group A.
SHALLOW = TAP_NAMES[:3]


#: What `--tap_schemes` may give a tap, and the published choice.
SCHEMES = ("none", "pod", "md", "mcd", "md+mcd")
PUBLISHED_SCHEMES = ("pod", "pod", "md", "md", "md+mcd", "md")


def schemes(text: str) -> tuple[str, ...]:
    """A comma-separated list of distillation schemes, one a tap."""
    return tuple(part.strip() for part in text.split(","))


def check_masks(opts: Namespace) -> None:
    """Refuse unknown schemes, a mask rule that does not fit the distance, and other options that choose taps.

    Raises:
        UserError: names the option, its value and the remedy.
    """
    if wrong := [scheme for scheme in opts.tap_schemes if scheme not in SCHEMES]:
        raise UserError(f"--tap_schemes: {wrong[0][:80]!r} is no scheme; choose among {', '.join(SCHEMES)}")
    if len(opts.tap_schemes) != len(TAP_NAMES):
        raise UserError(
            f"--tap_schemes names {len(opts.tap_schemes)} schemes; give six: stages 1 to 4, pre_logits and logits"
        )
    masks.check_rule(opts.mask_rule, opts.mask_distance)
    if opts.mask_rule is None:
        return
    masked = f"--mask_rule {opts.mask_rule} (--sigmoid)"
    if opts.pod_apply != "all":
        raise UserError(
            f"{masked} and --pod_apply {opts.pod_apply} exclude each other; name the taps with --tap_schemes "
            "(none leaves a tap out)"
        )
    for dest in ("pod_deeplab_mask", "pod_large_logits"):
        if getattr(opts, dest):
            raise UserError(
                f"{masked} and --{dest} exclude each other: LSKD has masks and taps of its own; leave one out"
            )


class LayerSpecificDistillation(Part):
    """LSKD's distillation of features, and the balancer of its terms."""

    needs_teacher = True
    rules = Rules(
        ranges={
            "mcd_factor": (0, LARGE),
            "mcd_groups": (1, HEAD_CHANNELS),
            "rge_alpha": (0, LARGE),
            "rge_beta": (0, LARGE),
            "rge_gamma": (0, LARGE),
            "rge_interval": (1, 10**6),
        },
        requires=[("mask_rule", "--pod local", lambda o: o.pod == "local")],
        idle=[
            (
                "--mask_rule (--sigmoid)",
                lambda o: o.mask_rule is not None,
                [
                    "mcd_factor",
                    "mcd_groups",
                    "rge_alpha",
                    "rge_beta",
                    "rge_gamma",
                    "rge_interval",
                    "tap_schemes",
                    "balance",
                ],
            ),
            ("--balance rge", lambda o: o.balance == "rge", ["rge_alpha", "rge_beta", "rge_gamma", "rge_interval"]),
            ("--mask_rule whc", lambda o: o.mask_rule == "whc", ["channel_rule"]),
        ],
        later=[
            *("tap_schemes", "mcd_factor", "mcd_groups", "mask_distance", "mask_rule", "channel_rule"),
            *("rge_alpha", "rge_beta", "rge_gamma", "rge_interval", "balance"),
        ],
        check=check_masks,
    )

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Add the scheme of each tap, factors, masks and balance, each with its official name and a readable one."""
        add = option_group(parser, "layer-specific distillation (LSKD)").add_argument

        def named(official: str, readable: str, **rest: Any) -> None:
            add(f"--{official}", f"--{readable}", dest=readable, **rest)

        kinds = "six of none, pod, md, mcd, md+mcd, one for each tap"
        add("--tap_schemes", type=schemes, default=PUBLISHED_SCHEMES, help=kinds)
        named("aaaaaa", "mcd_factor", type=float, default=0.9, help="factor of context distillation")
        named("mmm", "mcd_groups", type=int, default=12, help="groups of channels in context distillation")
        distances = ["L1_mean", "mean_L1", "L2", "cos"]
        named("dis", "mask_distance", default=None, choices=distances, help="distance of the masks")
        rules = ["old", "newnone", "none", "gt", "whc"]
        named("sigmoid", "mask_rule", default=None, choices=rules, help="how distances become masks")
        answers = ["released", "mended"]
        add("--channel_rule", default="released", choices=answers, help="inequalities of whc's channel mask")
        add(
            "--balance",
            default="rge",
            choices=["rge", "sum"],
            help="weights of the terms: λ by gradient equilibrium, or ones",
        )
        meanings = {
            "alpha": "exponent of ρ",
            "beta": "factor of the penalty on the order of the taps' weights",
            "gamma": "factor of the penalty between cross entropy and distillation",
        }
        for letter, what in meanings.items():
            explained = f"gradient equilibrium: {what}"
            named(f"adaptive{letter}", f"rge_{letter}", type=float, default=0.5, help=explained)
        often = "gradient equilibrium: iterations from one measurement of the gradients to the next"
        add("--rge_interval", type=int, default=1, help=often)

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """From step 1 on, with --mask_rule (--sigmoid)."""
        return opts.mask_rule is not None and task.step > 0

    def __init__(self, opts: Namespace, task: Task):
        super().__init__(opts, task)
        self.pod_options = pod_options(opts)
        self.schemes = dict(zip(TAP_NAMES, opts.tap_schemes))
        #: (term, tap) in the order of λ: the context term is between cross entropy and distillation, as in the release.
        self.pooled = [
            (f"{part}/{tap}", tap)
            for tap, scheme in self.schemes.items()
            for part in scheme.split("+")
            if part in ("pod", "md")
        ]
        self.context = [(mcd_name(tap), tap) for tap, scheme in self.schemes.items() if "mcd" in scheme.split("+")]
        self.masked = [tap for tap, scheme in self.schemes.items() if scheme not in ("none", "pod")]
        if "mcd" in self.schemes["logits"].split("+") and opts.mcd_groups > task.num_old:
            raise UserError(
                f"--mmm {opts.mcd_groups} (--mcd_groups) does not split the {task.num_old} channels of the old logits, to which "
                f"--tap_schemes gives mcd; use a number from 1 to {task.num_old}"
            )

    def prepare(self, batch: Batch, teacher: nn.Module | None) -> None:
        """Compute the teacher's taps of the two erased views, in one forward pass."""
        if self.masked and self.opts.mask_rule != "gt":
            views = masks.erased_views(batch.images, batch.labels, self.task.num_old)
            assert teacher is not None
            features = teacher(torch.cat(views), full_size=False).features
            # Only taps with a mask are kept: the shallow ones, which have none, are the largest.
            taps = [tap.chunk(2) if name in self.masked else None for name, tap in zip(TAP_NAMES, features)]
            batch.teacher_views = {
                name: tuple(tap and tap[i] for tap in taps)  # 2·B → two of B
                for i, name in enumerate((WITHOUT_OLD, WITHOUT_NEW))
            }

    def mask(self, batch: Batch, tap: str) -> Tensor:
        """M of one tap; for the logits, whose channels are classes, without the channel mask."""
        index = TAP_NAMES.index(tap)
        views = None
        if batch.teacher_views:
            old, new = (batch.teacher_views[name][index] for name in (WITHOUT_OLD, WITHOUT_NEW))
            assert old is not None and new is not None, "the teacher's views are kept for the taps with a mask"
            views = (old, new)
        rule, distance = self.opts.mask_rule, self.opts.mask_distance
        features = batch.teacher.features[index]
        channels = None if tap == "logits" else self.opts.channel_rule
        return masks.tap_mask(features, views, batch.labels, self.task.num_old, rule, distance, channels)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Named terms of all taps: mcd, pod/stage1, …, md/logits."""
        masks_of_taps = {tap: self.mask(batch, tap) for tap in self.masked}
        taps = {
            tap: self.aligned(batch, tap, masks_of_taps.get(tap)) for tap in TAP_NAMES if self.schemes[tap] != "none"
        }
        named: dict[str, Tensor] = {}
        for name, tap in self.context:
            teacher, student, mask, _, _ = taps[tap]
            named[name] = self.opts.mcd_factor * loss.context_distillation(teacher, student, self.opts.mcd_groups, mask)
        for name, tap in self.pooled:
            teacher, student, mask, image_weights, factor = taps[tap]
            mask = mask if name.startswith("md/") else None
            options = self.pod_options.tap(TAP_NAMES.index(tap), LAST_TAP)
            named[name] = factor * loss.mask_guided_distillation(teacher, student, mask, options, image_weights)
        return named

    def aligned(self, batch: Batch, tap: str, mask: Tensor | None) -> pod.AlignedTap:
        """One tap of teacher and student with the same channels, and its factor."""
        index = TAP_NAMES.index(tap)
        options, place = self.pod_options.tap(index, LAST_TAP), self.pod_options.at(index, LAST_TAP)
        teacher, student = batch.teacher.features[index], batch.student.features[index]
        return pod.align_tap(teacher, student, mask, options, place, batch.labels, self.task.num_old)

    def term_specs(self) -> list[TermSpec]:
        """The context terms, measured at the head; then the terms of the taps, each measured at its tap."""
        context = [TermSpec(name) for name, _ in self.context]
        return context + [
            TermSpec(name, tap, "B" if tap in SHALLOW else "A", DEPTH.index(tap) if tap in DEPTH else None)
            for name, tap in self.pooled
        ]

    def make_balancer(self, model: SegmentationModel, specs: Sequence[TermSpec]) -> Balancer | None:
        """RGE over all terms of the run, in the official order: ce, mcd, kd, further terms, then the taps; None with --balance sum."""
        if self.opts.balance == "sum":
            return None
        of_taps = {name for name, _ in self.pooled}
        ordered = sorted(specs, key=lambda spec: spec.name in of_taps)
        watched = model.watched_weights()
        opts, task = self.opts, self.task
        coefficients = Coefficients(opts.rge_alpha, opts.rge_beta, opts.rge_gamma, opts.rge_interval)
        dtype = torch.promote_types(watched["pre_logits"].dtype, torch.float32)
        return GradientEquilibrium(ordered, watched, coefficients, task.num_new / task.num_old, dtype)


def mcd_name(tap: str) -> str:
    """Name of a tap's context term; the official one, on pre_logits, is plain "mcd"."""
    return "mcd" if tap == "pre_logits" else f"mcd/{tap}"


class LSKD(Method):
    """Layer-specific knowledge distillation: PLOP's flags, unbiased distillation, masks, context and RGE."""

    name = "LSKD"
    paper = "Layer-Specific Knowledge Distillation for Class Incremental Semantic Segmentation, IEEE TIP"
    year = 2024
    preset = PLOP.preset | {
        "unkd": True,
        "loss_kd": 10.0,
        "mask_distance": "cos",
        "mask_rule": "whc",
        "mcd_factor": 0.005,
        "mcd_groups": 20,
        "rge_alpha": 10.0,
        "rge_beta": 0.0001,
        "rge_gamma": 0.0005,
    }
    task_presets = PLOP.task_presets
