"""scripts/compare_methods.py: one step 0 for all that can share it, the table by hand, and a comparison from end to end."""

import json
import shlex

import pytest
import torch

import argparser
import methods
from dataset.sampler import FixedBatches
from scripts import compare_methods as compare
from tests.support import thin
from utils.checkpointing import checkpoint_files

TINY = shlex.split(
    "--dataset shapes --task 6-4 --overlap --backbone resnet18 --no_pretrained --crop_size 32 --batch_size 4 --shapes_train 12 "
    "--shapes_val 4 --num_workers 0 --device cpu --norm_act iabn --no_progress --threads 1 --lr 0.01"
)


def test_methods_share_step_0_unless_it_differs():
    arguments = compare.parse(["--methods", "FT", "--", *TINY])
    names = {
        name: compare.first_run(arguments, name)[0] for name in ("FT", "PLOP", "LSKD", "MiB", "EWC", "LWF-MC", "Joint")
    }
    assert names == {
        "FT": "base", "PLOP": "base", "LSKD": "base", "MiB": "base", "EWC": "EWC", "LWF-MC": "LWF-MC", "Joint": "Joint"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "shared"),
    [
        ("--lr 0.5", False),
        ("--lr 0.01 0.5", True),  # step 0's is the one of all
        ("--weight_decay 0", False),
        ("--momentum 0.5", False),
        ("--crop_size 48", False),
        ("--batch_size 2", False),
        ("--ppp 2", False),
        ("--ce_factor 1", True),  # the default
        ("--sample_weights_new 2", False),
        ("--ce_on_new", False),
        ("--epochs 7", False),
        ("--freeze", False),
        ("--fix_bn", False),
        ("--lr_policy step", False),
        ("--shapes_train 13", False),
        ("--backbone resnet34", False),
        ("--opt_level O1", False),
        ("--pooling 4", False),
        ("--no_mask", False),
        ("--reg_alpha 0.5", False),
        ("--pod_factor 0.5 --loss_kd 3 --unkd", True),
    ],
)
def test_an_option_that_changes_step_0_takes_a_step_0_of_its_own(words, shared):
    arguments = compare.parse(["--methods", "FT", "PLOP", "--only", f"PLOP={words}", "--", *TINY])
    assert compare.first_run(arguments, "PLOP")[0] == ("base" if shared else "PLOP")
    assert compare.first_run(arguments, "FT")[0] == "base"


def test_epochs_of_step_0_may_be_those_of_all():
    only = ["--only", "PLOP=--epochs 7", "--", *TINY]
    assert compare.first_run(compare.parse(["--epochs_step0", "3", *only]), "PLOP")[0] == "base"


def test_options_of_later_steps_do_not_change_step_0():
    """A step 0 trained with a value other than the default of each of them has the weights, and the importance, of one without."""

    def trained(changes):
        with thin.program():
            step = thin.Step("--regularizer rw --reg_iterations 1", steps=((0, 1, 2),))
            vars(step.opts).update(changes)
            step.method = methods.build(step.opts, step.task)
            step.method.attach(step.model, None)
            trainer, batches = (
                step.trainer(),
                [(thin.images(2, seed=seed), thin.bands(0, 1, 2, 255)) for seed in (0, 1)],
            )
            for images, labels in batches:
                trainer.train_iteration(images, labels)
            step.method.end_step(step.model, FixedBatches(batches), torch.device("cpu"))
            return checkpoint_files.digest([step.model.state_dict(), step.method.state_dict()])

    others = {
        "pseudo": "entropy", "pod": "local", "pod_options": {"switch": {"after": {"factor": 0.5}}}, "pod_prepro": "abs",
        "spp_scales": [1], "tap_schemes": ("md",) * 6, "mask_distance": "cos", "mask_rule": "whc",
    }  # fmt: skip
    plain = vars(argparser.parse([]))
    actions = {action.dest: action for action in argparser.build_parser()._actions}
    for dest in argparser.later_options() - set(others):  # switches, choices and numbers
        choices = [choice for choice in actions[dest].choices or () if choice != plain[dest]]
        others[dest] = (
            choices[0] if choices else not plain[dest] if actions[dest].nargs == 0 else (plain[dest] or 0) + 2
        )
    assert set(others) == argparser.later_options() and all(plain[dest] != value for dest, value in others.items())
    reference = trained({})
    # all at once, and those by themselves that another one would hide
    assert trained(others) == reference
    assert [
        dest
        for dest in ("focal_loss_new", "unce", "mask_rule", "pod", "pseudo")
        if trained({dest: others[dest]}) != reference
    ] == []
    assert trained({"ce_factor": 2.0}) != reference and trained({"reg_alpha": 0.5}) != reference


