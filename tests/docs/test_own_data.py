"""docs/own_data.md as it is: its commands, one after the other, on twenty drawn pictures."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "own_data.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
#: Colours of the masks, as the page has them in classes.txt, and the paint of the things in the photographs.
COLOURS = {"cup": (220, 40, 40), "plate": (40, 90, 220), "spoon": (240, 200, 40)}
PAINT = {"cup": (150, 60, 50), "plate": (210, 215, 225), "spoon": (50, 90, 40)}


def draw(canvas, thing, place, colour):
    """A thing of about 24 pixels: a cup is a square, a plate a disc, a spoon a wide bar."""
    x, y = place
    if thing == "plate":
        canvas.ellipse((x, y, x + 26, y + 26), fill=colour)
    else:
        canvas.rectangle((x, y, x + (22 if thing == "cup" else 34), y + (24 if thing == "cup" else 16)), fill=colour)


def draw_desk(folder):
    """Twenty photographs of 96 x 72 pixels with two things each, and their masks of colours with a white rim."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    things = list(COLOURS)
    for number in range(1, 21):
        image, mask = Image.new("RGB", (96, 72), (200, 170, 130)), Image.new("RGB", (96, 72))
        for k, place in enumerate([(8, 12), (56, 30)]):
            thing = things[(number + k) % 3]
            place = tuple(int(value) for value in np.array(place) + rng.integers(-6, 7, 2))
            draw(ImageDraw.Draw(image), thing, place, PAINT[thing])
            draw(ImageDraw.Draw(mask), thing, place, COLOURS[thing])
        ImageDraw.Draw(mask).rectangle((0, 0, 95, 71), outline=(255, 255, 255))
        noise = rng.normal(0, 12, (72, 96, 3))
        Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8)).save(
            folder / "images" / f"{number:02}.jpg", quality=95
        )
        mask.save(folder / "masks" / f"{number:02}.png")


def run_page(folder):
    """Run all commands of the page in a folder; returns what each of them printed."""
    for name in ("run.py", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    draw_desk(folder / "desk")
    python = Path(sys.executable)
    tools = folder / "tools"
    tools.mkdir()
    (tools / "python").write_text(f'#!/bin/sh\nexec "{python}" "$@"\n')
    (tools / "python").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    said = []
    for block in BLOCKS:
        command = ["bash", "-euo", "pipefail", "-c", block]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        said.append(done.stdout)
    return said


def check_what_the_checks_print(folder, said):
    dry = [json.loads(line) for line in said[5].splitlines() if line.startswith("{")]
    assert [step["step"] for step in dry] == [0, 1]
    assert len((folder / "desk/splits/train.txt").read_text().splitlines()) == 16
    assert len((folder / "desk/splits/val.txt").read_text().splitlines()) == 4


def check_what_was_learned(folder):
    for step in (0, 1):
        assert (folder / "checkpoints" / "step" / f"desk-folder_first_{step}.pth").is_file()
    (results,) = (folder / "results").glob("*.json")
    steps = json.loads(results.read_text())["steps"]
    assert set(steps["1"]["class_iou"]) == {"background", *COLOURS}
    assert steps["0"]["class_iou"]["plate"] > 0.3
    assert steps["1"]["class_iou"]["spoon"] > 0.1


def check_the_page_and_the_predictions(folder):
    assert (folder / "runs/desk/report.html").stat().st_size > 10_000
    predictions = folder / "runs/desk/predictions"
    for number in range(1, 21):
        ids = Image.open(predictions / f"{number:02}.png")
        assert ids.size == (96, 72) and set(np.unique(ids)) <= {0, 1, 2, 3}
        assert Image.open(predictions / f"{number:02}.overlay.png").size == (96, 72)


def test_the_page_as_it_is(tmp_path):
    """One test, because several would run the page again in each process of the tests."""
    folder = tmp_path / "own data"
    folder.mkdir()
    check_what_the_checks_print(folder, run_page(folder))
    check_what_was_learned(folder)
    check_the_page_and_the_predictions(folder)


def test_the_page_has_the_files_that_the_test_draws():
    assert all(f"{name} {red} {green} {blue}\n" in PAGE for name, (red, green, blue) in COLOURS.items())
    assert len(BLOCKS) == 9
