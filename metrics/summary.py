"""The scores that papers report of a run: the mIoU of old, of new and of all classes after each step, and its average over the steps.

All tables, files and messages of the program use these functions. The results have the unit of the IoUs that they are computed from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from utils.errors import UserError


class Summary(NamedTuple):
    """The figures of one step; None where a figure does not exist.

    Attributes:
        old: mean IoU of the classes of step 0, background included.
        new: mean IoU of all later classes.
        all: mean IoU of all classes learned so far.
        harmonic_mean: harmonic mean of `old` and `new`.
        average_over_steps: mean of `all` over the steps from 0 to this one; None if one of them is missing.
    """

    old: float | None
    new: float | None
    all: float | None
    harmonic_mean: float | None
    average_over_steps: float | None


def summarise(class_iou: Mapping[int, Sequence[float | None]], num_base: int) -> dict[int, Summary]:
    """The figures of every step of a run.

    Args:
        class_iou: for each step the IoU of the classes in the order of learning, None for a class that is not learned yet or
            does not occur in the ground truth.
        num_base: number of classes of step 0, background included.

    Returns:
        By step, in ascending order.

    Reference: the tables of MiB (CVPR 2020), PLOP (CVPR 2021) and LSKD (TIP 2024): old = classes of step 0, new = all later ones.
    """
    groups = {step: (mean(ious[:num_base]), mean(ious[num_base:]), mean(ious)) for step, ious in class_iou.items()}
    averages = average_over_steps({step: every for step, (_, _, every) in groups.items()})
    return {
        step: Summary(old, new, every, harmonic_mean(old, new), averages[step])
        for step, (old, new, every) in sorted(groups.items())
    }


def of_old_and_new(scores: Mapping[str, Any], num_old: int) -> str:
    """The mean IoU of old and of new classes in percent, for the log of a validation that counts both, and what the old ones rest on.

    Args:
        scores: "Class IoU" by position in the order of learning, fractions, None for a class that does not occur; "Confusion Matrix",
            (C, C), whose rows are the true classes.
        num_old: number of classes known before the step, background included.

    Returns:
        A text such as ", old 61.50, new 40.25, old objects on 3.10 % of the pixels", which follows the mean of all; "-" stands for a part
        of which no class occurs. Old objects are the old classes without the background.
    """
    class_iou, matrix = scores["Class IoU"], scores["Confusion Matrix"]
    parts = {"old": range(num_old), "new": range(num_old, len(class_iou))}
    means = {name: mean(class_iou[place] for place in places) for name, places in parts.items()}
    said = "".join(f", {name} {'-' if value is None else f'{100 * value:.2f}'}" for name, value in means.items())
    share = 100 * float(matrix[1:num_old].sum()) / max(1.0, float(matrix.sum()))
    return f"{said}, old objects on {share:.2f} % of the pixels"


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are not None; None if there are none."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def harmonic_mean(old: float | None, new: float | None) -> float | None:
    """2 · old · new / (old + new), 0 where both are 0, None where one of them does not exist."""
    if old is None or new is None:
        return None
    return 2 * old * new / (old + new) if old + new else 0.0


def average_over_steps(means: Mapping[int, float | None]) -> dict[int, float | None]:
    """For each step the mean of the mIoU of all steps up to it.

    Args:
        means: mIoU over all classes by step; a None is left out of the mean.

    Returns:
        By step; None for a step before which a step is missing.
    """
    return {
        step: None if missing_steps(means, step) else mean(means[earlier] for earlier in range(step + 1))
        for step in means
    }


def missing_steps(steps: Iterable[int], last: int | None = None) -> list[int]:
    """The steps from 0 to the last one for which a run has no scores.

    Args:
        steps: those that have scores.
        last: number of the last step; None: the largest of `steps`.
    """
    present = set(steps)
    end = max(present, default=-1) if last is None else last
    return [step for step in range(end + 1) if step not in present]


def require_complete(steps: Iterable[int], source: object) -> None:
    """Refuse scores of a run that lack a step: old classes and the average over steps would be wrong.

    Args:
        steps: those that have scores.
        source: of the scores, for the message.

    Raises:
        UserError: names the first missing step and the remedy.
    """
    present = sorted(steps)
    if missing := missing_steps(present):
        raise UserError(
            f"{source} has scores of the steps {', '.join(map(str, present))}, too few for the average and the old classes: "
            f"{how_to_complete(missing)}"
        )


def how_to_complete(missing: Sequence[int]) -> str:
    """What is missing and how to add it, for messages."""
    return (
        f"step {missing[0]} has not been tested; add it with run.py --test --step {missing[0]} --ckpt CHECKPOINT and the same "
        "--name and --date"
    )
