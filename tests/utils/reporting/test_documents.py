"""The JSON of a run is checked where it is read: nothing that draws, lists or continues it meets a value that it does not expect."""

import json
import random

import pytest

from scripts import report
from tests.support import thin
from utils.checkpointing import checkpoint_files
from utils.errors import UserError
from utils.reporting import documents


def document():
    epochs = [{"epoch": 0, "losses": {"ce": 1.5, "md/stage3": 0.25}, "balance": {"lambda/ce": 1.0}, "validation_miou": 20.0},
              {"phase": "remodelling", "epoch": 0, "losses": {"ce": 1.0}, "balance": {}}]  # fmt: skip
    entry = {
        "old": 50.0, "new": 10.0, "all": 40.0, "harmonic_mean": None, "average_over_steps": None, "overall_accuracy": 80.0,
        "mean_accuracy": 70.0, "frequency_weighted_accuracy": 60.0, "class_iou": {"cat": 30.0, "cow": None},
        "class_accuracy": {"cat": 30.0, "cow": None}, "evaluation": {"crop_val": True}, "weights_sha256": "0" * 64,
        "confusion_matrix": [[1, 2], [3, 4]], "epochs": epochs,
    }  # fmt: skip
    return {
        "unit": "percent", "dataset": "shapes", "task": "6-2", "name": "n", "method": "PLOP", "class_order": [[0, 1], [2]],
        "base_classes": 2, "options": {"lr": [0.1], "pod_options": {"switch": {"after": {"factor": 1.0}}}}, "versions": {},
        "commit": None, "average_over_steps": 45.0, "steps": {"0": {**entry, "new": None}, "1": entry},
    }  # fmt: skip


def write(folder, found):
    path = folder / "d_shapes_6-2_n.json"
    path.write_text(json.dumps(found))
    return path


def deep(levels):
    inner = []
    for _ in range(levels):
        inner = [inner]
    return inner


#: Where a value is put, the value, and what the message says.
WRONG = [
    (("name",), None, "'name'"), (("name",), "$x^$", "'name'"), (("name",), ["n"], "'name'"), (("dataset",), "../x", "'dataset'"),
    (("task",), 3, "'task'"), (("class_order",), None, "'class_order'"), (("class_order",), [["a"]], "'class_order'"),
    (("class_order",), [[-1]], "'class_order'"),
    (("class_order",), [], "'class_order'"),
    (("class_order",), [[]], "'class_order'"),
    (("steps", "1", "confusion_matrix"), [], "'confusion_matrix'"), (("base_classes",), "2", "'base_classes'"),
    (("options",), [], "'options'"),
    (("unit",), "points", "'unit'"), (("method",), {}, "'method'"), (("average_over_steps",), "x", "'average_over_steps'"),
    (("steps",), [], "'steps'"), (("steps", "2"), [], "'2'"), (("steps", "01"), {}, "'01'"),
    (("steps", "10000"), {}, "'10000'"), (("steps", "-1"), {}, "'-1'"),
    (("steps", "²"), {}, "'²'"), (("steps", "9" * 5000), {}, "'9999"), (("steps", "1"), {}, "no 'old'"),
    (("steps", "1", "all"), "40", "step 1: 'all'"), (("steps", "1", "old"), True, "'old'"), (("steps", "1", "new"), [], "'new'"),
    (("steps", "1", "all"), float("nan"), "'all'"), (("steps", "1", "all"), 10**400, "plain values"),
    (("steps", "1", "all"), float("inf"), "'all'"),
    (("steps", "1", "class_iou"), {"a": "x"}, "'class_iou'"), (("steps", "1", "class_iou"), [1.0], "'class_iou'"),
    (("steps", "1", "confusion_matrix"), [[1], [2]], "'confusion_matrix'"),
    (("steps", "1", "confusion_matrix"), [[0.5]], "'confusion_matrix'"), (("steps", "1", "epochs"), {}, "'epochs'"),
    (("steps", "1", "epochs", 0), 3, "'epochs'"), (("steps", "1", "epochs", 0), {}, "'epochs'"),
    (("steps", "1", "epochs", 0, "losses"), None, "'epochs'"), (("steps", "1", "epochs", 0, "losses", "ce"), "x", "'epochs'"),
    (("steps", "1", "epochs", 0, "losses", "a" * 201), 1.0, "'epochs'"), (("steps", "1", "epochs", 0, "balance"), [], "'epochs'"),
    (("steps", "1", "epochs", 0, "phase"), [], "'epochs'"), (("steps", "1", "epochs", 0, "epoch"), None, "'epochs'"),
    (("steps", "1", "epochs", 0, "validation_miou"), {}, "'epochs'"), (("more",), deep(20), "plain values"),
    (("more",), deep(900), "plain values"), (("options", "x"), deep(20), "plain values"),
]  # fmt: skip


