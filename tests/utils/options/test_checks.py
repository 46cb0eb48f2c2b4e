"""What the checks refuse, accept and remark on; and that no command line ends in a traceback."""

import itertools
import re
import shlex

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import argparser
from tests.support.command_lines import LSKD_COMMAND, SHAPES, parse, refusal
from utils.errors import UserError
from utils.options import checks

RULES = argparser.all_rules()
ACTIONS = {action.dest: action for action in argparser.build_parser()._actions}


def words(dest, **given):
    """An option with a value that switches it on."""
    action = ACTIONS[dest]
    if action.nargs == 0:
        return f"--{dest}"
    others = [choice for choice in action.choices or () if choice != action.default]
    value = given.get(dest) or (others[0] if others else {int: 2, float: 0.5}.get(action.type))
    text = {"tap_schemes": "pod,pod,md,md,md,md", "pod_prepro": "abs", "multimodal_fusion": "mean"}.get(dest, value)
    return f"--{dest} {text}"


# --------------------------------------------------------------------- refusals


@pytest.mark.parametrize("step", range(11))
def test_official_lskd_command_is_accepted_at_every_step(step, tmp_path):
    words = [str(tmp_path) if word == "DATA" else word for word in LSKD_COMMAND]
    words[words.index("--step") + 1] = str(step)
    opts = argparser.parse(words)
    argparser.check(opts)
    assert any("step 0" in note for note in argparser.notes(opts)) == (step == 0)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("--icarl --unkd", ["--icarl", "--unkd"]),
        ("--kd_bce_sig --unkd", ["--kd_bce_sig", "--unkd"]),
        ("--exkd_gt --exkd_sum", ["--exkd_gt", "--exkd_sum"]),
        ("--unkd --exkd_gt", ["--unkd", "--exkd_gt"]),
        ("--method MiB --bce", ["--bce", "--unce", "of --method MiB", "--method FT"]),
        ("--pseudo entropy", ["--pseudo entropy has nothing to label at step 0", "--step 0 1"]),
        ("--pseudo naive --step 0 --method FT", ["--pseudo naive has nothing to label at step 0"]),
        ("--pseudo threshold_0.5 --sample_weights_new 2", ["--pseudo threshold_0.5 has nothing to label"]),
        ("--icarl --unce", ["--icarl", "--unce"]),
        ("--focal_loss --focal_loss_new", ["--focal_loss", "--focal_loss_new"]),
        ("--icarl --nca --cosine", ["--icarl", "--nca"]),
        ("--ce_on_pseudo", ["--ce_on_pseudo", "--pseudo entropy"]),
        ("--ce_on_pseudo --pseudo median", ["--ce_on_pseudo", "--pseudo entropy"]),
        ("--ce_on_pseudo --ce_on_new --pseudo entropy", ["--ce_on_pseudo", "--ce_on_new"]),
        ("--pseudo_soft soft_certain --pseudo naive", ["--pseudo_soft", "--pseudo entropy"]),
        ("--pseudo_ablation removed_errors", ["--pseudo_ablation", "--pseudo entropy"]),
        ("--pseudo best", ["'best'", "threshold_X"]),
        ("--pseudo threshold_1.5", ["threshold_1.5"]),
        ("--pseudo threshold_x", ["threshold_x"]),
        ("--pseudo threshold_nan", ["threshold_nan"]),
        ("--pseudo ''", ["--pseudo"]),
        ("--cosine --nb_background_modes 3", ["--cosine", "--nb_background_modes 3"]),
        ("--nca", ["--nca", "--cosine"]),
        ("--pod_logits", ["--pod_logits", "--pod"]),
        ("--pod_large_logits", ["--pod_large_logits", "--pod"]),
        ("--pod_deeplab_mask", ["--pod_deeplab_mask", "--pod"]),
        ("--pod_options {}", ["--pod_options", "--pod"]),
        ("--pod_prepro cube", ["'cube'", "pow"]),
        ('--pod local --pod_options \'{"switch": {"afer": {}}}\'', ["afer", "after"]),
        ('--pod local --pod_options \'{"switch": {"after": {"factor": NaN}}}\'', ["factor", "nan"]),
        ('--pod local --pod_options \'{"switch": {"after": {"factor": -1}}}\'', ["factor", "-1"]),
        ('--pod local --pod_options \'{"switch": {"after": {"factor": true}}}\'', ["factor"]),
        ('--pod local --pod_options \'{"switch": {"after": {"type": "locl"}}}\'', ["locl"]),
        ("--pod local --pod_options '{\"switch\": 3}'", ["3"]),
        ("--mask_rule whc --pod local", ["--sigmoid whc", "--dis"]),
        ("--mask_distance cos --pod local", ["--dis cos", "--sigmoid"]),
        ("--method LSKD --pod_apply backbone", ["--mask_rule whc", "--pod_apply backbone", "--tap_schemes"]),
        ("--method LSKD --pod_large_logits", ["--mask_rule whc", "--pod_large_logits"]),
        ("--dis cos --sigmoid whc", ["--mask_rule whc", "--pod local"]),
        ("--dis cos --sigmoid whc --pod global", ["--mask_rule whc", "--pod local"]),
        ("--tap_schemes pod,pod", ["2", "six"]),
        ("--tap_schemes pod,pod,pod,pod,pod,dop", ["'dop'"]),
        ("--tap_schemes ''", ["--tap_schemes"]),
        ("--mmm 0", ["--mcd_groups 0", "1 to 256"]),
        ("--mmm 257", ["--mcd_groups 257"]),
        ("--crop_size 0", ["--crop_size 0"]),
        ("--batch_size 0", ["--batch_size 0"]),
        ("--batch_size -3", ["--batch_size -3"]),
        ("--epochs 0", ["--epochs 0"]),
        ("--lr 0", ["--lr 0", "above 0"]),
        ("--lr 0.1 nan", ["--lr nan"]),
        ("--lr inf", ["--lr inf"]),
        (f"--epochs {'9' * 400}", ["--epochs inf"]),
        (f"--random_seed -{'9' * 400}", ["--random_seed -inf"]),
        ("--momentum 1", ["--momentum 1"]),
        ("--momentum nan", ["--momentum nan"]),
        ("--temperature 0", ["--temperature 0"]),
        ("--temperature_semiold -1", ["--temperature_semiold -1"]),
        ("--alpha 0", ["--alpha 0"]),
        ("--reg_importance -1", ["--reg_importance -1"]),
        ("--reg_alpha 1.1", ["--reg_alpha 1.1"]),
        ("--loss_kd nan", ["--loss_kd nan"]),
        ("--num_workers -1", ["--num_workers -1"]),
        ("--val_interval 0", ["--val_interval 0"]),
        ("--print_interval 0", ["--print_interval 0"]),
        ("--ckpt_interval 0", ["--ckpt_interval 0"]),
        ("--ckpt_minutes -1", ["--ckpt_minutes -1"]),
        ("--pseudo_nb_bins 0", ["--pseudo_nb_bins 0"]),
        ("--spp_scales 1 0", ["--spp_scales 0"]),
        ("--shapes_train 0", ["--shapes_train 0"]),
        ("--align_weight old", ["--align_weight old", "--align_weight_frequency"]),
        ("--align_weight_frequency task", ["--align_weight_frequency task", "--align_weight"]),
        ("--init_multimodal max", ["--init_multimodal max", "--nb_background_modes"]),
        ("--multimodal_fusion none", ["'none'", "softmax"]),
        ("--data_masking all", ["--data_masking all", "current+old"]),
        ("--no_pretrained --pretrained torchvision", ["--no_pretrained", "--pretrained torchvision"]),
        ("--pretrained no/such/file", ["--pretrained no/such/file"]),
        ("--method Joint --task 6-2", ["Joint", "--task offline"]),
        ("--task 15-5", ["'15-5'", "shapes", "6-2"]),
        ("--task ''", ["--task ''"]),
        ("--step 3", ["step 3", "0 to 2"]),
        ("--step -1", ["--step -1"]),
        ("--step 0 1 0", ["step 0 twice"]),
        ("--step 0 2", ["--step 0 2", "without a gap"]),
        ("--step 2 1", ["--step 2 1", "out of order"]),
        ("--step 0 1 --ckpt x.pth", ["--ckpt", "one by one"]),
        ("--step 1 --step_ckpt no/such.pth", ["--step_ckpt no/such.pth"]),
        ("--task_file no/such.json", ["--task_file no/such.json"]),
        ("--dataset voc --task 15-5 --data_root no/such/folder", ["--data_root no/such/folder", "shapes"]),
        ("--name a/b", ["--name 'a/b'"]),
        ("--name ''", ["--name"]),
        ("--name ..", ["--name '..'"]),
        ("--date 01/02", ["--date '01/02'"]),
        ("--results ''", ["--results"]),
    ],
)
def test_refusals_name_the_value_and_the_remedy(text, parts):
    message = refusal(text)
    assert "\n" not in message
    for part in parts:
        assert part in message


