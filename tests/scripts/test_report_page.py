"""The page of a report in a browser, runs that are the beginning of others, and files that cannot be shown."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.scripts.test_report import cells, go, write
from tests.support.paths import ROOT
from utils.reporting import figures, pictures, runs
from utils.reporting.pictures import Legend, Sample
from utils.reporting.visualize import colour_map

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


def change(path, edit):
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
    return path


# ------------------------------------------------------------------------- a study


def run_of(folder, name, weights, **changed):
    """A run whose steps have these weights."""
    path = write(folder, name=name, scores=tuple(50.0 - step for step in range(len(weights))), **changed)

    def edit(document):
        for step, sha in enumerate(weights):
            document["steps"][str(step)] |= {"weights_sha256": sha, "evaluation": {"crop_val": True}}

    return change(path, edit)


def test_a_shared_step_0_has_no_row_of_its_own(tmp_path, capsys):
    run_of(tmp_path, "step0", ["a"])
    run_of(tmp_path, "FT", ["a", "b"])
    run_of(tmp_path, "LSKD", ["a", "c", "d"])
    assert go(tmp_path, tmp_path) == 0
    said = capsys.readouterr().out
    assert re.search(r"^note: step0 is left out: its steps are the first ones of (FT|LSKD)$", said, flags=re.MULTILINE)
    assert {row[0] for row in cells(said)[2:]} == {"FT", "LSKD"}


def test_other_runs_keep_their_rows(tmp_path, capsys):
    """Other weights, as many steps, another test of the same weights, or a file that does not name its weights."""
    run_of(tmp_path, "long", ["a", "b", "c"])
    run_of(tmp_path, "other", ["a", "x"])
    run_of(tmp_path, "again", ["a", "b", "c"])
    change(
        run_of(tmp_path, "views", ["a"]), lambda d: d["steps"]["0"].update(evaluation={"crop_val": True, "flip": True})
    )
    change(run_of(tmp_path, "early", ["a"]), lambda d: d["steps"]["0"].pop("weights_sha256"))
    assert go(tmp_path, tmp_path) == 0
    said = capsys.readouterr().out
    assert "left out" not in said and len({row[0] for row in cells(said)[2:]}) == 5


# ---------------------------------------------------------------------- wrong files


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda d: d.update(steps={}), "has the scores of no step; leave it out"),
        (lambda d: d.update(unit="permille"), "('unit' is 'permille', this version of the program knows 'percent')"),
        (lambda d: d.update(unit=3), "is not one that this program wrote ('unit')"),
        (lambda d: d.pop("class_order"), "is not one that this program wrote (no 'class_order')"),
    ],
)
def test_runs_that_cannot_be_shown(tmp_path, capsys, edit, said):
    path = change(write(tmp_path), edit)
    assert go(tmp_path, path) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error and str(path) in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n\x00\x80", b"just text"])
def test_a_wrong_file(tmp_path, capsys, content):
    (tmp_path / "x.json").write_bytes(content)
    assert go(tmp_path, tmp_path / "x.json") == 2
    assert f"results file {tmp_path / 'x.json'} is not one that this program wrote" in capsys.readouterr().err


def test_a_run_of_an_early_version_is_shown(tmp_path, capsys):
    """Fractions, no method, no base classes, no options, a key that this version does not know."""

    def edit(document):
        document["steps"] = {"0": {"old": 0.5, "new": None, "all": 0.5, "unknown": [1]}}
        document.pop("unit")

    assert go(tmp_path, change(write(tmp_path), edit)) == 0
    assert ["n", "shapes 6-2", "0", "50.00", "-", "50.00", "-", "50.00"] in cells(capsys.readouterr().out)


def test_without_a_display(tmp_path):
    """Also where the environment names a backend of matplotlib that needs one."""
    path = write(tmp_path)
    environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY")}
    command = [sys.executable, ROOT / "scripts" / "report.py", path, "--out", tmp_path / "out", "--formats", "png"]
    done = subprocess.run(
        command, env=environment | {"MPLBACKEND": "TkAgg"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "miou_by_step.png").is_file()


# --------------------------------------------------------------------------- figures


def test_losses_have_plain_numbers_at_their_axis(tmp_path):
    (run,) = runs.read([write(tmp_path)])
    figure = figures.draw_history(run, figures.term_styles([run]))
    figure.canvas.draw()
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert {"1", "2"} <= set(shown) and not any("$" in text or "\\" in text for text in shown)


# ------------------------------------------------------------------------- in a browser

#: Tells the page around it how wide the page is, and all errors.
PROBE = """<script>
window.failures = [];
window.addEventListener("error", e => window.failures.push(e.message || (e.target && e.target.outerHTML.slice(0, 80))), true);
window.addEventListener("load", () => {
  const page = document.documentElement, requests = performance.getEntriesByType("resource").map(r => r.name.slice(0, 60));
  const wide = [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > page.clientWidth + 1
    && !e.closest(".scroll, figure")).map(e => e.tagName);
  parent.postMessage(JSON.stringify({scroll: page.scrollWidth, client: page.clientWidth, failures: window.failures,
    requests: requests.filter(name => !name.startsWith("data:")), wide: wide,
    broken: [...document.images].filter(i => !i.naturalWidth).length}), "*");
});
</script>"""
#: A frame of a given width, as no window of Chromium is narrower than 500 pixels; what the page tells becomes the title.
FRAME = """<!doctype html><title></title><script>window.addEventListener("message", e => { document.title = e.data; });</script>
<iframe src="report.html" style="border: 0; width: WIDTHpx; height: 3000px"></iframe>"""


def page_of_all_parts(tmp_path):
    """A report with tables, figures, matrices, pictures, long names and many classes."""
    names = ["background", *(f"a class with a rather long name {number}" for number in range(29))]
    paths = []
    for seed in (1, 2):
        path = write(
            tmp_path, name=f"a-method-with-a-long-name-seed{seed}", scores=(60.0, 50.0, 40.0), method="LSKD+EWF",
            order=(list(range(10)), list(range(10, 20)), list(range(20, 30))), options={"lr": [1]}, base_classes=10,
        )  # fmt: skip

        def edit(document):
            for step, entry in document["steps"].items():
                count = 10 * (int(step) + 1)
                entry["class_iou"] = dict.fromkeys(names[:count], 50.0)
                entry["confusion_matrix"] = np.eye(count, dtype=int).tolist()
                losses = {f"pod/stage{n}": 0.1 * n + 0.1 for n in range(12)} | {"loss": 3.0}
                entry["epochs"] = [{"epoch": 0, "losses": losses, "balance": {"lambda/pod/stage1": 0.9}}]

        paths.append(change(path, edit))
        mask = np.arange(900, dtype=np.uint8).reshape(30, 30) % 30
        samples = [Sample(np.full((30, 30, 3), 200, np.uint8), mask, mask)] * 4
        for step in range(3):
            pictures.write(pictures.folder_of(path), step, samples, Legend.of_task(names, range(30), colour_map()))
    assert go(tmp_path, *paths) == 0
    return tmp_path / "out" / "report.html"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed here")
@pytest.mark.parametrize("width", [360, 1280])
def test_in_a_browser_nothing_is_cut_off_and_nothing_fails(tmp_path, width):
    path = page_of_all_parts(tmp_path)
    text = path.read_text(encoding="utf-8")
    assert "<script" not in text
    path.write_text(text.replace("<head>", f"<head>{PROBE}"), encoding="utf-8")
    frame = path.with_name("frame.html")
    frame.write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    command = [
        *(
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--window-size={width + 100},900",
        ),
        *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", frame.as_uri()),
    ]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = json.loads(re.search(r"<title>(\{.*?\})</title>", dumped, flags=re.DOTALL)[1].replace("&amp;", "&"))
    assert found["failures"] == found["requests"] == found["wide"] == [] and found["broken"] == 0
    assert found["client"] == width and found["scroll"] <= width, "the page scrolls sideways"
