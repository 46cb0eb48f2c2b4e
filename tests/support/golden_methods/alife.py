"""Golden cases of ALIFE: the terms of its three stages."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from torch import Tensor, nn

import argparser
from dataset.tasks import Task
from methods.alife import AdaptiveLogitRegulariser, ClassifierReplay, FeatureReplay, Rotation
from modules.classifier import Classifiers
from tests.support.golden_ops import Arrays, Meta
from utils import alife
from utils.types import Batch, Taps

CPU = torch.device("cpu")


class Given(nn.Module):
    """A network that returns what a case says: full-size logits, or features before its classifiers."""

    def __init__(self, tap: Tensor, classifiers: nn.Module | None = None) -> None:
        super().__init__()
        self.tap, self.cls = tap, classifiers

    def forward(self, images: Tensor, full_size: bool = True) -> Taps:
        """The same tensor for every tap."""
        return Taps(self.tap, self.tap, self.tap, self.tap, ())


def _task(meta: Meta) -> Task:
    old, new = meta["old_classes"], meta["new_classes"]
    return Task("golden", "golden", 1, (tuple(range(old)), tuple(range(old, old + new))))


def _options(words: str) -> Namespace:
    return argparser.parse(["--method", "ALIFE-M", *words.split()])


def _classifiers(arrays: Arrays, meta: Meta) -> Classifiers:
    """One classifier a step with the case's rows."""
    weight, bias = arrays["in_cls_weight"], arrays["in_cls_bias"]
    sizes = [meta["old_classes"], meta["new_classes"]]
    classifiers = Classifiers(weight.shape[1], sizes).double()
    for classifier, w, b in zip(classifiers, weight.split(sizes), bias.split(sizes)):
        classifier.weight.data, classifier.bias.data = w[:, :, None, None].clone(), b.clone()
    return classifiers


def _memory(arrays: Arrays, opts: Namespace, task: Task) -> FeatureReplay:
    part = FeatureReplay(opts, task)
    part.vectors, part.found = arrays["in_memory"], torch.ones(len(arrays["in_memory"]), dtype=torch.bool)
    return part


def step1(arrays: Arrays, meta: Meta) -> Arrays:
    """The terms of stage 1."""
    opts = _options(f"--ali_factor {meta['weight_ali']} --ali_kd_factor {meta['weight_kd']}")
    student, labels = arrays["in_student_logits"].requires_grad_(), arrays["in_labels"].long()
    taps = [Given(logits)(labels) for logits in (student, arrays["in_teacher_logits"])]
    batch = Batch(student, labels, labels, student=taps[0], teacher=taps[1])
    terms = AdaptiveLogitRegulariser(opts, _task(meta)).terms(batch)
    (grad,) = torch.autograd.grad(sum(terms.values()), student)
    return {f"out_{name}": value.detach() for name, value in terms.items()} | {"out_grad_student": grad}


def step3(arrays: Arrays, meta: Meta) -> Arrays:
    """The terms of stage 3."""
    opts = _options(f"--alife_replay_ali {meta['weight_ali']} --alife_replay_memory {meta['weight_memory']}")
    task, classifiers = _task(meta), _classifiers(arrays, meta)
    student = arrays["in_student_logits"].requires_grad_()
    phase = ClassifierReplay(opts, task, _memory(arrays, opts, task))
    phase.attach(Given(student, classifiers), Given(arrays["in_teacher_logits"]), CPU)
    terms = phase.terms(student, arrays["in_labels"].long())
    grads = torch.autograd.grad(sum(terms.values()), [student, *classifiers.parameters()])
    return {f"out_{name}": value.detach() for name, value in terms.items()} | {
        "out_grad_student": grads[0],
        "out_grad_cls_weight": torch.cat(grads[1::2]).flatten(1),
        "out_grad_cls_bias": torch.cat(grads[2::2]),
    }


def rotation(arrays: Arrays, meta: Meta) -> Arrays:
    """The representations and terms of stage 2, and the memory after it; the temperature is a constant of the method."""
    opts, task = _options(f"--alife_lambda {meta['lambda']}"), _task(meta)
    before, after = arrays["in_features_prev"], arrays["in_features_curr"]
    memory = _memory(arrays, opts, task)
    phase = Rotation(opts, task, memory)
    phase.attach(Given(after, _classifiers(arrays, meta)), Given(before), CPU)
    phase.values.data.copy_(arrays["in_params"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("methods.alife.TEMPERATURE", meta["temperature"])
        terms = phase.terms(before, before)
    (grad,) = torch.autograd.grad(sum(terms.values()), phase.values)
    positions = [alife.positions_of(maps) for maps in (before, after)]
    p, p_after, _ = alife.representations(memory.vectors, *positions, meta["temperature"])
    phase.end()
    return {
        "out_matrices": alife.rotations(phase.values, phase.size).detach(),
        "out_rep_prev": p,
        "out_rep_curr": p_after,
        "out_ce": terms["ce"].detach(),
        "out_cosine": terms["cosine"].detach(),
        "out_grad_params": grad,
        "out_updated_memory": memory.vectors,
    }


OPS = {"alife_step1": step1, "alife_step3": step3, "alife_rotation": rotation}
