"""The functions of golden/: how each op's outputs are computed from its inputs. Training traces are in golden_trace.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils import distillation, loss, masks, pseudo
from utils.pod import embedding
from utils.pod import terms as pod
from utils.pod.options import PodOptions, TapOptions

#: Relative agreement of functions, and of thresholds, which are stored in float32.
TOLERANCE, THRESHOLD_TOLERANCE = 1e-9, 1e-6

Arrays = dict[str, Tensor]
Meta = dict[str, Any]


def series(arrays: Arrays, prefix: str) -> list[Tensor]:
    """The arrays prefix_0, prefix_1, …"""
    series = []
    while f"{prefix}_{len(series)}" in arrays:
        series.append(arrays[f"{prefix}_{len(series)}"])
    return series


def entropy(arrays: Arrays, meta: Meta) -> Arrays:
    return {"out_entropy": pseudo.entropy(arrays["in_probabilities"])}


def find_median(arrays: Arrays, meta: Meta) -> Arrays:
    medians = pseudo.MedianThresholds(meta["old_classes"], meta["current_classes"], meta["mode"], meta["nb_bins"])
    for logits, labels in zip(series(arrays, "in_teacher_logits"), series(arrays, "in_labels"), strict=True):
        medians.update(logits, labels)
    largest = torch.tensor(pseudo.max_value(meta["mode"], meta["current_classes"]), dtype=torch.float64)
    return {"out_thresholds": medians.finish(meta["base_threshold"]), "out_max_value": largest}


def _output_loss(op: str, arrays: Arrays, meta: Meta, student: Tensor) -> Tensor:
    teacher, labels, num_old = arrays["in_teacher_logits"], arrays["in_labels"], meta["old_classes"]
    reduction = meta["reduction"]
    if op == "unbiased_cross_entropy":
        return distillation.reduce(loss.unbiased_cross_entropy(student, labels, num_old), reduction)
    if op == "bce_with_ignore":
        return distillation.reduce(loss.binary_cross_entropy(student, labels), reduction)
    if op == "focal":
        return distillation.reduce(loss.focal(student, labels, meta["gamma"], meta["alpha"]), reduction)
    if op == "knowledge_distillation":
        return distillation.knowledge_distillation(student, teacher, meta["alpha"], reduction=reduction)
    if op == "unbiased_knowledge_distillation":
        return distillation.unbiased_knowledge_distillation(student, teacher, meta["alpha"], reduction=reduction)
    if op == "icarl":
        return distillation.icarl_disjoint(student, labels, teacher, meta["bkg"], reduction)
    if op == "excluded_kd_sum":
        labels = arrays[meta["labels"]]
        return distillation.excluded_knowledge_distillation(student, teacher, labels, "sum", reduction=reduction)
    assert op == "soft_crossentropy_uncertain", op
    confident = teacher.softmax(1).amax(1) > 0.5  # meta.valid says so
    certain = pseudo.certain_pixels(labels, confident & (labels < num_old), num_old, "soft_uncertain")
    return distillation.reduce(loss.soft_cross_entropy(student, labels, teacher, certain), reduction)


def output_loss(arrays: Arrays, meta: Meta) -> Arrays:
    student = arrays["in_student_logits"].requires_grad_()
    value = _output_loss(meta["op"], arrays, meta, student)
    (grad,) = torch.autograd.grad(value.sum(), student)
    return {"out_value": value.detach(), "out_grad_student": grad}


def local_pod(arrays: Arrays, meta: Meta) -> Arrays:
    return {"out_embedding": embedding.local_pod(arrays["in_features"], meta["spp_scales"])}


def second_order_pooling(arrays: Arrays, meta: Meta) -> Arrays:
    features, groups = arrays["in_features"], meta["mmm"]
    return {
        "out_embedding_sqnorm": loss.context_distance(features, torch.zeros_like(features), groups).square(),
        "out_distance": loss.context_distance(features, 1.01 * features + 0.02, groups),
    }


def _pod_options(meta: Meta) -> PodOptions:
    tap = TapOptions(meta["pod"], meta["pod_factor"], meta.get("pod_prepro", "pow"), tuple(meta["spp_scales"]))
    return PodOptions.parse(meta["pod_options"], tap)


def _schedule(meta: Meta) -> float:
    return math.sqrt((meta["old_classes"] + meta["new_classes"]) / meta["new_classes"])


def _with_gradients(outputs: Arrays, total: Tensor, students: list[Tensor]) -> Arrays:
    grads = torch.autograd.grad(total, students)
    gradients = {f"out_grad_student_{index}": grad for index, grad in enumerate(grads)}
    return {name: value.detach() for name, value in outputs.items()} | gradients


def plop_feature_distillation(arrays: Arrays, meta: Meta) -> Arrays:
    students = [tap.requires_grad_() for tap in series(arrays, "in_student")]
    terms = pod.pod_terms(series(arrays, "in_teacher"), students, _pod_options(meta))
    total = pod.pod_loss(terms, _schedule(meta))
    return _with_gradients({"out_pod_total": total}, total, students)


def lskd_feature_distillation(arrays: Arrays, meta: Meta) -> Arrays:
    teachers, labels, num_old = series(arrays, "in_teacher"), arrays["in_labels"], meta["old_classes"]
    students = [tap.requires_grad_() for tap in series(arrays, "in_student")]
    erased = list(zip(series(arrays, "in_teacher_old_masked"), series(arrays, "in_teacher_new_masked"), strict=True))
    kept: list[Tensor | None] = [None, None]  # the first two stages are not masked
    for tap in range(2, 6):
        channels = None if tap == 5 else "released"
        mask = masks.tap_mask(
            teachers[tap], erased[tap], labels, num_old, meta["sigmoid"], meta["dis"], channels=channels
        )
        kept.append(mask)
    layers = torch.stack(pod.pod_terms(teachers, students, _pod_options(meta), kept))
    context = meta["aaaaaa"] * loss.context_distillation(teachers[4], students[4], meta["mmm"], kept[4])
    logged = _schedule(meta) * (layers.mean() + context)  # the official log's POD, which enters no loss
    outputs = {"out_layer_losses": layers, "out_mcd": context, "out_pod_total": logged}
    return _with_gradients(outputs, layers.sum() + context, students)


OPS: dict[str, Callable[[Arrays, Meta], Arrays]] = {
    "entropy": entropy,
    "find_median": find_median,
    "local_pod": local_pod,
    "second_order_pooling": second_order_pooling,
    "plop_feature_distillation": plop_feature_distillation,
    "lskd_feature_distillation": lskd_feature_distillation,
} | dict.fromkeys(
    (
        "unbiased_cross_entropy",
        "bce_with_ignore",
        "focal",
        "knowledge_distillation",
        "unbiased_knowledge_distillation",
        "icarl",
        "excluded_kd_sum",
        "soft_crossentropy_uncertain",
    ),
    output_loss,
)


def check(case: dict[str, np.ndarray], meta: Meta, ops: Mapping[str, Callable[[Arrays, Meta], Arrays]] = OPS) -> None:
    """Computes the outputs of a case and compares every one of them.

    Args:
        case: the arrays of the file.
        meta: its decoded meta.
        ops: the functions by op.
    """
    outputs = ops[meta["op"]]({name: torch.from_numpy(array.copy()) for name, array in case.items()}, meta)
    expected = {name: array for name, array in case.items() if name.startswith("out_")}
    assert set(outputs) == set(expected), "an output is not compared"
    for name, array in expected.items():
        mine = outputs[name].numpy()
        assert mine.shape == array.shape, name
        if array.dtype == bool:
            np.testing.assert_array_equal(mine, array, err_msg=name)
            continue
        tolerance = THRESHOLD_TOLERANCE if name == "out_thresholds" else TOLERANCE
        # Elements that are nearly 0 are compared relative to the largest
        scale = float(np.abs(array[np.isfinite(array)]).max(initial=0))
        np.testing.assert_allclose(mine, array, rtol=tolerance, atol=1e-3 * tolerance * scale, err_msg=name)
