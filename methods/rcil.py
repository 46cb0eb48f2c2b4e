"""RCIL: representation compensation. Two branches of every 3×3 conv, one of which keeps what the steps before have learned.

network   --rcil_network: the first 3×3 conv of each residual block and the head's parallel convs are doubled, the branches mixed at
          random in training and averaged in evaluation                                                     (modules.compensation)
step 0    both branches train
step t    the mean of both branches is computed into the old one, which is frozen from then on; the new branch keeps the weights of
          step t−1. The teacher is the network of step t−1 before the merge
ce, kd    unbiased cross entropy and distillation of outputs, as MiB                                 (methods/ft.py, methods/lwf.py)
pcd       --pcd_factors: pooled cubes of the taps, over positions and over channels                                  (utils.pod.cube)

The taps of the stages are taken after their activation, as in the release, whose activation overwrites the tensor. Its log calls the
sum of both pcd terms POD. Its scripts also set PLOP's flags of pseudo-labels and of POD, which have no effect in it.

The schedule of the release: lr 0.02 (VOC) or 0.01 (ADE20K), then 0.001, 30 or 60 epochs a step; scripts/voc/ and scripts/ade/ have it.

Reference: Zhang et al., "Representation Compensation Networks for Continual Semantic Segmentation", CVPR 2022. The release has bottleneck
    bodies only (ResNet-50, 101, 152); ResNet-18 and 34, whose blocks have two 3×3 convs, are an extension of this program.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from dataset.sampler import TrainingBatches
from dataset.tasks import Task
from methods.base import Method, Part, Previous, Rules
from methods.ft import class_growth
from methods.mib import MiB, starts_otherwise
from modules.compensation import DoubledConvs, DoubledHead, TwoBranches, shares
from modules.norm import ABN, make_norm
from modules.residual import ResidualBlock
from modules.resnet import ARCHITECTURES
from segmentation_module import SegmentationModel
from utils.balance.equilibrium import TermSpec
from utils.checkpointing import structure
from utils.options.groups import option_group
from utils.options.rules import LARGE
from utils.pod import cube
from utils.random_streams import stream_seed
from utils.types import Batch, Taps

#: Group of the options in `--help`.
GROUP = "representation compensation (RCIL)"
DOUBLED, MERGED = "doubled", "merged"


def _trains(opts: Namespace) -> bool:
    return not (opts.test or opts.dry_run or opts.check_data)


class RepresentationCompensation(Part):
    """The doubled network, its random mixture, and the merge between steps (--rcil_network doubled).

    With "merged" the network is that of a checkpoint in which scripts/merge_branches.py merged the branches, for tests and predictions.

    Attributes:
        passes: training iterations of this step so far, which number the draws.
    """

    gated = True
    state_key = "rcil"
    rules = Rules(
        idle=[("--rcil_network", lambda opts: opts.rcil_network is not None, ["rcil_stem", "rcil_init"])],
        later=["rcil_init"],
        exclusive=[
            (
                "--rcil_network {rcil_network}",
                lambda opts: opts.rcil_network is not None,
                f"--backbone {{backbone}}, which has no residual blocks of 3×3 convs (of {', '.join(ARCHITECTURES)})",
                lambda opts: opts.backbone not in ARCHITECTURES,
            ),
            ("--rcil_network merged", lambda opts: opts.rcil_network == MERGED, "a training (without --test)", _trains),
            (
                "--rcil_network, whose merge rewrites the weights of the step before",
                lambda opts: opts.rcil_network is not None,
                "--ewf (--weight_fusion), which averages them by name",
                lambda opts: opts.ewf or opts.weight_fusion,
            ),
            (
                "--rcil_network on a body of basic blocks, whose first convs are frozen",
                lambda opts: opts.rcil_network == DOUBLED and opts.backbone in ("resnet18", "resnet34"),
                "--mask_rule, whose balance watches the gradients of these convs",
                lambda opts: opts.mask_rule is not None,
            ),
        ],
    )

    def __init__(self, opts: Namespace, task: Task):
        super().__init__(opts, task)
        self.passes = 0
        self.merged = False
        self.layers: dict[str, TwoBranches] = {}

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Add the choice of the network, and the corrections of the release's errors."""
        add = option_group(parser, GROUP).add_argument
        kinds = [DOUBLED, MERGED]
        add("--rcil_network", default=None, choices=kinds, help="two branches of 3×3 convs, or both merged for a test")
        versions = ["released", "mended"]
        add("--rcil_stem", default="released", choices=versions, help="the stem without activation, or with it")
        add(
            "--rcil_init",
            default="released",
            choices=versions,
            help="new classifiers take the background's weights alone, or start as in MiB",
        )

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """At every step, with --rcil_network."""
        return opts.rcil_network is not None

    # ------------------------------------------------------------------ the network

    def wrap_model(self, model: SegmentationModel) -> None:
        """Double the convs. The new ones are copies of the old ones if these are pretrained, else they get random weights of their own."""
        if self.opts.rcil_stem == "released":
            cast(ABN, model.body.get_submodule("mod1.bn1")).activation = "identity"
        if self.opts.rcil_network == MERGED:
            return
        for block in [module for module in model.body.modules() if isinstance(module, ResidualBlock)]:
            block.convs = DoubledConvs(block.convs)
            if self.opts.no_pretrained:
                block.convs.branch(new=True).convs[0].reset_parameters()
        model.head = self._doubled_head(model)
        if self.task.step > 0:
            biases = {id(bias) for layer in layers_of(model).values() for bias in layer.add_biases()}
            # The checkpoint of step 0 has none
            model.optional_names |= {name for name, value in model.named_parameters() if id(value) in biases}

    def _doubled_head(self, model: SegmentationModel) -> DoubledHead:
        opts, out_channels = self.opts, model.head.red_conv.out_channels
        norm = make_norm(opts.norm_act)
        return DoubledHead(model.body.out_channels, out_channels, norm, opts.output_stride, opts.pooling)

    def attach(self, model: SegmentationModel, teacher: nn.Module | None, previous: Previous) -> None:
        """Keep the doubled layers of the student."""
        self.layers = layers_of(model)

    @torch.no_grad()
    def init_classifier(
        self, model: SegmentationModel, teacher: nn.Module | None, loader: TrainingBatches, device: torch.device
    ) -> None:
        """Start the new classifier, unless AWT or NeST does, then merge the branches.

        The release copies the background's weights and changes no bias. In a domain-incremental task, whose only classifier is the newest
        at every step, this makes all its rows equal to row 0; with --rcil_init mended such a classifier is not changed.
        """
        if self.task.step == 0:
            return
        self._start(model)
        for layer in self.layers.values():
            layer.merge()
        self.merged = True

    def _start(self, model: SegmentationModel) -> None:
        if starts_otherwise(self.opts):
            return
        if self.opts.rcil_init == "released":
            new = model.cls[-1]
            new.weight.copy_(model.cls[0].weight[:1].clone().expand_as(new.weight))
        elif not self.task.domain:
            model.cls.init_balanced()

    def frozen(self, model: SegmentationModel) -> Iterable[nn.Module | nn.Parameter]:
        """The old branch, from step 1 on."""
        if self.task.step == 0:
            return []
        branches = [layer.branch(new=False) for layer in layers_of(model).values()]
        return [module for branch in branches for module in (*branch.convs, branch.norm)]

    # ------------------------------------------------------------------ the mixture

    def draws(self) -> dict[str, Tensor]:
        """Uniform numbers of the next training pass, (C,) by path of the layer; the same on all processes.

        They are a function of seed, step and number of the pass, so a resume needs to restore this number only.
        """
        seed = stream_seed(self.opts.random_seed, "mixture of branches", self.task.step, self.passes)
        generator = torch.Generator().manual_seed(seed)
        return {path: torch.rand(len(layer.share), generator=generator) for path, layer in self.layers.items()}

    def prepare(self, batch: Batch, teacher: nn.Module | None) -> None:
        """Draw the branch of every channel."""
        drawn = self.draws()
        device = batch.images.device
        joined = shares(torch.cat([drawn[path] for path in self.layers])).to(device, non_blocking=True)
        for layer, share in zip(
            self.layers.values(), joined.split([len(layer.share) for layer in self.layers.values()])
        ):
            layer.share.copy_(share)

    def after_step(self, model: SegmentationModel, batch: Batch) -> None:
        """Count the training passes."""
        self.passes += 1

    # ------------------------------------------------------------------ ends

    def begin_test(self, model: SegmentationModel) -> None:
        """Set the eps of merged norms, which a merge sets to 0, to that of a network that was loaded from the checkpoint."""
        for layer in layers_of(model).values():
            layer.branch(new=False).norm.eps = layer.branch(new=True).norm.eps

    def state_dict(self) -> dict[str, Any]:
        """The number of training passes, and whether this step merged the branches."""
        return {"passes": self.passes, "merged": self.merged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the number of passes, and the eps of merged norms, which the weights do not contain."""
        structure.require_fit({"passes": 0, "merged": False}, state, f"state/method/{self.state_key}")
        self.passes, self.merged = state["passes"], state["merged"]
        if self.merged:
            for layer in self.layers.values():
                layer.branch(new=False).norm.eps = 0.0


def layers_of(model: nn.Module) -> dict[str, TwoBranches]:
    """The doubled layers by path, as the release names them: body.mod2.block1, …, head."""
    return {
        path.removesuffix(".convs"): module for path, module in model.named_modules() if isinstance(module, TwoBranches)
    }


class PooledCubeDistillation(Part):
    """Squared features, pooled over positions and over channels (--pcd_factors)."""

    needs_teacher = True
    rules = Rules(ranges={"pcd_factors": (0, LARGE)}, later=["pcd_factors"])

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Add `--pcd_factors`."""
        option_group(parser, GROUP).add_argument(
            "--pcd_factors",
            type=float,
            nargs=4,
            default=None,
            metavar="FACTOR",
            help="factors of pooled cubes: over positions of features and of logits, over channels of stages and of pre_logits",
        )

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """From step 1 on, with --pcd_factors."""
        return opts.pcd_factors is not None and task.step > 0

    def taps(self, forward: Taps) -> tuple[Tensor, ...]:
        """The activated stages, pre_logits, and the first channels of the logits, as many as the teacher has."""
        return (*forward.stages, forward.pre_logits, cube.fold_new_classes(forward.logits_small, self.task.num_old))

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """{"pcd/spatial", "pcd/channel"}, times sqrt(C / C_new)."""
        features, logits, stages, pre_logits = (class_growth(self.task) * factor for factor in self.opts.pcd_factors)
        teacher, student = self.taps(batch.teacher), self.taps(batch.student)
        return {
            "pcd/spatial": cube.spatial(teacher, student, [features] * 5 + [logits]),
            "pcd/channel": cube.channel(teacher[:5], student[:5], [stages] * 4 + [pre_logits]),
        }

    def term_specs(self) -> list[TermSpec]:
        """Both terms, measured at the head."""
        return [TermSpec("pcd/spatial"), TermSpec("pcd/channel")]

    def remedies(self) -> dict[str, str]:
        """Advice for terms that diverge."""
        return dict.fromkeys(("pcd/spatial", "pcd/channel"), "lower --lr or --pcd_factors")


class RCIL(Method):
    """MiB's losses, a network of two branches, and pooled cubes."""

    name = "RCIL"
    paper = "Zhang et al., Representation Compensation Networks for Continual Semantic Segmentation, CVPR"
    year = 2022
    stores = "both branches of every doubled conv"
    step0 = "its own, with --rcil_network"
    own_parts = (RepresentationCompensation, PooledCubeDistillation)
    preset = {
        **{key: value for key, value in MiB.preset.items() if key != "init_balanced"},
        "loss_kd": 100.0,
        "rcil_network": DOUBLED,
        # The fourth is the factor of the logits: the release removes the last tap from the list before it takes the factor of the last one
        "pcd_factors": [0.01, 0.0005, 0.01, 0.0005],
    }
    task_presets = {
        ("ade", task): {"pcd_factors": [5e-6, 5e-7, 5e-6, 5e-7]} for task in ("100-50", "100-10", "100-5", "50", None)
    } | {
        ("cityscapes_domain", task): {"pcd_factors": [5e-4, 1e-4, 1e-4, 0.0]}
        for task in ("offline", "11-5", "11-1", "1-1", None)
    }
