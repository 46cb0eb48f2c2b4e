"""Checks of the values and combinations of options, before anything is read or built.

The `Rules` of a part of a method are about its own options; `SHARED` are about the options of all methods. This module evaluates both.
Every refusal is a UserError that names the option, its value and the remedy. `notes` lists options that have no effect.
"""

from __future__ import annotations

import math
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from utils.checkpointing.structure import PART_OF_FILE_NAME
from utils.errors import UserError
from utils.options import flags
from utils.options.rules import LARGE, Rules
from utils.options.spelling import suggestion
from utils.runtime import amp

_HUGE = 2**1000

#: Rules of the options in argparser.py.
SHARED = Rules(
    ranges={
        "local_rank": (0, 10**5), "random_seed": (0, 2**32 - 1), "threads": (0, 4096), "num_workers": (0, 1024),
        "batch_size": (1, 10**5), "crop_size": (1, 2**14), "shapes_train": (1, 10**6), "shapes_val": (1, 10**6),
        "step": (0, 10**4), "epochs": (1, 10**6), "lr_decay_step": (1, LARGE), "skip_nonfinite": (0, LARGE),
        "ckpt_interval": (1, LARGE), "print_interval": (1, LARGE), "val_interval": (1, LARGE),
        "sample_num": (0, 10**5), "pictures": (0, 100), "pooling": (1, 2**12), "ckpt_minutes": (0, LARGE), "lr_old": (0, LARGE),
        "weight_decay": (0, LARGE), "lr_power": (0, LARGE), "scales": (0.1, 10), "val_by_teacher": (0, 1),
    },
    positive={"lr": LARGE, "lr_decay_factor": LARGE},
    exclusive=[
        (
            "--no_pretrained", lambda o: o.no_pretrained,
            "--pretrained {pretrained}", lambda o: o.pretrained is not None,
        ),
        ("--no_test", lambda o: o.no_test, "--test", lambda o: o.test),
    ],
    requires=[("val_by_teacher", "--cross_val", lambda o: o.cross_val)],
    nothing_at_step_0={
        "val_by_teacher": "does nothing at step 0: there is no earlier model",
        "exclude_old": "does nothing at step 0: there are no old classes",
    },
    idle=[
        ("--dataset folder", lambda o: o.dataset == "folder", ["palette"]),
        ("--data_masking without --no_mask", lambda o: not o.no_mask, ["data_masking"]),
        ("--lr_policy poly", lambda o: o.lr_policy == "poly", ["lr_power"]),
        ("--lr_policy step", lambda o: o.lr_policy == "step", ["lr_decay_step", "lr_decay_factor"]),
        ("--opt_level O1", lambda o: o.opt_level != "O0", ["amp_dtype"]),
        ("a first --step above 0", lambda o: o.step[0] > 0, ["step_ckpt"]),
        ("a --step above 0", lambda o: max(o.step) > 0, ["base_weights"]),
        ("a training (not --test, --dry_run or --check_data)", lambda o: _trains(o), ["trial_batch"]),
    ],
    later=["lr_old", "base_weights", "exclude_old"],
    classes_only={"dont_predict_bg": bool, "exclude_old": bool, "val_by_teacher": lambda least: least is not None},
)  # fmt: skip

#: Remedy for a switch that a preset sets, because no option unsets it.
PRESET_REMEDY = ", or give --method FT with the options of your own"


def check_all(opts: Namespace, rules: Sequence[Rules]) -> None:
    """Run all checks that need the options alone.

    Args:
        opts: the parsed command line.
        rules: `SHARED`, and those of all parts.

    Raises:
        UserError: the first fault found; names the flag, its value and the remedy.
    """
    check_values(opts, rules)
    for check in (_one_of, _requires, _exclusive, _nothing_at_step_0):
        check(opts, rules)
    for check_shared in (_texts, _steps, _precision, _paths):
        check_shared(opts)


def check_values(opts: Namespace, rules: Sequence[Rules]) -> None:
    """Run the checks of single values: numbers within their ranges, known words.

    Args:
        opts: the parsed command line, or the options of a checkpoint.
        rules: as for `check_all`.

    Raises:
        UserError: names the flag, its value and the remedy.
    """
    for check in (_numbers, _choices, _own_checks):
        check(opts, rules)


def check_class_incremental(opts: Namespace) -> None:
    """Refuse what cannot work in a task whose steps add classes.

    Args:
        opts: the parsed command line of such a task.

    Raises:
        UserError: names the flag and the remedy.
    """
    if opts.base_weights and max(opts.step) > 0 and _trains(opts):
        later = next(step for step in opts.step if step > 0)
        raise UserError(
            f"--base_weights gives the network of step {later} the classifier of step 0 alone, which has no channel for "
            "the new classes, so that their labels cannot be trained; leave --base_weights out, or add --test"
        )


