"""scripts/export.py: every format gives the network's logits, and what cannot be exported is refused."""

import json

import numpy as np
import pytest
import torch

from scripts import export, predict
from tests.support import thin


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with thin.program():
        assert thin.launch(folder, "--task 6-4 --step 0 1 --method FT --norm_act iabn") == 0
    return folder / "checkpoints" / "6-4-shapes_n_1.pth"


pytestmark = pytest.mark.usefixtures("small")


def logits(checkpoint, images):
    with torch.no_grad():
        return predict.load(checkpoint).model(images).logits


def test_a_program_of_torch_gives_the_same_logits(checkpoint, tmp_path, capsys):
    target = tmp_path / "a b" / "network.pt2"
    assert export.main([str(checkpoint), str(target), "--size", "48", "64"]) == 0
    assert "differ from those of the network by at most" in capsys.readouterr().out
    images = torch.randn(1, 3, 48, 64)
    found = torch.export.load(target).module()(images)
    torch.testing.assert_close(found, logits(checkpoint, images), rtol=1e-3, atol=1e-4)
    classes = json.loads((tmp_path / "a b" / "network.classes.json").read_text())
    assert len(classes) == found.shape[1] == 11 and classes[0] == {"channel": 0, "id": 0, "name": "background"}
    assert sorted(path.name for path in target.parent.iterdir()) == ["network.classes.json", "network.pt2"]


def test_onnx_gives_the_same_logits(checkpoint, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    assert export.main([str(checkpoint), str(tmp_path / "n.onnx"), "--size", "32", "32"]) == 0
    images = torch.randn(1, 3, 32, 32)
    session = onnxruntime.InferenceSession(str(tmp_path / "n.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    np.testing.assert_allclose(found, logits(checkpoint, images).numpy(), rtol=1e-3, atol=1e-4)


def test_safetensors_holds_the_weights(checkpoint, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    assert export.main([str(checkpoint), str(tmp_path / "w.safetensors")]) == 0
    found, expected = safetensors.load_file(tmp_path / "w.safetensors"), predict.load(checkpoint).model.state_dict()
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_program_that_differs_is_not_written(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "TOLERANCE", 0.0)
    assert export.main([str(checkpoint), str(tmp_path / "n.pt2"), "--size", "32", "32"]) == 2
    assert "n.pt2 is not written" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["n.txt"], "an unknown suffix"),
        (["n.pt2", "--size", "0", "32"], "is no size of an image"),
    ],
)
def test_what_cannot_be_exported_is_refused(checkpoint, tmp_path, capsys, words, said):
    assert export.main([str(checkpoint), str(tmp_path / words[0]), *words[1:]]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_missing_package_is_named(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    assert export.main([str(checkpoint), str(tmp_path / "w.safetensors")]) == 2
    assert "pip install safetensors" in capsys.readouterr().err


def test_another_file_is_refused(tmp_path, capsys):
    (tmp_path / "x.pth").write_bytes(b"x")
    assert export.main([str(tmp_path / "x.pth"), str(tmp_path / "n.pt2")]) == 2
    assert "x.pth" in capsys.readouterr().err
