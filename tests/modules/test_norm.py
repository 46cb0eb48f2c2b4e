"""Norms: the in-place ones against the plain one, over processes, and in what they keep for the backward pass."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import gradcheck

from modules import norm as norms
from modules.norm import ABN, InPlaceABN, InPlaceABNSync, StdNorm, make_norm

ACTIVATIONS = ("leaky_relu", "identity")


def filled(kind, channels, activation="leaky_relu", dtype=torch.float64, seed=0):
    """A norm with scales of both signs and running statistics unlike the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    module = kind(channels, activation).to(dtype)
    with torch.no_grad():
        module.weight.copy_(torch.rand(channels, generator=generator) + 0.5)
        module.weight[::2] *= -1
        module.bias.copy_(torch.randn(channels, generator=generator))
        module.running_mean.copy_(torch.randn(channels, generator=generator))
        module.running_var.copy_(torch.rand(channels, generator=generator) + 0.5)
    return module


def images(*shape, dtype=torch.float64, seed=1):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 3
    return x.to(dtype).requires_grad_()


def run(module, x):
    """Output, gradients of input, weight and bias, and running statistics after one pass."""
    out = module(x * 1)
    target = torch.linspace(-1, 1, out.numel(), dtype=x.dtype).view_as(out)
    gradients = torch.autograd.grad((out * target + out.square()).sum(), (x, module.weight, module.bias))
    return (out.detach(), *gradients, module.running_mean, module.running_var)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-7)])
def test_in_place_is_plain_with_absolute_weight(dtype, tolerance, activation, training):
    # eps and slope of the in-place norm are rounded to float32, hence 1e-7 and not 1e-12
    in_place, plain = filled(InPlaceABN, 6, activation, dtype), filled(ABN, 6, activation, dtype)
    sign = in_place.weight.detach().sign()
    with torch.no_grad():
        plain.weight.copy_(plain.weight.abs() + in_place.eps)
    x = images(2, 6, 5, 7, dtype=dtype)
    got, expected = run(in_place.train(training), x), list(run(plain.train(training), x))
    expected[2] = expected[2] * sign  # the gradient of |weight|
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, training):
    module = filled(InPlaceABN, 3, activation).train(training)
    slope = module.slope if activation == "leaky_relu" else 1.0

    def function(x, weight, bias):
        statistics = module.running_mean.clone(), module.running_var.clone()
        settings = norms._Settings(*statistics, training, 0.1, module.eps, slope, False)
        return norms._InPlaceABN.apply(x, weight, bias, settings)

    assert gradcheck(function, (images(2, 3, 3, 4), module.weight, module.bias))


def test_hand_values():
    # channel (1, 3): mean 2, variance 1 (unbiased 2); scale |-2|, bias 1 -> -1 and 3, leaky: -0.01 and 3
    module = InPlaceABN(1)
    with torch.no_grad():
        module.weight.fill_(-2)
        module.bias.fill_(1)
    out = module(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1))
    assert out.flatten().tolist() == pytest.approx([-0.01, 3], abs=1e-4)
    assert module.running_mean.item() == pytest.approx(0.2)
    assert module.running_var.item() == pytest.approx(0.9 + 0.1 * 2)
    assert module.num_batches_tracked.item() == 1


def test_several_gradients_of_one_graph():
    module, x = filled(InPlaceABN, 4), images(2, 4, 3, 3)
    out = module(x).square().sum()
    first = torch.autograd.grad(out, (x, module.weight, module.bias), retain_graph=True)
    second = torch.autograd.grad(out, (x, module.weight, module.bias), retain_graph=True)
    only_weight = torch.autograd.grad(out, module.weight)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(only_weight[0], first[1])


def test_overwritten_output_is_noticed():
    out = filled(InPlaceABN, 4)(images(2, 4, 3, 3))
    out.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def saved_bytes(kind):
    """Bytes of the maps that conv → norm → conv keeps for the backward pass, without the input."""
    net = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), kind(8), nn.Conv2d(8, 4, 1, bias=False))
    x, storages = torch.randn(2, 3, 32, 32), {}

    def pack(tensor):
        if tensor.dim() == 4 and tensor.shape[2:] == x.shape[2:]:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(x)
    storages.pop(x.untyped_storage().data_ptr())
    return sum(t.untyped_storage().nbytes() for t in storages.values())


def test_in_place_keeps_half():
    one_map = 2 * 8 * 32 * 32 * 4
    assert saved_bytes(ABN) == 2 * one_map
    assert saved_bytes(InPlaceABN) == one_map


