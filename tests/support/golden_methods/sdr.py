"""SDR: running class means, attraction, repulsion, matching and sparsity, and traces that start from prototypes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from methods.sdr import LatentPrototypes
from tests.support.golden_ops import Arrays, Meta
from tests.support.golden_trace import Trace
from utils import latent_space


def small_labels(arrays: Arrays) -> Tensor:
    """The case's labels at the size of its features."""
    return latent_space.at_size(arrays["in_labels"], arrays["in_features"].shape[-2:])


def with_gradient(name: str, value: Tensor, features: Tensor) -> Arrays:
    """A value, and its gradient, zeros where the features do not enter it."""
    grad = torch.zeros_like(features)
    if value.requires_grad:
        (grad,) = torch.autograd.grad(value, features, retain_graph=True)
    return {f"out_{name}": value.detach(), "out_grad_student" if name == "value" else f"out_grad_{name}": grad}


def prototypes(arrays: Arrays, meta: Meta) -> Arrays:
    left_out = latent_space.leaves_background_out(meta["step"], meta["overlap"], meta["sequential"])
    known, counts = arrays["in_prototypes"], arrays["in_counts"]
    sums = latent_space.class_sums(arrays["in_features"], small_labels(arrays), len(known))
    known, counts = latent_space.updated_prototypes(known, counts, *sums, "first" if left_out else None)
    return {"out_prototypes": known, "out_counts": counts}


def contrastive(arrays: Arrays, meta: Meta) -> Arrays:
    features, labels = arrays["in_features"].requires_grad_(), small_labels(arrays)
    without = "first" if meta["nobgr"] else None
    attraction = latent_space.attraction(features, labels, arrays["in_prototypes"], without)
    repulsion = latent_space.repulsion(features, labels, without)
    return with_gradient("attraction", attraction, features) | with_gradient("repulsion", repulsion, features)


def matching(arrays: Arrays, meta: Meta) -> Arrays:
    features = arrays["in_features"].requires_grad_()
    labels = latent_space.old_labels(small_labels(arrays), arrays["in_teacher_logits"], meta["sequential"])
    value = latent_space.prototype_matching(features, labels, arrays["in_prototypes"], meta["sumafter"])
    return with_gradient("value", value, features)


def sparsity(arrays: Arrays, meta: Meta) -> Arrays:
    assert meta["loss"] == "ratio", meta["loss"]
    features = arrays["in_features"].requires_grad_()
    value = latent_space.sparsity(features, small_labels(arrays), meta["normalization"], meta["shrinking"])
    return with_gradient("value", value, features)


class SDRTrace(Trace):
    """Step t−1 left prototypes and counts, and the trained step leaves its own."""

    def previous_checkpoint(self, teacher: nn.Module) -> dict:
        state = {
            "prototypes": torch.as_tensor(self.case["in_prototypes"]),
            "count_features": torch.as_tensor(self.case["in_counts"]),
        }
        return super().previous_checkpoint(teacher) | {"method_state": {LatentPrototypes.state_key: state}}

    def after_training(self) -> None:
        super().after_training()
        state = self.method.state_dict()[LatentPrototypes.state_key]
        self.out["out_prototypes"], self.out["out_counts"] = (value.numpy() for value in state.values())

    def log_line(self, values: dict[str, float]) -> dict[str, float]:
        return super().log_line(values) | {
            "Lfc": values["attraction"],
            "Lsepclus": values["repulsion"],
            "LDEProto": values["matching"],
            "Lfeatspars": values["sparsity"],
            "LSNNL": 0.0,  # losses that SDR's flags leave out
            "LCIL": 0.0,
        }

    def epoch_row(self, means: dict[str, float]) -> list[float]:
        return [means["ce"], means["kd"] + means["attraction"] + means["repulsion"]]


OPS = {
    "sdr_prototypes": prototypes,
    "sdr_contrastive": contrastive,
    "sdr_prototype_matching": matching,
    "sdr_sparsity": sparsity,
}
TRACES = {"sdr": SDRTrace}
