"""Tests and measurements on the GPUs of a machine, in one JSON file and one Markdown table for docs/performance.md.

    bash scripts/gpu_check.sh                            # all GPUs of this machine, at most 25 minutes
    bash scripts/gpu_check.sh --device cpu --size small  # the same on the CPU in a few minutes, to test this program

tests        those marked `gpu` (tests/gpu): norms, iterations against the CPU's, mixed precision, channels_last, --compile, the gate of
             the optimiser's step, resume, trial batch, all GPUs together with nccl. They need pytest.
iterations   seconds and peak memory of FT, PLOP, LSKD and MiB at two sizes of the batch (small: one), in mixed precision with
             channels_last, beside the floor in the same precision and beside eager float32 (scripts/benchmark says what the floor is).
data         milliseconds of a training sample in one process, and how many processes keep up with the iterations.
profile      the ten operations that take most time in an LSKD iteration.

No network, no data set and no TensorBoard are needed. The files are written again after every measurement, so that a run which is
interrupted leaves what it has measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402  (the project is run from its folder, not installed)
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from scripts.benchmark.__main__ import parse as benchmark_arguments  # noqa: E402
from scripts.benchmark.workbench import Workbench, choose_device, machine  # noqa: E402
from utils.errors import UserError  # noqa: E402
from utils.reporting.tables import Table  # noqa: E402

METHODS = ("FT", "PLOP", "LSKD", "MiB")
#: By --size: options of scripts/benchmark, and sizes of the batch.
SIZES: dict[str, tuple[list[str], tuple[int, ...]]] = {
    "full": (["--backbone", "resnet101", "--crop_size", "512", "--repeats", "5"], (6, 24)),
    "small": (["--backbone", "resnet18", "--crop_size", "64", "--repeats", "1"], (2,)),
}
#: What is compared with eager float32.
FAST = ["--amp_dtype", "bfloat16", "--channels_last"]
#: Exit code of pytest after SIGINT.
INTERRUPTED = 2
#: For a program whose time is over.
SECONDS_TO_END = 30
#: Operations of the profile.
SHOWN = 10


class Check:
    """The measurements, within a time, and the files that they are written to.

    Args:
        arguments: device, size, minutes, out.
        device: where to measure.
    """

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self.arguments, self.device = arguments, device
        self.options, self.batches = SIZES[arguments.size]
        self.ends = time.monotonic() + 60 * arguments.minutes
        self.out = Path(arguments.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.found: dict[str, Any] = {"machine": machine(device), "gpus": torch.cuda.device_count()}

    def run(self) -> bool:
        """Everything in turn.

        Returns:
            Whether all tests passed and everything was measured.
        """
        for name, measure in (
            ("tests", self.tests),
            ("iterations", self.iterations),
            ("data", self.data),
            ("profile", self.profile),
        ):
            print(f"{name} ...", flush=True)
            self.found[name] = measure()
            self.write()
        (self.out / "gpu_check.md").write_text(markdown(self.found))
        failed = self.found["tests"]["failed"] + [case["failed"] for case in self.cases() if "failed" in case]
        return not failed

    def cases(self) -> list[dict[str, Any]]:
        """Measured iterations and data."""
        return [*self.found["iterations"], self.found["data"], self.found["tests"]["summary"]]

    def write(self) -> None:
        """What was found so far."""
        (self.out / "gpu_check.json").write_text(json.dumps(self.found, indent=1) + "\n")

    def command(
        self, words: list[str], environment: dict[str, str] | None = None, reserve: float = 0.0
    ) -> dict[str, Any]:
        """Run a program of the project in the time that is left.

        Args:
            words: after the interpreter.
            environment: variables to add.
            reserve: share of `--minutes` that is kept for what comes after.

        Returns:
            {"code", "output"}, or {"failed": why}.
        """
        left = self.ends - time.monotonic() - 60 * self.arguments.minutes * reserve
        if left <= 0:
            return {"failed": "no time was left"}
        # A shell lets its background programs ignore SIGINT, and theirs would inherit it: what is handled here is not ignored there
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env=os.environ | (environment or {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        finally:
            signal.signal(signal.SIGINT, before)
        try:
            output, errors = process.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest still writes its report of the tests that ended
            try:
                process.communicate(timeout=SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
            return {"failed": "it took longer than the time that was left"}
        return {"code": process.returncode, "output": output, "errors": errors}

    def tests(self) -> dict[str, Any]:
        """Outcomes of the tests that are marked `gpu`."""
        report = self.out.resolve() / "tests.xml"
        report.unlink(missing_ok=True)
        pytest = ["-m", "pytest", "-o", "addopts=", "--import-mode=importlib", "-q", "-m", "gpu", "tests/gpu"]
        ended = self.command([*pytest, f"--junitxml={report}"], {"GPU_CHECK_DEVICE": self.device.type}, reserve=0.4)
        if not report.is_file():
            why = ended.get("failed") or last_line(ended["errors"] or ended["output"])
            return {"summary": {"failed": why}, "failed": [], "skipped": {}, "seconds": {}}
        cut = "failed" in ended or ended["code"] == INTERRUPTED
        found = outcomes(report, cut)
        if cut:
            why = ended.get("failed", "the tests were interrupted")
            found["summary"]["failed"] = f"{why}; until then {counts_of(found['summary'])}"
        return found

    def benchmark(self, words: list[str], reserve: float = 0.0) -> dict[str, Any]:
        """The line of JSON of scripts/benchmark, or {"failed": why}."""
        ended = self.command(["scripts/benchmark", "--device", self.device.type, "--json", *words], reserve=reserve)
        if "failed" in ended:
            return ended
        if ended["code"]:
            return {"failed": last_line(ended["errors"])}
        found: dict[str, Any] = json.loads(ended["output"].splitlines()[-1])
        return found

    def iterations(self) -> list[dict[str, Any]]:
        """A case for each batch and method, in the order of the table."""
        found = []
        for batch in self.batches:
            for method in METHODS:
                print(f"  {method}, batch {batch}", flush=True)
                words = [*self.options, "--method", method, "--batch_size", str(batch), *FAST]
                measured = self.benchmark([*words, "--what", "iteration", "memory"], reserve=0.1)
                found.append({"method": method, "batch": batch} | measured)
                self.found["iterations"] = found
                self.write()
        return found

    def data(self) -> dict[str, Any]:
        """A training sample, and the processes that keep up with the fastest method."""
        small = ["--samples", "8", "--masks", "40"] if self.arguments.size == "small" else []
        found = self.benchmark(["--what", "data", *self.options, *small])
        rates = [case["batch"] / case["iteration_s"] for case in self.found["iterations"] if "iteration_s" in case]
        if "sample_ms" in found and rates:
            found["images_per_s"] = max(rates)
            found["workers"] = math.ceil(max(rates) * found["sample_ms"] / 1000)
        return found

    def profile(self) -> list[dict[str, Any]]:
        """The operations of an LSKD iteration that take most time; empty if no time was left."""
        if time.monotonic() >= self.ends:
            return []
        words = [*self.options, "--method", "LSKD", "--batch_size", str(self.batches[0]), *FAST]
        bench = Workbench(
            benchmark_arguments([*words, "--device", self.device.type]), self.device, parts=("iteration",)
        )
        on_gpu = self.device.type == "cuda"
        for _ in range(3):
            bench.iteration()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=activities) as profiler:
            bench.iteration()
            if on_gpu:
                torch.cuda.synchronize()
        events = [
            (event.key, event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
            for event in profiler.key_averages()
        ]
        events.sort(key=lambda event: -event[1])
        total = sum(spent for _, spent, _ in events) or 1.0
        return [
            {"operation": key, "ms": spent / 1000, "share": spent / total, "calls": calls}
            for key, spent, calls in events[:SHOWN]
        ]


def last_line(text: str) -> str:
    """The line of an error's output that names it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:120] if lines else "it ended with an error and said nothing"


