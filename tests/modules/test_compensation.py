"""RCIL's layers: the mixture of two branches, and what a merge leaves."""

import copy

import pytest
import torch
import torch.nn.functional as F

from modules.compensation import DoubledConvs, DoubledHead, shares
from modules.deeplab import DeeplabV3
from modules.norm import make_norm
from modules.residual import ResidualBlock
from modules.resnet import ResNet

KINDS = {"bottleneck": (4, 4, 6), "basic": (4, 6)}


def random_norms(module):
    """Norms with statistics of their own, some with a negative weight."""
    generator = torch.Generator().manual_seed(3)
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if value.dim() == 1 and not name.endswith("share"):
            noise = torch.rand(len(value), generator=generator, dtype=value.dtype)
            value.data.copy_(noise + 0.5 if name.endswith("running_var") else noise - 0.5)
    return module


def convs_of(kind, norm="iabn"):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        block = ResidualBlock(6, KINDS[kind], make_norm(norm)).double()
        convs = DoubledConvs(block.convs)
        convs.branch(new=True).convs[0].reset_parameters()
    return random_norms(convs)


def head_of(norm="iabn"):
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(1)
        patch.setattr(DoubledHead, "hidden_channels", 4)
        return random_norms(DoubledHead(6, 5, make_norm(norm), 16, 32).double())


def image(channels=6, size=9):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_draws_choose_the_branch():
    assert shares(torch.tensor([0.0, 0.3299, 0.33, 0.65, 0.66, 0.99])).tolist() == [1, 1, 0, 0, 0.5, 0.5]


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_3x3_conv_is_doubled(kind):
    convs = convs_of(kind)
    number = {"bottleneck": 2, "basic": 1}[kind]
    assert [name for name, _ in convs.named_children()][-2:] == [f"conv{number}_new", f"bn{number}_new"]
    assert convs.branch(new=True).convs[0].kernel_size == (3, 3)
    assert "share" not in convs.state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_the_mixture_by_hand(kind):
    convs = convs_of(kind).train()
    convs.share.copy_(torch.tensor([1.0, 0.0, 0.5, 1.0]))
    x, parts = image(), dict(copy.deepcopy(convs).named_children())
    u = x
    if kind == "bottleneck":
        parts["bn1"].activation = "identity"
        u = F.leaky_relu(parts["bn1"](parts["conv1"](x)), 0.01)
    old, new = (convs.branch(new)(u) for new in (False, True))
    mixed = torch.stack([old[:, 0], new[:, 1], (old[:, 2] + new[:, 2]) / 2, old[:, 3]], dim=1)
    v = F.leaky_relu(mixed, 0.01)
    last = {"bottleneck": "3", "basic": "2"}[kind]
    torch.testing.assert_close(convs(x), parts[f"bn{last}"](parts[f"conv{last}"](v)), rtol=1e-12, atol=1e-12)


def test_a_branch_that_was_not_drawn_takes_no_gradient():
    convs = convs_of("basic").train()
    convs.share.fill_(1.0)
    convs(image()).sum().backward()
    assert convs.conv1.weight.grad.any() and not convs.conv1_new.weight.grad.any()


@pytest.mark.parametrize("norm", ["iabn", "abn"])
@pytest.mark.parametrize(
    "make", [lambda norm: convs_of("basic", norm), lambda norm: convs_of("bottleneck", norm), head_of]
)
def test_a_merge_computes_the_mean_into_the_old_branch(make, norm):
    layer = make(norm).eval()
    x, before = image(), layer(image())
    inner = {}
    layer.branch(new=False).norm.register_forward_hook(lambda module, inputs, out: inner.update(old=out.clone()))
    layer.branch(new=True).norm.register_forward_hook(lambda module, inputs, out: inner.update(new=out.clone()))
    layer(x)
    mean, new = (inner["old"] + inner["new"]) / 2, inner["new"]
    layer.add_biases()
    layer.merge()
    layer(x)
    torch.testing.assert_close(inner["old"], mean, rtol=1e-10, atol=1e-10)
    assert torch.equal(inner["new"], new)  # the new branch goes on from where it was
    # A second merge weighs the new branch again: the network of the next step does not start as its teacher
    layer.merge()
    layer(x)
    torch.testing.assert_close(inner["old"], (mean + new) / 2, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(layer(x), before)


@pytest.mark.parametrize("norm", ["iabn", "abn"])
@pytest.mark.parametrize(
    "make", [lambda norm: convs_of("basic", norm), lambda norm: convs_of("bottleneck", norm), head_of]
)
def test_without_the_new_branch_evaluation_is_the_same(make, norm):
    layer = make(norm).eval()
    before = layer(image())
    layer.merge_into_one()
    torch.testing.assert_close(layer(image()), before, rtol=1e-10, atol=1e-10)
    assert not any("_new" in name for name in layer.state_dict())


@pytest.mark.parametrize("norm", ["iabn", "abn"])
def test_a_merged_head_is_a_plain_head(norm):
    layer = head_of(norm).eval()
    before = layer(image())
    layer.make_plain()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeeplabV3, "hidden_channels", 4)
        plain = DeeplabV3(6, 5, make_norm(norm), 16, 32).double().eval()
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(
        plain(image()), before, rtol=1e-7, atol=1e-9
    )  # in-place norms round slope and eps to float32


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_a_merged_body_is_a_plain_body(backbone):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        body = ResNet(backbone, make_norm("iabn")).double()
        for block in [module for module in body.modules() if isinstance(module, ResidualBlock)]:
            block.convs = DoubledConvs(block.convs)
            block.convs.branch(new=True).convs[0].reset_parameters()
    body.eval()
    before = body(image(3, 64))
    for block in [module for module in body.modules() if isinstance(module, DoubledConvs)]:
        block.make_plain()
    plain = ResNet(backbone, make_norm("iabn")).double().eval()
    plain.load_state_dict(body.state_dict())
    for mine, theirs in zip((plain(image(3, 64))[0], *plain(image(3, 64))[1]), (before[0], *before[1])):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)
