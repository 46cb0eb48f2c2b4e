"""--rge_interval: gradients are measured at every Nth iteration and held in between, exactly over a resume."""

import pytest
import torch

from tests.support import interrupted, thin
from tests.utils.balance.test_equilibrium import OFFICIAL, balancer, losses, parameters
from utils.balance import equilibrium
from utils.checkpointing import checkpoint_files


def run(rge, watched, iterations, rate=0.01):
    """λ and its gradient after each iteration, and how often the gradients were measured."""
    found, measured = [], []
    measure = equilibrium.GradientEquilibrium._measure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(equilibrium.GradientEquilibrium, "_measure", lambda *args: measured.append(1) or measure(*args))
        for iteration in iterations:
            rge.combine(losses(OFFICIAL, watched, iteration)).backward()
            rge.after_backward()
            with torch.no_grad():
                rge.weights -= rate * rge.weights.grad
            found.append((rge.weights.detach().clone(), rge.weights.grad.clone()))
    return found, len(measured)


def test_the_interval_1_measures_at_every_iteration():
    watched = parameters()
    assert run(balancer(OFFICIAL, watched, interval=1), watched, range(4))[1] == 4


def test_between_measurements_the_gradient_of_lambda_is_that_of_the_held_ones():
    """With the losses of the measured iteration shown again at the held ones, an interval of 3 moves λ as one of 1 does."""
    watched = parameters()
    every, count = run(balancer(OFFICIAL, watched, interval=1), watched, [0, 0, 0, 3, 3, 3, 6])
    held, measured = run(balancer(OFFICIAL, watched, interval=3), watched, [0, 1, 2, 3, 4, 5, 6])
    assert (count, measured) == (7, 3)
    for mine, theirs in zip(held, every):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)


def test_the_loss_and_its_gradients_do_not_depend_on_the_interval():
    watched = parameters()
    found = []
    for interval in (1, 2):
        rge = balancer(OFFICIAL, watched, interval=interval)
        run(rge, watched, [0], rate=0.0)
        rge.weights.data.copy_(torch.linspace(0.5, 1.5, 9))
        for weight in watched:
            weight.grad = None
        loss = rge.combine(losses(OFFICIAL, watched, 1))
        loss.backward()
        found.append([loss.detach(), *(weight.grad.clone() for weight in watched)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-15)


def test_a_skipped_iteration_is_measured_again():
    """Its losses were not finite, so that the trainer did not call `after_backward`."""
    watched = parameters()
    rge = balancer(OFFICIAL, watched, interval=2)
    rge.combine(losses(OFFICIAL, watched, 0))
    assert run(rge, watched, [1, 2, 3])[1] == 2


@pytest.mark.parametrize("at", [1, 4])
def test_a_resume_between_two_measurements_is_exact(tmp_path, at):
    with thin.program():
        text = "--task 6-4 --method LSKD --rge_interval 3 --shapes_train 16 --epochs 1 --lr 0.01"
        whole, parts = interrupted.run_twice(tmp_path, text, 1, at)
    interrupted.assert_equal_to_the_bit(whole, parts)
    name = checkpoint_files.LOSS_WEIGHTS
    assert torch.equal(whole["model_state"]["module." + name], parts["model_state"]["module." + name])
