"""Numbers of the officially released programs: every .npz of the golden folders, one test each.

The environment variable LSKD_GOLDEN_DIR names another folder; without it tests/golden is read, and ../shared/golden where
it exists.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.support import golden_compare, golden_ops
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


@pytest.mark.parametrize("column", range(10))
def test_a_wrong_mean_of_an_epoch_is_noticed_in_every_column(column):
    case, meta = load(GOLDEN / "trace_lskd_lskd_abn.npz")
    rows = case["out_epochs"].copy()
    rows[:, column] *= 1 + 1e-5
    with pytest.raises(AssertionError, match=f"column {meta['epoch_columns'][column]}:"):
        golden_compare.close_by_column(rows, case["out_epochs"], "epochs", meta["epoch_columns"])


@pytest.mark.parametrize("term", range(9))
def test_a_movement_of_a_loss_weight_that_is_wrong_by_a_thousandth_percent_is_noticed(term):
    case, _ = load(GOLDEN / "trace_lskd_lskd_abn.npz")
    weights = case["out_loss_weights"].copy()
    weights[:, term] = 1 + (weights[:, term] - 1) * (1 + 1e-5)
    with pytest.raises(AssertionError, match=f"column {term}:"):
        golden_compare.compare_output("out_loss_weights", weights, case["out_loss_weights"])


def test_a_wrong_figure_of_a_log_line_is_noticed():
    _, meta = load(GOLDEN / "trace_lskd_lskd_abn.npz")
    lines = [golden_compare.log_figures(line) for line in meta["loss_lines"]]
    assert list(lines[0]) == ["CE", "LKD", "LDE", "LReg", "POD", "EntMin"]
    figures = np.array([list(line.values()) for line in lines])
    for column, name in enumerate(lines[0]):
        wrong = figures.copy()
        wrong[-1, column] += 1e-5 * max(figures[:, column].max(), 1)
        with pytest.raises(AssertionError, match=f"column {name}:"):
            golden_compare.close_by_column(wrong, figures, "log lines", list(lines[0]))
