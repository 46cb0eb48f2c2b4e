"""Checkpoints that would exhaust or stop the program, given to everything that reads one.

Part of tests/stress/fault_injection.py.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import time
from pathlib import Path
from typing import Any

from PIL import Image

from scripts import predict
from tests.stress.fault_inputs import execute
from tests.stress.fault_parts import TRACEBACK, words
from tests.support import thin
from tests.utils.checkpointing.test_pickle_scan import HOSTILE, write

#: Seconds in which a hostile file must be refused.
PATIENCE = 20.0

STEP = ("--num_workers", "0", "--method", "FT", "--epochs", "1", "--no_progress")


def _predict(path: Path, folder: Path) -> tuple[int | None, str]:
    said, picture = io.StringIO(), folder / "picture.png"
    Image.new("RGB", (8, 8)).save(picture)
    with contextlib.redirect_stderr(said):
        code = predict.main([str(path), str(picture), "--out", str(folder / "predictions")])
    return code, said.getvalue()


def _run(folder: Path, *more: str) -> tuple[int | None, str]:
    code, _, said = execute(words(folder, *STEP, *more))
    return code, said


def _pretrained(path: Path, folder: Path) -> tuple[int | None, str]:
    argv = [word for word in words(folder, *STEP, "--step", "0") if word != "--no_pretrained"]
    code, _, said = execute([*argv, "--pretrained", str(path)])
    return code, said


def _resume(path: Path, folder: Path) -> tuple[int | None, str]:
    place = folder / "checkpoint" / "6-2-shapes_n_0.resume.pth"
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, place)
    try:
        return _run(folder, "--step", "0", "--resume")
    finally:
        place.unlink()


#: What reads a checkpoint.
READERS = {
    "predict.py": _predict,
    "--ckpt": lambda path, folder: _run(folder, "--step", "0", "--ckpt", str(path)),
    "--test": lambda path, folder: _run(folder, "--step", "0", "--test", "--ckpt", str(path)),
    "--step_ckpt": lambda path, folder: _run(folder, "--step", "1", "--step_ckpt", str(path)),
    "--pretrained": _pretrained,
    "--resume": _resume,
}


def study(folder: Path) -> list[dict[str, Any]]:
    """Every hostile file, in both formats of torch, to every reader.

    Args:
        folder: of the files and the runs.

    Returns:
        One entry a file and reader: what it was, and what was wrong ("" if nothing).
    """
    folder.mkdir(parents=True, exist_ok=True)
    cases = []
    with thin.program():
        for number, (name, (value, _)) in enumerate(HOSTILE.items()):
            for place, (reader, read) in enumerate(READERS.items()):
                path = write(folder / "hostile.pth", value, legacy=(number + place) % 2 == 1)
                began = time.monotonic()
                code, said = read(path, folder)
                seconds = time.monotonic() - began
                refused = "is refused: it holds" in said or "is truncated or damaged" in said
                good = code == 2 and refused and TRACEBACK not in said and seconds < PATIENCE
                wrong = "" if good else f"exit code {code} after {seconds:.0f} s: {said[-1000:]}"
                cases.append({"case": f"{name}, {reader}", "wrong": wrong})
    return cases
