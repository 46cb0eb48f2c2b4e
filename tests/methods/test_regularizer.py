"""methods/regularizer.py and methods/ewc.py: penalties, Fisher information and scores by hand on two parameters."""

from argparse import Namespace

import pytest
import torch
from torch import nn

from methods.base import Previous
from methods.regularizer import REGULARIZERS, normalised
from tests.support import thin
from utils.runtime.errors import NonFiniteLoss

KINDS = {"ewc": ("fisher",), "pi": ("score",), "rw": ("fisher", "score")}


class Toy(nn.Module):
    """Two parameters of two values; `new` stands for the classifier that a step adds."""

    def __init__(self, with_new=False):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 5.0], dtype=torch.float64))
        if with_new:
            self.new = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))

    def set_gradients(self, *values):
        for parameter in self.parameters():
            parameter.grad = torch.tensor(values, dtype=torch.float64)

    def move(self, *values):
        with torch.no_grad():
            for parameter in self.parameters():
                parameter += torch.tensor(values, dtype=torch.float64)


def options(**changed):
    defaults = {"reg_importance": 10.0, "reg_alpha": 0.9, "reg_iterations": 2, "reg_no_normalize": False}
    return Namespace(**{**defaults, **changed})


def checkpoint(**importance):
    """A step-0 checkpoint with the weight at [1, 2]."""
    tensors = {kind: {"module.weight": torch.tensor(v, dtype=torch.float64)} for kind, v in importance.items()}
    old = torch.tensor([1.0, 2.0], dtype=torch.float64)
    return {"model_state": {"weight": old}, "trainer_state": {"regularizer": tensors}}


def make(name, model, previous, **changed):
    return REGULARIZERS[name](model, Previous.of_part(previous, "regularizer"), options(**changed))


def run_iterations(regularizer, model, count=1):
    """`count` iterations with gradient [3, 1] and a move of [-1, -0.5]."""
    for _ in range(count):
        model.set_gradients(3.0, 1.0)
        regularizer.update(model)
        model.move(-1.0, -0.5)
        regularizer.after_step(model)


# ------------------------------------------------------------------------ penalty


@pytest.mark.parametrize(
    ("no_normalize", "penalty", "gradient"),
    # p − p_old = [1, 3]; importance [1, 3] becomes [0, 1]
    [(False, 10 * (0 * 1 + 1 * 9), [0.5, 60.5]), (True, 10 * (1 * 1 + 3 * 9), [20.5, 180.5])],
)
def test_penalty_and_its_gradient_by_hand(no_normalize, penalty, gradient):
    model = Toy(with_new=True)
    regularizer = make("ewc", model, checkpoint(fisher=[1.0, 3.0]), reg_no_normalize=no_normalize)
    model.set_gradients(0.5, 0.5)
    torch.testing.assert_close(float(regularizer.penalty(model)), float(penalty), rtol=1e-6, atol=0)
    regularizer.add_gradient(model)
    torch.testing.assert_close(model.weight.grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-6, atol=0)
    assert model.new.grad.tolist() == [0.5, 0.5]  # a new classifier has no old weights


@pytest.mark.parametrize("name", KINDS)
def test_gradient_is_that_of_the_penalty(name):
    model = Toy()
    importance = {kind: [0.3, 1.1 + i] for i, kind in enumerate(KINDS[name])}
    regularizer = make(name, model, checkpoint(**importance), reg_importance=0.7, reg_no_normalize=True)
    model.set_gradients(0.0, 0.0)
    value = regularizer.penalty(model)
    regularizer.add_gradient(model)
    weight = model.weight.detach().clone().requires_grad_()
    total = sum(torch.tensor(v, dtype=torch.float64) for v in importance.values())
    expected = 0.7 * (total * (weight - torch.tensor([1.0, 2.0])).square()).sum()
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(model.weight.grad, torch.autograd.grad(expected, weight)[0])


def test_rw_adds_two_normalised_importances():
    model = Toy()
    regularizer = make("rw", model, checkpoint(fisher=[0.0, 2.0], score=[5.0, 1.0]))
    torch.testing.assert_close(regularizer.weights["weight"], torch.ones(2, dtype=torch.float64), rtol=1e-7, atol=1e-7)


def test_importance_is_normalised_to_its_own_range():
    assert normalised(torch.tensor([2.0, 4.0, 3.0])).tolist() == pytest.approx([0, 1, 0.5])
    assert normalised(torch.tensor([7.0, 7.0])).tolist() == [0, 0]


def test_parameters_without_gradient_are_left_out():
    model = Toy()
    regularizer = make("ewc", model, checkpoint(fisher=[1.0, 3.0]))
    regularizer.add_gradient(model)
    assert model.weight.grad is None


