"""Results of a user's pictures: overlays, masks, legend and areas, by hand."""

import json

import numpy as np
import pytest
from PIL import Image

from dataset import pictures
from dataset.pictures import Look, Picture
from utils.reporting.visualize import colour_map

NAMES = {0: "background", 3: "a cat", 7: "dog"}
IDS = np.array([[0, 3, 3], [7, 0, 3]], dtype=np.uint8)


def look(**changed):
    return Look(**{"names": NAMES, "colours": colour_map(), "background": 0, "opacity": 0.5} | changed)


def files(folder, *kinds):
    return Picture(folder / "x.jpg", "trip/x.jpg", {kind: folder / f"x{pictures.KINDS[kind]}" for kind in kinds})


@pytest.mark.parametrize(("background", "opacity"), [(0, 0.5), (0, 1.0), (None, 0.25)])
def test_an_overlay_shows_the_background_as_it_is(tmp_path, background, opacity):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    picture = files(tmp_path, "overlay")
    pictures.write(picture, pixels, IDS, look(background=background, opacity=opacity))
    found = np.array(Image.open(tmp_path / "x.overlay.png"))
    expected = (1 - opacity) * pixels + opacity * colour_map()[IDS]
    if background == 0:
        assert (found[IDS == 0] == pixels[IDS == 0]).all()
        expected[IDS == 0] = pixels[IDS == 0]
    assert np.abs(found - expected).max() <= 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.overlay.png"]  # what was asked for, and nothing else


def test_masks_of_ids_and_of_colours(tmp_path):
    pictures.write(files(tmp_path, "mask", "color"), np.zeros((2, 3, 3), np.uint8), IDS, look())
    with Image.open(tmp_path / "x.png") as mask, Image.open(tmp_path / "x.color.png") as colours:
        assert (mask.mode, colours.mode) == ("P", "RGB")
        assert (np.array(mask) == IDS).all() and (np.array(colours) == colour_map()[IDS]).all()


def test_the_legend_has_a_box_of_each_colour(tmp_path):
    pictures.write_legend(tmp_path, [0, 3, 7], look())
    shown = np.array(Image.open(tmp_path / "legend.png")).reshape(-1, 3)
    for label, occurs in ((0, True), (3, True), (7, True), (5, False)):
        assert (shown == colour_map()[label]).all(1).any() == occurs


def test_a_legend_of_many_classes_has_columns(tmp_path):
    names = {label: f"class {label} of a data set" for label in range(150)}
    pictures.write_legend(tmp_path, range(150), look(names=names))
    with Image.open(tmp_path / "legend.png") as legend:
        assert legend.height < 800 and 800 < legend.width < 1600


def test_areas_by_name(tmp_path):
    found = pictures.areas(files(tmp_path), IDS, look())
    assert found == {
        "picture": "trip/x.jpg", "width": 3, "height": 2,
        "areas": {
            "background": {"pixels": 2, "percent": 33.3333}, "a cat": {"pixels": 3, "percent": 50.0},
            "dog": {"pixels": 1, "percent": 16.6667},
        },
    }  # fmt: skip
    pictures.write_areas(tmp_path, tmp_path / "c.pth", [found], look())
    content = json.loads((tmp_path / "areas.json").read_text())
    assert content["pictures"] == [found] and content["checkpoint"] == str(tmp_path / "c.pth")
    assert content["classes"][1] == {"id": 3, "name": "a cat", "colour": "#808000"}
    pictures.find([save(tmp_path / "in" / "a.png")], tmp_path, ["mask"])  # its own file may be replaced


def save(path):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)
    return path
