"""Misspelt words of a command line, names in any case, `--` as a value, defaults in the help, and no words at all."""

import re

import pytest

import argparser
import run
from dataset import tasks
from tests.support.command_lines import parse, refusal

ACTIONS = [action for action in argparser.build_parser()._actions if action.dest != "help"]


def complaint(words, capsys):
    """The last line that the parser prints before it ends with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        argparser.parse(words)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# ------------------------------------------------------------------------ names


@pytest.mark.parametrize(("given", "name"), [("plop", "PLOP"), ("mib", "MiB"), ("LWF-mc", "LWF-MC"), ("lskd", "LSKD")])
def test_methods_in_any_case(given, name):
    opts, official = parse(f"--method {given}"), parse(f"--method {name}")
    assert opts.method == name
    assert vars(opts) == vars(official)


@pytest.mark.parametrize(
    ("dataset", "paper", "official"),
    [("voc", "15-1", "15-5s"), ("voc", "10-1", "10-1"), ("ade", "50-50", "50"), ("ade", "100-10", "100-10")],
)
def test_tasks_by_their_names_in_papers(dataset, paper, official):
    opts = parse(f"--dataset {dataset} --task {paper} --method PLOP")
    assert opts.task == official in tasks.names(dataset)
    assert vars(opts) == vars(parse(f"--dataset {dataset} --task {official} --method PLOP"))  # presets are by task


def test_a_name_of_papers_belongs_to_its_data_set():
    assert parse("--dataset folder --task 15-1").task == "15-1"


# ------------------------------------------------------------------ suggestions


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--epoch", "3"], "--epochs"),
        (["--batch-size=3"], "--batch_size"),
        (["--Overlap"], "--overlap"),
        (["—overlap"], "--overlap"),
        (["-batch_size", "3"], "--batch_size"),
        (["--lr", "0.1", "0.2", "--pretraned", "x"], "--pretrained"),
        (["--backbone", "resnet-50"], "resnet50"),
        (["--backbone", "ResNet101"], "resnet101"),
        (["--method", "POLP"], "PLOP"),
        (["--dataset", "VOC"], "voc"),
        (["--dataset", "cityscapes"], "cityscapes_domain"),
    ],
)
def test_what_was_meant(words, meant, capsys):
    said = complaint(words, capsys)
    assert said.endswith(f"; did you mean {meant}?")
    assert words[-1] in said or words[0].partition("=")[0] in said


@pytest.mark.parametrize("words", [["--zzz"], ["zzz"], ["--backbone", "zzz"], ["--task"]])
def test_nothing_is_suggested_for_what_resembles_nothing(words, capsys):
    assert "did you mean" not in complaint(words, capsys)


def test_a_task_that_was_meant():
    assert "it has offline, 6-4, 6-2, 6-1" in refusal("--task 6-3")
    assert refusal("--task ofline").endswith("; did you mean offline?")


def test_a_word_that_the_parser_takes_as_free_text():
    assert refusal("--pod local --pod_prepro rellu").endswith("; did you mean relu?")


# -------------------------------------------------------------------------- "--"


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.dest)
def test_two_dashes_are_no_value_of_any_option(action, capsys):
    for flag in action.option_strings:
        assert f"argument {flag}: '--' is no value" in complaint([f"{flag}=--"], capsys)


@pytest.mark.parametrize("words", [["--"], ["--step", "0", "--", "1"], ["--name", "--", "x"]])
def test_two_dashes_alone_are_refused(words, capsys):
    assert "'--' stands alone" in complaint(words, capsys)


# -------------------------------------------------------------------------- help


def test_defaults_are_in_the_help():
    text = re.sub(r"\s+", " ", argparser.build_parser().format_help())
    for shown in ("epochs of each step (default: 30)", "(default: 1 2 4)", "(default: pod,pod,md,md,md+mcd,md)"):
        assert shown in text
    assert "part of file names (default: Experiment)" in text
    assert "(default: None)" not in text and "(default: False)" not in text and "no effect (default" not in text


@pytest.mark.parametrize("words", [["--help"], ["--method", "PLOP", "--help"]])
def test_the_help_that_a_user_asks_for_has_them_too(words, capsys):
    with pytest.raises(SystemExit) as ended:
        argparser.parse(words)
    assert ended.value.code == 0 and "(default: 0.9)" in capsys.readouterr().out


def test_without_words_the_program_says_how_to_use_it(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["run.py"])
    with pytest.raises(SystemExit) as ended:
        run.main()
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and err == ""
    assert "run.py --help" in out and len(out.splitlines()) < 15
    (command,) = re.findall(r"python run\.py (--dataset .*)", out.replace("\\\n", ""))
    argparser.check(parse(command))
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        run.main()
    assert capsys.readouterr() == ("", "")
