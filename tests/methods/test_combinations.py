"""AWT, EWF and NeST added to methods with a network, a memory or a start of their own, through the command line."""

import pytest
import torch

import dataset
import methods
import run
import segmentation_module
from methods.awt import AttributionTransfer
from methods.base import Previous
from methods.ewf import WeightFusion
from methods.reminder import SimilarityDistillation
from tests.support import interrupted, thin
from utils.checkpointing.store import read

CPU = torch.device("cpu")
RCIL = "--method RCIL --lr 0.001 --pcd_factors 1e-4 1e-5 1e-4 1e-5"
ALIFE_M = "--method ALIFE-M --lr 0.001 --alife_memory 3 --alife_rotation_epochs 1"
NEST = "--nest --warm_epochs 1"
#: Command lines, and the iteration of step 1, those of its phases included, before which it is killed.
COMBINATIONS = {
    "--method REMINDER --ewf": 1,
    f"--method REMINDER {NEST}": 1,
    f"{RCIL} --crop_size 64 --init_awt": 1,
    f"{RCIL} {NEST}": 1,
    "--method ALIFE --lr 0.001 --ewf": 1,
    f"--method ALIFE --lr 0.001 {NEST}": 2,
    f"{ALIFE_M} --ewf": 3,
    f"{ALIFE_M} {NEST}": 5,
}


pytestmark = pytest.mark.usefixtures("small")


def checkpoint(folder, step):
    return read(thin.checkpoint(folder, step))


@pytest.mark.parametrize("words", COMBINATIONS)
def test_killed_and_resumed_to_the_bit(words, tmp_path):
    text = f"--task 6-2 {words}"
    whole, parts = interrupted.run_twice(tmp_path, text, step=1, at=COMBINATIONS[words])
    interrupted.assert_equal_to_the_bit(whole, parts)
    assert all(value.isfinite().all() for value in whole["model_state"].values())


def test_reminders_prototypes_are_those_of_the_fused_network(tmp_path):
    """Estimated again with the weights of the checkpoint, over the same batches: the same rows."""
    words = "--task 6-2 --method REMINDER --ewf --lr 0.05 --step"
    assert thin.launch(tmp_path, f"{words} 0 1") == 0
    first, second = checkpoint(tmp_path, 0), checkpoint(tmp_path, 1)
    opts = thin.options(f"{words} 1", 1)
    task = dataset.load_task(opts, 1)
    model = segmentation_module.build_network(opts, task.classes_per_step, False)
    model.load_state_dict(second["model_state"])
    data = run.StepData(opts, task, CPU)
    part = SimilarityDistillation(opts, task)
    part.attach(model, None, Previous(state=first["method_state"]["reminder"]))
    data.batches.set_position(0, purpose=part.purpose)
    part.end_step(model, data.batches, CPU)
    assert torch.equal(part.prototypes, second["method_state"]["reminder"]["prototypes"])


@pytest.mark.parametrize("more", ["", "--rcil_init mended"])
def test_awt_takes_the_place_of_rcils_start(more, tmp_path, monkeypatch):
    """Step 1 begins with the random start, the background added in the selected channels; no bias changes."""
    found = []
    transfer = AttributionTransfer._transfer

    def remember(part, model):
        start = model.cls[-1].weight.detach().flatten(1).clone(), model.cls[0].bias.detach().clone()
        transfer(part, model)
        found.append((*start, model.cls[-1].weight.detach().flatten(1).clone(), part.selected))

    began = []
    init = methods.Method.init_classifier

    def after(method, model, *args):
        init(method, model, *args)
        began.append((model.cls[-1].weight.detach().flatten(1).clone(), model.cls[0].bias.detach().clone()))

    monkeypatch.setattr(AttributionTransfer, "_transfer", remember)
    monkeypatch.setattr(methods.Method, "init_classifier", after)
    assert thin.launch(tmp_path, f"--task 6-2 {RCIL} --crop_size 64 --init_awt {more} --step 0 1") == 0
    (start, bias, transferred, selected), (weights, background) = found[0], began[-1]
    assert selected.any() and not torch.equal(start, transferred)
    assert torch.equal(weights, transferred) and torch.equal(background, bias)


def test_alife_m_remembers_features_of_the_fused_network(tmp_path, monkeypatch):
    """The memory is rotated to, and the classifiers are replayed with, what the checkpoint of the step holds."""
    order = []
    for owner, name in (
        (WeightFusion, "fuse"),
        (methods.alife.Rotation, "begin"),
        (methods.alife.FeatureReplay, "end_step"),
    ):
        plain = getattr(owner, name)

        def noted(*args, plain=plain, name=name, **rest):
            order.append(name)
            return plain(*args, **rest)

        monkeypatch.setattr(owner, name, noted)
    assert thin.launch(tmp_path, f"--task 6-2 {ALIFE_M} --ewf --step 0 1") == 0
    assert order == ["end_step", "fuse", "begin", "end_step"]
