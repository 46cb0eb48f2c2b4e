"""MiB: model the background. What is background now held old classes before and will hold new ones tomorrow.

ce   --unce: the background's probability is that of background and all old classes together (utils.loss)
kd   --unkd: the student's background is background and all new classes together (methods/lwf.py)
--init_balanced: new classifiers start as the old background (modules/classifier.py)
"""

from __future__ import annotations

from methods.base import Method


class MiB(Method):
    """Modeling the Background."""

    name = "MiB"
    paper = "Cermelli et al., Modeling the Background for Incremental Learning in Semantic Segmentation, CVPR"
    year = 2020
    preset = {"loss_kd": 10.0, "unce": True, "unkd": True, "init_balanced": True}
    # One class a step, in whatever order: the published runs need ten times the distillation.
    task_presets = {
        ("voc", task): {"loss_kd": 100.0}
        for task in ("15-5s", *(f"15-5s_{order}" for order in "bcdefghijklmnopqrstuvw"))
    }
