"""Runs that start from the step 0 of another run: their results are complete all the same, and their numbers are the same."""

import json
import shutil

import pytest

from scripts import average_csv
from tests.support import thin
from utils.checkpointing import checkpoint_files

pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A step 0 for others, and both steps under one name."""
    folder = tmp_path_factory.mktemp("trained")
    with thin.program():
        assert thin.launch(folder, "--task 6-2 --step 0 --name base") == 0
        assert thin.launch(folder, "--task 6-2 --step 0 1 --name whole --method PLOP") == 0
    return folder


def go_on(folder, checkpoint, more=""):
    return thin.launch(folder, f"--task 6-2 --step 1 --name later --method PLOP --step_ckpt '{checkpoint}' {more}")


def results(folder, name="later", date="d"):
    """Steps of the JSON without what says where they are from, and rows of the CSV."""
    path = folder / "results" / f"{date}_shapes_6-2_{name}.json"
    steps = json.loads(path.read_text())["steps"]
    for entry in steps.values():
        assert entry.pop("checkpoint").endswith(".pth") and entry.pop("trained_with")["backbone"] == "resnet18"
    return steps, path.with_suffix(".csv").read_text().splitlines()


def weights(folder, name, step):
    return checkpoint_files.load(folder / "checkpoints" / f"6-2-shapes_{name}_{step}.pth")["model_state"]


def test_the_scores_of_a_shared_step_0_are_copied(copy, capsys):
    assert go_on(copy, copy / "checkpoints" / "6-2-shapes_base_0.pth") == 0
    assert "it is tested as step 0" not in capsys.readouterr().out
    (steps, rows), (whole, whole_rows) = results(copy), results(copy, "whole")
    assert steps["0"] == results(copy, "base")[0]["0"] == whole["0"]
    assert steps["1"] == whole["1"] and rows == whole_rows
    assert steps["1"]["average_over_steps"] == pytest.approx((steps["0"]["all"] + steps["1"]["all"]) / 2)
    # and the summary of the CSV is that of the JSON
    step, summary = average_csv.last_summary(copy / "results" / "d_shapes_6-2_later.csv")
    assert step == 1
    for key, value in summary._asdict().items():
        assert steps["1"][key] == pytest.approx(100 * value), key


def test_a_checkpoint_without_results_is_tested_and_the_training_is_the_same(copy, tmp_path, capsys):
    """The file was moved to another machine; testing it must not change what is learned."""
    base = shutil.move(copy / "checkpoints" / "6-2-shapes_base_0.pth", tmp_path / "moved.pth")
    assert go_on(tmp_path, base, "--random_seed 42") == 0
    assert f"the scores of {base} are not in {tmp_path}/results: it is tested as step 0" in capsys.readouterr().out
    (steps, rows), (whole, whole_rows) = results(tmp_path), results(copy, "whole")
    assert (steps, rows) == (whole, whole_rows)
    mine, theirs = weights(tmp_path, "later", 1), weights(copy, "whole", 1)
    assert all(mine[name].equal(theirs[name]) for name in theirs)


@pytest.mark.parametrize("case", ["other weights", "other test", "damaged"])
def test_scores_that_are_not_those_of_the_checkpoint_are_not_copied(case, copy, trained, capsys):
    path = copy / "results" / "d_shapes_6-2_base.json"
    if case == "other weights":
        shutil.rmtree(copy / "results")
        assert thin.launch(copy, f"--task 6-2 --step 0 --name base --lr 0.5 --checkpoint '{copy}/elsewhere'") == 0
    elif case == "damaged":
        path.write_text("{")
    words = "--ignore_test_bg" if case == "other test" else ""
    capsys.readouterr()
    assert go_on(copy, copy / "checkpoints" / "6-2-shapes_base_0.pth", words) == 0
    assert "it is tested as step 0" in capsys.readouterr().out
    steps, _ = results(copy)
    assert sorted(steps) == ["0", "1"]
    assert (steps["0"]["all"] == results(trained, "whole")[0]["0"]["all"]) == (case != "other test")


def test_scores_under_another_date_are_copied(copy):
    """A schedule that is started again on another day."""
    assert thin.launch(copy, "--task 6-2 --step 1 --name whole --method PLOP --date e") == 0
    assert results(copy, "whole", "e")[1] == results(copy, "whole", "d")[1]


def test_a_step_without_scores_leaves_the_average_open(copy, capsys):
    """--step_ckpt of step 1 tells nothing of step 0."""
    lost = shutil.move(copy / "results", copy / "lost")
    checkpoint = copy / "checkpoints" / "6-2-shapes_whole_1.pth"
    words = f"--task 6-2 --step 2 --name later --method PLOP --step_ckpt '{checkpoint}'"
    assert thin.launch(copy, words) == 0
    assert lost and "average over steps - (" in (said := capsys.readouterr().out)
    assert "note: no average over steps: step 0 has not been tested; add it with run.py --test --step 0 --ckpt" in said
    steps, _ = results(copy)
    assert sorted(steps) == ["1", "2"] and steps["2"]["average_over_steps"] is None
    assert average_csv.main([str(copy / "results" / "d_shapes_6-2_later.csv")]) == 2
    first = copy / "checkpoints" / "6-2-shapes_whole_0.pth"
    assert thin.launch(copy, f"--task 6-2 --test --step 0 --name later --ckpt '{first}'") == 0  # the remedy
    steps, _ = results(copy)
    assert steps["2"]["average_over_steps"] == pytest.approx(sum(steps[step]["all"] for step in "012") / 3)


def test_the_results_of_another_order_of_classes_are_not_mixed_in(copy, tmp_path, capsys):
    """Two task files may have the same name."""
    for number, steps in enumerate(([[0, 1, 2], [3]], [[0, 1, 3], [2]])):
        task = tmp_path / f"{number}" / "task.json"
        task.parent.mkdir()
        task.write_text(json.dumps({"name": "mine", "steps": steps}))
        code = thin.launch(copy, f"--task_file '{task}' --step 0 --checkpoint '{tmp_path}/{number}'")
        assert code == 2 * number
    said = capsys.readouterr().err
    assert (
        "d_shapes_mine_n.json holds the results of another order of classes, [[0, 1, 2], [3]]; choose another --name"
        in said
    )
