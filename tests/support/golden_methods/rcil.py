"""Golden cases of RCIL: its layers, their merge, its distillation of features, and its traces."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import argparser
from dataset.tasks import Task
from methods.rcil import PooledCubeDistillation, RepresentationCompensation, layers_of
from modules.compensation import DoubledConvs, DoubledHead, TwoBranches, shares
from modules.norm import ABN, InPlaceABNSync
from modules.residual import ResidualBlock, Stage
from segmentation_module import SegmentationModel
from tests.support.golden_ops import Arrays, Meta
from tests.support.golden_trace import Trace, random_of
from utils.types import Batch, Taps

#: A task of each data set: the factors are those of the data set.
TASKS = {"voc": "15-5", "ade": "100-50", "cityscapes_domain": "11-5"}


def _task(old: int, new: int) -> Task:
    return Task("golden", "golden", 1, (tuple(range(old)), tuple(range(old, old + new))))


def feature_distillation(arrays: Arrays, meta: Meta) -> Arrays:
    """The part's terms of taps that are activated already."""
    opts = argparser.parse(["--method", "RCIL", "--dataset", meta["dataset"], "--task", TASKS[meta["dataset"]]])
    part = PooledCubeDistillation(opts, _task(meta["old_classes"], meta["new_classes"]))

    def taps(of: Sequence[Tensor]) -> Taps:
        return Taps(of[5], of[5], of[3], of[4], tuple(of[:4]), slope=1.0)

    students = [arrays[f"in_student_{i}"].requires_grad_() for i in range(6)]
    image = torch.zeros(())
    batch = Batch(image, image, image, teacher=taps([arrays[f"in_teacher_{i}"] for i in range(6)]))
    terms = part.terms(batch.with_student(taps(students)))
    grads = torch.autograd.grad(torch.stack(list(terms.values())).sum(), students)
    return {
        "out_spatial": terms["pcd/spatial"].detach(),
        "out_channel": terms["pcd/channel"].detach(),
        **{f"out_grad_student_{i}": grad for i, grad in enumerate(grads)},
    }


def _state(arrays: Arrays) -> Arrays:
    return {name.removeprefix("in_state_"): value for name, value in arrays.items() if name.startswith("in_state_")}


def _load(module: nn.Module, state: Arrays, eps: float) -> nn.Module:
    """The module in float64 with these weights; the layers of TwoBranches have biases where the state has."""
    for layer in layers_of(module).values():
        if any(name.endswith((".conv2.bias", "map_convs.0.bias")) for name in state):
            layer.add_biases()
    for norm in module.modules():
        if isinstance(norm, ABN):
            norm.eps = eps
    missing, unexpected = module.double().load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing), (missing, unexpected)
    return module


def _train_and_evaluate(network: nn.Module, run: nn.Module, layer: TwoBranches, arrays: Arrays, meta: Meta) -> Arrays:
    """Outputs, gradients and statistics of a layer with these draws; `run` is called, `network` has the weights."""
    model = SegmentationModel(network, nn.Identity(), nn.Identity())
    part = RepresentationCompensation(argparser.parse(["--method", "RCIL"]), _task(1, 1))
    model.freeze(part.frozen(model) if meta["frozen"] else [])
    model.train()
    layer.share.copy_(shares(arrays["in_r"]))
    x = arrays["in_x"].requires_grad_()
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    out = run(x)
    grads = torch.autograd.grad((arrays["in_weight"] * out).sum(), [x, *trained.values()])
    outputs = {"out_train": out.detach(), "out_grad_x": grads[0]}
    outputs |= {f"out_grad_{name}": grad for name, grad in zip(trained, grads[1:])}
    statistics = {name: value.clone() for name, value in network.named_buffers() if ".running_" in f".{name}"}
    outputs |= {f"out_state_{name}": value for name, value in statistics.items()}
    model.eval()
    with torch.no_grad():
        outputs["out_eval"] = run(x)
    return outputs


