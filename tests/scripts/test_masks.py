"""scripts/masks.py: what is drawn and measured is the M of the training, counted by the truth."""

import csv

import pytest
import torch

import dataset
from methods.lskd import LayerSpecificDistillation
from scripts import masks
from scripts.predict import load
from tests.support import thin
from utils.checkpointing.store import read

pytestmark = pytest.mark.usefixtures("small")


def checkpoints(folder, method="LSKD"):
    assert thin.launch(folder, f"--task 6-2 --shapes_train 24 --step 0 1 --method {method}") == 0
    return sorted((folder / "checkpoints").glob("*.pth"))


def test_shares_by_hand():
    """Two of four positions kept by a channel, one by both; a label map of twice the size."""
    mask = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]]])  # 1×2×2×2
    truth = torch.tensor([[[1, 1, 3, 3], [1, 1, 3, 255], [2, 0, 0, 0], [2, 0, 0, 0]]])
    found = masks.Coverage()
    found.add(mask, truth, num_old=3)
    found.add(mask, truth, num_old=3)
    assert found.pixels == [12, 6, 12]
    assert found.shares(0) == pytest.approx((100 * 4 / 6, 100 * 4 / 6))  # old objects: 4 of 6 below both channels
    assert found.shares(1) == pytest.approx((100, 50)) and found.shares(2) == (0, 0)


def test_labels_by_hand():
    """Old classes are 1 and 2, the new one is 3; what the truth ignores is not counted."""
    truth = torch.tensor([[[1, 1, 2, 2, 3, 0, 0, 0, 255]]])
    labels = torch.tensor([[[1, 2, 0, 255, 3, 0, 1, 255, 1]]])
    found = masks.LabelCounts()
    found.add(labels, truth, num_old=3)
    assert found.pixels == [[1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 1, 1]]
    assert found.shares(0) == [25, 25, 25, 25] and found.shares(1) == [100, 0, 0, 0]


def test_the_masks_are_those_of_the_training(tmp_path):
    """With the thresholds of the checkpoint, for images in evaluation crops."""
    paths = checkpoints(tmp_path)
    teacher, student, state = load(paths[0]), load(paths[1]), read(paths[1])
    labelled, truth = dataset.examined(student.opts, student.task, True)
    assert {int(v) for i in range(3) for v in labelled[i][1].unique()} <= {0, 7, 8, 255}
    assert any(0 < int(v) < 7 for i in range(len(truth)) for v in truth[i][1].unique())
    images, labels = torch.stack([labelled[i][0] for i in range(2)]), torch.stack([labelled[i][1] for i in range(2)])
    ours = masks.Masks(teacher, student, state, torch.device("cpu"))
    batch = ours.prepare(images, labels)
    step = load(paths[1])
    for part in step.method.parts:
        if part.state_key == "pseudo_labels":
            part.load_state_dict(state["method_state"]["pseudo_labels"])
    trained = step.method.prepare(images, labels.long(), load(paths[0]).model)
    part = next(part for part in step.method.parts if isinstance(part, LayerSpecificDistillation))
    assert torch.equal(batch.labels, trained.labels)
    found = ours.of(batch)
    assert list(found) == ["stage3", "stage4", "pre_logits", "logits"]
    for tap, mask in found.items():
        assert torch.equal(mask, part.mask(trained, tap))


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_program_draws_and_measures(tmp_path, capsys, split):
    paths, out = checkpoints(tmp_path), tmp_path / "a b"
    words = ["--out", str(out), "--images", "3", "--measure", "6", "--split", split, "--device", "cpu"]
    assert masks.main([*map(str, paths), *words]) == 0
    with open(out / "masks.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["tap"] for row in table[::3]] == ["stage3", "stage4", "pre_logits", "logits"]
    assert {row["pixels of"] for row in table} == set(masks.KINDS)
    assert sum(int(row["number"]) for row in table[:3]) <= 6 * 32 * 32
    assert all(0 <= float(row["kept (%)"]) <= float(row["covered (%)"]) <= 100 for row in table if row["number"] != "0")
    assert (out / "masks.png").stat().st_size > 10_000 and "% covered" in capsys.readouterr().out
    with open(out / "pseudo_labels.csv", encoding="utf-8") as file:
        labels = list(csv.DictReader(file))
    assert [row["number"] for row in labels] == [row["number"] for row in table[:3]]
    shares = [[float(row[f"{outcome} (%)"]) for outcome in masks.OUTCOMES] for row in labels]
    assert all(sum(row) == pytest.approx(100, abs=0.03) for row in shares) and shares[1] == [100, 0, 0, 0]


def test_refusals(tmp_path, capsys):
    lskd, ft = checkpoints(tmp_path / "a"), checkpoints(tmp_path / "b", "FT")
    capsys.readouterr()
    for pair, said in (
        ((lskd[1], lskd[0]), "two successive steps of one task"),
        ((ft[0], ft[1]), "was trained without LSKD's masks"),
        ((lskd[0], tmp_path / "none.pth"), "none.pth"),
    ):
        assert masks.main([*map(str, pair), "--out", str(tmp_path / "out")]) == 2
        text = capsys.readouterr().err
        assert text.startswith("error: ") and said in text and text.count("\n") == 1
    assert masks.main([*map(str, lskd), "--images", "0"]) == 2 and "give at least 1" in capsys.readouterr().err
