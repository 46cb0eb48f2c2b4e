"""docs/command-line.md against the parser: a row for every option with its names, values and default, and every preset."""

import argparse
import re

import pytest

import argparser
import methods
from methods.lskd import schemes
from tests.support.paths import ROOT
from utils.pod.options import loads

PAGE = (ROOT / "docs" / "command-line.md").read_text()
ACTIONS = [action for action in argparser.build_parser()._actions if action.dest != "help"]
KINDS = {int: "whole number", float: "number", loads: "JSON", schemes: "list"}


def values(action):
    """What can stand after an option."""
    if action.nargs == 0:
        return "switch"
    kind = ", ".join(f"`{choice}`" for choice in action.choices) if action.choices else KINDS.get(action.type, "text")
    return f"{kind}, one or more" if action.nargs == "+" else kind


def default(action):
    """The default as it would be typed."""
    value = action.default
    if action.nargs == 0 or value is None or value == "":
        return "–"
    words = {list: " ".join, tuple: ",".join}.get(type(value), str)
    return f"`{words(map(str, value)) if isinstance(value, list | tuple) else words(value)}`"


def row(action):
    """The line of the page, up to its last cell, which explains the option."""
    return f"| {', '.join(f'`{name}`' for name in action.option_strings)} | {values(action)} | {default(action)} |"


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.dest)
def test_every_option_has_its_row(action):
    meant = f"{row(action)} {argparse.HelpFormatter('')._expand_help(action)} |"
    assert row(action) in PAGE, f"docs/command-line.md lacks this row, or it has another value or default:\n{meant}"


@pytest.mark.parametrize("action", [a for a in ACTIONS if a.help.startswith("factor")], ids=lambda action: action.dest)
def test_a_factor_is_called_a_factor(action):
    """Otherwise a reader takes it for the value itself, such as a learning rate."""
    (explanation,) = re.findall(f"^{re.escape(row(action))} (.*)", PAGE, flags=re.MULTILINE)
    assert "factor" in explanation


def test_the_row_of_lr_says_which_step_gets_which_rate():
    """A rate for each place of --step, or the first for step 0 and the last for all later steps."""
    (explanation,) = re.findall(r"^\| `--lr` .*\| (.*) \|$", PAGE, flags=re.MULTILINE)
    for words in (
        "one for all steps",
        "one for each step of `--step`",
        "the first for step 0",
        "the last for all later steps",
    ):
        assert words in explanation


def test_no_row_is_of_an_option_that_does_not_exist():
    first_cells = re.findall(r"^\| (`--[^|]*) \|", PAGE, flags=re.MULTILINE)
    named = {name for cell in first_cells for name in re.findall(r"`(--[\w-]+)`", cell)}
    assert named == {name for action in ACTIONS for name in action.option_strings}


@pytest.mark.parametrize("method", methods.METHODS.values(), ids=lambda method: method.name)
def test_every_method_has_its_preset(method):
    """The same words as `run.py --list_methods`."""
    preset = ", ".join(f"`{key}={value}`" for key, value in method.preset.items()) or "nothing"
    assert f"| {method.name} | {method.paper} {method.year} | {preset} |" in PAGE