@pytest.mark.parametrize("kind", [ABN, InPlaceABN, InPlaceABNSync, StdNorm])
def test_one_value_per_channel(kind):
    module, x = kind(4), images(1, 4, 1, 1, dtype=torch.float32)
    out = module(x)
    out.sum().backward()
    assert out.detach().abs().max() < 1e-4  # normalised to zero, then the bias, which is zero
    assert x.grad.abs().max() < 1e-4
    torch.testing.assert_close(module.running_mean, 0.1 * x.detach().flatten())
    assert torch.equal(module.running_var, torch.ones(4))


@pytest.mark.parametrize("kind", [ABN, InPlaceABN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_and_memory_formats(kind, dtype):
    module = filled(kind, 8, dtype=torch.float32)
    x = images(2, 8, 6, 6, dtype=dtype).detach()
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        y = x.clone(memory_format=layout).requires_grad_()
        out = module.train()(y)
        out.float().square().mean().backward()
        assert out.dtype == y.grad.dtype == dtype
        assert out.is_contiguous(memory_format=layout)
        assert module.weight.grad.dtype == torch.float32
        results.append((out.detach().float(), y.grad.float()))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


CASES = [(dtype, activation) for dtype in (torch.float64, torch.float32) for activation in ACTIVATIONS]


def process(rank, folder):
    """One of two processes: its share of the joined batch, unevenly cut."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    results = []
    for dtype, activation in CASES:
        x = images(4, 6, 5, 5, dtype=dtype).detach()
        share = (x[:3] if rank == 0 else x[3:]).requires_grad_()
        module = filled(InPlaceABNSync, 6, activation, dtype)
        out = module(share)
        out.pow(3).sum().backward()
        gradients = share.grad, module.weight.grad, module.bias.grad
        results.append((out.detach(), *gradients, module.running_mean, module.running_var))
    half = images(2, 6, 4, 4, dtype=torch.bfloat16)
    filled(InPlaceABNSync, 6, dtype=torch.float32)(half).sum().backward()
    assert half.grad.dtype == torch.bfloat16
    assert half.grad.isfinite().all()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one_on_the_joined_batch(tmp_path):
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    shares = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)), strict=True)
    for (dtype, activation), (first, second) in zip(CASES, shares, strict=True):
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        x = images(4, 6, 5, 5, dtype=dtype)
        module = filled(InPlaceABNSync, 6, activation, dtype)
        out = module(x)
        out.pow(3).sum().backward()
        joined = [torch.cat([first[i], second[i]]) for i in (0, 1)]  # output, gradient of the input
        summed = [first[i] + second[i] for i in (2, 3)]  # gradients of weight and bias
        for a, b in zip(joined + summed, (out, x.grad, module.weight.grad, module.bias.grad), strict=True):
            assert (a - b).abs().max() <= tolerance * b.abs().max()
        for share in (first, second):
            torch.testing.assert_close(share[4:], (module.running_mean, module.running_var), rtol=tolerance, atol=0)


def test_package_is_called_only_where_it_can(monkeypatch):
    calls = []

    def kernel(x, weight, bias, mean, var, **settings):
        calls.append(settings)
        return x

    monkeypatch.setattr(norms, "inplace_abn", SimpleNamespace(inplace_abn=kernel, inplace_abn_sync=None))
    InPlaceABN(4)(torch.randn(2, 4, 3, 3))
    assert not calls  # CPU tensors stay native

    def on_gpu(dtype=torch.float32, shape=(2, 4, 3, 3), leaf=False):
        return SimpleNamespace(
            is_cuda=True,
            dtype=dtype,
            shape=shape,
            numel=lambda: torch.Size(shape).numel(),
            is_leaf=leaf,
            requires_grad=True,
            is_contiguous=lambda: True,
        )

    assert norms._package_takes(on_gpu(), training=True)
    assert norms._package_takes(on_gpu(torch.float16), training=True)
    assert not norms._package_takes(on_gpu(torch.bfloat16), training=True)
    assert not norms._package_takes(on_gpu(torch.float64), training=True)
    assert not norms._package_takes(on_gpu(leaf=True), training=True)
    assert not norms._package_takes(on_gpu(shape=(1, 4, 1, 1)), training=True)
    assert norms._package_takes(on_gpu(shape=(1, 4, 1, 1)), training=False)
    monkeypatch.setattr(norms, "_package_takes", lambda x, training: True)
    InPlaceABN(4, "identity")(torch.randn(2, 4, 3, 3))
    assert calls[0]["activation"] == "identity"
    assert calls[0]["training"]


def test_names_of_parameters_and_choices():
    expected = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    for name in ("abn", "iabn", "iabn_sync", "std", "iabn_sync_test"):
        assert list(make_norm(name)(3).state_dict()) == expected
    with pytest.raises(ValueError, match="--norm_act batch"):
        make_norm("batch")
