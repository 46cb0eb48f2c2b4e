"""Stop requests: remembered, restored, obeyed at once the second time."""

import multiprocessing
import os
import signal
import time
from argparse import Namespace

import pytest
import torch

from dataset import sampler
from dataset.sampler import FixedBatches, Interruptible
from utils.runtime import memory, signals
from utils.runtime.signals import Stopped, StopRequest, outlive_stop_signals


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_is_a_request(number, code):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.signum == 0
        os.kill(os.getpid(), number)
        assert stop.signum == number
    assert signal.getsignal(number) == before
    assert Stopped(number).exit_code == code
    assert str(Stopped(number)) == f"stopped by {signal.Signals(number).name}"


def test_the_second_signal_ends_the_process():
    child = os.fork()
    if child == 0:
        with StopRequest():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_a_signal_that_a_launcher_hands_on_is_the_same_request(monkeypatch):
    """torchrun sends its processes the Ctrl-C that they have had from the terminal."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    clock = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    killed = []
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += 1
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGINT
        monkeypatch.setattr(signals.os, "kill", lambda *args: killed.append(args))
        clock[0] += 10
        signal.raise_signal(signal.SIGINT)
    assert killed == [(os.getpid(), signal.SIGINT)]


def test_a_pass_ends_early_but_not_empty():
    stop = StopRequest()
    loader = Interruptible(FixedBatches([1, 2, 3]), stop)
    assert list(loader) == list(loader) == [1, 2, 3]
    stop.signum = signal.SIGTERM
    assert list(loader) == [1]


def forked(action):
    """Run an action in a child process; the child and a pipe that says "ready" once the action is done."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        action()
        os.write(write, b"ready")
        time.sleep(30)
        os._exit(1)
    assert os.read(read, 5) == b"ready"
    return child


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="a process does not learn who signals it")
def test_workers_that_load_data_obey_their_parent_alone():
    worker = forked(lambda: outlive_stop_signals(0))
    for number in signals.SIGNALS:  # from a batch system: some other process
        stranger = os.fork()
        if stranger == 0:
            os.kill(worker, number)
            os._exit(0)
        os.waitpid(stranger, 0)
    time.sleep(0.3)
    assert os.waitpid(worker, os.WNOHANG) == (0, 0)
    os.kill(worker, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 0


@pytest.mark.skipif(
    not hasattr(signal, "sigtimedwait"), reason="the workers of torch notice by themselves, after seconds"
)
def test_workers_do_not_outlive_a_killed_training():
    read, write = os.pipe()

    def start_worker():
        if os.fork() == 0:
            outlive_stop_signals(0)
            os.write(write, b"x")
            time.sleep(30)
            os._exit(1)
        assert os.read(read, 1) == b"x"

    training = forked(start_worker)
    os.close(write)
    os.kill(training, signal.SIGKILL)
    os.waitpid(training, 0)
    began = time.monotonic()
    assert os.read(read, 1) == b""  # nobody is left to write
    assert time.monotonic() - began < 5
    os.close(read)


class Stuck(torch.utils.data.Dataset):
    """Its second sample never comes, and the process that is asked for it hears nothing."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 1:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
            time.sleep(1000)
        return torch.zeros(1)


def test_a_stuck_process_that_loads_data_ends_the_run(monkeypatch):
    monkeypatch.setattr(sampler, "STALLED_SECONDS", 1)
    opts = Namespace(num_workers=1, random_seed=0)
    loader = sampler.make_loader(data := Stuck(), sampler.PartSampler(len(data)), 1, opts, False, lasting=True)
    batches = iter(loader)
    next(batches)
    with pytest.raises(RuntimeError) as raised:
        next(batches)
    assert "handed over nothing" in memory.shortage(raised.value)
    (process,) = multiprocessing.active_children()
    sampler.kill_workers()
    assert process.exitcode == -signal.SIGKILL