def outcomes(report: Path, cut: bool = False) -> dict[str, Any]:
    """What pytest's report says.

    Args:
        report: file of `--junitxml`.
        cut: pytest was interrupted. The report names the test that was running last, as if it had passed; it is left out.

    Returns:
        "summary": numbers by outcome; "failed": names; "skipped": reasons by name; "seconds" by name.
    """
    failed, skipped, seconds, number = [], {}, {}, 0
    cases = list(ElementTree.parse(report).iter("testcase"))
    for case in cases[:-1] if cut else cases:
        name, number = str(case.get("name")), number + 1
        seconds[name] = float(case.get("time") or 0)
        reason = case.find("skipped")
        if reason is not None:
            skipped[name] = str(reason.get("message"))
        elif case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
    passed = number - len(failed) - len(skipped)
    summary = {"passed": passed, "failed_tests": len(failed), "skipped": len(skipped)}
    return {"summary": summary, "failed": failed, "skipped": skipped, "seconds": seconds}


def counts_of(summary: dict[str, Any]) -> str:
    """Numbers of tests by outcome, as text."""
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in summary.items())


def markdown(found: dict[str, Any]) -> str:
    """The tables of docs/performance.md.

    Args:
        found: as `Check` collects it.
    """
    named = found["machine"]
    lines = [f"{named['device']}, torch {named['torch']}, GPUs: {found['gpus']}. Options: `{' '.join(FAST)}`.", ""]
    rows = [iteration_row(case) for case in found["iterations"]]
    heads = [
        "method",
        "batch",
        "s",
        "images/s",
        "/ floor",
        "/ own floor",
        "eager float32 s",
        "faster",
        "peak MB",
        "memory / floor",
    ]
    lines += [Table(heads, rows).markdown(), ""]
    data = found["data"]
    if "failed" in data:
        lines.append(f"Data: {data['failed']}.")
    else:
        rate = (
            f"{data['images_per_s']:.0f} images/s need {data['workers']} processes"
            if "workers" in data
            else "no iteration"
        )
        lines.append(f"Data: a training sample takes {data['sample_ms']:.1f} ms in one process; {rate}.")
    summary = found["tests"]["summary"]
    said = summary.get("failed") or counts_of(summary)
    lines += ["", f"Tests: {said}.", *(f"- failed: `{name}`" for name in found["tests"]["failed"])]
    lines += ["", "Operations of an LSKD iteration:", ""]
    shown = [
        [f"`{event['operation'][:70]}`", f"{event['ms']:.2f}", f"{100 * event['share']:.1f} %", str(event["calls"])]
        for event in found["profile"]
    ]
    lines += [Table(["operation", "ms", "share", "calls"], shown).markdown()]
    return "\n".join(lines) + "\n"