#: An option that excludes another may need a third one first.
ENABLERS = "--cosine --pseudo entropy --step 1"


@pytest.mark.parametrize(
    "pair",
    sorted({pair for rule in RULES for dests, _ in rule.one_of for pair in itertools.combinations(dests, 2)}),
    ids="-".join,
)
def test_options_that_exclude_each_other(pair):
    message = refusal(f"{' '.join(words(dest) for dest in pair)} {ENABLERS}")
    assert "exclude each other" in message and all(f"--{dest}" in message for dest in pair)


@pytest.mark.parametrize(("dest", "need"), [(dest, need) for rule in RULES for dest, need, _ in rule.requires])
def test_options_that_cannot_work_without_others(dest, need):
    message = refusal(words(dest, mask_rule="gt", pod_options="{}"))
    assert f"--{dest}" in message and f"needs {need}" in message


def test_pseudo_labels_have_nothing_to_label_in_a_domain_incremental_task(tmp_path):
    opts = parse(f"--dataset cityscapes_domain --task 11-5 --data_root '{tmp_path}' --step 1 --pseudo entropy")
    with pytest.raises(ValueError, match=r"--pseudo entropy cannot work on cityscapes_domain"):
        argparser.check(opts)


@pytest.mark.parametrize(
    "text",
    [
        *(f"--{name}" for name in ("ce_on_new", "kd_new", "dont_predict_bg", "exclude_old")),
        *("--entropy_min 1", "--sample_weights_new 2", "--nb_background_modes 3"),
        *("--align_weight old --align_weight_frequency task", "--kd_mask new", "--temperature_apply new"),
    ],
)
def test_domains_have_neither_background_nor_new_classes(text, tmp_path):
    opts = parse(f"--dataset cityscapes_domain --task 11-5 --data_root '{tmp_path}' --step 1 {text}")
    with pytest.raises(ValueError, match="cannot work on cityscapes_domain") as caught:
        argparser.check(opts)
    assert text.partition(" --align_weight_")[0].split()[0] in str(caught.value)


