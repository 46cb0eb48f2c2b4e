"""Standard output and standard error that end nothing: full disks, readers that are gone, closed files, narrow encodings."""

import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import thin
from tests.support.paths import ROOT
from utils.runtime import console


class Full(io.StringIO):
    """A stream whose disk is full."""

    def write(self, text):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_loss_is_said_once_on_the_other_stream(monkeypatch, name):
    other = io.StringIO()
    monkeypatch.setattr(sys, "stdout", other)
    monkeypatch.setattr(sys, "stderr", other)
    monkeypatch.setattr(sys, name, Full())
    with console.tolerant():
        for _ in range(3):
            print("a line", file=getattr(sys, name), flush=True)
        print("the end", file=sys.stderr if name == "stdout" else sys.stdout)
    long = {"stdout": "standard output", "stderr": "standard error"}[name]
    assert other.getvalue().splitlines() == [
        f"note: {long} takes no more text (No space left on device); the program goes on without it",
        "the end",
    ]


def test_both_may_be_lost(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Full())
    monkeypatch.setattr(sys, "stderr", None)
    with console.tolerant():
        print("a line")
        print("a line", file=sys.stderr)


def test_a_closed_stream_is_tolerated_and_the_streams_come_back(monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    with console.tolerant():
        print("a line")
    assert sys.stdout is closed


def shell(command, **environment):
    """Run a command line of bash from the program's folder."""
    python = f'python() {{ {shlex.quote(sys.executable)} "$@"; }}; set -o pipefail; '
    return subprocess.run(
        ["bash", "-c", python + command], cwd=ROOT, capture_output=True, check=False, env={**os.environ, **environment}
    )


def test_a_training_whose_output_has_nowhere_to_go_is_finished(tmp_path):
    code = (
        "import sys, pathlib; from tests.support import thin\n"
        "with thin.program(): code = thin.launch(pathlib.Path(sys.argv[1]), sys.argv[2])\n"
        "sys.exit(code)"
    )
    words = shlex.join(["-c", code, str(tmp_path), "--task 6-2 --step 0 --method FT"])
    done = shell(f"python {words} > /dev/full")
    note = b"note: standard output takes no more text (No space left on device); the program goes on without it\n"
    assert (done.returncode, done.stderr) == (0, note)
    assert Path(tmp_path, "checkpoints", "6-2-shapes_n_0.pth").is_file() and thin.rows(tmp_path)


COMMANDS = {
    "reader gone": ("python run.py --help | true", 0),
    "both closed": ("python run.py --list_methods >&- 2>&-", 0),
    "an error nobody hears": ("python run.py --task nonsense 2> /dev/full", 2),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_the_exit_code_does_not_depend_on_the_console(case):
    command, code = COMMANDS[case]
    done = shell(command)
    assert done.returncode == code and b"Traceback" not in done.stderr and b"Exception" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_narrow_encoding_gets_escapes(encoding):
    done = shell("python run.py --help", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert rb"\u03c1" in done.stdout and done.stderr == b""
