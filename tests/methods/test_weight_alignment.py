"""--align_weight: the norms by hand, and when weights are aligned."""

import pytest
import torch

from modules.classifier import Classifiers
from segmentation_module import SegmentationModel
from tests.support import thin
from train import Trainer
from utils.checkpointing import checkpoint_files


@pytest.mark.parametrize(("reference", "factor"), [("old", 3.0), ("background", 1.0), ("all", 7 / 3)])
def test_weight_alignment_by_hand(reference, factor):
    classifiers = Classifiers(1, [3, 2])
    with torch.no_grad():
        classifiers[0].weight.copy_(torch.tensor([2.0, 4, -8]).view(3, 1, 1, 1))  # background 2, others 6 on average
        classifiers[1].weight.copy_(torch.tensor([1.0, -3]).view(2, 1, 1, 1))  # 2 on average
    classifiers.align(reference)
    assert classifiers[1].weight.flatten().tolist() == pytest.approx([factor, -3 * factor])
    assert classifiers[0].weight.flatten().tolist() == [2, 4, -8]


@pytest.mark.parametrize(
    ("reference", "norm"),
    # rows of the earlier classifiers: 2, 4, 8 (step 0, background first) and 10 (step 1)
    [("old", (4 + 8 + 10) / 3), ("background", (2 + 10) / 2), ("all", (2 + 4 + 8 + 10) / 4)],
)
def test_weight_alignment_over_several_steps_by_hand(reference, norm):
    """The background is row 0 of the first classifier; of the later ones every row counts, for "background" too."""
    classifiers = Classifiers(1, [3, 1, 2])
    with torch.no_grad():
        classifiers[0].weight.copy_(torch.tensor([2.0, 4, -8]).view(3, 1, 1, 1))
        classifiers[1].weight.fill_(-10.0)
        classifiers[2].weight.copy_(torch.tensor([1.0, -3]).view(2, 1, 1, 1))  # 2 on average
    classifiers.align(reference)
    assert classifiers[2].weight.flatten().tolist() == pytest.approx([norm / 2, -3 * norm / 2])


def test_weight_alignment_takes_row_0_of_the_first_classifier_for_the_background():
    """With several background modes that is the first mode; the others count among the old rows."""
    for reference, norm in (("old", (6 + 4) / 2), ("background", (2 + 4) / 2), ("all", (2 + 6 + 4) / 3)):
        classifiers = Classifiers(1, [2, 1], background_modes=2)
        with torch.no_grad():
            classifiers[0].weight.copy_(torch.tensor([2.0, 6]).view(2, 1, 1, 1))
            classifiers[1].weight.fill_(4.0)
            classifiers[2].weight.fill_(1.0)
        classifiers.align(reference)
        assert classifiers[2].weight.item() == pytest.approx(norm)


# ------------------------------------------------------------------------------- when


@pytest.fixture
def happened(monkeypatch):
    """What a run does, in order: the titles of its evaluations, with the classifiers that they see, and its alignments."""
    calls = []
    evaluate, align = Trainer.evaluate, SegmentationModel.align_weight

    def spied_evaluate(trainer, loader, title="test", **options):
        calls.append((title, [classifier.weight.detach().clone() for classifier in trainer.network.cls]))
        return evaluate(trainer, loader, title, **options)

    def spied_align(model, reference):
        calls.append((f"align {reference}", []))
        align(model, reference)

    monkeypatch.setattr(Trainer, "evaluate", spied_evaluate)
    monkeypatch.setattr(SegmentationModel, "align_weight", spied_align)
    with thin.program():
        yield calls


def titles(happened):
    return [title for title, _ in happened]


def share(new, rows):
    """Mean norm of the new weights over that of others."""
    return (new.flatten(1).norm(dim=1).mean() / rows.flatten(1).norm(dim=1).mean()).item()


def saved(folder):
    """The weights of the two classifiers in the checkpoint of step 1."""
    state = checkpoint_files.load(folder / "checkpoints" / "6-2-shapes_n_1.pth")["model_state"]
    return state["module.cls.0.weight"], state["module.cls.1.weight"]


def test_alignment_of_every_epoch_follows_the_validation(tmp_path, happened):
    """The scores of a validation are those before it; the epochs that follow, and the checkpoint, have the aligned weights."""
    words = "--task 6-2 --step 0 1 --align_weight all --align_weight_frequency epoch --epochs 2"
    assert thin.launch(tmp_path, words) == 0
    validations = [f"validation after epoch {epoch}" for epoch in (1, 2)]
    aligned = [call for title in validations for call in (title, "align all")]
    assert titles(happened) == [*validations, "test", *aligned, "test"]
    old, new = saved(tmp_path)
    assert share(new, old) == pytest.approx(1, abs=1e-5)


def test_epochs_without_validation_are_not_aligned(tmp_path, happened):
    words = "--task 6-2 --step 0 1 --align_weight all --align_weight_frequency epoch --epochs 3 --val_interval 2"
    assert thin.launch(tmp_path, words) == 0
    assert titles(happened)[2:] == ["validation after epoch 2", "align all", "test"]
    old, new = saved(tmp_path)
    assert share(new, old) != pytest.approx(1, abs=1e-5)  # an epoch of training follows


def test_alignment_of_the_task_changes_the_test_and_not_the_file(tmp_path, happened):
    plain, aligned = tmp_path / "plain", tmp_path / "aligned"
    words = "--align_weight old --align_weight_frequency task"
    for folder, more in ((plain, ""), (aligned, words)):
        assert thin.launch(folder, f"--task 6-2 --step 0 1 {more}") == 0
    assert titles(happened)[-3:] == ["validation after epoch 1", "align old", "test"]
    assert titles(happened).count("align old") == 1
    (old, new), (_, tested) = saved(aligned), happened[-1][1]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(saved(plain), (old, new)))
    assert share(new, old[1:]) != pytest.approx(1, abs=1e-5)
    assert share(tested, old[1:]) == pytest.approx(1, abs=1e-5)

    # --test aligns the reloaded weights alike, and a finished step that is resumed is known as recorded
    document = thin.document(aligned)["steps"]["1"]
    assert document["weights_sha256"] == thin.document(plain)["steps"]["1"]["weights_sha256"]
    assert thin.launch(aligned, f"--task 6-2 --step 1 --test {words}") == 0
    assert torch.equal(happened[-1][1][1], tested)
    assert thin.document(aligned)["steps"]["1"]["weights_sha256"] == document["weights_sha256"]
    happened.clear()
    assert thin.launch(aligned, f"--task 6-2 --step 1 --resume {words}") == 0
    assert happened == []
