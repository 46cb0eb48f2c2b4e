"""Interrupted anywhere, a run goes on with --resume and ends where an uninterrupted one ends, to the bit."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

import run
import train
from metrics import evaluation
from tests.stress.fault_saving import make_older
from tests.support import thin
from tests.support.events import curves, read_events
from tests.support.paths import ROOT
from utils.checkpointing import checkpoint_files, header
from utils.checkpointing.store import Store
from utils.reporting import results
from utils.runtime import amp

#: Commands of the last step of a run, and those of the steps before it.
COMMANDS = {
    "ft": ("--task 6-2 --step 0 --method FT --epochs 3", []),
    "lskd": (
        "--task 6-2 --step 1 --method LSKD --epochs 3 --shapes_train 16 --shapes_val 6",
        ["--task 6-2 --step 0 --method FT"],
    ),
    "rw": (
        "--task 6-2 --step 1 --method RW --epochs 2 --reg_iterations 2 --shapes_train 20",
        ["--task 6-2 --step 0 --method RW"],
    ),
    "half": ("--task 6-2 --step 0 --method FT --epochs 2 --opt_level O1 --amp_dtype float16", []),
}
LAST = {"ft": 0, "lskd": 1, "rw": 1, "half": 0}


class Killed(BaseException):
    """What SIGKILL leaves of a run, as far as one process can play it: nothing below catches it."""


pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """For each command: the folder of the steps before it, and what the uninterrupted run left."""
    found = {}
    with thin.program():
        for name, (command, before) in COMMANDS.items():
            folder = tmp_path_factory.mktemp(name)
            for text in before:
                assert thin.launch(folder / "before", text) == 0
            (folder / "before").mkdir(exist_ok=True)
            shutil.copytree(folder / "before", folder / "whole")
            assert thin.launch(folder / "whole", command) == 0
            found[name] = folder
    return found


def outcome(folder, step):
    """All that counts in the end: the checkpoint but for its options, the rows, the JSON of the steps."""
    state = checkpoint_files.load(thin.checkpoint(folder, step))
    state.pop("options")
    return checkpoint_files.digest(state), thin.rows(folder), thin.document(folder)["steps"]


def leftovers(folder):
    names = [path.name for path in (folder / "checkpoints").iterdir()] + [
        path.name for path in (folder / "results").iterdir()
    ]
    return sorted(name for name in names if not name.endswith((".lock", ".csv", ".json", ".yaml", "_pictures")))


def check(folder, whole, name):
    step = LAST[name]
    assert outcome(folder, step) == outcome(whole[name] / "whole", step)
    assert leftovers(folder) == [f"6-2-shapes_n_{number}.pth" for number in range(step + 1)]


@pytest.fixture
def copy_of(whole, tmp_path):
    def copy(name):
        shutil.copytree(whole[name] / "before", tmp_path / name)
        return tmp_path / name

    return copy


def interrupt(monkeypatch, target, when, action, after=False):
    """Do something before (after) the n-th call of a function, or the call whose last argument ends so."""
    owner, name = target
    original, calls = getattr(owner, name), []

    def patched(*args, **kwargs):
        calls.append(1)
        now = len(calls) == when if isinstance(when, int) else str(args[-1]).endswith(when)
        if now and not after:
            action()
        value = original(*args, **kwargs)
        if now and after:
            action()
        return value

    monkeypatch.setattr(owner, name, patched)


def kill():
    raise Killed


# ------------------------------------------------------------------------ kills

PLACES = {
    "before the thresholds": ((run.methods.Method, "begin_step"), 1, False),
    "after the thresholds": ((run.methods.Method, "begin_step"), 1, True),
    "first iteration": ((train.Trainer, "train_iteration"), 1, False),
    "middle of epoch 1": ((train.Trainer, "train_iteration"), 2, True),
    "middle of epoch 2": ((train.Trainer, "train_iteration"), 6, False),
    "last iteration": ((train.Trainer, "train_iteration"), 12, True),
    "before the optimiser": ((amp.Precision, "step"), 4, False),
    "end of epoch 1": ((train.Trainer, "_end_epoch"), 1, True),
    "end of the last epoch": ((train.Trainer, "_end_epoch"), 3, True),
    "before saving that a step begins": ((Store, "begin"), 1, False),
    "before writing epoch 1": ((checkpoint_files, "_serialise"), 2, False),
    "epoch 1 written": ((checkpoint_files, "_serialise"), 2, True),
    "epoch 1 read back": ((checkpoint_files, "_read_back"), 2, True),
    "epoch 2 renamed": ((checkpoint_files, "_sync_folder"), 3, False),
    "validation 1": ((evaluation.StreamSegMetrics, "update"), 1, True),
    "validation 2": ((evaluation.StreamSegMetrics, "get_results"), 2, True),
    "finished, not written": ((Store, "save_finished"), 1, False),
    "finished, written": ((checkpoint_files, "discard"), 2, True),
    "finished, saved": ((Store, "save_finished"), 1, True),
    "test": ((evaluation.StreamSegMetrics, "get_results"), 4, False),
    "before the results": ((results, "write"), 1, False),
    "between CSV and JSON": ((os, "replace"), ".json", False),
    "after the results": ((results, "write"), 1, True),
}


@pytest.mark.parametrize("place", PLACES)
def test_killed_anywhere(place, whole, copy_of, monkeypatch):
    folder = copy_of("lskd")
    command = COMMANDS["lskd"][0]
    with monkeypatch.context() as patch:
        target, when, after = PLACES[place]
        interrupt(patch, target, when, kill, after)
        with pytest.raises(Killed):
            thin.launch(folder, command + " --resume")
    if not (
        folder / "checkpoints" / "6-2-shapes_n_1.pth"
    ).exists():  # a process that is really killed does not clean up
        for name in ("1.resume.pth", "1.pth"):
            (folder / "checkpoints" / f".6-2-shapes_n_{name}.writing").write_bytes(b"PK half a file")
    assert thin.launch(folder, command + " --resume") == 0
    check(folder, whole, "lskd")


@pytest.mark.parametrize("nth", [1, 4, 9])
def test_killed_while_measuring_importance(nth, whole, copy_of, monkeypatch):
    folder = copy_of("rw")
    with monkeypatch.context() as patch:
        interrupt(patch, (train.Trainer, "train_iteration"), nth, kill, after=True)
        with pytest.raises(Killed):
            thin.launch(folder, COMMANDS["rw"][0] + " --ckpt_minutes 1e-9")
    assert thin.launch(folder, COMMANDS["rw"][0] + " --resume") == 0
    check(folder, whole, "rw")


def test_the_scaler_of_half_precision_goes_on(whole, copy_of, monkeypatch):
    folder = copy_of("half")
    with monkeypatch.context() as patch:
        interrupt(patch, (train.Trainer, "train_iteration"), 8, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert thin.launch(folder, COMMANDS["half"][0]) == 143
    state = checkpoint_files.load(folder / "checkpoints" / "6-2-shapes_n_0.resume.pth")["state"]["precision"]
    assert state["scale"] > 1 and state["_growth_tracker"] > 0
    assert thin.launch(folder, COMMANDS["half"][0] + " --resume") == 0
    check(folder, whole, "half")


def test_killed_again_and_again(whole, copy_of, monkeypatch):
    """At every second iteration of what is left, saving by the clock: each start gains two iterations."""
    folder, starts = copy_of("ft"), 0
    command = COMMANDS["ft"][0] + " --resume --ckpt_minutes 1e-9 --num_workers 1"
    while True:
        starts += 1
        with monkeypatch.context() as patch:
            interrupt(patch, (train.Trainer, "train_iteration"), 3, kill)
            try:
                assert thin.launch(folder, command) == 0
                break
            except Killed:
                assert starts < 20
    assert starts == 9  # 18 iterations
    check(folder, whole, "ft")


# ---------------------------------------------------------------- stop requests


STOPS = {
    "begin": ((run.methods.Method, "begin_step"), 1, signal.SIGTERM),
    "iteration 1": ((train.Trainer, "train_iteration"), 1, signal.SIGINT),
    "iteration 6": ((train.Trainer, "train_iteration"), 6, signal.SIGTERM),
    "last iteration": ((train.Trainer, "train_iteration"), 12, signal.SIGTERM),
    "validation": ((evaluation.StreamSegMetrics, "update"), 3, signal.SIGINT),
    "saving": ((Store, "save_unfinished"), 2, signal.SIGTERM),
    "test": ((evaluation.StreamSegMetrics, "update"), 8, signal.SIGTERM),
}


@pytest.mark.parametrize("place", STOPS)
def test_a_stop_request_is_obeyed_and_continued(place, whole, copy_of, monkeypatch, capsys):
    folder = copy_of("lskd")
    target, nth, number = STOPS[place]
    with monkeypatch.context() as patch:
        interrupt(patch, target, nth, lambda: os.kill(os.getpid(), number))
        before = signal.getsignal(number)
        assert thin.launch(folder, COMMANDS["lskd"][0]) == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
        assert signal.getsignal(number) == before
    out, err = capsys.readouterr()
    assert err == f"stopped by {number.name}; the same command with --resume continues\n"
    assert thin.launch(folder, COMMANDS["lskd"][0] + " --resume") == 0
    out = capsys.readouterr().out
    assert ("resumed step 1 at epoch" in out) == (place not in ("begin", "test"))
    if place == "iteration 6":
        assert "resumed step 1 at epoch 2/3, iteration 3/4" in out
    check(folder, whole, "lskd")


def test_a_stop_request_between_steps(tmp_path, monkeypatch, capsys):
    text = "--task 6-2 --step 0 1 --method FT"
    with monkeypatch.context() as patch:
        interrupt(patch, (results, "write"), 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert thin.launch(tmp_path, text) == 143
    assert [row[0] for row in thin.rows(tmp_path)] == ["0"]
    capsys.readouterr()
    assert thin.launch(tmp_path, text + " --resume") == 0
    assert "step 0 of 6-2 is finished" in capsys.readouterr().out
    assert [row[0] for row in thin.rows(tmp_path)] == ["0", "1"]


def start_thin(folder, text):
    """The program with thin networks in a process group of its own."""
    code = (
        "import sys, pathlib; from tests.support import thin\n"
        "with thin.program(): code = thin.launch(pathlib.Path(sys.argv[1]), sys.argv[2])\n"
        "sys.exit(code)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder), text], cwd=ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_signals_to_the_whole_process_group(tmp_path):
    """As a batch system sends them: the processes that load data get them too."""
    text = "--task 6-2 --step 0 --method FT --epochs 6 --num_workers 1 --resume"
    signals = {"terminated": signal.SIGTERM, "killed": signal.SIGKILL}
    processes = {name: start_thin(tmp_path / name, text) for name in signals}
    errors = {}
    for name, process in processes.items():
        next(line for line in process.stdout if line.startswith("step 0 epoch 2/6: ce"))
        os.killpg(process.pid, signals[name])
    for name, process in processes.items():
        errors[name] = process.communicate(timeout=60)[1]
    assert errors == {"terminated": "stopped by SIGTERM; the same command with --resume continues\n", "killed": ""}
    assert [process.returncode for process in processes.values()] == [143, -signal.SIGKILL]
    for name in ("whole", *signals):
        assert thin.launch(tmp_path / name, text) == 0
        assert outcome(tmp_path / name, 0) == outcome(tmp_path / "whole", 0)


# ------------------------------------------------------- finished, begun, changed


def test_a_finished_step_says_so_and_the_next_follows(whole, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(whole["ft"] / "whole", folder)
    command = COMMANDS["ft"][0] + " --resume"
    written = (folder / "checkpoints" / "6-2-shapes_n_0.pth").stat().st_mtime_ns
    for _ in range(2):
        assert thin.launch(folder, command) == 0
        assert "step 0 of 6-2 is finished: " in capsys.readouterr().out
    assert (folder / "checkpoints" / "6-2-shapes_n_0.pth").stat().st_mtime_ns == written
    check(folder, whole, "ft")
    assert thin.launch(folder, command + " --step 0 1") == 0
    out = capsys.readouterr().out
    assert "step 0 of 6-2 is finished" in out and "step 1 of 6-2: test mIoU" in out
    assert thin.launch(folder, command + " --step 0 1") == 0
    assert "step 1 of 6-2 is finished" in capsys.readouterr().out
    (folder / "checkpoints" / "6-2-shapes_n_0.pth").unlink()  # to save space, say
    assert thin.launch(folder, command + " --step 1") == 0


def test_a_step_run_anew_does_not_take_old_files_for_its_own(whole, tmp_path, monkeypatch):
    """Trained anew without --resume, killed at once: a later --resume must neither find it finished nor go on from before."""
    folder, anew = tmp_path / "copy", COMMANDS["ft"][0]
    shutil.copytree(whole["ft"] / "whole", folder)
    make_older(folder)
    old = thin.document(folder)
    with monkeypatch.context() as patch:
        interrupt(patch, (train.Trainer, "train_iteration"), 2, kill)
        with pytest.raises(Killed):
            thin.launch(folder, anew)
    with monkeypatch.context() as patch:  # and again, with its results not yet written
        interrupt(patch, (results, "write"), 1, kill)
        with pytest.raises(Killed):
            thin.launch(folder, anew + " --resume")
    assert thin.document(folder) == old
    assert thin.launch(folder, anew + " --resume") == 0
    assert outcome(folder, 0) == outcome(whole["ft"] / "whole", 0)


def test_a_refused_command_leaves_the_interrupted_run_alone(whole, copy_of, monkeypatch, capsys):
    folder = copy_of("ft")
    with monkeypatch.context() as patch:
        interrupt(patch, (train.Trainer, "train_iteration"), 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert thin.launch(folder, COMMANDS["ft"][0]) == 143
    state = (folder / "checkpoints" / "6-2-shapes_n_0.resume.pth").read_bytes()
    capsys.readouterr()
    for changed, said in (
        ("--batch_size 3", "batch_size was 2, is 3"),
        ("--method PLOP", "method was 'FT', is 'PLOP'"),
        ("--epochs 4", "epochs was 3, is 4"),
        ("--lr 0.02", "lr_of_step was 0.01, is 0.02"),
    ):
        assert thin.launch(folder, f"{COMMANDS['ft'][0]} --resume {changed}") == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results" / "d_shapes_6-2_n.json").write_text("[")
    assert thin.launch(folder, COMMANDS["ft"][0]) == 2  # a new start, which would have replaced it
    (folder / "results" / "d_shapes_6-2_n.json").unlink()
    assert (folder / "checkpoints" / "6-2-shapes_n_0.resume.pth").read_bytes() == state
    assert thin.launch(folder, COMMANDS["ft"][0] + " --resume --num_workers 1 --print_interval 1") == 0
    check(folder, whole, "ft")


def test_a_finished_step_of_other_options_is_refused(whole, tmp_path, capsys):
    shutil.copytree(whole["ft"] / "whole", tmp_path / "copy")
    assert thin.launch(tmp_path / "copy", COMMANDS["ft"][0] + " --resume --epochs 2") == 2
    assert "epochs was 3, is 2" in capsys.readouterr().err


def test_another_number_of_processes_is_refused(copy_of, monkeypatch, capsys):
    folder = copy_of("ft")
    with monkeypatch.context() as patch:
        interrupt(patch, (train.Trainer, "train_iteration"), 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert thin.launch(folder, COMMANDS["ft"][0]) == 143
    path = folder / "checkpoints" / "6-2-shapes_n_0.resume.pth"
    state = checkpoint_files.load(path)
    state["state"]["random"] *= 2
    checkpoint_files.save(path, state)
    assert thin.launch(folder, COMMANDS["ft"][0] + " --resume") == 2
    assert "had 2 processes, this one has 1" in capsys.readouterr().err


def test_a_state_of_an_earlier_version_is_refused(copy_of, monkeypatch, capsys):
    """Its crops and its groups of the optimiser were others: it could not be continued exactly."""
    folder = copy_of("ft")
    with monkeypatch.context() as patch:
        interrupt(patch, (train.Trainer, "train_iteration"), 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert thin.launch(folder, COMMANDS["ft"][0]) == 143
    path = folder / "checkpoints" / "6-2-shapes_n_0.resume.pth"
    state = checkpoint_files.load(path)
    del state["state"]["version"]
    checkpoint_files.save(path, state)
    capsys.readouterr()
    assert thin.launch(folder, COMMANDS["ft"][0] + " --resume") == 2
    err = capsys.readouterr().err
    assert "another version of this program" in err and "without --resume" in err and err.count("\n") == 1


def test_two_runs_of_a_name_and_step_refuse_each_other(copy_of, capsys):
    folder = copy_of("lskd")
    opts = thin.options(f"--step 1 --checkpoint '{folder}/checkpoints'")
    lock = Store(opts, run.dataset.load_task(opts, 1)).lock()
    for resume in ("", " --resume"):
        assert thin.launch(folder, COMMANDS["lskd"][0] + resume) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: another run named 'n' trains step 1 of 6-2") and err.count("\n") == 1
    assert thin.launch(folder, "--task 6-2 --step 0 --test") == 0
    lock.release()
    assert thin.launch(folder, COMMANDS["lskd"][0]) == 0
    with Store(opts, run.dataset.load_task(opts, 1)).lock():  # a finished step is left alone and needs no lock
        assert thin.launch(folder, COMMANDS["lskd"][0] + " --resume") == 0
    assert "step 1 of 6-2 is finished" in capsys.readouterr().out


def test_results_of_a_night_stay_in_one_file(tmp_path, monkeypatch):
    """Without --date, a task that is continued the next day goes on in the file that it began."""
    words = thin.words(tmp_path, "--task 6-2 --method FT --resume")
    del words[words.index("--date") : words.index("--date") + 2]

    def on(day, *more):
        monkeypatch.setattr("argparser.date", type("Day", (), {"today": staticmethod(lambda: Today(day))}))
        return run.main([*words, *more])

    class Today(str):
        def isoformat(self):
            return str(self)

    with monkeypatch.context() as patch:
        interrupt(patch, (train.Trainer, "train_iteration"), 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert on("2026-01-01", "--step", "0") == 143
    assert on("2026-01-02", "--step", "0") == 0
    assert on("2026-01-03", "--step", "0", "1") == 0
    assert [path.name for path in (tmp_path / "results").glob("*.csv")] == ["2026-01-01_shapes_6-2_n.csv"]
    assert [row[0] for row in thin.rows(tmp_path)] == ["0", "1"]
    assert (
        json.loads((tmp_path / "results" / "2026-01-01_shapes_6-2_n.json").read_text())["options"]["date"]
        == "2026-01-01"
    )


LOGGED = {
    "between two saved states": ((train.Trainer, "train_iteration"), 10, False, kill),
    "after a validation": ((train.Trainer, "train_iteration"), 7, False, kill),
    "in a validation": ((evaluation.StreamSegMetrics, "update"), 2, True, kill),
    "asked to stop": ((train.Trainer, "train_iteration"), 9, True, lambda: os.kill(os.getpid(), signal.SIGTERM)),
}


@pytest.mark.parametrize("place", LOGGED)
def test_curves_are_those_of_an_uninterrupted_run(place, whole, copy_of, tmp_path, monkeypatch):
    """No point twice, none missing, as TensorBoard reads the files."""
    folder, text = copy_of("ft"), COMMANDS["ft"][0] + " --print_interval 1"
    target, nth, after, action = LOGGED[place]
    with monkeypatch.context() as patch:
        patch.setattr("utils.reporting.logger.FLUSH_SECONDS", -1)  # a killed process leaves all that it logged
        interrupt(patch, target, nth, action, after)
        with contextlib.suppress(Killed):
            assert thin.launch(folder, text) == 143
    assert thin.launch(folder, text + " --resume") == 0
    assert thin.launch(tmp_path / "calm", text) == 0
    (mine_of_step,), (theirs_of_step,) = (f.glob("logs/*/*/step-0") for f in (folder, tmp_path / "calm"))
    mine, theirs = curves(mine_of_step), curves(theirs_of_step)
    assert mine.keys() == theirs.keys() >= {"loss/ce", "val/mIoU_training_labels", "test/all", "train/learning_rate"}
    for name, curve in theirs.items():
        assert mine[name] == curve, name
    assert [step for step, _ in mine["loss/ce"]] == list(range(1, 19))
    assert [step for step, _ in mine["val/mIoU_training_labels"]] == [6, 12, 18]
    starts = [event.step for event in read_events(mine_of_step) if event.HasField("session_log")]
    assert starts == [0, 10 if place == "asked to stop" else 6]
    assert "print_interval" in header.MAY_CHANGE_ON_RESUME
