"""NeST: before a step is trained, its new classifiers are learned as transformations of the old ones.

similarity   how the old classes respond to the pixels of each new class, from one pass of the teacher: the initial A and v
pre-tuning   a phase of --warm_epochs epochs, in which only five tensors learn; the norms use batch statistics, which move
                 new class c     w_c = Σ_k v_ck · (A_ck ∘ W_k), bias β_c
                 background      v_bg · (a_bg ∘ W_0), its own bias
                 other classes   their own W_k, b_k
write back   w_c and β become the new classifier, v_bg (a_bg ∘ W_0) the background's weight, all scaled to the norms of the old ones

The main training is that of the base method. The pre-tuning replaces MiB's balanced initialisation, so the background's bias is not
lowered. The five tensors are deleted after the write-back.

Reference: Xie et al., "Early Preparation Pays Off: New Classifier Pre-tuning for Class Incremental Semantic Segmentation", ECCV 2024.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset.sampler import TrainingBatches
from dataset.tasks import Task
from methods.awt import pixels_of
from methods.base import Method, Part, Rules
from methods.ewf import FrozenClassifiers
from methods.ft import Classification
from methods.lskd import LSKD
from methods.mib import MiB
from methods.phase import Phase
from methods.plop import PLOP
from modules.classifier import Classifiers
from modules.upsample import upsample
from segmentation_module import SegmentationModel
from utils import loss
from utils.checkpointing import structure
from utils.options.groups import add_switch, option_group
from utils.options.rules import LARGE
from utils.random_streams import stream_seed
from utils.runtime import distributed
from utils.runtime.amp import at_least_float32

#: Height and width to which predictions and features are resized before they are compared.
GRID = (128, 128)
#: Lower bound of the norms that are divided by.
_SMALL = 1e-12


def wanted(opts: Namespace) -> bool:
    """Whether the options ask for the pre-tuning."""
    return opts.warm_up or opts.nest


def weights_and_biases(classifiers: list[nn.Conv2d]) -> tuple[Tensor, Tensor]:
    """(C, c) weights and (C,) biases of several classifiers, concatenated."""
    biases = [classifier.bias for classifier in classifiers if classifier.bias is not None]
    return torch.cat([classifier.weight.flatten(1) for classifier in classifiers]), torch.cat(biases)


class Similarity:
    """How the old classes respond to the pixels of each new one.

    Args:
        weights: (C_old, c) of the old classifiers.
        num_new: C_new.
    """

    def __init__(self, weights: Tensor, num_new: int):
        self.weights = weights.detach()
        num_old, channels = weights.shape
        # Sums of p_k where f_d > 0 and where f_d < 0: the sign of f_d · W_kd is that of the one or of the other
        self.sums = weights.new_zeros(num_new, 2, num_old, channels, dtype=torch.float64)
        self.counts = weights.new_zeros(num_new, dtype=torch.float64)

    def update(self, logits: Tensor, features: Tensor, labels: Tensor) -> None:
        """Add the pixels of a batch.

        Args:
            logits: (B, C_old, H, W) of the teacher, at full size.
            features: (B, c, h, w), its pre_logits.
            labels: (B, H, W); the new classes follow the old ones.
        """
        small = pixels_of(labels, GRID)  # (B, 128, 128)
        shares, known = (
            F.interpolate(at_least_float32(maps), size=GRID, mode="bilinear", align_corners=False).movedim(1, 3)
            for maps in (logits, features)
        )  # (B, 128, 128, C_old), (B, 128, 128, c)
        for number in range(len(self.counts)):
            chosen = small == len(self.weights) + number
            if not chosen.any():
                continue
            p, f = shares[chosen].softmax(1), known[chosen]  # (N, C_old), (N, c)
            for side, signs in enumerate((f > 0, f < 0)):
                self.sums[number, side] += (p.T @ signs.to(p)).double()
            self.counts[number] += len(p)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the initial values from the sums of all processes.

        A class without pixels takes the mean of the other new classes; in the release its values are NaN.

        Returns:
            A (C_new, C_old, c), v (C_new, C_old), and (C_new,) bool, whether a class has pixels; equal on all processes.
        """
        sums, counts = distributed.sum_(self.sums), distributed.sum_(self.counts)
        seen = counts > 0
        positive, negative = (sums / counts.clamp(min=1)[:, None, None, None]).unbind(1)
        shares = torch.where(self.weights > 0, positive, torch.where(self.weights < 0, negative, 0.0))
        mixture = shares.sum(2).softmax(1)
        if not seen.all():
            some = bool(seen.any())
            shares[~seen] = shares[seen].mean(0) if some else 1.0
            mixture[~seen] = mixture[seen].mean(0) if some else 1 / len(self.weights)
        return shares.to(self.weights), mixture.to(self.weights), seen


