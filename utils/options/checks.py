"""Combinations and values of options that cannot work, refused before anything is read or built.

Every refusal is one UserError that names the flag, its value and the remedy. `notes` says what does nothing.
"""

from __future__ import annotations

import math
import os
import re
from argparse import Namespace
from pathlib import Path

from utils import masks
from utils.checkpointing.structure import PART_OF_FILE_NAME
from utils.errors import UserError
from utils.options import flags
from utils.pod.options import PodOptions, TapOptions
from utils.runtime import amp

SCHEMES = ("none", "pod", "md", "mcd", "md+mcd")
PSEUDO = ("naive", "confidence", "median", "entropy")
FUSIONS = ("sum", "mean", "max", "softmax")
PREPROCESSING = ("pow", "none", "abs", "relu")
DEEPLAB_CHANNELS = 256

_MANY = 10**9
_HUGE = 2**1000
#: Closed ranges of options, and of the elements of those that are lists. None stands for "not given" and passes.
RANGES: dict[str, tuple[float, float]] = {
    "local_rank": (0, 10**5), "random_seed": (0, 2**32 - 1), "threads": (0, 4096), "num_workers": (0, 1024),
    "batch_size": (1, 10**5), "crop_size": (1, 2**14), "shapes_train": (1, 10**6), "shapes_val": (1, 10**6),
    "step": (0, 10**4), "epochs": (1, 10**6), "lr_decay_step": (1, _MANY), "skip_nonfinite": (0, _MANY),
    "ckpt_interval": (1, _MANY), "print_interval": (1, _MANY), "val_interval": (1, _MANY), "sample_num": (0, 10**5),
    "pooling": (1, 2**12), "focal_loss_gamma": (0, 100), "reg_iterations": (1, _MANY), "pseudo_nb_bins": (1, 10**6),
    "spp_scales": (1, 2**12), "mcd_groups": (1, DEEPLAB_CHANNELS), "nb_background_modes": (1, 1000),
    "ckpt_minutes": (0, _MANY), "lr_old": (0, _MANY), "weight_decay": (0, _MANY), "lr_power": (0, _MANY),
    "nca_margin": (-_MANY, _MANY), "sample_weights_new": (0, _MANY), "entropy_min": (0, _MANY),
    "loss_kd": (0, _MANY), "loss_de": (0, _MANY), "icarl_importance": (0, _MANY), "reg_importance": (0, _MANY),
    "reg_alpha": (0, 1), "threshold": (0, 1), "step_threshold": (-1, 1), "classif_adaptive_min_factor": (0, 1),
    "pseudo_soft_factor": (0, _MANY), "pod_factor": (0, _MANY), "pod_deeplab_mask_factor": (0, _MANY),
    "mcd_factor": (0, _MANY), "ce_factor": (0, _MANY),
    "rge_alpha": (0, _MANY), "rge_beta": (0, _MANY), "rge_gamma": (0, _MANY),
}  # fmt: skip
#: Options that must lie above 0 and, where a bound is given, below it.
POSITIVE: dict[str, float] = {
    "lr": _MANY, "lr_decay_factor": _MANY, "alpha": _MANY, "temperature": _MANY, "temperature_semiold": _MANY,
}  # fmt: skip

#: Options that take several numbers.
LISTS = ("step", "lr", "spp_scales")

#: Choices of official options that the official parser takes as free text.
FREE_TEXT = {"multimodal_fusion": FUSIONS, "pod_prepro": PREPROCESSING}

#: Options of which at most one can be given, and what they all are.
EXCLUSIVE = (
    (("bce", "unce", "focal_loss", "focal_loss_new"), "the classification loss"),
    (("bce", "nca", "focal_loss", "focal_loss_new"), "the classification loss"),
    (("icarl", "unce", "focal_loss", "focal_loss_new"), "the classification loss"),
    (("icarl", "nca"), "the classification loss"),
    (("pseudo_soft", "bce", "unce", "focal_loss", "focal_loss_new"), "the classification loss"),
    (("pseudo_soft", "nca"), "the classification loss"),
    (("pseudo_soft", "icarl"), "the classification loss"),
    (("pseudo_soft", "ce_on_pseudo", "ce_on_new"), "the pixels of the cross entropy"),
    (("unkd", "kd_bce_sig", "exkd_gt", "exkd_sum", "icarl"), "the distillation of outputs"),
    (("ce_on_pseudo", "ce_on_new"), "the pixels of the cross entropy"),
    (("kd_new", "kd_mask"), "the pixels of the distillation"),
)

