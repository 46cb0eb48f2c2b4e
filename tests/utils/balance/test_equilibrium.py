"""utils/balance/equilibrium.py: ∂L̃/∂λ against autograd of the formula, and every rule about λ between iterations, epochs and steps."""

import pytest
import torch
from torch import nn

from tests.support import thin
from utils.balance.equilibrium import Coefficients, GradientEquilibrium, Sum, TermSpec

#: LSKD's nine terms: name, number of the watched parameter, group, depth.
OFFICIAL = [
    ("ce", 4, "A", None), ("mcd", 4, "A", None), ("kd", 4, "A", None),
    ("pod/stage1", 0, "B", 0), ("pod/stage2", 1, "B", 1), ("md/stage3", 2, "B", 2),
    ("md/stage4", 3, "A", 3), ("md/pre_logits", 4, "A", 4), ("md/logits", 4, "A", None),
]  # fmt: skip
ALPHA, BETA, GAMMA, RATIO = 1.7, 0.3, 0.2, 0.4
THREE = [("ce", 0, "A", None), ("kd", 0, "A", None), ("pod/stage1", 1, "B", 0)]


def parameters(count=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(3, 2, dtype=torch.float64, generator=generator)) for _ in range(count)]


def balancer(rows, watched, **changed):
    terms = [TermSpec(name, str(number), group, depth) for name, number, group, depth in rows]
    taps = {str(number): weight for number, weight in enumerate(watched)}
    settings = {
        "alpha": ALPHA,
        "beta": BETA,
        "gamma": GAMMA,
        "interval": 1,
        "class_ratio": RATIO,
        "dtype": watched[0].dtype,
    } | changed
    coefficients = Coefficients(*(settings[key] for key in ("alpha", "beta", "gamma", "interval")))
    return GradientEquilibrium(terms, taps, coefficients, settings["class_ratio"], settings["dtype"])


def losses(rows, watched, seed):
    """Positive losses, each a function of all parameters, so that a wrong W shows."""
    generator = torch.Generator().manual_seed(seed)
    named = {}
    for name, *_ in rows:
        mixed = [torch.randn(3, 2, dtype=torch.float64, generator=generator) * w for w in watched]
        named[name] = torch.stack(mixed).sum(0).square().mean()
    return named


def literal(rows, watched, weights, initial, named):
    """L̃ of the method's definition, written out for the nine official terms; its gradient by autograd."""
    weights = weights.clone().requires_grad_()
    measured = [torch.autograd.grad(named[name], watched[w], retain_graph=True)[0].mean() for name, w, *_ in rows]
    loss = [named[name].detach() for name, *_ in rows]
    total = 0.0
    for group in ([0, 1, 2, 6, 7, 8], [3, 4, 5]):
        mean_progress = sum(loss[i] / initial[i] for i in group) / len(group)
        mean_gradient = sum((weights[i] * measured[i]).detach() for i in group) / len(group)
        for i in group:
            rho = (loss[i] / initial[i]) / mean_progress
            total = total + 10 * (weights[i] * measured[i] - mean_gradient * rho**ALPHA).abs()
    total = total + GAMMA * (weights[0] - RATIO * weights[2]).abs()
    for i in (3, 4, 5, 6):
        total = total + BETA * (1.25 * weights[i] - weights[i + 1]).clamp(min=0)
    return torch.autograd.grad(total, weights)[0]


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("seed", range(8))
def test_gradient_of_the_weights_is_that_of_the_formula(seed, epoch):
    watched = parameters(seed=seed)
    rge = balancer(OFFICIAL, watched)
    with torch.no_grad():
        rge.weights.copy_(torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.5)
    before, now = losses(OFFICIAL, watched, seed + 100), losses(OFFICIAL, watched, seed + 200)
    if epoch:
        rge.combine(before)
        rge.after_backward()
        rge.epoch = 1
    rge.combine(now)
    rge.after_backward()
    initial = torch.stack(list((before if epoch else now).values())).detach()
    expected = literal(OFFICIAL, watched, rge.weights.detach(), initial, now)
    torch.testing.assert_close(rge.weights.grad, expected, rtol=1e-12, atol=1e-14)
    assert len(set(expected.sign().tolist())) > 1


def test_hand_values_of_two_groups():
    watched = [nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64)) for _ in range(2)]
    rge = balancer(THREE, watched)
    # mean(∂ℓ/∂W): 2 and −4 in group A, 3 in group B
    total = rge.combine(
        {"ce": 2 * watched[0].sum(), "kd": 10 - 4 * watched[0].sum(), "pod/stage1": 3 * watched[1].sum()}
    )
    assert total == 6 - 2 + 9
    rge.after_backward()
    # epoch 0: ρ = 1 and Ḡ = −1 in A, so signs + and −; B is alone with its mean, sign 0; λ_ce > 0.4 λ_kd
    expected = torch.tensor([10 * 2 + GAMMA, 10 * 4 - GAMMA * RATIO, 0.0], dtype=torch.float64)
    torch.testing.assert_close(rge.weights.grad, expected)
    values = rge.log_values()
    assert {name: float(value) for name, value in values.items() if name.startswith("gradient")} == {
        "gradient/ce": 2, "gradient/kd": -4, "gradient/pod/stage1": 3,
    }  # fmt: skip
    assert {name.split("/")[0] for name in values} == {"lambda", "gradient", "loss", "rho"}
    assert len(values) == 4 * 3


