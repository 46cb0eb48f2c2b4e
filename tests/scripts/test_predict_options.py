"""Options of scripts/predict.py: what is written, scales, mirrored pictures, windows, patterns, threads, and refusals."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as transforms

from dataset.files import read_picture
from dataset.transform import normalise
from modules.inference import make_views
from scripts import predict
from tests.support import thin
from tests.support.paths import ROOT
from tests.support.predicting import go, results
from tests.support.tiny_folder import save_image, write_folder
from utils.checkpointing import checkpoint_files

CPU = torch.device("cpu")


class Recorder(nn.Module):
    """A network that remembers the sizes of its images."""

    def __init__(self, network):
        super().__init__()
        self.network, self.sizes = network, []

    def forward(self, images, full_size):
        self.sizes.append(tuple(images.shape[2:]))
        return self.network(images, full_size)


pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoint of step 1, its classifiers replaced by random ones, which see several classes in every picture."""
    folder = tmp_path_factory.mktemp("trained")
    with thin.program():
        assert thin.launch(folder, "--task 6-2 --step 0 1 --method MiB") == 0
    path = folder / "checkpoints" / "6-2-shapes_n_1.pth"
    state = checkpoint_files.load(path)
    generator = torch.Generator().manual_seed(0)
    for name, value in state["model_state"].items():
        if "cls." in name:
            state["model_state"][name] = 3 * torch.randn(value.shape, generator=generator) * name.endswith("weight")
    checkpoint_files.save(path, state)
    return path


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos" / "trip").mkdir(parents=True)
    save_image(tmp_path / "photos" / "a.png", 1, size=(70, 45))
    save_image(tmp_path / "photos" / "trip" / "b.jpg", 2, size=(40, 90))
    save_image(tmp_path / "photos" / "trip" / "c.bmp", 3, size=(33, 33))
    return tmp_path / "photos"


def mask(path):
    with Image.open(path) as image:
        return np.array(image)


# ------------------------------------------------------------------ what is written


def test_what_is_saved(trained, photos, tmp_path):
    assert go(trained, photos / "a.png", "--save", "color", "mask", "--out", tmp_path / "out") == 0
    assert results(tmp_path / "out") == ["a.color.png", "a.png", "areas.json", "legend.png"]
    ids = mask(tmp_path / "out" / "a.png")
    colours = predict.colour_map()[ids]
    assert (mask(tmp_path / "out" / "a.color.png") == colours).all() and len(np.unique(ids)) > 1


def test_areas_are_those_of_the_masks(trained, photos, tmp_path):
    assert go(trained, photos, "--out", tmp_path / "out") == 0
    content = json.loads((tmp_path / "out" / "areas.json").read_text())
    names = {entry["name"]: entry["id"] for entry in content["classes"]}
    assert list(names)[:2] == ["background", "solid disk"] and len(names) == 9
    assert [entry["picture"] for entry in content["pictures"]] == ["a.png", "trip/b.jpg", "trip/c.bmp"]
    for entry in content["pictures"]:
        ids = mask((tmp_path / "out" / entry["picture"]).with_suffix(".png"))
        assert (entry["height"], entry["width"]) == ids.shape
        counted = {name: int((ids == label).sum()) for name, label in names.items()}
        assert {name: area["pixels"] for name, area in entry["areas"].items()} == {
            k: v for k, v in counted.items() if v
        }


def test_names_are_those_of_the_data_set(photos, tmp_path, capsys):
    """A data set that is not there any more has numbers, and a note; --data_root says where it is now."""
    data = tmp_path / "data"
    data.mkdir()
    write_folder(data)
    order = tmp_path / "order.json"
    order.write_text('{"name": "tiny", "steps": [[0, 1, 2]]}')
    assert thin.launch(tmp_path, f"--dataset folder --data_root '{data}' --task_file '{order}' --step 0") == 0
    (ckpt,) = (tmp_path / "checkpoints").glob("*.pth")
    written = (data / "classes.txt").read_text().split()

    def names(*words):
        assert go(ckpt, photos / "a.png", "--out", tmp_path / "out", *words) == 0
        return [entry["name"] for entry in json.loads((tmp_path / "out" / "areas.json").read_text())["classes"]]

    assert names() == written[:3]
    data.rename(tmp_path / "moved")
    assert names() == ["class 0", "class 1", "class 2"]
    assert "note: classes have numbers instead of names" in capsys.readouterr().out
    assert names("--data_root", tmp_path / "moved") == written[:3]
    assert go(ckpt, photos / "a.png", "--data_root", tmp_path / "nowhere") == 2