#: Options, what they need, and the test of it; a refusal says both.
NEEDS = (
    ("ce_on_pseudo", "--pseudo entropy", lambda o: o.pseudo == "entropy"),
    ("pseudo_soft", "--pseudo entropy", lambda o: o.pseudo == "entropy"),
    ("pseudo_ablation", "--pseudo entropy", lambda o: o.pseudo == "entropy"),
    ("nca", "--cosine", lambda o: o.cosine),
    ("pod_logits", "--pod", lambda o: o.pod is not None),
    ("pod_large_logits", "--pod", lambda o: o.pod is not None),
    ("pod_deeplab_mask", "--pod", lambda o: o.pod is not None),
    ("pod_options", "--pod", lambda o: o.pod is not None),
    ("mask_rule", "--pod local", lambda o: o.pod == "local"),
    ("align_weight", "--align_weight_frequency epoch or task", lambda o: o.align_weight_frequency != "never"),
    ("init_multimodal", "--nb_background_modes above 1", lambda o: o.nb_background_modes > 1),
)  # fmt: skip

#: Options that do nothing without others: said, not refused, because scripts of the official program carry them.
#: What they need, the test of it, and the options.
IDLE = (
    (
        "--loss_kd above 0",
        lambda o: o.loss_kd > 0,
        "unkd kd_bce_sig exkd_gt exkd_sum kd_new kd_mask kd_scheduling temperature_apply",
    ),
    ("--kd_mask", lambda o: o.kd_mask is not None, "kd_mask_adaptative_factor"),
    ("--kd_bce_sig", lambda o: o.kd_bce_sig, "kd_bce_sig_shape"),
    ("--exkd_gt or --exkd_sum", lambda o: o.exkd_gt or o.exkd_sum, "temperature_semiold"),
    ("--temperature_apply", lambda o: o.temperature_apply is not None, "temperature"),
    (
        "--focal_loss, --focal_loss_new, or --loss_kd without --exkd_*",
        lambda o: o.focal_loss or o.focal_loss_new or (o.loss_kd > 0 and not (o.exkd_gt or o.exkd_sum)),
        "alpha",
    ),
    ("--focal_loss or --focal_loss_new", lambda o: o.focal_loss or o.focal_loss_new, "focal_loss_gamma"),
    ("--nca", lambda o: o.nca, "nca_margin"),
    ("--entropy_min above 0", lambda o: o.entropy_min > 0, "entropy_min_mean_pixels"),
    ("--icarl", lambda o: o.icarl, "icarl_disjoint"),
    ("--icarl --icarl_disjoint", lambda o: o.icarl and o.icarl_disjoint, "icarl_bkg"),
    ("--icarl without --icarl_disjoint", lambda o: o.icarl and not o.icarl_disjoint, "icarl_importance"),
    ("--regularizer", lambda o: o.regularizer is not None, "reg_importance reg_no_normalize"),
    ("--regularizer ewc or rw", lambda o: o.regularizer in ("ewc", "rw"), "reg_alpha"),
    ("--regularizer rw", lambda o: o.regularizer == "rw", "reg_iterations"),
    ("--pseudo entropy", lambda o: o.pseudo == "entropy", "classif_adaptive_factor"),
    ("--classif_adaptive_factor", lambda o: o.classif_adaptive_factor, "classif_adaptive_min_factor"),
    (
        "--pseudo entropy or median",
        lambda o: o.pseudo in ("entropy", "median"),
        "threshold step_threshold pseudo_nb_bins median",
    ),
    ("--pseudo_soft", lambda o: o.pseudo_soft is not None, "pseudo_soft_factor soft_loss"),
    ("--data_masking current+old", lambda o: o.data_masking == "current+old" or o.no_mask, "pseudo_ablation"),
    ("--data_masking without --no_mask", lambda o: not o.no_mask, "data_masking"),
    ("--pod", lambda o: o.pod is not None, "pod_factor pod_prepro pod_apply pod_interpolate_last"),
    ("--pod without --mask_rule", lambda o: o.pod is not None and o.mask_rule is None, "no_pod_schedule"),
    ("--pod without --pod_logits", lambda o: not o.pod_logits, "pod_large_logits"),
    ("--pod local or global", lambda o: o.pod in ("local", "global"), "spp_scales"),
    ("--pod_deeplab_mask", lambda o: o.pod_deeplab_mask, "pod_deeplab_mask_factor deeplab_mask_downscale"),
    (
        "--mask_rule (--sigmoid)",
        lambda o: o.mask_rule is not None,
        "mcd_factor mcd_groups rge_alpha rge_beta rge_gamma tap_schemes",
    ),
    ("--mask_rule whc", lambda o: o.mask_rule == "whc", "channel_rule"),
    ("--nb_background_modes above 1", lambda o: o.nb_background_modes > 1, "multimodal_fusion"),
    ("no --init_balanced, which wins", lambda o: not o.init_balanced, "init_multimodal"),
    ("--lr_policy poly", lambda o: o.lr_policy == "poly", "lr_power"),
    ("--lr_policy step", lambda o: o.lr_policy == "step", "lr_decay_step lr_decay_factor"),
    ("--opt_level O1", lambda o: o.opt_level != "O0", "amp_dtype"),
    ("a first --step above 0", lambda o: o.step[0] > 0, "step_ckpt"),
    ("a --step above 0", lambda o: max(o.step) > 0, "base_weights"),
    (
        "a training (not --test, --dry_run or --check_data)",
        lambda o: not (o.test or o.dry_run or o.check_data),
        "trial_batch",
    ),
)

