"""ALIFE and ALIFE-M: an adaptive regulariser of the old logits, and a memory of features that is rotated from step to step.

stage 1   ce on the pixels of new classes, --ali_factor · ali on the background, --ali_kd_factor · kd on all other pixels (utils.alife),
          balanced initialisation as MiB. From step 1 on all norms but the head's last one are fixed
stage 2   ALIFE-M, a phase after the training: rotate the remembered features of the old classes towards those of the new network
stage 3   ALIFE-M, a phase after stage 2: train only the classifiers, on relabelled images (ali, focal loss) and the whole memory
memory    --alife_memory vectors for each class, the mean features of the class in random crops, computed at the end of the step that
          learned it. The release computes them at the beginning of stage 2 of the next step, from the same network and the same images

The published factors differ from step to step (`task_presets`); for tasks without published factors they are 1. The release has a network
of its own. The losses need features and classifiers only, so they apply to any network.

The schedule of the release: lr 0.01, then 0.001; 30 epochs (VOC) or 60 (ADE20K) at step 0; scripts/voc/ and scripts/ade/ have the rest.

Reference: Oh et al., "ALIFE: Adaptive Logit Regularizer and Feature Replay for Incremental Semantic Segmentation", NeurIPS 2022.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset.sampler import TrainingBatches
from dataset.tasks import Task
from methods.base import Method, Part, Previous, Rules
from methods.phase import Phase
from segmentation_module import SegmentationModel
from utils import alife, loss
from utils.balance.equilibrium import TermSpec
from utils.checkpointing import structure
from utils.errors import UserError
from utils.options.groups import option_group
from utils.options.rules import LARGE
from utils.random_streams import stream_seed
from utils.runtime import distributed
from utils.types import IGNORE, Batch

#: Group of the options in `--help`.
GROUP = "adaptive logit regulariser and feature replay (ALIFE)"
#: τ, multiplies the similarities between features and memory.
TEMPERATURE = 10.0
#: Features of a class are taken from images, and crops of them, of which the class covers at least this share.
LEAST_SHARE = 0.005
#: Greatest number of crops that are drawn for each vector of the memory.
DRAWS_PER_VECTOR = 20


def of_step(values: Sequence[float], step: int) -> float:
    """The value for a step from 1 on; steps beyond the list get its last value."""
    return values[min(step, len(values)) - 1]


class AdaptiveLogitRegulariser(Part):
    """ALIFE's stage 1: the losses of the main training (--ali_factor)."""

    needs_teacher = True
    rules = Rules(
        ranges={"ali_factor": (0, LARGE), "ali_kd_factor": (0, LARGE)},
        one_of=[
            (["ali_factor", *others], "the classification loss")
            for others in (["unce"], ["bce"], ["icarl"], ["nca"], ["focal_loss"], ["focal_loss_new"], ["pseudo_soft"])
        ]
        + [(["ali_factor", "loss_kd"], "the distillation of outputs")],
        idle=[("--ali_factor", lambda o: o.ali_factor is not None, ["ali_kd_factor", "ali_ignored"])],
        later=["ali_factor", "ali_kd_factor", "ali_ignored"],
        classes_only={"ali_factor": lambda factors: factors is not None},
    )

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Add the factors of stage 1."""
        add = option_group(parser, GROUP).add_argument
        steps = "one for all steps from 1 on, or one for each"
        add("--ali_factor", type=float, nargs="+", default=None, help=f"factor of the logit regulariser: {steps}")
        add("--ali_kd_factor", type=float, nargs="+", default=[1.0], help=f"factor of ALIFE's distillation: {steps}")
        versions = ["released", "mended"]
        add(
            "--ali_ignored",
            default="released",
            choices=versions,
            help="ignored pixels take part in ALIFE's distillation, as released, or not",
        )

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """From step 1 on, with --ali_factor; domains have no background."""
        return opts.ali_factor is not None and task.step > 0 and not task.domain

    def frozen(self, model: SegmentationModel) -> Iterable[nn.Module | nn.Parameter]:
        """All norms except the last one of the head."""
        norms = (module for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm))
        return [norm for norm in norms if norm is not model.head.red_bn]

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """{"ce", "ali", "kd"}: means over the process's batch; ce divides by all pixels, ali and kd by theirs."""
        opts, step = self.opts, self.task.step
        student, teacher, labels = batch.student.logits, batch.teacher.logits, batch.labels
        foreground = labels.masked_fill(labels == 0, IGNORE)
        ali = alife.adaptive_logit_regulariser(student, teacher, labels)
        kd = alife.foreground_distillation(student, teacher, labels, opts.ali_ignored == "released")
        return {
            "ce": opts.ce_factor * loss.cross_entropy(student, foreground).mean(),
            "ali": of_step(opts.ali_factor, step) * ali,
            "kd": of_step(opts.ali_kd_factor, step) * kd,
        }

    def term_specs(self) -> list[TermSpec]:
        """The three losses, measured at the head."""
        return [TermSpec("ce"), TermSpec("ali"), TermSpec("kd")]

    def remedies(self) -> dict[str, str]:
        """Advice for a regulariser that diverges."""
        return {"ali": "lower --lr or --ali_factor"}


