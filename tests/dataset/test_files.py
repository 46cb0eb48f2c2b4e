"""dataset/files.py and the layouts: every kind of bad file is refused by name."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import dataset
from dataset import files
from tests.support.tiny_folder import build, options, save_image, save_mask, write_folder
from utils.errors import UserError

VALUES = frozenset((*range(5), 255))


@pytest.fixture
def root(tmp_path):
    return write_folder(tmp_path)


def mask_of_16_bits(root, name="train3"):
    Image.fromarray(np.zeros((20, 24), dtype=np.uint16)).save(root / "masks" / f"{name}.png")


def mask_in_colour(root, name="train3"):
    Image.new("RGB", (24, 20)).save(root / "masks" / f"{name}.png")


def mask_of_one_bit(root, name="train3"):
    Image.new("1", (24, 20)).save(root / "masks" / f"{name}.png")


def mask_with_foreign_value(root, name="train3"):
    save_mask(root / "masks" / f"{name}.png", [5])


def mask_missing(root, name="train3"):
    (root / "masks" / f"{name}.png").unlink()


def mask_truncated(root, name="train3"):
    path = root / "masks" / f"{name}.png"
    path.write_bytes(path.read_bytes()[:-30])


def mask_is_text(root, name="train3"):
    (root / "masks" / f"{name}.png").write_text("hello")


def mask_is_empty(root, name="train3"):
    (root / "masks" / f"{name}.png").write_bytes(b"")


def mask_is_a_folder(root, name="train3"):
    mask_missing(root, name)
    (root / "masks" / f"{name}.png").mkdir()


def mask_links_in_a_loop(root, name="train3"):
    mask_missing(root, name)
    os.symlink(f"{name}.png", root / "masks" / f"{name}.png")


def mask_is_a_pipe(root, name="train3"):
    """Which nobody writes into: whoever reads it waits."""
    mask_missing(root, name)
    os.mkfifo(root / "masks" / f"{name}.png")


def mask_is_a_program(root, name="train3"):
    """PostScript, for which Pillow would start Ghostscript."""
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 20\n%%EndComments\n%%BeginPreview: 24 20 8 1\n"
    (root / "masks" / f"{name}.png").write_bytes(program)


def mask_of_another_size(root, name="train3"):
    save_mask(root / "masks" / f"{name}.png", [2], size=(24, 21))


def mask_is_a_jpeg(root, name="train3"):
    """Under the name of a PNG: its compression changes the ids at the borders of the classes."""
    with Image.open(root / "masks" / f"{name}.png") as mask:
        Image.fromarray(np.array(mask)).save(root / "masks" / f"{name}.png", format="JPEG")


def mask_is_a_tiff_packed_as_jpeg(root, name="train3"):
    with Image.open(root / "masks" / f"{name}.png") as mask:
        Image.fromarray(np.array(mask)).save(root / "masks" / f"{name}.png", format="TIFF", compression="jpeg")


def mask_is_a_bomb(root, name="train3"):
    """A PNG of 65,000 x 65,000 pixels in a few bytes."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 65000, 65000, 8, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))
    (root / "masks" / f"{name}.png").write_bytes(content + chunk(b"IEND", b""))


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
        (mask_is_a_pipe, "no regular file"),
        (mask_is_a_program, "cannot identify image file"),
        (mask_of_another_size, "has 24 x 20 pixels, its mask 24 x 21"),
        (mask_is_a_bomb, "has too many pixels; there is a limit of 89478485"),
        (mask_is_a_jpeg, "is stored as JPEG, which changes class ids"),
        (mask_is_a_tiff_packed_as_jpeg, "is stored as TIFF (jpeg), which changes class ids"),
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
    with pytest.raises(ValueError, match="and 4 more"):
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


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_of_grey_keep_their_high_byte(root, suffix):
    """As Pillow reads 16 bits of colour; its own conversion of grey would make everything above 255 white."""
    (root / "images" / "train3.png").unlink()
    ramp = np.arange(24 * 20, dtype=np.uint16).reshape(20, 24) * 136
    Image.fromarray(ramp).save(root / "images" / f"train3.{suffix}")
    pixels, _ = build(root).train.source.read(3)
    assert pixels.dtype == np.uint8 and pixels.shape == (20, 24, 3)
    assert (pixels == (ramp // 256)[..., None]).all()


@pytest.mark.parametrize(("kind", "mode"), [(np.float32, "F"), (np.int32, "I")])
@pytest.mark.parametrize("decode", [False, True])
def test_images_of_numbers_without_a_range_are_refused(root, kind, mode, decode):
    (root / "images" / "train3.png").unlink()
    Image.fromarray(np.full((20, 24), 0.5).astype(kind)).save(root / "images" / "train3.tif")
    with pytest.raises(UserError, match=rf"image .*train3.tif has the mode '{mode}'"):
        build(root)
    (problem,) = files.inspect([(str(root / "images/train3.tif"), str(root / "masks/train3.png"))], VALUES, decode)
    assert "train3.tif has the mode" in problem[1]


def test_12_bits_in_a_tiff_are_refused(root):
    """Pillow spreads them over 16 bits without scaling, so that white would be dark grey."""
    (root / "images" / "train3.png").unlink()
    path = root / "images" / "train3.tif"
    Image.fromarray(np.zeros((20, 24), dtype=np.uint16)).save(path, tiffinfo={270: "12 bits"})
    raw = path.read_bytes()
    with Image.open(path) as image:
        assert image.tag_v2[258] == (16,)
    entry = struct.pack("<HHIH", 258, 3, 1, 16)
    assert raw.count(entry) == 1
    path.write_bytes(raw.replace(entry, struct.pack("<HHIH", 258, 3, 1, 12)))
    with pytest.raises(UserError, match=r"train3.tif has 12 bits a channel"):
        build(root)


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


def test_every_bad_line_of_a_split_is_said(root):
    (root / "splits" / "train.txt").write_text("\n".join(["train0", *(f"../x{n}" for n in range(6)), "nothing"]))
    with pytest.raises(ValueError, match=r"entry 2: .*; and 4 more \(--check_data lists all\)$"):
        build(root)
    opts = options(root)
    problems = dataset.check_data(opts, dataset.load_task(opts, 0))
    assert [problem.split("entry ")[1][0] for problem in problems] == list("2345678")


def test_a_byte_order_mark_is_read_away(root):
    """Editors of Windows write one in front of UTF-8."""
    for name in ("classes.txt", "splits/train.txt", "task.json"):
        (root / name).write_bytes(b"\xef\xbb\xbf" + (root / name).read_bytes())
    data = build(root)
    assert "train0" in data.train.files(0)[0]
    opts = options(root)
    assert dataset.class_names(opts)[0] == "background"
    assert dataset.load_task(opts, 0).steps == ((0, 2, 1), (4,), (3,))


def test_a_pipe_is_no_split(root):
    (root / "splits" / "val.txt").unlink()
    os.mkfifo(root / "splits" / "val.txt")
    with pytest.raises(ValueError, match=r"val.txt is not a file"):
        build(root)


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


def image_truncated(root, name):
    path = root / "images" / f"{name}.png"
    with Image.open(path) as image:
        image.save(path.with_suffix(".jpg"))
    path.unlink()
    path.with_suffix(".jpg").write_bytes(path.with_suffix(".jpg").read_bytes()[:-200])


@pytest.mark.parametrize("processes", [1, 3])
def test_check_data_lists_all_kinds_at_once(root, processes, monkeypatch):
    """Both files of a pair, too; what has a defined meaning (CMYK, a turned image) is not listed."""
    monkeypatch.setattr(files, "_FILES_PER_PROCESS", 10 // processes)  # of ten training files
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    started = []
    popen = files.subprocess.Popen
    monkeypatch.setattr(files.subprocess, "Popen", lambda *args, **kw: started.append(1) or popen(*args, **kw))
    damages = [mask_of_16_bits, mask_in_colour, mask_is_a_bomb, mask_links_in_a_loop, mask_missing, mask_is_a_pipe]
    for number, damage in zip((0, 1, 2, 4, 5, 6), damages):
        damage(root, f"train{number}")
    image_truncated(root, "train0")  # whose mask is bad as well
    image_truncated(root, "train7")
    (root / "images" / "train8.png").unlink()
    Image.new("CMYK", (24, 20)).save(root / "images" / "train8.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    (root / "images" / "train9.png").unlink()
    Image.new("RGB", (20, 24)).save(root / "images" / "train9.jpg", exif=exif)
    (root / "images" / "val1.png").unlink()
    opts = options(root)
    problems = dataset.check_data(opts, dataset.load_task(opts, 0))
    assert len(started) == (6 if processes == 3 else 0)
    expected = ("masks/train0", "images/train0", "masks/train1", "masks/train2", "masks/train4", "masks/train5")
    expected += ("masks/train6", "images/train7", "images/val1")
    assert len(problems) == len(expected) and not any("\n" in problem for problem in problems)
    for name in expected:
        assert sum(name in problem for problem in problems) == 1, name


def test_a_fault_that_every_file_has_is_listed_three_times_and_counted(root):
    for number in range(10):
        mask_in_colour(root, f"train{number}")
    (root / "masks" / "val0.png").write_text("hello")
    opts = options(root)
    problems = dataset.check_data(opts, dataset.load_task(opts, 0))
    assert len(problems) == 5 and "val0" in problems[4]
    assert all(f"train{number}.png has the mode 'RGB'" in problems[number] for number in range(3))
    assert problems[3] == "7 more of the 10 files of the split train of folder have the same fault"


def test_check_data_looks_at_what_a_test_on_the_training_set_reads(root):
    image = root / "images" / "train0.png"  # shows class 1, which step 1 does not learn
    image.write_bytes(image.read_bytes()[:-200])
    for wanted in (False, True):
        opts = options(root, val_on_trainset=wanted)
        assert bool(dataset.check_data(opts, dataset.load_task(opts, 1))) == wanted