def iteration_row(case: dict[str, Any]) -> list[str]:
    """A row of the table of iterations."""
    head = [case["method"], str(case["batch"])]
    if "failed" in case:
        return [*head, case["failed"], *[""] * 7]
    return [
        *head,
        f"{case['iteration_s']:.3f}",
        f"{case['batch'] / case['iteration_s']:.1f}",
        f"{case['ratio']:.2f}",
        f"{case['own_ratio']:.2f}",
        f"{case['eager_s']:.3f}",
        f"{case['speedup']:.2f}",
        f"{case['iteration_peak_mb']:.0f}",
        f"{case['memory_ratio']:.2f}",
    ]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--device", default="cuda", choices=["cuda", "cpu"], help="where to test and measure")
    add("--size", default="full", choices=list(SIZES), help="full: ResNet-101 at 512 px; small: to test this program")
    add("--minutes", type=float, default=25.0, help="what would take longer is left out")
    add("--out", default="runs/gpu_check", help="folder of gpu_check.json, gpu_check.md and tests.xml")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0 if all tests passed and everything was measured, 1 if not, 2 after a message for arguments that cannot work."""
    arguments = parse(argv)
    try:
        check = Check(arguments, choose_device(arguments.device))
        complete = check.run()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print((check.out / "gpu_check.md").read_text())
    print(f"written: {check.out / 'gpu_check.json'}, {check.out / 'gpu_check.md'}")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
