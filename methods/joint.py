"""Joint training: all classes are learned in one step (the task `offline`). The upper bound in the tables of the field."""

from __future__ import annotations

from methods.base import Method


class Joint(Method):
    """Fine-tuning on the task that learns everything in one step."""

    name = "Joint"
    paper = "joint training, the upper bound, as in MiB"
    year = 2020
    preset = {"task": "offline"}
