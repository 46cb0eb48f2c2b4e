"""utils/runtime/divergence.py: the rule by hand, and the copy of a state."""

import pytest
import torch

from utils.runtime.divergence import DivergenceWatch, copy_to_cpu


def looked(*totals):
    """What a watch says of each of these totals, and the watch."""
    watch = DivergenceWatch()
    return [watch.begins({"ce": 1.0, "loss": total}) for total in totals], watch


@pytest.mark.parametrize(
    ("first", "most"),
    # 100 times the first loss, which counts as 1 at least and as 1000 at most
    [(3.0, 300.0), (-3.0, 300.0), (0.01, 100.0), (4e7, 1e5)],
)
def test_the_rule_by_hand(first, most):
    later = [most, -most, most * 1.001]
    found, watch = looked(first, *later)
    assert found[1:] == [False, False, True]
    assert watch.reference == abs(first) and watch.values == {"ce": 1.0, "loss": later[-1]}


def test_it_begins_once_and_ends_when_the_loss_is_back():
    found, watch = looked(2.0, 1e3, 1e4)
    assert found == [False, True, False]
    watch.state = {"model": {}}
    assert watch.values["loss"] == 1e3 and not watch.begins({"loss": 150.0})
    assert watch.values == {} and watch.state is None
    assert watch.begins({"loss": 1e9})


def test_a_copied_state_is_its_own():
    state = {"a": torch.ones(2), "b": [(torch.zeros(1), 3), None], "c": {"d": "x"}}
    copied = copy_to_cpu(state)
    state["a"] += 1
    state["b"][0][0].add_(1)
    assert copied["a"].tolist() == [1, 1] and copied["b"][0][0].item() == 0
    assert copied["b"][0][1] == 3 and copied["b"][1] is None and copied["c"] == {"d": "x"}