def test_the_loss_itself_does_not_train_the_weights():
    watched = parameters()
    rge = balancer(OFFICIAL, watched)
    named = losses(OFFICIAL, watched, 1)
    rge.combine(named).backward()
    assert rge.weights.grad is None
    expected = torch.autograd.grad(sum(losses(OFFICIAL, watched, 1).values()), watched)
    for parameter, gradient in zip(watched, expected):
        torch.testing.assert_close(parameter.grad, gradient)


def test_depth_is_a_chain_of_names_not_of_positions():
    rows = [("md/pre_logits", 4, "A", 4), ("pod/stage2", 1, "B", 1), ("ce", 4, "A", None), ("md/stage4", 3, "A", 3)]
    rge = balancer(rows, parameters(), gamma=1e9)  # without kd there is nothing to hold ce against
    rge.weights.data = torch.tensor([1.0, 2.0, 5.0, 4.0], dtype=torch.float64)
    # stage2 → stage4: 2.5 < 4 is kept; stage4 → pre_logits: 5 > 1 is violated
    expected = torch.tensor([-BETA, 0.0, 0.0, 1.25 * BETA], dtype=torch.float64)
    torch.testing.assert_close(rge._regulariser_gradient(rge.weights.detach()), expected)


def test_a_single_depth_has_no_neighbour():
    rge = balancer(THREE, parameters())
    rge.combine(losses(THREE, parameters(), 0))
    assert rge._depth_pairs.shape == (2, 0)


def test_initial_losses_follow_epoch_0_and_then_stay():
    watched = parameters()
    rge = balancer(THREE, watched)
    seen = []
    for epoch, seed in ((0, 1), (0, 2), (1, 3), (1, 4)):
        rge.epoch = epoch
        named = losses(THREE, watched, seed)
        rge.combine(named)
        rge.after_backward()
        seen.append(torch.stack([value.detach() for value in named.values()]))
        torch.testing.assert_close(rge.initial_losses, seen[min(len(seen), 2) - 1])
        rho = [rge.log_values()[f"rho/{name}"] for name in rge.names]
        if epoch == 0:
            assert rho == [1, 1, 1]
    progress = seen[3] / seen[1]
    expected = [progress[0] / progress[:2].mean(), progress[1] / progress[:2].mean(), 1]
    torch.testing.assert_close(torch.stack(rho), torch.tensor(expected, dtype=torch.float64))


def test_weights_are_rescaled_to_their_number_after_every_epoch():
    rge = balancer(THREE, parameters())
    rge.weights.data = torch.tensor([1.0, 2.0, 7.0], dtype=torch.float64)
    rge.end_epoch()
    torch.testing.assert_close(rge.weights.detach(), torch.tensor([0.3, 0.6, 2.1], dtype=torch.float64))
    assert rge.epoch == 1


@pytest.mark.parametrize(
    ("first", "later"),
    [
        ((0.0, 1.0, 1.0), (1.0, 1.0, 1.0)),  # absent at first: no division by 0
        ((0.0, 1.0, 0.0), (0.0, 2.0, 0.0)),  # absent for good
        ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0)),  # all of a group gone later
        ((1e-40, 1.0, 1.0), (1.0, 1.0, 1.0)),  # the quotient overflows float32
        ((-1.0, 1.0, 1.0), (1.0, 3.0, 1.0)),  # released --pseudo_soft: no root of a negative number
    ],
)
def test_vanished_terms_leave_finite_weights(first, later):
    watched = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    rge = balancer(THREE, watched, alpha=0.5)
    for epoch, scales in enumerate((first, later)):
        rge.epoch = epoch
        rge.combine({name: s * watched[w].mean() for (name, w, *_), s in zip(THREE, scales)})
        rge.after_backward()
        assert rge.weights.grad.isfinite().all()
        assert all(value.isfinite() for value in rge.log_values().values())
        assert all(value >= 0 for name, value in rge.log_values().items() if name.startswith("rho"))


def test_terms_without_gradient_and_frozen_parameters_measure_nothing():
    watched = parameters(2)
    watched[0].requires_grad_(False)  # --fix_bn freezes the head's norm
    rge = balancer(THREE, watched)
    other = parameters(1, seed=9)[0]
    loss = other.square().mean()  # does not pass through the watched parameter either
    rge.combine({"ce": watched[0].mean() + loss, "kd": torch.tensor(1.0, dtype=torch.float64), "pod/stage1": loss})
    rge.after_backward()
    assert [float(value) for name, value in rge.log_values().items() if name.startswith("gradient")] == [0, 0, 0]
    expected = torch.tensor([GAMMA, -GAMMA * RATIO, 0.0], dtype=torch.float64)
    torch.testing.assert_close(rge.weights.grad, expected)


