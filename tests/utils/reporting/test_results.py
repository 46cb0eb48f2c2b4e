"""The CSV and the JSON of a run: rows replaced, nothing lost, nothing half-written."""

import json
import multiprocessing
import os
from argparse import Namespace

import pytest
import torch

from dataset.tasks import Task
from metrics.stream_metrics import StreamSegMetrics
from utils.checkpointing import checkpoint_files
from utils.errors import UserError
from utils.reporting import documents, results

NAMES = ["background", "cat", "dog", "cow", "horse"]
STEPS = ((0, 1, 2), (3,), (4,))
WEIGHTS = {"a": torch.tensor(4)}


def task(step):
    return Task("folder", "3-1", step, STEPS)


def options(folder, **changed):
    return Namespace(
        **{"results": str(folder), "date": "d", "name": "n", "method": "PLOP", "explicit": {"name"}} | changed
    )


def scores(step, right=4):
    """Every class seen so far has five pixels; so many of each are right, the rest called background."""
    classes = task(step).num_total
    metrics = StreamSegMetrics(classes)
    for label in range(classes):
        predictions = torch.tensor([label] * right + [0] * (5 - right))
        metrics.update(torch.full((5,), label), predictions)
    found = metrics.get_results()
    weights = checkpoint_files.digest({"a": torch.tensor(right)})
    return found | {"Confusion Matrix": metrics.confusion_matrix, "Weights": weights}


def origin(opts, step=0, checkpoint="checkpoints", trained_with=None):
    return results.origin(
        opts, f"{checkpoint}/{step}.pth", {"lr_of_step": 0.1, "threads": 1} if trained_with is None else trained_with
    )


def write(folder, step, right=4, origins={}, **changed):  # noqa: B006 (it is only read)
    """Record a test; so many of five pixels are right, which stands for the weights."""
    history = [{"epoch": 0, "losses": {"ce": 1.5}, "balance": {}}]
    opts = options(folder, **changed)
    found = scores(step, right) | {"Origin": origin(opts, step, **origins)}
    return results.write(opts, task(step), found, NAMES[: task(step).num_total], history)


def lines(folder):
    return [line.split(",") for line in (folder / "d_folder_3-1_n.csv").read_text().splitlines()]


def document(folder):
    return json.loads((folder / "d_folder_3-1_n.json").read_text())


def test_columns_by_hand(tmp_path):
    write(tmp_path, 0)
    write(tmp_path, 1)
    first, second = lines(tmp_path)
    # 4 of 5 pixels of classes 1 and 2 are right, the other two are called 0: 5 / 7 of 0 and 4 / 5 of the others
    assert first[0] == "0" and first[4:6] == ["x", "x"]
    assert [float(x) for x in first[1:4] + first[6:]] == pytest.approx([5 / 7, 0.8, 0.8, (5 / 7 + 1.6) / 3], abs=1e-5)
    assert second[0] == "1" and second[5] == "x"
    assert [float(x) for x in second[1:5] + second[6:]] == pytest.approx(
        [5 / 8, 0.8, 0.8, 0.8, (5 / 8 + 2.4) / 4], abs=1e-5
    )


def test_json_by_hand(tmp_path):
    write(tmp_path, 0)
    entry = write(tmp_path, 1)
    found = document(tmp_path)
    assert found["steps"]["1"] == entry
    assert found["unit"] == "percent"
    assert entry["old"] == pytest.approx(100 * (5 / 8 + 1.6) / 3, abs=1e-3)
    assert entry["new"] == pytest.approx(80, abs=1e-3)
    assert entry["all"] == pytest.approx(100 * (5 / 8 + 2.4) / 4, abs=1e-3)
    assert entry["average_over_steps"] == pytest.approx(50 * ((5 / 7 + 1.6) / 3 + (5 / 8 + 2.4) / 4), abs=1e-3)
    assert entry["class_iou"]["cow"] == entry["class_accuracy"]["cow"] == pytest.approx(80, abs=1e-3)
    assert entry["overall_accuracy"] == pytest.approx(100 * 17 / 20)
    assert found["average_over_steps"] == entry["average_over_steps"]
    assert found["steps"]["0"]["new"] is None
    assert list(entry["class_iou"]) == NAMES[:4]
    assert entry["confusion_matrix"] == [[5, 0, 0, 0], [1, 4, 0, 0], [1, 0, 4, 0], [1, 0, 0, 4]]
    assert entry["epochs"][0]["losses"] == {"ce": 1.5}
    assert found["class_order"] == [[0, 1, 2], [3], [4]]
    assert (found["dataset"], found["task"], found["name"], found["method"]) == ("folder", "3-1", "n", "PLOP")
    assert found["options"]["results"] == str(tmp_path) and "explicit" not in found["options"]
    assert set(found["versions"]) == {"python", "torch", "torchvision", "numpy", "cuda"}
    assert found["commit"] is None or len(found["commit"]) >= 12


