"""MiB: model the background. The background of a step contains old classes and classes of later steps.

ce   --unce: the background's probability is that of background and all old classes together (utils.loss)
kd   --unkd: the student's background is background and all new classes together (methods/lwf.py)
--init_balanced: new classifiers start as the old background (`Classifiers.init_balanced`)

The factor of kd is 10 for every task, as in the released program. The paper's runs with one class per step (15-1) use 100:
add --loss_kd 100.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import torch
from torch import nn

from dataset.sampler import TrainingBatches
from dataset.tasks import Task
from methods.base import Method, Part, Rules
from segmentation_module import SegmentationModel
from utils.options.groups import add_switch, option_group


def starts_otherwise(opts: Namespace) -> bool:
    """Whether new classifiers start neither from the background nor as it is: by AWT, by NeST, or from PyTorch's own values."""
    return bool(opts.init_awt or opts.att or opts.no_att or opts.nest or opts.warm_up)


class BalancedInitialisation(Part):
    """Initialise new classifiers from the background and divide its probability among them (--init_balanced).

    Reference: MiB (Cermelli et al., CVPR 2020), section 3.3.
    """

    rules = Rules(later=["init_balanced"])

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Add `--init_balanced`."""
        switched = "new classifiers start from the background's (MiB)"
        add_switch(option_group(parser, "classifier"), "--init_balanced", "--orig_init", help=switched)

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """From step 1 on, with --init_balanced, unless new classifiers start in another way (AWT, NeST); domains add no class."""
        return opts.init_balanced and not starts_otherwise(opts) and task.step > 0 and not task.domain

    def init_classifier(
        self, model: SegmentationModel, teacher: nn.Module | None, loader: TrainingBatches, device: torch.device
    ) -> None:
        """Copy the background's weight, and lower the biases by ln(C_new + 1)."""
        model.cls.init_balanced()


class MiB(Method):
    """Modeling the Background."""

    name = "MiB"
    paper = "Cermelli et al., Modeling the Background for Incremental Learning in Semantic Segmentation, CVPR"
    year = 2020
    preset = {"loss_kd": 10.0, "unce": True, "unkd": True, "init_balanced": True}
