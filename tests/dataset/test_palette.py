"""Masks that are stored as colours: the file of the colours, the class ids, and what is refused."""

import os

import numpy as np
import pytest
from PIL import Image

import dataset
from dataset import files
from dataset.palette import read_class_file
from tests.support.tiny_folder import build, labels, options, save_mask, write_folder
from utils.errors import UserError
from utils.types import IGNORE

#: Colours of the classes of `write_folder`, and of ignored pixels.
COLOURS = {
    "background": (0, 0, 0), "cat": (200, 30, 0), "dog": (0, 128, 0), "cow": (128, 128, 0), "horse": (0, 0, 128),
    "ignored": (255, 255, 255),
}  # fmt: skip
TABLE = np.zeros((256, 3), dtype=np.uint8)
TABLE[:5] = list(COLOURS.values())[:5]
TABLE[IGNORE] = COLOURS["ignored"]


def text(colours):
    return "".join(f"{name} {red} {green} {blue}\n" for name, (red, green, blue) in colours.items())


def coloured(folder, mode="RGB", palette_file=False):
    """The data set of `write_folder` with its masks as colours, described in classes.txt or in a file of its own."""
    write_folder(folder)
    for path in (folder / "masks").iterdir():
        image = Image.fromarray(TABLE[np.asarray(Image.open(path))])
        if mode == "P":  # another order of colours than that of the classes
            image = image.quantize(dither=Image.Dither.NONE)
        image.convert(mode).save(path)
    if palette_file:
        (folder / "colours.txt").write_text(text(dict(reversed(COLOURS.items()))))
    else:
        (folder / "classes.txt").write_text(text(COLOURS))
    return folder


def presence(opts, train=True):
    return dataset._source(opts, train).presence()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("palette_file", [False, True])
def test_masks_of_colours_give_the_samples_of_masks_of_ids(tmp_path, mode, palette_file):
    plain = write_folder(tmp_path / "ids") if (tmp_path / "ids").mkdir() is None else None
    (tmp_path / "colours").mkdir()
    root = coloured(tmp_path / "colours", mode, palette_file)
    palette = str(root / "colours.txt") if palette_file else None
    assert dataset.class_names(options(root, palette=palette)) == ("background", "cat", "dog", "cow", "horse")
    for step in range(3):
        for mine, theirs in zip(build(root, step, palette=palette), build(plain, step)):
            assert len(mine) == len(theirs) > 0
            assert labels(mine) == labels(theirs) and IGNORE in labels(mine)
            for position in range(len(mine)):
                assert all(np.array_equal(a, b) for a, b in zip(mine[position], theirs[position]))


def test_colours_of_the_classes_are_those_of_pictures(tmp_path):
    root = coloured(tmp_path)
    assert np.array_equal(dataset.colours(options(root))[:5], TABLE[:5])
    assert not np.array_equal(dataset.colours(options(write_folder_again(tmp_path / "plain")))[:5], TABLE[:5])


def write_folder_again(folder):
    folder.mkdir()
    return write_folder(folder)


def test_grey_masks_keep_their_values(tmp_path):
    root = coloured(tmp_path)
    save_mask(root / "masks" / "train0.png", [4], mode="L")
    assert np.flatnonzero(presence(options(root))[0]).tolist() == [0, 4, IGNORE]


@pytest.mark.parametrize("processes", [1, 2])
def test_an_unknown_colour_is_refused_with_file_colour_and_place(tmp_path, processes):
    root = coloured(tmp_path)
    path = root / "masks" / "val1.png"
    pixels = np.asarray(Image.open(path)).copy()
    pixels[7, 5] = pixels[9, 2] = (1, 2, 3)
    Image.fromarray(pixels).save(path)
    colours = read_class_file(root / "classes.txt", "").mask_colours()
    pairs = [(str(root / "images" / f"val{n}.png"), str(root / "masks" / f"val{n}.png")) for n in range(4)]
    found = files.inspect(pairs, frozenset([0, 1, 2, 3, 4, 255]), processes=processes, colours=colours)
    assert [bool(problem) for _, problem in found] == [False, True, False, False]
    expected = (
        f"mask {path} has the colour (1, 2, 3) at column 5, row 7 (and 1 more pixels of unknown colours), "
        f"which is the colour of no class in {root / 'classes.txt'}"
    )
    assert found[1][1] == expected
    with pytest.raises(UserError, match=r"val1\.png has the colour \(1, 2, 3\) at column 5, row 7"):
        build(root)
    assert dataset.check_data(options(root), dataset.load_task(options(root), 0)) == [expected]


