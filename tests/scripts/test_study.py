"""scripts/study.py: one step 0 for all that can share it, what the file of a study may say, and a study from end to end."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml

import argparser
import methods
from dataset.sampler import FixedBatches
from scripts import study
from scripts.studies import execute, plan
from tests.support import thin
from tests.support.paths import ROOT
from utils.checkpointing import checkpoint_files

TINY = {
    "dataset": "shapes", "task": "6-4", "overlap": True, "backbone": "resnet18", "no_pretrained": True, "crop_size": 32, "batch_size": 4,
    "shapes_train": 12, "shapes_val": 4, "num_workers": 0, "device": "cpu", "norm_act": "iabn", "threads": 1, "lr": [0.01],
}  # fmt: skip


def write(folder, **entries):
    """The file of a study with two rows."""
    path = folder / "a study.yaml"
    path.write_text(yaml.safe_dump({"options": TINY, "methods": {"FT": None, "PLOP": None}} | entries, sort_keys=False))
    return path


def planned(folder, variant="", **entries):
    return plan.Plan(plan.read(write(folder, **entries)), variant, folder / "out")


def after(found):
    """By row, the name of the step 0 that it starts from."""
    return {job.name.rsplit("-seed", 1)[0]: job.after and job.after.name for job in found.jobs}


def value(job, option):
    """What a job's command line says last of an option."""
    return getattr(argparser.parse(job.words), option)


def test_rows_share_step_0_unless_it_differs(tmp_path):
    found = planned(tmp_path, methods=dict.fromkeys(("FT", "PLOP", "LSKD", "MiB", "EWC", "LWF-MC", "Joint")))
    assert after(found) == {
        "FT": "step0-seed42", "PLOP": "step0-seed42", "LSKD": "step0-seed42", "MiB": "step0-seed42",
        "EWC": "step0-EWC-seed42", "LWF-MC": "step0-LWF-MC-seed42", "Joint": None,
    }  # fmt: skip
    joint = found.jobs[-1]
    assert value(joint, "task") == "offline" and value(joint, "step") == [0]


def test_the_shared_step_0_does_not_depend_on_the_order_of_the_rows(tmp_path):
    """It is that of fine-tuning; where fine-tuning refuses an option of the study, that of the first row."""
    rows = {"PLOP": {"unkd": True, "loss_kd": 3}, "FT": None}
    first = [planned(tmp_path, methods=dict(order)).jobs[0].after for order in (rows.items(), reversed(rows.items()))]
    assert [value(job, "method") for job in first] == ["FT", "FT"] and first[0].words == first[1].words
    options = TINY | {"pod_logits": True}
    only = planned(tmp_path, options=options, methods={"LSKD": None}).jobs[0].after
    assert value(only, "method") == "LSKD"


@pytest.mark.parametrize(
    ("own", "shared"),
    [
        ({"lr": [0.5]}, False),
        ({"lr": [0.01, 0.5]}, True),  # step 0's is the one of all
        ({"weight_decay": 0}, False),
        ({"batch_size": 2}, False),
        ({"ppp": 2}, False),
        ({"ce_factor": 1}, True),  # the default
        ({"ce_on_new": True}, False),
        ({"epochs": 7}, False),
        ({"freeze": True}, False),
        ({"backbone": "resnet34"}, False),
        ({"reg_alpha": 0.5}, False),
        ({"pod_factor": 0.5, "loss_kd": 3, "unkd": True}, True),
    ],
)
def test_an_option_that_changes_step_0_takes_a_step_0_of_its_own(tmp_path, own, shared):
    found = planned(tmp_path, methods={"FT": None, "mine": {"method": "PLOP"} | own})
    assert after(found) == {"FT": "step0-seed42", "mine": "step0-seed42" if shared else "step0-mine-seed42"}


def test_a_row_with_a_preset_file_shares_the_step_0(tmp_path):
    """Its path is no option that step 0 reads, but what it says may be one."""
    found = {"found": "tap_schemes: none,none,md,md,md,md\nmcd_factor: 0.5\n", "slow": "lr: [0.5]\n"}
    for name, text in found.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    rows = {name: {"method": "LSKD", "preset": str(tmp_path / f"{name}.yaml")} for name in found}
    options = {key: value for key, value in TINY.items() if key != "lr"}
    planned_rows = planned(tmp_path, options=options, methods={"FT": None} | rows)
    assert after(planned_rows) == {"FT": "step0-seed42", "found": "step0-seed42", "slow": "step0-slow-seed42"}
    assert value(planned_rows.jobs[1], "mcd_factor") == 0.5