def test_step_0_has_no_old_classes_to_exclude():
    assert refusal("--exclude_old").startswith("--exclude_old does nothing at step 0: there are no old classes")


def test_apex_is_refused_where_it_cannot_be_imported(monkeypatch):
    monkeypatch.setattr(checks.amp, "apex_available", lambda: False)
    assert "--amp_backend apex" in refusal("--amp_backend apex --opt_level O1")
    monkeypatch.setattr(checks.amp, "apex_available", lambda: True)
    assert "--device cpu" in refusal("--amp_backend apex --device cpu")
    assert "bfloat16" in refusal("--amp_backend apex --amp_dtype bfloat16")


def test_output_folders_must_be_folders(tmp_path):
    (tmp_path / "file").write_text("")
    for flag in ("--logdir", "--checkpoint", "--results"):
        assert "is a file" in refusal(f"{flag} '{tmp_path}/file/deeper'")


def test_folder_without_task_file_is_checked_too(tmp_path):
    opts = parse(f"--dataset folder --task offline --data_root '{tmp_path}'")
    with pytest.raises((ValueError, OSError), match="classes"):
        argparser.check(opts)


@pytest.mark.parametrize(
    "text",
    [
        "--pseudo threshold_0.9 --step 1",
        "--pseudo threshold_1 --step 0 1",
        "--pseudo median --median exact --step 2",
        "--pseudo entropy --pseudo_soft soft_certain --soft_loss mended --step 1",
        # scripts give the options of all steps to step 0, too
        "--pseudo entropy --pod local --step 0",
        "--pseudo entropy --init_balanced --step 0",
        "--pseudo entropy --method EWC --step 0",
        "--method PLOP --step 0",
        "--cross_val --test_on_val",
        "--cross_val --val_on_trainset",
        "--test_on_val --val_on_trainset",
        "--nca --cosine --unce",
        "--icarl --bce",
        "--nb_background_modes 3 --init_multimodal max_init --multimodal_fusion softmax",
        "--align_weight all --align_weight_frequency epoch",
        "--pod spatial --pod_logits --pod_apply deeplab",
        "--method LSKD --tap_schemes none,pod,md,md+mcd,md,none",
        "--step 0 1 2 --lr 0.01 0.001 --resume",
        "--step 2 0 --test",
        "--step 0 2 --dry_run",
        "--ce_on_pseudo --pseudo entropy --unce",
        "--list_methods --epochs 0",
        "--sigmoid gt --pod local",
    ],
)
def test_what_can_work_is_accepted(text):
    argparser.check(parse(f"{SHAPES} {text}"))


# ------------------------------------------------------------------------ notes