class Transformation(nn.Module):
    """The five tensors that the pre-tuning trains.

    Args:
        num_old, num_new: C_old, C_new.
        channels: c.
    """

    def __init__(self, num_old: int, num_new: int, channels: int):
        super().__init__()
        self.weight_old = nn.Parameter(torch.ones(num_new, num_old, channels))  # A
        self.weight_new = nn.Parameter(torch.full((num_new, num_old), 1 / num_old))  # v
        self.new_bias = nn.Parameter(torch.zeros(num_new))  # β
        self.weight_old_bg = nn.Parameter(torch.ones(1, channels))  # a_bg
        self.weight_new_bg = nn.Parameter(torch.ones(1, 1))  # v_bg

    def new_weights(self, old: Tensor) -> Tensor:
        """(C_new, c) weights of the new classes, from the (C_old, c) old ones."""
        return (self.weight_new[:, :, None] * self.weight_old * old).sum(1)

    def background(self, old: Tensor) -> Tensor:
        """(1, c) weight of the background."""
        return self.weight_new_bg * self.weight_old_bg * old[:1]

    def forward(self, features: Tensor, classifiers: Classifiers) -> Tensor:
        """Small logits of all classes.

        Args:
            features: (B, c, h, w).
            classifiers: those of the step; the newest is not used.

        Returns:
            (B, C, h, w), old classes, then new ones.
        """
        old, biases = weights_and_biases(list(classifiers)[:-1])
        weight = torch.cat([self.background(old), old[1:], self.new_weights(old)])  # (C, c)
        return F.conv2d(features, weight[:, :, None, None], torch.cat([biases, self.new_bias]))

    @torch.no_grad()
    def write_back(self, classifiers: Classifiers) -> None:
        """Write the tuned classifiers into those of the step.

        The background keeps the norm of its weight. One factor gives the new weights the mean norm of the old ones, another gives the
        vector of the new biases the norm of that of all old ones, whatever their lengths, as released.
        """
        old, biases = weights_and_biases(list(classifiers)[:-1])
        weights, background, newest = self.new_weights(old), self.background(old), classifiers[-1]
        assert newest.bias is not None  # cosine classifiers are refused
        norms, new_norms = old.norm(dim=1), weights.norm(dim=1)
        newest.weight.flatten(1).copy_(weights * (norms.mean() / new_norms.mean().clamp(min=_SMALL)))
        newest.bias.copy_(self.new_bias * (biases.norm() / self.new_bias.norm().clamp(min=_SMALL)))
        rescaled = background[0] * (norms[0] / background.norm().clamp(min=_SMALL))
        classifiers[0].weight[0].flatten().copy_(rescaled)


