"""scripts/install.sh: which files of requirements are installed when, with a stand-in for the interpreter.

The stand-in notes its arguments. `-m venv FOLDER` puts a copy of it into the folder, so pip is the stand-in too.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

BOTH = ("requirements.txt", "requirements-dev.txt")

STAND_IN = """#!/bin/sh
''''exec "{python}" "$0" "$@" # '''
import json, os, shutil, sys
words = sys.argv[1:]
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps(words) + "\\n")
if words[:2] == ["-m", "venv"]:
    os.makedirs(words[2] + "/bin", exist_ok=True)
    shutil.copy(sys.argv[0], words[2] + "/bin/python")
if words[:1] == ["-c"]:
    sys.exit(int(os.environ.get("TOO_OLD", 0)))
if words[:3] == ["-m", "pip", "install"]:
    print("Collecting torch")
    sys.exit(int(os.environ.get("PIP_STATUS", 0)))
"""


@pytest.fixture
def project(tmp_path):
    """The scripts and the requirements in a folder whose name has a space, and the stand-in beside it."""
    folder = tmp_path / "my project"
    shutil.copytree(ROOT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in BOTH:
        shutil.copy(ROOT / name, folder / name)
    interpreter = tmp_path / "python"
    interpreter.write_text(STAND_IN.format(python=sys.executable))
    interpreter.chmod(0o755)
    return folder


def start(project, script, *words, **variables):
    """The finished process, and what the stand-in was started with."""
    record = project / "record"
    record.unlink(missing_ok=True)
    inherited = {key: value for key, value in os.environ.items() if key != "CISS_VENV"}
    environment = {"PYTHON": str(project.parent / "python"), "RECORD": str(record)}
    finished = subprocess.run(
        ["bash", str(project / "scripts" / script), *words],
        cwd=project.parent,
        env=inherited | environment | variables,
        capture_output=True,
        text=True,
    )
    return finished, [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []


def installed(started):
    """The files that pip was told to install, a list for each time pip was started."""
    calls = [words for words in started if words[:3] == ["-m", "pip", "install"]]
    return [[Path(file).name for flag, file in itertools.pairwise(words) if flag == "-r"] for words in calls]


def test_a_first_call_makes_the_environment_and_shows_what_pip_says(project):
    finished, started = start(project, "install.sh")
    assert finished.returncode == 0
    assert ["-m", "venv", str(project / ".venv")] in started
    assert installed(started) == [["requirements.txt"]]
    assert "Collecting torch" in finished.stdout and "--quiet" not in str(started)


def test_a_second_call_starts_nothing(project):
    start(project, "install.sh", *BOTH)
    finished, started = start(project, "install.sh", *BOTH)
    assert (finished.returncode, finished.stdout, started) == (0, "", [])


@pytest.mark.parametrize("changed", BOTH)
def test_a_changed_file_is_installed_again(changed, project):
    start(project, "install.sh", *BOTH)
    (project / changed).write_text("numpy\n")
    _, started = start(project, "install.sh", *BOTH)
    assert installed(started) == [[changed]]
    assert start(project, "install.sh", *BOTH)[1] == []


def test_the_quickstart_installs_no_tools_of_tests_and_the_tests_install_both(project):
    _, started = start(project, "quickstart.sh")
    assert installed(started) == [["requirements.txt"]]
    assert Path(started[-1][0]).name == "study.py"
    _, started = start(project, "test.sh", "-k", "golden")
    assert installed(started) == [["requirements-dev.txt"]]
    assert started[-1] == ["-m", "pytest", "-k", "golden"]
    assert installed(start(project, "test.sh")[1]) == installed(start(project, "quickstart.sh")[1]) == []


def test_an_environment_of_an_earlier_version_is_brought_up_to_date(project):
    """It holds one copy of all requirements under another name."""
    start(project, "install.sh", *BOTH)
    for name in BOTH:
        (project / ".venv" / f"{name}.installed").unlink()
    (project / ".venv" / "requirements.installed").write_text("torch\n")
    _, started = start(project, "install.sh", *BOTH)
    assert installed(started) == [list(BOTH)] and ["-m", "venv", str(project / ".venv")] not in started
    assert start(project, "install.sh", *BOTH)[1] == []


def test_a_failure_of_pip_is_said_and_the_next_call_tries_again(project):
    finished, _ = start(project, "install.sh", PIP_STATUS="1")
    assert finished.returncode == 2 and "could not be installed" in finished.stderr
    assert installed(start(project, "install.sh")[1]) == [["requirements.txt"]]


def test_a_new_environment_in_an_old_folder_is_filled_again(project):
    """The interpreter that the old one pointed to is gone."""
    start(project, "install.sh")
    (project / ".venv" / "bin" / "python").unlink()
    _, started = start(project, "install.sh")
    assert installed(started) == [["requirements.txt"]]


def test_the_environment_can_be_elsewhere(project):
    other = project.parent / "other place"
    _, started = start(project, "install.sh", CISS_VENV=str(other))
    assert ["-m", "venv", str(other)] in started and not (project / ".venv").exists()


def test_an_old_interpreter_is_refused_with_the_remedy(project):
    finished, started = start(project, "install.sh", TOO_OLD="1")
    assert finished.returncode == 2 and installed(started) == []
    assert finished.stderr.splitlines()[-1].startswith("error: ") and "PYTHON=" in finished.stderr
    finished, _ = start(project, "install.sh", PYTHON="/no/python")
    assert finished.returncode == 2 and "/no/python" in finished.stderr


def test_requirements_of_the_program_have_no_tools_of_tests():
    runtime = (ROOT / "requirements.txt").read_text()
    assert not [tool for tool in ("pytest", "ruff", "hypothesis", "shellcheck", "mypy") if tool in runtime]
    assert "-r requirements.txt" in (ROOT / "requirements-dev.txt").read_text().splitlines()