def block(arrays: Arrays, meta: Meta) -> Arrays:
    """A stage of one block."""
    inner = ResidualBlock(meta["inp"], meta["channels"], InPlaceABNSync, meta["stride"], meta["dilation"])
    inner.convs = DoubledConvs(inner.convs)
    _load(inner, _state(arrays), meta["eps"])
    stage = Stage(OrderedDict(block1=inner))
    outputs = _train_and_evaluate(inner, lambda x: stage(x)[0], inner.convs, arrays, meta)
    if meta["last"]:
        with torch.no_grad():
            attention = stage(arrays["in_x"])[1]
        nothing = torch.zeros(())
        outputs["out_eval_tap"] = Taps(nothing, nothing, nothing, nothing, (attention,), slope=0.01).stages[0]
    return outputs


def head(arrays: Arrays, meta: Meta) -> Arrays:
    """The whole head."""
    layer = _head(meta["inp"], meta["out"], meta["hidden"], meta["output_stride"], meta["pooling"])
    _load(layer, _state(arrays), meta["eps"])
    return _train_and_evaluate(layer, layer, layer, arrays, meta)


def _head(inputs: int, outputs: int, hidden: int, stride: int = 16, pooling: int = 32) -> DoubledHead:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DoubledHead, "hidden_channels", hidden)
        return DoubledHead(inputs, outputs, InPlaceABNSync, stride, pooling)


def merge(arrays: Arrays, meta: Meta) -> Arrays:
    """Two blocks and a head, merged."""
    state = _state(arrays)
    network = nn.Module()
    for name in ("block", "proj"):
        convs = [state[f"{name}.convs.conv{i}.weight"] for i in (1, 2, 3)]
        inputs, channels = convs[0].shape[1], [len(weight) for weight in convs]
        inner = ResidualBlock(inputs, channels, InPlaceABNSync, 2 if f"{name}.proj_conv.weight" in state else 1)
        inner.convs = DoubledConvs(inner.convs)
        network.add_module(name, inner)
    pyramid, reduction = state["head.map_convs.0.weight"], state["head.red_conv.weight"]
    network.head = _head(pyramid.shape[1], len(reduction), meta["hidden"])
    _load(network, state, meta["eps"])
    for layer in layers_of(network).values():
        if meta["first"]:
            layer.add_biases()
        layer.merge()
        assert layer.branch(new=False).norm.eps == meta["old_eps_after"]
    return {
        f"out_state_{name}": value.detach()
        for name, value in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


class RCILTrace(Trace):
    """Two epochs of RCIL. The draws come from names, and its POD is the sum of both terms of the pooled cubes."""

    def run(self) -> None:
        """See `Trace`."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RepresentationCompensation, "draws", _draws_of_names)
            super().run()
        for values in self.trainer.recorded:
            values["pod"] = values["pcd/spatial"] + values["pcd/channel"]

    def build_network(self, classes: Sequence[int]) -> nn.Module:
        """See `Trace`; before step 2 no merge has filled the biases of the old branch."""
        model = super().build_network(classes)
        if self.task.step == 1:
            for layer in layers_of(model).values():
                layer.add_biases()
        return model

    def words(self) -> list[str]:
        """See `Trace`; the factors are those of the data set."""
        dataset = self.meta["dataset"]
        factors = argparser.parse(["--method", "RCIL", "--dataset", dataset, "--task", TASKS[dataset]]).pcd_factors
        return [*super().words(), "--pcd_factors", *map(str, factors)]


def _draws_of_names(part: RepresentationCompensation) -> dict[str, Tensor]:
    return {
        path: torch.from_numpy(random_of(f"mix:{part.passes}:{path}").rand(len(layer.share)))
        for path, layer in part.layers.items()
    }


OPS = {
    "rcil_feature_distillation": feature_distillation,
    "rcil_block": block,
    "rcil_head": head,
    "rcil_merge": merge,
}
TRACES = {"rcil": RCILTrace}
