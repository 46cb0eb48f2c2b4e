"""Stop requests: remembered, restored, obeyed at once the second time."""

import os
import signal

import pytest

from dataset.sampler import FixedBatches, Interruptible
from utils.runtime import signals
from utils.runtime.signals import Stopped, StopRequest


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
