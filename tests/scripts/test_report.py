"""scripts/report.py: the table by hand, and figures of which none is lost."""

import json

import pytest
from matplotlib.image import imread

from scripts import report


def write(folder, name="n", task="6-2", scores=(50.0, 40.0), order=((0, 1), (2,)), stem=None, **changed):
    """The JSON of a run with two classes at step 0; `scores` is all by step."""
    steps = {
        str(step): {
            "old": score,
            "new": 10.0 if step else None,
            "all": score,
            "epochs": [{"epoch": 0, "losses": {"ce": 1.0 + step, "loss": 1.0 + step}, "balance": {}}],
        }
        for step, score in enumerate(scores)
        if score is not None
    }
    document = {
        "unit": "percent",
        "dataset": "shapes",
        "task": task,
        "name": name,
        "class_order": order,
        "steps": steps,
    }
    folder.mkdir(exist_ok=True)
    path = folder / f"{stem or f'd_shapes_{task}_{name}'}.json"
    path.write_text(json.dumps(document | changed))
    return path


@pytest.fixture
def drawn(monkeypatch):
    """By figure, the curves that are drawn."""
    found = {}
    draw = report.draw_steps

    def draw_steps(curves, path, title=""):
        found[path.name] = (title, {label: seeds[0] for label, seeds in curves.items()})
        draw(curves, path, title)

    monkeypatch.setattr(report, "draw_steps", draw_steps)
    return found


def go(folder, *paths):
    return report.main([*map(str, paths), "--out", str(folder / "out")])


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_the_table_by_hand(tmp_path, capsys, drawn):
    assert go(tmp_path, write(tmp_path)) == 0
    assert cells(capsys.readouterr().out) == [
        ["run", "task", "step", "old", "new", "all", "harmonic mean", "average over steps"],
        ["-" * width for width in (3, 10, 4, 5, 5, 5, 13, 18)],
        ["n", "shapes 6-2", "0", "50.00", "-", "50.00", "-", "50.00"],
        ["n", "shapes 6-2", "1", "40.00", "10.00", "40.00", "16.00", "45.00"],
    ]
    assert drawn == {"miou_by_step.png": ("shapes 6-2", {"n": {0: 50.0, 1: 40.0}})}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["d_shapes_6-2_n.png", "miou_by_step.png"]
    assert imread(tmp_path / "out" / "miou_by_step.png").std() > 0


def test_runs_of_one_name_are_told_apart(tmp_path, capsys, drawn):
    """Of another day, in another folder, and both."""
    paths = [
        write(tmp_path / "a", stem="monday"),
        write(tmp_path / "b", stem="monday", scores=(20.0, 10.0)),
        write(tmp_path / "b", stem="tuesday", scores=(30.0, 5.0)),
    ]
    assert go(tmp_path, *paths) == 0
    _, curves = drawn["miou_by_step.png"]
    assert curves == {
        f"{tmp_path}/a/monday": {0: 50, 1: 40},
        f"{tmp_path}/b/monday": {0: 20, 1: 10},
        "tuesday": {0: 30, 1: 5},
    }
    assert [row[0] for row in cells(capsys.readouterr().out)[2:]] == [label for label in curves for _ in range(2)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "miou_by_step.png", "monday-2.png", "monday.png", "tuesday.png"
    ]  # fmt: skip


def test_tasks_have_figures_of_their_own(tmp_path, drawn):
    other = ((0, 2), (1,))
    paths = [
        write(tmp_path),
        write(tmp_path, task="6-4"),
        write(tmp_path, name="m"),
        write(tmp_path, name="o", order=other),
    ]
    assert go(tmp_path, *paths) == 0
    assert {name: list(curves) for name, (_, curves) in drawn.items()} == {
        "miou_by_step_shapes_6-2.png": ["d_shapes_6-2_n", "m"],
        "miou_by_step_shapes_6-4.png": ["d_shapes_6-4_n"],
        "miou_by_step_shapes_6-2-2.png": ["o"],  # another order of classes
    }


def test_a_gap_is_refused(tmp_path, capsys):
    """Steps would be drawn at the wrong place, and averaged wrongly."""
    for scores, missing in (((None, 50.0, 40.0), 0), ((50.0, None, 40.0), 1)):
        path = write(tmp_path, scores=scores)
        assert go(tmp_path, write(tmp_path, name="complete"), path) == 2
        said = capsys.readouterr()
        assert said.out == "" and f"error: {path} has scores of the steps" in said.err
        assert f"step {missing} has not been tested" in said.err
    assert not (tmp_path / "out").exists()


def test_a_file_given_twice_is_refused(tmp_path, capsys):
    path = write(tmp_path)
    assert go(tmp_path, path, tmp_path / "x" / ".." / path.name) == 2
    assert "is given twice" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]", '{"steps": {}}'])
def test_other_files_are_refused(tmp_path, capsys, text):
    (tmp_path / "x.json").write_text(text)
    assert go(tmp_path, tmp_path / "x.json") == 2
    assert str(tmp_path / "x.json") in capsys.readouterr().err
    assert go(tmp_path, tmp_path / "none.json") == 2


def test_a_step_is_drawn_at_its_number(tmp_path, monkeypatch):
    """A seed that has fewer steps than another does not cut it short."""
    plotted = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.plot", lambda self, x, y, **_: plotted.append((list(x), list(y))) or [Line()]
    )
    report.draw_steps({"m": [{0: 60.0, 1: 40.0, 2: 30.0}, {0: 50.0, 1: None}]}, tmp_path / "x.png")
    assert plotted == [([0, 1, 2], [55.0, 40.0, 30.0])]


class Line:
    def get_color(self):
        return "C0"
