"""Domain-incremental Cityscapes through the real command line: the steps are cities, every pixel has its label, no class is added."""

import ast
import math

import pytest
import torch

import dataset
import methods
from dataset.layout import FilePair, Layout
from tests.support import thin
from tests.support.paths import ROOT
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
    "--method RCIL --lr 0.001": "ce kd pcd/spatial pcd/channel",
    "--method LSKD": "ce mcd kd pod/stage1 pod/stage2 md/stage3 md/stage4 md/pre_logits md/logits",
}


pytestmark = pytest.mark.usefixtures("small")


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


@pytest.mark.parametrize("method", sorted(set(methods.METHODS) - {text.split()[1] for text in TERMS} - {"Joint"}))
def test_every_other_method_is_refused(method, cities, tmp_path, capsys):
    """Their losses, starts or memories speak of a background or of new classes."""
    assert thin.launch(tmp_path, words(cities, f"--step 0 1 --method {method}")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --") and f"--method {method}" in error and error.count("\n") == 1


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


# ------------------------------------------------- a domain-incremental data set of somebody else


class Towns(Layout):
    """Three towns, four labels; its name does not say that its steps are domains."""

    name = "towns"
    hint = "towns"
    classes = ("road", "house", "tree", "sky")
    domains = ("a", "b", "c")

    def pairs(self, root, train):
        folder = root / ("train" if train else "val")
        return [
            FilePair(str(folder / f"{town}{number}.jpg"), str(folder / f"{town}{number}.png"), domain)
            for domain, town in enumerate(self.domains)
            for number in range(2)
        ]


@pytest.fixture
def towns(tmp_path, monkeypatch):
    monkeypatch.setitem(dataset.DATASETS, "towns", Towns())
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for town in Towns.domains:
            for number in range(2):
                save_image(tmp_path / split / f"{town}{number}.jpg", number)
                save_mask(tmp_path / split / f"{town}{number}.png", [1, 2, 3])
    (tmp_path / "order.json").write_text('{"name": "order", "steps": [[2], [0, 1]]}')
    return f"--dataset towns --data_root '{tmp_path}' --task_file '{tmp_path}/order.json' --batch_size 2"


def test_domains_are_a_property_of_the_layout(towns, tmp_path):
    assert thin.launch(tmp_path, f"{towns} --step 0 1 --method LWF") == 0
    assert [len(row) for row in thin.rows(tmp_path)] == [1 + 4 + 1] * 2
    state = read(tmp_path / "checkpoints" / "order-towns_n_1.pth")
    assert state["model_state"]["cls.0.weight"].shape[0] == 4 and "cls.1.weight" not in state["model_state"]
    task = dataset.described_task(state["task"])
    assert (task.domain, task.step, task.new, task.label_ids) == (True, 1, (0, 1), (0, 1, 2, 3))


def test_what_domains_do_not_have_is_refused_for_any_data_set_of_domains(towns, tmp_path, capsys):
    assert thin.launch(tmp_path, f"{towns} --step 1 --pseudo entropy") == 2
    assert "--pseudo entropy cannot work on towns: its steps are domains" in capsys.readouterr().err


def test_no_code_tells_domains_by_a_name():
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).parts[0] not in ("tests", ".venv"):
            for node in ast.walk(ast.parse(path.read_text())):
                compared = ast.unparse(node) if isinstance(node, ast.Compare) else ""
                assert "cityscapes" not in compared and "_domain')" not in compared, f"{path}: {compared}"
                called = ast.unparse(node) if isinstance(node, ast.Call) else ""
                assert not called.endswith(("endswith('_domain')", "startswith('cityscapes')")), f"{path}: {called}"
