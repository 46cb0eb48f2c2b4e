"""The shell scripts: clean for shellcheck, and every command line they would run is one that run.py accepts."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import argparser
from dataset import load_task, tasks
from scripts import average_csv, launch
from scripts.studies import plan
from tests.support.paths import ROOT

SHELL = sorted([*ROOT.glob("scripts/**/*.sh"), *ROOT.glob("scripts/**/*.sbatch")])
SCHEDULES = [path for path in SHELL if path.parent.name in ("voc", "ade", "cityscapes") and path.stem != "5-3"]
DATASETS = {"voc": "voc", "ade": "ade", "cityscapes": "cityscapes_domain"}

#: Stands in for an interpreter or a launcher: notes its arguments, a JSON list a line, and does nothing. Its second line is a command to
#: the shell and a string to Python: the first line of a script could not hold an interpreter whose path has a space.
RECORDER = """#!/bin/sh
''''exec "{python}" "$0" "$@" # '''
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SHELL, ids=name_of)
def test_shellcheck(path):
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    assert shellcheck, "shellcheck is missing: pip install -r requirements-dev.txt"
    found = subprocess.run([shellcheck, "-x", name_of(path)], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("path", SHELL, ids=name_of)
def test_scripts_can_be_started(path):
    executable = os.access(path, os.X_OK)
    assert executable == (path.name not in ("common.sh",)) or path.suffix == ".sbatch"
    assert path.suffix == ".sbatch" or path.name == "common.sh" or "set -euo pipefail" in path.read_text()


@pytest.fixture
def project(tmp_path):
    """The scripts in a folder whose name has a space, with stand-ins for everything they start."""
    folder = tmp_path / "my project"
    shutil.copytree(ROOT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "my data").mkdir()
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("python", "srun", "torchrun"):
        (tools / tool).write_text(RECORDER.format(python=sys.executable))
        (tools / tool).chmod(0o755)
    (tools / "scontrol").write_text("#!/bin/sh\nprintf 'node1\\nnode2\\n'\n")
    (tools / "scontrol").chmod(0o755)
    return folder


def commands(project, script, *words, **variables):
    """What a script starts, run from another folder: a list of words each."""
    record = project / "record"
    record.unlink(missing_ok=True)
    tools = project.parent / "tools"
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python"), "RECORD": str(record)}
    subprocess.run([str(project / script), *words], cwd=project.parent, env={**environment, **variables}, check=True)
    return [json.loads(line) for line in record.read_text().splitlines()]


def parsed(command):
    """The options of a recorded start of run.py, after its checks."""
    opts = argparser.parse(command[command.index("run.py") + 1 :])
    opts.step_ckpt = None  # a file that the stand-ins do not write
    argparser.check(opts)
    return opts


@pytest.mark.parametrize(
    ("path", "method"),
    [
        pytest.param(path, method, id=f"{name_of(path)}-{method}")
        for path in SCHEDULES
        for method in ("PLOP", "LSKD", "MiB" if path.parent.name != "cityscapes" else "FT")
    ],
)
def test_schedules_run_every_step_of_their_task(path, method, project, monkeypatch):
    monkeypatch.chdir(project)
    *steps, summary = commands(project, name_of(path), METHOD=method, DATA_ROOT="my data", DATE="d")
    dataset, task = DATASETS[path.parent.name], path.stem
    options = [parsed(command) for command in steps]
    assert [opts.step for opts in options] == [[step] for step in range(tasks.load(dataset, task, 0).last_step + 1)]
    assert {(opts.dataset, opts.task, opts.method, opts.data_root) for opts in options} == {
        (dataset, task, method, "my data")
    }
    assert [opts.lr for opts in options] == [[0.01]] + [[0.001]] * (len(options) - 1)
    assert all(opts.overlap == (dataset != "cityscapes_domain") and opts.resume for opts in options)
    assert all(2 * opts.batch_size == 24 for opts in options)
    assert "--nproc_per_node=2" in steps[0]
    assert summary == ["python", "scripts/average_csv.py", f"results/d_{dataset}_{task}_{method}.csv"]


#: Published schedules that differ from that of their task: script, method, and epochs, rates of step 0 and 1, and the joint batch.
PUBLISHED = [
    ("voc/10-1", "PLOP", [30, 10], [0.01, 0.001], 24),
    ("voc/10-1", "LSKD", [30, 20], [0.01, 0.001], 24),
    ("voc/15-5s", "RCIL", [30, 30], [0.02, 0.001], 24),
    ("voc/10-1", "RCIL", [30, 30], [0.02, 0.001], 24),
    ("ade/100-10", "RCIL", [60, 60], [0.01, 0.001], 24),
    ("voc/19-1", "ALIFE", [30, 5], [0.01, 0.001], 24),
    ("voc/15-5", "ALIFE-M", [30, 10], [0.01, 0.001], 24),
    ("voc/15-5s", "ALIFE-M", [30, 10], [0.01, 0.001], 24),
    ("ade/100-50", "ALIFE", [60, 60], [0.01, 0.001], 24),
    ("voc/15-5s", "REMINDER", [30, 30], [0.01, 0.001], 16),
    ("voc/15-5", "REMINDER", [30, 30], [0.01, 0.001], 24),
    ("ade/100-50", "REMINDER", [60, 70], [0.01, 0.0008], 10),
    ("ade/100-10", "REMINDER", [60, 70], [0.01, 0.001], 10),
    ("ade/100-5", "REMINDER", [60, 70], [0.01, 0.001], 10),
    ("ade/50", "REMINDER", [60, 70], [0.01, 0.001], 10),
    ("voc/15-5s", "MiB+AWT", [30, 30], [0.02, 0.001], 24),
    ("voc/15-5s", "PLOP+NeST", [30, 30], [0.02, 0.001], 24),
    ("voc/10-1", "MiB+NeST", [30, 10], [0.02, 0.001], 24),
    ("ade/100-5", "MiB+NeST", [60, 60], [0.02, 0.001], 24),
    ("ade/100-10", "MiB+AWT", [60, 60], [0.02, 0.001], 24),
    ("voc/10-1", "MiB+EWF", [30, 30], [0.01, 0.001], 24),
    ("ade/100-50", "MiB+EWF", [60, 60], [0.01, 0.001], 48),
    ("ade/100-10", "MiB+EWF", [60, 60], [0.01, 0.001], 24),
    ("voc/5-3", "MiB+AWT", [30, 30], [0.02, 0.001], 24),
    ("voc/5-3", "PLOP+EWF", [30, 30], [0.01, 0.001], 24),
    ("voc/19-1", "SDR", [30, 30], [0.001, 0.0001], 8),
    ("voc/15-5", "SDR", [30, 30], [0.01, 0.001], 24),
    ("ade/100-10", "SDR", [60, 60], [0.01, 0.001], 4),
]


@pytest.mark.parametrize(("script", "method", "epochs", "rates", "batch"), PUBLISHED)
def test_published_schedules(script, method, epochs, rates, batch, project, monkeypatch):
    monkeypatch.chdir(project)
    steps = commands(project, f"scripts/{script}.sh", METHOD=method, STEPS="0 1", DATA_ROOT="my data", GPUS="2")[:-1]
    options = [parsed(command) for command in steps]
    assert [opts.epochs for opts in options] == epochs
    assert [opts.lr for opts in options] == [[rate] for rate in rates]
    assert [2 * opts.batch_size for opts in options] == [batch] * 2


@pytest.mark.parametrize("variant", ["19-1", "15-5", "15-1", "10-1"])
def test_the_table_of_voc_has_the_schedules_of_the_scripts(variant, project, monkeypatch):
    """All methods but Joint. The study has one number of epochs for all later steps, ALIFE's release another one for step 1 of 15-1."""
    study = plan.read(ROOT / "scripts" / "studies" / "voc.yaml")
    monkeypatch.chdir(project)
    task = {"15-1": "15-5s"}.get(variant, variant)
    for name in study.methods:
        one = "19-1, disjoint" if (variant, name) == ("19-1", "SDR") else variant
        (job,) = plan.Plan(replace(study, seeds=(1,)), one, project, ["--data_root", "my data"], [name]).jobs
        if name == "Joint":
            continue
        given = [argparser.parse(words) for words in (job.after.words, job.words)]
        steps = "0 2" if (variant, name) == ("15-1", "ALIFE") else "0 1"
        variables = {"METHOD": name, "STEPS": steps, "DATA_ROOT": "my data", "GPUS": "1"}
        options = [parsed(command) for command in commands(project, f"scripts/voc/{task}.sh", **variables)[:-1]]
        for ours, theirs in zip(given, options):
            for key in ("epochs", "batch_size", "opt_level", "overlap", "task", "crop_size", "backbone", "pretrained"):
                assert getattr(ours, key) == getattr(theirs, key), (name, key)
            assert ours.lr[0] == theirs.lr[0] and len(theirs.lr) == 1, name
        assert given[1].method == options[1].method == name


@pytest.mark.parametrize("path", ["scripts/voc/15-5s.sh", "scripts/ade/100-10.sh"])
@pytest.mark.parametrize(("method", "rates"), [("MiB+AWT", [0.02, 0.001])])
def test_learning_rates_of_methods_that_came_later(path, method, rates, project, monkeypatch):
    monkeypatch.chdir(project)
    steps = commands(project, path, METHOD=method, STEPS="0 1", DATA_ROOT="my data")[:-1]
    assert [parsed(command).lr for command in steps] == [[rate] for rate in rates]


def test_voc_5_3_runs_every_step_of_its_task_file(project, monkeypatch):
    monkeypatch.chdir(project)
    *steps, summary = commands(project, "scripts/voc/5-3.sh", METHOD="MiB+EWF", DATA_ROOT="my data", DATE="d")
    options = [parsed(command) for command in steps]
    assert [opts.step for opts in options] == [[step] for step in range(6)]
    assert all(opts.overlap and opts.resume and opts.dataset == "voc" for opts in options)
    task = load_task(options[0], 0)
    assert task.steps == (tuple(range(6)), *((c, c + 1, c + 2) for c in (6, 9, 12, 15, 18)))
    assert summary == ["python", "scripts/average_csv.py", f"results/d_voc_{task.name}_MiB+EWF.csv"]


def test_sdr_on_voc_19_1_is_the_official_script(project, monkeypatch):
    monkeypatch.chdir(project)
    first, second, _ = commands(project, "scripts/voc/19-1.sh", METHOD="SDR", DATA_ROOT="my data")
    step0, step1 = parsed(first), parsed(second)
    assert (step0.method, step0.unce, step0.loss_de_prototypes, step0.loss_featspars) == ("FT", True, 1, 0)
    assert (step1.method, step1.loss_de_prototypes, step1.loss_featspars) == ("SDR", 0.01, 0.001)
    assert {opts.overlap for opts in (step0, step1)} == {False} and {step0.opt_level, step1.opt_level} == {"O0"}


def test_alife_trains_longer_in_the_first_incremental_step_of_voc_15_1(project, monkeypatch):
    monkeypatch.chdir(project)
    for given, epochs in (({}, [30, 10, 5, 5]), ({"EPOCHS": "3"}, [30, 3, 3, 3])):
        variables = {"METHOD": "ALIFE", "STEPS": "0 1 2 3", "DATA_ROOT": "my data"} | given
        steps = commands(project, "scripts/voc/15-5s.sh", **variables)[:-1]
        assert [parsed(command).epochs for command in steps] == epochs


def test_variables_and_words_of_the_user_reach_the_program(project, monkeypatch):
    monkeypatch.chdir(project)
    given = {"STEPS": "1 2", "STEP0_CKPT": "my base.pth", "GPUS": "4", "SEED": "7", "EPOCHS": "3", "PRETRAINED": ""}
    given |= {"DATA_ROOT": "my data", "NAME": "my run", "OPT_LEVEL": "O0"}
    words = ("--backbone", "resnet50", "--no_pretrained")
    first, second, _ = commands(project, "scripts/voc/15-5s.sh", *words, **given)
    assert first[first.index("--step_ckpt") + 1] == "my base.pth" and "--step_ckpt" not in second
    opts = parsed(first)
    assert (opts.backbone, opts.batch_size, opts.random_seed, opts.epochs) == ("resnet50", 6, 7, 3)
    assert (opts.name, opts.opt_level, opts.pretrained, opts.no_pretrained) == ("my run", "O0", None, True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"DATA_ROOT": "nowhere"}, "DATA_ROOT=nowhere is not a folder"),
        ({"GPUS": "0"}, "GPUS=0 is not a number of processes"),
        ({"GPUS": "two"}, "GPUS=two is not a number of processes"),
        ({"GPUS": "25"}, "GPUS=25 is more than the batch of 24 images"),
    ],
)
@pytest.mark.parametrize("script", ["scripts/voc/10-1.sh", "scripts/cityscapes/1-1.sh"])
def test_a_wrong_variable_is_said_before_anything_is_started(project, script, given, said):
    environment = os.environ | {"PYTHON": str(project.parent / "tools" / "python"), "RECORD": str(project / "record")}
    environment |= {"DATA_ROOT": "my data", **given}
    ended = subprocess.run([str(project / script)], env=environment, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {said}") and ended.stderr.count("\n") == 1
    assert not (project / "record").exists()


def test_more_gpus_than_24_where_the_published_batch_is_larger(project, monkeypatch):
    monkeypatch.chdir(project)
    given = {"METHOD": "MiB+EWF", "GPUS": "48", "STEPS": "0 1", "DATA_ROOT": "my data"}
    steps = commands(project, "scripts/ade/100-50.sh", **given)[:-1]
    assert [parsed(command).batch_size for command in steps] == [1, 1]


@pytest.mark.parametrize(("task", "code", "said"), [("6-9", 2, "error: --task '6-9'"), ("6-2", 0, "")])
def test_the_launcher_leaves_the_last_word_and_the_exit_code_to_the_program(tmp_path, task, code, said):
    words = f"--dataset shapes --task {task} --step 0 --backbone resnet18 --dry_run --device cpu --no_progress".split()
    ended = subprocess.run(
        [sys.executable, ROOT / "scripts" / "launch.py", "--standalone", "--nproc_per_node=2", ROOT / "run.py", *words],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert (ended.returncode, "Traceback" in ended.stderr) == (code, False)
    assert ended.stderr == "" if code == 0 else ended.stderr.splitlines()[-1].startswith(said)
    assert code or json.loads(ended.stdout.splitlines()[-1])["task"] == "6-2"


@pytest.mark.parametrize(
    ("processes", "words", "lacks"),
    [
        ("1", "", True),
        ("2", "--device cpu", False),
        ("2", "--device=cpu", False),
        ("gpu", "", False),
        ("3", "--device auto", True),
    ],
)
def test_gpus_are_counted_before_the_launch(processes, words, lacks, monkeypatch):
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 0)
    assert bool(launch.lack_of_gpus(processes, words.split())) == lacks
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 3)
    assert launch.lack_of_gpus(processes, words.split()) == ""
    assert "4 processes on this machine, but torch sees 3 GPU(s)" in launch.lack_of_gpus("4", [])