def test_schedules_of_step_0_and_of_later_steps(tmp_path):
    """Several learning rates are those of all steps; a row's own options win over the study's."""
    entries = {
        "options": TINY | {"task": "6-2", "lr": [0.5, 0.25, 0.125]},
        "step0": {"epochs": 3},
        "later": {"epochs": 2},
    }
    found = planned(tmp_path, methods={"FT": None, "slow": {"method": "FT", "epochs": 9}}, **entries)
    plain, slow = found.jobs
    assert (value(plain.after, "lr"), value(plain.after, "epochs"), plain.after.epochs) == ([0.5], 3, 3)
    assert (value(plain, "lr"), value(plain, "epochs"), plain.epochs) == ([0.25, 0.125], 2, 4)
    assert (value(slow.after, "epochs"), value(slow, "epochs"), slow.epochs) == (9, 9, 18)


def test_a_row_has_options_for_step_0_and_for_later_steps(tmp_path):
    """They win over those of the study and of the row; words after -- win over all."""
    options, row = (
        TINY | {"lr": [0.5, 0.25]},
        {"method": "FT", "batch_size": 2, "step0": {"lr": [0.125]}, "later": {"epochs": 7}},
    )
    entries = {"options": options, "later": {"epochs": 2}, "methods": {"FT": None, "slow": row}}
    plain, slow = planned(tmp_path, **entries).jobs
    assert [value(job, "lr") for job in (plain.after, plain, slow.after, slow)] == [[0.5], [0.25], [0.125], [0.25]]
    assert (plain.epochs, slow.epochs, value(slow, "batch_size"), value(slow.after, "batch_size")) == (2, 7, 2, 2)
    found = plan.Plan(plan.read(write(tmp_path, **entries)), "", tmp_path / "out", ["--epochs", "1", "--lr", "0.75"])
    assert {(job.epochs, *value(job, "lr")) for job in found.jobs} == {(1, 0.75)}


def test_files_of_a_study_are_looked_for_beside_it(tmp_path, monkeypatch):
    folder = tmp_path / "studies"
    folder.mkdir()
    for place in (folder / "task.json", tmp_path / "task.json", tmp_path / "here.json"):
        place.write_text(json.dumps({"name": place.parent.name, "steps": [[0, 1], [2], [3]]}))
    monkeypatch.chdir(tmp_path)
    names = {name: {"method": "FT", "task_file": name} for name in ("task.json", "here.json")}
    beside, here = planned(folder, methods=names).jobs
    assert value(beside, "task_file") == str(folder / "task.json") and value(beside, "step") == [1, 2]
    assert value(here, "task_file") == "here.json"


def test_seeds_and_variants_have_runs_of_their_own(tmp_path):
    variants = {"1 epoch": {"step0": {"epochs": 1}}, "2 epochs": {"step0": {"epochs": 2}, "options": {"lr": [0.1]}}}
    plans = [planned(tmp_path, variant, seeds=[1, 2], variants=variants) for variant in variants]
    jobs = study.all_jobs(plans)
    assert len(jobs) == len({job.title for job in jobs}) == 2 * (2 + 4) and len({job.log for job in jobs}) == 12
    assert {value(job, "random_seed") for job in jobs} == {1, 2}
    assert [value(one.jobs[0].after, "epochs") for one in plans] == [1, 2] and value(plans[1].jobs[0], "lr") == [0.1]
    assert str(tmp_path / "out" / "1-epoch") in str(plans[0].jobs[0].results)


def test_a_variant_changes_a_row(tmp_path):
    variants = {"as it is": {}, "changed": {"methods": {"PLOP": {"threshold": 0.5, "later": {"epochs": 7}}}}}
    rows = {"FT": None, "PLOP": {"later": {"epochs": 5, "threshold": 0.25}}}
    one, other = (planned(tmp_path, name, methods=rows, variants=variants).jobs for name in variants)
    assert [[value(job, "epochs") for job in jobs] for jobs in (one, other)] == [[30, 5], [30, 7]]
    assert [value(jobs[1], "threshold") for jobs in (one, other)] == [0.25, 0.25]
    assert value(other[1].after, "epochs") == 30


