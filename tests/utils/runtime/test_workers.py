"""Processes that load data: whose forks they are, which signals they obey, how they end."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest

from dataset import sampler
from dataset.layout import FilePair, Layout
from dataset.sampler import Loader, PartSampler
from dataset.source import FileSource
from tests.support import loaded_sets
from tests.support.paths import ROOT
from utils.errors import UserError
from utils.runtime import memory, workers


def loader(data, lasting=False):
    return Loader(data, PartSampler(len(data)), 1, Namespace(num_workers=1, random_seed=0), False, lasting)


def processes(lasting=False):
    """A process that loads data, its parent, and the pass that keeps it."""
    batches = iter(loader(loaded_sets.Processes(), lasting))
    ((worker, server),) = next(batches).tolist()
    return worker, server, batches


def training_process(data, folder):
    """A process that says "batch" for each batch of one of the data sets, two processes loading them."""
    code = (
        "import sys; sys.path[0] = sys.argv[1]\n"
        "from argparse import Namespace; from dataset.sampler import Loader; from tests.support import loaded_sets\n"
        "data = getattr(loaded_sets, sys.argv[2])()\n"
        "for _ in Loader(data, range(len(data)), 1, Namespace(num_workers=2, random_seed=0), False): print('batch', flush=True)"
    )
    command = [sys.executable, "-c", code, ROOT, data]
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_end(process):
    for _ in range(100):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


# ------------------------------------------------------------------- their start


def test_they_are_forks_of_one_server_and_not_of_the_training():
    servers = {processes()[1] for _ in range(2)}
    assert len(servers) == 1 and os.getpid() not in servers
    tasks = Path(f"/proc/{servers.pop()}/task")
    if tasks.is_dir():
        assert all("python" in (task / "comm").read_text() for task in tasks.iterdir())


def test_they_find_everything_imported():
    """Otherwise each of them would import for seconds, at each start of a pass."""
    assert next(iter(loader(loaded_sets.Imported(("torch", "dataset.base", "torchvision.transforms.v2", "run"))))).all()


def test_what_a_thread_of_the_training_holds_does_not_stop_them(monkeypatch):
    """A fork of the training process would wait for ever: the thread that would let go of the lock is not copied."""
    monkeypatch.setattr(workers, "STALLED_SECONDS", 20.0)
    with loaded_sets.LOCK:
        assert len(list(loader(loaded_sets.Locked()))) == 4
    workers.kill_workers()


def test_modules_of_the_working_folder_do_not_stand_in_for_those_of_the_program(tmp_path):
    (tmp_path / "dataset").mkdir()
    for name in ("dataset/__init__.py", "torch.py", "socket.py", "run.py"):
        (tmp_path / name).write_text("raise SystemExit('not this one')")
    training = training_process("Four", tmp_path)
    assert training.communicate(timeout=60) == ("batch\n" * 4, "")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not say what a process has open")
def test_they_hold_no_file_of_the_training(tmp_path):
    """Such as its lock on the checkpoint, which the system would else release only when they have ended, too."""
    with (tmp_path / "lock").open("w"):
        worker, _, batches = processes()
        held = {os.readlink(path) for path in Path(f"/proc/{worker}/fd").iterdir()}
        assert str(tmp_path / "lock") not in held
        batches.close()


class Many(Layout):
    """A split of as many files as are asked for, which need not exist."""

    name, hint, classes = "many", "", ("background", "cat")

    def __init__(self, count):
        self.count = count

    def pairs(self, root, train):
        names = (f"{root}/train/{number:08d}" for number in range(self.count))
        return [FilePair(f"{name}.jpg", f"{name}.png") for name in names]


def test_they_are_sent_little_however_many_files_a_data_set_has(tmp_path):
    few, many = (FileSource(Many(count), tmp_path, train=True) for count in (10, 10_000))
    assert many.files(9_999) == (f"{tmp_path}/train/00009999.jpg", f"{tmp_path}/train/00009999.png")
    few, many = (len(ForkingPickler.dumps(source)) for source in (few, many))
    assert many - few < 100_000  # eight bytes an image


def test_a_program_that_loads_no_images_itself_does_not_wait_for_torchvision():
    code = "import sys, run; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# --------------------------------------------------------------------- signals


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="a process does not learn who signals it")
def test_they_and_their_server_obey_the_training_alone():
    worker, server, batches = processes(lasting=True)
    for number in (signal.SIGTERM, signal.SIGINT):  # from a batch system or a terminal
        for process in (worker, server):
            subprocess.run(["kill", f"-{number}", str(process)], check=True)
    time.sleep(0.5)
    assert next(batches).tolist() == [[worker, server]]
    os.kill(worker, signal.SIGTERM)
    assert wait_for_end(worker)


def test_a_killed_training_leaves_no_process_and_no_warning(tmp_path):
    training = training_process("Endless", tmp_path)
    assert training.stdout.readline() == "batch\n"
    os.kill(training.pid, signal.SIGKILL)
    # All processes of the training have these pipes: they are at their end when the last process is
    assert "leaked" not in training.communicate(timeout=10)[1]


# ------------------------------------------------------------------- their end


def test_a_pass_that_is_broken_off_ends_them():
    worker, _, batches = processes()
    batches.close()
    assert wait_for_end(worker)


def test_a_closed_loader_ends_them():
    lasting = loader(loaded_sets.Processes(), lasting=True)
    assert len({tuple(batch[0].tolist()) for _ in range(2) for batch in lasting}) == 1  # kept from pass to pass
    (process,) = multiprocessing.active_children()
    lasting.close()
    assert wait_for_end(process.pid)


def test_one_that_is_stuck_ends_the_run(monkeypatch):
    monkeypatch.setattr(workers, "STALLED_SECONDS", 1.0)
    batches = iter(loader(loaded_sets.Stuck(), lasting=True))
    next(batches)
    (process,) = multiprocessing.active_children()
    with pytest.raises(UserError, match="have delivered nothing for 1 seconds"):
        next(batches)
    assert process.exitcode == -signal.SIGKILL


def test_one_that_is_slow_is_waited_for(monkeypatch):
    monkeypatch.setattr(workers, "STALLED_SECONDS", 1.0)
    assert len(list(loader(loaded_sets.Slow(0.5)))) == 4


def test_one_that_is_gone_is_noticed():
    began = time.monotonic()
    with pytest.raises(
        (RuntimeError, UserError)
    ) as raised:  # torch's error, or that of the connection, whichever is first
        list(loader(loaded_sets.Killed()))
    assert time.monotonic() - began < 15
    assert "a process that loads data ended" in (memory.shortage(raised.value) or str(raised.value))


def test_one_that_ends_while_its_batch_is_fetched_is_said(monkeypatch):
    def fetch(_):
        """What torch raises if the connection to a worker breaks before the system has removed its process."""
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        yield

    monkeypatch.setattr(sampler.DataLoader, "__iter__", fetch)
    with pytest.raises(UserError, match="a process that loads data ended"):
        list(loader(loaded_sets.Four()))


def test_an_error_of_a_connection_in_the_data_set_is_not_taken_for_a_lost_process():
    with pytest.raises(ConnectionResetError, match="the store of images closed"):
        list(loader(loaded_sets.Remote()))


def test_a_server_that_is_gone_is_started_again():
    _, server, batches = processes()
    batches.close()
    os.kill(server, signal.SIGKILL)
    time.sleep(0.2)
    assert processes()[1] != server