def test_notes_say_what_does_nothing():
    notes = argparser.notes(parse(f"{SHAPES} --yess 2 --unkd --num_classes 3"))
    assert [note.split()[0] for note in notes] == ["--num_classes", "--yess", "--unkd"]
    assert argparser.notes(parse(f"{SHAPES} --method FT")) == []
    notes = argparser.notes(parse(f"{SHAPES} --step 0 1 --step_ckpt x.pth --trial_batch --test"))
    assert [note.split()[0] for note in notes] == ["--step_ckpt", "--trial_batch"]
    assert argparser.notes(parse(f"{SHAPES} --step 1 2 --step_ckpt x.pth --trial_batch")) == []
    # what a preset brings was not typed by the user, and is not remarked on
    assert not [note for note in argparser.notes(parse(f"{SHAPES} --method PLOP --step 1")) if "nothing here" in note]


#: What makes an idle option do something, where that is not the first option that the sentence names.
MET = {
    "--icarl --icarl_disjoint": "--icarl --icarl_disjoint",
    "--regularizer rw": "--regularizer rw",
    "--pseudo entropy": "--pseudo entropy",
    "--pseudo entropy or median": "--pseudo median",
    "--data_masking current+old": "--data_masking current+old",
    "--data_masking without --no_mask": "",
    "--pod local or global": "--pod global",
    "--mask_rule whc": "--mask_rule whc --mask_distance cos",
    "no --init_balanced, which wins": "",
    "no --nest, which takes its place": "",
    "--dataset folder": "--dataset folder",
    "--lr_policy poly": "",
    "--balance rge": "--balance rge",
    "a first --step above 0": "--step 1",
    "a --step above 0": "--step 1",
    "a training (not --test, --dry_run or --check_data)": "",
}
#: What leaves an option idle that the defaults do not.
UNMET = {
    "--data_masking without --no_mask": "--no_mask",
    "--pod without --pod_logits": "--pod spatial --pod_logits",
    "no --init_balanced, which wins": "--init_balanced",
    "no --nest, which takes its place": "--nest",
    "--lr_policy poly": "--lr_policy step",
    "--balance rge": "--balance sum",
    "a first --step above 0": "--step 0",
    "a training (not --test, --dry_run or --check_data)": "--test",
}


@pytest.mark.parametrize(
    ("need", "dest"), [(need, dest) for rule in RULES for need, _, dests in rule.idle for dest in dests]
)
def test_notes_say_what_an_option_needs(need, dest):
    # by default the first option that the sentence names, given
    met = MET[need] if need in MET else words(re.search(r"--(\w+)", need)[1])

    def said(others):
        return f"--{dest} does nothing here: it needs {need}" in argparser.notes(parse(f"{others} {words(dest)}"))

    assert said(UNMET.get(need, "")) and not said(met)


def test_flags_that_need_a_method_are_not_remarked_on_in_its_own_command():
    assert [note for note in argparser.notes(argparser.parse(LSKD_COMMAND)) if "does nothing" in note] == []


# ------------------------------------------------------------------------- fuzz

VALUES = [
    *(
        "",
        "nan",
        "inf",
        "-1",
        "0",
        "1e999",
        "9" * 400,
        "-" + "9" * 5000,
        "x",
        "\x00",
        "..",
        "/",
        "\ud800",
        "é" * 300,
        "%s",
    ),
    *("{", "null", "[[]]", '{"switch": {"after": {"factor": 1e999}}}', "1 2", "--", "6-2", "entropy", "threshold_"),
]
WORDS = sorted(
    word
    for action in argparser.build_parser()._actions
    for word in action.option_strings
    if word not in ("-h", "--help")
)
COMMANDS = [
    shlex.split(f"{SHAPES} --step 0 1 --method PLOP --epochs 1 --lr 0.01"),
    [*LSKD_COMMAND, *shlex.split(SHAPES)],
]


@st.composite
def command_lines(draw):
    """A working command line with values replaced, options added, words lost, doubled or garbled."""
    words = list(draw(st.sampled_from(COMMANDS)))
    value = st.sampled_from(VALUES) | st.text(max_size=8) | st.floats().map(str) | st.integers().map(str)
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["replace", "replace", "add", "add", "garble"]))
        at = draw(st.integers(0, len(words) - 1)) if words else 0
        if kind == "replace":
            words[at : at + 1] = [draw(value)] if words and not words[at].startswith("--") else words[at : at + 1]
        elif kind == "add":
            words += [draw(st.sampled_from(WORDS)), draw(value)][: draw(st.integers(1, 2))]
        else:
            words[at : at + draw(st.integers(0, 2))] = [draw(st.sampled_from(WORDS) | value)] * draw(st.integers(0, 2))
    return words


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(command_lines())
def test_mutated_command_lines_end_in_a_message_or_are_accepted(words):
    try:
        argparser.check(argparser.parse(words))
    except SystemExit as ended:
        assert ended.code == 2
    except (UserError, OSError) as refused:
        assert str(refused)
