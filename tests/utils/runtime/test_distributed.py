"""Two processes: the numbers of one, every image once, errors said once, nobody left waiting."""

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import dataset
import run
import train
from dataset.sampler import EpochSampler, PartSampler
from tests.support import thin
from utils.checkpointing import checkpoint_files
from utils.errors import UserError
from utils.runtime import distributed, errors, gate

#: An odd number of validation images, and a norm whose statistics are those of all processes.
COMMON = "--task 6-2 --norm_act iabn_sync --shapes_train 16 --shapes_val 5 "
FIRST = COMMON + "--step 0 --method FT --epochs 2"
SECOND = COMMON + "--step 1 --method LSKD --epochs 2"

#: In this order, each in a folder of its own or in the one that its name begins with: command line, what happens in process 1.
SCENARIOS = {
    "base": (FIRST, None),
    "base second": (SECOND, None),
    "stopped": (FIRST, "stop"),
    "stopped resumed": (FIRST + " --resume", None),
    "stopped finished": (FIRST + " --resume", None),
    "refused": (COMMON + "--step 2", None),
    "small": (COMMON + "--step 0 --batch_size 9", None),
    "line": (COMMON + "--step 0 --epochs 0", None),
    "words": ("--no_such_flag", None),
    "dry": (COMMON + "--step 0 1 --dry_run", None),
    "norms": (FIRST + " --norm_act iabn --fix_bn --num_workers 1", None),
    "nan": (FIRST, "nan"),
    "skipped": (FIRST + " --skip_nonfinite 1", "nan"),
    "gated": (FIRST + " --skip_nonfinite 1", "nan"),  # as "skipped", the losses read as on CUDA
    "unreadable": (FIRST, "unreadable"),  # the last: process 1 ends by it
}


