"""Numbers of the officially released programs: every .npz of the golden folders, one test each.

The environment variable LSKD_GOLDEN_DIR names another folder; without it tests/golden is read, and ../shared/golden and
../shared/methods/golden where they exist. A folder may hold cases of all ops.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.support import golden_compare, golden_methods, golden_ops
from tests.support.golden_trace import Trace
from tests.support.paths import GOLDEN, ROOT

OPS = golden_ops.OPS | golden_methods.collect("OPS")
TRACES = golden_methods.collect("TRACES")
#: Largest size of the project's own choice of cases, in bytes: of the first programs, and of the methods that came later.
FOLDERS = {GOLDEN: 6_000_000, GOLDEN / "methods": 3_000_000}


def golden_files() -> list[Path]:
    """The cases, each file name once."""
    named = os.environ.get("LSKD_GOLDEN_DIR")
    shared = ROOT.parent / "shared"
    folders = [Path(named)] if named else [shared / "golden", shared / "methods" / "golden", *FOLDERS]
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
        trace = TRACES.get(meta.get("method", ""), Trace)(case, meta)
        trace.run()
        trace.check()
    else:
        golden_ops.check(case, meta, OPS)


def test_own_choice_has_every_op_and_every_kind_of_trace_and_is_small():
    metas = [load(path)[1] for folder in FOLDERS for path in folder.glob("*.npz")]
    assert {meta["op"] for meta in metas} == {*OPS, "train_trace"}
    assert {meta.get("method", "") for meta in metas if meta["op"] == "train_trace"} >= set(TRACES)
    for folder, limit in FOLDERS.items():
        assert sum(path.stat().st_size for path in folder.glob("*.npz")) <= limit


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