def test_a_step_tested_again_replaces_its_row(tmp_path):
    for step in range(3):
        write(tmp_path, step)
    average = document(tmp_path)["average_over_steps"]
    before = lines(tmp_path)
    entry = write(tmp_path, 1, right=5)
    after = lines(tmp_path)
    assert [row[0] for row in after] == ["0", "1", "2"]
    assert (after[0], after[2]) == (before[0], before[2]) and after[1] != before[1]
    assert float(after[1][-1]) == pytest.approx(1, abs=1e-5)
    # the entry averages up to its own step, the document over all
    values = [document(tmp_path)["steps"][str(step)]["all"] for step in range(3)]
    assert entry["average_over_steps"] == pytest.approx(sum(values[:2]) / 2)
    assert document(tmp_path)["average_over_steps"] == pytest.approx(sum(values) / 3) != average


def refusal(action):
    with pytest.raises(UserError, match="choose another --name, --date or --results, or move the file") as caught:
        action()
    return str(caught.value)


@pytest.mark.parametrize(
    ("origins", "changed", "said"),
    [
        ({"checkpoint": "elsewhere"}, {}, "checkpoint was '"),
        ({"trained_with": {"lr_of_step": 0.2}}, {}, "lr_of_step was 0.1, is 0.2"),
        ({"trained_with": {"lr_of_step": 0.1, "momentum": 0.9}}, {}, "momentum was None, is 0.9"),
        ({}, {"crop_val": True}, "crop_val was None, is True"),
    ],
)
def test_the_test_of_another_run_is_not_replaced(tmp_path, origins, changed, said):
    """Four runs of the default name, each with a folder of checkpoints of its own, left one row."""
    for step in range(2):
        write(tmp_path, step)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    opts = options(tmp_path, **changed)
    text = refusal(lambda: results.check(opts, task(1), origin(opts, 1, **origins)))
    assert f"{tmp_path}/d_folder_3-1_n.json has the test of step 1 by another run" in text and said in text
    assert said in refusal(lambda: write(tmp_path, 1, right=5, origins=origins, **changed))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    results.check(opts, task(2), origin(opts, 2, **origins))  # a step that has no test yet


def test_the_test_of_the_same_run_is_replaced(tmp_path):
    """What does not change the numbers may change, such as the number of threads or the place of the data."""
    for changed in ({"data_root": "/a"}, {"data_root": "/b"}):
        opts = options(tmp_path, **changed)
        ours = origin(opts, trained_with={"lr_of_step": 0.1, "threads": 2})
        results.check(opts, task(0), ours)
        write(
            tmp_path,
            0,
            right=3 if changed["data_root"] == "/a" else 4,
            origins={"trained_with": {"lr_of_step": 0.1, "threads": 2}},
            **changed,
        )
    assert document(tmp_path)["steps"]["0"]["class_iou"]["cat"] == pytest.approx(80)
    # the same weights at another place, tested in the same way
    write(tmp_path, 0, origins={"checkpoint": "elsewhere"})


def test_a_test_of_an_earlier_version_is_replaced(tmp_path):
    write(tmp_path, 0)
    found = document(tmp_path)
    for key in ("checkpoint", "trained_with"):
        del found["steps"]["0"][key]
    (tmp_path / "d_folder_3-1_n.json").write_text(json.dumps(found))
    write(tmp_path, 0, right=5, origins={"checkpoint": "elsewhere"})


def test_rows_are_sorted_whatever_the_order(tmp_path):
    for step in (2, 0, 1):
        write(tmp_path, step)
    assert [row[0] for row in lines(tmp_path)] == ["0", "1", "2"]


def test_nothing_counted_has_no_mean(tmp_path):
    empty = StreamSegMetrics(3)
    found = empty.get_results() | {"Confusion Matrix": empty.confusion_matrix, "Weights": ""}
    found["Origin"] = origin(options(tmp_path))
    entry = results.write(options(tmp_path), task(0), found, NAMES[:3], [])
    assert entry["all"] is None and entry["average_over_steps"] is None
    assert lines(tmp_path) == [["0", *"xxxxx", "0.0"]]


