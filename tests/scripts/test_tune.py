"""scripts/tune.py: a planted optimum is found, a search goes on where it was stopped, and what its file may say."""

import contextlib
import csv
import io
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

import argparser
import dataset
import run
from dataset.shapes import ShapesSource
from scripts import tune
from scripts.studies import execute, search, trials
from tests.support import thin
from tests.support.paths import ROOT

TINY = {
    "dataset": "shapes", "task": "6-4", "overlap": True, "method": "LSKD", "backbone": "resnet18", "no_pretrained": True,
    "crop_size": 32, "batch_size": 4, "shapes_train": 40, "num_workers": 0, "device": "cpu", "norm_act": "iabn", "threads": 1,
    "lr": [0.02], "epochs": 1, "visualize": True,
}  # fmt: skip
SPACE = {"tap_schemes": {"stage1": ["none", "pod"], "pre_logits": ["none", "md", "mcd"]}}


def write(folder, **entries):
    path = folder / "a search.yaml"
    path.write_text(yaml.safe_dump({"options": TINY, "search": SPACE, "confidence": 0.3} | entries, sort_keys=False))
    return path


def rows(out):
    with open(out / "trials.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def launched(monkeypatch):
    """The command lines that the search runs: here, on the thin network, in this process."""
    found = []

    def launch(words, log, hear, mode="w"):
        found.append(words)
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = run.main(words)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, mode, encoding="utf-8") as file:
            for line in said.getvalue().splitlines(keepends=True):
                file.write(line)
                file.flush()
                hear(line)
        return code

    monkeypatch.setattr(execute, "launch", launch)
    with thin.program():
        yield found


def test_a_planted_optimum_is_found(tmp_path, launched, capsys, monkeypatch):
    """MCD with an absurd factor spoils every trial that gives it to a tap; the search leaves it, and says that this tap matters."""
    reads, read = [], ShapesSource.read
    monkeypatch.setattr(ShapesSource, "read", lambda source, i: reads.append((source.split, i)) or read(source, i))
    monkeypatch.setattr(trials, "FEW_OLD", 101.0)
    begins, launch = [], execute.launch
    monkeypatch.setattr(execute, "launch", lambda *words: begins.append(len(reads)) or launch(*words))
    options = TINY | {"mcd_factor": 1.0e6, "shapes_train": 80, "lr": [0.1]}
    path = write(tmp_path, options=options, step0={"epochs": 4}, later={"epochs": 2}, trials=10, startup=5)
    assert tune.main([str(path), "--out", str(tmp_path / "out")]) == 0
    found = rows(tmp_path / "out")
    assert len(found) == 10 and (tmp_path / "out" / "trials.png").stat().st_size > 10_000
    by_scheme = {
        scheme: [float(row["score"]) for row in found if row["tap_schemes.pre_logits"] == scheme]
        for scheme in ("none", "md", "mcd")
    }
    assert by_scheme["mcd"] and max(by_scheme["mcd"]) < max(by_scheme["none"] + by_scheme["md"])
    assert len(by_scheme["mcd"]) < 5
    out = capsys.readouterr().out
    assert "what mattered: tap_schemes.pre_logits" in out
    assert out.count("note: old objects cover ") == 1  # less than the 101 % from above
    preset = tmp_path / "out" / "preset.yaml"
    opts = argparser.parse(["--preset", str(preset), "--dataset", "shapes"])
    assert opts.method == "LSKD" and opts.tap_schemes[4] in ("none", "md") and opts.mcd_factor == 1e6
    assert set(yaml.safe_load(preset.read_text())) == {"method", "mcd_factor", "tap_schemes"}
    check_images(reads, begins, launched[-1])