def process(rank, ports, folder):
    """One of the two processes: goes through the scenarios and writes down how each ended."""
    multiprocessing.set_start_method(
        "fork", force=True
    )  # of the workers that load data, as in a program started by hand
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
    }
    for port, (name, (text, fault)) in zip(ports, SCENARIOS.items()):
        os.environ["MASTER_PORT"] = str(port)
        out, err, notes = io.StringIO(), io.StringIO(), {"iterations": []}
        started = time.monotonic()
        with (
            thin.program(),
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            record(patch, notes)
            if name == "gated":
                patch.setattr(gate, "ASYNCHRONOUS", ("cuda", "cpu"))
            if fault is not None and rank == 1:
                cause(patch, fault)
            try:
                code = thin.launch(folder / name.split()[0], text)
            except SystemExit as ended:
                code = ended.code
        notes |= {"code": code, "out": out.getvalue(), "err": err.getvalue(), "seconds": time.monotonic() - started}
        (folder / f"{name}.{rank}.json").write_text(json.dumps(notes))


def record(patch, notes):
    """Keep the losses of every iteration, and λ and thresholds at the end."""
    iteration, test = train.Trainer.train_iteration, run.StepRun._test

    def train_iteration(self, images, labels):
        values = iteration(self, images, labels)
        notes["iterations"].append(values)
        return values

    def tested(self, trainer, *more):
        thresholds = [part.thresholds for part in trainer.method.parts if getattr(part, "thresholds", None) is not None]
        notes["thresholds"] = [values.tolist() for values in thresholds]
        weights = trainer.balancer.loss_weights
        notes["lambda"] = [float(weight) for weight in weights.values()] or None
        gradients = [parameter.grad for parameter in trainer.network.parameters() if parameter.grad is not None]
        notes["gradients"] = len(gradients)
        notes["gradient_buffers"] = len({gradient.untyped_storage().data_ptr() for gradient in gradients})
        notes["digest"] = checkpoint_files.digest(trainer.network.state_dict())
        test(self, trainer, *more)

    patch.setattr(train.Trainer, "train_iteration", train_iteration)
    patch.setattr(run.StepRun, "_test", tested)


def cause(patch, fault):
    """What happens to this process at its third iteration."""
    iteration, calls = train.Trainer.train_iteration, []

    def train_iteration(self, images, labels):
        calls.append(1)
        if len(calls) == 3:
            if fault == "stop":
                os.kill(os.getpid(), signal.SIGTERM)
            elif fault == "unreadable":
                raise UserError("image b.png cannot be read")
            elif fault == "nan":
                images = images * float("nan")
        return iteration(self, images, labels)

    patch.setattr(train.Trainer, "train_iteration", train_iteration)


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """How every scenario ended: name -> the notes of both processes; and the folder, which parallel test processes share."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "two"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            run_scenarios(folder)
    notes = {
        name: [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(2)] for name in SCENARIOS
    }
    return notes, folder


def run_scenarios(folder):
    ports = free_ports(len(SCENARIOS))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=process, args=(rank, ports, folder)) for rank in range(2)]
    for one in processes:
        one.start()
    for one in processes:
        one.join(timeout=240)
    codes = [one.exitcode for one in processes]
    for one in processes:
        if one.is_alive():
            one.kill()
    assert codes == [0, 0], "a process hangs or died"


def codes(ended, name):
    return [notes["code"] for notes in ended[0][name]]


@pytest.fixture(scope="module")
def alone(ended, tmp_path_factory):
    """The same two steps in one process with the same global batch; the second on the base of the two."""
    folder, notes = tmp_path_factory.mktemp("one"), {}
    for name, text in (("base", FIRST), ("second", SECOND)):
        notes[name] = {"iterations": []}
        if name == "second":
            (folder / "base").rename(folder / "first")
            shutil.copytree(ended[1] / "base" / "checkpoints", folder / "base" / "checkpoints")
        with thin.program(), pytest.MonkeyPatch.context() as patch:
            record(patch, notes[name])
            assert thin.launch(folder / "base", text + " --batch_size 4") == 0
    return notes, folder


# ---------------------------------------------------------------- the same numbers


def close(mine, theirs, relative):
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert mine[name] == pytest.approx(value, rel=relative, abs=1e-7), name


@pytest.mark.parametrize(("two", "one"), [("base", "base"), ("base second", "second")])
def test_losses_are_those_of_one_process(ended, alone, two, one):
    assert codes(ended, two) == [0, 0]
    first, second = (notes["iterations"] for notes in ended[0][two])
    assert first == second and len(first) == len(alone[0][one]["iterations"]) > 3
    close(first[0], alone[0][one]["iterations"][0], 1e-5)
    for mine, theirs in zip(first, alone[0][one]["iterations"]):
        close(mine, theirs, 2e-2)


def test_lambda_and_thresholds_are_equal_everywhere(ended, alone):
    first, second = ended[0]["base second"]
    assert first["lambda"] == second["lambda"] and len(first["lambda"]) == 9
    assert first["lambda"] != [1.0] * 9
    assert first["lambda"] == pytest.approx(alone[0]["second"]["lambda"], rel=1e-3)
    assert first["thresholds"] == second["thresholds"] and len(first["thresholds"][0]) == 9
    assert first["thresholds"][0] == pytest.approx(alone[0]["second"]["thresholds"][0], rel=1e-4)


def test_weights_and_statistics_are_equal_everywhere(ended):
    for name in ("base", "base second", "stopped resumed", "skipped"):
        assert ended[0][name][0]["digest"] == ended[0][name][1]["digest"], name


def test_gradients_are_views_of_the_buffers_that_are_sent(ended, alone):
    for notes in ended[0]["base"]:
        assert 0 < notes["gradient_buffers"] < notes["gradients"]
    assert alone[0]["base"]["gradient_buffers"] == alone[0]["base"]["gradients"] > 1


def test_scores_are_alike_and_every_image_counts_once(ended, alone):
    mine, theirs = thin.document(ended[1] / "base")["steps"], thin.document(alone[1] / "first")["steps"]
    assert mine["0"]["all"] == pytest.approx(theirs["0"]["all"], abs=0.02)
    assert mine["1"]["all"] == pytest.approx(thin.document(alone[1] / "base")["steps"]["1"]["all"], abs=0.02)
    opts = thin.options("--shapes_val 5")
    for step in (0, 1):
        test = dataset.build(opts, dataset.load_task(opts, step)).test
        assert len(test) % 2 == 1
        truth = torch.cat([test[index][1].flatten() for index in range(len(test))]).long()
        counted = torch.bincount(truth[truth != 255], minlength=(7, 9)[step])
        assert [sum(row) for row in mine[str(step)]["confusion_matrix"]] == counted.tolist()


# ------------------------------------------------------------------- said once


def said(ended, name):
    """What each process wrote to stderr."""
    return [notes["err"] for notes in ended[0][name]]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("refused", "6-2-shapes_n_1.pth does not exist"),
        ("small", "fewer than one batch of 9 x 2 process(es)"),
        ("line", "--epochs 0 is out of range"),
        ("words", "--no_such_flag"),
    ],
)
def test_users_errors_are_said_once(ended, name, text):
    first, second = said(ended, name)
    assert codes(ended, name) == [2, 2]
    assert text in first and "Traceback" not in first
    assert second == ""


def test_the_main_process_speaks(ended):
    assert [len(notes["out"].splitlines()) for notes in ended[0]["dry"]] == [2, 0]
    first, second = (notes["out"] for notes in ended[0]["base"])
    assert "2 process(es)" in first and "mIoU" in first
    assert second == ""
    assert said(ended, "base") == ["", ""]


def test_a_non_finite_loss_of_one_is_one_of_all(ended):
    assert codes(ended, "nan") == [3, 3]
    first, second = said(ended, "nan")
    assert second == "" and first.startswith("error: non-finite loss at step 0, epoch 1, iteration 3: ce nan")
    assert first.count("shapes/train/") == 4  # the batches of both processes
    assert checkpoint_files.load(ended[1] / "nan" / "checkpoints" / "6-2-shapes_n_0.nonfinite.pth")["state"]["model"]
    assert codes(ended, "skipped") == [0, 0]
    assert codes(ended, "gated") == [0, 0]
    assert [notes["digest"] for notes in ended[0]["gated"]] == [notes["digest"] for notes in ended[0]["skipped"]]
    assert [values for notes in ended[0]["gated"] for values in notes["iterations"]].count(None) > 0


def test_norms_can_be_fixed(ended):
    assert codes(ended, "norms") == [0, 0]


# ------------------------------------------------------- stopped, continued, lost


def test_a_stop_request_of_one_is_one_of_all(ended):
    assert codes(ended, "stopped") == [143, 143]
    assert said(ended, "stopped") == ["stopped by SIGTERM; the same command with --resume continues\n", ""]
    assert [len(notes["iterations"]) for notes in ended[0]["stopped"]] == [3, 3]
    assert codes(ended, "stopped resumed") == [0, 0]
    assert "resumed step 0 at epoch 1/2, iteration 4/4" in ended[0]["stopped resumed"][0]["out"]
    assert ended[0]["stopped resumed"][0]["digest"] == ended[0]["base"][0]["digest"]
    assert thin.rows(ended[1] / "stopped")[0] == thin.rows(ended[1] / "base")[0]
    assert codes(ended, "stopped finished") == [0, 0]
    assert "step 0 of 6-2 is finished" in ended[0]["stopped finished"][0]["out"]


def test_an_error_of_one_ends_the_others(ended):
    assert codes(ended, "unreadable") == [errors.PEER_LOST, 2]
    first, second = said(ended, "unreadable")
    assert second == "error: image b.png cannot be read\n"
    assert first.startswith("error: process 0 ends because another process ended") and first.count("\n") == 1
    assert ended[0]["unreadable"][0]["seconds"] < 60


# ------------------------------------------------------------ without processes


def test_one_process_is_the_identity(monkeypatch):
    tensor = torch.ones(2)
    assert (distributed.rank(), distributed.world_size(), distributed.active()) == (0, 1, False)
    assert distributed.sum_(tensor) is tensor and distributed.mean_(tensor) is tensor
    assert distributed.gather_objects("x") == ["x"] and distributed.max_over_ranks(3) == 3
    for run_it in (distributed.on_main, distributed.run_on_all):
        assert run_it(lambda: 5) == 5
        with pytest.raises(FileNotFoundError):  # as it was raised
            run_it((Path("no") / "file").read_text)


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_a_broken_environment_is_named(variable, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv(variable, "two")
    with pytest.raises(ValueError, match=f"{variable}='two' in the environment is not a number"):
        distributed.initialise("cpu")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"RANK": ""}, "but RANK is not set"),
        ({"MASTER_ADDR": ""}, "but MASTER_ADDR is not set"),
        ({"MASTER_PORT": ""}, "but MASTER_PORT is not set"),
        ({"RANK": "x"}, "RANK='x' in the environment is not a number"),
        ({"RANK": "2"}, "announces 2 processes, but RANK=2"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
    ],
)
def test_processes_that_could_not_find_each_other_are_refused(changed, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    whole = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (whole | changed).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        distributed.initialise("cpu")


def test_a_process_that_was_never_started_is_not_waited_for_as_long_as_one_that_works(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(distributed, "RENDEZVOUS_TIMEOUT", timedelta(seconds=1))
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    for name, value in ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"} | where).items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with pytest.raises(torch.distributed.DistError) as caught:
        distributed.initialise("cpu")
    assert time.monotonic() - began < 30 and distributed.peer_lost(caught.value)


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda: torch sees no CUDA device"):
        distributed.initialise("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert distributed.initialise("auto", 1) == torch.device("cuda", 1) == chosen[0]
    assert distributed.initialise("cpu", 1) == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")  # wins over the flag
    assert distributed.initialise("auto", 1) == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"4 processes on this machine, but torch sees 2 GPU\(s\)"):
        distributed.initialise("auto")


# -------------------------------------------------------------------- samplers


def test_batches_of_all_processes_are_the_batch_of_one():
    one = EpochSampler(23, 6, seed=1)
    parts = [EpochSampler(23, 2, seed=1, rank=rank, world_size=3) for rank in range(3)]
    assert one.batches == 3 and all(part.batches == 3 and len(part) == 6 for part in parts)
    for epoch in range(2):
        for sampler in (one, *parts):
            sampler.set_position(epoch)
        for number in range(3):
            assert sorted(index for part in parts for index in part.batch(number)) == sorted(one.batch(number))
    assert len({index for part in parts for index in part}) == 18


def test_an_epoch_can_be_entered_anywhere():
    sampler = EpochSampler(11, 2, seed=3)
    whole = list(sampler)
    assert len(whole) == 10 and len(set(whole)) == 10
    sampler.set_position(0, 3)
    assert list(sampler) == whole[6:] and len(sampler) == 4
    sampler.set_position(1)
    assert list(sampler) != whole
    assert list(EpochSampler(11, 2, seed=4)) != whole
    assert list(EpochSampler(11, 2, seed=3, step=1)) != whole


def test_evaluation_is_dealt_out_once():
    for length in (0, 1, 5, 8):
        parts = [list(PartSampler(length, rank, 3)) for rank in range(3)]
        assert sorted(index for part in parts for index in part) == list(range(length))
        assert [len(PartSampler(length, rank, 3)) for rank in range(3)] == [len(part) for part in parts]
