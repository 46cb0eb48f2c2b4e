"""Shared set-up: one torch thread per test process, so that parallel test processes do not fight for the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start

import torch

torch.set_num_threads(1)
