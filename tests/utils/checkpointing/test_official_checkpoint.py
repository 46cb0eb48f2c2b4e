"""Checkpoints are those of the official programs: keys, order of the weights, groups of the optimiser."""

import json

import pytest
import torch
from torch import nn

import run
from tests.support import thin
from tests.support.paths import FACTS
from utils.checkpointing import checkpoint_files
from utils.checkpointing.store import read

#: Name and shape of every weight of the official LSKD program's network, in the order of its state dict.
OFFICIAL = json.loads((FACTS / "official_state_dict.json").read_text())["resnet18"]
LOSS_WEIGHTS = "module.head.lossweights"
KEYS = ["epoch", "model_state", "optimizer_state", "scheduler_state", "best_score", "trainer_state"]
OWN_KEYS = {"history", "iterations", "iterations_before", "options", "task", "method_state"}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def official_shapes(classes, has_lambda):
    """Shapes by name, in the official order, of a network with these classifiers."""
    shapes = {name: shape for name, shape in OFFICIAL.items() if not name.startswith("module.cls.")}
    if not has_lambda:
        del shapes[LOSS_WEIGHTS]
    for step, count in enumerate(classes):
        shapes |= {f"module.cls.{step}.weight": [count, 256, 1, 1], f"module.cls.{step}.bias": [count]}
    return shapes


def official_optimizer(shapes, parts=("body", "head", "cls")):
    """The official optimiser: a group for each part of the network, its parameters in the order of the state dict."""
    parameters = {n: nn.Parameter(torch.zeros(shape)) for n, shape in shapes.items() if not n.endswith(BUFFERS)}
    groups = [[p for n, p in parameters.items() if n.startswith(f"module.{part}.")] for part in parts]
    return parameters, torch.optim.SGD([{"params": g} for g in groups], lr=1.0, momentum=0.9, nesterov=True)


def test_keys_groups_and_orders_are_the_official_ones(tmp_path):
    """Of the real ResNet-18: fine-tuning at step 0, LSKD at step 1, PLOP at step 2; two epochs each."""
    for step, method in enumerate(("FT", "LSKD", "PLOP")):
        text = f"--task 6-2 --step {step} --method {method} --epochs 2 --shapes_train 16 --ckpt_interval 9 --val_interval 9"
        assert run.main(thin.words(tmp_path, text)) == 0
        state = checkpoint_files.load(thin.checkpoint(tmp_path, step))
        assert list(state)[:6] == KEYS
        assert set(state) == {*KEYS, *OWN_KEYS} | ({"loss_weights", "previous_sha256"} if step else set())
        assert state["epoch"] == 1  # the index of the second and last epoch
        assert state["trainer_state"] == {"regularizer": None}
        assert set(state["method_state"]) == ({"pseudo_labels"} if step else set())
        check_weights_and_optimizer(state, official_shapes([7, 2, 2][: step + 1], has_lambda=method == "LSKD"))


def check_weights_and_optimizer(state, shapes):
    """Both are loaded as the official programs load them, and the optimiser makes a step."""
    assert [(name, list(value.shape)) for name, value in state["model_state"].items()] == list(shapes.items())
    parameters, optimizer = official_optimizer(shapes)
    mine = [group["params"] for group in state["optimizer_state"]["param_groups"]]
    assert mine == [group["params"] for group in optimizer.state_dict()["param_groups"]]
    optimizer.load_state_dict(state["optimizer_state"])
    for name, parameter in parameters.items():
        momentum = optimizer.state[parameter]["momentum_buffer"]
        assert momentum.shape == parameter.shape and momentum.any(), name
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


@pytest.mark.parametrize(
    ("words", "parts"),
    [("--freeze", ("head", "cls")), ("--lr_old 0.5", ("body", "head", "cls.0", "cls.1"))],
)
def test_groups_of_other_options(words, parts):
    step = thin.Step(f"--method LSKD {words}", ((0, 1, 2, 3, 4, 5, 6), (7, 8)))
    assert [name for name, _ in step.model.named_parameters()] == [
        name.removeprefix("module.") for name in official_shapes([7, 2], False) if not name.endswith(BUFFERS)
    ]
    if words == "--freeze":
        step.model.freeze_body()
    shapes = official_shapes([7, 2], True)
    _, optimizer = official_optimizer(shapes, parts)
    trained = step.trainer().optimizer.state_dict()["param_groups"]
    assert [group["params"] for group in trained] == [g["params"] for g in optimizer.state_dict()["param_groups"]]


