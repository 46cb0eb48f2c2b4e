"""Groups of options in `--help`, which argparser.py and the parts of methods share by their titles."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any


def option_group(parser: ArgumentParser, title: str) -> Any:
    """The group with that title; it is added if the parser does not have it.

    Args:
        parser: the command line.
        title: as `--help` prints it, such as "distillation of outputs".

    Returns:
        argparse's group, to which options are added.
    """
    found = (group for group in parser._action_groups if group.title == title)
    return next(found, None) or parser.add_argument_group(title)


def add_switch(group: Any, *flags: str, help: str) -> None:
    """Add a flag without value, false by default."""
    group.add_argument(*flags, action="store_true", help=help)