def test_terms_are_balanced_by_name():
    watched = parameters()
    rge = balancer(THREE, watched)
    named = losses(THREE, watched, 5)
    total = rge.combine(named)
    assert rge.combine(dict(reversed(named.items()))) == total
    rge.weights.data.fill_(0.5)
    assert rge.combine(named | {"of a method of yours": torch.tensor(3.0)}) == 0.5 * total + 3  # not balanced: weight 1
    with pytest.raises(AssertionError, match="'kd'"):
        rge.combine({name: value for name, value in named.items() if name != "kd"})


def test_state_is_carried_over_a_resume():
    watched = parameters()
    first, second = balancer(THREE, watched), balancer(THREE, watched)
    first.combine(losses(THREE, watched, 1))
    first.after_backward()
    first.weights.data += torch.arange(3)
    first.end_epoch()
    second.load_state_dict(first.state_dict())
    for rge in (first, second):
        rge.combine(losses(THREE, watched, 2))
        rge.after_backward()
    assert torch.equal(first.weights.grad, second.weights.grad)
    assert second.epoch == 1 and torch.equal(first.initial_losses, second.initial_losses)


def test_weights_of_the_previous_step_are_inherited_by_name():
    rge = balancer(THREE, parameters())
    rge.inherit(
        {"kd": torch.tensor(1.0), "pod/stage1": torch.tensor(1.5), "ce": torch.tensor(0.5), "mcd": torch.tensor(7.0)}
    )
    assert rge.weights.tolist() == [0.5, 1.0, 1.5]
    rge.inherit({})
    assert rge.weights.tolist() == [0.5, 1.0, 1.5]
    assert {name: float(weight) for name, weight in rge.loss_weights.items()} == {
        "ce": 0.5,
        "kd": 1.0,
        "pod/stage1": 1.5,
    }


def test_terms_without_inherited_weight_start_at_one_and_all_sum_to_their_number():
    rge = balancer(THREE, parameters())
    rge.inherit({"kd": torch.tensor(4.0)})
    assert rge.weights.tolist() == [0.5, 2.0, 0.5]


def test_a_plain_sum_has_no_weights():
    plain = Sum()
    plain.inherit({"ce": torch.ones(())})
    assert plain.loss_weights == {}


def test_sum_is_the_sum():
    assert Sum().combine({"ce": torch.tensor(1.5), "kd": torch.tensor(2.0)}) == 3.5
    assert Sum().parameters() == [] and Sum().log_values() == {}


# ------------------------------------------------------------------ precision


class Half(torch.autograd.Function):
    """What autocast to float16 does to a gradient: below 6e-8 it is gone, above 65504 infinite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.half().to(grad.dtype)


def measured(scale, factor, half=True):
    watched = [nn.Parameter(torch.tensor([1.0, 3.0])) for _ in range(2)]
    rge = balancer(THREE, watched)
    through = [Half.apply(w) if half else w for w in watched]
    rge.combine(
        {name: factor * (number + 1) * through[w].square().mean() for number, (name, w, *_) in enumerate(THREE)},
        scale,
    )
    rge.after_backward()
    return rge


def test_gradients_too_small_for_float16_survive_the_scale():
    tiny = 1e-9
    exact = measured(1.0, tiny, half=False)
    assert float(measured(1.0, tiny).log_values()["gradient/ce"]) == 0  # why there is a scale
    scaled = measured(2.0**16, tiny)
    for name, value in exact.log_values().items():
        torch.testing.assert_close(scaled.log_values()[name], value, rtol=1e-3, atol=0)
    torch.testing.assert_close(scaled.weights.grad, exact.weights.grad, rtol=1e-3, atol=1e-12)


def test_the_scale_changes_nothing_in_float32():
    one, scaled = measured(1.0, 0.1, half=False), measured(2.0**16, 0.1, half=False)
    torch.testing.assert_close(scaled.weights.grad, one.weights.grad)
    torch.testing.assert_close(scaled.log_values(), one.log_values())


def test_an_overflowing_term_does_not_reach_the_weights():
    rge = measured(2.0**16, 10.0)
    assert not rge.log_values()["gradient/ce"].isfinite()
    assert rge.weights.grad.isfinite().all()


def test_gradients_under_autocast_are_close_to_those_of_float32():
    found = {}
    for level in ("O0", "O1"):
        with thin.program():
            step = thin.Step(f"--method LSKD --opt_level {level}")
            images, labels = thin.images(2, 64), thin.bands(0, 4, 5, 255, size=64)
            step.begin(images, labels)
            trainer = step.trainer()
            trainer.train_iteration(images, labels)
        found[level] = trainer.balancer
        assert trainer.precision.dtype is (torch.bfloat16 if level == "O1" else None)
        assert trainer.balancer.weights.dtype is torch.float32
    for name, value in found["O1"].log_values().items():
        assert value.isfinite()
        if name.startswith("loss"):
            torch.testing.assert_close(value, found["O0"].log_values()[name], rtol=0.1, atol=1e-3)
    measured = torch.stack([found[level]._measured.gradients for level in ("O0", "O1")])
    assert torch.cosine_similarity(*measured, dim=0) > 0.95
    assert (measured[0] - measured[1]).norm() < 0.2 * measured[0].norm()