# -------------------------------------------------------------------- measurement


def test_fisher_is_a_moving_average_of_squared_gradients():
    model = Toy()
    regularizer = make("ewc", model, {}, reg_alpha=0.75)
    assert regularizer.current["fisher"]["weight"].tolist() == [0, 0]
    model.set_gradients(2.0, 1.0)
    regularizer.update(model)
    assert regularizer.current["fisher"]["weight"].tolist() == [3, 0.75]
    model.set_gradients(0.0, 4.0)
    regularizer.update(model)
    assert regularizer.current["fisher"]["weight"].tolist() == [0.75, 0.25 * 0.75 + 12]
    model.set_gradients(float("inf"), 0.0)  # float16 overflow
    regularizer.update(model)
    assert regularizer.current["fisher"]["weight"].tolist() == [0.75, 0.25 * (0.25 * 0.75 + 12)]


def test_path_integral_by_hand():
    model = Toy()
    regularizer = make("pi", model, checkpoint(score=[0.5, 0.25]))
    run_iterations(regularizer, model, 2)
    model.set_gradients(float("nan"), 0.0)
    regularizer.update(model)
    regularizer.after_step(model)  # passed over
    regularizer.finish(model)
    # −g·Δp = [3, 0.5] an iteration; the way from start to end is [2, 1]
    expected = [0.5 + 6 / (4 + 1e-3), 0.25 + 1 / (1 + 1e-3)]
    torch.testing.assert_close(regularizer.current["score"]["weight"], torch.tensor(expected, dtype=torch.float64))


def test_path_integral_counts_no_increase_of_the_loss():
    model = Toy()
    regularizer = make("pi", model, {})
    model.set_gradients(1.0, 1.0)
    regularizer.update(model)
    model.move(1.0, -1.0)
    regularizer.after_step(model)
    regularizer.finish(model)
    assert regularizer.current["score"]["weight"].tolist() == pytest.approx([0, 1 / 1.001])


def test_riemannian_score_by_hand():
    model = Toy()
    regularizer = make("rw", model, checkpoint(fisher=[1.0, 2.0], score=[4.0, 8.0]), reg_alpha=0.5, reg_iterations=2)
    run_iterations(regularizer, model, 2)
    # F: [1, 2] → [5, 1.5] → [7, 1.25]; way [2, 1], divergence ½·F·way² = [14, 0.625]; decrease [6, 1]
    fisher, score = (regularizer.current[kind]["weight"] for kind in ("fisher", "score"))
    assert fisher.tolist() == [7, 1.25]
    assert score.tolist() == pytest.approx([6 / 14, 1 / 0.625])
    run_iterations(regularizer, model, 1)
    assert score.tolist() == pytest.approx([6 / 14, 1 / 0.625])  # only every second iteration
    regularizer.finish(model)
    # F: [8, 1.125], way [1, 0.5], divergence [4, 0.140625]; then the mean with the old score
    expected = [(4 + 6 / 14 + 3 / 4) / 2, (8 + 1 / 0.625 + 0.5 / 0.140625) / 2]
    assert score.tolist() == pytest.approx(expected)


# --------------------------------------------------------------------------- state


@pytest.mark.parametrize("name", KINDS)
def test_state_goes_from_step_to_step(name):
    model = Toy()
    first = make(name, model, {}, reg_iterations=1)
    run_iterations(first, model, 3)
    first.finish(model)
    saved = first.state_dict()
    before = {kind: saved[kind]["module.weight"].clone() for kind in KINDS[name]}
    assert all((value > 0).all() for value in before.values())

    wider = Toy(with_new=True)
    previous = {"model_state": {"weight": model.weight.detach()}, "trainer_state": {"regularizer": saved}}
    second = make(name, wider, previous, reg_iterations=1)
    assert list(second.weights) == ["weight"]
    run_iterations(second, wider, 1)
    second.finish(wider)
    after = second.state_dict()
    for kind in KINDS[name]:
        assert set(after[kind]) == {"module.weight", "module.new"}
        assert (after[kind]["module.new"] > 0).all()
        kept = {"fisher": 0.1, "score": 0.5 if name == "rw" else 1.0}[kind]
        assert (after[kind]["module.weight"] >= kept * before[kind]).all()
        assert torch.equal(saved[kind]["module.weight"], before[kind])


@pytest.mark.parametrize("name", KINDS)
def test_what_a_step_does_not_train_keeps_its_importance(name):
    model = Toy(with_new=True)
    model.weight.requires_grad_(False)  # --freeze
    importance = {kind: [0.25, 0.5] for kind in KINDS[name]}
    regularizer = make(name, model, checkpoint(**importance))
    assert not regularizer.weights
    for kind in KINDS[name]:
        assert regularizer.state_dict()[kind]["module.weight"].tolist() == [0.25, 0.5]


