"""--scales and --flip of run.py: the scores of the test are those of the summed probabilities, and the results say so."""

import json

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as transforms

import argparser
import dataset
from metrics.stream_metrics import StreamSegMetrics
from scripts import predict
from tests.support import thin
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Steps 0 and 1."""
    folder = tmp_path_factory.mktemp("trained")
    with thin.program():
        assert thin.launch(folder, "--task 6-2 --step 0 1 --method MiB --shapes_val 9") == 0
    return folder


def entry_of(folder, name):
    """The entry of step 1 of a run."""
    (path,) = (folder / "results").glob(f"*_{name}.json")
    return json.loads(path.read_text())["steps"]["1"]


@torch.no_grad()
def expected(folder, scales, flip):
    """The confusion matrix of summed probabilities, image by image, by torch's own functions."""
    opts = thin.options("--shapes_val 9")
    test = dataset.build(opts, dataset.load_task(opts, 1)).test
    model = predict.load(folder / "checkpoints" / "6-2-shapes_n_1.pth").model
    metrics = StreamSegMetrics(9)
    for index in range(len(test)):
        image, labels = test[index]
        total = 0
        for scale in scales:
            scaled = transforms.resize(image[None], [round(32 * scale)] * 2, antialias=True)
            maps = [model(scaled).logits_small]
            maps += [model(scaled.flip(-1)).logits_small.flip(-1)] if flip else []
            for small in maps:
                total = total + F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False).softmax(1)
        metrics.update(labels[None], total.argmax(1))
    return metrics.confusion_matrix


def test_a_test_measures_what_it_sees_at_scales_and_mirrored(copy):
    ckpt = copy / "checkpoints" / "6-2-shapes_n_1.pth"
    again = f"--task 6-2 --step 1 --method MiB --test --shapes_val 9 --ckpt '{ckpt}' --name"
    assert thin.launch(copy, f"{again} plain") == 0
    assert thin.launch(copy, f"{again} views --scales 0.75 1.5 --flip") == 0
    plain, views = entry_of(copy, "plain"), entry_of(copy, "views")
    found = torch.tensor(views["confusion_matrix"])
    counted = expected(copy, (0.75, 1.5), True)
    assert (found - counted).abs().sum() <= 0.002 * counted.sum()  # ties are rounded otherwise
    assert plain["confusion_matrix"] == entry_of(copy, "n")["confusion_matrix"] != views["confusion_matrix"]
    assert (views["evaluation"]["scales"], views["evaluation"]["flip"]) == ([0.75, 1.5], True)
    assert plain["evaluation"] == {k: v for k, v in views["evaluation"].items() if k not in ("scales", "flip")}


def test_a_test_with_other_views_replaces_no_result(copy, capsys):
    assert thin.launch(copy, "--task 6-2 --step 1 --method MiB --test --shapes_val 9 --flip") == 2
    assert "has the test of step 1 by another run (flip was None, is True)" in capsys.readouterr().err


def test_the_test_after_a_training_sees_them_and_a_resume_may_change_them(tmp_path):
    assert thin.launch(tmp_path, "--task 6-2 --step 0 --method MiB") == 0
    plain = thin.document(tmp_path)["steps"]["0"]
    assert thin.launch(tmp_path, f"--task 6-2 --step 0 --method MiB --scales 0.5 --results '{tmp_path}/other'") == 0
    (tmp_path / "results").rename(tmp_path / "plain")
    assert (
        thin.launch(tmp_path, "--task 6-2 --step 0 --method MiB --scales 0.5 --resume") == 0
    )  # records the test alone
    scaled = thin.document(tmp_path)["steps"]["0"]
    assert scaled["weights_sha256"] == plain["weights_sha256"]
    assert scaled["confusion_matrix"] != plain["confusion_matrix"]
    assert scaled["epochs"] == plain["epochs"]  # the validation sees plain images


def test_scales_have_a_range():
    for value in ("0", "-1", "nan", "11", "1 0"):
        with pytest.raises(UserError, match=r"--scales .* is out of range; give a value from 0.1 to 10"):
            argparser.check(argparser.parse(f"--dataset shapes --task 6-2 --test --scales {value}".split()))
