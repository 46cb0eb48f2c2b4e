"""dataset/tasks.py: the official tables, counts and label tables by hand, task files that are refused."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset import tasks
from tests.support.paths import FACTS

FACTS = json.loads((FACTS / "tasks.json").read_text())


def write(folder, content):
    path = folder / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize("dataset", FACTS)
def test_official_tables(dataset):
    assert tasks.names(dataset) == list(FACTS[dataset])
    for name, steps in FACTS[dataset].items():
        assert tasks.load(dataset, name, 0).steps == tuple(tuple(ids) for ids in steps.values())


def test_counts_of_15_5s():
    task = tasks.load("voc", "15-5s", 2)
    assert task.new == (17,)
    assert task.old == tuple(range(17))
    assert task.order == task.seen == task.label_ids == tuple(range(18))
    assert (task.num_new, task.num_old, task.num_total, task.last_step) == (1, 17, 18, 5)
    assert task.classes_per_step == [16, 1, 1]
    assert task.at(0).num_old == 0
    assert task.at(0).classes_per_step == [16]


def test_shapes_tasks():
    assert tasks.names("shapes") == ["offline", "6-4", "6-2", "6-1"]
    assert tasks.load("shapes", "6-2", 1).steps == (tuple(range(7)), (7, 8), (9, 10))
    assert tasks.load("shapes", "offline", 0).num_total == 11


def test_domain_task_keeps_its_19_labels():
    first, later = tasks.load("cityscapes_domain", "11-1", 0), tasks.load("cityscapes_domain", "11-1", 3)
    assert (first.num_old, first.num_new, first.num_total, first.classes_per_step) == (0, 19, 19, [19])
    assert (later.num_old, later.num_new, later.num_total, later.classes_per_step) == (19, 0, 19, [19])
    assert later.new == (13,)
    assert later.label_ids == tuple(range(19))
    table = later.label_table("current")
    assert table.tolist() == list(range(19)) + [255] * 237


@pytest.mark.parametrize(
    ("kind", "ignore_background", "expected"),
    # classes 0, 4, 2 | 3, 1 | 5 at step 1; 6 is in no step
    [
        ("current", False, [0, 4, 0, 3, 0, 0, 0, 255]),
        ("current", True, [255, 4, 255, 3, 255, 255, 255, 255]),
        ("current+old", False, [0, 4, 2, 3, 1, 0, 0, 255]),
        ("new", False, [0, 4, 255, 3, 255, 255, 255, 255]),
        ("new", True, [255, 4, 255, 3, 255, 255, 255, 255]),
        ("test", False, [0, 4, 2, 3, 1, 0, 0, 255]),
        ("test", True, [255, 4, 2, 3, 1, 255, 255, 255]),
    ],
)
def test_label_tables_by_hand(kind, ignore_background, expected):
    task = tasks.Task("voc", "mine", 1, ((0, 4, 2), (3, 1), (5,)))
    table = task.label_table(kind, ignore_background)
    assert table.dtype == np.uint8
    assert table.shape == (256,)
    assert table[[0, 1, 2, 3, 4, 5, 6, 255]].tolist() == expected


def test_data_masking_all_is_refused():
    with pytest.raises(ValueError, match="--data_masking 'all'"):
        tasks.load("voc", "15-5", 1).label_table("all")


@pytest.mark.parametrize("step", [2, -1, 100])
def test_unknown_step_names_the_steps(step):
    with pytest.raises(ValueError, match=f"no step {step}: its steps are 0 to 1"):
        tasks.load("voc", "15-5", step)


def test_unknown_task_names_the_tasks():
    with pytest.raises(ValueError, match=r"'7-7' is not a task of shapes: it has offline, 6-4, 6-2, 6-1"):
        tasks.load("shapes", "7-7", 0)


@pytest.mark.parametrize(
    "content",
    [
        {"name": "mine", "steps": {"0": [0, 8, 10, 12], "1": [13], "2": [17, 15]}},
        {"steps": {"0": [0, 8, 10, 12], "1": [13], "2": [17, 15]}},
        {"2": [17, 15], "1": [13], "0": [0, 8, 10, 12]},
        [[0, 8, 10, 12], [13], [17, 15]],
    ],
)
def test_task_file_forms(tmp_path, content):
    task = tasks.load("voc", None, 2, task_file=write(tmp_path, content))
    assert task.name == "mine"
    assert task.steps == ((0, 8, 10, 12), (13,), (17, 15))
    assert task.label_table("current")[[8, 13, 17, 15]].tolist() == [0, 0, 5, 6]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"0": [0, 1], "0": [0, 2]}', "key '0' appears twice"),
        ("3", "must be an object or a list"),
        ({}, "has no steps"),
        ({"steps": {"0": [0, 1]}, "order": 1}, "unknown key 'order'"),
        ({"0": [0, 1], "one": [2]}, "unknown key 'one'"),
        ({"0": [0, 1], "2": [2]}, "no step 1"),
        ([[0, 1], []], "step 1 is"),
        ([[0, 1], 5], "step 1 is 5"),
        ([[0, 21]], "class 21, the data set has the classes 0 to 20"),
        ([[0, -1]], "class -1"),
        ([[0, 1.0]], "class 1.0"),
        ([[0, True]], "class True"),
        ([[0, "cat"]], "class 'cat'"),
        ([[0, 1], [2, 1]], "class 1 is in step 0 and step 1"),
        ([[0, 1, 1]], "class 1 is in step 0 and step 0"),
        ([[1, 2], [3]], "background 0 must stand first"),
        ([[1, 0]], "background 0 must stand first"),
        ([[1], [0]], "background 0 must stand first"),
        ([[0], [1]], "only the background"),
        ({"name": "../x", "steps": [[0, 1]]}, "the name '../x'"),
        ({"name": 3, "steps": [[0, 1]]}, "the name 3"),
        ({"name": "15-5", "steps": [[0, 1]]}, "name of an official task"),
    ],
)
def test_task_file_refused(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(ValueError) as error:
        tasks.load("voc", None, 0, task_file=path)
    assert path in str(error.value)
    assert message in str(error.value)


def test_task_file_of_bytes_and_of_nothing(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not valid JSON"):
        tasks.load("voc", None, 0, task_file=str(tmp_path / "bytes"))
    (tmp_path / "huge").write_bytes(b"[" * ((1 << 20) + 1))
    with pytest.raises(ValueError, match="larger than 1 MiB"):
        tasks.load("voc", None, 0, task_file=str(tmp_path / "huge"))
    with pytest.raises(FileNotFoundError):
        tasks.load("voc", None, 0, task_file=str(tmp_path / "none"))


def test_domain_task_file_has_no_background(tmp_path):
    task = tasks.load("cityscapes_domain", None, 1, task_file=write(tmp_path, [[20, 3], [0]]))
    assert task.new == (0,)
    assert task.domain


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 30) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["0", "1", "steps", "x"]), inner),
    max_leaves=12,
)


@given(JSON)
def test_any_task_file_is_taken_or_refused(tmp_path_factory, content):
    path = write(tmp_path_factory.getbasetemp(), content)
    try:
        task = tasks.load("voc", None, 0, task_file=path)
    except ValueError as error:
        assert path in str(error)
    else:
        assert task.order[0] == 0
        assert len(set(task.at(task.last_step).order)) == sum(map(len, task.steps))