@pytest.mark.parametrize("name", KINDS)
def test_an_interrupted_measurement_continues(name):
    whole, parts = Toy(), Toy()
    previous = checkpoint(**{kind: [0.25, 0.5] for kind in KINDS[name]})
    uninterrupted = make(name, whole, previous)
    run_iterations(uninterrupted, whole, 3)
    uninterrupted.finish(whole)

    first = make(name, parts, previous)
    run_iterations(first, parts, 1)
    saved = first.state_dict()
    second = make(name, parts, previous)
    second.load_state_dict(saved)
    run_iterations(second, parts, 2)
    second.finish(parts)
    for kind in KINDS[name]:
        assert torch.equal(second.current[kind]["weight"], uninterrupted.current[kind]["weight"])


@pytest.mark.parametrize(
    ("name", "importance", "absent"),
    [
        ("ewc", {}, ["fisher"]),
        ("rw", {"fisher": [1.0, 2.0]}, ["score"]),
        ("pi", {"fisher": [1.0, 2.0]}, ["score"]),
        ("rw", {"fisher": [1.0, 2.0], "score": [1.0, 2.0]}, []),
    ],
)
def test_missing_importance_is_known(name, importance, absent):
    assert make(name, Toy(), checkpoint(**importance)).absent == absent
    assert make(name, Toy(), {}).absent == []  # step 0 has no earlier one


def spoil(previous, *keys_and_value):
    *keys, last, value = keys_and_value
    spot = previous
    for key in keys:
        spot = spot[key]
    spot[last] = value
    return previous


FISHER = ("trainer_state", "regularizer", "fisher")


@pytest.mark.parametrize(
    ("spoilt", "said"),
    [
        (("trainer_state", "regularizer", "x"), "it is a str"),
        ((*FISHER, 3), "fisher is no dictionary"),
        ((*FISHER, {1: torch.ones(2)}), "fisher is no dictionary of parameter names"),
        ((*FISHER, "module.weight", torch.ones(3)), "fisher of weight has not the shape"),
        ((*FISHER, "module.weight", 1.0), "fisher of weight has not the shape"),
        ((*FISHER, "module.other", torch.ones(2)), "fisher of other has not the shape"),
        ((*FISHER, "module.weight", torch.ones(2, dtype=torch.int64)), "not of finite numbers"),
        ((*FISHER, "module.weight", torch.tensor([1.0, float("nan")])), "not of finite numbers"),
        (("model_state", {}), "fisher of weight has not the shape"),
    ],
)
@pytest.mark.parametrize("name", ["ewc", "rw"])
def test_importance_that_does_not_fit_its_weights_is_refused(name, spoilt, said):
    previous = spoil(checkpoint(**{kind: [0.25, 0.5] for kind in KINDS[name]}) | {"file": "a.pth"}, *spoilt)
    with pytest.raises(
        ValueError, match=r"^--regularizer: a.pth has no usable importance \(.*\); train that step again"
    ) as error:
        make(name, Toy(), previous)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_states_that_are_no_dictionary_are_refused():
    spoilt = {"trainer_state": [1], "file": "a.pth"}
    with pytest.raises(
        ValueError, match=r"^a.pth has a trainer_state that is a list, not a dictionary; train that step"
    ):
        make("ewc", Toy(), spoilt)


@pytest.mark.parametrize("empty", [{}, {"trainer_state": None}, {"trainer_state": {"regularizer": None}}])
def test_checkpoints_without_importance_are_taken(empty):
    assert make("ewc", Toy(), {"model_state": {"weight": torch.ones(2)}} | empty).absent == ["fisher"]


# -------------------------------------------------------------------------- method


pytestmark = pytest.mark.usefixtures("small")


