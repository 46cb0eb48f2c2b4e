"""Shared fixtures: one thread per test process keeps two-process tests fair on two cores."""

import torch

torch.set_num_threads(2)
