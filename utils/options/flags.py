"""Table of the 130 flags of the official command line; a test compares it with the parser.

A flag is live, or it has no effect in the official program either, and is accepted with a note. Some values of live flags are refused,
with the reason. Flags have their official spelling, without the dashes.
"""

from __future__ import annotations

from collections.abc import Collection

LIVE = "live"
NO_EFFECT = "no effect"

#: The choices of the official `--method`, in their order.
OFFICIAL_METHODS = ("FT", "LWF", "LWF-MC", "ILT", "EWC", "RW", "PI", "MiB", "PLOP")

#: Official names that do not describe the option, and the name that this program uses.
RENAMED = {
    "aaaaaa": "mcd_factor",
    "mmm": "mcd_groups",
    "ppp": "ce_factor",
    "dis": "mask_distance",
    "sigmoid": "mask_rule",
    "adaptivealpha": "rge_alpha",
    "adaptivebeta": "rge_beta",
    "adaptivegamma": "rge_gamma",
    "fusion-mode": "fusion_mode",
}

#: Values of live flags that are refused, and why.
REFUSED_VALUES = {
    ("data_masking", "all"): "the official program does not implement it either; use current, current+old or new",
}

_NO_EFFECT = {
    "num_classes": "the data set and the task say how many classes there are",
    "code_directory": "it belongs to the set-up of a cluster",
    "fusion-mode": "it belongs to a network that is not part of the program",
    "yess": "it belongs to an experiment that is not part of the program",
    "pooling_without_zero": "it belongs to an experiment that is not part of the program",
}

_LIVE = """
local_rank random_seed num_workers debug
data_root dataset dont_predict_bg batch_size crop_size no_mask data_masking overlap disable_background
method task step step_ckpt ckpt base_weights strict_weights
epochs fix_bn lr lr_old momentum weight_decay lr_policy lr_decay_step lr_decay_factor lr_power freeze
test test_on_val val_on_trainset cross_val crop_val ignore_test_bg
logdir name date sample_num visualize print_interval val_interval ckpt_interval checkpoint
backbone output_stride no_pretrained norm_act pooling opt_level
bce unce focal_loss focal_loss_new focal_loss_gamma nca nca_margin ce_on_new sample_weights_new
entropy_min entropy_min_mean_pixels
loss_de loss_kd alpha unkd kd_new kd_mask kd_mask_adaptative_factor kd_scheduling
temperature temperature_apply temperature_semiold kd_bce_sig kd_bce_sig_shape exkd_gt exkd_sum
icarl icarl_importance icarl_disjoint icarl_bkg
regularizer reg_importance reg_alpha reg_no_normalize reg_iterations
pseudo threshold step_threshold ce_on_pseudo pseudo_nb_bins classif_adaptive_factor classif_adaptive_min_factor
pseudo_soft pseudo_soft_factor pseudo_ablation
pod pod_factor pod_options pod_prepro no_pod_schedule pod_apply pod_deeplab_mask pod_deeplab_mask_factor
deeplab_mask_downscale pod_interpolate_last pod_logits pod_large_logits spp_scales
init_balanced cosine nb_background_modes init_multimodal multimodal_fusion align_weight align_weight_frequency
aaaaaa mmm ppp dis sigmoid adaptivealpha adaptivebeta adaptivegamma
""".split()  # noqa: SIM905 (one name a line would fill three pages)

#: Status of every official flag.
FLAGS: dict[str, str] = {**dict.fromkeys(_LIVE, LIVE), **dict.fromkeys(_NO_EFFECT, NO_EFFECT)}


def dest(flag: str) -> str:
    """The attribute of the parsed options that holds an official flag (given without dashes)."""
    return RENAMED.get(flag, flag)


def no_effect(explicit: Collection[str]) -> list[str]:
    """One line for each given flag that has no effect.

    Args:
        explicit: the dests that the command line gives.

    Returns:
        Lines such as "--yess has no effect in the official program either: it belongs to an experiment that is not part of the program".
    """
    return [
        f"--{flag} has no effect in the official program either: {reason}"
        for flag, reason in _NO_EFFECT.items()
        if dest(flag) in explicit
    ]
