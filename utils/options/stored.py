"""Options read from a checkpoint, checked as those of a command line are."""

from __future__ import annotations

from argparse import Action, ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError


def restore(parser: ArgumentParser, options: Mapping[str, Any], path: Path) -> Namespace:
    """The options of a checkpoint. Options that it lacks get their defaults; options that the parser does not know are left out.

    Args:
        parser: the command line.
        options: by dest, as `utils.checkpointing.header.plain_options` stored them.
        path: of the checkpoint, for messages.

    Raises:
        UserError: a value that the option cannot have.
    """
    values = {}
    for action in parser._actions:
        if action.dest == "help":
            continue
        value = options.get(action.dest, action.default)
        if action.dest in options and not _fits(action, value):
            raise UserError(
                f"{path} says that --{action.dest} is {str(value)[:80]!r}, which it cannot be; name a file that run.py wrote"
            )
        values[action.dest] = value
    return Namespace(**values)


def _fits(action: Action, value: Any) -> bool:
    """Whether the option can have the value, as it is stored: tuples as lists."""
    if value is None:
        return action.default is None
    if action.nargs == 0:
        return isinstance(value, bool)
    kinds = {int: (int,), float: (int, float), str: (str,), None: (str,)}
    if action.type not in kinds:  # the option has its own conversion, whose result cannot be checked here
        return isinstance(value, str | list | dict)
    elements = value if action.nargs is not None and isinstance(value, list) else [value]
    alike = all(type(element) in kinds[action.type] for element in elements)
    return (
        alike and bool(elements) and (action.choices is None or all(element in action.choices for element in elements))
    )
