"""utils/reporting/pictures.py: what is kept of the test images, read again, copied with a shared step 0, and drawn."""

import numpy as np
import pytest
from PIL import Image

from utils.reporting import pictures
from utils.reporting.pictures import Legend, Sample
from utils.reporting.visualize import colour_map

LEGEND = Legend.of_task(["background", "dog", "cat"], (0, 12, 8), colour_map())


def sample(truth: int, prediction: int) -> Sample:
    shape = (4, 5)
    image = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    return Sample(image, np.full(shape, truth, np.uint8), np.full(shape, prediction, np.uint8))


@pytest.fixture
def run(tmp_path):
    """A results file with pictures of two steps."""
    path = tmp_path / "d_voc_t_n.json"
    pictures.write(pictures.folder_of(path), 0, [sample(1, 0), sample(2, 0)], LEGEND)
    pictures.write(pictures.folder_of(path), 1, [sample(1, 1), sample(2, 0)], LEGEND)
    return path


def test_colours_are_those_of_the_class_ids():
    assert LEGEND.hexadecimal(1) == "#400080"  # VOC's colour of class 12, dog: (64, 0, 128)
    assert LEGEND.colours[255].tolist() == [255, 255, 255]


def test_what_is_written_is_read(run):
    shown = pictures.read(run)
    assert shown.steps == [0, 1] and len(shown.rows) == 2
    assert [path.name for path in shown.rows[1]] == ["1_image.png", "1_truth.png", "1_step0.png", "1_step1.png"]
    assert shown.legend == {"background": "#000000", "dog": "#400080", "cat": "#400000"}
    with Image.open(shown.rows[0][3]) as picture:
        assert picture.mode == "P" and picture.size == (5, 4) and set(np.asarray(picture).flat) == {1}
    with Image.open(shown.rows[0][0]) as picture:
        assert np.array_equal(np.asarray(picture), sample(1, 0).image)


def test_a_run_without_pictures_or_with_a_foreign_folder_has_none(run, tmp_path):
    assert pictures.read(tmp_path / "other.json") is None
    (pictures.folder_of(run) / "legend.json").write_text("[1, 2")
    assert pictures.read(run) is None


def test_pictures_of_a_shared_step_0_are_copied(run, tmp_path):
    for step in (0, 1):
        pictures.write_panels(pictures.folder_of(run), step, [pictures.panel(sample(1, 0), LEGEND, "t")])
    target = pictures.folder_of(tmp_path / "later.json")
    pictures.copy_steps(pictures.folder_of(run), target, 0)
    assert pictures.read(tmp_path / "later.json").steps == [0]
    assert [path.name for path in target.glob("*_panel.png")] == ["0_step0_panel.png"]
    pictures.copy_steps(tmp_path / "nowhere", tmp_path / "nothing", 0)
    assert not (tmp_path / "nothing").exists()


def test_a_panel_has_three_parts_at_their_own_size_and_a_legend():
    big = Sample(*(np.kron(part, np.ones((20, 20) + (1,) * (part.ndim - 2), np.uint8)) for part in sample(1, 2)))
    panel = pictures.panel(big, LEGEND, "task, after step 1")
    # 100 px wide each with margins of 6; below the titles the truth is dog, the prediction cat
    assert panel.shape[1] == 4 * 6 + 3 * 100
    assert panel[60, 6 + 106 + 50].tolist() == [64, 0, 128]
    assert panel[60, 6 + 212 + 50].tolist() == [64, 0, 0]
    assert np.array_equal(panel[38 : 38 + 80, 6 : 6 + 100], big.image)
    legend = panel[38 + 80 :]
    assert (legend == [64, 0, 128]).all(-1).any() and (legend == [64, 0, 0]).all(-1).any()
