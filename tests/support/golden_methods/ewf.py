"""EWF: the fusion through the part's own hook, and traces of MiB and PLOP that end with it."""

from __future__ import annotations

from argparse import Namespace

import numpy as np
import torch
from torch import Tensor

import argparser
import methods
from dataset.tasks import Task
from methods.base import Previous
from methods.ewf import WeightFusion
from tests.support.golden_trace import Trace

CPU = torch.device("cpu")


def ewf_fusion(arrays: dict[str, Tensor], meta: dict) -> dict[str, Tensor]:
    """Outputs of an ewf_fusion case."""
    choice = ["--threshold_choice"] if meta["threshold_choice"] else []
    words = ["--method", "MiB", "--weight_fusion", "--fix_pre_cls", *choice, "--step", "1", "--dataset", "shapes"]
    old, new = meta["old_classes"], meta["new_classes"]
    task = Task("golden", "golden", 1, (tuple(range(old)), tuple(range(old, old + new))))
    (part,) = (p for p in methods.build(argparser.parse(words), task).parts if isinstance(p, WeightFusion))
    before, after = (
        {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
        for prefix in ("in_old_", "in_new_")
    )
    model = Namespace(state_dict=lambda: after)
    part.attach(model, None, Previous(weights=before))
    (phase,) = part.phases()
    phase.attach(model, None, CPU)
    phase.end()
    factor = torch.tensor(part.factor, dtype=torch.float64)
    return {"out_factor": factor} | {f"out_{name}": value for name, value in after.items()}


class EwfTrace(Trace):
    """A trace whose trained network is fused with the teacher as it was filled."""

    def after_training(self) -> None:
        """Outputs before and after the fusion."""
        super().after_training()
        (part,) = (part for part in self.method.parts if isinstance(part, WeightFusion))
        (fusion,) = self.trainer.phase_runs
        fusion.run(self.loader, lambda: None, 0)
        self.out["out_probe_logits_fused"] = self.probe_logits()
        self.out["out_factor"] = np.array(part.factor)
        self.out["out_fused_cls_0_bias"] = self.model.cls[0].bias.detach().numpy()


OPS = {"ewf_fusion": ewf_fusion}
TRACES = {"ewf": EwfTrace}
