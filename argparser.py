"""The command line: the options that every method shares, and those that the parts of methods add.

    python run.py --help              all options
    python run.py --list_methods      the methods and what their presets set
    python run.py --data_root DATA --dataset voc --task 15-5s --overlap --step 0 1 2 3 4 5 --method PLOP --dry_run

The preset of a method replaces defaults, but no option of the command line. Official names that do not describe the option
(`--mmm`, `--dis`, …) have a readable alias, under which they are stored. utils/options/flags.py lists which official flags have
an effect. Values and combinations that cannot work are defined by `Rules`, in utils/options/checks.py for the options of this
file, and in each part for its own.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

import methods
from dataset import DATASETS, load_task, tasks
from dataset.tasks import Task
from modules.backbones import BackboneNames
from utils import scheduler
from utils.errors import UserError
from utils.options import checks, config, stored
from utils.options.flags import OFFICIAL_METHODS
from utils.options.groups import add_switch, option_group
from utils.options.rules import Rules
from utils.options.spelling import AnyCase, Parser, show_defaults
from utils.runtime import amp, distributed

#: Groups of `--help` with options of parts of methods, in their order; other groups of parts follow them.
PART_GROUPS = (
    "classification loss",
    "distillation of outputs",
    "regularisation of weights",
    "pseudo-labels",
    "distillation of features (POD)",
    "layer-specific distillation (LSKD)",
    "classifier",
)
RATES = (
    "learning rates: one for all steps, or one for each of --step; else the first for step 0, the last for later ones"
)


def build_parser() -> argparse.ArgumentParser:
    """The parser with all groups of options, also those of methods."""
    parser = Parser(
        prog="run.py",
        usage="run.py [options], all listed by run.py --help",  # argparse's own usage has 80 lines, which hide an error
        description="Class-incremental semantic segmentation: train one or several steps of a task.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="No option may be abbreviated. Flags marked 'no effect' are accepted for old scripts.",
        allow_abbrev=False,
    )
    for add_group in (_program, _data, _task, _optimisation, _outputs, _network, _precision, _evaluation):
        add_group(parser)
    for title in PART_GROUPS:
        option_group(parser, title)
    add_switch(option_group(parser, "classifier"), "--cosine", help="cosine classifier")
    for part in methods.all_parts():
        part.add_options(parser)
    show_defaults(parser)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line and apply the preset of the method.

    Args:
        argv: the arguments of the program; None: those of this process.

    Returns:
        The options, and three further attributes: `explicit`, the set of dests that the command line gives; `preset_applied`, the
        (dest, value) pairs that the preset of the method changed; and `task_preset`, the dests among them that the preset
        changes for this data set and task alone. LOCAL_RANK in the environment has priority over `--local_rank`; an empty
        `--date` is replaced by today's date.

    Raises:
        SystemExit: 2, after a message, for a command line that cannot be parsed; 0 for `--help`.
    """
    parser = build_parser()
    defaults = {action.dest: action.default for action in parser._actions if action.dest != "help"}
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # the namespace then has only what the command line gives
    words = list(sys.argv[1:] if argv is None else argv)
    given = vars(parser.parse_args(words))
    for dest in ("config", "preset"):  # later words win, and the words of the last file come first
        if given.get(dest):
            words = [*_words_of_file(parser, dest, given[dest]), *words]
            given = vars(parser.parse_args(words))
    if "task" in given:
        given["task"] = tasks.official_name(given.get("dataset", defaults["dataset"]), given["task"])
    preset, task_specific = _preset(defaults, given)
    unknown = sorted(set(preset) - set(defaults))
    assert not unknown, f"the preset of {given['method']} sets {unknown}, which no option has"
    opts = argparse.Namespace(**{**defaults, **preset, **given})
    opts.explicit = set(given)
    opts.preset_applied = [(dest, value) for dest, value in preset.items() if dest not in given]
    opts.task_preset = {dest for dest in task_specific if dest not in given}
    rank = os.environ.get("LOCAL_RANK", str(opts.local_rank))
    if not rank.isdecimal() or len(rank) > 5:
        parser.error(
            f"the local rank {rank[:20]!r} is not a number of a process; unset LOCAL_RANK or correct --local_rank"
        )
    opts.local_rank = int(rank)
    opts.date = opts.date or date.today().isoformat()
    return opts