def test_words_for_one_method():
    arguments = compare.parse(["--only", "EWC=--reg_importance 10", "FT=--cosine --lr_old 0.1", "--", *TINY])
    assert compare.of_method(arguments, "EWC") == ["--method", "EWC", "--reg_importance", "10"]
    assert compare.of_method(arguments, "FT") == ["--method", "FT", "--cosine", "--lr_old", "0.1"]
    assert compare.of_method(arguments, "PLOP") == ["--method", "PLOP"]
    assert compare.first_run(arguments, "FT")[0] == "FT"  # a cosine classifier is one from step 0 on


def test_learning_rates_are_those_of_the_whole_task():
    """Steps 0 and later are two runs, but `--lr` means the places of all steps."""
    words = [*TINY, "--task", "6-2"]
    for given, expected in (
        (["0.5"], [[], []]),
        (["0.5", "0.25"], [["--lr", "0.5"], ["--lr", "0.25", "0.25"]]),
        (["0.5", "0.25", "0.125"], [["--lr", "0.5"], ["--lr", "0.25", "0.125"]]),
    ):
        arguments = compare.parse(["--", *words, "--lr", *given])
        assert [compare.rates(arguments, [], steps) for steps in ([0], [1, 2])] == expected
    assert compare.rates(arguments, ["--lr", "1", "2"], [1, 2]) == ["--lr", "2.0", "2.0"]


@pytest.mark.parametrize("text", ["EWC", "ewc=--lr 1", "=--lr 1"])
def test_words_for_no_method_are_refused(text, capsys):
    with pytest.raises(SystemExit) as stop:
        compare.parse(["--only", text])
    assert stop.value.code == 2 and "METHOD=WORDS" in capsys.readouterr().err


def test_a_comparison_from_end_to_end(tmp_path, capfd):
    words = ["--methods", "FT", "EWC", "--jobs", "2", "--out", str(tmp_path / "a b"), "--epochs_step0", "1"]
    words += ["--epochs_later", "1", "--only", "EWC=--reg_importance 3", "--", *TINY, "--lr", "0.01", "0.002"]
    assert compare.main(words) == 0
    out = tmp_path / "a b"
    assert "| FT " in (out / "table.md").read_text() and (out / "miou_by_step.png").stat().st_size > 1000
    stored = {path.stem: json.loads(path.read_text()) for path in (out / "results").glob("*.json")}
    assert sorted(stored) == [f"all_shapes_6-4_{name}-seed42" for name in ("EWC", "FT", "base")]
    assert sorted(stored["all_shapes_6-4_EWC-seed42"]["steps"]) == ["0", "1"]
    assert stored["all_shapes_6-4_EWC-seed42"]["options"]["reg_importance"] == 3
    rates = {name.split("_")[-1]: document["options"]["lr_of_step"] for name, document in stored.items()}
    assert rates == {"base-seed42": 0.01, "EWC-seed42": 0.002, "FT-seed42": 0.002}
    shared, later = (stored[f"all_shapes_6-4_{name}-seed42"]["steps"] for name in ("base", "FT"))
    assert later["0"] == shared["0"]
    assert later["1"]["average_over_steps"] == pytest.approx((later["0"]["all"] + later["1"]["all"]) / 2)
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    assert (out / "results" / "all_shapes_6-4_FT-seed42_pictures" / "3_step1.png").is_file()
    assert (out / "results" / "all_shapes_6-4_FT-seed42_pictures" / "3_step0.png").is_file()  # of the shared step 0
    assert f"| {later['1']['average_over_steps']:.1f} " in (out / "table.md").read_text()
    first = capfd.readouterr().out
    assert compare.main(words) == 0  # nothing is trained twice
    again = capfd.readouterr().out
    assert "is finished" in again and again[again.index("| method") :] == first[first.index("| method") :]


def test_a_failed_run_is_said(tmp_path, capfd):
    words = ["--methods", "FT", "--out", str(tmp_path), "--", *TINY, "--pooling", "-1"]
    assert compare.main(words) == 1
    said = capfd.readouterr().err
    assert "ended with exit code 2" in said and "--pooling" in said
