"""The command line: how it is read, and what a method's preset does to it."""

import pytest

import argparser
import methods
from tests.support.command_lines import LSKD_COMMAND, parse, refusal

AFTER = {"switch": {"after": {"extra_channels": "sum", "factor": 0.0005, "type": "local"}}}
ADE_AFTER = {"switch": {"after": {"extra_channels": "sum", "factor": 1e-5, "type": "local"}}}
PLOP = {
    "pod": "local",
    "pod_factor": 0.01,
    "pod_logits": True,
    "pseudo": "entropy",
    "threshold": 0.001,
    "classif_adaptive_factor": True,
    "init_balanced": True,
    "pod_options": AFTER,
}
#: What `--method` stands for in the official programs (the regularisers as their released traces have them).
PRESETS = {
    "FT": {},
    "LWF": {"loss_kd": 100},
    "LWF-MC": {"icarl": True, "icarl_importance": 10},
    "ILT": {"loss_kd": 100, "loss_de": 100},
    "EWC": {"regularizer": "ewc", "reg_importance": 100},
    "RW": {"regularizer": "rw", "reg_importance": 100},
    "PI": {"regularizer": "pi", "reg_importance": 100},
    "MiB": {"loss_kd": 10, "unce": True, "unkd": True, "init_balanced": True},
    "PLOP": PLOP,
}


# ---------------------------------------------------------------------- parsing


def test_local_rank_in_both_spellings_and_from_the_environment(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert parse("--local_rank 1").local_rank == parse("--local-rank=1").local_rank == 1
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert parse("--local_rank 1").local_rank == 3


@pytest.mark.parametrize("text", ["--epoch 3", "--no_such", "--lr", "--backbone vgg", "--epochs 1.5", "--tap_schemes"])
def test_unreadable_command_lines_exit_with_2(text, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(text)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["{", "[1]", "7", "", '{"a":' * 2000, "\u00e9"])
def test_bad_pod_options_name_the_flag(value, capsys):
    with pytest.raises(SystemExit) as caught:
        argparser.parse(["--pod_options", value])
    assert caught.value.code == 2
    assert "--pod_options" in capsys.readouterr().err


def test_switches_keep_the_official_polarity():
    opts = parse("")
    assert (opts.crop_val, opts.visualize, opts.strict_weights) == (True, True, True)
    opts = parse("--crop_val --visualize --strict_weights")
    assert (opts.crop_val, opts.visualize, opts.strict_weights) == (False, False, False)


def test_lists():
    opts = parse("--step 0 2 --lr 0.01 0.001 --spp_scales 1 2 --tap_schemes 'none, pod,md,mcd,md+mcd,md'")
    assert (opts.step, opts.lr, opts.spp_scales) == ([0, 2], [0.01, 0.001], [1, 2])
    assert opts.tap_schemes == ("none", "pod", "md", "mcd", "md+mcd", "md")
    assert parse("").tap_schemes == ("pod", "pod", "md", "md", "md+mcd", "md")


def test_empty_date_becomes_today():
    assert len(parse("").date) == len("2026-01-31")
    assert parse("--date x").date == "x"


# ---------------------------------------------------------------------- presets


@pytest.mark.parametrize("name", PRESETS)
def test_official_presets(name):
    opts, plain = parse(f"--method {name}"), parse("")
    changed = {key: value for key, value in vars(opts).items() if value != getattr(plain, key)}
    for key in ("method", "explicit", "preset_applied", "task_preset"):
        changed.pop(key, None)
    assert changed == PRESETS[name]
    assert dict(opts.preset_applied) == PRESETS[name]


@pytest.mark.parametrize("task", ["100-50", "100-10", "100-5", "50"])
def test_plop_on_ade(task):
    opts = parse(f"--method PLOP --dataset ade --task {task}")
    assert (opts.pod_factor, opts.pod_options) == (0.001, ADE_AFTER)
    assert {"pod_factor", "pod_options"} <= opts.task_preset
    assert opts.pseudo == "entropy"


@pytest.mark.parametrize("task", ["--task 11-5", "--task 1-1", "--task_file mine.json"])
def test_plop_on_cities(task):
    opts = parse(f"--method PLOP --dataset cityscapes_domain {task}")
    assert opts.pseudo is None and opts.pod_factor == 1e-4 and {"pseudo", "pod_factor"} <= opts.task_preset
    assert opts.pod_options["switch"]["after"]["factor"] == (1e-3 if "1-1" in task.split() else 1e-4)
    assert any(
        f"on cityscapes_domain {task.split()[1]} has a preset of its own" in note for note in argparser.notes(opts)
    )


@pytest.mark.parametrize("task", ["15-5s", "15-5s_w", "15-5", "10-1"])
def test_mib_distils_with_factor_10_on_every_task_unless_told_otherwise(task):
    opts = parse(f"--method MiB --task {task}")
    assert opts.loss_kd == 10 and not opts.task_preset
    assert parse(f"--method MiB --task {task} --loss_kd 100").loss_kd == 100


def test_what_the_user_gives_wins_over_the_preset():
    opts = parse("--method MiB --task 15-5s --loss_kd 3")
    assert opts.loss_kd == 3
    assert "loss_kd" in opts.explicit and "loss_kd" not in dict(opts.preset_applied) and not opts.task_preset
    default = parse("").pod_factor  # a value that equals the program's default is the user's all the same
    assert parse(f"--method PLOP --pod_factor {default}").pod_factor == default


def test_method_lskd_is_the_official_command():
    official = argparser.parse(LSKD_COMMAND)
    ours = parse(
        "--data_root DATA --batch_size 6 --dataset voc --task 10-1 --overlap --step 1 --lr 0.001 --epochs 20 "
        "--opt_level O1 --name PLOP --method LSKD"
    )
    differing = {key for key in vars(official) if vars(official)[key] != vars(ours)[key]}
    assert differing == {"method", "explicit", "preset_applied"}


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_is_accepted(name):
    task = "offline" if name == "Joint" else "6-2"
    argparser.check(parse(f"--dataset shapes --task {task} --method {name}"))


def test_a_method_that_is_not_built_is_refused_by_name(monkeypatch):
    monkeypatch.delitem(methods.METHODS, "RW")
    assert "--method RW" in refusal("--method RW")


def test_options_of_a_method_are_added_once_for_all_that_inherit_it(monkeypatch):
    class MyPart(methods.Part):
        @staticmethod
        def add_options(parser):
            parser.add_argument("--mine", type=float, default=1.0)

    class Mine(methods.METHODS["FT"]):
        name, preset, own_parts = "Mine", {"mine": 2.0}, (MyPart,)

    class Yours(Mine):
        name, preset = "Yours", {}

    monkeypatch.setitem(methods.METHODS, "Mine", Mine)
    monkeypatch.setitem(methods.METHODS, "Yours", Yours)
    assert parse("--method Mine").mine == 2.0
    assert parse("--method Yours").mine == 1.0
    assert parse("--method Mine --mine 3").mine == 3.0