def check_domain_incremental(opts: Namespace, rules: Sequence[Rules]) -> None:
    """Refuse what cannot work in a task whose steps are domains: all classes are old from step 1 on, every pixel has a label.

    Args:
        opts: the parsed command line of such a task.
        rules: as for `check_all`.

    Raises:
        UserError: names the flag and the remedy.
    """
    for rule in rules:
        for dest, needs_classes in rule.classes_only.items():
            if needs_classes(getattr(opts, dest)):
                remedy = "leave it out" + (PRESET_REMEDY if _origin(opts, dest) else "")
                raise UserError(
                    f"{_shown(opts, dest)} cannot work on {opts.dataset}: its steps are domains of the same classes, so it has "
                    f"no background, every pixel has its label and no step adds a class; {remedy}"
                )


def notes(opts: Namespace, rules: Sequence[Rules]) -> list[str]:
    """Notes for the user before a run, one line each, in a fixed order.

    Args:
        opts: the parsed command line, after `check_all`.
        rules: as for `check_all`.

    Returns:
        Flags without effect, what the preset sets for this task only, options that do nothing here, and the rules' advice.
    """
    lines = flags.no_effect(opts.explicit)
    if opts.task_preset:
        values = ", ".join(f"{dest}={getattr(opts, dest)!r}" for dest in sorted(opts.task_preset))
        lines.append(
            f"--method {opts.method} on {opts.dataset} {opts.task_file or opts.task} has a preset of its own: {values}"
        )
    lines += [
        f"--{dest} does nothing here: it needs {need}"
        for rule in rules
        for need, met, dests in rule.idle
        for dest in dests
        if dest in opts.explicit and is_given(opts, dest) and not met(opts)
    ]
    lines += [text.format(**vars(opts)) for rule in rules for text, applies in rule.advice if applies(opts)]
    if len(opts.lr) not in (1, len(opts.step)):
        unused = ", ".join(f"{rate:.10g}" for rate in opts.lr[1:-1])
        lines.append(
            f"--lr has {len(opts.lr)} values and --step {len(opts.step)}: step 0 learns with {opts.lr[0]:.10g}, every later "
            f"step with {opts.lr[-1]:.10g}" + (f"; {unused} is not used" if unused else "")
        )
    if 0 in opts.step:
        lines += [
            f"{_shown(opts, dest)} {why}"
            for rule in rules
            for dest, why in rule.nothing_at_step_0.items()
            if is_given(opts, dest)
        ]
    return lines


def is_given(opts: Namespace, dest: str) -> bool:
    """Whether an option is switched on or has a value other than 0."""
    return getattr(opts, dest) not in (None, False)


def _trains(opts: Namespace) -> bool:
    return not (opts.test or opts.dry_run or opts.check_data)


def _shown(opts: Namespace, dest: str) -> str:
    """An option as the user wrote it; if the preset set it, with the name of the method."""
    value = getattr(opts, dest)
    text = "" if value is True else f" {str(value)[:80]}"
    return f"--{dest}{text}{_origin(opts, dest)}"


def _origin(opts: Namespace, dest: str) -> str:
    return f" (of --method {opts.method})" if dest in dict(opts.preset_applied) else ""


# ------------------------------------------------------------------------ rules


def _numbers(opts: Namespace, rules: Sequence[Rules]) -> None:
    for rule in rules:
        for dest, (low, high) in rule.ranges.items():
            for value in _values(opts, dest):
                if not low <= value <= high:  # NaN is refused too
                    raise UserError(
                        f"--{dest} {value:.10g} is out of range; give a value from {low:.10g} to {high:.10g}"
                    )
        for dest, high in rule.positive.items():
            for value in _values(opts, dest):
                if not 0 < value <= high:
                    raise UserError(f"--{dest} {value:.10g} is out of range; give a finite value above 0")
    if not 0 <= opts.momentum < 1:
        raise UserError(f"--momentum {opts.momentum:.10g} is out of range; give a value from 0 to below 1")


def _values(opts: Namespace, dest: str) -> list[float]:
    value = getattr(opts, dest)
    values = value if isinstance(value, list | tuple) else [value]
    # integers beyond the range of floats become infinite, so that they compare and print like other numbers
    return [math.inf if v > _HUGE else -math.inf if v < -_HUGE else v for v in values if v is not None]


def _choices(opts: Namespace, rules: Sequence[Rules]) -> None:
    for rule in rules:
        for dest, choices in rule.choices.items():
            if (value := getattr(opts, dest)) not in choices:
                raise UserError(
                    f"--{dest} {value[:80]!r} is unknown; choose one of {', '.join(choices)}{suggestion(value, choices)}"
                )


def _own_checks(opts: Namespace, rules: Sequence[Rules]) -> None:
    for rule in rules:
        if rule.check is not None:
            rule.check(opts)


def _one_of(opts: Namespace, rules: Sequence[Rules]) -> None:
    for rule in rules:
        for dests, what in rule.one_of:
            given = [dest for dest in dests if is_given(opts, dest)][:2]
            if len(given) > 1:
                shown = " and ".join(f"--{dest}{_origin(opts, dest)}" for dest in given)
                remedy = "leave one out" + (PRESET_REMEDY if any(_origin(opts, dest) for dest in given) else "")
                raise UserError(f"{shown} exclude each other, both set {what}; {remedy}")


