"""Every option of the program, in groups: the 130 official flags (same spelling, type, default, choices), and ours.

    python run.py --help              all options
    python run.py --list_methods      the methods and what their presets set
    python run.py --data_root DATA --dataset voc --task 15-5s --overlap --step 0 1 2 3 4 5 --method PLOP --dry_run

A method's preset replaces defaults, never what stands on the command line. Odd official spellings (`--mmm`, `--dis`, …)
are stored under names that say what they are and have a readable alias. Which official flags do something is written
in utils/options/flags.py, which combinations cannot work in utils/options/checks.py.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from datetime import date
from functools import partial
from typing import Any

import methods
from dataset import DATASETS, load_task, tasks
from utils.errors import UserError
from utils.options import checks
from utils.options.flags import OFFICIAL_METHODS
from utils.options.spelling import AnyCase, Parser, show_defaults

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "mobilenet_v2")
RATES = (
    "learning rates: one for all steps, or one for each of --step; else the first for step 0, the last for later ones"
)
POD_TAPS = ("pod", "pod", "md", "md", "md+mcd", "md")


def loads(text: str) -> dict[str, Any]:
    """The JSON object of `--pod_options`; anything else is an error of the command line."""
    if text.count("[") + text.count("{") > 100:
        raise argparse.ArgumentTypeError("it is nested more than 100 times; is it another text?")
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not valid JSON ({error}); quote it for the shell") from None
    if value is not None and not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text[:80]!r} is not a JSON object such as {{"switch": {{"after": {{}}}}}}')
    return value


def schemes(text: str) -> tuple[str, ...]:
    """A comma-separated list of distillation schemes, one a tap."""
    return tuple(part.strip() for part in text.split(","))


def build_parser() -> argparse.ArgumentParser:
    """The parser with every group of options, those that methods bring included."""
    parser = Parser(
        prog="run.py",
        usage="run.py [options], all listed by run.py --help",  # the generated one hides an error under 80 lines
        description="Class-incremental semantic segmentation: train one or several steps of a task.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="No option may be abbreviated. Flags marked 'no effect' are accepted for old scripts.",
        allow_abbrev=False,
    )
    for add_group in (
        _program, _data, _task, _optimisation, _outputs, _network, _precision, _evaluation, _classification,
        _output_distillation, _regularisation, _pseudo, _pod, _lskd, _classifier,
    ):  # fmt: skip
        add_group(parser)
    for part in methods.all_parts():
        part.add_options(parser)
    show_defaults(parser)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read a command line and put the method's preset under it.

    Args:
        argv: the words after the program's name, those of this process by default.

    Returns:
        The options, and beside them `explicit`, the set of dests that the command line gives, `preset_applied`, the
        (dest, value) pairs that the method's preset changed, and `task_preset`, the dests among them that are
        of this data set and task alone. LOCAL_RANK of the environment wins over `--local_rank`; an empty
        `--date` becomes today.

    Raises:
        SystemExit: 2, after a message, for a command line that cannot be read; 0 for `--help`.
    """
    parser = build_parser()
    defaults = {action.dest: action.default for action in parser._actions if action.dest != "help"}
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # what is left in the namespace then stood on the command line
    given = vars(parser.parse_args(argv))
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
            f"the local rank {rank[:20]!r} is not a number of a process; unset LOCAL_RANK or mend --local_rank"
        )
    opts.local_rank = int(rank)
    opts.date = opts.date or date.today().isoformat()
    return opts


def check(opts: argparse.Namespace) -> None:
    """Refuse what cannot work, before anything is read or built.

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
    checks.check_all(opts)
    _check_task(opts)


def notes(opts: argparse.Namespace) -> list[str]:
    """What is accepted but does nothing, and what a preset does for this task alone: a line each, after `check`."""
    return checks.notes(opts)


def _preset(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Preset of the method for the data set and task, and the dests that only this task sets so."""
    method = methods.METHODS.get(given.get("method"))
    if method is None:
        return {}, set()
    task = None if "task_file" in given else given.get("task", method.preset.get("task", defaults["task"]))
    dataset = given.get("dataset", defaults["dataset"])
    task_specific = method.task_presets.get((dataset, task), {})
    return {**method.preset, **task_specific}, set(task_specific)