class PreTuning(Phase):
    """Learns the transformation before the first epoch of a step.

    Attributes:
        tuned: the transformation, from `attach` on.
    """

    name = "pre-tuning"
    when = "before"

    @property
    def epochs(self) -> int:
        """The value of --warm_epochs."""
        return self.opts.warm_epochs

    def attach(self, model: SegmentationModel, teacher: nn.Module | None, device: torch.device) -> None:
        """Create the five tensors."""
        super().attach(model, teacher, device)
        task, weight = self.task, model.cls[0].weight
        self.tuned = Transformation(task.num_old, task.num_new, weight.shape[1]).to(weight)
        criterion = Classification(self.opts, task).criterion()
        if self.opts.unce_in_warm or self.opts.nest:
            self.criterion = lambda logits, labels: loss.unbiased_cross_entropy(logits, labels, task.num_old)
        else:
            self.criterion = criterion

    @torch.no_grad()
    def begin(self, loader: TrainingBatches) -> None:
        """Initialise A and v from the similarity of the classes, and β with one random number from PyTorch's initialisation of a bias.

        The release copies the background's bias to β before the checkpoint is loaded, which is a random number too.
        """
        tuned, task, teacher = self.tuned, self.task, self.teacher
        assert teacher is not None  # the part uses it
        similarity = Similarity(weights_and_biases(list(self.model.cls)[:-1])[0], task.num_new)
        for images, labels in loader.every_image():
            taps = teacher(images.to(tuned.weight_old), full_size=True)
            similarity.update(taps.logits, taps.pre_logits, labels.to(self.device).long())
        shares, mixture, seen = similarity.finish()
        tuned.weight_old.copy_(shares)
        tuned.weight_new.copy_(mixture)
        generator = torch.Generator().manual_seed(stream_seed(self.opts.random_seed, "new bias", task.step))
        bound = 1 / math.sqrt(tuned.weight_old.shape[2])
        tuned.new_bias.fill_(float(torch.empty(()).uniform_(-bound, bound, generator=generator)))
        if not seen.all() and distributed.is_main():
            unseen = ", ".join(str(c) for c, found in zip(task.new, seen.tolist()) if not found)
            print(
                f"note: NeST found no pixel of the classes {unseen} of step {task.step}; their classifiers start from the mean of the "
                "other new ones"
            )

    def parameters(self) -> list[nn.Parameter]:
        """The five tensors."""
        return list(self.tuned.parameters())

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The step's SGD, with --warm_lr_scale times its learning rate."""
        optimizer = super().make_optimizer()
        for group in optimizer.param_groups:
            group["lr"] *= self.opts.warm_lr_scale
        return optimizer

    def rate(self, iteration: int, iterations: int) -> float:
        """Poly, stepped before the optimiser, so the last iteration has the learning rate 0, as in the release."""
        return super().rate(iteration + 1, iterations)

    def terms(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """{"ce": the loss on the labels of the data set, mean over all pixels, ignored ones counted as 0}."""
        features = self.model(images, full_size=False).pre_logits
        logits = upsample(at_least_float32(self.tuned(features, self.model.cls)), images.shape[2:])
        return {"ce": self.criterion(logits, labels).mean()}

    def end(self) -> None:
        """Write the tuned classifiers into the student."""
        self.tuned.write_back(self.model.cls)

    def state_dict(self) -> dict[str, Any]:
        """The five tensors."""
        return {name: value.detach().cpu().clone() for name, value in self.tuned.state_dict().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the five tensors."""
        structure.require_fit(self.state_dict(), state, f"state/phases/{self.name}")
        self.tuned.load_state_dict(state)


class NewClassifierPreTuning(Part):
    """Pre-tune the new classifier (--warm_up of the release, or --nest, which also sets --unce_in_warm as the release's scripts do)."""

    uses_teacher = True
    rules = Rules(
        ranges={"warm_epochs": (1, 10**6)},
        positive={"warm_lr_scale": LARGE},
        exclusive=[
            ("--nest (--warm_up)", wanted, "--init_awt (--att)", lambda opts: opts.init_awt or opts.att),
            ("--nest (--warm_up)", wanted, "--cosine", lambda opts: opts.cosine),
            (
                "--nest (--warm_up)",
                wanted,
                "--nb_background_modes {nb_background_modes}",
                lambda opts: opts.nb_background_modes > 1,
            ),
        ],
        idle=[
            ("--nest", wanted, ["warm_epochs", "warm_lr_scale", "unce_in_warm"]),
            ("no --nest, which takes its place", lambda opts: not wanted(opts), ["init_balanced"]),
        ],
        later=["nest", "warm_up", "warm_epochs", "warm_lr_scale", "unce_in_warm"],
        classes_only={"nest": bool, "warm_up": bool},
    )

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Add the options of the release, and --nest."""
        group = option_group(parser, "new classifier pre-tuning (NeST)")
        add_switch(group, "--nest", help="--warm_up and --unce_in_warm")
        add_switch(
            group,
            "--warm_up",
            help="learn new classifiers from the old ones before each step, instead of --init_balanced",
        )
        group.add_argument("--warm_epochs", type=int, default=5, help="epochs of the pre-tuning")
        group.add_argument(
            "--warm_lr_scale", type=float, default=1.0, help="its learning rate: so many times the step's"
        )
        add_switch(group, "--unce_in_warm", help="it learns by unbiased cross entropy; otherwise by the method's loss")

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """From step 1 on, with --warm_up or --nest; domains add no class."""
        return wanted(opts) and task.step > 0 and not task.domain

    def phases(self) -> list[Phase]:
        """The pre-tuning."""
        return [PreTuning(self.opts, self.task)]


#: The only ADE20K task with a script of the release.
_ADE = {"warm_epochs": 15, "warm_lr_scale": 500.0}


class MiBNeST(Method):
    """MiB whose new classifiers are pre-tuned."""

    name = "MiB+NeST"
    paper = "Xie et al., Early Preparation Pays Off (NeST), with MiB, ECCV"
    year = 2024
    own_parts = (FrozenClassifiers, NewClassifierPreTuning)
    preset = MiB.preset | {"init_balanced": False, "nest": True}
    task_presets = {("ade", "100-5"): _ADE}


class PLOPNeST(Method):
    """PLOP whose new classifiers are pre-tuned, with the earlier ones frozen, but not on ADE20K."""

    name = "PLOP+NeST"
    paper = "Xie et al., Early Preparation Pays Off (NeST), with PLOP, ECCV"
    year = 2024
    own_parts = MiBNeST.own_parts
    preset = PLOP.preset | {"init_balanced": False, "nest": True, "fix_pre_cls": True}
    task_presets = {
        (dataset, task): factors
        | ({"fix_pre_cls": False} if dataset == "ade" else {})
        | (_ADE if (dataset, task) == ("ade", "100-5") else {})
        for (dataset, task), factors in PLOP.task_presets.items()
    }


class LSKDNeST(Method):
    """LSKD whose new classifiers are pre-tuned. No article has this combination."""

    name = "LSKD+NeST"
    paper = "no article: LSKD with the pre-tuning of Xie et al., ECCV"
    year = 2024
    own_parts = MiBNeST.own_parts
    preset = LSKD.preset | {"init_balanced": False, "nest": True}
    task_presets = LSKD.task_presets
