"""dataset/files.py and the layouts: every kind of bad file is refused by name."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import dataset
from tests.tiny_folder import build, options, save_image, save_mask, write_folder


@pytest.fixture
def root(tmp_path):
    return write_folder(tmp_path)


def mask_of_16_bits(root):
    Image.fromarray(np.zeros((20, 24), dtype=np.uint16)).save(root / "masks" / "train3.png")


def mask_in_colour(root):
    Image.new("RGB", (24, 20)).save(root / "masks" / "train3.png")


def mask_of_one_bit(root):
    Image.new("1", (24, 20)).save(root / "masks" / "train3.png")


def mask_with_foreign_value(root):
    save_mask(root / "masks" / "train3.png", [5])


def mask_missing(root):
    (root / "masks" / "train3.png").unlink()


def mask_truncated(root):
    path = root / "masks" / "train3.png"
    path.write_bytes(path.read_bytes()[:-30])


def mask_is_text(root):
    (root / "masks" / "train3.png").write_text("hello")


def mask_is_empty(root):
    (root / "masks" / "train3.png").write_bytes(b"")


def mask_is_a_folder(root):
    mask_missing(root)
    (root / "masks" / "train3.png").mkdir()


def mask_links_in_a_loop(root):
    mask_missing(root)
    os.symlink("train3.png", root / "masks" / "train3.png")


def mask_of_another_size(root):
    save_mask(root / "masks" / "train3.png", [2], size=(24, 21))


def mask_is_a_bomb(root):
    """A PNG of 65,000 x 65,000 pixels in a few bytes."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 65000, 65000, 8, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))
    (root / "masks" / "train3.png").write_bytes(content + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (mask_of_16_bits, "has the mode 'I"),
        (mask_in_colour, "has the mode 'RGB'"),
        (mask_of_one_bit, "has the mode '1'"),
        (mask_with_foreign_value, "has the value 5, which is not a class"),
        (mask_missing, "No such file"),
        (mask_truncated, "is damaged"),
        (mask_is_text, "cannot be read"),
        (mask_is_empty, "cannot be read"),
        (mask_is_a_folder, "cannot be read: Is a directory"),
        (mask_links_in_a_loop, "symbolic links"),
        (mask_of_another_size, "has 24 x 20 pixels, its mask 24 x 21"),
        (mask_is_a_bomb, "cannot be read"),
    ],
)
def test_bad_masks_are_named(root, damage, message):
    damage(root)
    with pytest.raises(ValueError) as error:
        build(root)
    assert "train3.png" in str(error.value)
    assert message in str(error.value)


def test_large_images_within_pillows_warning_are_refused(root, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)  # 24 x 20 = 480 only makes Pillow warn
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ValueError, match=r"limit of 400"):
        build(root)


def test_many_bad_masks_are_counted(root):
    for number in range(7):
        (root / "masks" / f"train{number}.png").write_text("hello")
    with pytest.raises(ValueError, match="and 2 more"):
        build(root)


def test_truncated_jpeg(root):
    (root / "images" / "train3.png").unlink()
    save_image(root / "images" / "train3.jpg", 3)
    train = build(root).train
    assert train.files(3)[0].endswith("train3.jpg")
    content = (root / "images" / "train3.jpg").read_bytes()
    (root / "images" / "train3.jpg").write_bytes(content[:-200])
    with pytest.raises(ValueError, match=r"image .*train3.jpg is damaged"):
        build(root).train[3]


def test_image_missing(root):
    (root / "images" / "train3.png").unlink()
    with pytest.raises(ValueError, match=r"train3 does not exist"):
        build(root)
    (root / "splits" / "train.txt").write_text("train0.png\ntrain3.png\n")
    with pytest.raises(ValueError, match=r"train3.png cannot be opened"):
        build(root)


def test_cmyk_image_becomes_rgb(root):
    (root / "images" / "train3.png").unlink()
    Image.new("CMYK", (24, 20), (0, 255, 255, 0)).save(root / "images" / "train3.jpg")
    pixels, _ = build(root).train.source.read(3)
    assert pixels.shape == (20, 24, 3)
    assert pixels[0, 0, 0] > 200 > 50 > pixels[0, 0, 1]


@pytest.mark.parametrize("stored", [(24, 20), (20, 24)])
def test_exif_orientation_counts_only_where_the_mask_is_turned(root, stored):
    (root / "images" / "train3.png").unlink()
    pixels = np.full((stored[1], stored[0], 3), 255, dtype=np.uint8)
    pixels[0] = 0  # the first row as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise: the first row becomes the last column
    Image.fromarray(pixels).save(root / "images" / "train3.jpg", exif=exif, quality=100, subsampling=0)
    image, mask = build(root).train.source.read(3)
    assert image.shape[:2] == mask.shape == (20, 24)
    dark = image[0].max() if stored == (24, 20) else image[:, -1].max()
    assert dark < 100 < 200 < image[10, 10].min()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("../secret", "'..' is not allowed"),
        ("a/../../secret", "'..' is not allowed"),
        ("/etc/passwd", "absolute path"),
        ("a\0b", "control character"),
        ("nothing", "does not exist"),
    ],
)
def test_split_files_do_not_lead_out(root, line, message):
    (root / "splits" / "train.txt").write_text(f"train0\n{line}\n")
    with pytest.raises(ValueError) as error:
        build(root)
    assert message in str(error.value)
    assert "train.txt, entry 2" in str(error.value)


def test_bad_split_and_class_files(root):
    (root / "splits" / "val.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"val.txt is empty"):
        build(root)
    (root / "splits" / "val.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"val.txt is not a text file"):
        build(root)
    (root / "splits" / "val.txt").unlink()
    with pytest.raises(ValueError, match=r"val.txt does not exist"):
        build(root)
    (root / "classes.txt").write_text("background\ncat\ncat\n")
    with pytest.raises(ValueError, match=r"classes.txt names the class 'cat' twice"):
        build(root)
    (root / "classes.txt").write_text("background\n")
    with pytest.raises(ValueError, match=r"classes.txt names 1 classes"):
        build(root)
    with pytest.raises(ValueError, match=r"--data_root .*nowhere is not a folder"):
        build(root, data_root=str(root / "nowhere"))


def test_empty_step(root):
    (root / "task.json").write_text("[[0, 1, 2], [3], [4]]")
    (root / "splits" / "train.txt").write_text("train0\ntrain7\n")
    with pytest.raises(ValueError, match=r"step 1 of task task: no image of the split train of folder shows .* \[3\]"):
        build(root, 1)
    save_mask(root / "masks" / "train0.png", [3, 4])
    assert len(build(root, 1).train) == 1
    with pytest.raises(ValueError, match="--overlap lifts this"):
        build(root, 1, overlap=False)
    with pytest.raises(ValueError, match="--cross_val"):
        build(root, 1, cross_val=True)


def test_check_data_lists_every_bad_file(root):
    opts = options(root)
    assert dataset.check_data(opts, dataset.load_task(opts, 1)) == []
    mask_with_foreign_value(root)
    (root / "masks" / "val0.png").write_text("hello")
    for name in ("train6.png", "train9.png"):  # of these the step shows only train6
        path = root / "images" / name
        path.write_bytes(path.read_bytes()[:-200])
    problems = dataset.check_data(opts, dataset.load_task(opts, 1))
    assert [next(name for name in ("train3", "train6", "val0") if name in problem) for problem in problems] == [
        "train3", "train6", "val0",
    ]  # fmt: skip