def _check_task(opts: argparse.Namespace) -> None:
    """The task exists and has the steps."""
    steps = [load_task(opts, step) for step in opts.step]
    if opts.method == "Joint" and steps[0].last_step > 0:
        raise UserError(
            f"--method Joint learns all classes at once, but task {steps[0].name} has {steps[0].last_step + 1} steps; "
            f"use --task {tasks.OFFLINE}"
        )
    if not steps[0].domain:
        checks.check_class_incremental(opts)


def _switch(group: Any, *flags: str, help: str, dest: str | None = None) -> None:
    """A flag without value, false by default."""
    group.add_argument(*flags, action="store_true", help=help, **({"dest": dest} if dest else {}))


def _program(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("program")
    add, switch = group.add_argument, partial(_switch, group)
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
    switch("--trial_batch", help="run one batch through forward and backward first: does it fit into the memory?")
    switch("--debug", help="verbose messages")
    add("--code_directory", default=".", help="no effect")


def _data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    add, switch = group.add_argument, partial(_switch, group)
    add("--data_root", type=str, default="data", help="folder of the data sets, see docs/data.md")
    add("--dataset", type=str, default="voc", choices=list(DATASETS), help="shapes is drawn by the program: no files")
    add("--num_classes", type=int, default=None, help="no effect: the data set knows")
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
    group = parser.add_argument_group("task, method and previous step")
    add, switch = group.add_argument, partial(_switch, group)
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
    group = parser.add_argument_group("optimisation")
    add, switch = group.add_argument, partial(_switch, group)
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
    group = parser.add_argument_group("outputs")
    add, switch = group.add_argument, partial(_switch, group)
    add("--name", type=str, default="Experiment", help="name of the experiment, part of file names")
    add("--date", type=str, default="", help="date in the names of results; empty: today")
    add("--results", default="results", help="folder of the CSV and JSON results")
    add("--checkpoint", type=str, default="./checkpoints/step", help="folder of the checkpoints")
    add("--ckpt_interval", type=int, default=1, help="epochs between two checkpoints")
    add("--ckpt_minutes", type=float, default=0.0, help="also save after so many minutes; 0: by epochs only")
    add("--logdir", type=str, default="./logs", help="folder of TensorBoard files")
    add("--visualize", action="store_false", help="do NOT write pictures to TensorBoard")
    add("--sample_num", type=int, default=0, help="validation pictures shown in TensorBoard")
    add("--print_interval", type=int, default=10, help="iterations between two log lines")
    switch("--no_progress", help="no progress bars")


def _network(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network")
    add, switch = group.add_argument, partial(_switch, group)
    add("--backbone", type=str, default="resnet101", choices=list(BACKBONES), help="body; mobilenet_v2 is light")
    add("--output_stride", type=int, default=16, choices=[8, 16], help="stride of the body's output")
    switch("--no_pretrained", help="start the body of step 0 from random weights")
    add(
        "--pretrained",
        default=None,
        help="ImageNet weights: torchvision, or a file; default: pretrained/BODY_NORM.pth.tar",
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
    group = parser.add_argument_group("precision and speed")
    add, switch = group.add_argument, partial(_switch, group)
    levels = ["O0", "O1", "O2", "O3"]
    add("--opt_level", type=str, default="O0", choices=levels, help="O0: float32; O1: mixed precision; O2, O3: as O1")
    add(
        "--amp_dtype",
        default=None,
        choices=["float16", "bfloat16"],
        help="half type; none: float16 on CUDA, else bfloat16",
    )
    add("--amp_backend", default="torch", choices=["torch", "apex"], help="who does mixed precision")
    switch("--channels_last", help="keep images and weights channels-last in memory")
    switch(
        "--compile",
        help="torch.compile for the teacher and, but for LSKD, whose balance needs parts of it, the student",
    )


def _evaluation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation")
    add, switch = group.add_argument, partial(_switch, group)
    switch("--test", help="test the step's checkpoint, train nothing")
    add("--val_interval", type=int, default=1, help="epochs between two validations")
    add("--crop_val", action="store_false", help="validate on full images one by one, NOT on centre crops")
    switch(
        "--test_on_val",
        help="shuffle the images of each set by a fixed seed; training images: the first 80 %%, others: the last 20 %%",
    )
    switch("--val_on_trainset", help="test on the training images")
    switch("--cross_val", help="hold out a fifth of the training images for validation")
    switch("--ignore_test_bg", help="do not count background pixels in tests")
    switch("--dont_predict_bg", help="never predict the background in evaluation")


def _classification(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("classification loss")
    add, switch = group.add_argument, partial(_switch, group)
    switch("--bce", help="binary cross entropy")
    switch("--unce", help="unbiased cross entropy: background stands for all old classes (MiB)")
    switch("--focal_loss", help="focal loss")
    switch("--focal_loss_new", help="focal loss on new classes only")
    add("--focal_loss_gamma", type=int, default=2, help="exponent of the focal losses")
    switch("--nca", help="NCA loss, for a cosine classifier")
    add("--nca_margin", type=float, default=0.0, help="margin of the NCA loss")
    switch("--ce_on_new", help="cross entropy on the pixels of new classes only")
    add("--sample_weights_new", type=float, default=None, help="weight of new-class pixels")
    add("--entropy_min", type=float, default=0.0, help="factor of entropy minimisation")
    switch("--entropy_min_mean_pixels", help="entropy minimisation averages over pixels")


def _output_distillation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("distillation of outputs")
    add, switch = group.add_argument, partial(_switch, group)
    add("--loss_kd", type=float, default=0.0, help="factor of the distillation of outputs")
    add("--alpha", type=float, default=1.0, help="hardness of the teacher's soft-max in distillation")
    switch("--unkd", help="unbiased distillation: background stands for all new classes (MiB)")
    switch("--kd_new", help="distil the outputs of background pixels only")
    add("--kd_mask", default=None, choices=["oldbackground", "new"], help="pixels whose outputs are distilled")
    switch("--kd_mask_adaptative_factor", help="scale the masked distillation by the share of its pixels")
    switch("--kd_scheduling", help="scale the distillation by sqrt(classes / new classes)")
    add("--temperature", type=float, default=1.0, help="temperature of logits in distillation")
    add("--temperature_apply", default=None, choices=["all", "new", "old"], help="logits that the temperature divides")
    add("--temperature_semiold", type=float, default=1.0, help="temperature of classes learned after step 0 (--exkd_*)")
    switch("--kd_bce_sig", help="binary cross entropy of sigmoids")
    add("--kd_bce_sig_shape", default="trim", choices=["trim", "sum"], help="new channels are cut, or join background")
    switch("--exkd_gt", help="excluded distillation, new classes by ground truth")
    switch("--exkd_sum", help="excluded distillation, new classes summed")
    add("--loss_de", type=float, default=0.0, help="factor of the distillation of the body's output (ILT)")
    switch("--icarl", help="distillation and classification by sigmoids (iCaRL)")
    add("--icarl_importance", type=float, default=1.0, help="factor of iCaRL's distillation")
    switch("--icarl_disjoint", help="iCaRL: sum of two losses on separate classes, not a combined one")
    switch("--icarl_bkg", help="iCaRL: background is a new class too")


def _regularisation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("regularisation of weights")
    add, switch = group.add_argument, partial(_switch, group)
    add("--regularizer", type=str, default=None, choices=["ewc", "rw", "pi"], help="penalty on changed weights")
    add("--reg_importance", type=float, default=1.0, help="factor of the penalty")
    add("--reg_alpha", type=float, default=0.9, help="moving average of the Fisher information (ewc, rw)")
    switch("--reg_no_normalize", help="do not scale the importances to 0..1")
    add("--reg_iterations", type=int, default=10, help="iterations between two updates of the score (rw)")


def _pseudo(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pseudo-labels")
    add, switch = group.add_argument, partial(_switch, group)
    add("--pseudo", type=str, default=None, help="naive, confidence, threshold_X (0 <= X <= 1), median or entropy")
    add("--threshold", type=float, default=0.9, help="least entropy threshold, or greatest probability threshold")
    add("--step_threshold", type=float, default=None, help="added to the threshold with every step")
    add("--pseudo_nb_bins", type=int, default=None, help="bins of the histogram; none: 100 for entropy, 20 for median")
    add("--median", default="released", choices=["released", "exact"], help="read-out of the median from the histogram")
    switch("--classif_adaptive_factor", help="scale the classification by the share of valid pseudo-labels")
    add("--classif_adaptive_min_factor", type=float, default=0.0, help="least such factor")
    switch("--ce_on_pseudo", help="cross entropy on pseudo-labels, unbiased cross entropy elsewhere")
    soft = ["soft_certain", "soft_uncertain"]
    add("--pseudo_soft", type=str, default=None, choices=soft, help="soft labels on certain, or on uncertain, pixels")
    add("--pseudo_soft_factor", type=float, default=1.0, help="factor of the loss of soft labels")
    add(
        "--soft_loss",
        default="released",
        choices=["released", "mended"],
        help="soft labels: as released, where teacher and student have changed places, or a cross entropy",
    )
    errors = ["corrected_errors", "removed_errors"]
    add("--pseudo_ablation", default=None, choices=errors, help="ablation: mend or drop wrong pseudo-labels")


def _pod(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("distillation of features (POD)")
    add, switch = group.add_argument, partial(_switch, group)
    add("--pod", type=str, default=None, choices=["spatial", "local", "global"], help="pooling of the features")
    add("--pod_factor", type=float, default=5.0, help="factor of the distillation")
    add("--pod_options", type=loads, default=None, help='JSON: {"switch": {"before": {...}, "after": {...}}}')
    add("--pod_prepro", type=str, default="pow", help="applied to features first: pow, none, abs or relu")
    switch("--no_pod_schedule", help="no factor sqrt(classes / new classes)")
    add("--pod_apply", type=str, default="all", choices=["all", "backbone", "deeplab"], help="taps that are distilled")
    switch("--pod_deeplab_mask", help="mask the head's features by the pixels of old classes")
    add("--pod_deeplab_mask_factor", type=float, default=None, help="factor of the masked features")
    switch("--deeplab_mask_downscale", help="shrink the mask to the features, not the features' images to the mask")
    switch("--pod_interpolate_last", help="interpolate the last tap to the size of the others")
    switch("--pod_logits", help="also distil the small logits")
    switch("--pod_large_logits", help="also distil the full-size logits")
    add("--spp_scales", type=int, default=[1, 2, 4], nargs="+", help="scales of local POD: cells a side")


def _lskd(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("layer-specific distillation (LSKD)")
    add = group.add_argument
    add("--tap_schemes", type=schemes, default=POD_TAPS, help="six of none, pod, md, mcd, md+mcd, one for each tap")
    add("--aaaaaa", "--mcd_factor", dest="mcd_factor", type=float, default=0.9, help="factor of context distillation")
    add(
        "--mmm",
        "--mcd_groups",
        dest="mcd_groups",
        type=int,
        default=12,
        help="groups of channels in context distillation",
    )
    add("--ppp", "--ce_factor", dest="ce_factor", type=float, default=1.0, help="factor of the cross entropy")
    distances = ["L1_mean", "mean_L1", "L2", "cos"]
    add("--dis", "--mask_distance", dest="mask_distance", default=None, choices=distances, help="distance of the masks")
    rules = ["old", "newnone", "none", "gt", "whc"]
    add("--sigmoid", "--mask_rule", dest="mask_rule", default=None, choices=rules, help="how distances become masks")
    add("--channel_rule", default="released", choices=["released", "mended"], help="inequalities of whc's channel mask")
    for letter, what in (("alpha", "exponent of ρ"), ("beta", "order of stages"), ("gamma", "CE against KD")):
        names = (f"--adaptive{letter}", f"--rge_{letter}")
        add(*names, dest=f"rge_{letter}", type=float, default=0.5, help=f"gradient equilibrium: {what}")
    add("--yess", type=float, default=1.0, help="no effect")


def _classifier(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("classifier")
    add, switch = group.add_argument, partial(_switch, group)
    switch("--init_balanced", help="new classifiers start from the background's (MiB)")
    switch("--cosine", help="cosine classifier")
    add("--nb_background_modes", type=int, default=1, help="background channels of the first classifier")
    modes = ["max", "softmax", "max_init", "softmax_init", "softmax_remove", "max_remove"]
    add("--init_multimodal", type=str, default=None, choices=modes, help="how background modes start new classifiers")
    add(
        "--multimodal_fusion", type=str, default="sum", help="background modes become one by: sum, mean, max or softmax"
    )
    add("--align_weight", default=None, choices=["old", "background", "all"], help="weights whose norms are aligned")
    often = ["never", "epoch", "task"]
    add("--align_weight_frequency", default="never", choices=often, help="after each validation, or for the test only")