def test_a_changed_palette_scans_again(tmp_path):
    """Same files, same times: only the meaning of the colours has changed."""
    root = coloured(tmp_path)
    status = (root / "classes.txt").stat()
    before = presence(options(root))
    swapped = dict(zip(COLOURS, [*list(COLOURS.values())[:1], COLOURS["dog"], COLOURS["cat"]]))
    (root / "classes.txt").write_text(text(COLOURS | swapped))
    os.utime(root / "classes.txt", ns=(status.st_atime_ns, status.st_mtime_ns))
    after = presence(options(root))
    assert np.array_equal(after[:, 1], before[:, 2]) and np.array_equal(after[:, 2], before[:, 1])
    assert not np.array_equal(after, before)


def test_masks_of_colours_without_colours_of_classes(tmp_path):
    root = coloured(tmp_path)
    (root / "classes.txt").write_text("background\ncat\ndog\ncow\nhorse\n")
    with pytest.raises(UserError, match=r"has the mode 'RGB': .*; masks of colours need the colours of the classes"):
        build(root)


def test_transparent_pixels_are_refused(tmp_path):
    root = coloured(tmp_path, "RGBA")
    path = root / "masks" / "train0.png"
    mask = Image.open(path)
    mask.putalpha(100)
    mask.save(path)
    with pytest.raises(UserError, match=r"train0\.png has transparent pixels"):
        build(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a 0 0 0\nb\n", "the line 'b' has no colour, but others have"),
        ("a 0 0 0\nb 0 0 256\n", "the line 'b 0 0 256' has a value above 255"),
        ("a 0 0 0\nb 0 0 99999999999999999999999\n", "has a value above 255"),
        ("a 0 0 0\nb 0 0 0\n", r"'a' and 'b' have the same colour \(0, 0, 0\)"),
        ("a 0 0 0\nignored 0 0 0\n", "'a' and 'ignored' have the same colour"),
        ("a 0 0 0\na 0 0 1\n", "names the class 'a' twice"),
        ("a 0 0 0\nignored 9 9 9\n", "names 1 classes"),
    ],
)
def test_files_of_classes_that_are_refused(tmp_path, content, message):
    path = tmp_path / "classes.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_class_file(path, "")
    assert str(path) in str(caught.value)


def test_names_may_have_spaces_and_numbers(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("background 0 0 0\ntraffic light\t250  170 30\narea 51 1 2 3\nignored 255 255 255\nignored 9 9 9\n")
    found = read_class_file(path, "")
    assert found.names == ("background", "traffic light", "area 51")
    assert found.mask_colours().values == {0: 0, 0xFAAA1E: 1, 0x010203: 2, 0xFFFFFF: IGNORE, 0x090909: IGNORE}
    path.write_text("background\nignored\n5 pence\n")
    assert read_class_file(path, "").names == ("background", "ignored", "5 pence")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (text({k: v for k, v in COLOURS.items() if k != "dog"}), "has no colour for the class 'dog'"),
        (text(COLOURS | {"goat": (9, 9, 9)}), "names 'goat', which is not a class of the data set"),
        ("background\ncat\n", "has no colours"),
    ],
)
def test_palette_files_that_are_refused(tmp_path, content, message):
    root = coloured(tmp_path, palette_file=True)
    (root / "colours.txt").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        build(root, palette=str(root / "colours.txt"))
    assert str(root / "colours.txt") in str(caught.value)