def _requires(opts: Namespace, rules: Sequence[Rules]) -> None:
    for rule in rules:
        for dest, need, met in rule.requires:
            if is_given(opts, dest) and not met(opts):
                raise UserError(f"{_shown(opts, dest)} needs {need}; add it or leave --{dest} out")


def _exclusive(opts: Namespace, rules: Sequence[Rules]) -> None:
    for rule in rules:
        for first, first_given, second, second_given in rule.exclusive:
            if first_given(opts) and second_given(opts):
                pair = " and ".join(sentence.format_map(vars(opts)) for sentence in (first, second))
                raise UserError(f"{pair} exclude each other; leave one out")


def _nothing_at_step_0(opts: Namespace, rules: Sequence[Rules]) -> None:
    """Refuse options without effect in a command line for step 0 alone.

    A command line that also has other options of later steps is accepted: it is that of a script for all steps.
    """
    if set(opts.step) != {0}:
        return
    given = opts.explicit | set(dict(opts.preset_applied))
    for rule in rules:
        others = {dest for other in rules if other is not rule for dest in (*other.later, *other.for_later)}
        if any(is_given(opts, dest) for dest in others & given):
            continue
        for dest, why in rule.nothing_at_step_0.items():
            if dest in opts.explicit and is_given(opts, dest):
                raise UserError(
                    f"{_shown(opts, dest)} {why}; leave --{dest} out, or train later steps too (--step 0 1)"
                )


# --------------------------------------------------------------- shared options


def _texts(opts: Namespace) -> None:
    for dest in ("name", "date"):
        value = getattr(opts, dest)
        if not PART_OF_FILE_NAME.fullmatch(value):
            raise UserError(
                f"--{dest} {value[:80]!r} becomes part of file names; use 1 to 100 letters, digits and . _ + = , @ - "
                "(no dot in front)"
            )
    for (dest, value), reason in flags.REFUSED_VALUES.items():
        if getattr(opts, dest) == value:
            raise UserError(f"--{dest} {value} is refused: {reason}")


def _steps(opts: Namespace) -> None:
    for step in opts.step:
        if opts.step.count(step) > 1:
            raise UserError(f"--step names step {step} twice; name it once")
    if _trains(opts) and opts.step != list(range(opts.step[0], opts.step[0] + len(opts.step))):
        raise UserError(
            f"--step {' '.join(map(str, opts.step))} leaves out a step or is out of order, but each step is trained from the one before "
            "it; name them from the first to the last without a gap"
        )
    if opts.ckpt is not None and len(opts.step) > 1:
        raise UserError(f"--ckpt is for one step, but --step names {len(opts.step)}; run the steps one by one")


def _precision(opts: Namespace) -> None:
    if opts.amp_backend != "apex":
        return
    if not amp.apex_available():
        raise UserError(
            "--amp_backend apex: NVIDIA's apex with its amp cannot be imported (the package apex of PyPI is another "
            "program); build it from NVIDIA's sources or leave --amp_backend out"
        )
    if opts.device == "cpu":
        raise UserError("--amp_backend apex works on CUDA only, not with --device cpu; leave --amp_backend out")
    if opts.amp_dtype == "bfloat16":
        raise UserError("--amp_backend apex knows float16 only, not --amp_dtype bfloat16; leave one out")


def _paths(opts: Namespace) -> None:
    for dest in (
        "data_root",
        "ckpt",
        "step_ckpt",
        "task_file",
        "palette",
        "pretrained",
        "logdir",
        "checkpoint",
        "results",
    ):
        value = getattr(opts, dest)
        if value is not None and (not value or not value.isprintable()):
            raise UserError(f"--{dest} {value[:80]!r} is not a path; give a name of printable characters")
    if opts.dataset != "shapes" and not os.path.isdir(opts.data_root):
        raise UserError(
            f"--data_root {opts.data_root} is not a folder; give the folder of the data set {opts.dataset}, "
            "or try --dataset shapes, which needs no files"
        )
    for dest in ("ckpt", "step_ckpt", "task_file", "palette", "pretrained"):
        value = getattr(opts, dest)
        if (
            value is not None
            and not (dest == "pretrained" and value in ("torchvision", "timm"))
            and not os.path.isfile(value)
        ):
            raise UserError(f"--{dest} {value} is not a file; correct the path or leave --{dest} out")
    for dest in ("logdir", "checkpoint", "results"):
        _writable(dest, Path(getattr(opts, dest)))


def _writable(dest: str, folder: Path) -> None:
    """Refuse a path unless it, or its nearest existing parent, is a folder in which files can be created."""
    existing = next((path for path in (folder, *folder.absolute().parents) if os.path.exists(path)), Path("/"))
    if not os.path.isdir(existing):
        raise UserError(f"--{dest} {folder}: {existing} is a file, not a folder; name another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--{dest} {folder}: {existing} is not writable; name another folder")
