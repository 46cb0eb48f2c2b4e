"""Pairs of options, and several absurd options at once: each is taken or refused with a sentence.

Part of tests/stress/fault_injection.py. The dry runs build thin networks in this process.
"""

from __future__ import annotations

import argparse
import itertools
import random
from pathlib import Path
from typing import Any

import argparser
from tests.stress.fault_inputs import GOOD, RANGES, SPOILING, judge
from tests.support import thin

#: Options whose value is a place, that end the program, or that ask for tracebacks: they are tried by other studies.
LEFT_OUT = frozenset(
    (
        "help",
        "debug",
        "data_root",
        "dataset",
        "task_file",
        "checkpoint",
        "results",
        "logdir",
        "list_methods",
        "check_data",
        "dry_run",
    )
    + ("code_directory", "local_rank", "date", "name", "task")
)

#: Values of options that are neither switches, choices nor numbers with a range.
VALUES = {
    "pod_options": '{"switch": {"after": {"extra_channels": "sum", "factor": 0.0005, "type": "local"}}}',
    "pretrained": "nowhere.pth",
    "ckpt": "nowhere.pth",
    "step_ckpt": "nowhere.pth",
    "base_weights": "nowhere.pth",
    "lr": "0.1",
    "step": "1",
}


def settings() -> list[list[str]]:
    """For every option of the command line, and for each of its choices, words that set it."""
    found = []
    for action in argparser.build_parser()._actions:
        if action.dest in LEFT_OUT or action.help == argparse.SUPPRESS:
            continue
        flag = action.option_strings[-1]
        if action.nargs == 0:
            found.append([flag])
        elif action.choices:
            found += [[f"{flag}={choice}"] for choice in action.choices]
        elif action.dest in VALUES:
            found.append([f"{flag}={VALUES[action.dest]}"])
        elif action.dest in RANGES:
            low, high = RANGES[action.dest]
            found += [[f"{flag}={value:g}"] for value in (low, min(high, low + 2))]
        else:
            found += [[flag, "1"], [flag, "0.5"]]
    return found


def pairs(folder: Path, number: int) -> list[dict[str, Any]]:
    """So many pairs of settings, spread evenly over all of them.

    Args:
        folder: of the runs.
        number: how many.

    Returns:
        One entry a pair: what it was, and what was wrong ("" if nothing).
    """
    every = [(one, other) for one, other in itertools.combinations(settings(), 2) if _flag(one) != _flag(other)]
    stride = max(1, len(every) // number)
    folders = [f"--{kind}={folder / kind}" for kind in ("checkpoint", "results", "logdir")]
    cases = []
    with thin.program():
        for one, other in every[stride // 2 :: stride][:number]:
            argv = [*GOOD, *folders, "--step", "0", "1", *one, *other]
            cases.append({"input": argv, "way": "a pair of options", "wrong": judge(argv, spoilt=False)})
    return cases


def _flag(words: list[str]) -> str:
    return words[0].partition("=")[0]


def several(folder: Path, number: int, seed: int) -> list[dict[str, Any]]:
    """Command lines with two to six faults at once; all must be refused.

    Args:
        folder: of the runs.
        number: how many.
        seed: of the faults.

    Returns:
        As `pairs`.
    """
    cases = []
    with thin.program():
        for k in range(number):
            rng = random.Random(f"{seed} several {k}")
            argv = [*(f"--{kind}={folder / kind}" for kind in ("checkpoint", "results", "logdir")), *GOOD]
            ways = [rng.choice(SPOILING) for _ in range(rng.randint(2, 6))]
            for way in ways:
                argv = way(argv, rng)
            told = ", ".join(way.__name__.strip("_") for way in ways)
            cases.append({"input": argv, "way": told, "wrong": judge(argv, spoilt=True)})
    return cases
