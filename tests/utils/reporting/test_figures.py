"""The figures of a study with variants."""

import itertools
from pathlib import Path

import pytest

from utils.reporting import figures
from utils.reporting.runs import Group, Run, TaskRuns


def runs_of(task, scores):
    """The runs of a variant: by method, mIoU of step 0 and after the last step, one pair a seed."""
    groups = [
        Group(label, tuple(Run(Path(label), label, {"steps": {"0": {"all": a}, "1": {"all": b}}}) for a, b in seeds))
        for label, seeds in scores.items()
    ]
    return TaskRuns("shapes", task, 7, tuple(groups))


def test_a_figure_over_the_score_of_step_0():
    """A line for each method and task, in the order of step 0, of means over seeds."""
    tasks = {
        "8 epochs": runs_of("6-2", {"MiB": [(80, 60), (70, 50)], "LSKD": [(80, 55)]}),
        "1 epoch": runs_of("6-2", {"MiB": [(40, 30)], "LSKD": [(40, 20)]}),
        "8 base": runs_of("8-2", {"MiB": [(60, 45)], "LSKD": [(60, 50)]}),
    }
    axes = figures.draw_ripeness(tasks).axes[0]
    lines = [list(zip(*line.get_data())) for line in axes.lines]
    assert lines == [[(40, 30), (75, 55)], [(40, 20), (80, 55)], [(60, 45)], [(60, 50)]]
    colours, marks = [line.get_color() for line in axes.lines], [line.get_marker() for line in axes.lines]
    assert colours[:2] == colours[2:] and colours[0] != colours[1]
    assert marks[0] == marks[1] != marks[2] == marks[3]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["6-2", "8-2"]
    assert {text.get_text() for text in axes.texts} == {"MiB", "LSKD"}


@pytest.mark.parametrize(
    "names",
    [
        ["with old objects", "without", "with old objects, lr 0.01", "without, lr 0.01"],
        ["horse, sheep, person", "person, horse, sheep"],
        ["300 scenes, 4 epochs", *(f"{epochs} epochs" for epochs in (1, 2, 4, 8)), "2 base classes", "8 base classes"],
    ],
)
def test_names_of_variants_do_not_cover_each_other(names):
    figure = figures.draw_variants({name: runs_of("6-2", {"MiB": [(60, 45)]}) for name in names})
    figure.canvas.draw()
    ticks = figure.axes[0].get_xticklabels()
    assert [tick.get_text().replace("\n", " ") for tick in ticks] == names
    boxes = [tick.get_window_extent() for tick in ticks]
    assert min(box.x0 for box in boxes) >= 0 and min(box.y0 for box in boxes) >= 0
    if len(names) < 5:  # rotated names have boxes that overlap where the names do not
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
