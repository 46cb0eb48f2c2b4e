"""REMINDER: PLOP, and a distillation of outputs on new pixels, weighted by the similarity of the new class to each old one.

ce, pod     as in PLOP; the adaptive factor is pseudo-labelled old pixels / old pixels, without PLOP's 1e-6  (methods/plop.py)
csw         --csw_kd · CSW-KD, whose r is --delta_csw                                                   (utils.class_similarity)
prototypes  at the end of every step, step 0 included: the mean feature of each class of the step, which the next step compares
            its own classes with

The prototypes are computed from the images of all processes and stored as the state of the part in the checkpoint; in the release every
process writes a separate file. Each process distils on its own batch, as in the release.

Reference: "Class Similarity Weighted Knowledge Distillation for Continual Semantic Segmentation", CVPR 2022.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

import torch
from torch import Tensor, nn

from dataset.sampler import TrainingBatches
from dataset.tasks import Task
from methods.base import Method, Part, Previous, Rules
from methods.plop import PLOP
from segmentation_module import SegmentationModel
from utils import class_similarity
from utils.balance.equilibrium import TermSpec
from utils.checkpointing import structure
from utils.errors import UserError
from utils.options.groups import option_group
from utils.options.rules import LARGE
from utils.runtime import distributed
from utils.types import Batch


class SimilarityDistillation(Part):
    """CSW-KD, and the prototypes that it needs."""

    needs_teacher = True
    state_key = "reminder"
    purpose = "prototypes"
    rules = Rules(
        ranges={"csw_kd": (0, LARGE), "delta_csw": (0, LARGE)},
        one_of=[(["csw_kd", "unkd", "kd_bce_sig", "exkd_gt", "exkd_sum"], "the distillation of outputs")],
        idle=[("--csw_kd above 0", lambda o: o.csw_kd > 0, ["delta_csw"])],
        later=["delta_csw"],
        classes_only={"csw_kd": bool},
    )

    def __init__(self, opts: Namespace, task: Task):
        super().__init__(opts, task)
        self.prototypes = torch.zeros(0)

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Add the factor and the threshold of the similarities."""
        group = option_group(parser, "class similarity (REMINDER)")
        group.add_argument(
            "--csw_kd", type=float, default=0.0, help="factor of the distillation weighted by class similarity"
        )
        group.add_argument(
            "--delta_csw",
            type=float,
            default=0.0,
            help="similarities below this number over the number of old classes become 0; 1: below uniform",
        )

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """At every step, with --csw_kd: step 0 stores the first prototypes."""
        return opts.csw_kd > 0 and not task.domain

    def attach(self, model: SegmentationModel, teacher: nn.Module | None, previous: Previous) -> None:
        """Read the prototypes of step t−1.

        Raises:
            UserError: step t−1 stored no prototypes, or those of another shape.
        """
        weight = model.cls[0].weight
        if self.task.step == 0:
            self.prototypes = weight.new_zeros(0, weight.shape[1])
            return
        found = previous.entry("prototypes")
        if found is None:
            raise UserError(
                f"--csw_kd {self.opts.csw_kd:g} needs the class prototypes of step {self.task.step - 1}, but {previous.file} has none: "
                "it was trained without --csw_kd; train it again with --method REMINDER"
            )
        shape = (self.task.num_old, weight.shape[1])
        if not isinstance(found, Tensor) or found.shape != shape or not bool(found.isfinite().all()):
            raise UserError(
                f"--csw_kd: the prototypes in {previous.file} are not {shape[0]} rows of {shape[1]} finite numbers; train that step again"
            )
        self.prototypes = found.to(weight)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """{"csw": scalar} from step 1 on."""
        if self.task.step == 0:
            return {}
        task, student = self.task, batch.student
        means = class_similarity.class_means(student.pre_logits.detach(), batch.labels, task.num_old, task.num_total)
        weights = class_similarity.similarity_weights(means, self.prototypes, self.opts.delta_csw)
        value = class_similarity.class_similarity_distillation(
            student.logits, batch.teacher.logits, batch.labels, weights
        )
        return {"csw": self.opts.csw_kd * value}

    def term_specs(self) -> list[TermSpec]:
        """The distillation, measured at the head."""
        return [TermSpec("csw")] if self.task.step else []

    def remedies(self) -> dict[str, str]:
        """Advice for a distillation that diverges."""
        return {"csw": "lower --lr or --csw_kd"}

    @torch.no_grad()
    def end_step(self, model: SegmentationModel, loader: TrainingBatches, device: torch.device) -> None:
        """Compute, in one pass over the step's images, the mean over batches of each class's mean feature in the batch.

        A batch is that of all processes together. The row of a class that no batch shows is 0; the rows of old classes are not changed.
        """
        task, weight = self.task, model.cls[0].weight
        means = class_similarity.PrototypeMeans(task.num_old, task.num_total, weight.shape[1], distributed.sum_)
        was_training = model.training
        model.eval()
        for images, labels in loader:
            features = model(images.to(device, weight.dtype), full_size=False).pre_logits
            means.update(features, labels.to(device).long())
        model.train(was_training)
        self.prototypes = torch.cat([self.prototypes, means.values.to(weight)])

    def state_dict(self) -> dict[str, Any]:
        """The prototypes: of the old classes while the step is trained, of all classes in its checkpoint."""
        return {"prototypes": self.prototypes.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the prototypes."""
        structure.require_fit({"prototypes": self.prototypes}, state, f"state/method/{self.state_key}")
        self.prototypes = state["prototypes"].to(self.prototypes)


def _of_ade(task: str | None) -> dict[str, Any]:
    return PLOP.task_presets["ade", task] | {"delta_csw": 1.0}


class REMINDER(Method):
    """PLOP with class similarity weighted knowledge distillation."""

    name = "REMINDER"
    paper = "Phan et al., Class Similarity Weighted Knowledge Distillation for Continual Semantic Segmentation, CVPR"
    year = 2022
    stores = "the mean feature of each class (prototypes)"
    step0 = "REMINDER, or any with --csw_kd"
    own_parts = (SimilarityDistillation,)
    preset = PLOP.preset | {"csw_kd": 0.5}
    task_presets = {("ade", task): _of_ade(task) for dataset, task in PLOP.task_presets if dataset == "ade"}