# -------------------------------------------------------------------- how it is seen


@torch.no_grad()
def probabilities(model, image, scales, flip):
    """(C, H, W), by torch's own functions."""
    total, size = 0, image.shape[1:]
    for scale in scales:
        scaled = transforms.resize(image, [int(length * scale + 0.5) for length in size], antialias=True)
        for flipped in (False, True)[: 1 + flip]:
            seen = normalise(scaled.flip(-1) if flipped else scaled)[None]
            logits = model(seen, full_size=False).logits_small
            logits = logits.flip(-1) if flipped else logits
            total = total + F.interpolate(logits, size=size, mode="bilinear", align_corners=False).softmax(1)[0]
    return total


@pytest.mark.parametrize(("scales", "flip"), [([0.5, 1.0, 1.75], False), ([1.0], True), ([0.75, 1.25], True)])
def test_scales_and_mirrored_pictures(trained, photos, tmp_path, scales, flip):
    words = ["--scales", *scales] + ["--flip"] * flip
    assert go(trained, photos, "--out", tmp_path / "out", *words) == 0
    assert go(trained, photos, "--out", tmp_path / "plain") == 0
    predictor = predict.make_predictor(trained, CPU)
    differs = False
    for name, picture in (("a", "a.png"), ("trip/b", "trip/b.jpg"), ("trip/c", "trip/c.bmp")):
        image = torch.from_numpy(read_picture(str(photos / picture))).permute(2, 0, 1)
        total = probabilities(predictor.model, image, scales, flip)
        best = total.topk(2, dim=0).values
        decided = (best[0] - best[1] > 1e-4).numpy()
        found = mask(tmp_path / "out" / f"{name}.png")
        assert (found == total.argmax(0).numpy())[decided].all() and decided.mean() > 0.75
        differs |= bool((found != mask(tmp_path / "plain" / f"{name}.png")).any())
    assert differs


def test_a_window_slides_over_the_picture(trained, tmp_path):
    """One that covers the picture changes nothing; a smaller one sees less. The stride is two thirds of its side by default."""
    pixels = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    whole = predict.make_predictor(trained, CPU, tile=0).segment(pixels)
    one = predict.make_predictor(trained, CPU, window=(208, None))
    assert one.tiling == (208, 138, 16) and (one.segment(pixels) == whole).all()
    small = predict.make_predictor(trained, CPU, window=(64, 32))
    recorded = Recorder(small.model)
    found = replace(small, model=recorded).segment(pixels)
    # 10 x 13 cells in windows of 4, every 2
    assert len(recorded.sizes) == 4 * 6 and recorded.sizes[0] == (64, 64) and recorded.sizes[-1] == (54, 56)
    assert (found != whole).any() and (found == small.segment(pixels)).all()


def test_windows_with_scales_on_the_command_line(trained, photos, tmp_path):
    words = ["--window", 32, "--stride", 16, "--scales", 1, 2, "--flip"]
    assert go(trained, photos / "a.png", "--out", tmp_path / "out", *words) == 0
    views = make_views([1, 2], True)
    expected = predict.make_predictor(trained, CPU, window=(32, 16), views=views)
    assert (mask(tmp_path / "out" / "a.png") == expected.segment(read_picture(str(photos / "a.png")))).all()


def test_threads(trained, photos, tmp_path):
    before = torch.get_num_threads()
    try:
        assert go(trained, photos / "a.png", "--out", tmp_path / "out", "--threads", 2) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ----------------------------------------------------------------------------- inputs


