"""UCD: MiB, and a contrastive distillation of the features that the classifiers see.

ce, kd        as in MiB                                                                       (methods/ft.py, methods/lwf.py)
contrastive   --ucd · contrastive distillation at --ucd_temperature, step ≥ 1                 (utils.contrastive)
--ucd_freeze  the classifier of step 0 is not trained

The published trainer stops after step 0. The behaviour here is that of the trainer with its calls corrected. It contains errors, which
are the default here; --ucd_mend corrects the ones that are named:
    labels       the annotation, 255 included, is averaged to the size of the features: borders get labels of other classes
    denominator  the negatives in the denominator are not shifted by the maximum, as the positive is
With --ucd_freeze later the classifier is trained in step 0; in the release it keeps its random weights.

The release ignores labels above 20, VOC's last class; here labels above the task's last class are ignored if that is greater than 20.
Each process compares the positions of its own batch, as in the release.

Reference: "Uncertainty-aware Contrastive Distillation for Incremental Semantic Segmentation", TPAMI 2022.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable

from torch import Tensor, nn

from dataset.tasks import Task
from methods.base import Method, Part, Rules
from methods.mib import MiB
from segmentation_module import SegmentationModel
from utils import contrastive
from utils.balance.equilibrium import TermSpec
from utils.options.groups import option_group
from utils.options.rules import LARGE
from utils.types import Batch

#: Errors of the release that --ucd_mend corrects.
SLIPS = ("labels", "denominator")
#: Title of the options in the help.
GROUP = "contrastive distillation (UCD)"


class ContrastiveDistillation(Part):
    """Contrastive loss: makes features of one class similar, and features of different classes dissimilar (--ucd)."""

    needs_teacher = True
    rules = Rules(
        ranges={"ucd": (0, LARGE), "ucd_temperature": (1e-3, LARGE)},
        idle=[("--ucd above 0", lambda o: o.ucd > 0, ["ucd_temperature", "ucd_mend"])],
        later=["ucd", "ucd_temperature", "ucd_mend"],
        classes_only={"ucd": bool},
    )

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Add the factor, the temperature, and the choice of corrections."""
        add = option_group(parser, GROUP).add_argument
        add("--ucd", type=float, default=0.0, help="factor of the contrastive distillation")
        add("--ucd_temperature", type=float, default=contrastive.TEMPERATURE, help="temperature of the cosines")
        add("--ucd_mend", nargs="+", default=None, choices=SLIPS, help="slips of the release that are corrected")

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """From step 1 on, with --ucd."""
        return opts.ucd > 0 and task.step > 0 and not task.domain

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """{"contrastive": scalar}."""
        mend, student, teacher = self.opts.ucd_mend or (), batch.student, batch.teacher
        last = max(contrastive.LAST_OF_VOC, self.task.num_total - 1)
        given = contrastive.given_labels(batch.truth, student.pre_logits.shape[-2:], last, "labels" in mend)
        pairs = contrastive.make_pairs(student.pre_logits, teacher.pre_logits, teacher.logits_small, given)
        value = contrastive.contrastive_distillation(pairs, self.opts.ucd_temperature, "denominator" in mend)
        return {"contrastive": batch.student.logits.new_zeros(()) + self.opts.ucd * value}

    def term_specs(self) -> list[TermSpec]:
        """The contrastive loss, measured at the head."""
        return [TermSpec("contrastive")]

    def remedies(self) -> dict[str, str]:
        """Advice for a contrastive loss that diverges."""
        return {"contrastive": "lower --lr or --ucd"}


class FrozenFirstClassifier(Part):
    """The classifier of background and the classes of step 0 is not trained. Balanced initialisation may still change its background."""

    rules = Rules(classes_only={"ucd_freeze": lambda when: when != "never"})

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Add `--ucd_freeze`."""
        when = "steps that do not train the classifier of step 0: always, later ones, never"
        option_group(parser, GROUP).add_argument(
            "--ucd_freeze", default="never", choices=["always", "later", "never"], help=when
        )

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """With --ucd_freeze always; with --ucd_freeze later, from step 1 on."""
        return opts.ucd_freeze == "always" or (opts.ucd_freeze == "later" and task.step > 0)

    def frozen(self, model: SegmentationModel) -> Iterable[nn.Module | nn.Parameter]:
        """The first classifier; the first two if the first one consists of background modes."""
        return list(model.cls)[: 1 if model.cls.background_modes == 1 else 2]


class UCD(Method):
    """MiB with uncertainty-aware contrastive distillation."""

    name = "UCD"
    paper = "Yang et al., Uncertainty-aware Contrastive Distillation for Incremental Semantic Segmentation, TPAMI"
    year = 2022
    own_parts = (ContrastiveDistillation, FrozenFirstClassifier)
    preset = MiB.preset | {"ucd": 0.01, "ucd_freeze": "always"}