def test_the_optimizer_holds_no_norm_that_is_fixed():
    step = thin.Step("--method LSKD --fix_bn", ((0, 1, 2), (3,)))
    convs = [p for name, p in step.model.named_parameters() if "bn" not in name]
    trainer = step.trainer()
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in [*convs, trainer.balancer.weights]}


def test_the_state_of_a_regularizer_lies_where_the_official_programs_look(tmp_path):
    with thin.program():
        assert thin.launch(tmp_path, "--task 6-2 --step 0 --method EWC") == 0
    state = checkpoint_files.load(tmp_path / "checkpoints" / "6-2-shapes_n_0.pth")
    assert set(state["trainer_state"]) == {"regularizer"} and state["method_state"] == {}
    fisher = state["trainer_state"]["regularizer"]["fisher"]
    assert set(fisher) == {name for name in state["model_state"] if not name.endswith(BUFFERS)}


def test_lambda_reaches_a_later_step_through_a_step_without(tmp_path, monkeypatch):
    """The step without λ has no `head.lossweights`, which the programs without λ refuse, but a key of this program."""
    started, train = [], run.StepRun._train

    def remember(step, trainer, *args):
        started.append(
            torch.stack([*trainer.balancer.loss_weights.values()]) if trainer.balancer.loss_weights else None
        )
        train(step, trainer, *args)

    monkeypatch.setattr(run.StepRun, "_train", remember)
    files = []
    with thin.program():
        for step, method in enumerate(("FT", "LSKD", "PLOP", "FT", "LSKD")):
            text = f"--task 6-1 --step {step} --method {method} --shapes_train 60 --shapes_val 40"
            assert thin.launch(tmp_path, text) == 0
            files.append(checkpoint_files.load(tmp_path / "checkpoints" / f"6-1-shapes_n_{step}.pth"))
    assert [LOSS_WEIGHTS in file["model_state"] for file in files] == [False, True, False, False, True]
    assert ["loss_weights" in file for file in files] == [False, True, True, True, True]
    moved = files[1]["model_state"][LOSS_WEIGHTS]
    assert len(moved.unique()) > 1
    assert [weights is None for weights in started] == [True, False, True, True, False]
    assert torch.equal(started[1], torch.ones(9)) and torch.equal(started[4], moved)


def test_checkpoints_of_earlier_versions_are_built_upon(tmp_path, capsys):
    """They have `head.lossweights` at every step, no "regularizer" where there is none, and count epochs from 1."""
    with thin.program():
        for method in ("FT", "LSKD"):
            folder = tmp_path / method
            assert thin.launch(folder, "--task 6-2 --step 0 --method FT") == 0
            path = folder / "checkpoints" / "6-2-shapes_n_0.pth"
            state = checkpoint_files.load(path)
            if method == "LSKD":
                del state["method_state"]
                state |= {"epoch": 1, "trainer_state": {}}
                state["model_state"][LOSS_WEIGHTS] = torch.ones(9)
                checkpoint_files.save(path, state)
                assert [float(weight) for weight in read(path)["loss_weights"].values()] == [1.0] * 9
            assert thin.launch(folder, "--task 6-2 --step 1 --method LSKD") == 0
    assert thin.rows(tmp_path / "FT") == thin.rows(tmp_path / "LSKD")


SHAPES = [torch.ones(8), torch.ones(9, 1), torch.ones(()), {"names": ["ce"], "values": torch.ones(2)}]


@pytest.mark.parametrize("wrong", [torch.full((9,), float("nan")), [1.0] * 9, "x", *SHAPES])
def test_a_lambda_that_is_no_number_is_refused(tmp_path, wrong):
    checkpoint_files.save(tmp_path / "a.pth", {"model_state": {}, "loss_weights": wrong})
    with pytest.raises(
        ValueError, match=r"a.pth has a λ .* not a tensor of finite numbers, one for .*; train that step again"
    ):
        read(tmp_path / "a.pth")
