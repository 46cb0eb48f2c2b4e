"""SDR: MiB's losses, and four losses of the body's features: attraction, repulsion, matching with prototypes, and sparsity.

With ỹ the labels at the size of the body's output and P the running mean feature of each class (prototypes)    (utils.latent_space)

    attraction  --loss_fc · distance of the features of each class from its prototype                             step ≥ 1
    repulsion   --lfc_sep_clust · mean over pairs of classes of 1 / distance of their mean features in the batch  step ≥ 1
    matching    --loss_de_prototypes · distance of what the teacher takes for old classes from their prototypes   step ≥ 1
    sparsity    --loss_featspars · how evenly a position's features are spread over the channels                  every step

P and the numbers of features behind it are the state of the part in the checkpoint. They are updated in every iteration of every step,
with the features of all processes (in the release each process has its own), if one of the first three losses is on. Step 0 must store
them: --method SDR, or --unce --loss_de_prototypes 1 as in the official script. The new classifier starts from PyTorch's own values.

The published numbers were obtained with errors in the release; --sdr_mend corrects the ones that are named:
    reshape     features of a class are reshaped to a matrix without a transpose, which mixes images and channels
    mean        the attraction divides its running sum by the number of classes at every class
    background  the smallest class of the batch is left out, where it should be the background
    ignore      the normalisation of the sparsity takes 255 as a class

Reference: "Continual Semantic Segmentation via Repulsion-Attraction of Sparse and Disentangled Latent Representations", CVPR 2021.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

import torch
from torch import Tensor, nn

from dataset.tasks import Task
from methods.base import Method, Part, Previous, Rules
from segmentation_module import SegmentationModel
from utils import latent_space
from utils.balance.equilibrium import TermSpec
from utils.checkpointing import structure
from utils.errors import UserError
from utils.options.groups import add_switch, option_group
from utils.options.rules import LARGE
from utils.runtime import distributed
from utils.types import Batch

#: Errors of the release that --sdr_mend corrects.
SLIPS = ("reshape", "mean", "background", "ignore")
#: Title of the options in the help.
GROUP = "latent space (SDR)"


def mends(opts: Namespace, slip: str) -> bool:
    """Whether `--sdr_mend` names this error."""
    return slip in (opts.sdr_mend or ())


def needs_prototypes(opts: Namespace) -> bool:
    """Whether a term that reads prototypes is on."""
    return max(opts.loss_fc, opts.lfc_sep_clust, opts.loss_de_prototypes) > 0


class LatentPrototypes(Part):
    """Attraction, repulsion and matching, and the running class means that they use."""

    needs_teacher = True
    gated = True
    state_key = "sdr"
    rules = Rules(
        ranges={"loss_fc": (0, LARGE), "lfc_sep_clust": (0, LARGE), "loss_de_prototypes": (0, LARGE)},
        idle=[
            ("--loss_fc or --lfc_sep_clust", lambda o: o.loss_fc > 0 or o.lfc_sep_clust > 0, ["lfc_nobgr"]),
            ("--loss_de_prototypes above 0", lambda o: o.loss_de_prototypes > 0, ["loss_de_prototypes_sumafter"]),
            (
                "a loss of SDR, such as --loss_fc",
                lambda o: needs_prototypes(o) or o.loss_featspars > 0,
                ["sdr_mend"],
            ),
        ],
        later=["lfc_nobgr", "loss_de_prototypes_sumafter"],
        classes_only=dict.fromkeys(("loss_fc", "lfc_sep_clust", "loss_de_prototypes"), bool),
    )

    def __init__(self, opts: Namespace, task: Task):
        super().__init__(opts, task)
        self.prototypes = torch.zeros(0)
        self.counts = torch.zeros(0, dtype=torch.int64)
        self.pending: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Add the factors, and the choice of corrections."""
        group = option_group(parser, GROUP)
        add = group.add_argument
        add(
            "--loss_fc", type=float, default=0.0, help="factor of the attraction of features to their class's prototype"
        )
        add("--lfc_sep_clust", type=float, default=0.0, help="factor of the repulsion of the classes' mean features")
        add_switch(group, "--lfc_nobgr", help="attraction and repulsion without the smallest class of the batch")
        add("--loss_de_prototypes", type=float, default=0.0, help="factor of the matching of prototypes")
        add_switch(
            group, "--loss_de_prototypes_sumafter", help="match mean features with prototypes, not every feature"
        )
        add("--sdr_mend", nargs="+", default=None, choices=SLIPS, help="slips of the release that are corrected")

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """At every step, if a loss reads prototypes: step 0 stores the first ones."""
        return needs_prototypes(opts) and not task.domain

    def attach(self, model: SegmentationModel, teacher: nn.Module | None, previous: Previous) -> None:
        """Read the prototypes of step t−1, and add zeros for the new classes.

        Raises:
            UserError: step t−1 stored no prototypes, or those of another shape.
        """
        old, channels = self.task.num_old, model.body.out_channels
        device = next(model.parameters()).device
        self.prototypes = torch.zeros(self.task.num_total, channels, dtype=torch.float64, device=device)
        self.counts = torch.zeros(self.task.num_total, dtype=torch.int64, device=device)
        if old == 0:
            return
        prototypes, counts = (previous.entry(name) for name in ("prototypes", "count_features"))
        if prototypes is None or counts is None:
            raise UserError(
                f"--loss_fc, --lfc_sep_clust and --loss_de_prototypes need the class prototypes of step {self.task.step - 1}, but "
                f"{previous.file} has none: it was trained without them; train it again with --method SDR, or with --unce "
                "--loss_de_prototypes 1"
            )
        if not (_is_like(prototypes, (old, channels), True) and _is_like(counts, (old,), False)):
            raise UserError(
                f"--loss_fc, --lfc_sep_clust and --loss_de_prototypes: the prototypes in {previous.file} are not {old} rows of "
                f"{channels} finite numbers with their counts; train that step again"
            )
        self.prototypes[:old], self.counts[:old] = prototypes.to(self.prototypes), counts.to(self.counts)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """{"attraction", "repulsion", "matching"}, those with a factor, from step 1 on.

        The losses use the updated prototypes. `after_step` stores them, so an iteration that is skipped does not change them.
        """
        opts, features = self.opts, batch.student.body
        labels = latent_space.at_size(batch.truth, features.shape[-2:])
        prototypes, _ = self.pending = self._updated(features.detach(), labels)
        if self.task.step == 0:
            return {}
        exact = mends(opts, "reshape")
        without = self._background() if opts.lfc_nobgr else None
        named = {}
        if opts.loss_fc > 0:
            value = latent_space.attraction(features, labels, prototypes, without, exact, mends(opts, "mean"))
            named["attraction"] = opts.loss_fc * value
        if opts.lfc_sep_clust > 0:
            value = latent_space.repulsion(features, labels, without, exact, self.task.num_total)
            named["repulsion"] = opts.lfc_sep_clust * value
        if opts.loss_de_prototypes > 0:
            old = latent_space.old_labels(labels, batch.teacher.logits, opts.no_mask)
            sum_after = opts.loss_de_prototypes_sumafter
            value = latent_space.prototype_matching(features, old, prototypes, sum_after, exact)
            named["matching"] = opts.loss_de_prototypes * value
        return named

    def _background(self) -> str:
        """Which class is left out as the background: a choice of `utils.latent_space`."""
        return "background" if mends(self.opts, "background") else "first"

    @torch.no_grad()
    def _updated(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Prototypes and counts, updated with this batch of all processes."""
        opts, task = self.opts, self.task
        sums, numbers = latent_space.class_sums(features, labels, task.num_total, mends(opts, "reshape"))
        joined = distributed.sum_(torch.cat([sums, numbers[:, None]], dim=1).double())  # (C, D+1)
        left_out = latent_space.leaves_background_out(task.step, opts.overlap, opts.no_mask)
        skip = self._background() if left_out else None
        return latent_space.updated_prototypes(self.prototypes, self.counts, joined[:, :-1], joined[:, -1].long(), skip)

    def after_step(self, model: SegmentationModel, batch: Batch) -> None:
        """Store the updated prototypes. Not called for an iteration that is skipped as not finite, or undone by the trainer."""
        assert self.pending is not None, "`terms` is called before"
        self.prototypes, self.counts = self.pending

    def term_specs(self) -> list[TermSpec]:
        """The terms, measured at the last stage of the body, whose output they are computed from."""
        factors = {
            "attraction": self.opts.loss_fc,
            "repulsion": self.opts.lfc_sep_clust,
            "matching": self.opts.loss_de_prototypes,
        }
        return [TermSpec(name, "stage4") for name, factor in factors.items() if factor > 0 and self.task.step]

    def remedies(self) -> dict[str, str]:
        """Advice for terms that diverge."""
        flags = {"attraction": "--loss_fc", "repulsion": "--lfc_sep_clust", "matching": "--loss_de_prototypes"}
        return {name: f"lower --lr or {flag}" for name, flag in flags.items()}

    def state_dict(self) -> dict[str, Any]:
        """Prototypes, and the numbers of features that they are means of."""
        return {"prototypes": self.prototypes.cpu(), "count_features": self.counts.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore prototypes and numbers."""
        structure.require_fit(self.state_dict(), state, f"state/method/{self.state_key}")
        self.prototypes, self.counts = state["prototypes"].to(self.prototypes), state["count_features"].to(self.counts)


def _is_like(value: object, shape: tuple[int, ...], floating: bool) -> bool:
    """Whether a value is a tensor of that shape: of finite floating point numbers, or (not floating) of integers from 0."""
    if not isinstance(value, Tensor) or value.shape != shape or value.is_floating_point() != floating:
        return False
    return bool(value.isfinite().all()) and (floating or bool((value >= 0).all()))


class Sparsity(Part):
    """Sparsity: at each position few channels should have large values."""

    rules = Rules(
        ranges={"loss_featspars": (0, LARGE)},
        idle=[
            ("--loss_featspars above 0", lambda o: o.loss_featspars > 0, ["lfs_normalization", "lfs_shrinkingfn"]),
        ],
        advice=[
            (
                "--loss_featspars {loss_featspars} divides by the sum of the features of a position. The last stage of mobilenet_v2 has "
                "no activation, so its features sum to about 0 and the loss diverges; give --loss_featspars 0, or another --backbone",
                lambda o: o.loss_featspars > 0 and o.backbone == "mobilenet_v2",
            )
        ],
        classes_only={"loss_featspars": bool},
    )

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Add the factor and the form of the loss."""
        group = option_group(parser, GROUP)
        add = group.add_argument
        add("--loss_featspars", type=float, default=0.0, help="factor of the sparsity of features, at every step")
        add(
            "--lfs_normalization",
            default="max_maskedforclass",
            choices=latent_space.NORMALISATIONS,
            help="features are divided by the largest of their class in the batch, or of their position",
        )
        add(
            "--lfs_shrinkingfn",
            default="exponential",
            choices=latent_space.SHRINKINGS,
            help="function of the normalised features that is compared with their sum",
        )

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """At every step, with --loss_featspars."""
        return opts.loss_featspars > 0 and not task.domain

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """{"sparsity": scalar}."""
        opts, features = self.opts, batch.student.body
        labels = latent_space.at_size(batch.truth, features.shape[-2:])
        ignore = mends(opts, "ignore")
        value = latent_space.sparsity(features, labels, opts.lfs_normalization, opts.lfs_shrinkingfn, ignore)
        return {"sparsity": opts.loss_featspars * value}

    def term_specs(self) -> list[TermSpec]:
        """The sparsity, measured at the last stage of the body."""
        return [TermSpec("sparsity", "stage4")]

    def remedies(self) -> dict[str, str]:
        """Advice for a sparsity that diverges."""
        return {"sparsity": "lower --lr or --loss_featspars"}


class SDR(Method):
    """Sparse and disentangled representations."""

    name = "SDR"
    paper = (
        "Michieli and Zanuttigh, Continual Semantic Segmentation via Repulsion-Attraction of Sparse and Disentangled "
        "Latent Representations, CVPR"
    )
    year = 2021
    stores = "the running mean feature of each class (prototypes) and the number of features behind it"
    step0 = "SDR, or any with --loss_de_prototypes"
    own_parts = (LatentPrototypes, Sparsity)
    preset = {
        "loss_kd": 100.0,
        "unce": True,
        "unkd": True,
        "loss_fc": 1e-3,
        "lfc_sep_clust": 1e-3,
        "loss_de_prototypes": 1e-2,
        "loss_de_prototypes_sumafter": True,
        "loss_featspars": 1e-3,
    }
