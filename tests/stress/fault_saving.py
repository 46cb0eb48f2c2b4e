"""Full and broken disks, damaged and crafted checkpoints: what a run says, what it leaves, and whether it goes on rightly after.

Part of tests/stress/fault_injection.py.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dataset import shapes  # noqa: E402  (the project is run from its folder, not installed)
from tests.stress.fault_inputs import execute  # noqa: E402
from tests.stress.fault_parts import TRACEBACK, outcome, words  # noqa: E402
from utils.checkpointing import checkpoint_files  # noqa: E402
from utils.reporting import results  # noqa: E402

#: Three epochs of the first step, in this process.
STEP0 = ("--step", "0", "--num_workers", "0", "--ckpt_minutes", "0", "--method", "FT", "--epochs", "3")
STEP1 = ("--step", "1", "--num_workers", "0", "--ckpt_minutes", "0", "--method", "FT", "--dry_run")

#: The same with a method that hands on importances, trained: whatever a file holds is used.
MEASURED0 = (*STEP0, "--method", "RW", "--reg_iterations", "2")
MEASURED1 = (*MEASURED0, "--step", "1", "--epochs", "1")


def write_data_set(folder: Path, train: int = 20, val: int = 4) -> Path:
    """A data set of drawn scenes on disk, with a task file; returns its folder."""
    for name in ("images", "masks", "splits"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            image, mask = shapes.draw(len(split), number, 32)
            Image.fromarray(image).save(folder / "images" / f"{split}{number}.png")
            Image.fromarray(mask).save(folder / "masks" / f"{split}{number}.png")
        (folder / "splits" / f"{split}.txt").write_text("\n".join(f"{split}{number}" for number in range(count)))
    (folder / "classes.txt").write_text("\n".join(shapes.CLASSES))
    (folder / "task.json").write_text(json.dumps({"name": "own", "steps": [list(range(7)), [7, 8], [9, 10]]}))
    return folder


# ---------------------------------------------------------------- broken disks


class FailingFile:
    """A file on a disk that fails after some bytes, or that stores one of them wrongly.

    Args:
        file: the real one.
        good: bytes that are still written well.
        number: errno of the failure; None: the byte after the good ones is flipped and nobody says so.
    """

    def __init__(self, file: Any, good: int, number: int | None):
        self.file, self.good, self.number = file, good, number

    def write(self, data: Any) -> int:
        """Write as far as the disk goes."""
        raw = data.encode() if isinstance(data, str) else bytes(data)
        if len(raw) <= self.good:
            self.good -= len(raw)
            return self.file.write(data)
        if self.number is not None:
            self.file.write(data[: self.good])
            raise OSError(self.number, os.strerror(self.number))
        flipped = raw[: self.good] + bytes([raw[self.good] ^ 1]) + raw[self.good + 1 :]
        self.good = sys.maxsize
        return self.file.write(flipped)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> FailingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


@contextlib.contextmanager
def failing(module: Any, which: int, good: int, number: int | None) -> Iterator[None]:
    """The n-th file (from 0) that a module opens for writing fails after so many good bytes."""
    opened = 0

    def opening(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        nonlocal opened
        file = builtins.open(path, mode, *args, **kwargs)  # noqa: SIM115 (the caller closes it)
        if "w" not in mode:
            return file
        opened += 1
        return FailingFile(file, good, number) if opened == which + 1 else file

    module.open = opening
    try:
        yield
    finally:
        del module.open


@contextlib.contextmanager
def failing_call(name: str, which: int, number: int) -> Iterator[None]:
    """The n-th call (from 0) of a function of `os` fails."""
    real, called = getattr(os, name), 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal called
        called += 1
        if called == which + 1:
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    setattr(os, name, call)
    try:
        yield
    finally:
        setattr(os, name, real)


def saving_alone(folder: Path) -> list[dict[str, Any]]:
    """`checkpoint_files.save` on a disk that fails at every tenth of the file, in the flush, in the rename, or silently."""
    folder.mkdir(parents=True, exist_ok=True)
    path, old, new = folder / "state.pth", {"w": torch.zeros(5000)}, {"w": torch.ones(5000)}
    checkpoint_files.save(path, old)
    before, size, cases = path.read_bytes(), path.stat().st_size, []
    faults: list[tuple[str, Callable]] = []
    for number in (errno.ENOSPC, errno.EIO):
        name = errno.errorcode[number]
        for tenth in range(10):
            at = size * tenth // 10
            faults.append(
                (f"{name} at {tenth}0 %", lambda at=at, number=number: failing(checkpoint_files, 0, at, number))
            )
        for call in ("fsync", "replace"):
            faults.append((f"{name} in {call}", lambda call=call, number=number: failing_call(call, 0, number)))
    at = before.index(bytes(4000))  # in the tensor, not in the padding of the archive
    faults.append(("a byte is stored wrongly", lambda: failing(checkpoint_files, 0, at + 100, None)))
    for name, fault in faults:
        wrong = "wrong success"
        try:
            with fault():
                checkpoint_files.save(path, new)
        except OSError:
            kept = path.read_bytes() == before and list(folder.iterdir()) == [path]
            wrong = "" if kept else "the previous file is not as it was, or a part is left"
        cases.append({"case": f"a checkpoint is saved: {name}", "wrong": wrong})
    return cases


def _refused(argv: list[str], *parts: str) -> str:
    """What is wrong about a run that must end with exit code 2 and a sentence with these parts."""
    code, _, said = execute(argv)
    good = code == 2 and said.count("error: ") == 1 and TRACEBACK not in said and all(part in said for part in parts)
    return "" if good else f"exit code {code}: {said[-1500:]}"


def _whole(folder: Path) -> str:
    """What is wrong with the CSV and JSON files of a folder."""
    for path in (folder / "results").glob("[!.]*.*"):
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".csv" and (
            not path.read_text().endswith("\n") or any(line.count(",") != 12 for line in path.read_text().splitlines())
        ):
            return f"{path} is half-written"
    return "parts are left" if list((folder / "results").glob(".*.writing")) else ""


def running_into(folder: Path, expected: dict[str, str]) -> list[dict[str, Any]]:
    """Whole runs whose disk fails once: refused with a sentence, and the same command with --resume ends as if nothing had been."""
    checkpoints = [(checkpoint_files, which, f"checkpoint {which + 1}") for which in range(4)]
    tables = [(results, which, ("CSV", "JSON")[which]) for which in range(2)]
    cases = []
    for module, which, title in checkpoints + tables:
        for number in (errno.ENOSPC, errno.EIO):
            place = folder / f"{title}{number}".replace(" ", "")
            argv = words(place, *STEP0)
            good = 20 if module is results else 20_000 if which else 200
            with failing(module, which, good, number):
                wrong = _refused(argv, "cannot be written", os.strerror(number))
            wrong = wrong or _whole(place) or _goes_on(argv, place, expected)
            cases.append({"case": f"{errno.errorcode[number]} while {title} of a run is written", "wrong": wrong})
            shutil.rmtree(place)
    return cases


def _goes_on(argv: list[str], place: Path, expected: dict[str, str]) -> str:
    """What is wrong about the same command with --resume."""
    code, _, said = execute([*argv, "--resume"])
    ended = {name: found for name, found in outcome(place).items() if not name.endswith(".replaced.pth")}
    if code != 0 or ended != expected:
        return f"not continued to the same end, exit code {code}: {said[-1500:]}"
    return ""


def make_older(folder: Path) -> None:
    """Change the weights of the only finished step and its recorded test, as if another version of the program had trained it."""
    (path,) = folder.glob("checkpoint*/*_0.pth")
    state = checkpoint_files.load(path)
    state["model_state"]["module.cls.0.bias"][1] += 0.5
    checkpoint_files.save(path, state)
    (table,) = folder.glob("results/*.csv")
    table.write_text(table.read_text().replace("0.", "0.1", 1))
    document = json.loads(table.with_suffix(".json").read_text())
    weights = checkpoint_files.digest(checkpoint_files.without_prefix(state["model_state"]))
    document["steps"]["0"] |= {"weights_sha256": weights, "all": 1.5}
    table.with_suffix(".json").write_text(json.dumps(document))


def stale_results(folder: Path, expected: dict[str, str]) -> list[dict[str, Any]]:
    """A second training whose results cannot replace the first one's: --resume must not take the old row for the new one's."""
    cases = []
    for call in (0, 1):
        argv = words(folder / "a", *STEP0)
        execute(argv)
        make_older(folder / "a")
        renames = (
            2 + 2 + 1 + call
        )  # begin, two states with the one before each, the older checkpoint set aside, the finished step
        with failing_call("replace", renames + 2, errno.EIO):
            wrong = _refused(argv, "the results cannot be written")
        wrong = wrong or _whole(folder / "a") or _goes_on(argv, folder / "a", expected)
        cases.append({"case": f"EIO in rename {call + 1} of results that exist", "wrong": wrong})
        shutil.rmtree(folder / "a")
    return cases


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[bool]:
    """A small file system of its own on the folder, where the user may mount one; says whether."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield bool(mounted)
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Write until the disk is full."""
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return ballast


def full_disks(folder: Path, expected: dict[str, str]) -> list[dict[str, Any]]:
    """Real full file systems under the results, the TensorBoard files and the checkpoints."""
    cases = []
    for kind, parts in (("results", ("results cannot be written", "No space left")), ("checkpoint", ("MB free",))):
        place = folder / kind
        with small_disk(place / kind, 1) as mounted:
            if not mounted:
                print("note: no right to mount a small disk; full disks are only simulated", flush=True)
                return []
            ballast = fill(place / kind)
            argv = words(place, *STEP0)
            wrong = _refused(argv, *parts)
            ballast.unlink()
            if kind == "results":
                wrong = wrong or _whole(place) or _goes_on(argv, place, expected)
        cases.append({"case": f"full disk under --{kind}", "wrong": wrong})
    with small_disk(folder / "log" / "logdir", 1) as mounted:
        fill(folder / "log" / "logdir")
        code, _, said = execute(words(folder / "log", *STEP0))
    wrong = "" if code == 0 and outcome(folder / "log") == expected else f"exit code {code}: {said[-1500:]}"
    cases.append({"case": "full disk under --logdir", "wrong": wrong})
    return cases


# ------------------------------------------------------- damaged and crafted files


def damages(raw: bytes, rng: random.Random, flips: int, cuts: int = 10) -> Iterator[tuple[str, bytes]]:
    """The file cut at every tenth, with flipped bytes, with a block of zeros, of another kind."""
    for tenth in range(0, 10, 10 // cuts):
        yield f"cut at {tenth}0 %", raw[: len(raw) * tenth // 10]
    yield "without its last byte", raw[:-1]
    for number in range(flips):
        flipped = bytearray(raw)
        for _ in range(rng.randint(1, 8)):
            flipped[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        yield f"flipped bytes, {number}", bytes(flipped)
    at = rng.randrange(len(raw) // 2)
    yield "a block of zeros", raw[:at] + bytes(4096) + raw[at + 4096 :]
    yield "a picture", b"\x89PNG\r\n\x1a\n" + bytes(100)


def damaged_previous(folder: Path, finished: Path, rng: random.Random, flips: int) -> list[dict[str, Any]]:
    """A damaged checkpoint of step 0 must be refused by step 1."""
    raw, cases = finished.read_bytes(), []
    path = folder / "checkpoint" / finished.name
    path.parent.mkdir(parents=True)
    content = checkpoint_files.digest(checkpoint_files.load(finished))
    for name, damaged in damages(raw, rng, flips):
        path.write_bytes(damaged)
        code, printed, said = execute(words(folder, *STEP1))
        good = code == 2 and str(path) in said and TRACEBACK not in said
        if code == 0:  # a flip in the padding of the archive changes nothing
            good = checkpoint_files.digest(checkpoint_files.load(path)) == content
        cases.append({"case": f"previous step: {name}", "wrong": "" if good else f"exit code {code}: {printed} {said}"})
    shutil.rmtree(folder)
    return cases


def interrupt(folder: Path, options: tuple[str, ...] = STEP0) -> list[str]:
    """Leave an interrupted run after its second saved state; returns its command line."""
    argv = words(folder, *options)
    with failing(checkpoint_files, 3, 100, errno.EIO):
        execute(argv)
    return argv


def damaged_state(folder: Path, expected: dict[str, str], rng: random.Random, cuts: int = 10) -> list[dict[str, Any]]:
    """A damaged state of an interrupted run: the one before it is continued; without that one, a sentence."""
    argv, cases = interrupt(folder), []
    kept = {path: path.read_bytes() for path in (folder / "checkpoint").iterdir()}
    (last,) = (path for path in kept if path.name.endswith(".resume.pth"))
    (before,) = (path for path in kept if path.name.endswith(".before.pth"))
    for name, damaged in damages(kept[last], rng, 2, cuts):
        last.write_bytes(damaged)
        wrong = _goes_on(argv, folder, expected)
        for path, raw in kept.items():
            path.write_bytes(raw)
        cases.append({"case": f"state of an interrupted run: {name}", "wrong": wrong})
        next((folder / "checkpoint").glob("*_0.pth")).unlink()
    last.write_bytes(kept[last][:-10])
    before.write_bytes(kept[before][:-10])
    cases.append({"case": "both states damaged", "wrong": _refused([*argv, "--resume"], str(before), "damaged")})
    shutil.rmtree(folder)
    return cases


def craft(state: dict[str, Any], rng: random.Random) -> str:
    """Drop an entry of a nested dictionary or replace it by a value of another kind, in place; says what was done."""
    values = (
        None,
        3,
        -1.5,
        "x",
        [],
        {},
        [1, 2],
        {"a": 1},
        torch.zeros(2),
        torch.zeros(0),
        torch.tensor(float("nan")),
        True,
    )
    spot, key = state, rng.choice(sorted(state))
    while isinstance(spot[key], dict) and spot[key] and rng.random() < 0.6:
        spot[key] = dict(spot[key])
        spot, key = spot[key], rng.choice(sorted(spot[key], key=str))
    if rng.random() < 0.3:
        del spot[key]
        return f"without {key}"
    spot[key] = rng.choice(values)
    return f"{key} = {spot[key]!r:.30}"


def crafted(folder: Path, rng: random.Random, number: int) -> list[dict[str, Any]]:
    """Files that load, but hold what nobody expects: refused with a sentence, or harmless."""
    argv, cases = interrupt(folder, MEASURED0), []
    (unfinished,) = (folder / "checkpoint").glob("*.resume.pth")
    states = [checkpoint_files.load(unfinished)]
    execute([*argv, "--resume"])
    (finished,) = (folder / "checkpoint").glob("*_0.pth")
    states.append(checkpoint_files.load(finished) | {"optimizer_state": {}})
    # the command lines that read a file, and which entry of it every second case spoils
    ways = {
        unfinished: (((*MEASURED0, "--resume"),), "state"),
        finished: ((MEASURED1, (*MEASURED0, "--test")), "trainer_state"),
    }
    for case in range(number):
        for (path, (commands, inner)), state in zip(ways.items(), states):
            for file in (folder / "checkpoint").glob("*.pth"):
                file.unlink()
            changed, part = dict(state), {inner: state[inner]}
            name = craft(part if case % 2 else changed, rng)
            if case % 2:
                del changed[inner]
                changed |= part
            checkpoint_files.save(path, changed)
            told = []
            for more in commands:
                code, _, said = execute(words(folder, *more))
                if code not in (0, 2) or TRACEBACK in said:
                    told.append(f"{more}: exit code {code}: {said[-1500:]}")
            cases.append({"case": f"crafted {path.name} {case}: {name}", "wrong": "; ".join(told)})
    shutil.rmtree(folder)
    return cases


def study(folder: Path, seed: int, flips: int = 30, crafts: int = 20) -> list[dict[str, Any]]:
    """Every fault.

    Args:
        folder: for the runs.
        seed: of the random ones.
        flips: files with flipped bytes.
        crafts: files with unexpected content.

    Returns:
        One entry a fault: what it was, and what was wrong ("" if nothing).
    """
    rng = random.Random(seed)
    np.random.seed(seed)
    code, _, said = execute(words(folder / "calm", *STEP0))
    assert code == 0, said
    expected = outcome(folder / "calm")
    (finished,) = (folder / "calm" / "checkpoint").glob("*_0.pth")
    cases = saving_alone(folder / "alone")
    for what in (running_into, stale_results, full_disks):
        cases += what(folder / what.__name__, expected)
        print(f"  {what.__name__}: {len(cases)} faults so far", flush=True)
    cases += damaged_previous(folder / "previous", finished, rng, flips)
    cases += damaged_state(folder / "state", expected, rng)
    return cases + crafted(folder / "crafted", rng, crafts)