def _words_of_file(parser: argparse.ArgumentParser, dest: str, path: str) -> list[str]:
    """The options in the file of `--config` or `--preset` as words of the command line."""
    try:
        options = config.load(Path(path))
        refused = {"config", "preset"} if dest == "preset" else {"config"}
        if named := sorted(refused & {name.lstrip("-") for name in options}):
            raise UserError(f"--{dest} {path}: {named[0]!r} names a further file; give it on the command line")
        return config.words(options, parser, f"--{dest} {path}")
    except UserError as error:
        parser.error(str(error))


def check(opts: argparse.Namespace) -> None:
    """Refuse options that cannot work, before anything is read or built.

    Args:
        opts: what `parse` returned.

    Raises:
        UserError: the first fault found; names the flag, its value and the remedy.
    """
    if opts.list_methods:
        return
    built = list(methods.METHODS)
    if opts.method is not None and opts.method not in built:
        raise UserError(f"--method {opts.method} is not built in this version; choose one of {', '.join(built)}")
    checks.check_all(opts, all_rules())
    _check_task(opts)


def restore(options: Mapping[str, Any], path: Path) -> argparse.Namespace:
    """The options that a checkpoint contains, checked except for those that depend on the data.

    Args:
        options: of the checkpoint.
        path: of the checkpoint, for messages.

    Raises:
        UserError: a value that the option cannot have.
    """
    opts = stored.restore(build_parser(), options, path)
    try:
        checks.check_values(opts, all_rules())
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from error
    return opts


def notes(opts: argparse.Namespace) -> list[str]:
    """Options without effect, and changes of a preset for this task alone: a line for each; called after `check`."""
    return checks.notes(opts, all_rules())


def all_rules() -> list[Rules]:
    """The rules of the shared options, and of the options of every part."""
    return [checks.SHARED, *(part.rules for part in methods.all_parts())]


def later_options() -> frozenset[str]:
    """The dests of options that step 0 does not read."""
    return frozenset(dest for rules in all_rules() for dest in rules.later)


def announce(opts: argparse.Namespace, device: torch.device) -> None:
    """Print the changes by the preset, the notes about options, and the precision."""
    if opts.preset_applied:
        print(f"--method {opts.method}: " + ", ".join(f"{dest}={value}" for dest, value in opts.preset_applied))
    for note in notes(opts):
        print(f"note: {note}")
    print(
        amp.build(opts, device).describe(opts.opt_level) + f"; device {device}, {distributed.world_size()} process(es)"
    )


def options_of_step(opts: argparse.Namespace, task: Task) -> argparse.Namespace:
    """The options of a step: a copy with `lr_of_step`, its learning rate."""
    opts = copy.copy(opts)
    opts.lr_of_step = scheduler.rate_of_step(opts.lr, opts.step, task.step)
    return opts


