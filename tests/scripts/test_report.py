"""scripts/report.py: the table by hand, files of which none is lost, and a page that needs nothing from elsewhere."""

import itertools
import json
import re

import numpy as np
import pytest
from matplotlib.image import imread

from scripts import report
from utils.reporting import figures, page, pictures, runs
from utils.reporting.pictures import Legend, Sample
from utils.reporting.visualize import colour_map


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


def go(folder, *paths):
    return report.main([*map(str, paths), "--out", str(folder / "out")])


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_the_table_by_hand(tmp_path, capsys):
    assert go(tmp_path, write(tmp_path)) == 0
    assert cells(capsys.readouterr().out) == [
        ["run", "task", "step", "old", "new", "all", "harmonic mean", "average over steps"],
        ["-" * width for width in (3, 10, 4, 5, 5, 5, 13, 18)],
        ["n", "shapes 6-2", "0", "50.00", "-", "50.00", "-", "50.00"],
        ["n", "shapes 6-2", "1", "40.00", "10.00", "40.00", "16.00", "45.00"],
    ]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]


def test_files_on_request(tmp_path):
    assert report.main([str(write(tmp_path)), "--out", str(tmp_path / "out"), "--formats", *report.FORMATS]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "report.html", "miou_by_step.png", "d_shapes_6-2_n.png",
        *(f"{stem}.{suffix}" for stem in ("summary_shapes_6-2", "steps") for suffix in ("md", "tex", "csv")),
    }  # fmt: skip
    assert imread(tmp_path / "out" / "miou_by_step.png").std() > 0
    assert (tmp_path / "out" / "summary_shapes_6-2.csv").read_text().splitlines() == [
        "method,seeds,old,new,all,average over steps,harmonic mean",
        "n,1,40.0,10.0,40.0,45.0,16.0",
    ]


def test_runs_of_one_name_are_told_apart(tmp_path, capsys):
    """Of another day, in another folder, and both."""
    paths = [
        write(tmp_path / "a", stem="monday"),
        write(tmp_path / "b", stem="monday", scores=(20.0, 10.0)),
        write(tmp_path / "b", stem="tuesday", scores=(30.0, 5.0)),
    ]
    assert report.main([*map(str, paths), "--out", str(tmp_path / "out"), "--formats", "png"]) == 0
    labels = [f"{tmp_path}/a/monday", f"{tmp_path}/b/monday", "tuesday"]
    assert [row[0] for row in cells(capsys.readouterr().out)[2:]] == [label for label in labels for _ in range(2)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "miou_by_step.png", "monday-2.png", "monday.png", "report.html", "tuesday.png"
    ]  # fmt: skip
    (task,) = runs.by_task(runs.read(paths))
    assert [group.label for group in task.groups] == labels


def test_tasks_are_not_mixed(tmp_path):
    other = ((0, 2), (1,))
    paths = [
        write(tmp_path),
        write(tmp_path, task="6-4"),
        write(tmp_path, name="m"),
        write(tmp_path, name="o", order=other),
    ]
    tasks = runs.by_task(runs.read(paths))
    assert [[group.label for group in task.groups] for task in tasks] == [
        ["d_shapes_6-2_n", "m"],
        ["d_shapes_6-4_n"],
        ["o"],  # another order of classes
    ]
    assert report.main([*map(str, paths), "--out", str(tmp_path / "out"), "--formats", "png"]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir() if path.name.startswith("miou")}
    assert names == {f"miou_by_step_shapes_{name}.png" for name in ("6-2", "6-4", "6-2-2")}


def test_seeds_of_a_method_are_one_row(tmp_path):
    """Two seeds of one method, one run with another option, and the same method under another name."""
    paths = [
        write(
            tmp_path, name=f"FT-seed{seed}", method="FT", scores=(60.0, all_), options={"random_seed": seed, "lr": [1]}
        )
        for seed, all_ in ((1, 40.0), (2, 50.0))
    ]
    paths.append(write(tmp_path, name="slow", method="FT", options={"random_seed": 1, "lr": [0.5]}))
    paths.append(write(tmp_path, name="LSKD-seed1", method="LSKD", options={"random_seed": 1, "lr": [1]}))
    (task,) = runs.by_task(runs.read(paths))
    assert [(group.label, len(group.runs)) for group in task.groups] == [("FT", 2), ("slow", 1), ("LSKD", 1)]
    rows = page.summary_table(task).rows
    assert rows[0] == ["FT", "2", "45.0 ± 7.1", "10.0 ± 0.0", "45.0 ± 7.1", "52.5 ± 3.5", "16.3 ± 0.5"]


def test_one_step_with_all_classes_is_the_reference(tmp_path):
    """Joint has no steps; its old and new are those of the task that it stands beside."""
    ious = {"background": 90.0, "disk": 30.0, "square": 60.0}
    run = write(tmp_path, base_classes=2)
    document = json.loads(run.read_text())
    document["steps"]["1"]["class_iou"] = dict.fromkeys(ious, 40.0)
    run.write_text(json.dumps(document))
    joint = write(tmp_path, name="Joint", task="offline", scores=(60.0,), order=((0, 1, 2),), base_classes=3)
    document = json.loads(joint.read_text())
    document["steps"]["0"]["class_iou"] = ious
    joint.write_text(json.dumps(document))
    (task,) = runs.by_task(runs.read([joint, run]))
    assert page.summary_table(task).rows[-1] == ["Joint (one step)", "1", "60.0", "60.0", "60.0", "-", "-"]
    assert len(figures.draw_steps(task).axes[0].get_lines()) == 2


