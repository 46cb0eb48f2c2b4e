"""AWT: attribution, channels and transfer through the part's own hook, and traces of MiB that start from it."""

from __future__ import annotations

from argparse import Namespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import argparser
import methods
from dataset.sampler import FixedBatches
from dataset.tasks import Task
from methods.awt import AttributionTransfer, attributions, pixels_of
from modules.classifier import Classifiers
from tests.support.golden_trace import Trace

CPU = torch.device("cpu")
#: Which of the release's two programs, and the choice here.
CHANNELS = {"attribute": "shared", "attribute_class": "per_class"}


class SmallNetwork(nn.Module):
    """The teacher of the cases: one conv in place of body and head."""

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, images: Tensor, full_size: bool = True) -> Namespace:
        """The features that the classifiers would see."""
        return Namespace(pre_logits=F.leaky_relu(F.conv2d(images, self.weight, self.bias, 2, 1), 0.01))


def transfer_part(opts: Namespace, task: Task) -> AttributionTransfer:
    """The part of the method that the options build."""
    (part,) = (part for part in methods.build(opts, task).parts if isinstance(part, AttributionTransfer))
    return part


def classifiers(arrays: dict[str, Tensor]) -> Classifiers:
    """The case's classifiers, those of the earlier steps and the new one."""
    names = [*(f"cls{i}" for i in range(len([n for n in arrays if n.startswith("in_cls") and "bias" in n]))), "new"]
    biases = [arrays[f"in_{name}_bias"] for name in names]
    built = Classifiers(256, [len(bias) for bias in biases]).double()
    for classifier, name, bias in zip(built, names, biases, strict=True):
        classifier.weight.data.copy_(arrays[f"in_{name}_weight"][:, :, None, None])
        classifier.bias.data.copy_(bias)
    return built


def awt_attribution(arrays: dict[str, Tensor], meta: dict) -> dict[str, Tensor]:
    """Outputs of an awt_attribution case."""
    words = f"--method MiB --att {meta['att']} --mask_att --awt_channels {CHANNELS[meta['script']]}"
    opts = argparser.parse([*words.split(), "--awt_reduce", meta["reduce"], "--step", "1", "--dataset", "shapes"])
    cls = classifiers(arrays)
    old, new = sum(cls.classes[:-1]), cls.num_new
    part = transfer_part(opts, Task("golden", "golden", 1, (tuple(range(old)), tuple(range(old, old + new)))))
    teacher = SmallNetwork(arrays["in_conv_weight"], arrays["in_conv_bias"])
    images, labels = arrays["in_images"], arrays["in_labels"]
    loader = FixedBatches(list(zip(images[:, None], labels[:, None])))
    part.init_classifier(Namespace(cls=cls), teacher, loader, CPU)
    shape = part.scores.shape if meta["script"] == "attribute_class" else part.scores.shape[1:]
    return {
        "out_attribution_sums": kept_sums(teacher, cls, images, labels, meta),
        "out_scores": part.scores.reshape(shape),
        "out_selected": part.selected.reshape(shape),
        "out_new_weight": cls[-1].weight.detach().flatten(1),
        "out_new_bias": cls[-1].bias.detach(),
    }


def kept_sums(teacher: nn.Module, cls: Classifiers, images: Tensor, labels: Tensor, meta: dict) -> Tensor:
    """(maps, c) sums over positions of the attributions that a set of classes keeps, set by set, at most one row an image."""
    features, baseline = (teacher(x).pre_logits for x in (images, torch.zeros_like(images[:1])))
    maps = attributions(features, baseline, cls[0].weight[0].detach().flatten(), images.shape[2:])
    small = pixels_of(labels, features.shape[2:])
    sets = [[c] for c in meta["new_classes"]] if meta["script"] == "attribute_class" else [meta["new_classes"]]
    masks = [torch.isin(small, torch.tensor(classes)).flatten(1).any(1) for classes in sets]
    return torch.cat([maps[mask].sum((2, 3)) for mask in masks])[: len(images)]


class AwtTrace(Trace):
    """MiB whose new classifier starts from the attributions of the two batches."""

    def words(self) -> list[str]:
        """The release's program stands for an option here."""
        return [*super().words(), "--awt_channels", CHANNELS[self.meta["script"]]]

    def before_training(self) -> None:
        """Scores and channels of the initialisation."""
        (part,) = (part for part in self.method.parts if isinstance(part, AttributionTransfer))
        shape = self.case["out_scores"].shape
        self.out["out_scores"] = part.scores.reshape(shape).numpy()
        self.out["out_selected"] = part.selected.reshape(shape).numpy()
        super().before_training()


OPS = {"awt_attribution": awt_attribution}
TRACES = {"awt": AwtTrace}