def test_penalty_is_added_after_the_measurement():
    """The Fisher information is that of the loss alone, the optimiser's gradient has the penalty's too."""
    step = thin.Step("--method EWC --reg_importance 5 --reg_alpha 1", steps=((0, 1, 2), (3,)), dtype=torch.float64)
    importance = {name: torch.rand_like(p) for name, p in step.teacher.named_parameters()}
    previous = {"model_state": step.teacher.state_dict(), "trainer_state": {"regularizer": {"fisher": importance}}}
    step.method.attach(step.model, None, previous)
    (part,) = (part for part in step.method.parts if part.state_key == "regularizer")
    images, labels = thin.images(2, dtype=torch.float64), thin.bands(0, 3, 255)
    step.terms(images, labels)["ce"].backward()
    plain = {name: p.grad.clone() for name, p in step.model.named_parameters()}
    value = step.method.penalties(step.model)["regularizer"]
    step.method.after_backward(step.model)
    expected = 0.0
    for name, parameter in step.model.named_parameters():
        torch.testing.assert_close(part.regularizer.current["fisher"][name], plain[name].square())
        moved = 0.0 if name.startswith("cls.1.") else parameter - previous["model_state"][name]
        weight = 0.0 if name.startswith("cls.1.") else 5 * normalised(importance[name])
        torch.testing.assert_close(parameter.grad, plain[name] + 2 * weight * moved)
        expected += torch.as_tensor(weight * moved * moved).sum()
    torch.testing.assert_close(value, expected.detach())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("factor", "stable"), [(0.99, True), (1.01, False)])
def test_the_largest_stable_importance_is_where_the_optimiser_stops_converging(momentum, factor, stable, capsys):
    step = thin.Step(f"--method EWC --lr 0.03 --momentum {momentum}", steps=((0, 1, 2), (3,)))
    importance = {name: torch.rand_like(p) for name, p in step.teacher.named_parameters()}
    previous = {"model_state": step.teacher.state_dict(), "trainer_state": {"regularizer": {"fisher": importance}}}
    step.method.attach(step.model, None, previous)
    (part,) = (part for part in step.method.parts if part.state_key == "regularizer")
    capsys.readouterr()
    step.opts.reg_importance = factor * part.largest_stable
    step.method.attach(step.model, None, previous)
    noted = capsys.readouterr().out
    assert (noted == "") == stable
    if not stable:
        assert (
            f"may diverge: the penalty is stable at --lr 0.03 up to --reg_importance {part.largest_stable:.3g}" in noted
        )
    # the penalty of the most important parameter alone, from 1 away
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=0.03, momentum=momentum, nesterov=momentum > 0)
    for _ in range(3000):
        weight.grad = 2 * step.opts.reg_importance * part.regularizer.largest_weight * weight.detach()
        optimizer.step()
    assert (weight.abs().item() < 1e-6) if stable else (weight.abs().item() > 1e6)


def test_the_penalty_is_part_of_the_total_and_of_the_guard():
    step = thin.Step("--method EWC --reg_importance 5", steps=((0, 1, 2), (3,)))
    importance = {name: torch.rand_like(p) for name, p in step.teacher.named_parameters()}
    previous = {"model_state": step.teacher.state_dict(), "trainer_state": {"regularizer": {"fisher": importance}}}
    step.method.attach(step.model, None, previous)
    trainer = step.trainer()
    images, labels = thin.images(2), thin.bands(0, 3, 255)
    values = trainer.train_iteration(images, labels)
    assert list(values) == ["ce", "regularizer", "loss"] and values["regularizer"] > 0
    assert values["loss"] == pytest.approx(values["ce"] + values["regularizer"])
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    step.opts.reg_importance = 1e38  # times distances whose squares add up to more than 3.4
    with pytest.raises(
        NonFiniteLoss, match=r": ce [0-9.]+, regularizer inf, loss inf; the penalty is stable at --lr "
    ) as caught:
        trainer.train_iteration(images, labels)
    assert "--skip_nonfinite" not in str(caught.value)  # no batch is to blame
    assert all(torch.equal(p, before[name]) for name, p in step.model.named_parameters())


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("path", "module.none"), None),
        (("fisher",), 3),
        (("fisher", "module.cls.0.bias"), torch.ones(1)),
        (("path", "cls.0.bias"), torch.ones(1)),
        (("before", "cls.0.bias"), "x"),
        (("iterations",), "x"),
        (("iterations",), torch.ones(1)),
    ],
)
def test_an_interrupted_measurement_that_does_not_fit_is_refused(keys, value):
    step = thin.Step("--method RW", steps=((0, 1, 2),))
    state = step.method.state_dict()
    step.method.load_state_dict(state)
    spoil(state["regularizer"], *keys, value)
    with pytest.raises(ValueError, match=r"^--resume: state/method/regularizer.* start anew without it$"):
        step.method.load_state_dict(state)


def test_a_step_without_earlier_importance_says_so(capsys):
    step = thin.Step("--method EWC", steps=((0, 1, 2), (3,)))
    assert capsys.readouterr().out == ""
    step.method.attach(step.model, None, {"model_state": step.teacher.state_dict(), "trainer_state": {}})
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("note: no fisher in the checkpoint of step 0")
    step.terms(thin.images(2), thin.bands(0, 3))["ce"].backward()
    assert step.method.penalties(step.model) == {}
    step.method.after_backward(step.model)
