"""The registry of backbones, its contract, and a body that a newcomer adds by one file and one line."""

import pytest
import torch
import torchvision
from torch import nn

import argparser
import segmentation_module
from modules.backbones import BACKBONES, Backbone, find
from modules.body import Body
from modules.fold import fold_frozen
from modules.norm import ABN, make_norm
from modules.pretrained import load_backbone
from tests.examples.four_stages import FourStages
from tests.support import thin
from utils.checkpointing import checkpoint_files
from utils.runtime import distributed
from utils.types import TAP_NAMES


class WithOwnNorms(Body):
    """torchvision's smallest ShuffleNet: plain batch norms and ReLUs, stages with names of its own, no norm of the program."""

    out_channels, slope, own_norms = 96, 1.0, True

    def __init__(self, norm, output_stride=16):
        super().__init__()
        net = torchvision.models.shufflenet_v2_x0_5(weights=None)
        self.stem = nn.Sequential(net.conv1, net.maxpool)
        self.parts = nn.ModuleList([nn.Conv2d(24, 24, 1), net.stage2, net.stage3, nn.Conv2d(96, 96, 3, padding=1)])

    def stages(self):
        return tuple(self.parts)

    def forward(self, images):
        x, taps = self.stem(images), []
        for part in self.parts:
            x = part(x)
            taps.append(x)
        return x, tuple(taps)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    """The one line that each needs."""
    monkeypatch.setitem(BACKBONES, "four_stages", Backbone(FourStages))
    monkeypatch.setitem(BACKBONES, "own_norms", Backbone(WithOwnNorms))


@pytest.fixture(autouse=True)
def _small_head(monkeypatch):
    monkeypatch.setattr(segmentation_module, "HEAD_CHANNELS", thin.FEATURES)
    monkeypatch.setattr(segmentation_module.DeeplabV3, "hidden_channels", 8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------- contract


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "four_stages", "own_norms"])
@pytest.mark.parametrize("stride", [16, 8])
def test_every_backbone_keeps_the_contract(name, stride):
    if (name, stride) == ("own_norms", 8):
        pytest.skip("the toy has one output stride")
    body = find(name).build(make_norm("abn"), stride)
    last, taps = body(torch.randn(2, 3, 64, 64))
    assert isinstance(body, Body) and len(body.stages()) == len(taps) == 4
    assert last.shape == (2, body.out_channels, 64 // stride, 64 // stride)
    assert [tap.shape[2] for tap in taps] == [16, 8, 64 // stride, 64 // stride]
    torch.testing.assert_close(last, nn.functional.leaky_relu(taps[3], body.slope))
    watched = body.watched_weights()
    gradients = torch.autograd.grad(last.square().mean(), watched)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    assert all(weight is next(stage.parameters()) for weight, stage in zip(watched, body.stages()))


def test_names_are_the_choices_of_the_command_line(capsys):
    action = next(action for action in argparser.build_parser()._actions if action.dest == "backbone")
    assert list(action.choices) == list(BACKBONES)
    with pytest.raises(ValueError, match="--backbone vgg: unknown body; choose one of resnet18"):
        find("vgg")


def test_the_network_has_no_branch_per_backbone():
    opts = thin.options("--backbone four_stages")
    model = segmentation_module.make_model(opts, [7, 2])
    assert type(model.body) is FourStages
    weights = model.watched_weights()
    assert list(weights) == list(TAP_NAMES) and weights["stage2"] is model.body.mod3[0].weight


def test_plain_batch_norms_of_a_body_are_fixed_too():
    model = segmentation_module.make_model(thin.options("--backbone own_norms"), [7])
    model.fix_bn()
    model.train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {type(norm) for norm in norms} > {nn.BatchNorm2d}
    assert not any(norm.training or norm.weight.requires_grad for norm in norms)


def test_norms_that_follow_no_conv_stay_in_the_frozen_network():
    body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Identity(), ABN(4), nn.Conv2d(4, 4, 1), ABN(4)).eval()
    for norm in (body[2], body[4]):
        nn.init.uniform_(norm.running_var, 0.5, 2)
    body.requires_grad_(False)
    images, folded = torch.randn(2, 3, 5, 5), fold_frozen(body)
    assert type(folded[2]) is ABN and type(folded[4]) is not ABN
    torch.testing.assert_close(folded(images), body(images))


@pytest.mark.parametrize(("name", "norm", "follow"), [
    ("own_norms", "iabn_sync", True), ("four_stages", "iabn_sync", False), ("four_stages", "abn", True),
])  # fmt: skip
def test_statistics_that_are_not_synchronised_follow_the_main_process(name, norm, follow, monkeypatch):
    asked = []
    monkeypatch.setattr(distributed, "active", lambda: True)
    monkeypatch.setattr(distributed, "wrap", lambda model, device, follow_main: asked.append(follow_main) or model)
    thin.Step(f"--backbone {name} --norm_act {norm}").trainer()
    assert asked == [follow]


# -------------------------------------------------------------- through the command line


@pytest.mark.parametrize("name", ["four_stages", "own_norms"])
def test_a_body_in_one_file_trains_all_steps(name, tmp_path):
    words = f"--backbone {name} --method LSKD --task 6-2 --norm_act abn"
    assert thin.launch(tmp_path, f"{words} --step 0 1 2") == 0
    assert [row[0] for row in thin.rows(tmp_path)] == ["0", "1", "2"]
    losses = thin.document(tmp_path)["steps"]["2"]["epochs"][0]
    assert {"pod/stage1", "md/stage4", "mcd", "kd"} <= set(losses["losses"])
    saved = checkpoint_files.load(tmp_path / "checkpoints" / "6-2-shapes_n_1.pth")
    assert saved["options"]["backbone"] == name
    expected = {"four_stages": "module.body.mod5.0.weight", "own_norms": "module.body.parts.3.weight"}[name]
    assert expected in saved["model_state"]


@pytest.mark.parametrize("name", ["four_stages", "own_norms"])
def test_its_pretrained_weights(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    source, body = (find(name).build(make_norm("abn"), 16) for _ in range(2))
    (tmp_path / "pretrained").mkdir()
    file = {"four_stages": "four_stages_abn.pth.tar", "own_norms": "own_norms.pth.tar"}[name]
    with pytest.raises(ValueError, match=rf"no backbone weights at pretrained/{file}"):
        load_backbone(body, name, "abn", None)
    torch.save(source.state_dict(), tmp_path / "pretrained" / file)
    load_backbone(body, name, "abn", None)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(source(images)[0], body(images)[0])
    with pytest.raises(ValueError, match=f"torchvision has no weights of --backbone {name}; name a file"):
        load_backbone(body, name, "abn", "torchvision")
