"""Checks that a state that was read from a file has the structure of the state that it replaces.

A file may be damaged or crafted; an optimiser, for instance, reads memory beyond the end of a momentum that is smaller than its weight.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError

#: Text that may become part of a file name.
PART_OF_FILE_NAME = re.compile(r"[\w+=,@ -][\w.+=,@ -]{0,99}", re.ASCII)

#: Exceptions raised when a state of another structure is loaded.
LOAD_ERRORS = (ValueError, LookupError, TypeError, AttributeError, AssertionError, RuntimeError, OverflowError)

#: Characters of the name of a class or of a loss term.
LONGEST_NAME = 200


#: Values of `--norm_act` whose norms use |weight| + eps as their scale; the others use the weight itself.
IN_PLACE_NORMS = ("iabn_sync", "iabn")


def misfit(mine: Any, theirs: Any, place: str) -> str:
    """Find the first place at which the structure of a state that was read differs from the expected one.

    Args:
        mine: the expected state: dicts, lists, tuples, tensors and plain values. None fits every number, None and dictionary.
        theirs: the state that was read.
        place: name of the whole state, for the result.

    Returns:
        Such as "state/scheduler/last_epoch"; "" if the structures are equal.
    """
    if isinstance(mine, dict):
        if not isinstance(theirs, dict) or set(mine) != set(theirs):
            return place
        return next(filter(None, (misfit(mine[key], theirs[key], f"{place}/{key}") for key in mine)), "")
    if isinstance(mine, (list, tuple)):
        if not isinstance(theirs, (list, tuple)) or len(mine) != len(theirs):
            return place
        return next(filter(None, (misfit(a, b, f"{place}/{k}") for k, (a, b) in enumerate(zip(mine, theirs)))), "")
    if isinstance(mine, Tensor):
        fits = isinstance(theirs, Tensor) and (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
    elif mine is None:
        fits = theirs is None or isinstance(theirs, (int, float, dict))
    elif isinstance(mine, float):
        fits = isinstance(theirs, (int, float))
    else:
        fits = type(mine) is type(theirs)
    return "" if fits else place


def require_fit(mine: Any, theirs: Any, place: str) -> None:
    """Refuse a part of an interrupted run's state whose structure differs from the expected one. Arguments as in `misfit`.

    Raises:
        UserError: names the first place.
    """
    if place := misfit(mine, theirs, place):
        raise UserError(f"--resume: {place} of the interrupted run does not fit this one; start anew without it")


def check_momenta(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimiser whose loaded state does not fit its parameters.

    Raises:
        ValueError: a momentum is of another shape or type than its weight.
    """
    for parameter, state in optimizer.state.items():
        momentum = state.get("momentum_buffer") if isinstance(state, dict) else state
        fits = momentum is None or (isinstance(momentum, Tensor) and momentum.shape == parameter.shape)
        if not fits or not isinstance(parameter, Tensor):
            raise ValueError("a momentum does not fit its weight")


def check_log(history: Any, meters: Any) -> None:
    """Refuse a history or meters that the trainer could not continue.

    Raises:
        ValueError, TypeError: the history is not one (`check_history`), or the meters are not sums and a count.
    """
    check_history(history)
    sums, count = meters
    if not is_number(count) or not _is_numbers(sums):
        raise ValueError("the meters of the training are not sums and a count")


def check_history(history: Any) -> None:
    """Refuse a history that is not a list with an entry for each epoch, which has losses and values of the balance by name.

    Args:
        history: of a checkpoint, or of the results that were written from one.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(history, list) or not all(map(_is_epoch, history)):
        raise ValueError("the history of the training is not a list of its epochs")


def _is_epoch(entry: Any) -> bool:
    if not isinstance(entry, dict) or not all(map(is_name, entry)):
        return False
    named = {key: entry.get(key) for key in ("losses", "balance")}
    others = [value for key, value in entry.items() if key not in named]
    single = all(value is None or is_number(value) or is_name(value) for value in others)
    return single and is_number(entry.get("epoch")) and all(map(_is_numbers, named.values()))


def _is_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(is_name(name) and is_number(number) for name, number in value.items())


def is_name(value: Any) -> bool:
    """Whether this is text that is accepted as the name of a class, a loss term or a phase."""
    return isinstance(value, str) and len(value) <= LONGEST_NAME and value.isprintable()


def is_number(value: Any) -> bool:
    """Whether this is a number that fits into float64 or int64."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and (isinstance(value, float) or abs(value) < 1 << 63)
    )


def is_plain(value: Any, levels: int) -> bool:
    """Whether this is a plain value, or a structure of plain values with text as keys and at most this many levels."""
    if isinstance(value, dict):
        parts, named = list(value.values()), all(isinstance(key, str) for key in value)
    elif isinstance(value, list):
        parts, named = value, True
    else:
        return value is None or isinstance(value, (str, bool)) or is_number(value)
    return named and levels > 0 and all(is_plain(part, levels - 1) for part in parts)


def scales_in_place(norm: str) -> bool:
    """Whether a norm scales by |weight| + eps; the same weights give another network with norms that scale by the weight.

    Args:
        norm: a key of `modules.norm.NORMS`.
    """
    return norm.startswith(IN_PLACE_NORMS)


@contextlib.contextmanager
def refusing_misfits() -> Iterator[None]:
    """Context for loading a state: errors of its structure are raised as UserError.

    Raises:
        UserError: a part of the state could not be loaded.
    """
    try:
        yield
    except LOAD_ERRORS as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"--resume: the state of the interrupted run does not fit this one ({type(error).__name__}); start anew without it"
        ) from error


def require_version(state: Mapping[str, Any], version: int, processes: int) -> None:
    """Refuse a state that cannot be continued exactly.

    Args:
        state: of an interrupted run.
        version: of the states of this program.
        processes: of this run.

    Raises:
        UserError: the state is of another version or of another number of processes.
    """
    if state.get("version") != version:
        raise UserError(
            "--resume: the interrupted run is of another version of this program, which would not continue it exactly; "
            "start the step anew without --resume"
        )
    before = len(state["random"])
    if before != processes:
        raise UserError(
            f"the interrupted run had {before} processes, this one has {processes}; start as many as before, or without --resume"
        )
