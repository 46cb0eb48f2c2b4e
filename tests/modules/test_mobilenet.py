"""The light body: strides, names, torchvision's weights, and the whole network on it."""

from argparse import Namespace

import pytest
import torch
import torchvision
from torch import nn

from modules.fold import fold_frozen
from modules.mobilenet import InvertedResidual, MobileNetV2
from modules.norm import ABN, make_norm
from modules.pretrained import load_backbone
from segmentation_module import make_model
from tests.support import thin

WIDTHS = (24, 32, 96, 320)


def model_of(norm="abn", stride=16, **changes):
    torch.manual_seed(0)
    opts = thin.options(f"--backbone mobilenet_v2 --norm_act {norm} --output_stride {stride}")
    return make_model(Namespace(**{**vars(opts), **changes}), [3, 2])


def leaky(module):
    """The module with leaky ReLUs where it had ReLU6."""
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU6):
            setattr(module, name, nn.LeakyReLU(0.01))
        leaky(child)
    return module


def disturbed(net):
    """The network with norms as after some training: statistics, shifts, scales of both signs, none of them alike."""
    torch.manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            sign = torch.where(torch.rand_like(module.weight) < 0.2, -1.0, 1.0)
            module.weight.data = sign * torch.empty_like(sign).uniform_(0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in")
    return net.eval()


@pytest.fixture
def torchvision_net():
    return disturbed(leaky(torchvision.models.mobilenet_v2(weights=None)))


@pytest.mark.parametrize(
    ("stride", "size", "maps"),
    [
        (16, (64, 48), ((16, 12), (8, 6), (4, 3), (4, 3))),
        (8, (64, 48), ((16, 12), (8, 6), (8, 6), (8, 6))),
        (16, (65, 33), ((17, 9), (9, 5), (5, 3), (5, 3))),
    ],
)
def test_shapes(stride, size, maps):
    taps = model_of(stride=stride)(torch.randn(2, 3, *size))
    assert [tuple(a.shape) for a in taps.attentions] == [(2, c, *m) for c, m in zip(WIDTHS, maps)]
    assert taps.body.shape == (2, 320, *maps[3])
    assert taps.logits_small.shape == (2, 5, *maps[3])
    assert taps.logits.shape == (2, 5, *size)


def test_dilation_starts_after_the_conv_that_lost_its_stride():
    expected = {16: [1] * 14 + [2] * 3, 8: [1] * 7 + [2] * 7 + [4] * 3}
    for stride, dilations in expected.items():
        with torch.device("meta"):
            body = MobileNetV2(make_norm("abn"), stride)
        depthwise = [m for m in body.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
        assert [conv.dilation[0] for conv in depthwise] == dilations


def test_bottlenecks_are_linear_and_residual_where_they_fit():
    block = InvertedResidual(4, 4, make_norm("abn"), 6).eval()
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(block(x), x + block.convs(x))
    assert block.convs.bn3.activation == "identity"
    assert [block.convs.bn1.activation, block.convs.bn2.activation] == ["leaky_relu"] * 2
    assert not InvertedResidual(4, 4, make_norm("abn"), 6, stride=2).residual
    assert not InvertedResidual(4, 6, make_norm("abn"), 6).residual


def test_refused_stride():
    with pytest.raises(ValueError, match="--output_stride 32"):
        MobileNetV2(make_norm("abn"), 32)


def test_torchvision_names_and_shapes():
    with torch.device("meta"):
        theirs = MobileNetV2.from_torchvision(torchvision.models.mobilenet_v2(weights=None).state_dict())
        ours = MobileNetV2(make_norm("abn")).state_dict()
    assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in ours.items()}


@pytest.mark.parametrize("norm", ["abn", "iabn"])
@pytest.mark.parametrize("stride", [16, 8])
def test_torchvision_weights_compute_the_same(tmp_path, torchvision_net, norm, stride):
    torch.save(torchvision_net.state_dict(), tmp_path / "mine.pth")
    body = MobileNetV2(make_norm(norm), stride).eval()
    load_backbone(body, "mobilenet_v2", norm, str(tmp_path / "mine.pth"), lambda line: None)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        attentions = body(x)[1]
        expected = [torchvision_net.features[:end](x) for end in (4, 7, 14, 18)]
    # Dilated stages compute torchvision's coarser maps on every second (fourth) row and column.
    for ours, target in zip(attentions, expected, strict=True):
        skip = ours.shape[2] // target.shape[2]
        assert (ours[:, :, ::skip, ::skip] - target).abs().max() <= 1e-4 * target.abs().max()


def test_torchvision_by_name(monkeypatch, torchvision_net):
    state = torchvision_net.state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: dict(state))
    model = model_of(no_pretrained=False, pretrained="torchvision")
    assert torch.equal(model.body.mod5.block4.convs.bn3.running_var, state["features.17.conv.3.running_var"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("features.7.conv.1.0.weight"), "lacks mod4.block1.convs.conv2.weight;.*same MobileNetV2"),
        (lambda s: s.update({"features.19.0.weight": torch.zeros(1)}), "has the unknown features.19.0.weight"),
        (lambda s: s.update({"features.0.0.weight": torch.zeros(16, 3, 3, 3)}), "another shape for mod1.conv1.weight"),
    ],
)
def test_other_weights_are_refused(tmp_path, change, message):
    state = torchvision.models.mobilenet_v2(weights=None).state_dict()
    change(state)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=message):
        load_backbone(MobileNetV2(make_norm("abn")), "mobilenet_v2", "abn", str(tmp_path / "odd.pth"))


@pytest.mark.parametrize("norm", ["abn", "iabn"])
def test_training_reaches_every_parameter(norm):
    model = model_of(norm)
    taps = model(torch.randn(2, 3, 32, 32))
    (taps.logits.square().mean() + sum(f.square().mean() for f in taps.features)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("norm", ["abn", "iabn"])
def test_folded_and_gradient_free_passes_agree(norm):
    model = disturbed(model_of(norm))
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        frozen = model(x)
        folded = fold_frozen(model)(x)
    for a, b, c in zip(model(x).features, frozen.features, folded.features, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())
    assert not any(isinstance(module, ABN) for module in fold_frozen(model).modules())


def test_stage_weights_are_the_first_convs_of_the_stages():
    model = model_of()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(weight)] for weight in list(model.watched_weights().values())[:5]] == [
        *(f"body.mod{i}.block1.convs.conv1.weight" for i in (2, 3, 4, 5)),
        "head.red_bn.weight",
    ]
