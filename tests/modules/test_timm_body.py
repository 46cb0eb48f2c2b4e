"""`--backbone timm:NAME`: a network of convs and a hierarchical transformer, trained through the command line, and what is refused."""

import json
import sys

import pytest
import torch
from torch import nn

from modules import timm_body
from modules.backbones import BackboneNames, find
from modules.norm import make_norm
from modules.pretrained import load_backbone
from scripts import export
from tests.support import thin
from tests.support.interrupted import assert_equal_to_the_bit, run_twice
from utils.errors import UserError
from utils.types import TAP_NAMES

timm = pytest.importorskip("timm", reason="timm is in requirements-dev.txt")

#: A residual network, of which timm has the output stride, and a transformer, of which it has not.
CONV, TRANSFORMER = "timm:resnet10t", "timm:pvt_v2_b0"


@pytest.fixture(autouse=True)
def _small():
    with thin.program():
        yield


def body(name, stride=16, seed=0):
    torch.manual_seed(seed)
    return find(name).build(make_norm("iabn"), stride)


@pytest.mark.parametrize(
    ("name", "stride", "sizes"),
    [
        (CONV, 16, [16, 8, 4, 4]),
        (CONV, 8, [16, 8, 8, 8]),
        (TRANSFORMER, 16, [16, 8, 4, 2]),
        (TRANSFORMER, 8, [16, 8, 4, 2]),
    ],
)
def test_the_contract_of_a_body(name, stride, sizes):
    built = body(name, stride)
    last, taps = built(torch.randn(2, 3, 64, 64))
    assert last.shape == (2, built.out_channels, 64 // stride, 64 // stride)
    assert [tap.shape[2] for tap in taps] == sizes and len(built.stages()) == 4
    if sizes[3] == 64 // stride:
        assert torch.equal(last, taps[3])
    watched = built.watched_weights()
    assert all(weight is next(stage.parameters()) for weight, stage in zip(watched, built.stages()))
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(last.square().mean(), watched))
    odd, _ = built(torch.randn(1, 3, 61, 90))
    assert odd.shape[2:] == (-(-61 // stride), -(-90 // stride))


def test_the_maps_are_those_of_timm():
    built = body(CONV).eval()
    theirs = timm.create_model("resnet10t", features_only=True, output_stride=16).eval()
    theirs.load_state_dict(built.net.state_dict())
    images = torch.randn(1, 3, 64, 64)
    for mine, other in zip(built(images)[1], theirs(images)[-4:]):
        assert torch.equal(mine, other)


def test_stages_with_channels_last_are_permuted():
    """Swin's maps are B x h x w x C; it takes images of one size alone, so that its network is built here."""
    built = body(TRANSFORMER)
    plain = built(torch.ones(1, 3, 64, 64))[1]
    net = built.net

    class Turned(nn.Module):
        def forward(self, images):
            return [tap.permute(0, 2, 3, 1) for tap in net(images)]

    built.net, built.channels_last = Turned(), True
    assert all(torch.equal(a, b) for a, b in zip(built(torch.ones(1, 3, 64, 64))[1], plain))


@pytest.mark.parametrize("name", [CONV, TRANSFORMER])
def test_it_trains_resumes_and_is_exported_with_lskd(name, tmp_path):
    text = f"--backbone {name} --method LSKD --task 6-4 --crop_size 64 --shapes_train 4"
    whole, parts = run_twice(tmp_path, text, 1, 1)
    assert_equal_to_the_bit(whole, parts)
    assert whole["options"]["backbone"] == name
    assert any(key.startswith("module.body.net.") for key in whole["model_state"])
    losses = whole["history"][0]["losses"]
    assert {"pod/stage1", "md/stage4", "mcd", "kd"} <= set(losses)
    checkpoint = tmp_path / "whole" / "checkpoints" / "6-4-shapes_n_1.pth"
    target = tmp_path / "network.pt2"
    assert export.main([str(checkpoint), str(target), "--size", "64", "64"]) == 0
    classes = json.loads(target.with_suffix(".classes.json").read_text())
    assert len(classes) == 11 and classes[0]["name"] == "background"


@pytest.mark.parametrize("name", [CONV, TRANSFORMER])
def test_weights_of_the_whole_network_from_a_file(name, tmp_path):
    torch.manual_seed(5)
    full = timm.create_model(name.removeprefix("timm:"))
    torch.save(full.state_dict(), tmp_path / "full.pth")
    said = []
    loaded = body(name)
    load_backbone(loaded, name, "iabn", str(tmp_path / "full.pth"), said.append)
    theirs = {key.replace(".", "_", 1): value for key, value in full.state_dict().items()} | full.state_dict()
    own = loaded.net.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in own.items())
    assert "full.pth" in said[0]
    torch.save(loaded.state_dict(), tmp_path / "own.pth")
    again = body(name, seed=1)
    load_backbone(again, name, "iabn", str(tmp_path / "own.pth"), said.append)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), loaded.state_dict().values()))
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth does not fit this --backbone"):
        load_backbone(body(name), name, "iabn", str(tmp_path / "other.pth"), said.append)


def test_weights_of_timm(monkeypatch):
    torch.manual_seed(5)
    published = timm.create_model("resnet10t")
    create = timm.create_model

    def offline(name, pretrained=False, **words):
        """The hub is out of reach in the tests: the network comes with weights that are drawn here."""
        return published if pretrained else create(name, **words)

    monkeypatch.setattr(timm, "create_model", offline)
    loaded, said = body(CONV), []
    load_backbone(loaded, CONV, "iabn", "timm", said.append)
    assert torch.equal(loaded.net.state_dict()["layer1.0.conv1.weight"], published.layer1[0].conv1.weight)
    assert said == ["backbone weights: timm resnet10t"]

    def unreachable(name, pretrained=False, **words):
        raise OSError("no route to the hub")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(UserError, match=r"could not be fetched \(no route to the hub\)"):
        load_backbone(loaded, CONV, "iabn", "timm", said.append)
    with pytest.raises(UserError, match="timm has no weights of pvt_v2_nothing"):
        timm_body.pretrained_state("pvt_v2_nothing")
    with pytest.raises(UserError, match="--backbone resnet18 is not of timm"):
        load_backbone(find("resnet18").build(make_norm("iabn"), 16), "resnet18", "iabn", "timm", said.append)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch16_224", r"maps of 1/16, 1/16, 1/16 .* four stages of 1/4, 1/8, 1/16 and 1/32"),
        ("swin_tiny_patch4_window7_224", "does not take images of any size"),
        ("resnet10", r"has no network of that name; did you mean resnet10t\?"),
        ("nothing-like-it", "has no network of that name"),
    ],
)
def test_networks_that_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        body(f"timm:{name}")


def test_without_timm_the_program_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert thin.launch(tmp_path, f"--backbone {CONV} --task 6-2 --step 0 --method FT") == 2
    assert "needs the package timm" in (said := capsys.readouterr().err) and "pip install timm" in said
    assert thin.launch(tmp_path, "--backbone resnet18 --task 6-2 --step 0 --method FT") == 0


def test_names_on_the_command_line(tmp_path, capsys):
    assert "timm:resnet50" in BackboneNames() and "timm:" not in BackboneNames() and "vgg" not in BackboneNames()
    with pytest.raises(SystemExit):
        thin.options("--backbone timm:")
    opts = thin.options(f"--backbone {CONV}")
    assert list(thin.network(opts, [7]).watched_weights()) == list(TAP_NAMES)
