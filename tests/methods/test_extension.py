"""The examples of the README, a method and a data set in one file each, run through the real command line."""

import json

import pytest
import torch

import argparser
import dataset
import methods
import run
from scripts.studies import plan
from tests.examples.feature_norm import FeatureNorm
from tests.examples.pets import Pets
from tests.support import thin
from tests.support.command_lines import parse, refusal
from tests.support.tiny_folder import SHOWN, SHOWN_VAL, write_folder


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    """The one line that each example needs."""
    monkeypatch.setitem(methods.METHODS, "FeatureNorm", FeatureNorm)
    monkeypatch.setitem(dataset.DATASETS, "pets", Pets())
    with thin.program():
        yield


# ------------------------------------------------------------------------- a method


def test_a_method_in_one_file_trains_all_steps(tmp_path, capsys):
    assert thin.launch(tmp_path, "--method FeatureNorm --task 6-2 --step 0 1 2") == 0
    assert "--method FeatureNorm: loss_kd=10.0, unce=True, unkd=True, init_balanced=True, norm_factor=0.1" in (
        capsys.readouterr().out
    )
    assert [row[0] for row in thin.rows(tmp_path)] == ["0", "1", "2"]
    losses = [step["epochs"][0]["losses"] for step in thin.document(tmp_path)["steps"].values()]
    assert [set(loss) for loss in losses] == [{"ce", "loss"}, *[{"ce", "kd", "norm", "loss"}] * 2]
    assert all(loss["norm"] > 0 for loss in losses[1:])


def test_its_term_by_hand():
    images, labels = thin.images(2), thin.bands(0, 4, 5)
    step = thin.Step("--method FeatureNorm --norm_factor 2")
    batch = step.batch(images, labels)
    terms = step.method.terms(batch)
    lengths = [taps.pre_logits.square().sum(1).sqrt() for taps in (batch.student, batch.teacher)]
    torch.testing.assert_close(terms["norm"], 2 * (lengths[0] - lengths[1]).pow(2).mean())
    relative = thin.Step("--method FeatureNorm --norm_factor 2 --norm_relative")
    expected = 2 * (lengths[0] / lengths[1] - 1).pow(2).mean()
    torch.testing.assert_close(relative.method.terms(relative.batch(images, labels))["norm"], expected)
    plain = thin.Step("--method MiB")
    assert {name: terms[name] for name in ("ce", "kd")} == plain.method.terms(plain.batch(images, labels))


def test_it_is_listed_and_its_option_explained(capsys):
    assert run.main(["--list_methods"]) == 0
    assert "FeatureNorm you, A method in one file 2026; loss_kd=10.0" in capsys.readouterr().out
    text = argparser.build_parser().format_help()
    assert "length of features (FeatureNorm):\n  --norm_factor NORM_FACTOR" in text


def test_the_rules_of_its_options_are_enforced_from_its_file_alone(capsys, tmp_path):
    assert "--norm_factor -1 is out of range; give a value from 0 to 1000000" in refusal("--norm_factor -1")
    assert "--norm_factor nan is out of range" in refusal("--norm_factor nan")
    message = refusal("--method FeatureNorm --cosine")
    assert message.startswith("--norm_factor 0.1 and --cosine") and "exclude each other" in message
    assert thin.launch(tmp_path, "--norm_factor 1e7") == 2
    assert "error: --norm_factor 10000000" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_its_options_are_said_to_do_nothing_and_shared_at_step_0(tmp_path):
    note = "--norm_relative does nothing here: it needs --norm_factor above 0"
    assert note in argparser.notes(parse("--norm_relative"))
    assert note not in argparser.notes(parse("--norm_relative --norm_factor 1"))
    assert {"norm_factor", "norm_relative"} <= argparser.later_options()
    path = tmp_path / "study.json"
    options = {"dataset": "shapes", "task": "6-2", "overlap": True, "no_pretrained": True}
    path.write_text(json.dumps({"options": options, "methods": {"MiB": {}, "FeatureNorm": {}}}))
    assert len(plan.Plan(plan.read(path), "", tmp_path).first) == 1


# ----------------------------------------------------------------------- a data set


@pytest.fixture
def root(tmp_path):
    """The tiny data set under the name of the example, with its two tables."""
    (tmp_path / "pets").mkdir()
    folder = write_folder(tmp_path / "pets")
    for split, shown in (("train", SHOWN), ("val", SHOWN_VAL)):
        lines = [f"images/{split}{number}.png,masks/{split}{number}.png" for number in range(len(shown))]
        (folder / f"{split}.csv").write_text("\n".join(lines))
    return tmp_path


def words(root):
    return f"--dataset pets --data_root '{root}' --task_file '{root}/pets/task.json' --batch_size 1"


def test_a_data_set_in_one_file_trains_all_steps(root, tmp_path):
    assert thin.launch(tmp_path, f"{words(root)} --step 0 1 2") == 0
    assert [row[0] for row in thin.rows(tmp_path)] == ["0", "1", "2"]
    steps = thin.document(tmp_path)["steps"]
    assert list(steps["2"]["class_iou"]) == ["background", "dog", "cat", "horse", "cow"]  # in the order of learning


def test_its_files_are_checked_like_those_of_any(root, tmp_path, capsys):
    assert thin.launch(tmp_path, f"{words(root)} --check_data") == 0
    (root / "pets" / "val.csv").write_text("images/val0.png,../secret.png")
    assert thin.launch(tmp_path, words(root)) == 2
    error = capsys.readouterr().err
    assert "val.csv" in error and "'..' is not allowed" in error
    (root / "pets" / "val.csv").write_text("images/val0.png")  # no mask
    assert thin.launch(tmp_path, words(root)) == 2
    assert "mask" in capsys.readouterr().err
    (root / "pets" / "val.csv").unlink()
    assert thin.launch(tmp_path, words(root)) == 2
    assert Pets.hint in capsys.readouterr().err
