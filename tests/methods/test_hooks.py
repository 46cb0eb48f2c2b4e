"""Every hook of a part, called where methods/base.py says, with phases that resume to the bit, on one and two processes."""

import pytest
import torch

import methods
import run
from methods.part_types import GatedHooks
from tests.examples.every_hook import EveryHook, UsesEveryHook
from tests.support import interrupted, thin
from utils.checkpointing import checkpoint_files

TEXT = "--method EveryHook --task 6-2 --epochs 2 --num_workers 0"
HOOKS = [
    name
    for kind in (methods.Part, GatedHooks)
    for name in vars(kind)
    if not name.startswith("_") and callable(getattr(kind, name))
]


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "EveryHook", EveryHook)
    with thin.program():
        yield


def weights(folder, step):
    return checkpoint_files.load(thin.checkpoint(folder, step))


def test_the_example_overrides_every_hook():
    inherited = [name for name in HOOKS if name not in vars(UsesEveryHook)]
    assert inherited == ["make_balancer"]  # LSKD has one


def test_order_of_the_calls(tmp_path, monkeypatch):
    calls = []
    for name in HOOKS:
        if name in ("add_options", "enabled", "make_balancer", "state_dict"):
            continue

        hook = vars(UsesEveryHook)[name]

        def record(part, *args, _hook=hook, _name=name):
            if not calls or calls[-1] != _name:
                calls.append(_name)
            return _hook(part, *args)

        monkeypatch.setattr(UsesEveryHook, name, record)
    assert thin.launch(tmp_path, f"{TEXT} --epochs 1 --step 0 --shapes_train 2") == 0
    assert calls == [
        *(
            "wrap_model",
            "attach",
            "replay",
            "init_classifier",
            "frozen",
            "phases",
            "term_specs",
            "parameter_groups",
            "begin_step",
        ),
        *(
            "prepare",
            "terms",
            "penalties",
            "after_backward",
            "after_step",
            "end_epoch",
            "end_validation",
            "end_step",
            "export",
        ),
        "begin_test",
    ]


def test_all_steps_with_phases_memory_and_frozen_parts(tmp_path, capsys):
    assert thin.launch(tmp_path, f"{TEXT} --step 0 1 2") == 0
    said = capsys.readouterr().out
    assert "step 1 scale epoch 1/1: ce" in said and "step 1 biases epoch 2/2: ce" in said
    entries = thin.document(tmp_path)["steps"]["1"]["epochs"]
    assert [(entry.get("phase"), entry["epoch"]) for entry in entries] == [
        ("scale", 0), (None, 0), (None, 1), ("biases", 0), ("biases", 1)
    ]  # fmt: skip
    assert set(entries[1]["losses"]) == {"ce", "weighted", "features", "scale", "loss"}
    first, second = (weights(tmp_path, step) for step in (0, 1))
    assert torch.equal(
        first["model_state"]["module.body.mod1.conv1.weight"], second["model_state"]["module.body.mod1.conv1.weight"]
    )
    assert not torch.equal(first["model_state"]["module.head.scale.factor"], torch.ones(thin.FEATURES))
    assert len(first["method_state"]["every_hook"]["remembered"]) == 2
    rates = {group["initial_lr"] for group in second["optimizer_state"]["param_groups"]}
    assert rates == {0.01, 0.02}


def test_the_memory_joins_the_training_set(tmp_path, monkeypatch):
    lengths = []
    data = run.StepData.__init__

    def remember(self, *args):
        data(self, *args)
        lengths.append(len(self.batches.data))

    monkeypatch.setattr(run.StepData, "__init__", remember)
    assert thin.launch(tmp_path, f"{TEXT} --step 0 1 --epochs 1") == 0
    plain = run.dataset.build(thin.options("", 1), run.dataset.load_task(thin.options("", 1), 1))
    assert lengths[1] == len(plain.train) + 2


@pytest.mark.parametrize("at", [1, 4, 7, 10, 13, 14])
def test_a_resume_continues_to_the_bit(tmp_path, at):
    """Killed after its k-th iteration, counted over phases and training."""
    interrupted.assert_equal_to_the_bit(*interrupted.run_twice(tmp_path, TEXT, step=1, at=at))
