"""--base_weights: every step has the network of step 0, whose classifier knows no class of a later step."""

import json
import shlex

import numpy as np
import pytest

import argparser
import run
from dataset.tasks import Task
from segmentation_module import network_classes
from tests.support import thin

pytestmark = pytest.mark.usefixtures("small")


def test_the_network_has_the_classifier_of_step_0_at_every_step():
    classes = Task("shapes", "t", 2, ((0, 1, 2), (3,), (4, 5)))
    domains = Task("cityscapes_domain", "t", 2, ((1,), (2,), (3,)), domain=True)
    for words, of_classes in (("", [3, 1, 2]), ("--base_weights --test", [3])):
        opts = thin.options(words)
        assert network_classes(opts, classes) == of_classes
        assert network_classes(opts, domains) == [19]


def test_dry_run_counts_the_parameters_of_step_0(tmp_path, capsys):
    assert thin.launch(tmp_path, "--task 6-2 --step 0 1 2 --dry_run --base_weights") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert len({line["parameters"] for line in lines}) == 1


@pytest.mark.parametrize("steps", ["1", "0 1"])
def test_training_new_classes_without_a_classifier_is_refused(tmp_path, steps):
    opts = argparser.parse(shlex.split(f"{thin.SMALL} --task 6-2 --base_weights --step {steps}"))
    with pytest.raises(ValueError, match=r"--base_weights .* step 1 .* leave --base_weights out"):
        argparser.check(opts)
    assert run.main(thin.words(tmp_path, f"--task 6-2 --base_weights --step {steps}")) == 2


@pytest.mark.parametrize("method", ["FT", "LSKD"])
def test_step_0_is_tested_on_the_images_of_a_later_step(tmp_path, method):
    """What the later classes lose without any learning: the official program tests that with --test --ckpt."""
    assert thin.launch(tmp_path, f"--task 6-2 --step 0 --method {method} --base_weights") == 0
    checkpoint = tmp_path / "checkpoints" / "6-2-shapes_n_0.pth"
    words = f"--task 6-2 --step 2 --method {method} --base_weights --test --ckpt '{checkpoint}'"
    assert thin.launch(tmp_path, words) == 0
    entry = thin.document(tmp_path)["steps"]["2"]
    confusion = np.array(entry["confusion_matrix"])
    assert confusion.shape == (11, 11)
    assert confusion[:, :7].sum() > 0 == confusion[:, 7:].sum()
