"""Options of a checkpoint: what every method stores is taken, what no command line gives is refused."""

import json
from pathlib import Path

import pytest

import argparser
import methods
from tests.support.command_lines import parse
from utils.checkpointing.header import plain_options
from utils.errors import UserError

PATH = Path("step.pth")


@pytest.mark.parametrize("method", methods.METHODS)
def test_what_a_run_stores_is_restored(method):
    opts = parse(f"--method {method} --task {'offline' if method == 'Joint' else '15-5'} --lr 0.1 0.2 --date d")
    restored = argparser.restore(plain_options(opts), PATH)
    assert json.dumps(plain_options(restored)) == json.dumps(plain_options(opts))


def test_what_a_checkpoint_does_not_say_has_its_default_and_foreign_options_are_left_out():
    opts = argparser.restore({"backbone": "resnet18", "of_another_program": [1]}, PATH)
    assert opts.backbone == "resnet18" and opts.pooling == 32 and not hasattr(opts, "of_another_program")


@pytest.mark.parametrize(
    "options",
    [
        {"pooling": 1.5},
        {"cosine": 1},
        {"lr": 0.1, "step": "0"},
        {"method": None, "backbone": None},
        {"spp_scales": [1, "2"]},
    ],
)
def test_what_no_command_line_gives_is_refused(options):
    with pytest.raises(UserError, match=r"^step\.pth says that --\w+ is .*, which it cannot be"):
        argparser.restore(options, PATH)


def test_values_out_of_range_are_refused():
    with pytest.raises(UserError, match=r"^step\.pth cannot be used: --pooling 0 is out of range"):
        argparser.restore({"pooling": 0}, PATH)
