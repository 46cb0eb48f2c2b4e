"""FT: plain fine-tuning, and the classification losses that all methods share.

ce        cross entropy on the (pseudo-)labels, per pixel, times the pixel weights, mean over all pixels, times --ce_factor
entropy   --entropy_min: the student's own entropy on background pixels
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dataset.sampler import TrainingBatches
from dataset.tasks import Task
from methods.base import Method, Part, Previous, Rules
from modules.classifier import FUSIONS
from segmentation_module import SegmentationModel
from utils import loss, pseudo
from utils.balance.equilibrium import TermSpec
from utils.options.groups import add_switch, option_group
from utils.options.rules import LARGE
from utils.runtime import distributed
from utils.types import IGNORE, Batch


class Classification(Part):
    """The classification loss that the flags choose.

    Reference: cross entropy is the default; MiB (CVPR 2020) for --unce; focal loss (Lin et al., ICCV 2017); NCA (PODNet, ECCV 2020).
    iCaRL's disjoint loss replaces it altogether (methods/lwf_mc.py).
    """

    rules = Rules(
        ranges={
            "focal_loss_gamma": (0, 100),
            "nca_margin": (-LARGE, LARGE),
            "sample_weights_new": (0, LARGE),
            "ce_factor": (0, LARGE),
        },
        one_of=[
            (["bce", "unce", "focal_loss", "focal_loss_new"], "the classification loss"),
            (["bce", "nca", "focal_loss", "focal_loss_new"], "the classification loss"),
        ],
        requires=[("nca", "--cosine", lambda o: o.cosine)],
        idle=[
            ("--focal_loss or --focal_loss_new", lambda o: o.focal_loss or o.focal_loss_new, ["focal_loss_gamma"]),
            ("--nca", lambda o: o.nca, ["nca_margin"]),
        ],
        later=["unce", "focal_loss_new"],
        classes_only={"ce_on_new": bool, "sample_weights_new": lambda weight: weight is not None},
    )

    def __init__(self, opts: Namespace, task: Task):
        super().__init__(opts, task)
        self.cosine_scale: Tensor | float = 1.0

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Add the kinds of the classification loss and their parameters."""
        group = option_group(parser, "classification loss")
        add_switch(group, "--bce", help="binary cross entropy")
        add_switch(group, "--unce", help="unbiased cross entropy: background stands for all old classes (MiB)")
        add_switch(group, "--focal_loss", help="focal loss")
        add_switch(group, "--focal_loss_new", help="focal loss on new classes only")
        group.add_argument("--focal_loss_gamma", type=int, default=2, help="exponent of the focal losses")
        add_switch(group, "--nca", help="NCA loss, for a cosine classifier")
        group.add_argument("--nca_margin", type=float, default=0.0, help="margin of the NCA loss")
        add_switch(group, "--ce_on_new", help="cross entropy on the pixels of new classes only")
        group.add_argument("--sample_weights_new", type=float, default=None, help="weight of new-class pixels")
        names = ("--ppp", "--ce_factor")
        group.add_argument(*names, dest="ce_factor", type=float, default=1.0, help="factor of the cross entropy")

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """Always, unless iCaRL's disjoint loss or ALIFE's loss replaces it."""
        replaced = (opts.icarl and opts.icarl_disjoint) or opts.ali_factor is not None
        return not (replaced and task.step > 0)

    def attach(self, model: SegmentationModel, teacher: nn.Module | None, previous: Previous) -> None:
        """Keep the scale of a cosine classifier: the logits are cosines times this scale, and `--nca_margin` is a cosine."""
        self.cosine_scale = 1.0 if model.cls.scalar is None else model.cls.scalar

    def term_specs(self) -> list[TermSpec]:
        """The cross entropy, measured at the head."""
        return [TermSpec("ce")]

    def criterion(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss that the flags choose, a function of logits (B, C, H, W) and labels (B, H, W) that returns (B, H, W)."""
        # Where no class is added (domains) the background contains no old class
        opts, old = self.opts, self.task.num_old if self.task.num_new else 0
        if opts.bce or opts.icarl:
            return loss.binary_cross_entropy
        if opts.nca:
            margin = opts.nca_margin * self.cosine_scale
            if old and opts.unce:
                return lambda logits, labels: loss.unbiased_nca(logits, labels, old, margin=margin)
            return lambda logits, labels: loss.nca(logits, labels, margin=margin)
        if opts.unce and old:
            return lambda logits, labels: loss.unbiased_cross_entropy(logits, labels, old)
        if opts.focal_loss:
            return lambda logits, labels: loss.focal(logits, labels, gamma=opts.focal_loss_gamma, alpha=opts.alpha)
        if opts.focal_loss_new and old:
            return lambda logits, labels: loss.unbiased_focal(
                logits, labels, old, gamma=opts.focal_loss_gamma, alpha=opts.alpha
            )
        return loss.cross_entropy

    def per_pixel(self, batch: Batch) -> Tensor:
        """(B, H, W) loss before pixel weights."""
        logits, old = batch.student.logits, self.task.num_old
        if self.opts.pseudo_soft is not None and batch.teacher is not None:
            assert batch.pseudo_mask is not None, "--pseudo_soft needs pseudo-labels"
            certain = pseudo.certain_pixels(batch.truth, batch.pseudo_mask, old, self.opts.pseudo_soft)
            factor, mended = self.opts.pseudo_soft_factor, self.opts.soft_loss == "mended"
            return loss.soft_cross_entropy(logits, batch.labels, batch.teacher.logits, certain, factor, mended)
        if self.opts.ce_on_pseudo and batch.pseudo_mask is not None:
            # Cross entropy with the pseudo-labels on confident old pixels, the criterion with the annotation on all others
            chosen = batch.labels.masked_fill(~batch.pseudo_mask, IGNORE)
            rest = batch.truth.masked_fill(batch.pseudo_mask, IGNORE)
            return loss.cross_entropy(logits, chosen) + self.criterion()(logits, rest)
        labels = batch.labels
        if self.opts.ce_on_new:
            labels = labels.masked_fill(labels == 0, IGNORE)
        return self.criterion()(logits, labels)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """{"ce": mean over all pixels, ignored ones counted as 0, as released}."""
        value = self.per_pixel(batch)
        if batch.pixel_weights is not None:
            value = value * batch.pixel_weights.to(value.dtype)
        if self.opts.sample_weights_new is not None:
            new = (batch.truth >= self.task.num_old) & (batch.truth != IGNORE)
            value = torch.where(new, self.opts.sample_weights_new * value, value)
        return {"ce": self.opts.ce_factor * value.mean()}


class EntropyMinimisation(Part):
    """Minimise the entropy of predictions on background pixels."""

    rules = Rules(
        ranges={"entropy_min": (0, LARGE)},
        idle=[("--entropy_min above 0", lambda o: o.entropy_min > 0, ["entropy_min_mean_pixels"])],
        later=["entropy_min", "entropy_min_mean_pixels"],
        classes_only={"entropy_min": bool},
    )

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Add the factor, and the choice of the mean."""
        group = option_group(parser, "classification loss")
        group.add_argument("--entropy_min", type=float, default=0.0, help="factor of entropy minimisation")
        add_switch(group, "--entropy_min_mean_pixels", help="entropy minimisation averages over pixels")

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """From step 1 on, with --entropy_min."""
        return opts.entropy_min > 0 and task.step > 0

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """{"entropy": factor · mean entropy}."""
        value = loss.entropy_minimisation(batch.student.logits, batch.labels, self.opts.entropy_min_mean_pixels)
        return {"entropy": self.opts.entropy_min * value}

    def term_specs(self) -> list[TermSpec]:
        """The entropy, measured at the head."""
        return [TermSpec("entropy")]


class WeightAlignment(Part):
    """Rescale the new classifier's weights to the norm of earlier ones, after every validation or before the test.

    Reference: Zhao et al., "Maintaining Discrimination and Fairness in Class Incremental Learning" (WA), CVPR 2020. The moments are
        those of PLOP's release: "task" aligns the weights for the test alone and does not change the checkpoint.
    """

    rules = Rules(
        requires=[
            (
                "align_weight",
                "--align_weight_frequency epoch or task",
                lambda o: o.align_weight_frequency != "never",
            ),
            (
                "align_weight_frequency",
                "--align_weight",
                lambda o: o.align_weight is not None or o.align_weight_frequency == "never",
            ),
        ],
        later=["align_weight", "align_weight_frequency"],
        classes_only={"align_weight": bool},
    )

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Add the choice of the reference weights and of the moment."""
        add = option_group(parser, "classifier").add_argument
        what = ["old", "background", "all"]
        add("--align_weight", default=None, choices=what, help="weights whose norms are aligned")
        often = ["never", "epoch", "task"]
        add(
            "--align_weight_frequency",
            default="never",
            choices=often,
            help="after each validation, or for the test only",
        )

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """From step 1 on, with --align_weight."""
        return opts.align_weight is not None and task.step > 0 and not task.domain

    def end_validation(self, model: SegmentationModel) -> None:
        """Align, with --align_weight_frequency epoch."""
        if self.opts.align_weight_frequency == "epoch":
            model.align_weight(self.opts.align_weight)

    def begin_test(self, model: SegmentationModel) -> None:
        """Align, with --align_weight_frequency task."""
        if self.opts.align_weight_frequency == "task":
            model.align_weight(self.opts.align_weight)


class BackgroundModes(Part):
    """Start the new classes from the background modes that respond to them (--init_multimodal)."""

    purpose = "initialisation"
    rules = Rules(
        ranges={"nb_background_modes": (1, 1000)},
        choices={"multimodal_fusion": tuple(FUSIONS)},
        exclusive=[
            (
                "--cosine",
                lambda o: o.cosine,
                "--nb_background_modes {nb_background_modes} (a cosine classifier has one background)",
                lambda o: o.nb_background_modes > 1,
            )
        ],
        requires=[("init_multimodal", "--nb_background_modes above 1", lambda o: o.nb_background_modes > 1)],
        idle=[
            ("--nb_background_modes above 1", lambda o: o.nb_background_modes > 1, ["multimodal_fusion"]),
            ("no --init_balanced, which wins", lambda o: not o.init_balanced, ["init_multimodal"]),
        ],
        later=["init_multimodal"],
        classes_only={"nb_background_modes": lambda modes: modes > 1},
    )

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Add the number of modes, their fusion, and the initialisation of new classes from them."""
        add = option_group(parser, "classifier").add_argument
        add("--nb_background_modes", type=int, default=1, help="background channels of the first classifier")
        modes = ["max", "softmax", "max_init", "softmax_init", "softmax_remove", "max_remove"]
        add("--init_multimodal", type=str, default=None, choices=modes, help="how modes start new classifiers")
        add(
            "--multimodal_fusion",
            type=str,
            default="sum",
            help="background modes become one by: sum, mean, max or softmax",
        )

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """From step 1 on, with several background modes and without --init_balanced, as in the official program."""
        wanted = opts.nb_background_modes > 1 and opts.init_multimodal is not None and not opts.init_balanced
        return wanted and task.step > 0 and not task.domain

    @torch.no_grad()
    def init_classifier(
        self, model: SegmentationModel, teacher: nn.Module | None, loader: TrainingBatches, device: torch.device
    ) -> None:
        """Measure in one pass over the images which modes respond to each new class, and initialise the classes from these modes."""
        classifiers, how = model.cls, self.opts.init_multimodal
        was_training = model.training
        model.eval()
        votes = classifiers[0].weight.new_zeros(classifiers.num_new, classifiers.background_modes)
        for images, labels in loader:
            features = model(images.to(votes), full_size=False).pre_logits
            votes += classifiers.mode_votes(features, labels.to(device), how)
        classifiers.init_from_modes(distributed.sum_(votes), how)
        model.train(was_training)


def class_growth(task: Task) -> float:
    """sqrt(C / C_new), the schedule of the PLOP family; 1 where no class is added."""
    return math.sqrt(task.num_total / task.num_new) if task.num_new else 1.0


class FT(Method):
    """Fine-tuning, without a preset. The official scripts run PLOP and LSKD as FT with their flags."""

    name = "FT"
    paper = "fine-tuning, the lower bound, as in MiB"
    year = 2020
