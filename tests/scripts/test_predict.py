"""scripts/predict.py: pictures of every kind, results that replace nothing, tiles, and checkpoints that cannot be used."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import methods
from dataset.files import read_picture
from dataset.transform import normalise
from modules.tiles import spans
from scripts import predict
from tests.examples.every_hook import EveryHook
from tests.support import thin
from tests.support.predicting import go, results
from tests.support.tiny_folder import save_image
from utils.checkpointing import checkpoint_files
from utils.reporting.visualize import colour_map

CHECKPOINT = "6-2-shapes_n_1.pth"
#: What is written for all pictures together.
SHARED = ["areas.json", "legend.png"]


pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoint of step 1."""
    folder = tmp_path_factory.mktemp("trained")
    with thin.program():
        assert thin.launch(folder, "--task 6-2 --step 0 1 --method MiB") == 0
    return folder / "checkpoints" / CHECKPOINT


@pytest.fixture
def photos(tmp_path):
    """Two pictures, one of them in a folder within, with dots in its name."""
    (tmp_path / "photos" / "trip").mkdir(parents=True)
    save_image(tmp_path / "photos" / "a.png", 1, size=(70, 45))
    save_image(tmp_path / "photos" / "trip" / "frame.001.jpg", 2, size=(40, 90))
    return tmp_path / "photos"


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def whole(predictor, pixels):
    """(C, H, W) logits of a picture in one piece."""
    with torch.no_grad():
        return predictor.model(normalise(torch.from_numpy(pixels).permute(2, 0, 1))[None]).logits[0]


# ----------------------------------------------------------------------- results


