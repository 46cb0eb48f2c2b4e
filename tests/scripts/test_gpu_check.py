"""scripts/gpu_check: what it makes of reports and measurements, and of a time that is too short."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from scripts.gpu_check import __main__ as gpu_check
from tests.support.paths import ROOT

CASE = {
    "method": "LSKD",
    "batch": 6,
    "iteration_s": 0.5,
    "ratio": 1.25,
    "own_ratio": 1.5,
    "eager_s": 0.75,
    "speedup": 1.5,
    "iteration_peak_mb": 2000.4,
    "memory_ratio": 1.1,
}
FOUND = {
    "machine": {"device": "a GPU", "torch": "2.11"},
    "gpus": 2,
    "tests": {"summary": {"passed": 3, "failed_tests": 1, "skipped": 2}, "failed": ["test_a[LSKD]"]},
    "iterations": [CASE, {"method": "MiB", "batch": 24, "failed": "OutOfMemoryError: too much"}],
    "data": {"sample_ms": 50.0, "images_per_s": 120.0, "workers": 6},
    "profile": [{"operation": "aten::conv", "ms": 1.25, "share": 0.5, "calls": 7}],
}


def test_the_table_shows_every_measurement_and_every_failure():
    lines = gpu_check.markdown(FOUND).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert cells[2] == ["LSKD", "6", "0.500", "12.0", "1.25", "1.50", "0.750", "1.50", "2000", "1.10"]
    assert cells[3][:3] == ["MiB", "24", "OutOfMemoryError: too much"]
    assert cells[-1] == ["`aten::conv`", "1.25", "50.0 %", "7"]
    text = "\n".join(lines)
    assert "120 images/s need 6 processes" in text and "Tests: 3 passed, 1 failed tests, 2 skipped." in text
    assert "- failed: `test_a[LSKD]`" in lines


def test_outcomes_of_a_real_report(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pytest.skip('no GPU')\n"
        "@pytest.fixture\ndef broken(): raise OSError\ndef test_d(broken): pass\n"
    )
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_some.py", f"--junitxml={report}"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}  # of this run
    subprocess.run(command, cwd=tmp_path, capture_output=True, env=environment)
    found = gpu_check.outcomes(report)
    assert found["summary"] == {"passed": 1, "failed_tests": 2, "skipped": 1}
    assert found["failed"] == ["test_b", "test_d"] and found["skipped"] == {"test_c": "no GPU"}
    assert found["seconds"].keys() == {"test_a", "test_b", "test_c", "test_d"}


def test_without_time_everything_is_named_as_not_measured(tmp_path, capsys):
    words = ["--device", "cpu", "--size", "small", "--minutes", "0", "--out", str(tmp_path / "out")]
    assert gpu_check.main(words) == 1
    assert capsys.readouterr().out.count("no time was left") == 2 + len(gpu_check.METHODS)
    found = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert found["tests"]["summary"]["failed"] == found["data"]["failed"] == "no time was left"


def a_check(folder, minutes):
    words = ["--device", "cpu", "--size", "small", "--minutes", str(minutes), "--out", str(folder)]
    return gpu_check.Check(gpu_check.parse(words), torch.device("cpu"))


def test_tests_that_ended_are_kept_if_the_others_are_cut(tmp_path, monkeypatch):
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    (tmp_path / "tests" / "gpu" / "test_cut.py").write_text(
        "import os, signal, pytest\npytestmark = pytest.mark.gpu\ndef test_a(): pass\ndef test_b(): assert 0\n"
        "def test_c(): os.kill(os.getpid(), signal.SIGINT)\ndef test_d(): pass\n"
    )
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    found = a_check(tmp_path / "out", 25).tests()
    assert found["failed"] == ["test_b"] and found["seconds"].keys() == {"test_a", "test_b"}
    assert found["summary"]["failed"].startswith("the tests were interrupted; until then 1 passed, 1 failed tests")


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["foreground", "background"])
def test_a_program_that_takes_too_long_is_interrupted(tmp_path, handler):
    """By SIGINT, after which pytest writes its report, also where a shell started everything in the background."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        _is_interrupted(tmp_path)
        assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, before)


def _is_interrupted(tmp_path):
    noted = tmp_path / "noted"
    program = f"import time\ntry:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    open({str(noted)!r}, 'w')"
    ended = a_check(tmp_path / "out", 0.1).command(["-c", program])
    assert ended == {"failed": "it took longer than the time that was left"} and noted.exists()


def test_without_torch_the_script_says_so_in_one_line(tmp_path):
    without = tmp_path / "python"
    without.write_text("#!/bin/sh\nexit 1\n")
    without.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(without)}
    done = subprocess.run(["bash", "scripts/gpu_check.sh"], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and str(without) in done.stderr and "torch" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_so_in_one_line(tmp_path):
    command = ["bash", "scripts/gpu_check.sh", "--out", str(tmp_path / "out")]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("error: --device cuda: this machine has no CUDA device") and done.stderr.count("\n") == 1
    )
    assert not (tmp_path / "out").exists()
