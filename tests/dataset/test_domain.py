"""Domain-incremental Cityscapes through the real command line: the steps are cities, every pixel has its label, no class is added."""

import math

import pytest
import torch

import dataset
import methods
from tests.support import thin
from tests.support.tiny_folder import save_image, save_mask
from utils.checkpointing.store import read

#: Methods, or the official flags of one, and the loss terms that each has from step 1 on.
TERMS = {
    "--method FT": "ce",
    "--method LWF": "ce kd",
    "--method LWF-MC": "ce icarl",
    "--method ILT": "ce kd body",
    "--method EWC": "ce regularizer",
    "--method PI": "ce regularizer",
    "--method RW": "ce regularizer",
    "--method MiB": "ce kd",
    "--method PLOP": "ce pod",
    "--method FT --pod local --pod_factor 0.0001 --pod_logits": "ce pod",
    "--method LSKD": "ce mcd kd pod/stage1 pod/stage2 md/stage3 md/stage4 md/pre_logits md/logits",
}


@pytest.fixture(autouse=True)
def _thin():
    with thin.program():
        yield


@pytest.fixture(scope="module")
def cities(tmp_path_factory):
    """The layout of Cityscapes with five tiny pictures a city."""
    root = tmp_path_factory.mktemp("cities")
    for domain, city in enumerate(dataset.DATASETS["cityscapes_domain"].domains):
        part = f"{'train' if domain < 18 else 'val'}/{city}"
        for kind in ("leftImg8bit", "gtFine"):
            (root / kind / part).mkdir(parents=True)
        for number in range(5):
            save_image(root / "leftImg8bit" / part / f"{city}_{number}_leftImg8bit.png", number)
            save_mask(root / "gtFine" / part / f"{city}_{number}_gtFine_labelIds.png", [7, 33, 26, 11])
    return root


def words(cities, text):
    return f"--dataset cityscapes_domain --data_root '{cities}' --task 11-5 {text}"


def test_balanced_initialisation_leaves_the_classifier_alone(cities, tmp_path):
    """No class is added: a step that moves nothing ends where the step before it ended."""
    still = "--method PLOP --lr 1e-30 --weight_decay 0 --fix_bn"
    (tmp_path / "mine.json").write_text('{"name": "mine", "steps": [[0, 3], [1, 2]]}')
    assert thin.launch(tmp_path, words(cities, f"--step 0 1 {still} --task_file '{tmp_path}/mine.json'")) == 0
    states = [read(tmp_path / "checkpoints" / f"mine-cityscapes_domain_n_{step}.pth")["model_state"] for step in (0, 1)]
    assert torch.equal(*(state["cls.0.weight"] for state in states))


def test_every_method_is_run():
    assert {text.split()[1] for text in TERMS} == set(methods.METHODS) - {"Joint"}


@pytest.mark.parametrize("text", TERMS)
def test_steps_of_a_method(text, cities, tmp_path):
    assert thin.launch(tmp_path, words(cities, f"--step 0 1 {text}")) == 0
    rows = thin.rows(tmp_path)
    assert [row[0] for row in rows] == ["0", "1"]
    assert all(len(row) == 1 + 19 + 1 and 0 <= float(row[-1]) <= 1 for row in rows)
    for step, entry in thin.document(tmp_path)["steps"].items():
        (epoch,) = entry["epochs"]
        assert set(epoch["losses"]) == {*(TERMS[text] if step == "1" else "ce").split(), "loss"}
        assert all(math.isfinite(value) for value in epoch["losses"].values())
    weights = read(tmp_path / "checkpoints" / "11-5-cityscapes_domain_n_1.pth")["model_state"]
    assert weights["cls.0.weight"].shape[0] == 19 and "cls.1.weight" not in weights