def check_images(reads, begins, words):
    """The trials read training images of the searched step alone, and all of those; step 0, before them, reads others too.

    Args:
        reads: (split, index) of every image that was read.
        begins: number of reads before each run; the first run is step 0.
        words: of a trial.
    """
    opts = argparser.parse(words)
    splits = dataset.build(opts, dataset.load_task(opts, 1))
    step1 = {("train", int(index)) for index in (*splits.train.indices, *splits.val.indices)}
    assert set(reads[begins[1] :]) == step1
    assert set(reads[: begins[1]]) - step1


def test_a_stopped_search_ends_as_one_that_was_not(tmp_path, launched, monkeypatch, capsys):
    path = write(tmp_path, trials=4, startup=2)
    assert tune.main([str(path), "--out", str(tmp_path / "whole")]) == 0
    launch, stop = execute.launch, len(launched) + 2  # after the step before and one trial

    def stopping(words, log, hear, mode="w"):
        return launch(words, log, hear, mode) if len(launched) < stop else 130

    monkeypatch.setattr(execute, "launch", stopping)
    assert tune.main([str(path), "--out", str(tmp_path / "parts")]) == 130
    assert "the same command continues" in capsys.readouterr().err
    monkeypatch.setattr(execute, "launch", launch)
    assert tune.main([str(path), "--out", str(tmp_path / "parts")]) == 0
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole") and len(rows(tmp_path / "whole")) == 4
    count = len(launched)
    assert tune.main([str(path), "--out", str(tmp_path / "parts"), "--trials", "4"]) == 0
    assert len(launched) == count + 1  # the step before says that it is finished
    other = write(tmp_path, trials=4, confidence=0.9)
    assert tune.main([str(other), "--out", str(tmp_path / "parts")]) == 2
    assert "holds a search with other options" in capsys.readouterr().err


def test_a_killed_search_goes_on(tmp_path):
    """Processes of their own, killed in the first trial."""
    path, out = write(tmp_path, trials=1), tmp_path / "out"
    command = [sys.executable, str(ROOT / "scripts" / "tune.py"), str(path), "--out", str(out)]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    log = out / "trials" / "trial0-seed101.log"
    while not log.is_file():
        assert process.poll() is None, "the search ended before it was killed"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "trials.csv").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert done[0].startswith("note: old objects cover ")  # the teacher of one short epoch is hardly sure of any
    assert done[1].startswith("trial 1/1: ") and len(rows(out)) == 1 and (out / "preset.yaml").is_file()


def test_a_storage_of_something_else_is_refused(tmp_path, launched, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "trials.sqlite3").write_text("no storage " * 100)
    assert tune.main([str(write(tmp_path)), "--out", str(tmp_path / "out")]) == 2
    assert "cannot be used as the storage of Optuna" in capsys.readouterr().err and not launched


def test_bad_trials_are_ended_early(tmp_path, launched):
    path = write(tmp_path, trials=6, startup=6, later={"epochs": 4})
    assert tune.main([str(path), "--out", str(tmp_path / "out")]) == 0
    found = rows(tmp_path / "out")
    epochs = {state: {int(row["epochs"]) for row in found if row["state"] == state} for state in ("complete", "pruned")}
    assert epochs["complete"] <= {0, 4} and 4 in epochs["complete"]  # 0: the score of an equal trial was taken
    assert epochs["pruned"] and epochs["pruned"] <= {1, 2}
    best = max(float(row["score"]) for row in found if row["state"] == "complete")
    assert all(float(row["score"]) < best for row in found if row["state"] == "pruned")