def test_patterns_stand_for_pictures(trained, photos, tmp_path):
    (photos / "trip" / "notes.txt").write_text("no picture")
    assert go(trained, photos / "trip" / "*", "--out", tmp_path / "one", "--save", "mask") == 0
    assert results(tmp_path / "one") == ["areas.json", "b.png", "c.png", "legend.png"]
    assert go(trained, photos / "**" / "*.[jp][pn]g", "--out", tmp_path / "two", "--save", "mask") == 0
    assert results(tmp_path / "two") == ["a.png", "areas.json", "legend.png", "trip/b.png"]
    out = photos / "trip"  # results beside the pictures are no pictures of the next run
    assert go(trained, photos / "trip" / "b.*", "--out", out, "--save", "mask") == 0
    assert go(trained, photos / "trip" / "b.*", "--out", out, "--save", "mask") == 0
    save_image(photos / "d[1].jpg", 4)
    assert go(trained, photos / "d[1].jpg", "--out", tmp_path / "three", "--save", "mask") == 0  # a file of that name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{photos}/*.tif"], "no picture matches {photos}/*.tif"),
        (["{photos}", "--scales", "0"], "--scales 0 is out of range; give a value from 0.1 to 10"),
        (["{photos}", "--scales", "1", "nan"], "--scales nan is out of range"),
        (["{photos}", "--opacity", "1.5"], "--opacity 1.5 is out of range; give a value from 0 to 1"),
        (["{photos}", "--threads", "-1"], "--threads -1 is out of range"),
        (["{photos}", "--tile", "-1"], "--tile -1 is out of range"),
        (["{photos}", "--window", "8"], "--window 8 is too small for this network; give 16 pixels or more"),
        (["{photos}", "--window", "64", "--stride", "65"], "--stride 65 does not fit --window 64; give pixels from 16 to 64"),
        (["{photos}", "--window", "64", "--stride", "0"], "--stride 0 does not fit"),
        (["{photos}", "--window", "64", "--tile", "2048"], "--window and --tile both say how a picture is cut"),
        (["{photos}", "--stride", "64"], "--stride is the distance of windows; give --window too"),
    ],
)  # fmt: skip
def test_refusals(trained, photos, tmp_path, capsys, words, said):
    assert go(trained, *(word.format(photos=photos) for word in words), "--out", tmp_path / "out") == 2
    assert f"error: {said.format(photos=photos)}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_of_all_pictures_replace_nothing(trained, photos, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "areas.json").write_text('{"mine": 1}')
    assert go(trained, photos, "--out", tmp_path / "out") == 2
    assert "areas.json exists and is no result of this program" in capsys.readouterr().err
    save_image(photos / "legend.jpg", 1)
    assert go(trained, photos, "--out", tmp_path / "other") == 2
    assert "which is written for all pictures together; rename the picture" in capsys.readouterr().err
    save_image(photos / "legend.png", 1)
    assert go(trained, photos / "legend.png", "--out", photos, "--save", "color") == 2
    assert f"would overwrite the picture {photos / 'legend.png'}" in capsys.readouterr().err
    assert results(tmp_path / "out") == ["areas.json"] and not (tmp_path / "other").exists()


# --------------------------------------------------------------------- large pictures


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pictures_of_20000_pixels(trained, tmp_path, capsys):
    """A square one is refused, which names the limit; a long one is cut into tiles."""
    Image.new("1", (20000, 20000)).save(tmp_path / "square.png")
    Image.new("L", (20000, 40), 90).save(tmp_path / "long.png")
    assert go(trained, tmp_path / "square.png", tmp_path / "long.png", "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "square.png has too many pixels; there is a limit of" in said and "Traceback" not in said
    assert mask(tmp_path / "out" / "long.png").shape == (40, 20000)


# -------------------------------------------------------------------------------- docs


def commands_of_the_page():
    """The commands of docs/data.md that segment pictures, as words after the name of the program."""
    section = (ROOT / "docs" / "data.md").read_text().partition("## Segmenting your own pictures")[2]
    block = section.partition("```bash\n")[2].partition("```")[0]
    return [shlex.split(line)[2:] for line in block.splitlines() if "scripts/predict.py" in line]


@pytest.mark.parametrize("words", commands_of_the_page(), ids=" ".join)
def test_commands_of_the_page(trained, tmp_path, monkeypatch, words):
    """As they stand there, on a checkpoint and pictures of these names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "holiday").mkdir()
    for number, name in enumerate(("photo.jpg", "street.png", "holiday/a.jpg", "holiday/b.jpg")):
        save_image(tmp_path / name, number, size=(70, 45))
    checkpoint = Path(words[0])
    checkpoint.parent.mkdir(parents=True)
    shutil.copy(trained, checkpoint)
    threads = torch.get_num_threads()
    try:
        assert predict.main(words) == 0
    finally:
        torch.set_num_threads(threads)
    assert len(list((tmp_path / "runs" / "predictions").rglob("*.overlay.png"))) in (1, 2, 3)
