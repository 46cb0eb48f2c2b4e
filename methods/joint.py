"""Joint: all classes at once, the upper bound of every table. Plain training on the task `offline`."""

from __future__ import annotations

from methods.base import Method


class Joint(Method):
    """Fine-tuning on the task that learns everything in one step."""

    name = "Joint"
    paper = "joint training, the upper bound, as in MiB"
    year = 2020
    preset = {"task": "offline"}
