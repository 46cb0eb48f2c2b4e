"""The rules of all parts: about options that exist, and complete."""

import pytest

import argparser
import methods
from tests.support.command_lines import parse, refusal
from utils.errors import UserError
from utils.options import checks
from utils.options.rules import Rules

ACTIONS = {action.dest: action for action in argparser.build_parser()._actions}
RULES = argparser.all_rules()

#: Numbers without a range: checked otherwise, or without effect.
UNBOUNDED = {"momentum", "num_classes", "yess"}


def named(rules):
    """Every dest that a rule names."""
    return {
        *rules.ranges, *rules.positive, *rules.choices, *rules.later, *rules.for_later, *rules.nothing_at_step_0,
        *rules.classes_only, *(dest for dest, _, _ in rules.requires),
        *(dest for dests, _ in rules.one_of for dest in dests), *(dest for _, _, dests in rules.idle for dest in dests),
    }  # fmt: skip


def test_rules_are_about_options_that_exist():
    assert {dest for rules in RULES for dest in named(rules)} - set(ACTIONS) == set()


def test_every_number_has_a_range():
    numbers = {dest for dest, action in ACTIONS.items() if action.type in (int, float) and not action.choices}
    bounded = [dest for rules in RULES for dest in (*rules.ranges, *rules.positive)]
    assert numbers - set(bounded) == UNBOUNDED and len(bounded) == len(set(bounded))


@pytest.mark.parametrize("part", methods.all_parts(), ids=lambda part: part.__name__)
def test_ranges_and_later_options_stand_in_the_part_that_adds_the_option(part):
    parser = argparser.argparse.ArgumentParser()
    part.add_options(parser)
    own = {action.dest for action in parser._actions}
    assert {*part.rules.ranges, *part.rules.positive, *part.rules.choices, *part.rules.later} <= own


def test_groups_of_the_help_are_shared_by_title_and_in_order():
    titles = [group.title for group in argparser.build_parser()._action_groups if group._group_actions]
    assert len(titles) == len(set(titles))
    first, last = titles.index("program"), titles.index("classifier")
    assert titles[first : last + 1] == [
        *("program", "data", "task, method and previous step", "optimisation", "outputs", "network"),
        *("precision and speed", "evaluation", *argparser.PART_GROUPS),
    ]


class TestEvaluation:
    """Each field of `Rules` by itself, on options that every command line has."""

    def faults(self, text, **fields):
        with pytest.raises(UserError) as caught:
            checks.check_all(parse(f"--dataset shapes --task 6-2 {text}"), [checks.SHARED, Rules(**fields)])
        return str(caught.value)

    def test_ranges(self):
        assert self.faults("--epochs 3", ranges={"epochs": (4, 5)}) == (
            "--epochs 3 is out of range; give a value from 4 to 5"
        )
        assert "--lr 2 is out of range" in self.faults("--lr 1 2", ranges={"lr": (0, 1.5)})
        assert "above 0" in self.faults("--lr_power 0", positive={"lr_power": 1})

    def test_exclusive(self):
        rule = ("--epochs {epochs}", lambda o: o.epochs == 3, "--freeze", lambda o: o.freeze)
        assert self.faults("--epochs 3 --freeze", exclusive=[rule]) == (
            "--epochs 3 and --freeze exclude each other; leave one out"
        )

    def test_requires(self):
        rule = ("freeze", "--fix_bn", lambda o: o.fix_bn)
        assert self.faults("--freeze", requires=[rule]) == "--freeze needs --fix_bn; add it or leave --freeze out"

    def test_one_of(self):
        message = self.faults("--freeze --fix_bn", one_of=[(["freeze", "fix_bn", "debug"], "what trains")])
        assert message == "--freeze and --fix_bn exclude each other, both set what trains; leave one out"

    def test_choices(self):
        assert self.faults("--name x", choices={"name": ("y", "z")}) == "--name 'x' is unknown; choose one of y, z"

    def test_check(self):
        def check(opts):
            raise UserError(f"never with --name {opts.name}")

        assert self.faults("--name x", check=check) == "never with --name x"

    def test_nothing_at_step_0(self):
        fields = {"nothing_at_step_0": {"sample_num": "does nothing at step 0"}, "later": ["sample_num"]}
        message = self.faults("--sample_num 1", **fields)
        assert message.startswith("--sample_num 1 does nothing at step 0; leave --sample_num out")
        rules = [checks.SHARED, Rules(**fields)]
        for text in ("--sample_num 1 --step 0 1", "--sample_num 1 --lr_old 0.5"):  # all steps; a script's line
            opts = parse(f"--dataset shapes --task 6-2 {text}")
            checks.check_all(opts, rules)
            assert "--sample_num 1 does nothing at step 0" in checks.notes(opts, rules)

    def test_idle(self):
        rules = [checks.SHARED, Rules(idle=[("--fix_bn", lambda o: o.fix_bn, ["freeze"])])]
        assert checks.notes(parse("--freeze"), rules) == ["--freeze does nothing here: it needs --fix_bn"]
        assert checks.notes(parse("--freeze --fix_bn"), rules) == checks.notes(parse(""), rules) == []

    def test_advice(self):
        rules = [checks.SHARED, Rules(advice=[("--lr_power {lr_power} is odd", lambda o: o.lr_power % 2 == 1)])]
        assert checks.notes(parse("--lr_power 3"), rules) == ["--lr_power 3.0 is odd"]
        assert checks.notes(parse("--lr_power 2"), rules) == []


@pytest.mark.parametrize(
    ("text", "advised"),
    [
        ("--backbone mobilenet_v2 --method SDR", True),
        ("--backbone mobilenet_v2 --method SDR --loss_featspars 0", False),
        ("--backbone resnet18 --method SDR", False),
    ],
)
def test_the_sparsity_of_features_that_sum_to_zero(text, advised):
    notes = argparser.notes(parse(f"--dataset shapes --task 6-2 {text}"))
    assert any("--loss_featspars 0.001 divides by the sum" in note for note in notes) == advised


@pytest.mark.parametrize("dest", ["unce", "loss_kd", "icarl", "regularizer", "init_balanced", "lr_old", "pod"])
def test_pseudo_labels_at_step_0_belong_to_a_command_line_of_all_steps(dest):
    text = {"unce": "", "icarl": "", "init_balanced": "", "regularizer": "ewc", "pod": "local"}.get(dest, "1")
    argparser.check(parse(f"--dataset shapes --task 6-2 --pseudo entropy --{dest} {text}"))
    assert "has nothing to label" in refusal("--pseudo entropy --cosine")
