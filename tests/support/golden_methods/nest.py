"""NeST: similarity, generated classifiers and write-back through the phase's own hooks, and traces of MiB and PLOP that start with it."""

from __future__ import annotations

from argparse import Namespace

import numpy as np
import torch
from torch import Tensor, nn

import argparser
import methods
from dataset.sampler import FixedBatches
from dataset.tasks import Task
from methods.nest import PreTuning, Transformation
from modules.classifier import Classifiers
from tests.support.golden_ops import series
from tests.support.golden_trace import Trace, fill

CPU = torch.device("cpu")
TENSORS = ("weight_old", "weight_new", "new_bias", "weight_old_bg", "weight_new_bg")


class Recorded(nn.Module):
    """A teacher whose outputs are those of the case, one batch after the other."""

    def __init__(self, logits: list[Tensor], pre_logits: list[Tensor]):
        super().__init__()
        self.outputs = iter([Namespace(logits=a, pre_logits=b) for a, b in zip(logits, pre_logits, strict=True)])

    def forward(self, images: Tensor, full_size: bool = True) -> Namespace:
        """The next outputs."""
        return next(self.outputs)


def classifiers(arrays: dict[str, Tensor], classes: list[int]) -> Classifiers:
    """Classifiers with the case's weights, where it has them."""
    channels = arrays["in_cls_0_weight"].shape[1]
    built = Classifiers(channels, classes).double()
    for number, classifier in enumerate(built):
        for name, parameter in classifier.named_parameters():
            if f"in_cls_{number}_{name}" in arrays:
                parameter.data.copy_(arrays[f"in_cls_{number}_{name}"])
    return built


def phase_of(cls: Classifiers, teacher: nn.Module | None) -> PreTuning:
    """The phase of the method that the options build, attached to these classifiers."""
    opts = argparser.parse(["--method", "MiB", "--warm_up", "--unce_in_warm", "--step", "1", "--dataset", "shapes"])
    ends = [sum(cls.classes[: i + 1]) for i in range(len(cls.classes))]
    steps = tuple(tuple(range(end - count, end)) for end, count in zip(ends, cls.classes))
    (phase,) = methods.build(opts, Task("golden", "golden", len(steps) - 1, steps)).phases()
    phase.attach(Namespace(cls=cls), teacher, CPU)
    return phase


def nest_similarity(arrays: dict[str, Tensor], meta: dict) -> dict[str, Tensor]:
    """Outputs of a nest_similarity case."""
    labels = series(arrays, "in_labels")
    teacher = Recorded(series(arrays, "in_teacher_logits"), series(arrays, "in_pre_logits"))
    number, old = 0, []
    while f"in_cls_{number}_weight" in arrays:
        old.append(len(arrays[f"in_cls_{number}_weight"]))
        number += 1
    phase = phase_of(classifiers(arrays, [*old, meta["new_classes"]]), teacher)
    phase.begin(FixedBatches([(torch.zeros(1, 3, *label.shape[1:]), label) for label in labels]))
    return {f"out_{name}": getattr(phase.tuned, name).detach() for name in ("weight_old", "weight_new")}


def nest_generate(arrays: dict[str, Tensor], meta: dict) -> dict[str, Tensor]:
    """Outputs of a nest_generate case."""
    cls = classifiers(arrays, meta["classes"])
    phase = phase_of(cls, None)
    tuned: Transformation = phase.tuned
    for name in TENSORS:
        getattr(tuned, name).data.copy_(arrays[f"in_{name}"])
    logits = tuned(arrays["in_features"], cls)
    grads = torch.autograd.grad((arrays["in_weight"] * logits).sum(), [getattr(tuned, name) for name in TENSORS])
    out = {"out_logits": logits.detach()} | {f"out_grad_{name}": grad for name, grad in zip(TENSORS, grads)}
    phase.end()
    for number, classifier in enumerate(cls):
        out |= {f"out_cls_{number}_{name}": value.detach() for name, value in classifier.named_parameters()}
    return out


class NestTrace(Trace):
    """A trace that begins with the pre-tuning on the labels as they are."""

    def before_training(self) -> None:
        """Thresholds, similarity, pre-tuning and write-back; then the outputs of that moment."""
        self.method.begin_step(self.loader, self.teacher, CPU)
        (run,) = self.trainer.phase_runs
        phase, begin, end = run.phase, run.phase.begin, run.phase.end

        def begin_as_filled(loader):
            begin(loader)
            phase.tuned.new_bias.data.copy_(fill("new_bias", phase.tuned.new_bias))
            self.out |= {
                f"out_{name}": value.numpy() for name, value in phase.state_dict().items() if "_bg" not in name
            }

        def end_and_remember():
            self.out |= {f"out_tuned_{name}": value.numpy() for name, value in phase.state_dict().items()}
            end()

        phase.begin, phase.end = begin_as_filled, end_and_remember
        run.run(self.loader, lambda: None, 0)
        history = [entry for entry in self.trainer.history if entry.get("phase") == phase.name]
        self.out["out_warm_epochs"] = np.array([entry["losses"]["ce"] for entry in history])
        for number, classifier in enumerate(self.model.cls):
            for name, value in classifier.named_parameters():
                self.out[f"out_cls_{number}_{name}"] = value.detach().numpy().copy()
        self.out["out_stem_running_mean"] = self.model.body.mod1.bn1.running_mean.numpy().copy()
        self.out["out_probe_logits_before"] = self.probe_logits()


OPS = {"nest_similarity": nest_similarity, "nest_generate": nest_generate}
TRACES = {"nest": NestTrace}