def _preset(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Preset of the method for the data set and task, and the dests that it sets for this task only."""
    method = methods.METHODS.get(given.get("method") or "")
    if method is None:
        return {}, set()
    task = None if "task_file" in given else given.get("task", method.preset.get("task", defaults["task"]))
    dataset = given.get("dataset", defaults["dataset"])
    task_specific = method.task_presets.get((dataset, task), {})
    return {**method.preset, **task_specific}, set(task_specific)


def _check_task(opts: argparse.Namespace) -> None:
    """Check that the task exists and has the steps."""
    steps = [load_task(opts, step) for step in opts.step]
    if opts.method == "Joint" and steps[0].last_step > 0:
        raise UserError(
            f"--method Joint learns all classes at once, but task {steps[0].name} has {steps[0].last_step + 1} steps; "
            f"use --task {tasks.OFFLINE}"
        )
    if steps[0].domain:
        checks.check_domain_incremental(opts, all_rules())
    else:
        checks.check_class_incremental(opts)


def _program(parser: argparse.ArgumentParser) -> None:
    group = option_group(parser, "program")
    add, switch = group.add_argument, partial(add_switch, group)
    add("--config", default=None, help="YAML or JSON file of options by name; those of the command line win")
    add("--preset", default=None, help="YAML or JSON file of options, such as scripts/tune.py writes; all others win")
    add("--local_rank", "--local-rank", type=int, default=0, help="set by old launchers; LOCAL_RANK wins over it")
    add("--random_seed", type=int, default=42, help="seed of every random choice")
    add(
        "--device", default="auto", choices=["auto", "cpu", "cuda"], help="where to compute; auto: CUDA if there is one"
    )
    add("--threads", type=int, default=0, help="CPU threads of each process; 0: as torch chooses")
    switch("--deterministic", help="refuse operations that are not reproducible on CUDA; slower (the CPU always is)")
    switch("--dry_run", help="build everything, train nothing, print one line of JSON about each step")
    switch("--list_methods", help="print name, paper, year and preset of every method, and end")
    switch("--check_data", help="read every image and mask of the steps, list every bad file, and end")
    switch(
        "--trial_batch", help="train one batch first, then restore the state: does an iteration fit into the memory?"
    )
    switch("--debug", help="verbose messages")
    add("--code_directory", default=".", help="no effect")
    add("--yess", type=float, default=1.0, help="no effect")


def _data(parser: argparse.ArgumentParser) -> None:
    group = option_group(parser, "data")
    add, switch = group.add_argument, partial(add_switch, group)
    add("--data_root", type=str, default="data", help="folder of the data sets, see docs/data.md")
    add("--dataset", type=str, default="voc", choices=list(DATASETS), help="shapes is drawn by the program: no files")
    add(
        "--palette",
        default=None,
        help="file of lines NAME R G B: the colours of the classes in masks of --dataset folder",
    )
    add("--num_classes", type=int, default=None, help="no effect: the data set determines the classes")
    add("--num_workers", type=int, default=1, help="worker processes that load data, for each training process")
    add("--batch_size", type=int, default=4, help="images of a batch, for each training process")
    add("--crop_size", type=int, default=512, help="side of a training crop and of a validation crop, in pixels")
    add("--shapes_train", type=int, default=1200, help="training images of the data set shapes")
    add("--shapes_val", type=int, default=200, help="validation images of the data set shapes")
    switch("--no_mask", help="keep the labels of old classes in training")
    add(
        "--data_masking",
        type=str,
        default="current",
        choices=["current", "current+old", "all", "new"],
        help="classes that training labels keep besides background, others become background; new: others are ignored; "
        "all: refused, as officially",
    )
    switch("--disable_background", help="ignore the pixels that would be background in training")


def _task(parser: argparse.ArgumentParser) -> None:
    group = option_group(parser, "task, method and previous step")
    add, switch = group.add_argument, partial(add_switch, group)
    names = [*OFFICIAL_METHODS, *(name for name in ("Joint", "LSKD", *methods.METHODS) if name not in OFFICIAL_METHODS)]
    add("--method", type=str, default=None, choices=AnyCase(list(dict.fromkeys(names))), help="preset; none: FT")
    add(
        "--task",
        type=str,
        default="19-1",
        help="partition of the classes, such as 15-5s (15-1 in papers); offline: no steps",
    )
    add("--task_file", default=None, help="JSON with an order of classes of your own, instead of --task")
    add("--step", type=int, default=[0], nargs="+", help="step or steps to train, in this order")
    switch("--overlap", help="step images may show future classes; default: disjoint")
    switch("--exclude_old", help="no training image of a later step shows an old class")
    add(
        "--step_ckpt",
        type=str,
        default=None,
        help="checkpoint before the first of --step, instead of the one found by name",
    )
    add("--ckpt", type=str, default=None, help="weights to start this step with (for --test: to be tested)")
    switch("--base_weights", help="the network of every step has the classifier of step 0 alone")
    add("--strict_weights", action="store_false", help="tolerate missing and unexpected weights in a checkpoint")
    switch("--resume", help="continue the step where it was interrupted; start it where it was not")


def _optimisation(parser: argparse.ArgumentParser) -> None:
    group = option_group(parser, "optimisation")
    add, switch = group.add_argument, partial(add_switch, group)
    add("--epochs", type=int, default=30, help="epochs of each step")
    add("--lr", type=float, default=[0.007], nargs="+", help=RATES)
    add("--lr_old", type=float, default=None, help="factor of the learning rate for the classifiers of earlier steps")
    add("--momentum", type=float, default=0.9, help="momentum of SGD (Nesterov)")
    add("--weight_decay", type=float, default=1e-4, help="weight decay")
    add("--lr_policy", type=str, default="poly", choices=["poly", "step"], help="schedule, by iteration")
    add("--lr_decay_step", type=int, default=5000, help="iterations between two decays (policy step)")
    add("--lr_decay_factor", type=float, default=0.1, help="factor of a decay (policy step)")
    add("--lr_power", type=float, default=0.9, help="power of the poly policy")
    switch("--freeze", help="do not train the body")
    switch("--fix_bn", help="keep norms in evaluation mode")
    add("--skip_nonfinite", type=int, default=0, metavar="N", help="skip up to N batches of non-finite loss, then stop")


def _outputs(parser: argparse.ArgumentParser) -> None:
    group = option_group(parser, "outputs")
    add, switch = group.add_argument, partial(add_switch, group)
    add("--name", type=str, default="Experiment", help="name of the experiment, part of file names")
    add("--date", type=str, default="", help="date in the names of results; empty: today")
    add("--results", default="results", help="folder of the CSV and JSON results")
    add("--checkpoint", type=str, default="./checkpoints/step", help="folder of the checkpoints")
    add("--ckpt_interval", type=int, default=1, help="epochs between two checkpoints")
    add("--ckpt_minutes", type=float, default=0.0, help="also save after so many minutes; 0: by epochs only")
    add("--logdir", type=str, default="./logs", help="folder of TensorBoard files")
    add("--visualize", action="store_false", help="do NOT write pictures to TensorBoard")
    add("--sample_num", type=int, default=0, help="validation pictures shown in TensorBoard")
    add("--pictures", type=int, default=4, help="test images whose predictions are kept with the results of each step")
    add("--print_interval", type=int, default=10, help="iterations between two log lines")
    switch("--no_progress", help="no progress bars")


def _network(parser: argparse.ArgumentParser) -> None:
    group = option_group(parser, "network")
    add, switch = group.add_argument, partial(add_switch, group)
    add("--backbone", type=str, default="resnet101", choices=BackboneNames(), help="body; timm:NAME: one of timm")
    add("--output_stride", type=int, default=16, choices=[8, 16], help="stride of the body's output")
    switch("--no_pretrained", help="start the body of step 0 from random weights")
    add(
        "--pretrained",
        default=None,
        help="ImageNet weights: torchvision, timm, or a file; default: pretrained/BODY_NORM.pth.tar",
    )
    add(
        "--norm_act",
        type=str,
        default="iabn_sync",
        choices=["iabn_sync", "iabn", "abn", "std", "iabn_sync_test"],
        help="norm with activation; iabn: in place; sync: statistics over all processes",
    )
    add("--pooling", type=int, default=32, help="side of the head's average pool in evaluation")
    add("--fusion-mode", type=str, default="mean", choices=["mean", "voting", "max"], help="no effect")
    switch("--pooling_without_zero", help="no effect")


def _precision(parser: argparse.ArgumentParser) -> None:
    group = option_group(parser, "precision and speed")
    add, switch = group.add_argument, partial(add_switch, group)
    levels = ["O0", "O1", "O2", "O3"]
    add("--opt_level", type=str, default="O0", choices=levels, help="O0: float32; O1: mixed precision; O2, O3: as O1")
    add(
        "--amp_dtype",
        default=None,
        choices=["float16", "bfloat16"],
        help="half type; none: float16 on CUDA, else bfloat16",
    )
    add("--amp_backend", default="torch", choices=["torch", "apex"], help="library of mixed precision")
    switch("--channels_last", help="keep images and weights channels-last in memory")
    switch(
        "--compile",
        help="torch.compile for the teacher and, but for LSKD, whose balance needs parts of it, the student",
    )


def _evaluation(parser: argparse.ArgumentParser) -> None:
    group = option_group(parser, "evaluation")
    add, switch = group.add_argument, partial(add_switch, group)
    switch("--test", help="test the step's checkpoint, train nothing")
    add("--val_interval", type=int, default=1, help="epochs between two validations")
    add("--crop_val", action="store_false", help="validate on full images one by one, NOT on centre crops")
    switch(
        "--test_on_val",
        help="shuffle the images of each set by a fixed seed; training images: the first 80 %%, others: the last 20 %%",
    )
    switch("--val_on_trainset", help="test on the training images")
    switch("--cross_val", help="hold out a fifth of the training images for validation")
    sure = (
        "validate old classes too: a background pixel counts as the class to which the teacher gives at least this probability, "
        "and is ignored if there is none"
    )
    add("--val_by_teacher", type=float, default=None, help=sure)
    switch("--no_test", help="train without a test: no test image is read, and no results are written")
    switch("--ignore_test_bg", help="do not count background pixels in tests")
    switch("--dont_predict_bg", help="never predict the background in evaluation")
    add(
        "--scales",
        type=float,
        default=None,
        nargs="+",
        help="the test of a step sums the class probabilities of its images at these scales, such as 0.75 1 1.25; none: 1 alone",
    )
    switch("--flip", help="the test of a step also sees each image mirrored")
