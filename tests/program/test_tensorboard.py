"""The TensorBoard files of a run, read back: curves over iterations that continue over steps, curves over steps, options of the run."""

import pytest

import run
from tests.support import events, thin
from tests.support.interrupted import killed
from utils.checkpointing import checkpoint_files
from utils.errors import UserError
from utils.reporting.logger import Logger

STEPS = "--task 6-2 --print_interval 1"


pytestmark = pytest.mark.usefixtures("small")


def start(folder, text):
    """As `thin.launch`, with pictures: exit code."""
    return run.main([word for word in thin.words(folder, text) if word != "--visualize"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three steps, LSKD; the last two at once, with pictures."""
    folder = tmp_path_factory.mktemp("trained")
    with thin.program():
        assert start(folder, f"{STEPS} --step 0 --method LSKD --sample_num 2") == 0
        assert start(folder, f"{STEPS} --step 1 2 --method LSKD --sample_num 2") == 0
    return folder


def logs(folder):
    return folder / "logs" / "6-2-shapes" / "n"


def iterations(folder, step):
    """Of the steps before, and of the step, as its checkpoint says."""
    state = checkpoint_files.load(thin.checkpoint(folder, step))
    return state["iterations_before"], state["iterations"]


def over_steps(folder):
    """The curves over steps: name -> [(step, value)]."""
    return events.curves(logs(folder), "events*")


def test_every_term_by_name(trained):
    first, second = (events.scalars(logs(trained) / f"step-{step}") for step in (0, 1))
    assert {name for name, _ in first} >= {"loss/ce", "loss/total", "train/learning_rate"}
    assert first[("train/learning_rate", 1)] > first[("train/learning_rate", 5)] > 0
    names = {name for name, _ in second}
    assert names >= {
        "loss/mcd",
        "loss/kd",
        "loss/pod/stage1",
        "val/mIoU_training_labels",
        "val/accuracy_training_labels",
    }
    assert names >= {f"test/{key}" for key in ("old", "new", "all", "harmonic_mean", "average_over_steps")}
    entry = thin.document(trained)["steps"]["1"]
    assert next(v for (name, _), v in second.items() if name == "test/all") == pytest.approx(entry["all"])
    validated = next(v for (name, _), v in second.items() if name == "val/mIoU_training_labels")
    assert validated == pytest.approx(entry["epochs"][0]["validation_miou"])
    shown = {f"test/picture{number}" for number in range(4)}
    found = events.pictures(logs(trained) / "step-1")
    assert found.keys() == {"test/confusion", "test/sample0", "test/sample1"} | shown
    assert found["test/sample0"] == (32, 96)


def test_losses_and_tests_come_before_lambda(trained):
    """TensorBoard sorts the groups of curves by name."""
    names = {name for step in range(3) for name, _ in events.scalars(logs(trained) / f"step-{step}")} | set(
        over_steps(trained)
    )
    groups = sorted({name.split("/")[0] for name in names})
    assert groups == ["loss", "mIoU_by_step", "test", "test_class_IoU_by_step", "train", "val", "weights"]
    assert any(name.startswith("weights/lambda/") for name in names)


def test_the_abscissa_continues_over_steps(trained):
    before = 0
    for step in range(3):
        assert iterations(trained, step)[0] == before
        own = iterations(trained, step)[1]
        curves = events.curves(logs(trained) / f"step-{step}")
        assert [place for place, _ in curves["loss/ce"]] == list(range(before + 1, before + own + 1))
        assert [place for place, _ in curves["test/all"]] == [before + own]
        places = {e.step for e in events.read_events(logs(trained) / f"step-{step}") if e.summary.value}
        assert max(places) == before + own  # pictures too
        before += own


def test_curves_over_steps_are_those_of_the_results(trained):
    steps, curves = thin.document(trained)["steps"], over_steps(trained)
    for key in ("old", "new", "all"):
        expected = [(int(step), pytest.approx(entry[key])) for step, entry in steps.items() if entry[key] is not None]
        assert curves[f"mIoU_by_step/{key}"] == expected and len(expected) == 3 - (key == "new")
    for name in steps["2"]["class_iou"]:
        values = [(int(step), entry["class_iou"].get(name)) for step, entry in steps.items()]
        expected = [(step, pytest.approx(value)) for step, value in values if value is not None]
        assert curves.get(f"test_class_IoU_by_step/{name}", []) == expected


def test_options_are_hyperparameters(trained):
    found = events.hyperparameters(logs(trained))
    assert "step_ckpt" not in found, "a path is no hyperparameter"
    assert (found["method"], found["backbone"], found["batch_size"]) == ("LSKD", "resnet18", 2)
    assert found["lr"] == "[0.01]" and found["overlap"] is True
    assert not {"results", "name", "logdir", "data_root", "threads"} & found.keys()


def test_a_repeated_test_leaves_no_point_twice(tmp_path):
    """The test of an early step neither repeats nor removes the points of the later ones."""
    assert thin.launch(tmp_path, f"{STEPS} --step 0 1 --method FT") == 0
    before = over_steps(tmp_path)
    assert [step for step, _ in before["mIoU_by_step/all"]] == [0, 1]
    assert thin.launch(tmp_path, f"{STEPS} --step 0 --method FT --test") == 0
    assert over_steps(tmp_path) == before
    (place,) = {place for (name, place) in events.scalars(logs(tmp_path) / "step-1") if name == "test/all"}
    assert thin.launch(tmp_path, f"{STEPS} --step 1 --method FT --test") == 0
    assert {place for (name, place) in events.scalars(logs(tmp_path) / "step-1") if name == "test/all"} == {place}


@pytest.mark.parametrize("at", [1, 3])
def test_a_killed_later_step_leaves_whole_curves(tmp_path, at):
    """No point twice and none missing, at the abscissae after step 0."""
    text = f"{STEPS} --method MiB --epochs 2 --ckpt_minutes 0.000001"
    assert thin.launch(tmp_path / "calm", f"{text} --step 0 1") == 0
    assert thin.launch(tmp_path / "killed", f"{text} --step 0") == 0
    with killed(at):
        thin.launch(tmp_path / "killed", f"{text} --step 1")
    assert thin.launch(tmp_path / "killed", f"{text} --step 1 --resume") == 0
    calm, resumed = (events.curves(logs(tmp_path / name) / "step-1") for name in ("calm", "killed"))
    assert resumed == calm and len(calm["loss/ce"]) == iterations(tmp_path / "calm", 1)[1] == 4
    starts = [e.step for e in events.read_events(logs(tmp_path / "killed") / "step-1") if e.HasField("session_log")]
    assert starts == [0, iterations(tmp_path / "calm", 0)[1] + at]


def test_a_checkpoint_of_an_earlier_version_does_not_say_what_came_before(tmp_path):
    """The curves then begin after the step before, as far as is known."""
    assert thin.launch(tmp_path, f"{STEPS} --step 0 1 --method FT") == 0
    path = tmp_path / "checkpoints" / "6-2-shapes_n_1.pth"
    state = checkpoint_files.load(path)
    assert state.pop("iterations_before") > 0
    checkpoint_files.save(path, state)
    assert thin.launch(tmp_path, f"{STEPS} --step 2 --method FT") == 0
    curve = events.curves(logs(tmp_path) / "step-2")["loss/ce"]
    assert curve[0][0] == state["iterations"] + 1


def test_curves_over_steps_that_cannot_be_written_are_no_reason_to_end(tmp_path, monkeypatch, capsys):
    opened = Logger.open

    def fail_in_the_folder_of_the_run(log, folder, *words):
        if folder.name == "n":
            raise UserError(f"--logdir: {folder} cannot be written (No space left on device); name another folder")
        opened(log, folder, *words)

    monkeypatch.setattr(Logger, "open", fail_in_the_folder_of_the_run)
    assert thin.launch(tmp_path, f"{STEPS} --step 0 --method FT") == 0
    assert "note: no curves over steps: --logdir" in capsys.readouterr().out
    assert "0" in thin.document(tmp_path)["steps"] and not list(logs(tmp_path).glob("events*"))