@pytest.mark.parametrize(
    ("base", "later", "same"),
    [
        ([0, 1], [[3], [2]], True),  # another order of the later classes
        ([0, 1], [[2, 3]], True),  # in other steps
        ([0, 1], [[2]], False),  # other classes in all
        ([0, 2], [[1], [3]], False),
    ],
)
def test_variants_share_step_0_where_its_classes_are_the_same(tmp_path, base, later, same):
    for name, steps in {"first": [[0, 1], [2], [3]], "second": [base, *later]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"name": name, "steps": steps}))
    tasks = {name: {"options": {"task": None, "task_file": f"{name}.json"}} for name in ("first", "second")}
    found = plan.read(write(tmp_path, variants=tasks))
    shared: dict = {}
    plans = [plan.Plan(found, variant, tmp_path / "out", shared=shared) for variant in found.variants]
    steps0 = [job for job in study.all_jobs(plans) if job.after is None]
    assert len(steps0) == (1 if same else 2)
    assert {job.after.title for one in plans for job in one.jobs} == {job.title for job in steps0}
    folders = {Path(value(job, "step_ckpt")).parent.parent.name for one in plans for job in one.jobs}
    assert folders == ({"first"} if same else {"first", "second"})


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"method": {}}, "'method' is not an entry of a study"),
        ({"methods": {}}, "list at least one"),
        ({"methods": ["FT"]}, "give names with values"),
        ({"seeds": [1.5]}, "whole numbers"),
        ({"seeds": 3}, "whole numbers"),
        ({"options": TINY | {"learning_rate": 1}}, "'learning_rate' is not an option"),
        ({"options": TINY | {"batch_sise": 1}}, "did you mean 'batch_size'?"),
        ({"options": TINY | {"overlap": 1}}, "'overlap' is a switch; give true or false"),
        ({"options": TINY | {"batch_size": [1, 2]}}, "takes one value"),
        ({"options": TINY | {"task": "7-7"}}, "7-7"),
        ({"methods": {"FT": {"step": [1]}}}, "'step' is set by the study itself"),
        ({"methods": {"FT": {"later": {"name": "x"}}}}, "methods, FT, later: 'name' is set by the study itself"),
        ({"methods": {"PLOP": {"pooling": -1}}}, "PLOP: --pooling -1"),
        ({"methods": {"FTT": None}}, "FTT"),
        ({"methods": {"a b": {"method": "FT"}, "a-b": {"method": "FT"}}}, "rename one"),
        ({"variants": {"x": {"seeds": [1]}}}, "'seeds' cannot vary"),
        ({"variants": {"x": {"options": {"name": "y"}}}}, "variant x, options: 'name' is set by the study itself"),
        (
            {"variants": {"x": {"methods": {"MiB": {}}}}},
            "variant x: 'MiB' is no row of the study; its rows are FT, PLOP",
        ),
        ({"variants": {"x": {"methods": {"FT": {"later": {"step": 1}}}}}}, "variant x, FT: 'step' is set by the study"),
        ({"variants": {"x": {"methods": {"FT": 3}}}}, "give names with values"),
        ({"name": ["x"]}, "give a text"),
    ],
)
def test_a_wrong_entry_is_refused_before_anything_runs(tmp_path, capsys, entries, said):
    assert study.main([str(write(tmp_path, **entries)), "--out", str(tmp_path / "out")]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1 and said in text
    assert not (tmp_path / "out").exists()


def test_other_files_are_refused(tmp_path, capsys):
    (tmp_path / "bomb.yaml").write_text("a: &a [x, x]\nb: [*a, *a]\n")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    (tmp_path / "open.yaml").write_text("a: [1")
    for name in ("bomb.yaml", "list.yaml", "open.yaml", "none.yaml"):
        assert study.main([str(tmp_path / name)]) == 2
        assert f"error: {tmp_path / name}" in capsys.readouterr().err
    assert study.main([str(write(tmp_path)), "--methods", "MiB"]) == 2
    assert "its rows are FT, PLOP" in capsys.readouterr().err


STUDIES = [path for path in (ROOT / "scripts" / "studies").glob("*.yaml") if not path.stem.startswith("tune_")]


@pytest.mark.parametrize("path", sorted(STUDIES), ids=lambda path: path.stem)
def test_the_studies_of_the_project_can_be_planned(path, tmp_path):
    found = plan.read(path)
    words = ["--data_root", str(tmp_path)] if found.options["dataset"] != "shapes" else []
    for variant in found.variants:
        assert plan.Plan(found, variant, tmp_path, words).jobs


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
    for dest in argparser.later_options() - set(others):  # switches, choices, lists of numbers and numbers
        choices = [choice for choice in actions[dest].choices or () if choice != plain[dest]]
        if choices or actions[dest].nargs == 0:
            others[dest] = choices[0] if choices else not plain[dest]
        else:
            several = isinstance(plain[dest], list)
            others[dest] = [value + 2 for value in plain[dest]] if several else (plain[dest] or 0) + 2
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


def test_time_left_is_that_of_the_same_row(tmp_path):
    jobs = planned(tmp_path, seeds=[1, 2], later={"epochs": 2}).jobs  # FT, PLOP of seed 1; FT, PLOP of seed 2
    progress = execute.Progress(jobs, 1)
    try:
        assert progress.seconds_left() is None
        progress.epoch(jobs[0], "step 1 epoch 1/2", 3.0)
        assert progress.seconds_left() == 7 * 3.0  # of 8 epochs, all as long as the one that is known
        progress.epoch(jobs[1], "step 1 epoch 1/2", 5.0)
        assert progress.seconds_left() == (1 + 2) * 3.0 + (1 + 2) * 5.0
    finally:
        progress.close()


def test_a_study_from_end_to_end(tmp_path, capfd):
    path = write(
        tmp_path, methods={"FT": None, "EWC": {"reg_importance": 3}}, options=TINY | {"epochs": 1, "lr": [0.01, 0.002]}
    )
    out = tmp_path / "a b"
    words = [str(path), "--jobs", "2", "--out", str(out)]
    assert study.main(words) == 0
    assert "| FT " in (out / "table.md").read_text() and (out / "miou_by_step.png").stat().st_size > 1000
    stored = {file.stem: json.loads(file.read_text()) for file in (out / "results").glob("*.json")}
    assert sorted(stored) == [f"all_shapes_6-4_{name}-seed42" for name in ("EWC", "FT", "step0-EWC", "step0")]
    assert stored["all_shapes_6-4_EWC-seed42"]["options"]["reg_importance"] == 3
    rates = {name.split("_")[-1]: document["options"]["lr_of_step"] for name, document in stored.items()}
    assert rates == {"step0-seed42": 0.01, "step0-EWC-seed42": 0.01, "EWC-seed42": 0.002, "FT-seed42": 0.002}
    shared, later = (stored[f"all_shapes_6-4_{name}-seed42"]["steps"] for name in ("step0", "FT"))
    assert later["0"] == shared["0"] and sorted(later) == ["0", "1"]
    assert later["1"]["average_over_steps"] == pytest.approx((later["0"]["all"] + later["1"]["all"]) / 2)
    assert f"| {later['1']['average_over_steps']:.1f} " in (out / "table.md").read_text()
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    listed = {entry["name"]: entry["steps"] for entry in json.loads((out / "scores.json").read_text())}
    assert (
        set(listed) == {"FT-seed42", "EWC-seed42"} and listed["FT-seed42"]["1"]["class_iou"] == later["1"]["class_iou"]
    )
    with open(out / "table.csv", encoding="utf-8") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert rows["FT"]["task"] == "shapes 6-4" and float(rows["FT"]["all"]) == pytest.approx(later["1"]["all"], abs=0.05)
    for step in (0, 1):  # that of the shared step 0 is copied
        assert (out / "results" / "all_shapes_6-4_FT-seed42_pictures" / f"3_step{step}.png").is_file()
    assert set(json.loads((out / "study.json").read_text())["seconds"]) == {name.split("_")[-1] for name in stored}
    first = capfd.readouterr().out
    assert study.main(words) == 0  # nothing is trained twice
    again = capfd.readouterr().out
    assert "finished before" in again and again[again.index("| method") :].split("\n\n")[0] in first


def test_a_study_of_variants_draws_both_figures(tmp_path):
    """From the command line: a variant has a step 0 of its own unless another one has the same."""
    (tmp_path / "order.json").write_text(json.dumps({"name": "order", "steps": [list(range(7)), [10, 9, 8, 7]]}))
    more, order = {"epochs": 2}, {"task": None, "task_file": "order.json"}
    variants = {
        "few": {"step0": {"shapes_train": 8}},
        "more": {"step0": dict(more)},
        "order": {"step0": more, "options": order},
    }
    path = write(tmp_path, methods={"FT": None}, options=TINY | {"epochs": 1}, variants=variants)
    out = tmp_path / "out"
    assert study.main([str(path), "--out", str(out)]) == 0
    for name in ("by_variant", "by_step0", "by_step_few", "by_step_more", "by_step_order"):
        assert (out / f"miou_{name}.png").stat().st_size > 1000
    assert sorted(file.parts[-3] for file in out.glob("*/checkpoints/*_0.pth")) == ["few", "more"]
    scores = {entry["variant"]: entry["steps"] for entry in json.loads((out / "scores.json").read_text())}
    assert scores["order"]["0"]["class_iou"] == scores["more"]["0"]["class_iou"]  # tested again under the other task


def test_rows_and_variants_of_the_command_line(tmp_path, capsys):
    variants = {"few": {"step0": {"shapes_train": 8}}, "more": {"step0": {"epochs": 2}}}
    path = write(tmp_path, methods={"FT": None, "MiB": None}, options=TINY | {"epochs": 1}, variants=variants)
    assert study.main([str(path), "--methods", "MiB", "--variants", "more", "--list"]) == 0
    listed = capsys.readouterr().out
    assert "MiB-seed42" in listed and "FT-seed42" not in listed and "/more/" in listed and "/few/" not in listed
    words = ["--", "--pod_logits"]  # needs --pod, which one variant has
    variants = {"without": {}, "with": {"options": {"pod": "local"}}}
    path = write(tmp_path, methods={"PLOP": {"method": "FT"}}, options=TINY, variants=variants)
    assert study.main([str(path), "--variants", "with", "--list", *words]) == 0
    assert study.main([str(path), "--list", *words]) == 2
    assert "--pod_logits needs --pod" in capsys.readouterr().err
    path = write(tmp_path, methods={"FT": None, "MiB": None}, variants={"more": {"step0": {"epochs": 2}}})
    for option, said in (("--methods", "has no row 'x'; its rows are FT, MiB"), ("--variants", "has no variant 'x'")):
        assert study.main([str(path), option, "x"]) == 2
        assert said in capsys.readouterr().err


def test_a_part_of_a_study_has_the_step_0_of_the_whole(tmp_path, capfd):
    """The shared step 0 is that of the first row, also if that row is not among those that are asked for."""
    methods = {"FT": None, "LWF, α 10": {"method": "LWF", "loss_kd": 10}, "MiB": None}
    path = write(tmp_path, methods=methods, options=TINY | {"epochs": 1}, seeds=[1, 2])
    words, table = [str(path), "--out", str(tmp_path / "out")], tmp_path / "out" / "table.md"
    assert study.main([*words, "--seeds", "1", "--methods", "MiB"]) == 0
    # was refused: its step 0 had been written with other options
    assert study.main([*words, "--seeds", "1", "--methods", "LWF, α 10"]) == 0
    assert "finished before" in capfd.readouterr().out
    named = {file.stem.split("_")[-1] for file in (tmp_path / "out" / "results").glob("*.json")}
    assert named == {"step0-seed1", "MiB-seed1", "LWF-10-seed1"}
    assert "| LWF, α 10 | 1 " in table.read_text()  # not the name of its files
    copy_of_seed_1(tmp_path / "out" / "results", "LWF-10", {"a_later_option": 3})
    assert study.main([*words, "--table"]) == 0
    assert "| LWF, α 10 | 2 " in table.read_text()  # a row is a row, also where a version has stored more options


def copy_of_seed_1(results, name, options):
    """The results of seed 2, which has further options."""
    document = json.loads((results / f"all_shapes_6-4_{name}-seed1.json").read_text())
    document |= {"name": f"{name}-seed2", "options": document["options"] | options}
    (results / f"all_shapes_6-4_{name}-seed2.json").write_text(json.dumps(document))


def test_a_failed_run_is_said_and_the_others_go_on(tmp_path, capfd):
    """The step 0 of one row fails; the row is left out, and the other is trained."""
    options = TINY | {"epochs": 1}
    path = write(tmp_path, methods={"FT": None, "few": {"method": "FT", "shapes_train": 2}}, options=options)
    out = tmp_path / "out"
    assert study.main([str(path), "--out", str(out)]) == 1
    said = capfd.readouterr().err
    assert "step0-few-seed42 ended with exit code 2" in said
    assert "few-seed42 was left out, because step0-few-seed42 failed" in said
    assert (out / "results" / "all_shapes_6-4_FT-seed42.json").is_file() and not (out / "table.md").exists()
    assert study.main([str(path), "--out", str(out), "--table"]) == 0  # of what has ended
    assert "| FT " in (out / "table.md").read_text() and "| few " not in (out / "table.md").read_text()
    (out / "results" / "all_shapes_6-4_FT-seed42.json").unlink()
    assert study.main([str(path), "--out", str(out), "--table"]) == 2
    assert "no run of the study has ended in" in capfd.readouterr().err