def changed(place, value):
    found = document()
    spot = found
    for key in place[:-1]:
        spot = spot[key]
    spot[place[-1]] = value
    return found


def test_the_document_without_changes_is_read(tmp_path, capsys):
    found = documents.read(write(tmp_path, document()))
    assert [found["steps"][step]["average_over_steps"] for step in "01"] == [40.0, 40.0]
    assert report.main([str(tmp_path / "d_shapes_6-2_n.json"), "--out", str(tmp_path / "out")]) == 0
    assert "16.67" in capsys.readouterr().out  # the harmonic mean


@pytest.mark.parametrize(("place", "value", "said"), WRONG)
def test_another_value_is_refused_with_its_place(tmp_path, place, value, said, capsys):
    path = write(tmp_path, changed(place, value))
    assert report.main([str(path), "--out", str(tmp_path / "out")]) == 2
    text = capsys.readouterr().err
    assert (
        text.startswith(f"error: results file {path} is not one that this program wrote (") and "move it away" in text
    )
    assert said in text and not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["name", "dataset", "task", "class_order", "steps"])
def test_a_document_without_a_part_is_refused(tmp_path, key):
    found = document()
    del found[key]
    with pytest.raises(UserError, match=f"no '{key}'"):
        documents.read(write(tmp_path, found))


def test_a_value_of_any_kind_at_any_place_is_refused_or_harmless(tmp_path, capsys):
    """500 documents with one value replaced, each read and drawn."""
    rng = random.Random(0)
    values = (
        None,
        True,
        0,
        -1,
        1e308,
        float("nan"),
        "",
        "x",
        "$",
        "\\",
        "\n",
        [],
        [[]],
        {},
        {"a": 1},
        [1],
        {"a": {"b": []}},
    )

    def places(found, before=()):
        parts = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
        for key, part in parts:
            yield (*before, key)
            yield from places(part, (*before, key))

    every = list(places(document()))
    for _ in range(500):
        path = write(tmp_path, changed(rng.choice(every), rng.choice(values)))
        try:
            documents.read(path)
        except UserError:
            continue
        if rng.random() < 0.1:  # drawing is slow
            assert report.main([str(path), "--out", str(tmp_path / "out")]) == 0


def test_a_file_beyond_measure_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LARGEST_FILE", 10)
    with pytest.raises(UserError, match="its size"):
        documents.read(write(tmp_path, document()))


@pytest.mark.parametrize(
    "history", [[{"epoch": 0}], [{"epoch": 0, "losses": {"ce": "x"}, "balance": {}}], [3], {"a": 1}]
)
def test_a_crafted_history_does_not_reach_the_results(tmp_path, history, capsys):
    with thin.program():
        assert thin.launch(tmp_path, "--task 6-2 --step 0 --method FT") == 0
        before = thin.document(tmp_path)
        path = tmp_path / "checkpoints" / "6-2-shapes_n_0.pth"
        checkpoint_files.save(path, checkpoint_files.load(path) | {"history": history})
        capsys.readouterr()
        assert thin.launch(tmp_path, "--task 6-2 --step 0 --method FT --test") == 2
    assert "does not say what it learned" in capsys.readouterr().err
    assert thin.document(tmp_path) == before
