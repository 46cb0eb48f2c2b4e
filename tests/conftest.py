"""Shared set-up: one torch thread per test process, so that parallel test processes do not fight for the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start

import pytest
import torch

from tests.support import thin
from utils.runtime import gate

torch.set_num_threads(1)


@pytest.fixture(params=[True, False], ids=["counted", "masked"])
def counted(request, monkeypatch):
    """Whether losses select rows whose number the host knows, as on the CPU, or mask the others, as on CUDA."""
    if not request.param:
        monkeypatch.setattr(gate, "ASYNCHRONOUS", ("cuda", "cpu"))
    return request.param


@pytest.fixture
def small():
    """Networks of the program have few channels (`tests.support.thin`)."""
    with thin.program():
        yield