def test_folders_and_whole_stems_are_kept(trained, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert go(trained, photos, "--out", out) == 0
    assert results(out) == ["a.overlay.png", "a.png", *SHARED, "trip/frame.001.overlay.png", "trip/frame.001.png"]
    assert f"2 pictures -> {out}" in capsys.readouterr().out


def test_results_are_those_of_the_network(trained, photos, tmp_path):
    assert go(trained, photos, "--out", tmp_path / "out") == 0
    predictor = predict.make_predictor(trained, torch.device("cpu"), None)
    for name, picture in (("a", "a.png"), ("trip/frame.001", "trip/frame.001.jpg")):
        pixels = read_picture(str(photos / picture))
        expected = np.array(predictor.task.label_ids)[whole(predictor, pixels).argmax(0).numpy()]
        with (
            Image.open(tmp_path / "out" / f"{name}.png") as ids,
            Image.open(tmp_path / "out" / f"{name}.overlay.png") as over,
        ):
            assert (ids.mode, over.mode) == ("P", "RGB")
            assert (np.array(ids) == expected).all()
            assert (np.array(ids.convert("RGB")) == colour_map()[expected]).all()
            shown = 0.5 * pixels + 0.5 * colour_map()[expected]
            shown[expected == 0] = pixels[expected == 0]  # the background is not darkened
            assert np.abs(np.array(over) - shown).max() <= 1


def test_ids_are_those_of_the_data_set(trained, photos, tmp_path):
    """In an order of learning of its own, position 1 is class 5."""
    state = checkpoint_files.load(trained)
    state["task"]["steps"] = [[0, 5, 6, 7, 8, 9, 10], [1, 2]]
    checkpoint_files.save(tmp_path / "other.pth", state)
    for checkpoint, out in ((trained, "first"), (tmp_path / "other.pth", "second")):
        assert go(checkpoint, photos / "a.png", "--out", tmp_path / out) == 0
    first, second = (np.array(Image.open(tmp_path / out / "a.png")) for out in ("first", "second"))
    assert (np.array([0, 5, 6, 7, 8, 9, 10, 1, 2])[first] == second).all() and (first != second).any()


def test_a_picture_is_turned_as_its_exif_data_say(trained, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    pixels = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "stored.png", exif=exif)
    Image.fromarray(np.rot90(pixels, -1)).save(tmp_path / "turned.png")
    assert go(trained, tmp_path / "stored.png", tmp_path / "turned.png", "--out", tmp_path / "out") == 0
    stored, turned = (np.array(Image.open(tmp_path / "out" / f"{name}.png")) for name in ("stored", "turned"))
    assert stored.shape == (70, 40) and (stored == turned).all()


def test_layers_and_test_weights_of_a_method(tmp_path, monkeypatch):
    """The network is the one that run.py tests: with the layers of the method, and what it changes before a test."""
    monkeypatch.setitem(methods.METHODS, "EveryHook", EveryHook)
    assert thin.launch(tmp_path, "--method EveryHook --task 6-2 --step 0") == 0
    path = tmp_path / "checkpoints" / "6-2-shapes_n_0.pth"
    state = checkpoint_files.load(path)
    name = next(name for name in state["model_state"] if "head.scale" in name)
    state["model_state"][name] = torch.full_like(state["model_state"][name], -1.0)
    checkpoint_files.save(path, state)
    predictor = predict.make_predictor(path, torch.device("cpu"), None)
    assert predictor.model.state_dict()[name.removeprefix("module.")].min() >= 0


def test_background_is_not_predicted_where_the_options_of_the_checkpoint_say_so(trained, photos, tmp_path):
    state = checkpoint_files.load(trained)
    state["options"]["dont_predict_bg"] = True
    checkpoint_files.save(tmp_path / "no.pth", state)
    assert go(tmp_path / "no.pth", photos / "a.png", "--out", tmp_path / "out") == 0
    predictor = predict.make_predictor(trained, torch.device("cpu"), None)
    expected = 1 + whole(predictor, read_picture(str(photos / "a.png")))[1:].argmax(0).numpy()
    assert (np.array(Image.open(tmp_path / "out" / "a.png")) == expected).all()


# --------------------------------------------------------------- nothing is lost


def test_equal_names_in_two_folders_have_results_of_their_own(trained, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save_image(tmp_path / folder / "x.jpg", 1)
    assert go(trained, tmp_path / "a", tmp_path / "b", "--out", tmp_path / "one") == 0
    assert go(trained, tmp_path / "a/x.jpg", tmp_path / "b/x.jpg", "--out", tmp_path / "two") == 0
    expected = sorted(["a/x.overlay.png", "a/x.png", "b/x.overlay.png", "b/x.png", *SHARED])
    assert results(tmp_path / "one") == results(tmp_path / "two") == expected


@pytest.mark.parametrize("second", ["a.jpg", "a.overlay.bmp"])
def test_two_pictures_with_one_result_are_refused(trained, photos, tmp_path, capsys, second):
    save_image(photos / second, 3)
    assert go(trained, photos, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "would both be segmented into" in said and str(photos / second) in said and str(photos / "a.png") in said
    assert not (tmp_path / "out").exists()


def test_pictures_are_never_overwritten(trained, photos, tmp_path, capsys):
    before = contents(photos)
    assert go(trained, photos, "--out", photos) == 2
    assert f"would overwrite the picture {photos / 'a.png'}" in capsys.readouterr().err
    save_image(photos / "b.jpg", 3)
    save_image(photos / "b.png", 4)  # a picture of the user beside the one that is meant
    assert go(trained, photos / "b.jpg", "--out", photos) == 2
    assert f"{photos / 'b.png'} exists and is no result" in capsys.readouterr().err
    os.symlink(photos, tmp_path / "link")
    assert go(trained, photos / "a.png", "--out", tmp_path / "link") == 2
    assert {path: raw for path, raw in contents(photos).items() if path in before} == before


def test_results_are_replaced_and_taken_for_no_pictures(trained, photos):
    out = photos / "out"
    assert go(trained, photos, "--out", out) == 0
    written = contents(out)
    assert go(trained, photos, "--out", out) == 0
    assert contents(out) == written


# ------------------------------------------------------------- pictures that fail


def not_a_picture(path):
    path.write_text("hello")


def truncated(path):
    save_image(path, 1)
    path.write_bytes(path.read_bytes()[:-100])


def program_of_postscript(path):
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 20\n%%EndComments\n")


def numbers_without_range(path):
    Image.fromarray(np.zeros((20, 24), dtype=np.float32)).save(path, format="TIFF")


def huge(path):
    Image.new("1", (30000, 30000)).save(path)


@pytest.mark.parametrize(
    "damage", [not_a_picture, truncated, program_of_postscript, numbers_without_range, huge, os.mkfifo]
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_one_bad_picture_does_not_end_the_others(trained, photos, tmp_path, capsys, damage):
    damage(photos / "b.png")
    assert go(trained, photos, "--out", tmp_path / "out") == 2
    said = capsys.readouterr()
    assert str(photos / "b.png") in said.err and "Traceback" not in said.err
    assert said.err.splitlines()[-1] == "error: 1 of 3 pictures could not be segmented"
    assert "2 pictures ->" in said.out
    expected = ["a.overlay.png", "a.png", *SHARED, "trip/frame.001.overlay.png", "trip/frame.001.png"]
    assert results(tmp_path / "out") == expected


def test_a_picture_that_does_not_fit_into_the_memory(trained, photos, tmp_path, capsys, monkeypatch):
    segment = predict.Predictor.segment

    def fail(predictor, picture):
        if picture.shape == (45, 70, 3):
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return segment(predictor, picture)

    monkeypatch.setattr(predict.Predictor, "segment", fail)
    assert go(trained, photos, "--out", tmp_path / "out") == 2
    assert "a.png does not fit into the memory; give a smaller --tile" in capsys.readouterr().err
    monkeypatch.setattr(predict.Predictor, "segment", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        go(trained, photos, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["{photos}/trip/empty"], "no picture in"),
        (["{photos}", "--tile", "1000"], "--tile 1000 is too small: the tiles of this network overlap by 512 pixels"),
        (["{photos}", "--out", "{photos}/a.png"], "cannot be written"),
    ],
)
def test_refusals(trained, photos, capsys, words, said):
    (photos / "trip" / "empty").mkdir()
    before = contents(photos)
    assert go(trained, *(word.format(photos=photos) for word in words)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error
    assert contents(photos) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_where_there_is_none(trained, photos, tmp_path, capsys):
    assert predict.main([str(trained), str(photos), "--out", str(tmp_path / "out"), "--device", "cuda"]) == 2
    assert "torch sees no CUDA device here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    ("key", "entry", "value"),
    [
        *(("task", "steps", value) for value in (7, "x", [], [[0], 1], [[0, "1"]], [[0, 300]], [[0, 0]], [[]], None)),
        *(("task", "step", value) for value in ("1", True, -1, 5, None, [1])),
        *(("task", "dataset", value) for value in ("coco", 3, None)),
        *(("task", "name", value) for value in (3, None, ["x"])),
        *(("options", "backbone", value) for value in (5, "vgg", None, [], {})),
        *(("options", "norm_act", value) for value in ([], "x")),
        *(("options", "output_stride", value) for value in ("16", 16.5, 3, True, [16])),
        *(("options", "pooling", value) for value in (0, "x", 1 << 40, None, -1)),
        *(("options", "nb_background_modes", value) for value in (0, "x", 1 << 40, 2.0)),
        *(("options", "cosine", value) for value in (1, "x", None)),
        *(("options", "multimodal_fusion", value) for value in (1, "x", ["sum"])),
        *(("options", "method", value) for value in (1, "Unknown", ["FT"])),
        *(("options", "pod_options", value) for value in (3, {"switch": 1}, {"x": {}})),
        *(("options", "step", value) for value in ([], "0", [0.5])),
        ("options", None, 7), ("options", None, [1]), ("task", None, 7), ("task", None, None),
        ("model_state", None, 7), ("model_state", "module.cls.0.weight", 7),
    ],
)  # fmt: skip
def test_entries_of_another_type_are_a_sentence(trained, photos, tmp_path, capsys, key, entry, value):
    state = checkpoint_files.load(trained)
    if entry is None:
        state[key] = value
    else:
        state[key][entry] = value
    path = tmp_path / "spoilt.pth"
    checkpoint_files.save(path, state)
    assert go(path, photos, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert str(path) in error or "the checkpoint is of the data set" in error
    assert not (tmp_path / "out").exists()


def test_an_official_checkpoint_does_not_say_enough(trained, photos, tmp_path, capsys):
    state = checkpoint_files.load(trained)
    kept = {key: value for key, value in state.items() if key in ("epoch", "model_state", "optimizer_state")}
    torch.save(kept, tmp_path / "official.pth")
    assert go(tmp_path / "official.pth", photos) == 2
    assert "says neither its network nor its classes" in capsys.readouterr().err


# ------------------------------------------------------------------------- tiles


def test_tiles_of_a_large_picture_are_the_whole_picture_away_from_the_seams(trained, tmp_path):
    """A cell of this network sees 26 cells to each side; a tile reaches 16 cells beyond its seams."""
    pixels = np.random.default_rng(0).integers(0, 256, (700, 1150, 3), dtype=np.uint8)
    pixels = np.array(Image.fromarray(pixels[::16, ::16]).resize((1150, 700)))  # blobs, not noise alone
    predictor = predict.make_predictor(trained, torch.device("cpu"), 1024)
    assert predictor.tiling == (1024, 512, 16)
    assert [len(spans(length, predictor.tiling)) for length in pixels.shape[:2]] == [1, 2]
    logits = whole(predictor, pixels)
    best = logits.topk(2, dim=0).values
    decided = (best[0] - best[1] > 1e-4).numpy()
    expected = np.array(predictor.task.label_ids)[logits.argmax(0).numpy()]
    (seam,) = (span.last * 16 for span in spans(1150, predictor.tiling)[:1])
    away = np.abs(np.arange(1150) - seam) > 16 * (26 - 16 + 1)
    same = predictor.segment(pixels) == expected
    assert same[:, away][decided[:, away]].all() and decided.mean() > 0.9
    assert same.mean() > 0.95  # near the seam too, a tile sees most of what the whole picture shows
    in_one_piece = predict.make_predictor(trained, torch.device("cpu"), 0).segment(pixels)
    assert (in_one_piece == expected)[decided].all()


def test_the_overlap_is_the_window_of_the_pooled_branch():
    opts = thin.options("--pooling 100 --output_stride 8")
    assert predict.tiling(opts, None) == (2048, 800, 8)
    assert predict.tiling(opts, 1601) == (1600, 800, 8)
    assert predict.tiling(thin.options("--pooling 4000"), None) == (128000, 64000, 16)


def test_a_copy_of_the_checkpoint_elsewhere_serves(trained, photos, tmp_path):
    shutil.copy(trained, tmp_path / "anything.bin")
    assert go(tmp_path / "anything.bin", photos, "--out", tmp_path / "out") == 0