#: A switch that a preset sets has no spelling that would take it back.
PRESET_REMEDY = ", or give --method FT with the options of your own"

#: Options of later steps alone. A command line with one of them is that of all steps of a script, step 0 included.
LATER = (
    *("pod", "loss_kd", "loss_de", "icarl", "unce", "entropy_min", "regularizer"),
    *("init_balanced", "init_multimodal", "align_weight", "lr_old", "base_weights"),
)

#: Options of classification and evaluation that speak of background or of new classes, which domains do not have.
CLASSES_ONLY = ("ce_on_new", "kd_new", "entropy_min", "dont_predict_bg", "align_weight", "sample_weights_new")


def check_all(opts: Namespace) -> None:
    """Run every check that needs nothing but the options.

    Args:
        opts: the parsed command line.

    Raises:
        UserError: the first fault found; names the flag, its value and the remedy.
    """
    for check in (_numbers, _texts, _pod_options, _combinations, _pseudo, _masks, _domain, _steps, _precision, _paths):
        check(opts)


def check_class_incremental(opts: Namespace) -> None:
    """Refuse what cannot work in a task whose steps add classes.

    Args:
        opts: the parsed command line of such a task.

    Raises:
        UserError: names the flag and the remedy.
    """
    if opts.base_weights and max(opts.step) > 0 and not (opts.test or opts.dry_run or opts.check_data):
        later = next(step for step in opts.step if step > 0)
        raise UserError(
            f"--base_weights gives the network of step {later} the classifier of step 0 alone, which has no channel for "
            "the new classes, so that their labels cannot be trained; leave --base_weights out, or add --test"
        )


def notes(opts: Namespace) -> list[str]:
    """What the user should know before a run: one line each, in a fixed order.

    Args:
        opts: the parsed command line, after `check_all`.

    Returns:
        Flags without effect, what the preset does for this task alone, and options that do nothing here.
    """
    lines = flags.no_effect(opts.explicit)
    if opts.task_preset:
        values = ", ".join(f"{dest}={getattr(opts, dest)!r}" for dest in sorted(opts.task_preset))
        lines.append(
            f"--method {opts.method} on {opts.dataset} {opts.task_file or opts.task} has a preset of its own: {values}"
        )
    lines += [
        f"--{dest} does nothing here: it needs {need}"
        for need, met, dests in IDLE
        for dest in dests.split()
        if dest in opts.explicit and _on(opts, dest) and not met(opts)
    ]
    if len(opts.lr) not in (1, len(opts.step)):
        unused = ", ".join(f"{rate:.10g}" for rate in opts.lr[1:-1])
        lines.append(
            f"--lr has {len(opts.lr)} values and --step {len(opts.step)}: step 0 learns with {opts.lr[0]:.10g}, every later "
            f"step with {opts.lr[-1]:.10g}" + (f"; {unused} is not used" if unused else "")
        )
    if opts.pseudo is not None and 0 in opts.step:
        lines.append(f"--pseudo {opts.pseudo} does nothing at step 0: there is no earlier model to label with")
    return lines


