"""Backbone weights: official files, torchvision's names, and what is refused."""

import copy
import functools
import hashlib

import pytest
import torch
import torchvision
from torch import nn

from modules.norm import make_norm
from modules.pretrained import load_backbone
from modules.resnet import ResNet


def torchvision_resnet18():
    """torchvision's ResNet-18 with the leaky activation, trained-looking norms and some negative scales."""
    torch.manual_seed(0)
    net = torchvision.models.resnet18(weights=None)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 0.3, 0.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if hasattr(module, "relu"):
            module.relu = nn.LeakyReLU(0.01)
    return net.eval()


@functools.cache
def template(norm, backbone):
    return ResNet(backbone, make_norm(norm)).eval()


def body_of(norm, backbone="resnet18"):
    """A body of its own for a test; copying one is quicker than drawing its weights again."""
    return copy.deepcopy(template(norm, backbone))


def official_file(folder, norm, prefix="module.", **extra):
    """A file as the official programs have it, of this norm, and the body it holds."""
    body = body_of(norm)
    torch.manual_seed(1)
    for module in body.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 0.3, 0.5)
            nn.init.normal_(module.running_mean, std=0.3)
    state = {f"{prefix}{key}": value for key, value in body.state_dict().items()}
    state |= {f"{prefix}classifier.fc.weight": torch.zeros(10, 512), f"{prefix}classifier.fc.bias": torch.zeros(10)}
    path = folder / "pretrained" / f"resnet18_{norm}.pth.tar"
    path.parent.mkdir(exist_ok=True)
    torch.save({"state_dict": state, **extra}, path)
    return path, body


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("norm", ["abn", "iabn", "iabn_sync", "std"])
def test_torchvision_weights_compute_the_same(folder, norm):
    source = torchvision_resnet18()
    torch.save(source.state_dict(), "mine.pth")
    body = body_of(norm)
    load_backbone(body, "resnet18", norm, "mine.pth", lambda line: None)
    x, layers = torch.randn(2, 3, 64, 64), []
    source.layer3.register_forward_hook(lambda module, inputs, output: layers.append(output))
    with torch.no_grad():
        source(x)
        ours = nn.functional.leaky_relu(body(x)[1][2], 0.01)
    # layer 4 is dilated here and not there
    torch.testing.assert_close(ours, layers[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_torchvision_names_and_shapes(backbone):
    with torch.device("meta"):
        theirs = ResNet.from_torchvision(torchvision.models.get_model(backbone, weights=None).state_dict())
        ours = ResNet(backbone, make_norm("abn")).state_dict()
    assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in ours.items()}


def test_running_statistics_land_where_they_belong():
    source = torchvision_resnet18().state_dict()
    state = ResNet.from_torchvision(source)
    assert torch.equal(state["mod3.block1.proj_bn.running_var"], source["layer2.0.downsample.1.running_var"])
    assert torch.equal(state["mod5.block2.convs.bn2.running_mean"], source["layer4.1.bn2.running_mean"])


@pytest.mark.parametrize("prefix", ["module.", "", "module.body."])
def test_official_file(folder, prefix):
    path, expected = official_file(folder, "iabn_sync", prefix)
    body, lines = body_of("iabn_sync"), []
    load_backbone(body, "resnet18", "iabn_sync", None, lines.append)
    assert all(torch.equal(value, body.state_dict()[key]) for key, value in expected.state_dict().items())
    assert len(lines) == 1
    assert hashlib.sha256(path.read_bytes()).hexdigest()[:12] in lines[0]


@pytest.mark.parametrize(("wanted", "there"), [("iabn", "iabn_sync"), ("abn", "iabn_sync"), ("iabn", "abn")])
def test_file_of_another_norm_computes_the_same(folder, wanted, there):
    _, expected = official_file(folder, there)
    body, lines = body_of(wanted), []
    load_backbone(body, "resnet18", wanted, None, lines.append)
    assert f"resnet18_{there}.pth.tar is used" in lines[0].replace("pretrained/", "")
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(body(x)[0], expected.eval()(x)[0], rtol=1e-3, atol=1e-3)


def test_sync_test_norm_shares_the_file_of_sync(folder):
    official_file(folder, "iabn_sync")
    lines = []
    load_backbone(body_of("iabn_sync_test"), "resnet18", "iabn_sync_test", None, lines.append)
    assert len(lines) == 1


@pytest.mark.parametrize("source", [None, "pretrained/resnet18_iabn_sync.pth.tar"])
def test_norms_of_one_meaning_take_the_weights_as_they_are(folder, source):
    _, expected = official_file(folder, "iabn_sync")
    body = body_of("iabn_sync_test")
    load_backbone(body, "resnet18", "iabn_sync_test", source, lambda line: None)
    assert all(torch.equal(value, body.state_dict()[key]) for key, value in expected.state_dict().items())


def test_missing_files_say_what_to_do(folder):
    with pytest.raises(
        ValueError, match=r"pretrained/resnet18_iabn\.pth\.tar.*--pretrained torchvision.*--no_pretrained"
    ):
        load_backbone(body_of("iabn"), "resnet18", "iabn", None)
    with pytest.raises(ValueError, match=r"--pretrained absent\.pth: no such file"):
        load_backbone(body_of("iabn"), "resnet18", "iabn", "absent.pth")


class Code:
    """An object that a safe loader must not build."""


def refusal(path):
    """The one sentence that a file is refused with."""
    with pytest.raises(ValueError) as caught:
        load_backbone(template("iabn", "resnet18"), "resnet18", "iabn", str(path))
    text = str(caught.value)
    assert str(path) in text and "\n" not in text
    return text


@pytest.mark.parametrize(
    "content",
    [b"", b"not a checkpoint at all", b"root:x:0:0:root:/root:/bin/bash\nbin:x:1:1::/:/sbin/nologin\n"]
    + [{"state_dict": Code()}, [1, 2], {"epoch": 3}, {"state_dict": [1, 2]}]
    + [{1: torch.ones(2)}, {"state_dict": {"a": torch.ones(2), 1: torch.ones(2)}}],
)  # fmt: skip
def test_files_without_plain_tensors_are_refused(folder, content):
    path = folder / "odd.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    refusal(path)


def test_a_flipped_file_of_the_old_format_is_refused(folder):
    """Such a file has no checksum: its magic number, its protocol, its keys and its storages are read by torch as they come."""
    path = folder / "old.pth"
    torch.save({"a": torch.ones(2), "b": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x15]) + content[place + 1 :])
        refusal(path)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda weight: weight.mul_(float("nan")), "NaN or infinite numbers in mod1.conv1.weight;"),
        (lambda weight: weight.fill_(float("inf")), "NaN or infinite numbers in mod1.conv1.weight;"),
        (lambda weight: weight.double().fill_(1e300), "NaN or infinite numbers in mod1.conv1.weight;"),
        (lambda weight: weight.long(), "numbers of another type in mod1.conv1.weight;"),
        (lambda weight: weight.cfloat(), "Python objects beside plain tensors"),
        (lambda weight: weight.to("meta"), "Python objects beside plain tensors"),
    ],
)
def test_weights_that_are_no_finite_numbers_are_refused(folder, spoil, expected):
    state = {"state_dict": body_of("iabn").state_dict()}
    state["state_dict"]["mod1.conv1.weight"] = spoil(state["state_dict"]["mod1.conv1.weight"])
    torch.save(state, folder / "odd.pth")
    assert expected in refusal(folder / "odd.pth")


def test_weights_of_half_precision_are_taken(folder):
    body = body_of("iabn")
    torch.save({key: value.half() for key, value in body.state_dict().items() if value.is_floating_point()}, "half.pth")
    load_backbone(body, "resnet18", "iabn", "half.pth", lambda line: None)
    assert body.mod1.conv1.weight.dtype == torch.float32


def test_truncated_file_is_refused(folder):
    path, _ = official_file(folder, "iabn")
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"resnet18_iabn\.pth\.tar"):
        load_backbone(body_of("iabn"), "resnet18", "iabn", None)


def test_weights_of_another_body_are_refused(folder):
    path, _ = official_file(folder, "iabn")
    with pytest.raises(ValueError, match=r"does not fit.*same ResNet"):
        load_backbone(body_of("iabn", "resnet50"), "resnet50", "iabn", str(path))
    with pytest.raises(ValueError, match="does not fit"):
        load_backbone(body_of("iabn", "resnet34"), "resnet34", "iabn", str(path))


def test_torchvision_unreachable(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(ValueError, match=r"--pretrained torchvision: https://.*no network"):
        load_backbone(body_of("abn"), "resnet18", "abn", "torchvision")
