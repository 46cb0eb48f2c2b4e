"""Numbers of the officially released programs: every .npz of the golden folders, one test each.

The environment variable LSKD_GOLDEN_DIR names another folder; without it tests/golden is read, and ../shared/golden where
it exists.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.support import golden_ops
from tests.support.paths import GOLDEN, ROOT


def golden_files() -> list[Path]:
    """The cases, each file name once."""
    named = os.environ.get("LSKD_GOLDEN_DIR")
    folders = [Path(named)] if named else [ROOT.parent / "shared" / "golden", GOLDEN]
    found = {path.name: path for folder in folders for path in folder.glob("*.npz")}
    return [found[name] for name in sorted(found)]


def load(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays of a case, and its meta."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return arrays, json.loads(str(arrays.pop("meta")))


def test_the_folder_has_cases():
    assert golden_files(), "no golden case found; LSKD_GOLDEN_DIR names an empty folder"


@pytest.mark.parametrize("path", golden_files(), ids=lambda path: path.stem)
def test_equals_the_official_program(path):
    case, meta = load(path)
    if meta["op"] == "train_trace":
        from tests.support import golden_trace  # late, because it needs the whole program

        golden_trace.check(case, meta)
    else:
        golden_ops.check(case, meta)


def test_own_choice_has_every_op_and_is_small():
    paths = sorted(GOLDEN.glob("*.npz"))
    assert {load(path)[1]["op"] for path in paths} == {*golden_ops.OPS, "train_trace"}
    assert sum(path.stat().st_size for path in paths) <= 6_000_000


def test_a_wrong_number_is_noticed():
    case, meta = load(GOLDEN / "plop_local_pod_0.npz")
    case["out_embedding"] = case["out_embedding"].copy()
    case["out_embedding"][0, 3] *= 1 + 1e-8
    with pytest.raises(AssertionError):
        golden_ops.check(case, meta)