def _on(opts: Namespace, dest: str) -> bool:
    """Whether an option is switched on or given a value."""
    return getattr(opts, dest) not in (None, False)


def _numbers(opts: Namespace) -> None:
    for dest in LISTS:
        if not getattr(opts, dest):  # the parser takes "--step=--" for an empty list
            raise UserError(f"--{dest} has no value; give at least one number")
    for dest, (low, high) in RANGES.items():
        for value in _values(opts, dest):
            if not low <= value <= high:  # a NaN fails this too
                raise UserError(f"--{dest} {value:.10g} is out of range; give a value from {low:.10g} to {high:.10g}")
    for dest, high in POSITIVE.items():
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


def _texts(opts: Namespace) -> None:
    for dest, choices in FREE_TEXT.items():
        if getattr(opts, dest) not in choices:
            raise UserError(f"--{dest} {getattr(opts, dest)[:80]!r} is unknown; choose one of {', '.join(choices)}")
    for dest in ("name", "date"):
        value = getattr(opts, dest)
        if not PART_OF_FILE_NAME.fullmatch(value):
            raise UserError(
                f"--{dest} {value[:80]!r} becomes part of file names; use 1 to 100 letters, digits and . _ + = , @ - "
                "(no dot in front)"
            )
    if opts.pseudo is not None and not _known_pseudo(opts.pseudo):
        raise UserError(
            f"--pseudo {opts.pseudo[:80]!r} is unknown; choose one of {', '.join(PSEUDO)}, "
            "or threshold_X with X from 0 to 1"
        )
    wrong = [scheme for scheme in opts.tap_schemes if scheme not in SCHEMES]
    if wrong:
        raise UserError(f"--tap_schemes: {wrong[0][:80]!r} is no scheme; choose among {', '.join(SCHEMES)}")
    if len(opts.tap_schemes) != 6:
        raise UserError(
            f"--tap_schemes names {len(opts.tap_schemes)} schemes; give six: stages 1 to 4, pre_logits and logits"
        )
    for (dest, value), reason in flags.REFUSED_VALUES.items():
        if getattr(opts, dest) == value:
            raise UserError(f"--{dest} {value} is refused: {reason}")


def _known_pseudo(mode: str) -> bool:
    """Whether a pseudo-label mode exists; threshold_X carries its probability in its name."""
    match = re.fullmatch(r"threshold_([0-9.e-]{1,20})", mode)
    if match is None:
        return mode in PSEUDO
    try:
        return 0 <= float(match[1]) <= 1
    except ValueError:
        return False


def _pod_options(opts: Namespace) -> None:
    """The nested JSON of `--pod_options`, whose misspelt keys the official program passes over in silence."""
    default = TapOptions(opts.pod or "local", opts.pod_factor, opts.pod_prepro, tuple(opts.spp_scales))
    options = PodOptions.parse(opts.pod_options, default)
    for place in ("before", "after"):
        factor = getattr(options, place).factor
        if not 0 <= factor <= _MANY:
            raise UserError(f"--pod_options: the factor {factor:.10g} of {place!r} is out of range; give one from 0")


def _combinations(opts: Namespace) -> None:
    for names, what in EXCLUSIVE:
        given = [name for name in names if _on(opts, name)][:2]
        if len(given) > 1:
            shown = " and ".join(f"--{name}{_origin(opts, name)}" for name in given)
            remedy = "leave one out" + (PRESET_REMEDY if any(_origin(opts, name) for name in given) else "")
            raise UserError(f"{shown} exclude each other, both set {what}; {remedy}")
    for dest, need, met in NEEDS:
        if _on(opts, dest) and not met(opts):
            value = getattr(opts, dest)
            shown = "" if value is True else f" {str(value)[:80]}"
            raise UserError(f"--{dest}{shown}{_origin(opts, dest)} needs {need}; add it or leave --{dest} out")
    if opts.align_weight_frequency != "never" and opts.align_weight is None:
        raise UserError(
            f"--align_weight_frequency {opts.align_weight_frequency} needs --align_weight; add old, background or all"
        )
    if opts.cosine and opts.nb_background_modes > 1:
        raise UserError(
            f"--cosine and --nb_background_modes {opts.nb_background_modes} exclude each other: a cosine classifier "
            "has one background; leave one out"
        )
    if opts.no_pretrained and opts.pretrained is not None:
        raise UserError(f"--no_pretrained and --pretrained {opts.pretrained} exclude each other; leave one out")


