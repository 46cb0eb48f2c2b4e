"""A step that is killed at one of its iterations and resumed, beside the same step that ran through."""

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import train
from methods.phase import PhaseRun
from tests.support import thin
from utils.checkpointing import checkpoint_files


class Killed(BaseException):
    """Stands for SIGKILL: nothing is tidied up."""


#: The functions of an iteration, and their owners.
ITERATIONS = ((PhaseRun, "_iterate"), (train.Trainer, "train_iteration"))


@contextlib.contextmanager
def killed(at: int, targets=ITERATIONS) -> Iterator[None]:
    """What runs within it is killed.

    Args:
        at: the number of calls of the targets that end before the kill.
        targets: owners and names of the functions that count, the iterations of phases and training by default.
    """
    done = []

    def counted(iterate):
        def count(*args):
            if len(done) == at:
                raise Killed
            done.append(at)
            return iterate(*args)

        return count

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in targets:
            patch.setattr(owner, name, counted(getattr(owner, name)))
        with pytest.raises(Killed):
            yield


def run_twice(
    folder: Path, text: str, step: int, at: int, targets=ITERATIONS, start: Path | None = None
) -> tuple[dict, dict]:
    """Train a step without and with an interruption, from the same checkpoint of the step before.

    Args:
        folder: empty, for the outputs.
        text: the command line without --step; the steps before `step` are trained with it too.
        step: the step that is killed.
        at, targets: of `killed`; every iteration is saved.
        start: the checkpoint of the step before, which is then not trained.

    Returns:
        The checkpoints of the step that ran through and of the one that was resumed.
    """
    options = text.split()
    task = options[options.index("--task") + 1]
    file = f"checkpoints/{task}-shapes_n_{{}}.pth"
    if step and start is None:
        earlier = " ".join(str(number) for number in range(step))
        assert thin.launch(folder / "whole", f"{text} --step {earlier}") == 0
        start = folder / "whole" / file.format(step - 1)
    words = f"{text} --step {step} --ckpt_minutes 0.000001"
    words += f" --step_ckpt {shlex.quote(str(start))}" if step else ""
    assert thin.launch(folder / "whole", words) == 0
    with killed(at, targets):
        thin.launch(folder / "parts", words)
    assert thin.launch(folder / "parts", f"{words} --resume") == 0
    whole, parts = (checkpoint_files.load(folder / name / file.format(step)) for name in ("whole", "parts"))
    return whole, parts


def assert_equal_to_the_bit(whole: dict, parts: dict) -> None:
    """Both have learned the same network, states and losses."""
    for key in ("model_state", "trainer_state", "method_state", "optimizer_state"):
        assert checkpoint_files.digest(whole[key]) == checkpoint_files.digest(parts[key]), key
    assert [entry["losses"] for entry in whole["history"]] == [entry["losses"] for entry in parts["history"]]