def test_slurm_example(project, monkeypatch):
    monkeypatch.chdir(project)
    script = "scripts/slurm/voc_15-5s.sbatch"
    (project / script).chmod(0o755)
    job = {"SLURM_JOB_ID": "812", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    steps = commands(project, script, SLURM_SUBMIT_DIR=str(project), DATA_ROOT="my data", METHOD="LSKD", **job)
    assert [parsed(command).step for command in steps] == [[step] for step in range(6)]
    assert steps[0][:2] == ["srun", "torchrun"]
    assert {"--nnodes=2", "--nproc_per_node=4", "--rdzv_endpoint=node1:20812"} <= set(steps[0])
    assert parsed(steps[0]).batch_size == 3 and parsed(steps[0]).date == "job812"


# ------------------------------------------------------------------ average_csv

ROWS = "0,0.9,0.7,x,x,0.8\n1,0.8,0.6,0.4,x,0.6\n2,0.7,0.5,0.1,0.3,0.4\n"


def test_average_csv_by_hand(tmp_path, capsys):
    (tmp_path / "run.csv").write_text(ROWS)
    step, summary = average_csv.last_summary(tmp_path / "run.csv")
    assert step == 2
    assert summary.all == pytest.approx(0.4)
    assert summary.average_over_steps == pytest.approx((0.8 + 0.6 + 0.4) / 3)
    assert summary.old == pytest.approx((0.7 + 0.5) / 2)
    assert summary.new == pytest.approx((0.1 + 0.3) / 2)
    assert average_csv.main([str(tmp_path / "run.csv")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Last Step: 2",
        "Final Mean IoU 40.00",
        "Average Mean IoU 60.00",
        "Mean IoU first 60.00",
        "Mean IoU last 20.00",
    ]


def test_average_csv_takes_rows_in_any_order_and_the_last_of_a_step(tmp_path):
    path = tmp_path / "run.csv"
    path.write_text("1,0.1,0.1,0.1\n\n0,0.5,X,0.5\n1,0.4,0.2,0.3\n")
    _, summary = average_csv.last_summary(path)
    assert (summary.old, summary.new, summary.all) == pytest.approx((0.4, 0.2, 0.3))


def test_average_csv_without_new_classes(tmp_path, capsys):
    (tmp_path / "run.csv").write_text("0,0.5,0.7,0.6\n")
    assert average_csv.main([str(tmp_path / "run.csv")]) == 0
    assert capsys.readouterr().out.endswith("Mean IoU first 60.00\nMean IoU last -\n")


@pytest.mark.parametrize("text", ["1,0.8,0.6,0.4,x,0.6\n2,0.7,0.5,0.1,0.3,0.4\n", "0,0.5,x,0.5\n2,0.4,0.2,0.3\n"])
def test_average_csv_refuses_a_gap(text, tmp_path, capsys):
    """A run that started from another run's step 0, or was not tested after each step."""
    (tmp_path / "run.csv").write_text(text)
    assert average_csv.main([str(tmp_path / "run.csv")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and f"{tmp_path / 'run.csv'} has scores of the steps" in said.err
    assert "add it with run.py --test --step" in said.err


def test_average_csv_takes_the_number_of_base_classes_from_the_json(tmp_path):
    """A class of step 0 without a pixel in the test of step 0 is an old class all the same."""
    path = tmp_path / "run.csv"
    path.write_text("0,0.8,x,x,0.8\n1,0.6,0.2,0.1,0.3\n")
    assert average_csv.last_summary(path)[1].old == pytest.approx(0.6)
    path.with_suffix(".json").write_text('{"base_classes": 2}')
    assert average_csv.last_summary(path)[1].old == pytest.approx(0.4)


@pytest.mark.parametrize(
    "text",
    ["", "step,a,b\n", "0,0.5\n", "0,0.5,0.5\n1,0.5,0.5,0.5\n", "0,y,0.5\n", "-1,0.5,0.5\n", "999999999,0.5,0.5\n"],
)
def test_average_csv_refuses_what_is_no_result(text, tmp_path, capsys):
    (tmp_path / "run.csv").write_text(text)
    assert average_csv.main([str(tmp_path / "run.csv")]) == 2
    assert str(tmp_path / "run.csv") in capsys.readouterr().err


def test_average_csv_runs_as_a_script(tmp_path):
    missing = subprocess.run(
        [sys.executable, ROOT / "scripts/average_csv.py", tmp_path / "none.csv"], capture_output=True, text=True
    )
    assert missing.returncode == 2
    assert "none.csv" in missing.stderr and "Traceback" not in missing.stderr