def _pseudo(opts: Namespace) -> None:
    """Pseudo-labels are the teacher's: a command line that is about them and step 0 alone asks for nothing."""
    alone = "pseudo" in opts.explicit and opts.pseudo is not None and set(opts.step) == {0}
    if alone and not any(_on(opts, dest) for dest in LATER):
        raise UserError(
            f"--pseudo {opts.pseudo} has nothing to label at step 0: there is no earlier model; leave --pseudo out, or "
            "train later steps too (--step 0 1)"
        )


def _origin(opts: Namespace, dest: str) -> str:
    """Says where an option comes from that the user did not write."""
    return f" (of --method {opts.method})" if dest in dict(opts.preset_applied) else ""


def _masks(opts: Namespace) -> None:
    """LSKD's masks: rule and distance fit, and nothing else decides about taps."""
    masks.check_rule(opts.mask_rule, opts.mask_distance)
    if opts.mask_rule is None:
        return
    masked = f"--mask_rule {opts.mask_rule} (--sigmoid)"
    if opts.pod_apply != "all":
        raise UserError(
            f"{masked} and --pod_apply {opts.pod_apply} exclude each other; name the taps with --tap_schemes "
            "(none leaves a tap out)"
        )
    for dest in ("pod_deeplab_mask", "pod_large_logits"):
        if getattr(opts, dest):
            raise UserError(
                f"{masked} and --{dest} exclude each other: LSKD has masks and taps of its own; leave one out"
            )


def _domain(opts: Namespace) -> None:
    """In a domain-incremental task all classes are old from step 1 on, and every pixel has its label."""
    if opts.dataset == "cityscapes_domain" and opts.pseudo is not None:
        raise UserError(
            f"--pseudo {opts.pseudo}{_origin(opts, 'pseudo')} cannot work on cityscapes_domain: its steps are cities, "
            "every pixel has its true label and all classes are old; use --method FT with --pod and what else you want"
        )
    if opts.dataset != "cityscapes_domain":
        return
    wrong = [f"--{dest}{_origin(opts, dest)}" for dest in CLASSES_ONLY if _on(opts, dest)]
    wrong += ["--nb_background_modes"] if opts.nb_background_modes > 1 else []
    wrong += ["--kd_mask new"] if opts.kd_mask == "new" else []
    wrong += ["--temperature_apply new"] if opts.temperature_apply == "new" else []
    if wrong:
        raise UserError(
            f"{wrong[0]} cannot work on cityscapes_domain: its steps are cities, it has no background (label 0 is road) "
            "and no step adds a class; leave it out"
        )


def _steps(opts: Namespace) -> None:
    for step in opts.step:
        if opts.step.count(step) > 1:
            raise UserError(f"--step names step {step} twice; name it once")
    trains = not (opts.test or opts.dry_run or opts.check_data)
    if trains and opts.step != list(range(opts.step[0], opts.step[0] + len(opts.step))):
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
    for dest in ("data_root", "ckpt", "step_ckpt", "task_file", "pretrained", "logdir", "checkpoint", "results"):
        value = getattr(opts, dest)
        if value is not None and (not value or not value.isprintable()):
            raise UserError(f"--{dest} {value[:80]!r} is not a path; give a name of printable characters")
    if opts.dataset != "shapes" and not os.path.isdir(opts.data_root):
        raise UserError(
            f"--data_root {opts.data_root} is not a folder; give the one that holds the data set {opts.dataset}, "
            "or try --dataset shapes, which needs no files"
        )
    for dest in ("ckpt", "step_ckpt", "task_file", "pretrained"):
        value = getattr(opts, dest)
        if value is not None and not (dest == "pretrained" and value == "torchvision") and not os.path.isfile(value):
            raise UserError(f"--{dest} {value} is not a file; mend the path or leave --{dest} out")
    for dest in ("logdir", "checkpoint", "results"):
        _writable(dest, Path(getattr(opts, dest)))


def _writable(dest: str, folder: Path) -> None:
    """The folder, or the nearest one above it that exists, is a folder in which files can be made."""
    existing = next((path for path in (folder, *folder.absolute().parents) if os.path.exists(path)), Path("/"))
    if not os.path.isdir(existing):
        raise UserError(f"--{dest} {folder}: {existing} is a file, not a folder; name another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--{dest} {folder}: {existing} is not writable; name another folder")
