"""Iterations whose losses the host reads later, on a CPU that is taken for a device which computes while the host goes on."""

import itertools
import os
import re
import signal

import pytest
import torch

import methods
from scripts.benchmark.__main__ import parse
from scripts.benchmark.workbench import Workbench
from tests.support import thin
from tests.support.fake_cuda import counting
from train import Trainer
from utils.checkpointing import checkpoint_files
from utils.checkpointing.checkpoint_files import digest
from utils.checkpointing.random_state import seed_everything
from utils.runtime import amp, gate

SMALL = "--backbone resnet18 --crop_size 32 --old_classes 4 --new_classes 2 --device cpu"
METHODS = [name for name in methods.METHODS if name != "Joint"]  # it has no step 1
STEP = "--task 6-2 --step 0 --method FT"
#: They sum in another order on a device that the host does not wait for.
MASKED = ("UCD", "REMINDER", "SDR")


pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture
def gated(monkeypatch):
    """Call it to gate the iterations on the CPU; it returns the list of those that were gated."""

    def switch():
        found, train = [], Trainer._train_gated
        monkeypatch.setattr(gate, "ASYNCHRONOUS", ("cuda", "cpu"))
        monkeypatch.setattr(
            Trainer, "_train_gated", lambda self, *batch: (found.append(self.iteration), train(self, *batch))[1]
        )
        return found

    return switch


def bench_of(text):
    """Step 1 of a method on a batch of noise."""
    words = f"{SMALL} {text}".split()
    return Workbench(parse(words), torch.device("cpu"), parts=("iteration",))


def states(text, batches, skip=5):
    """The state before training and after each batch; factors of the images, NaN for a batch with a loss that is not finite."""
    bench = bench_of(text)
    seed_everything(3)
    trainer = bench.trainer
    trainer.opts.skip_nonfinite = skip
    for factor in batches:
        trainer.settle()
        trainer.train_iteration(bench.images * factor, bench.labels)
        trainer.iteration += 1
    trainer.settle()
    state = trainer.state_dict() | {"buffers": dict(bench.student.named_buffers())}
    state["optimizer"] = {
        number: momenta["momentum_buffer"]
        for number, momenta in state["optimizer"]["state"].items()
        if momenta["momentum_buffer"].any()  # gating starts from zeros where otherwise nothing is allocated
    }
    return state


@pytest.mark.parametrize("method", METHODS)
def test_a_gated_training_is_equal_to_one_whose_losses_are_read_at_once(method, gated):
    batches = [1.0, 0.5, torch.nan, 0.7, 0.9]
    expected = states(f"--method {method}", batches)
    found = gated()
    actual = states(f"--method {method}", batches)
    assert found == [1, 2, 3, 4]
    if method in MASKED:
        torch.testing.assert_close(actual["model"], expected["model"])
        expected = {"position": expected["position"]}
    for name, value in expected.items():
        assert digest(actual[name]) == digest(value), name
    assert actual["position"][3] == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_gated_iteration_reads_nothing(method, gated):
    bench = bench_of(f"--method {method}")
    gated()
    bench.iteration()  # the first one of a step is read at once
    with counting() as found:
        assert bench.trainer.train_iteration(bench.images, bench.labels) is None
    assert not found.reads
    assert bench.trainer.settle().keys() >= {"loss"}


def spoil(monkeypatch, factors):
    """Multiply the losses of passes, counted from 1, by factors."""
    terms, count = thin.methods.Method.terms, itertools.count(1)

    def spoiled(self, batch):
        factor = factors.get(next(count), 1.0)
        return {name: value * factor for name, value in terms(self, batch).items()}

    monkeypatch.setattr(thin.methods.Method, "terms", spoiled)


#: By case: options, exit code, factors of the losses by pass, and those by pass where a pass that is not accepted is repeated.
SPOILED = {
    "skipped": (
        "--skip_nonfinite 2",
        0,
        {3: torch.nan, 6: torch.inf},
        {3: torch.nan, 4: torch.nan, 7: torch.inf, 8: torch.inf},
    ),
    "ended": ("--skip_nonfinite 1", 3, {3: torch.nan, 4: torch.nan}, dict.fromkeys((3, 4, 5, 6), torch.nan)),
    "diverged": ("", 3, {4: 1e6, 5: torch.nan}, {4: 1e6, 5: 1e6, 6: torch.nan}),
    "recovered": ("", 0, {3: 1e4}, {3: 1e4, 4: 1e4}),
}


