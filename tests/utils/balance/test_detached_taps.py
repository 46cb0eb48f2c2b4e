"""utils/balance/detached_taps.py: gradients that start at the taps are those of the whole graph."""

import pytest
import torch
from torch import nn

from tests.support import thin
from utils.balance.detached_taps import DetachedTaps, mean_gradient, weighted_sum
from utils.types import Taps


class Network(nn.Module):
    """Six taps, each a function of the one before; the logits are the small logits."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 3, 1, dtype=torch.float64) for _ in range(6))

    def forward(self, x):
        maps = []
        for layer in self.layers:
            maps.append(x := layer(x).tanh())
        *attentions, pre_logits, logits = maps
        return Taps(logits, logits, attentions[-1], pre_logits, tuple(attentions))


def terms_of(taps, network):
    """Losses of one tap, of several, of a parameter directly, and a constant one."""
    return [
        taps.attentions[0].square().mean(),
        (taps.pre_logits * taps.attentions[2]).mean() + taps.logits.abs().mean(),
        taps.logits_small.exp().mean() * network.layers[0].weight.sum(),
        torch.tensor(3.0, dtype=torch.float64),
    ]


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network()


@pytest.fixture
def image():
    return torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


WEIGHTS = torch.tensor([0.5, 2.0, -1.0, 7.0], dtype=torch.float64)


def test_weighted_sum_has_the_gradients_of_the_whole_graph(network, image):
    expected = sum(w * term for w, term in zip(WEIGHTS, terms_of(network(image), network)))
    slopes = torch.autograd.grad(expected, list(network.parameters()))
    boundary = DetachedTaps(network(image))
    found = [boundary.gradients(term) for term in terms_of(boundary.taps, network)]
    assert found[3] == {}
    total = weighted_sum(expected.detach(), found, WEIGHTS)
    assert total == expected
    (2 * total).backward()  # as under a gradient scaler
    for parameter, slope in zip(network.parameters(), slopes):
        torch.testing.assert_close(parameter.grad, 2 * slope)


@pytest.mark.parametrize("cut", [True, False])
def test_mean_gradient_is_that_of_the_whole_graph(network, image, cut):
    watched = [network.layers[0].weight, network.layers[3].weight, network.layers[5].bias]
    taps = network(image)
    whole = terms_of(taps, network)[:3]
    boundary = DetachedTaps(network(image)) if cut else DetachedTaps()
    parts = terms_of(boundary.taps if cut else taps, network)[:3]
    for w in watched:
        for term, part in zip(whole, parts):
            (expected,) = torch.autograd.grad(term, w, retain_graph=True, allow_unused=True)
            expected = torch.zeros((), dtype=torch.float64) if expected is None else expected.mean()
            torch.testing.assert_close(mean_gradient(boundary.gradients(part), w), expected)


def test_equal_taps_stay_equal_and_frozen_ones_stay(network, image):
    network.layers[0].requires_grad_(False)
    taps = network(image)
    cut = DetachedTaps(taps).taps
    assert cut.logits is cut.logits_small and cut.logits.is_leaf and cut.logits is not taps.logits
    assert cut.attentions[0] is taps.attentions[0]
    assert cut.body is cut.attentions[-1]


def test_a_frozen_parameter_has_mean_gradient_zero(network, image):
    boundary = DetachedTaps(network(image))
    network.layers[5].requires_grad_(False)
    assert mean_gradient(boundary.gradients(boundary.taps.logits.mean()), network.layers[5].weight) == 0


def test_slopes_are_used_up(network, image):
    """They are as large as the taps: nothing may hold them while the network's backward pass needs the memory."""
    boundary = DetachedTaps(network(image))
    slopes = [boundary.gradients(boundary.taps.logits.mean())]
    weighted_sum(torch.zeros((), dtype=torch.float64), slopes, torch.ones(1, dtype=torch.float64)).backward()
    assert slopes == [{}]


def test_one_iteration_equals_that_of_the_uncut_losses():
    """The trainer's gradients, against Σ λ_i ℓ_i differentiated through everything."""
    images, labels = thin.images(2).double(), thin.bands(0, 4, 5, 255)
    with thin.program():
        step = thin.Step("--method LSKD", dtype=torch.float64)
        trainer = step.trainer()
        step.begin(images, labels)
        sum(step.method.terms(step.batch(images, labels)).values()).backward()
        expected = [parameter.grad.clone() for parameter in step.model.parameters()]
        trainer.precision.step = lambda optimizer: None
        trainer.train_iteration(images, labels)
    for parameter, gradient in zip(step.model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
