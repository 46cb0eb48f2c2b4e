"""Body, head, classifiers and the whole network."""

import copy
import functools
import json
import math
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F

from dataset.sampler import FixedBatches
from modules import backbones
from modules.classifier import FUSIONS, Classifiers
from modules.deeplab import DeeplabV3
from modules.fold import fold_frozen
from modules.norm import ABN, make_norm
from modules.resnet import ResNet
from segmentation_module import make_model
from tests.support import thin
from tests.support.paths import FACTS

OFFICIAL = json.loads((FACTS / "official_state_dict.json").read_text())


def options(**changes):
    return Namespace(**{**vars(thin.options("--backbone resnet18")), **changes})


@functools.cache
def template(classes, seed, changes):
    torch.manual_seed(seed)
    return make_model(options(**dict(changes)), classes)


def model_of(classes=(3, 2), seed=0, **changes):
    """A network of its own for a test; copying one is quicker than drawing its weights again."""
    return copy.deepcopy(template(tuple(classes), seed, tuple(changes.items())))


def disturbed(model):
    """The model with norms as after some training: running statistics, scales of both signs, shifts."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ABN):
                module.running_mean.normal_(std=0.3, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.weight.normal_(std=0.5, generator=generator)
                module.bias.normal_(std=0.3, generator=generator)
    return model


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "resnet101"])
def test_state_dict_is_the_official_one(backbone):
    with torch.device("meta"):
        state = make_model(options(backbone=backbone), [16, 5]).state_dict()
    official = {name.removeprefix("module."): shape for name, shape in OFFICIAL[backbone].items()}
    del official["head.lossweights"]  # belongs to the balancer
    assert {name: list(tensor.shape) for name, tensor in state.items()} == official


@pytest.mark.parametrize(("backbone", "channels"), [("resnet34", 512), ("resnet152", 2048)])
def test_other_depths(backbone, channels):
    with torch.device("meta"):
        body = ResNet(backbone, make_norm("abn"))
    assert body.out_channels == channels


@pytest.mark.parametrize(
    ("stride", "size", "maps"),
    [
        (16, (64, 48), ((16, 12), (8, 6), (4, 3), (4, 3))),
        (8, (64, 48), ((16, 12), (8, 6), (8, 6), (8, 6))),
        (16, (65, 49), ((17, 13), (9, 7), (5, 4), (5, 4))),
        (16, (33, 32), ((9, 8), (5, 4), (3, 2), (3, 2))),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_shapes(stride, size, maps, training):
    taps = model_of(output_stride=stride).train(training)(torch.randn(2, 3, *size))
    assert taps.logits.shape == (2, 5, *size)
    assert taps.logits_small.shape == (2, 5, *maps[3])
    assert taps.body.shape == (2, 512, *maps[3])
    assert taps.pre_logits.shape == (2, 256, *maps[3])
    assert [tuple(a.shape) for a in taps.attentions] == [(2, 64 << i, *maps[i]) for i in range(4)]


def test_bottleneck_forward_and_backward():
    model = model_of(backbone="resnet50")
    taps = model(torch.randn(2, 3, 33, 33))
    assert [a.shape[1] for a in taps.attentions] == [256, 512, 1024, 2048]
    taps.logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_attentions_are_kept_before_activation():
    taps = model_of()(torch.randn(2, 3, 32, 32))
    assert taps.attentions[3].min() < -0.1
    assert torch.equal(F.leaky_relu(taps.attentions[3], 0.01), taps.body)


@pytest.mark.parametrize("norm", ["abn", "iabn"])
def test_passes_with_and_without_gradient_agree(norm):
    # without gradients sums and activations overwrite their inputs
    model = disturbed(model_of(norm_act=norm)).eval()
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        frozen = model(x)
        small = model(x, full_size=False)
    for a, b, c in zip(model(x).features, frozen.features, small.features, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(b, c)
    assert small.logits is small.logits_small


def test_batch_of_one_trains():
    model = model_of()
    taps = model(torch.randn(1, 3, 16, 16))  # a map of one cell
    taps.logits.sum().backward()
    assert taps.logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(b.isfinite().all() for b in model.buffers())


def test_autocast_bfloat16_is_finite():
    model = model_of()
    with torch.autocast("cpu", torch.bfloat16):
        taps = model(torch.randn(2, 3, 32, 32))
        loss = taps.logits.float().square().mean() + sum(f.float().square().mean() for f in taps.features)
    loss.backward()
    assert taps.pre_logits.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_same_seed_same_network():
    states = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        states.append(make_model(options(), [3, 2]).state_dict())
    first, second, other = states
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "conv" in name and "bn" not in name)


def convs_of(module):
    return [(name, m.weight) for name, m in module.named_modules() if isinstance(m, torch.nn.Conv2d)]


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "mobilenet_v2"])
def test_the_body_keeps_pytorchs_start(backbone):
    """Kaiming uniform with a = √5: uniform between ±1/√fan_in. The batch norms start as the identity."""
    model = model_of(backbone=backbone)
    for name, weight in convs_of(model.body):
        bound = 1 / math.sqrt(weight[0].numel())
        count = weight.numel()
        assert (1 - 20 / count) * bound < weight.abs().max().item() <= bound, name
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=4 / math.sqrt(count)), name
    for norm in (m for m in model.body.modules() if isinstance(m, ABN)):
        assert torch.all(norm.weight == 1) and torch.all(norm.bias == 0)


def test_the_convs_of_the_head_start_xavier_normal():
    """With the gain of the leaky ReLU of slope 0.01: a normal distribution of variance 2 gain² / (fan_in + fan_out)."""
    for name, weight in convs_of(model_of().head):
        fan_in, fan_out = weight[0].numel(), weight[:, 0].numel()
        expected = math.sqrt(2 / (1 + 0.01**2)) * math.sqrt(2 / (fan_in + fan_out))
        assert weight.std().item() == pytest.approx(expected, rel=0.01), name
        assert weight.abs().max().item() > 3.5 * expected, (
            name
        )  # farther than any uniform distribution of that variance


def test_classifiers_keep_pytorchs_start():
    for classifier in model_of().cls:
        assert classifier.weight.abs().max().item() <= 1 / 16 and classifier.bias.abs().max().item() <= 1 / 16


# --- head


@pytest.mark.parametrize(("pooling", "size"), [(4, (7, 6)), (5, (7, 6)), (4, (9, 3)), (32, (5, 6)), (1, (3, 3))])
def test_pooling_in_evaluation_is_a_sliding_window(pooling, size):
    torch.manual_seed(0)
    head = disturbed(DeeplabV3(8, 16, make_norm("abn"), 16, pooling)).eval().double()
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    window = [min(pooling, s) for s in size]
    means = torch.empty_like(x)
    for i in range(size[0]):
        for j in range(size[1]):
            # at the border the nearest whole window counts
            top = min(max(i - (window[0] - 1) // 2, 0), size[0] - window[0])
            left = min(max(j - (window[1] - 1) // 2, 0), size[1] - window[1])
            means[:, :, i, j] = x[:, :, top : top + window[0], left : left + window[1]].mean((2, 3))
    expected = head.pool_red_conv(head.global_pooling_bn(head.global_pooling_conv(means)))
    torch.testing.assert_close(head._pooled_branch(x).expand_as(expected), expected)


def test_pooling_in_training_is_the_mean_of_the_map():
    head = DeeplabV3(8, 16, make_norm("abn"), 16, pooling=2)
    seen = []
    head.global_pooling_conv.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    x = torch.randn(2, 8, 6, 5)
    head(x)
    torch.testing.assert_close(seen[0], x.mean((2, 3), keepdim=True))


def test_head_dilations():
    for stride, dilations in ((16, [1, 6, 12, 18]), (8, [1, 12, 24, 32])):
        with torch.device("meta"):
            head = DeeplabV3(8, 16, make_norm("abn"), stride)
        assert [conv.dilation[0] for conv in head.map_convs] == dilations


def test_body_dilations_and_strides():
    for stride, dilations, strides in ((16, [1, 1, 1, 2], [1, 2, 2, 1]), (8, [1, 1, 2, 4], [1, 2, 1, 1])):
        with torch.device("meta"):
            body = ResNet("resnet50", make_norm("abn"), stride)
        stages = [body.mod2, body.mod3, body.mod4, body.mod5]
        assert [stage.block2.convs.conv2.dilation[0] for stage in stages] == dilations
        assert [stage.block1.convs.conv2.stride[0] for stage in stages] == strides
        assert all(stage.block1.convs.conv1.stride == (1, 1) for stage in stages)


# --- folding


@pytest.mark.parametrize(
    ("backbone", "norm", "dtype", "tolerance"),
    [
        ("resnet18", "abn", torch.float64, 1e-12),
        ("resnet18", "iabn", torch.float64, 1e-12),
        ("resnet18", "iabn", torch.float32, 1e-4),
        ("resnet50", "iabn", torch.float64, 1e-12),
    ],
)
def test_folding_changes_nothing(backbone, norm, dtype, tolerance):
    model = disturbed(model_of(backbone=backbone, norm_act=norm, pooling=2)).to(dtype).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = fold_frozen(model)
    x = torch.randn(2, 3, 48, 64, dtype=dtype)
    with torch.no_grad():
        for a, b in zip(folded(x).features, model(x).features, strict=True):
            assert (a - b).abs().max() <= tolerance * b.abs().max()
    assert not any(isinstance(module, ABN) for module in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert fold_frozen(model, in_place=True) is model


# --- classifiers


def test_balanced_initialisation_by_hand():
    model = model_of((2, 3))
    with torch.no_grad():
        model.cls[0].bias.copy_(torch.tensor([0.5, 0.25]))
    old = model.cls[0].weight.detach().clone()
    model.cls.init_balanced()
    assert torch.equal(model.cls[0].weight, old)
    assert all(torch.equal(weight, old[0]) for weight in model.cls[1].weight)
    expected = 0.5 - math.log(4)
    assert model.cls[1].bias.tolist() == pytest.approx([expected] * 3)
    assert model.cls[0].bias.tolist() == pytest.approx([expected, 0.25])


def test_balanced_initialisation_splits_the_background():
    classifiers = Classifiers(6, [3, 2]).double()
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    before = classifiers[0](x).softmax(1)
    classifiers.init_balanced()
    after = classifiers(x).softmax(1)
    torch.testing.assert_close(after[:, [0, 3, 4]].sum(1), before[:, 0])
    torch.testing.assert_close(after[:, 1:3], before[:, 1:])


@pytest.mark.parametrize(
    ("fusion", "expected"),
    [("sum", 3.0), ("mean", 1.5), ("max", 2.0), ("softmax", (math.e + 2 * math.e**2) / (math.e + math.e**2))],
)
def test_fusions(fusion, expected):
    modes = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    assert FUSIONS[fusion](modes).item() == pytest.approx(expected)


@pytest.mark.parametrize("fusion", list(FUSIONS))
def test_background_modes(fusion):
    model = model_of((4, 2), nb_background_modes=3, multimodal_fusion=fusion)
    assert [classifier.out_channels for classifier in model.cls] == [3, 3, 2]
    logits = model(torch.randn(2, 3, 32, 32)).logits_small
    assert logits.shape[1] == 6
    before = model.cls[0].bias.detach().clone()
    features = torch.randn(2, 256, 3, 3)
    background = model.cls(features)[:, 0]
    model.cls.init_balanced()
    # whatever the fusion, the background's logit falls by ln(C_new + 1)
    torch.testing.assert_close(model.cls(features)[:, 0], background - math.log(3), atol=1e-4, rtol=1e-4)
    assert (model.cls[0].bias < before).all()


def modal(fusion="max"):
    """Two features, two background modes that look at one each, three base classes, two new ones."""
    classifiers = Classifiers(2, [3, 2], background_modes=2, fusion=fusion)
    with torch.no_grad():
        classifiers[0].weight.copy_(torch.eye(2).view(2, 2, 1, 1) * 10)
        classifiers[0].bias.copy_(torch.tensor([0.1, 0.2]))
    return classifiers


def votes_for(classifiers, how):
    """Votes where the pixels of new class 3 have feature 0 and those of new class 4 feature 1."""
    labels = torch.tensor([[3, 3, 4, 0, 255, 1]]).view(1, 1, 6)
    features = torch.tensor([[1.0, 1, 0, 1, 1, 0], [0, 0, 1, 1, 0, 0]]).view(1, 2, 1, 6)
    return classifiers.mode_votes(features, labels, how)


def test_mode_votes_count_the_strongest_mode():
    assert votes_for(modal(), "max").tolist() == [[2, 0], [0, 1]]
    soft = votes_for(modal(), "softmax")
    assert soft.sum(1).tolist() == pytest.approx([2, 1])


@pytest.mark.parametrize("how", ["max", "softmax"])
def test_new_classes_start_from_the_mode_that_responds(how):
    classifiers = modal()
    modes = classifiers[0].weight.detach().clone()
    classifiers.init_from_modes(votes_for(classifiers, how), how)
    torch.testing.assert_close(classifiers[2].weight, modes, atol=0.01, rtol=0)
    assert classifiers[2].bias.tolist() == pytest.approx([0.1 - math.log(3), 0.2 - math.log(3)], abs=1e-4)
    assert torch.equal(classifiers[0].weight, modes)


@pytest.mark.parametrize("fusion", ["sum", "mean", "max", "softmax"])
def test_winning_modes_are_reset_or_removed_but_one_stays(fusion):
    for how in ("max_init", "max_remove", "softmax_init", "softmax_remove"):
        classifiers = modal(fusion)
        modes = classifiers[0].weight.detach().clone()
        shift = math.log(3) / (2 if fusion == "sum" else 1)  # the sum shares it between its modes
        classifiers.init_from_modes(votes_for(classifiers, how), how)
        assert not torch.equal(classifiers[0].weight[0], modes[0])
        if how.endswith("remove"):
            x = torch.randn(1, 2, 3, 3)
            stays = 10 * x[:, 1] + 0.2 - shift  # the mode of fewest votes, as it was
            torch.testing.assert_close(classifiers(x)[:, 0], stays)
        else:
            assert torch.equal(classifiers[0].weight[1], modes[1])


@pytest.mark.parametrize("how", ["max_remove", "softmax_remove"])
def test_the_mean_of_the_modes_that_stay_is_the_background(how):
    classifiers = Classifiers(2, [3, 1], background_modes=3, fusion="mean")
    x = torch.randn(1, 2, 3, 3)
    stay = classifiers[0](x)[:, 1:].mean(1) - math.log(2)
    classifiers.init_from_modes(torch.tensor([[3.0, 2.0, 1.0]]), how)
    torch.testing.assert_close(classifiers(x)[:, 0], stay)


def test_new_class_without_a_pixel_takes_the_mean_of_the_modes():
    classifiers = modal()
    mean = classifiers[0].weight.detach().mean(0)
    classifiers.init_from_modes(torch.tensor([[0.0, 0.0], [0.0, 3.0]]), "max")
    torch.testing.assert_close(classifiers[2].weight[0], mean)


def test_initialisation_from_images_leaves_the_mode_of_the_model():
    with thin.program():
        step = thin.Step("--nb_background_modes 2 --init_multimodal max")
        step.method.init_classifier(
            step.model, None, FixedBatches([(thin.images(2), thin.bands(0, 4, 5))]), torch.device("cpu")
        )
        assert step.model.training


def test_cosine_classifier():
    model = model_of(cosine=True)
    logits = model.eval()(torch.randn(1, 3, 32, 32)).logits_small
    assert logits.abs().max() <= 1 + 1e-5
    with torch.no_grad():
        model.cls.scalar.fill_(7)
        model.cls[0].weight.mul_(3)
    x = torch.randn(1, 256, 2, 2)
    expected = 7 * F.cosine_similarity(x.unsqueeze(1), model.cls[0].weight.unsqueeze(0), dim=2)
    torch.testing.assert_close(model.cls(x)[:, :3], expected)
    model.cls.init_balanced()
    assert torch.equal(model.cls[1].weight[1], model.cls[0].weight[0])


def test_refused():
    with pytest.raises(ValueError, match="--align_weight newest"):
        Classifiers(1, [3, 2]).align("newest")
    with pytest.raises(ValueError, match="no such weights"):
        Classifiers(1, [3]).align("old")
    with pytest.raises(ValueError, match="--multimodal_fusion product"):
        Classifiers(1, [3], background_modes=2, fusion="product")
    with pytest.raises(ValueError, match="--cosine"):
        Classifiers(1, [3], cosine=True, background_modes=2)
    with pytest.raises(ValueError, match="--backbone vgg"):
        backbones.find("vgg")
    with pytest.raises(ValueError, match="--output_stride 4"):
        ResNet("resnet18", make_norm("abn"), 4)


# --- freezing


def test_fixed_norms_stay_fixed():
    model = model_of()
    model.fix_bn()
    model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randn(2, 3, 32, 32)).logits.sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == ("bn" in name), name


def test_frozen_body_takes_no_gradient():
    model = model_of()
    model.freeze_body()
    model(torch.randn(2, 3, 32, 32)).logits.sum().backward()
    assert all((p.grad is None) == name.startswith("body.") for name, p in model.named_parameters())


def test_stage_weights_are_the_first_parameters():
    model = model_of()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(weight)] for weight in list(model.watched_weights().values())[:5]] == [
        *(f"body.mod{i}.block1.convs.conv1.weight" for i in (2, 3, 4, 5)),
        "head.red_bn.weight",
    ]