def test_the_articles_rows_stand_beside_runs_of_its_task_alone(tmp_path):
    order = [list(range(16)), *([label] for label in range(16, 21))]
    voc = {"dataset": "voc", "task": "15-5s", "order": order, "options": {"overlap": True}}
    (task,) = runs.by_task(runs.read([write(tmp_path / "a", **voc)]))
    rows = {row[0]: row for row in page.summary_table(task).rows}
    assert rows["LSKD (article)"] == ["LSKD (article)", "-", "72.8", "34.5", "63.7", "-", "-"]
    for changed in (
        {"dataset": "shapes"},
        {"order": order[::-1]},
        {"options": {"overlap": False}},
        {"options": {"overlap": True, "exclude_old": True}},
    ):
        (task,) = runs.by_task(runs.read([write(tmp_path / "b", **voc | changed)]))
        assert page.summary_table(task).rows[-1][:4] != rows["LSKD (article)"][:4]


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    path = write(tmp_path, name="n", scores=(60.0, 40.0))
    samples = [Sample(np.full((6, 8, 3), 200, np.uint8), np.ones((6, 8), np.uint8), np.zeros((6, 8), np.uint8))]
    legend = Legend.of_task(["background", "a <disk>", "heptagon"], (0, 5, 7), colour_map())
    for step in (0, 1):
        pictures.write(pictures.folder_of(path), step, samples, legend)
    assert go(tmp_path, path) == 0
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 4  # image, truth, two predictions
    assert "a &lt;disk&gt;" in text and "<disk>" not in text
    assert "heptagon" not in text  # a class that no picture shows has no place in the legend
    assert not re.search(r"""(src|href)=["'](?!data:|#)|@import|url\((?!#)""", text)
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert "var(--ink)" in text and "prefers-color-scheme: dark" in text


def test_a_folder_stands_for_its_results(tmp_path, capsys):
    write(tmp_path / "results")
    assert go(tmp_path, tmp_path) == 0
    (tmp_path / "empty").mkdir()
    assert go(tmp_path, tmp_path / "empty") == 2
    assert "empty holds no JSON file" in capsys.readouterr().err
    assert go(tmp_path, tmp_path / "nowhere") == 2
    assert "nowhere does not exist" in capsys.readouterr().err


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
    assert go(tmp_path, path, tmp_path / ".." / tmp_path.name / path.name) == 2
    assert "is given twice" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]", '{"steps": {}}'])
def test_other_files_are_refused(tmp_path, capsys, text):
    (tmp_path / "x.json").write_text(text)
    assert go(tmp_path, tmp_path / "x.json") == 2
    assert str(tmp_path / "x.json") in capsys.readouterr().err
    assert go(tmp_path, tmp_path / "none.json") == 2


def test_names_of_many_curves_stand_beside_the_axes_and_do_not_overlap(tmp_path):
    paths = [
        write(tmp_path, name=f"m{i}-seed1", scores=(60.0, 40.0 + i / 100), options={"lr": [i]}, method=f"m{i}")
        for i in range(25)
    ]
    (task,) = runs.by_task(runs.read(paths))
    figure = figures.draw_steps(task)
    figure.canvas.draw()
    boxes = sorted((text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert len(boxes) == 25 and boxes[0].y0 >= 0 and boxes[-1].y1 <= figure.bbox.height
    assert all(upper.y0 > lower.y0 + 0.7 * lower.height for lower, upper in itertools.pairwise(boxes))
    assert boxes[0].y0 >= figure.axes[0].get_window_extent().y0 - boxes[0].height


def test_a_step_is_drawn_at_its_number(tmp_path):
    """A seed that has fewer steps than another does not cut it short."""
    options = {"lr": [1]}
    paths = [
        write(tmp_path, name="m-seed1", scores=(60.0, 40.0, 30.0), options=options, method="m"),
        write(tmp_path, name="m-seed2", scores=(50.0,), options=options, method="m"),
    ]
    (task,) = runs.by_task(runs.read(paths))
    (line,) = figures.draw_steps(task).axes[0].get_lines()
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 1, 2], [55.0, 40.0, 30.0])


def test_losses_by_epoch(tmp_path):
    """A term alone is not drawn twice, λ has the colour of its term, and no line joins two steps."""
    path = write(tmp_path)
    document = json.loads(path.read_text())
    document["steps"]["0"]["epochs"] = [{"epoch": e, "losses": {"ce": 1.0, "loss": 1.0}, "balance": {}} for e in (0, 1)]
    losses = {"ce": 0.5, "kd": 2.0, "loss": 2.5}
    document["steps"]["1"]["epochs"] = [{"epoch": 0, "losses": losses, "balance": {"lambda/kd": 0.9, "G/kd": 3.0}}]
    path.write_text(json.dumps(document))
    (run,) = runs.read([path])
    styles = figures.term_styles([run])
    figure = figures.draw_history(run, styles)
    upper, lower = figure.axes
    curves = {line.get_label(): line for line in upper.get_lines()}
    assert list(curves["ce"].get_ydata())[:2] == [1.0, 1.0] and np.isnan(curves["ce"].get_ydata()[2])
    assert [value for value in curves["loss"].get_ydata() if value == value] == [2.5]  # not in step 0, where ce is all
    weight = next(line for line in lower.get_lines() if line.get_label() == "kd")
    assert weight.get_color() == curves["kd"].get_color() == styles["kd"]["color"]
    assert upper.get_shared_x_axes().joined(upper, lower)