def test_recorded_knows_the_weights(tmp_path):
    opts = options(tmp_path)
    assert not results.recorded(opts, task(0), WEIGHTS)
    write(tmp_path, 0)
    assert results.recorded(opts, task(0), WEIGHTS)
    assert not results.recorded(opts, task(1), WEIGHTS)
    assert not results.recorded(opts, task(0), {"a": torch.zeros(2)})  # trained again, not tested yet
    assert not results.recorded(options(tmp_path, name="other"), task(0), WEIGHTS)
    (tmp_path / "d_folder_3-1_n.csv").unlink()
    assert not results.recorded(opts, task(0), WEIGHTS)


def test_a_file_of_an_earlier_version_is_read_in_percent(tmp_path):
    """It held fractions and no unit."""
    write(tmp_path, 0)
    new = document(tmp_path)
    old = json.loads(json.dumps(new))
    del old["unit"]
    for key in documents.SCORES:
        value = old["steps"]["0"][key]
        if isinstance(value, dict):
            old["steps"]["0"][key] = {name: part / 100 for name, part in value.items()}
        elif value is not None:
            old["steps"]["0"][key] = value / 100
    old["steps"]["0"]["epochs"][0]["val_miou"] = 0.25
    path = tmp_path / "d_folder_3-1_n.json"
    path.write_text(json.dumps(old))
    found = documents.read(path)
    assert found["unit"] == "percent"
    for key in documents.SCORES:
        assert found["steps"]["0"][key] == pytest.approx(new["steps"]["0"][key]), key
    assert found["steps"]["0"]["epochs"] == [new["steps"]["0"]["epochs"][0] | {"validation_miou": 25.0}]
    write(tmp_path, 1)  # and continued in percent
    assert document(tmp_path)["steps"]["0"] == found["steps"]["0"]


def test_a_file_in_another_unit_is_refused(tmp_path):
    write(tmp_path, 0)
    path = tmp_path / "d_folder_3-1_n.json"
    path.write_text(json.dumps(document(tmp_path) | {"unit": "parts per million"}))
    with pytest.raises(ValueError, match="move it away"):
        documents.read(path)


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", "null", '{"steps": 3}', '{"steps": {"0": {}}}', '{"steps": {"0": {"all": "x"}}}', "\xff"),
        '{"steps": {}}',
        '{"steps": {}, "dataset": "folder", "task": "../3-1", "name": "n"}',
        '{"steps": {"a": {}}, "dataset": "folder", "task": "3-1", "name": "n"}',
        "[" * 100_000,
    ],
)
def test_a_json_of_others_is_refused_and_kept(tmp_path, text):
    path = tmp_path / "d_folder_3-1_n.json"
    path.write_text(text, encoding="latin-1")
    for action in (
        lambda: results.check(options(tmp_path), task(0), origin(options(tmp_path))),
        lambda: write(tmp_path, 0),
    ):
        with pytest.raises(ValueError, match="move it away") as caught:
            action()
        assert str(path) in str(caught.value)
    assert path.read_text(encoding="latin-1") == text
    assert not (tmp_path / "d_folder_3-1_n.csv").exists()


def test_lines_of_others_are_dropped_from_the_csv(tmp_path):
    (tmp_path / "d_folder_3-1_n.csv").write_bytes(b"step,a,b\n\n1,0.5,0.5,0.5,0.5,x,0.5\n\xff\xfe\n")
    results.check(options(tmp_path), task(0), origin(options(tmp_path)))
    write(tmp_path, 0)
    assert [row[0] for row in lines(tmp_path)] == ["0", "1"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch, call):
    write(tmp_path, 0)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 1)
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_commit_outside_a_checkout_is_none(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert results.commit() is None


def many(folder, step, start):
    torch.set_num_threads(1)
    start.wait(60)
    for _ in range(10):
        write(folder, step)


def test_runs_at_once_share_a_file(tmp_path):
    """Three processes write their step ten times each: every row is whole at every moment and all are there at the end."""
    context = multiprocessing.get_context("fork")
    start = context.Barrier(3)
    workers = [context.Process(target=many, args=(tmp_path, step, start)) for step in range(3)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        if (tmp_path / "d_folder_3-1_n.csv").exists():
            assert all(len(row) == 7 for row in lines(tmp_path))
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert [row[0] for row in lines(tmp_path)] == ["0", "1", "2"]
    assert sorted(document(tmp_path)["steps"]) == ["0", "1", "2"]
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".writing"]