class MemoryPhase(Phase):
    """A phase after the main training, with the network in evaluation mode.

    Args:
        opts, task: as for `Phase`.
        memory: the part whose memory is rotated or replayed.
    """

    when = "after"
    training_mode = False

    def __init__(self, opts: Namespace, task: Task, memory: FeatureReplay):
        super().__init__(opts, task)
        self.memory = memory


class Rotation(MemoryPhase):
    """Stage 2: learns rotations of the old classes' features from the pixels of these classes in the images of this step."""

    name = "rotation"

    @property
    def epochs(self) -> int:
        """The value of --alife_rotation_epochs."""
        return self.opts.alife_rotation_epochs

    def attach(self, model: SegmentationModel, teacher: nn.Module | None, device: torch.device) -> None:
        """Create the parameters of the rotation matrices, (C_old, D(D−1)/2)."""
        super().attach(model, teacher, device)
        self.size = model.cls[0].in_channels
        shape = self.task.num_old, self.size * (self.size - 1) // 2
        self.values = nn.Parameter(torch.zeros(shape, device=device, dtype=model.cls[0].weight.dtype))

    def begin(self, loader: TrainingBatches) -> None:
        """Initialise the parameters uniformly within ± 1 / sqrt(D(D−1)/2), equal on all processes."""
        generator = torch.Generator().manual_seed(stream_seed(self.opts.random_seed, "rotation", self.task.step))
        drawn = torch.rand(self.values.shape, generator=generator, dtype=torch.float64) * 2 - 1
        self.values.data.copy_(drawn / math.sqrt(max(1, self.values.shape[1])))

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the rotation matrices."""
        return [self.values]

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Adam; the weight decay is added to the gradient."""
        opts = self.opts
        return torch.optim.Adam(self.parameters(), lr=opts.alife_rotation_lr, weight_decay=opts.weight_decay)

    def terms(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """{"ce", "cosine"}: classification of the rotated features as their class, and their cosine with the new network's features."""
        assert self.teacher is not None
        with torch.no_grad():
            before, after = (network(images, full_size=False).pre_logits for network in (self.teacher, self.model))
        share = self.opts.alife_lambda
        with torch.autocast(images.device.type, enabled=False):
            f, f_after = (alife.positions_of(maps).to(self.values.dtype) for maps in (before, after))
            p, p_after, mean = alife.representations(self.memory.vectors, f, f_after, TEMPERATURE)
            rotated = (alife.rotations(self.values, self.size) @ p[:, :, None])[:, :, 0]  # (C_old, D)
            logits = classify(self.model, rotated + mean)
            own = torch.arange(len(rotated), device=logits.device)
            apart = 1 - F.cosine_similarity(rotated, p_after, dim=1)
            return {"ce": (1 - share) * F.cross_entropy(logits, own), "cosine": share * apart.mean()}

    @torch.no_grad()
    def end(self) -> None:
        """Rotate the memory; as in the release, the features are not centred first."""
        self.memory.vectors = self.memory.vectors @ alife.rotations(self.values, self.size).transpose(1, 2)

    def state_dict(self) -> dict[str, Any]:
        """The parameters of the rotation matrices."""
        return {"values": self.values.detach().cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the parameters of the rotation matrices."""
        structure.require_fit({"values": self.values.detach().cpu()}, state, f"state/phases/{self.name}")
        self.values.data.copy_(state["values"])


class ClassifierReplay(MemoryPhase):
    """Stage 3: trains the classifiers of all steps, on the images of this step and on the rotated memory of earlier steps."""

    name = "replay"

    @property
    def epochs(self) -> int:
        """The value of --alife_replay_epochs."""
        return self.opts.alife_replay_epochs

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of all classifiers."""
        return list(self.model.cls.parameters())

    def terms(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """{"ali", "ce", "memory"}; ce is the focal loss on labels whose background is replaced by the teacher's prediction."""
        opts, step = self.opts, self.task.step
        assert self.teacher is not None
        student = self.model(images).logits
        with torch.no_grad():
            teacher = self.teacher(images).logits
        relabelled = torch.where(labels == 0, teacher.argmax(1), labels)
        ali = alife.adaptive_logit_regulariser(student, teacher, labels)
        return {
            "ali": of_step(opts.alife_replay_ali, step) * ali,
            "ce": loss.focal(student, relabelled).mean(),
            "memory": of_step(opts.alife_replay_memory, step) * self.memory_loss(),
        }

    def memory_loss(self) -> Tensor:
        """Mean cross entropy of the whole memory; classes without remembered features are left out."""
        vectors, found = self.memory.vectors, self.memory.found
        own = torch.arange(len(vectors), device=vectors.device)[found.to(vectors.device)]
        with torch.autocast(vectors.device.type, enabled=False):
            logits = classify(self.model, vectors[own].flatten(0, 1))  # (C_old·M, C)
            return F.cross_entropy(logits, own.repeat_interleave(vectors.shape[1]))


def classify(model: SegmentationModel, vectors: Tensor) -> Tensor:
    """Logits (n, C) of single feature vectors (n, D)."""
    return model.cls(vectors.T[None, :, :, None])[0, :, :, 0].T


class FeatureReplay(Part):
    """The memory of features, and stages 2 and 3 (--alife_memory).

    Attributes:
        vectors: (C, M, D) remembered features of the classes before this step; at its end those of its own classes join them.
        found: (C,) bool, the classes that have remembered features.
    """

    uses_teacher = True
    state_key = "alife"
    rules = Rules(
        ranges={
            "alife_memory": (0, 10**6),
            "alife_lambda": (0, 1),
            "alife_rotation_epochs": (0, 10**6),
            "alife_replay_epochs": (0, 10**6),
            "alife_replay_ali": (0, LARGE),
            "alife_replay_memory": (0, LARGE),
        },
        positive={"alife_rotation_lr": LARGE},
        idle=[
            (
                "--alife_memory above 0",
                lambda o: o.alife_memory > 0,
                [
                    *("alife_lambda", "alife_rotation_epochs", "alife_rotation_lr"),
                    *("alife_replay_epochs", "alife_replay_ali", "alife_replay_memory"),
                ],
            )
        ],
        later=[
            *("alife_lambda", "alife_rotation_epochs", "alife_rotation_lr"),
            *("alife_replay_epochs", "alife_replay_ali", "alife_replay_memory"),
        ],
        classes_only={"alife_memory": bool},
    )

    def __init__(self, opts: Namespace, task: Task):
        super().__init__(opts, task)
        self.vectors = torch.zeros(0)
        self.found = torch.zeros(0, dtype=torch.bool)

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Add the size of the memory and the options of the two phases."""
        add = option_group(parser, GROUP).add_argument
        steps = "one for all steps from 1 on, or one for each"
        add("--alife_memory", type=int, default=0, help="remembered features of each class; 0: no memory")
        add("--alife_lambda", type=float, default=0.99, help="share of the cosine in the loss of the rotations")
        add("--alife_rotation_epochs", type=int, default=10, help="epochs in which the rotations are learned")
        add("--alife_rotation_lr", type=float, default=0.01, help="learning rate of the rotations (Adam)")
        add("--alife_replay_epochs", type=int, default=1, help="epochs of the classifiers alone")
        add("--alife_replay_ali", type=float, nargs="+", default=[1.0], help=f"its factor of the regulariser: {steps}")
        add("--alife_replay_memory", type=float, nargs="+", default=[1.0], help=f"its factor of the memory: {steps}")

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """At every step, with --alife_memory: step 0 remembers the first features."""
        return opts.alife_memory > 0 and not task.domain

    def attach(self, model: SegmentationModel, teacher: nn.Module | None, previous: Previous) -> None:
        """Take over the memory of step t−1.

        Raises:
            UserError: step t−1 has no memory, or one of another shape.
        """
        weight = model.cls[0].weight
        if self.task.step == 0:
            self.vectors = weight.new_zeros(0, self.opts.alife_memory, weight.shape[1])
            return
        vectors, found = previous.state.get("vectors"), previous.state.get("found")
        if vectors is None:
            raise UserError(
                f"--alife_memory {self.opts.alife_memory} needs the features that step {self.task.step - 1} remembers, but "
                f"{previous.file} has none: it was trained without --alife_memory; train it again with --method ALIFE-M"
            )
        shape = (self.task.num_old, self.opts.alife_memory, weight.shape[1])
        mine = {"vectors": weight.new_zeros(shape).cpu(), "found": torch.zeros(shape[0], dtype=torch.bool)}
        misfit = structure.misfit(mine, {"vectors": vectors, "found": found}, "memory")
        if misfit or found is None or not bool(vectors.isfinite().all()):
            raise UserError(
                f"the features that {previous.file} remembers are not {shape[0]} classes of {shape[1]} finite vectors of {shape[2]} "
                "numbers; give all steps the same --alife_memory and network"
            )
        self.vectors, self.found = vectors.to(weight), found.clone()

    def phases(self) -> list[Phase]:
        """Stages 2 and 3, from step 1 on."""
        if self.task.step == 0:
            return []
        return [Rotation(self.opts, self.task, self), ClassifierReplay(self.opts, self.task, self)]

    @torch.no_grad()
    def end_step(self, model: SegmentationModel, loader: TrainingBatches, device: torch.device) -> None:
        """Remember the classes of this step; each class is computed by one process. The last step is not remembered."""
        if self.task.step == self.task.last_step:
            return
        was_training = model.training
        model.eval()
        shares = loader.class_shares()
        fresh = self.vectors.new_zeros(self.task.num_new, *self.vectors.shape[1:]).to(device)
        found = torch.zeros(self.task.num_new, device=device)
        for number, class_id in enumerate(self.task.new):
            if number % distributed.world_size() == distributed.rank():
                vectors = self.remember(model, loader, self.task.num_old + number, shares[:, class_id], device)
                if len(vectors):
                    fresh[number] = vectors[torch.arange(fresh.shape[1], device=device) % len(vectors)]
                    found[number] = 1
        fresh, found = distributed.sum_(fresh), distributed.sum_(found)
        self.vectors = torch.cat([self.vectors.to(device), fresh])
        self.found = torch.cat([self.found, found.bool().cpu()])
        model.train(was_training)

    def remember(
        self, model: SegmentationModel, loader: TrainingBatches, label: int, shares: Tensor, device: torch.device
    ) -> Tensor:
        """Mean features of a class in random crops.

        If too few crops show enough of the class, fewer vectors are returned; if no crop does, crops with any pixel of it are used.

        Args:
            model: in evaluation mode.
            loader: as in `end_step`.
            label: of the class.
            shares: (N,) share of the class in the annotation of each of the N images.
            device: where to compute.

        Returns:
            (n, D) with n ≤ --alife_memory.
        """
        for least in (LEAST_SHARE, 0.0):
            positions = (shares > least).nonzero()[:, 0].tolist()
            wanted = self.opts.alife_memory
            vectors: list[Tensor] = []
            if positions:
                for images, labels in loader.draws(positions, label, DRAWS_PER_VECTOR * wanted):
                    vectors += self.vectors_of(model, images.to(device), labels.to(device) == label, least)
                    if len(vectors) >= wanted:
                        break
            if vectors:
                return torch.stack(vectors[:wanted])
        return self.vectors.new_zeros(0, self.vectors.shape[2])

    def vectors_of(self, model: SegmentationModel, images: Tensor, masks: Tensor, least: float) -> Iterator[Tensor]:
        """Mean feature (D,) of the class in each crop of a batch that shows enough of it.

        Args:
            model: in evaluation mode.
            images: (B, 3, H, W) normalised.
            masks: (B, H, W) bool, the pixels of the class.
            least: share of a crop that the class must exceed.
        """
        features = model(images.to(self.vectors.dtype), full_size=False).pre_logits
        for maps, mask in zip(features, masks):
            if mask.any() and mask.double().mean() >= least:
                yield alife.mean_feature(maps, mask)

    def state_dict(self) -> dict[str, Any]:
        """The remembered features."""
        return {"vectors": self.vectors.cpu().clone(), "found": self.found.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the memory, which a resumed run may have rotated already."""
        structure.require_fit(self.state_dict(), state, f"state/method/{self.state_key}")
        self.vectors, self.found = state["vectors"].to(self.vectors), state["found"]


class ALIFE(Method):
    """ALIFE without a memory: the adaptive logit regulariser."""

    name = "ALIFE"
    paper = (
        "Oh et al., ALIFE: Adaptive Logit Regularizer and Feature Replay for Incremental Semantic Segmentation, NeurIPS"
    )
    year = 2022
    own_parts = (AdaptiveLogitRegulariser, FeatureReplay)
    preset = {"init_balanced": True, "ali_factor": [1.0], "ali_kd_factor": [1.0]}
    task_presets = {
        ("voc", "15-5"): {"ali_factor": [2.0]},
        ("voc", "15-5s"): {"ali_factor": [3.0, 5.0, 2.0, 3.0, 2.0], "ali_kd_factor": [1.0, 10.0, 1.0, 10.0, 1.0]},
        ("ade", "50"): {"ali_kd_factor": [20.0]},
    }


def _replay(ali: list[float], memory: list[float], share: float = 0.99) -> dict[str, Any]:
    return {"alife_replay_ali": ali, "alife_replay_memory": memory, "alife_lambda": share}


class ALIFEM(ALIFE):
    """ALIFE with a memory of features."""

    name = "ALIFE-M"
    stores = "1000 features of each class"
    step0 = "its own, with --alife_memory"
    preset = ALIFE.preset | {"alife_memory": 1000}
    task_presets = {
        key: ALIFE.task_presets.get(key, {}) | replay
        for key, replay in {
            ("voc", "19-1"): _replay([1.0], [1.0], 0.95),
            ("voc", "15-5"): _replay([1.0], [10.0], 0.95),
            ("voc", "15-5s"): _replay([3.0, 5.0, 2.0, 3.0, 1.0], [1.0, 20.0, 1.0, 2.0, 1.0]),
            ("ade", "100-50"): _replay([0.0], [0.5]),
            ("ade", "100-10"): _replay([5.0, 5.0, 2.0, 0.0, 0.0], [2.0, 1.0, 1.0, 0.1, 0.5]),
            ("ade", "50"): _replay([0.0], [0.1, 0.5]),
        }.items()
    }
