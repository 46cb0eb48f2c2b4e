"""A trial batch: one real iteration, of which nothing remains."""

import math

import pytest
import torch

import methods
from dataset.sampler import FixedBatches
from scripts.benchmark.__main__ import parse
from scripts.benchmark.workbench import Workbench
from utils.checkpointing.checkpoint_files import digest
from utils.checkpointing.random_state import seed_everything
from utils.optimizer import allocate_momenta
from utils.runtime.errors import NonFiniteLoss

SMALL = "--backbone resnet18 --crop_size 64 --old_classes 4 --new_classes 2 --device cpu"


pytestmark = pytest.mark.usefixtures("small")


def bench_of(text):
    """Step 1 of a method, its statistics gathered and what step 0 left for it in place."""
    return Workbench(parse(f"{SMALL} {text}".split()), torch.device("cpu"), parts=("iteration",))


def after_two_iterations(text, trial):
    """The state after two iterations, with a trial batch before each of them or without."""
    bench = bench_of(text)
    seed_everything(3)
    for images, labels in ((bench.images, bench.labels), (bench.images.flip(3), bench.labels.flip(2))):
        if trial:
            bench.trainer.trial(FixedBatches([(images, labels)]))
            assert all(parameter.grad is None for parameter in bench.student.parameters())
        assert bench.trainer.train_iteration(images, labels)
    return bench.trainer.state_dict() | {"buffers": dict(bench.student.named_buffers())}


@pytest.mark.parametrize("options", ["", "--amp_dtype float16 --channels_last"])
@pytest.mark.parametrize("method", [name for name in methods.METHODS if name != "Joint"])  # which has no step 1
def test_a_run_with_a_trial_batch_is_equal_to_one_without(method, options):
    text = f"--method {method} {options}"
    assert digest(after_two_iterations(text, True)) == digest(after_two_iterations(text, False))


def test_a_trial_batch_is_a_whole_iteration_beside_the_momenta(monkeypatch):
    """The optimiser allocates them after the first backward pass, and the second one has to fit beside them."""
    bench = bench_of("--method LSKD")
    precision = bench.trainer.precision
    seen, backward, step = [], precision.backward, precision.step

    def look(loss, optimizer):
        seen.append(sum(state["momentum_buffer"].numel() for state in optimizer.state.values()))
        backward(loss, optimizer)

    monkeypatch.setattr(precision, "backward", look)
    monkeypatch.setattr(precision, "step", lambda optimizer: (step(optimizer), seen.append("step")))
    bench.trainer.trial(FixedBatches([(bench.images, bench.labels)]))
    trained = sum(parameter.numel() for parameter in bench.student.parameters())
    assert seen == [trained + len(bench.trainer.balancer.names), "step"]
    assert not bench.trainer.optimizer.state


def test_a_trial_batch_without_momentum_allocates_none():
    bench = bench_of("--method FT")
    for group in bench.trainer.optimizer.param_groups:
        group["momentum"] = 0
    allocate_momenta(bench.trainer.optimizer)
    assert not bench.trainer.optimizer.state


def test_a_trial_batch_with_a_non_finite_loss_leaves_it_to_the_training():
    bench = bench_of("--method FT")
    loader = FixedBatches([(torch.full_like(bench.images, math.nan), bench.labels)])
    before = digest(bench.trainer.state_dict())
    bench.trainer.trial(loader)
    assert digest(bench.trainer.state_dict()) == before
    with pytest.raises(NonFiniteLoss):
        bench.trainer.train_epoch(loader)
