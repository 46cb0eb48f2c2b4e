"""Short versions of the studies of tests/stress/fault_injection.py: kills, broken disks, damaged files, mutated input."""

import os
import random
import signal
import subprocess
import sys

import pytest

import train
from tests.stress import (
    fault_hostile,
    fault_injection,
    fault_inputs,
    fault_options,
    fault_parts,
    fault_processes,
    fault_saving,
)
from tests.support import thin
from utils.checkpointing import checkpoint_files

#: One step of two epochs.
SHORT = ("--step", "0", "--method", "FT", "--num_workers", "0")


#: run.py up to its first slow import, which Ctrl-C then interrupts.
IMPORTING = """
import os, runpy, signal, sys
class Interrupt:
    def find_spec(self, name, *_):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
runpy.run_path("run.py", run_name="__main__")
"""


def wrong(cases):
    return [case for case in cases if case["wrong"]]


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """A finished run of the small command line by a thin network: its folder and what it left."""
    folder = tmp_path_factory.mktemp("calm")
    with thin.program():
        code, _, said = fault_inputs.execute(fault_parts.words(folder, *fault_saving.STEP0))
    assert code == 0, said
    return folder, fault_parts.outcome(folder)


def finished(calm):
    (path,) = (calm[0] / "checkpoint").glob("*_0.pth")
    return path


def test_a_killed_run_ends_as_one_that_was_not(tmp_path):
    study = fault_injection.Kills(tmp_path, 1, 1, 0, SHORT)
    study.wanted = [fault_parts.VALIDATION]
    report = study.go()
    assert report["failures"] == [] and len(report["kills"]) == 1


def test_the_comparison_sees_one_changed_weight(calm, tmp_path):
    state = checkpoint_files.load(finished(calm))
    state["model_state"]["module.cls.0.bias"][1] += 1e-7
    (tmp_path / "checkpoint").mkdir()
    checkpoint_files.save(tmp_path / "checkpoint" / finished(calm).name, state)
    assert fault_parts.outcome(tmp_path)[finished(calm).name] != calm[1][finished(calm).name]


def test_checkpoints_survive_a_failing_disk(tmp_path):
    cases = fault_saving.saving_alone(tmp_path)
    assert len(cases) == 25 and wrong(cases) == []


@pytest.mark.parametrize("study", ["running_into", "stale_results", "full_disks"])
def test_runs_survive_a_failing_disk(calm, tmp_path, study):
    with thin.program():
        assert wrong(getattr(fault_saving, study)(tmp_path / study, calm[1])) == []


def test_damaged_checkpoints_are_refused(calm, tmp_path):
    with thin.program():
        cases = fault_saving.damaged_previous(tmp_path / "previous", finished(calm), random.Random(0), 10)
    assert len(cases) == 23 and wrong(cases) == []


def test_the_state_before_a_damaged_one_is_continued(calm, tmp_path):
    with thin.program():
        assert wrong(fault_saving.damaged_state(tmp_path / "state", calm[1], random.Random(0), cuts=2)) == []


def test_crafted_checkpoints_are_refused_or_harmless(tmp_path):
    with thin.program():
        assert wrong(fault_saving.crafted(tmp_path / "crafted", random.Random(0), 10)) == []


def test_a_worker_that_is_ended_by_the_system_is_said(tmp_path, monkeypatch):
    real = train.Trainer.train_iteration

    def iteration(*args):
        for loader in fault_processes.loaders(os.getpid()):
            os.kill(loader, signal.SIGKILL)
        return real(*args)

    monkeypatch.setattr(train.Trainer, "train_iteration", iteration)
    with thin.program():
        code, _, said = fault_inputs.execute(fault_parts.words(tmp_path, *SHORT, "--num_workers", "1"))
    assert code == 2 and "a process that loads data ended" in said and fault_parts.TRACEBACK not in said


def test_interrupted_while_it_is_imported_the_program_says_nothing():
    job = subprocess.Popen([sys.executable, "-c", IMPORTING], stderr=subprocess.PIPE, cwd=fault_parts.ROOT)
    assert job.communicate(timeout=60)[1] == b"" and job.returncode == -signal.SIGINT


def test_mutated_inputs_are_refused_or_taken_rightly(tmp_path):
    with thin.program():
        assert wrong(fault_inputs.study(tmp_path, 25, 7)) == []


def test_pairs_of_options_are_taken_or_refused(tmp_path):
    assert wrong(fault_options.pairs(tmp_path, 60)) == []


def test_several_faults_at_once_are_refused(tmp_path):
    assert wrong(fault_options.several(tmp_path, 40, 0)) == []


def test_every_option_is_part_of_a_pair():
    named = {words[0].partition("=")[0].lstrip("-") for words in fault_options.settings()}
    assert len(named) > 100 and {"method", "lr", "pod_options", "crop_val", "step_ckpt"} <= named


def test_hostile_checkpoints_are_refused_by_all_that_read_one(tmp_path):
    assert wrong(fault_hostile.study(tmp_path)) == []


def test_a_data_set_is_scanned_anew_after_a_kill_or_damage(tmp_path):
    with thin.program():
        assert wrong(fault_processes.scan_killed(tmp_path, flips=2, cuts=2)) == []


def test_a_wrong_success_is_found(tmp_path):
    path = tmp_path / "task.json"
    path.write_text('{"steps": [[0, 1], [2]]}')
    argv = [*fault_inputs.GOOD, f"--task_file={path}", "--step", "1"]
    good = [{"step": 1, "classes": {"old": 2, "new": 1, "total": 3}}]
    with thin.program():
        assert fault_inputs.judge(argv, False, good) == ""
        assert fault_inputs.judge(argv, True).startswith("wrong success")
        assert fault_inputs.judge(argv, False, [{"step": 0}]).startswith("wrong success")