@pytest.mark.parametrize("case", SPOILED)
def test_messages_files_and_states_are_those_of_losses_that_are_read_at_once(
    case, tmp_path, monkeypatch, capsys, gated
):
    options, code, factors, repeated = SPOILED[case]
    said, kept = [], []
    for name in ("checked", "gated"):
        with monkeypatch.context() as patch:
            found = gated() if name == "gated" else []
            spoil(patch, repeated if name == "gated" else factors)
            folder = tmp_path / name
            assert thin.launch(folder, f"{STEP} --epochs 2 --weight_decay 0.1 --print_interval 1 {options}") == code
        out, err = capsys.readouterr()
        said.append(re.sub(r"\d+[.:]\d+ ?(s|min)?", "", (out + err).replace(str(folder), "FOLDER")))
        files = sorted((folder / "checkpoints").glob("*.pth"))
        kept.append({file.name: checkpoint_files.load(file) for file in files})
        assert bool(found) == (name == "gated")
    assert said[0] == said[1]
    assert kept[0].keys() == kept[1].keys()
    for name, state in kept[0].items():
        other = kept[1][name]
        assert digest(state.get("model_state", {})) == digest(other.get("model_state", {})), name
        if state.get("state"):
            for key in ("model", "balancer", "method", "position", "meters", "scheduler", "divergence", "history"):
                assert digest(state["state"][key]) == digest(other["state"][key]), (name, key)


@pytest.mark.parametrize("iteration", [1, 3, 6, 12])
def test_a_stop_request_saves_the_position_and_a_resume_is_exact(iteration, tmp_path, monkeypatch, gated):
    assert thin.launch(tmp_path / "whole", f"{STEP} --epochs 2") == 0
    gated()
    train, count = Trainer.train_iteration, itertools.count(1)

    def interrupted(trainer, *batch):
        if next(count) == iteration:
            os.kill(os.getpid(), signal.SIGTERM)
        return train(trainer, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_iteration", interrupted)
        assert thin.launch(tmp_path / "stopped", f"{STEP} --epochs 2") == 143
    state = checkpoint_files.load(tmp_path / "stopped" / "checkpoints" / "6-2-shapes_n_0.resume.pth")["state"]
    assert 6 * state["position"][0] + state["position"][1] == iteration
    assert thin.launch(tmp_path / "stopped", f"{STEP} --epochs 2 --resume") == 0
    weights = [
        digest(checkpoint_files.load(tmp_path / name / "checkpoints" / "6-2-shapes_n_0.pth")["model_state"])
        for name in ("whole", "stopped")
    ]
    assert weights[0] == weights[1]


def test_a_part_with_hooks_that_change_tensors_in_place_has_the_losses_read(gated, monkeypatch):
    bench = bench_of("--method EWC")
    monkeypatch.setattr(type(bench.trainer.method.parts[-1]), "gated", False)
    found = gated()
    for _ in range(2):
        assert bench.trainer.train_iteration(bench.images, bench.labels)
    assert found == []


@pytest.mark.parametrize("accepted", [True, False])
def test_the_scale_of_float16_stays_where_an_iteration_is_not_accepted(accepted, gated):
    gated()
    opts = thin.options("--opt_level O1 --amp_dtype float16")
    precision = amp.Precision(opts, torch.device("cpu"))
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=True)
    optimizer.state[weight]["momentum_buffer"] = torch.full((3,), 0.5)
    with counting() as found:
        precision.scale_on_device()
        flag = torch.tensor(accepted)
        precision.backward((weight * torch.tensor([1.0, 0.0, 2.0])).sum(), optimizer, flag)
        precision.step(optimizer, flag)
    assert not found.reads
    assert precision.gradient_scale == amp.INITIAL_SCALE
    moved = torch.tensor([1.45, 0.45, 2.45]) if accepted else torch.full((3,), 0.5)
    torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], moved)
    torch.testing.assert_close(weight.detach(), 1 - 0.1 * moved if accepted else torch.ones(3))
