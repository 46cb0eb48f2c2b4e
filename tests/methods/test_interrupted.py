"""Every method is killed in the middle of a step and resumed, to the bit, by one process: those whose own tests do not do it."""

import pytest

import methods
from tests.support import interrupted, thin

#: Methods that are killed elsewhere: in tests/program/test_resume.py, and in the file of the method.
ELSEWHERE = {"FT", "LSKD", "RW", "REMINDER", "MiB+AWT", "RCIL", "MiB+EWF", "SDR", "UCD", "MiB+NeST", "ALIFE-M"}
#: Command lines of the others, and the iteration, those of phases included, before which they are killed.
COMMANDS = {
    "Joint": 2,
    "LWF": 1,
    "LWF-MC": 1,
    "ILT": 1,
    "EWC": 1,
    "PI": 1,
    "MiB": 1,
    "PLOP": 1,
    "ALIFE": 1,
    "PLOP+EWF": 1,
    "LSKD+EWF": 1,
    "PLOP+NeST --warm_epochs 1": 1,
    "LSKD+NeST --warm_epochs 1": 3,
}
#: Methods that need what their own step 0 leaves.
OWN_STEP_0 = ("EWC", "PI")


pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture(scope="module")
def step0(tmp_path_factory):
    """The checkpoint of a step 0 that serves all methods but those of `OWN_STEP_0`."""
    folder = tmp_path_factory.mktemp("step0")
    with thin.program():
        assert thin.launch(folder, "--task 6-2 --method FT --step 0") == 0
    return folder / "checkpoints" / "6-2-shapes_n_0.pth"


def test_every_method_is_killed():
    assert {words.split()[0] for words in COMMANDS} | ELSEWHERE == set(methods.METHODS)


@pytest.mark.parametrize("words", COMMANDS)
def test_killed_and_resumed_to_the_bit(words, step0, tmp_path):
    joint, start = words == "Joint", None if words in OWN_STEP_0 else step0
    text = f"--task {'offline' if joint else '6-2'} --method {words}"
    whole, parts = interrupted.run_twice(tmp_path, text, step=0 if joint else 1, at=COMMANDS[words], start=start)
    interrupted.assert_equal_to_the_bit(whole, parts)
