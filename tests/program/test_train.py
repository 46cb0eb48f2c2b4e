"""The trainer: optimiser, schedule, saves, validations, non-finite losses, evaluation, state."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import argparser
import dataset
from dataset.sampler import FixedBatches
from tests.support import thin
from utils import scheduler
from utils.checkpointing.random_state import random_state, seed_everything, set_random_state
from utils.optimizer import make_optimizer, parameter_groups
from utils.reporting import context
from utils.reporting.meters import Meters
from utils.runtime.errors import NonFiniteLoss
from utils.runtime.signals import Stopped

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("small")


class Loader(FixedBatches):
    """Batches in a list that remember the position that they were asked for."""

    def __getitem__(self, number):
        return self.batches[number]

    def set_position(self, epoch, first_batch=0, purpose="training"):
        self.position = (epoch, first_batch)


def batches(count=3, labels=(0, 1, 2, 255)):
    return Loader([(thin.images(2, seed=i), thin.bands(*labels)) for i in range(count)])


def trainer_of(text="", steps=((0, 1, 2),), batch=None):
    step = thin.Step(text, steps)
    if len(steps) > 1:
        step.begin(*(batch or batches()[0]))
    return step.trainer(iterations=3)


def weights(trainer):
    return {name: value.clone() for name, value in trainer.network.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


# --------------------------------------------------------- optimiser and schedule


def optimizer_of(step, extra=()):
    groups = parameter_groups(step.opts, step.task.step, step.model)
    return make_optimizer(step.opts, groups, list(extra), fused=False)


def test_optimizer_is_nesterov_sgd_over_all_parameters():
    step = thin.Step("--lr 0.3 --momentum 0.8 --weight_decay 0.02", ((0, 1, 2), (3,)))
    extra = nn.Parameter(torch.ones(9))
    optimizer = optimizer_of(step, [extra])
    assert [(g["lr"], g["momentum"], g["nesterov"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.3, 0.8, True, 0.02)
    ] * 3
    assert optimizer.param_groups[1]["params"] == [extra, *step.model.head.parameters()]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in step.model.parameters()} | {id(extra)}


def test_lr_old_is_a_factor_of_the_learning_rate():
    step = thin.Step("--lr 0.5 --lr_old 0.25", ((0, 1, 2), (3,), (4, 5)))
    groups = optimizer_of(step).param_groups
    assert [g["lr"] for g in groups] == [0.5, 0.5, 0.125, 0.5]
    assert groups[2]["params"] == [*step.model.cls[0].parameters(), *step.model.cls[1].parameters()]
    assert groups[3]["params"] == list(step.model.cls[2].parameters())
    cosine = thin.Step("--lr 0.5 --lr_old 0.25 --cosine", ((0, 1, 2), (3,)))
    optimizer = optimizer_of(cosine)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in cosine.model.parameters()}
    first = thin.Step("--lr 0.5 --lr_old 0.25", ((0, 1, 2),))
    assert [g["lr"] for g in optimizer_of(first).param_groups] == [0.5] * 3


@pytest.mark.parametrize(
    ("rates", "steps", "expected"),
    [
        ("0.5", "0 1 2", [0.5, 0.5, 0.5]),
        ("0.5", "2", [0.5]),
        ("0.5 0.25", "1 2", [0.5, 0.25]),  # as many as steps: each has its own
        ("0.5 0.25 0.125", "2 0 1", [0.5, 0.25, 0.125]),  # in the order of --step
        ("0.5 0.25", "0 1", [0.5, 0.25]),
        ("0.5 0.25", "0 1 2", [0.5, 0.25, 0.25]),  # otherwise the first for step 0, the last for later ones
        ("0.5 0.25", "1", [0.25]),
        ("0.5 0.25", "0", [0.5]),
        ("0.5 0.25 0.125", "0 1", [0.5, 0.125]),
        ("0.5 0.25 0.125", "1 2", [0.125, 0.125]),
    ],
)
def test_learning_rates_belong_to_the_places_of_step(rates, steps, expected):
    opts = argparser.parse(["--lr", *rates.split(), "--step", *steps.split()])
    tasks = [dataset.load_task(thin.options(), step) for step in opts.step]
    assert [argparser.options_of_step(opts, task).lr_of_step for task in tasks] == expected
    lines = [line for line in argparser.notes(opts) if line.startswith("--lr ")]
    if len(rates.split()) in (1, len(steps.split())):
        assert not lines
    else:
        (line,) = lines
        first, *unused, last = rates.split()
        assert f"step 0 learns with {first}, every later step with {last}" in line
        assert ("not used" in line) == bool(unused) and all(rate in line for rate in unused)


def test_a_frozen_body_is_not_optimised():
    step = thin.Step("", ((0, 1, 2),))
    step.model.freeze_body()
    optimizer = optimizer_of(step)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in step.model.body.parameters()}


def rates(opts_text, steps, total=4):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.5)
    schedule = scheduler.build(thin.options(opts_text), optimizer, total)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_poly_schedule_by_hand():
    assert rates("", 5) == pytest.approx([0.5, 0.5 * 0.75**0.9, 0.5 * 0.5**0.9, 0.5 * 0.25**0.9, 0.0])
    assert rates("--lr_power 1", 6) == pytest.approx([0.5, 0.375, 0.25, 0.125, 0.0, 0.0])


def test_step_schedule_by_hand():
    text = "--lr_policy step --lr_decay_step 2 --lr_decay_factor 0.1"
    assert rates(text, 5) == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005])


def test_schedule_ends_with_the_last_iteration():
    trainer = trainer_of("--epochs 2 --lr 0.1")
    trainer.fit(batches(), None, lambda: None)
    assert trainer.total_iterations == 6
    assert trainer.optimizer.param_groups[0]["lr"] == 0.0


def test_meters_by_hand():
    meters = Meters()
    meters.update({"ce": 1.0, "kd": 2.0})
    meters.update({"ce": 3.0, "kd": 2.5})
    assert meters.means() == {"ce": 2.0, "kd": 2.25}
    assert Meters().means() == {}


# ------------------------------------------------------------------ the loop


def test_saves_and_validations_come_when_they_are_due(monkeypatch):
    trainer = trainer_of("--epochs 5 --ckpt_interval 2 --val_interval 3")
    saved, validated = [], []
    monkeypatch.setattr(trainer, "evaluate", lambda loader, title: validated.append(trainer.epoch) or fake_scores())
    trainer.fit(batches(), batches(1), lambda: saved.append(trainer.epoch))
    assert saved == [2, 4]  # the last epoch is saved as the finished step
    assert validated == [3]
    assert [entry.get("validation_miou") for entry in trainer.history] == [None, None, 25.0, None, None]
    assert trainer.best_score == 0.25  # a fraction in the checkpoint, as officially


def fake_scores():
    return {"Mean IoU": 0.25, "Overall Acc": 0.5}


def test_saves_by_the_clock_count_over_epochs(monkeypatch):
    clock = iter(range(0, 10**6, 25))  # every look at the clock is 25 seconds later
    monkeypatch.setattr(context.time, "monotonic", lambda: next(clock))
    trainer = trainer_of("--epochs 4 --ckpt_interval 100 --ckpt_minutes 2")
    saved = []
    trainer.fit(batches(2), None, lambda: saved.append((trainer.epoch, trainer.iteration)))
    # 2 iterations an epoch: two minutes are over after the 5th, in the third epoch
    assert saved == [(2, 1)]


def test_history_names_every_term():
    trainer = trainer_of("--method LSKD", ((0, 1, 2), (3,)), (thin.images(2), thin.bands(0, 3, 255)))
    means = trainer.train_epoch(batches(2, (0, 3, 255)))
    terms = {"ce", "mcd", "kd", "pod/stage1", "pod/stage2", "md/stage3", "md/stage4", "md/pre_logits", "md/logits"}
    assert set(means) == terms | {"loss"}
    assert trainer.history == [{"epoch": 0, "losses": means, "balance": trainer.history[0]["balance"]}]
    assert {
        name.removeprefix("lambda/") for name in trainer.history[0]["balance"] if name.startswith("lambda/")
    } == terms


def test_position_is_handed_to_sampler_and_data():
    trainer = trainer_of("--epochs 3")
    trainer.epoch, trainer.iteration = 1, 2
    loader = batches(1)
    trainer.train_epoch(loader)
    assert loader.position == (1, 2)
    assert (trainer.epoch, trainer.iteration) == (2, 0)


def test_fixed_norms_stay_as_they_are():
    trainer = trainer_of("--fix_bn")
    before = weights(trainer)
    trainer.train_epoch(batches())
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert moved and not [name for name in moved if "bn" in name]


# -------------------------------------------------------------- non-finite losses


def poisoned():
    loader = batches(3)
    loader[1][0][0, 0, 3, 3] = float("nan")
    return loader


def test_a_non_finite_loss_names_terms_place_and_files():
    trainer = trainer_of()
    trainer.context.files_of_batch = lambda number: ["a.png", "b.png"]
    with pytest.raises(NonFiniteLoss) as caught:
        trainer.train_epoch(poisoned())
    text = str(caught.value)
    named = "non-finite loss at step 0, epoch 1, iteration 2: ce nan, loss nan; batch: a.png, b.png"
    assert text == f"{named}; lower --lr, --pod_factor or --loss_kd, or skip such batches with --skip_nonfinite N"
    assert trainer.total_iterations == 1


def test_tolerated_non_finite_losses_leave_no_trace():
    trainer = trainer_of("--skip_nonfinite 1")
    trainer.train_epoch(poisoned())
    assert trainer.skipped == 1
    assert all(value.isfinite().all() for value in trainer.network.state_dict().values())
    assert trainer.total_iterations == 3
    assert trainer.history[0]["losses"]["ce"] > 0
    with pytest.raises(NonFiniteLoss):
        trainer.train_epoch(poisoned())

    other = trainer_of("--skip_nonfinite 1")
    loader = poisoned()
    other.train_iteration(*loader[0])
    other.scheduler.step()
    other.train_iteration(*loader[2])
    assert same(weights(other), weights(trainer_after_skip()))


def trainer_after_skip():
    trainer = trainer_of("--skip_nonfinite 1")
    for images, labels in poisoned():
        trainer.train_iteration(images, labels)
    return trainer


# -------------------------------------------------------------------- evaluation


def test_every_pixel_counts_once_and_nothing_moves():
    trainer = trainer_of()
    loader = [
        (thin.images(2, seed=1), thin.bands(0, 1, 2, 255)),
        (thin.images(1, seed=2), thin.bands(1, 0, 255, 255, count=1)),
    ]
    before = weights(trainer)
    scores = trainer.evaluate(loader, keep=2)
    assert int(scores["Confusion Matrix"].sum()) == scores["Total samples"] == 2 * 24 * 32 + 16 * 32
    assert scores["Confusion Matrix"].sum(1).tolist() == [2 * 256 + 256, 2 * 256 + 256, 2 * 256]
    assert trainer.network.training and same(weights(trainer), before)
    assert [[part.shape[-1] for part in sample] for sample in scores["samples"]] == [[32, 32, 32]] * 2
    predicted = trainer.network.eval()(loader[0][0]).logits.argmax(1)
    assert torch.equal(torch.stack([prediction for *_, prediction in scores["samples"]]), predicted)
    assert trainer.evaluate(loader)["samples"] == []


def test_background_can_be_kept_out_of_predictions():
    trainer = trainer_of()
    trainer.network.cls[0].bias.data[0] = 1000.0
    trainer.network.eval()
    assert set(trainer.predict(thin.images(2)).unique().tolist()) == {0}
    trainer.opts.dont_predict_bg = True
    assert 0 not in trainer.predict(thin.images(2)).unique()


def test_a_stop_in_the_validation_is_saved_and_validated_again():
    trainer = trainer_of("--epochs 1")
    trainer.fit(batches(), None, lambda: None)
    trainer.context.stop.signum = 15
    saved = []
    with pytest.raises(Stopped) as caught:
        trainer.fit(batches(), batches(2), lambda: saved.append(trainer.validated_epoch))
    assert caught.value.exit_code == 143
    assert saved == [0]


# -------------------------------------------------------------------------- state


def test_state_continues_to_the_bit():
    """Momentum, schedule, λ, thresholds, running statistics, meters: two iterations after a save equal two without one."""
    text, steps, batch = "--method LSKD --epochs 3", ((0, 1, 2), (3,)), (thin.images(2), thin.bands(0, 3, 255))
    loader = batches(3, (0, 3, 255))
    whole, first, second = (trainer_of(text, steps, batch) for _ in range(3))
    whole.train_epoch(loader)
    first.train_epoch(loader)
    whole.train_iteration(*loader[0])
    first.train_iteration(*loader[0])
    second.load_state_dict(first.state_dict())
    for trainer in (whole, second):
        trainer.train_iteration(*loader[1])
        trainer.train_iteration(*loader[2])
        trainer._end_epoch()
    assert same(weights(whole), weights(second))
    assert torch.equal(whole.balancer.weights, second.balancer.weights)
    assert torch.equal(whole.balancer.initial_losses, second.balancer.initial_losses)
    assert whole.total_iterations == second.total_iterations


def test_another_number_of_processes_is_refused():
    trainer = trainer_of()
    state = trainer.state_dict()
    state["random"] *= 2
    with pytest.raises(ValueError, match="had 2 processes, this one has 1; start as many as before"):
        trainer.load_state_dict(state)


def test_a_state_that_is_built_otherwise_is_refused_by_its_place():
    trainer = trainer_of()
    state = trainer.state_dict()
    with pytest.raises(ValueError, match="--resume: state/best_score of the interrupted run does not fit this one"):
        trainer.load_state_dict(state | {"best_score": "0.5"})


def draw():
    return random.random(), float(np.random.rand()), np.random.randn(), random.gauss(0, 1), torch.rand(3).tolist()


def test_random_states_continue():
    seed_everything(5)
    draw()
    state = random_state(CPU)
    ahead = draw()
    assert draw() != ahead
    set_random_state(state, CPU)
    assert draw() == ahead
    seed_everything(5)
    assert draw() != ahead
    assert draw() == ahead


@pytest.mark.parametrize("method", ["FT", "LSKD"])
def test_compiled_networks_learn_the_same(method, monkeypatch):
    """The teacher is compiled for LSKD and the student for the others: RGE needs the passes through parts of the student."""
    # The graphs are taken as always, but not turned into machine code, which takes a minute
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    images, labels = thin.images(2), thin.bands(0, 4, 5, 255)
    found = []
    for words in ("", "--compile"):
        with thin.program():
            step = thin.Step(f"--method {method} {words}")
            step.begin(images, labels)
            trainer = step.trainer()
            losses = [trainer.train_iteration(images, labels)["loss"] for _ in range(2)]
        found.append(losses)
    compiled = [hasattr(network, "_orig_mod") for network in (trainer.model, trainer.teacher)]
    assert compiled == [method == "FT", True]
    assert found[0] == pytest.approx(found[1], rel=1e-4)
