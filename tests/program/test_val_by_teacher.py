"""--val_by_teacher and --no_test: a score of old and new classes from training images of the step alone, which changes no training."""

import re

import pytest
import torch

import dataset
from dataset.shapes import ShapesSource
from dataset.teacher_labels import TeacherLabelled
from metrics.stream_metrics import StreamSegMetrics
from scripts.predict import load
from tests.support import thin
from utils.checkpointing import checkpoint_files
from utils.pseudo import teacher_labels

HELD_OUT = "--task 6-2 --shapes_train 40 --crop_val"


pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture
def reads(monkeypatch):
    """(split, index) of every image that is read."""
    found, read = [], ShapesSource.read

    def recorded(source, index):
        found.append((source.split, index))
        return read(source, index)

    monkeypatch.setattr(ShapesSource, "read", recorded)
    return found


def launch(folder, text):
    assert thin.launch(folder, f"{HELD_OUT} {text}") == 0


def weights(folder, step):
    (path,) = (folder / "checkpoints").glob(f"*_{step}.pth")
    return checkpoint_files.load(path)["model_state"]


def test_labels_of_a_sure_teacher():
    """Background becomes the predicted class or is ignored; other labels stay."""
    labels = torch.tensor([[[0, 0, 0, 3, 255]]], dtype=torch.uint8)
    probabilities = torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.3, 0.2], [0.8, 0.1, 0.1], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    logits = (probabilities + 1e-9).log().T[None, :, None]  # 1×3×1×5
    assert teacher_labels(labels, logits, 0.75).tolist() == [[[1, 255, 0, 3, 255]]]
    assert teacher_labels(labels, logits, 0.5).tolist() == [[[1, 0, 0, 3, 255]]]


@pytest.mark.parametrize("method", ["FT", "PLOP"])
def test_no_test_image_and_no_image_of_another_step_is_read(tmp_path, reads, capsys, method):
    launch(tmp_path, "--step 0 --no_test")
    assert {split for split, _ in reads} == {"train", "val"}  # validation of step 0, without --cross_val
    reads.clear()
    launch(tmp_path, f"--step 1 --method {method} --cross_val --no_test --val_by_teacher 0.3")
    opts = thin.options(f"{HELD_OUT} --cross_val --no_test", 1)
    splits = dataset.build(opts, dataset.load_task(opts, 1))
    assert len(splits.test) == 0 and not set(splits.val.indices) & set(splits.train.indices)
    assert set(reads) <= {("train", int(index)) for index in (*splits.train.indices, *splits.val.indices)}
    assert {("train", int(index)) for index in splits.val.indices} <= set(reads)
    assert not list((tmp_path / "results").glob("*.json"))
    assert "step 1, old classes where the teacher is at least 0.3 sure" in capsys.readouterr().out
    assert weights(tmp_path, 1)


@pytest.mark.parametrize("method", ["FT", "PLOP"])
def test_the_training_is_that_without_them(tmp_path, method):
    """FT has no teacher by itself: building one for the validation must not move the random generator."""
    launch(tmp_path, "--step 0")
    for name, words in {"with": "--no_test --val_by_teacher 0.3", "without": ""}.items():
        ckpt = next((tmp_path / "checkpoints").glob("*_0.pth"))
        launch(tmp_path / name, f"--step 1 --step_ckpt '{ckpt}' --method {method} --cross_val {words}")
    mine, plain = weights(tmp_path / "with", 1), weights(tmp_path / "without", 1)
    assert checkpoint_files.digest(mine) == checkpoint_files.digest(plain)


def test_the_score_is_that_of_both_checkpoints(tmp_path, capsys):
    launch(tmp_path, "--step 0 --lr 0.1 --epochs 3 --no_test")
    capsys.readouterr()
    launch(tmp_path, "--step 1 --cross_val --no_test --val_by_teacher 0.3 --lr 0.1")
    line = next(line for line in capsys.readouterr().out.splitlines() if "validation mIoU" in line)
    said = r"mIoU ([\d.]+) %, old ([\d.]+), new ([\d.]+), old objects on ([\d.]+) % of the pixels \("
    all_, old, new, share = map(float, re.search(said, line).groups())
    teacher, student = (load(path).model for path in sorted((tmp_path / "checkpoints").glob("*_[01].pth")))
    opts = thin.options(f"{HELD_OUT} --cross_val --no_test", 1)
    task = dataset.load_task(opts, 1)
    metrics = StreamSegMetrics(task.num_total)
    val = dataset.build(opts, task).val
    batches = [(image[None], labels[None]) for image, labels in (val[i] for i in range(len(val)))]
    counted = torch.zeros(9, dtype=torch.int64)
    with torch.no_grad():
        for images, labels in TeacherLabelled(batches, teacher, 0.3):
            assert set(labels.unique().tolist()) <= {*range(9), 255}
            counted += torch.bincount(labels.flatten(), minlength=256)[:9]
            metrics.update(labels, student(images).logits.argmax(1))
    found = metrics.get_results()
    ious = found["Class IoU"]
    parts = [[ious[c] for c in classes if ious[c] is not None] for classes in (range(7), range(7, 9))]
    expected = [found["Mean IoU"], *(sum(part) / len(part) for part in parts)]
    assert [all_, old, new] == pytest.approx([100 * value for value in expected], abs=0.011)
    assert share == pytest.approx(100 * int(counted[1:7].sum()) / int(counted.sum()), abs=0.011)


def test_a_step_without_a_test_is_tested_later(tmp_path, capsys):
    launch(tmp_path, "--step 0 --no_test --resume")
    launch(tmp_path, "--step 0 --no_test --resume")
    assert "is finished" in capsys.readouterr().out
    launch(tmp_path, "--step 0 --resume")
    assert set(thin.document(tmp_path)["steps"]) == {"0"} and "epoch 1/1" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("--step 1 --val_by_teacher 0.5", "needs --cross_val"),
        ("--step 1 --cross_val --val_by_teacher 1.5", "--val_by_teacher 1.5 is out of range"),
        ("--step 0 --cross_val --val_by_teacher 0.5", "does nothing at step 0"),
        ("--step 0 --test --no_test", "--no_test and --test exclude each other"),
    ],
)
def test_refusals(tmp_path, capsys, text, said):
    assert thin.launch(tmp_path, f"{HELD_OUT} {text}") == 2
    assert said in capsys.readouterr().err
