"""utils/checkpointing/header.py: counts of a checkpoint become the abscissa of curves, so that they must be whole numbers."""

from pathlib import Path

import pytest

from utils.checkpointing.header import check_header
from utils.errors import UserError


@pytest.mark.parametrize("state", [{}, {"iterations": 0}, {"iterations": 7, "scheduler_state": {"last_epoch": 7}}])
def test_whole_numbers_are_counts(state):
    check_header(Path("x.pth"), state)


@pytest.mark.parametrize("value", [True, -1, 1.0, "7", None, 2**70])
def test_other_values_are_none(value):
    for state in ({"iterations": value}, {"scheduler_state": {"last_epoch": value}}):
        with pytest.raises(UserError, match=r"x\.pth does not say what it learned"):
            check_header(Path("x.pth"), state)