def test_values_stand_for_options(tmp_path):
    """Schemes, an option, and a place within a JSON object; what the preset of the method has is the first trial."""
    space = {
        "tap_schemes": {"logits": ["none", "md"]}, "mcd_factor": {"low": 1.0e-4, "high": 0.1, "log": True},
        "pod_options.switch.after.factor": {"low": 1.0e-5, "high": 1.0}, "loss_kd": [1, 3],
    }  # fmt: skip
    runs = search.Runs(search.read(write(tmp_path, search=space)), tmp_path)
    assert runs.published() == {
        "tap_schemes.logits": "md", "mcd_factor": 0.005, "pod_options.switch.after.factor": 0.0005,  # loss_kd 10 is not in the list
    }  # fmt: skip
    words = runs.trial(3, runs.published() | {"pod_options.switch.after.factor": 0.25, "loss_kd": 3}, 101)
    assert words[words.index("--step_ckpt") + 1] == runs.previous(101)
    opts = argparser.parse(words)
    assert opts.pod_options["switch"]["after"] == {"extra_channels": "sum", "factor": 0.25, "type": "local"}
    assert (opts.loss_kd, opts.mcd_factor, opts.cross_val, opts.no_test, opts.val_by_teacher) == (
        3,
        0.005,
        True,
        True,
        0.3,
    )
    assert opts.tap_schemes == ("pod", "pod", "md", "md", "md+mcd", "md") and opts.step == [1]


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"searches": {}}, "'searches' is not an entry of a search"),
        ({"search": {}}, "nothing to search"),
        ({"search": {"tap_schemes": {"stage9": ["md"]}}}, "'stage9' is no tap"),
        ({"search": {"tap_schemes": {"stage1": ["mdd"]}}}, "choose among none, pod"),
        ({"search": {"tap_schemes": 3}}, "give `all`"),
        ({"search": {"tap_schemes": {"logits": ["mcd"]}}}, "--mcd_groups"),
        ({"search": {"mcd_faktor": [1]}}, "not an option that can be searched"),
        ({"search": {"step": [1]}}, "not an option that can be searched"),
        ({"search": {"mcd_factor": 3}}, "give a list of values, or low and high"),
        ({"search": {"mcd_factor": {"low": 2, "high": 1}}}, "low must be a number below high"),
        ({"search": {"mcd_factor": {"low": 0, "high": 1, "log": True}}}, "needs a number above 0"),
        ({"search": {"mcd_factor": {"low": -1, "high": 1}}}, "--mcd_factor -1 is out of range"),
        ({"search": {"mcd_factor": [[1]]}}, "neither a text nor a number"),
        ({"options": TINY | {"no_test": True}}, "'no_test' is set by the search itself"),
        ({"options": TINY | {"batch_sise": 1}}, "did you mean 'batch_size'?"),
        ({"objective": "new"}, "choose one of all, balanced"),
        ({"confidence": 2}, "confidence is 2"),
        ({"step": 2}, "its steps are 0 to 1"),
        ({"step": 0}, "step is 0"),
        ({"trials": 0}, "trials is 0"),
        ({"seeds": 1}, "seeds is 1"),
        ({"halving": {"min_epoch": 1}}, "'min_epoch' is unknown"),
        ({"step_ckpt": "none.pth"}, "which is not a file"),
    ],
)
def test_a_wrong_entry_is_refused_before_anything_runs(tmp_path, capsys, entries, said):
    path = write(tmp_path, **entries)
    assert tune.main([str(path), "--out", str(tmp_path / "out")]) == 2
    text = capsys.readouterr().err
    assert text.startswith(f"error: {path}") and text.count("\n") == 1 and said in text
    assert not (tmp_path / "out").exists()


def test_optuna_is_named_where_it_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr(tune.importlib.util, "find_spec", lambda name: None)
    assert tune.main([str(write(tmp_path)), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        "error: scripts/tune.py needs Optuna, which is not installed; install it with: pip install optuna\n"
    )


@pytest.mark.parametrize("path", sorted((ROOT / "scripts" / "studies").glob("tune_*.yaml")), ids=lambda path: path.stem)
def test_the_searches_of_the_project_can_be_planned(path, tmp_path, capsys):
    words = [] if "shapes" in path.stem else ["--", "--data_root", str(tmp_path)]
    assert tune.main([str(path), "--list", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("run.py ") and "--no_test" in line for line in lines)
