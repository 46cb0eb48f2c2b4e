"""pip install -e . : the metadata of the package, and its commands, from another folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from tests.support.paths import ROOT

FOLDERS = ("dataset", "methods", "metrics", "modules", "scripts", "utils")
COMMANDS = {"lskd-train": "run:main", "lskd-report": "scripts.report:main", "lskd-predict": "scripts.predict:main"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A copy of the project, installed with pip from its folder; returns where the packages and the commands are."""
    folder = tmp_path_factory.mktemp("install") / "the project"
    folder.mkdir()
    for path in [*ROOT.glob("*.py"), *(ROOT / name for name in ("pyproject.toml", "README.md", "requirements.txt"))]:
        shutil.copy(path, folder)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    prefix = folder.parent / "prefix"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    words = ["--disable-pip-version-check", "--ignore-installed", "--prefix", str(prefix), "-e", str(folder)]
    done = subprocess.run([*command, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (packages,) = prefix.rglob("site-packages")
    return packages, next(path for path in (prefix / "bin", prefix / "Scripts") if path.is_dir())


def test_metadata(installed):
    packages, _ = installed
    (info,) = packages.glob("lskd_ciss-*.dist-info")
    found = Distribution.at(info)
    assert found.metadata["Name"] == "lskd-ciss" and found.version
    assert found.metadata["Requires-Python"] == ">=3.10"
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert found.requires == [line for line in lines if line and not line.startswith("#")]
    assert {entry.name: entry.value for entry in found.entry_points if entry.group == "console_scripts"} == COMMANDS


def test_a_wheel_has_all_files_of_data(installed, tmp_path):
    folder = installed[0].parents[3] / "the project"
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run(
        [*command, "--disable-pip-version-check", "--wheel-dir", str(tmp_path), str(folder)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    expected = {
        path.relative_to(ROOT).as_posix()
        for name in FOLDERS
        for suffix in ("json", "yaml")
        for path in (ROOT / name).rglob(f"*.{suffix}")
    }
    assert "scripts/studies/presets/animals_found.yaml" in expected
    assert expected <= set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.parametrize(
    ("command", "said"), [("lskd-train", "--pod_factor"), ("lskd-report", "--formats"), ("lskd-predict", "--tile")]
)
def test_commands_start_from_any_folder(installed, tmp_path, command, said):
    _, commands = installed
    done = subprocess.run(
        [str(commands / command), "--help"],
        cwd=tmp_path,
        env=outside(installed, tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_the_modules_are_those_of_the_folder(installed, tmp_path):
    words = [sys.executable, "-c", "import dataset, run; print(run.__file__); print(dataset.__file__)"]
    done = subprocess.run(
        words, cwd=tmp_path, env=outside(installed, tmp_path), capture_output=True, text=True, check=True
    )
    assert [Path(path).parent.name for path in done.stdout.splitlines()] == ["the project", "dataset"]


def outside(installed, folder):
    """An environment whose Python sees what was installed, as a virtual environment would."""
    (folder / "sitecustomize.py").write_text(f"import site\nsite.addsitedir({str(installed[0])!r})\n")
    return {**os.environ, "PYTHONPATH": str(folder)}
