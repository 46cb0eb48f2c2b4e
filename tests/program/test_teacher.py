"""Which methods load the network of the step before as a teacher."""

import pytest

import methods
import segmentation_module
from tests.support import thin

#: They read the weights or importances of step t-1 from its checkpoint, or nothing.
WITHOUT = ("FT", "EWC", "PI", "RW")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    with thin.program():
        assert thin.launch(folder, "--task 6-2 --step 0 --method EWC") == 0
    return folder / "checkpoints" / "6-2-shapes_n_0.pth"


def built(monkeypatch, folder, text):
    """Number of teachers that step 1 builds."""
    build, calls = segmentation_module.build_teacher, []
    monkeypatch.setattr(segmentation_module, "build_teacher", lambda *args: calls.append(1) or build(*args))
    with thin.program():
        assert thin.launch(folder, text) == 0
    return len(calls)


@pytest.mark.parametrize("method", ["EWC", "FT", "MiB"])
def test_a_teacher_is_built_where_it_is_used(method, first, tmp_path, monkeypatch):
    text = f"--task 6-2 --step 1 --method {method} --step_ckpt '{first}'"
    assert built(monkeypatch, tmp_path, text) == (method not in WITHOUT)


@pytest.mark.parametrize("method", [name for name in methods.METHODS if name != "Joint"])
def test_methods_without_a_teacher(method):
    with thin.program():
        opts = thin.options(f"--method {method}", step=1)
        task = thin.Task("shapes", "thin", 1, (tuple(range(7)), (7, 8)))
        assert methods.build(opts, task).uses_teacher == (method not in WITHOUT)
