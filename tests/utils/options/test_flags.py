"""The 130 official flags: all there, all alike, and the table of what became of them complete."""

import ast
import json

import pytest

import argparser
from tests.support.command_lines import parse, refusal
from tests.support.paths import ROOT
from utils.options import flags

OFFICIAL = json.loads((ROOT / "tests/facts/official_flags.json").read_text())["flags"]
KINDS = {"store": "_StoreAction", "store_true": "_StoreTrueAction", "store_false": "_StoreFalseAction"}


@pytest.fixture(scope="module")
def actions():
    return {flag: action for action in argparser.build_parser()._actions for flag in action.option_strings}


@pytest.mark.parametrize("fact", OFFICIAL, ids=lambda fact: fact["dest"])
def test_official_flag(fact, actions):
    for spelling in fact["flags"]:
        action = actions[spelling]
        assert type(action).__name__ == KINDS[fact["kind"]]
        assert action.dest == flags.dest(fact["flags"][0].removeprefix("--"))
        assert action.default == fact["default"] and type(action.default) is type(fact["default"])
        assert action.nargs == fact["nargs"]
        assert getattr(action.type, "__name__", None) == fact["type"]
        assert set(fact["choices"] or []) <= set(action.choices or [])
        assert (action.choices is None) == (fact["choices"] is None)


def test_all_130_are_there_and_documented(actions):
    assert len(OFFICIAL) == 130
    assert all(action.help for action in actions.values())
    assert "--mcd_groups" in argparser.build_parser().format_help()


@pytest.mark.parametrize(
    ("official", "readable", "dest"),
    [
        ("--aaaaaa 0.3", "--mcd_factor 0.3", "mcd_factor"),
        ("--mmm 7", "--mcd_groups 7", "mcd_groups"),
        ("--ppp 2", "--ce_factor 2", "ce_factor"),
        ("--dis L2", "--mask_distance L2", "mask_distance"),
        ("--sigmoid gt", "--mask_rule gt", "mask_rule"),
        ("--adaptivealpha 3", "--rge_alpha 3", "rge_alpha"),
        ("--adaptivebeta 3", "--rge_beta 3", "rge_beta"),
        ("--adaptivegamma 3", "--rge_gamma 3", "rge_gamma"),
    ],
)
def test_odd_spellings_have_readable_aliases(official, readable, dest):
    default = getattr(parse(""), dest)
    assert getattr(parse(official), dest) == getattr(parse(readable), dest) != default


def test_table_of_flags_is_complete():
    assert set(flags.FLAGS) == {fact["flags"][0].removeprefix("--") for fact in OFFICIAL}
    assert len(flags._LIVE) + len(flags._NO_EFFECT) == len(flags.FLAGS)
    for dest, value in flags.REFUSED_VALUES:
        assert flags.FLAGS[dest] == flags.LIVE
        assert f"--{dest} {value}" in refusal(f"--{dest} {value}")


def options_read_by_the_program():
    """Names that the code behind the command line reads from the options: `opts.name`, `getattr(opts, "name")`."""
    read = set()
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).parts[0] in ("tests", ".venv") or path.name in ("argparser.py", "checks.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] in ("opts", "options"):
                read.add(node.attr)
            elif isinstance(node, ast.Call) and ast.unparse(node).startswith(("getattr(opts", "getattr(self.opts")):
                read |= {arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)}
    return read


def test_live_flags_are_read_and_the_others_are_not():
    read = options_read_by_the_program()
    live = {flags.dest(flag) for flag, status in flags.FLAGS.items() if status == flags.LIVE}
    assert not live - read
    assert not {flags.dest(flag) for flag, status in flags.FLAGS.items() if status == flags.NO_EFFECT} & read


def test_no_option_of_ours_is_ignored(actions):
    official = {flags.dest(flag) for flag in flags.FLAGS}
    ours = {action.dest for action in actions.values()} - official - {"help"}
    composed = {"shapes_train", "shapes_val"}  # read as f"shapes_{split}"
    by_the_parser = {"config", "preset"}
    assert not ours - options_read_by_the_program() - composed - by_the_parser
