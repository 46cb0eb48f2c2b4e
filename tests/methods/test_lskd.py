"""methods/lskd.py: the nine terms, other schemes, how λ is trained, and batches at the edge of what can come."""

import pytest
import torch
from torch import nn

from dataset.sampler import FixedBatches
from methods.lskd import LSKD
from methods.plop import pod_options
from tests.support import thin
from utils.balance import equilibrium
from utils.pod import terms as pod
from utils.types import TAP_NAMES

#: Name, stage that is watched (None: the head's last norm) and group, in the official order of `head.lossweights`.
OFFICIAL = [
    ("ce", None, "A"), ("mcd", None, "A"), ("kd", None, "A"), ("pod/stage1", 0, "B"), ("pod/stage2", 1, "B"),
    ("md/stage3", 2, "B"), ("md/stage4", 3, "A"), ("md/pre_logits", None, "A"), ("md/logits", None, "A"),
]  # fmt: skip


pytestmark = pytest.mark.usefixtures("small")


def train(step, images, labels):
    """One iteration of the trainer; its values, the balancer."""
    step.begin(images, labels)
    trainer = step.trainer()
    values = trainer.train_iteration(images, labels)
    return values, trainer


def assert_finite(step, images, labels):
    """Losses, gradients of the network and of λ, and λ after the optimiser's step."""
    step.begin(images, labels)
    trainer = step.trainer()
    batch = step.batch(images, labels)
    terms = step.method.terms(batch)
    for name, value in terms.items():
        assert value.isfinite(), name
    trainer.balancer.combine(terms).backward()
    trainer.balancer.after_backward()
    trainer.optimizer.step()
    for name, parameter in step.model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.isfinite().all(), name
    for parameter in trainer.balancer.parameters():
        assert parameter.grad.isfinite().all() and parameter.isfinite().all()
    for name, value in trainer.balancer.log_values().items():
        assert value.isfinite(), name
    trainer.balancer.end_epoch()
    return terms


# -------------------------------------------------------------------------- terms


def test_nine_official_terms_in_their_order():
    step = thin.Step("--method LSKD")
    terms = step.terms(thin.images(2), thin.bands(0, 4, 5, 255))
    balancer = step.method.make_balancer(step.model)
    assert balancer.names == tuple(name for name, _, _ in OFFICIAL)
    assert set(terms) == set(balancer.names)
    assert all(value > 0 for value in terms.values())
    stages = [step.model.body.mod2, step.model.body.mod3, step.model.body.mod4, step.model.body.mod5]
    for term, watched, (_, stage, group) in zip(balancer.terms, balancer.watched, OFFICIAL):
        first = step.model.head.red_bn.weight if stage is None else next(stages[stage].parameters())
        assert watched is first and term.group == group
    chain = [term.name for term in sorted((t for t in balancer.terms if t.depth is not None), key=lambda t: t.depth)]
    assert chain == ["pod/stage1", "pod/stage2", "md/stage3", "md/stage4", "md/pre_logits"]
    assert (balancer.alpha, balancer.beta, balancer.gamma) == (10, 0.0001, 0.0005)
    assert balancer.class_ratio == 2 / 4


def test_step_0_is_plain_training():
    lskd, plain = (thin.Step(f"--method {name}", steps=((0, 1, 2),)) for name in ("LSKD", "FT"))
    assert isinstance(lskd.method.make_balancer(lskd.model), equilibrium.Sum)
    assert not lskd.method.needs_teacher
    values, _ = train(lskd, thin.images(2), thin.bands(0, 1, 2))
    assert values == train(plain, thin.images(2), thin.bands(0, 1, 2))[0]
    assert set(values) == {"ce", "loss"}
    for mine, theirs in zip(lskd.model.parameters(), plain.model.parameters()):
        assert torch.equal(mine, theirs)


def test_neither_schedule_nor_mean_over_taps_enters():
    """Without masks the six distances are PLOP's, which PLOP averages and multiplies by sqrt(C / C_new)."""
    pods = ",".join(["pod"] * 6)
    lskd, plop = thin.Step(f"--method LSKD --tap_schemes {pods}"), thin.Step("--method PLOP")
    images, labels = thin.images(2), thin.bands(0, 4, 5, 255)
    terms = lskd.terms(images, labels)
    assert list(lskd.method.make_balancer(lskd.model).names) == ["ce", "kd", *(f"pod/{tap}" for tap in TAP_NAMES)]
    batch = plop.batch(images, labels) if plop.begin(images, labels) is None else None
    distances = pod.pod_terms(batch.teacher.features, batch.student.features, pod_options(plop.opts))
    for tap, distance in zip(TAP_NAMES, distances):
        torch.testing.assert_close(terms[f"pod/{tap}"], distance)
    torch.testing.assert_close(plop.method.terms(batch)["pod"], sum(distances) / 6 * (6 / 2) ** 0.5)


@pytest.mark.parametrize(
    ("schemes", "more", "names"),
    [
        ("none,none,none,none,none,none", "", ["ce", "kd"]),
        ("none,none,none,none,none,none", "--loss_kd 0", ["ce"]),
        ("none,none,md+mcd,none,none,none", "--mmm 4", ["ce", "mcd/stage3", "kd", "md/stage3"]),
        ("mcd,none,none,none,none,none", "--mmm 3", ["ce", "mcd/stage1", "kd"]),
        ("none,none,none,none,mcd,mcd", "--mmm 2", ["ce", "mcd", "mcd/logits", "kd"]),
        ("none,none,none,none,none,md", "--loss_de 1", ["ce", "kd", "body", "md/logits"]),
        ("pod,md,none,none,none,none", "--entropy_min 0.1", ["ce", "kd", "entropy", "pod/stage1", "md/stage2"]),
        ("none,none,none,md,none,none", "--unkd --icarl_disjoint", ["ce", "kd", "md/stage4"]),
    ],
)
@pytest.mark.parametrize("rule", ["--sigmoid whc --dis cos", "--sigmoid gt"])
def test_other_schemes_train(schemes, more, names, rule):
    step = thin.Step(f"--method LSKD --tap_schemes {schemes} {more} {rule}")
    values, trainer = train(step, thin.images(2), thin.bands(0, 4, 5, 255))
    assert list(trainer.balancer.names) == names
    assert set(values) == {*names, "loss"}
    assert len(trainer.balancer.weights) == len(names)
    trainer.balancer.end_epoch()
    assert float(trainer.balancer.weights.detach().sum()) == pytest.approx(len(names))


def test_mcd_of_logits_folds_the_extra_channels():
    """The student's new channels join the background before the two are compared."""
    step = thin.Step("--method LSKD --tap_schemes none,none,none,none,none,mcd --mmm 2 --sigmoid gt --aaaaaa 1")
    images, labels = thin.images(2), thin.bands(0, 4, 5, 255)
    terms = step.terms(images, labels)
    step.model.train()
    with torch.no_grad():
        # Moving a constant from the background to a new class changes nothing of their sum
        step.model.cls[0].bias[0] -= 1
        step.model.cls[2].bias[1] += 1
    torch.testing.assert_close(step.terms(images, labels)["mcd/logits"], terms["mcd/logits"])


def test_too_many_groups_for_the_logits_are_refused_before_the_step():
    with pytest.raises(ValueError, match=r"--mmm 20 .* 4 channels .* 1 to 4"):
        thin.Step("--method LSKD --tap_schemes none,none,none,none,none,mcd")


#: LSKD's features without its distillation of outputs, which some options replace.
FEATURES_ALONE = "--pod local --dis cos --sigmoid whc --mmm 4"


@pytest.mark.parametrize(
    ("words", "name"), [("--loss_de 3", "body"), ("--icarl", "icarl"), ("--entropy_min 2", "entropy")]
)
def test_further_terms_are_part_of_the_loss(words, name):
    """The release computes them and leaves them out."""
    images, labels = thin.images(2), thin.bands(0, 4, 5, 255)
    values, trainer = train(thin.Step(f"{FEATURES_ALONE} {words}"), images, labels)
    assert name in trainer.balancer.names
    assert values[name] > 0
    terms = {term: value for term, value in values.items() if term != "loss"}
    assert values["loss"] == pytest.approx(sum(terms.values()), rel=1e-5)  # λ is 1 in the first iteration


def test_the_schedule_of_distillation_scales_it():
    """The release computes the factor of --kd_scheduling and does not use it."""
    images, labels = thin.images(2, dtype=torch.float64), thin.bands(0, 4, 5, 255)
    plain, scheduled = (
        thin.Step(f"--method LSKD {words}", dtype=torch.float64).terms(images, labels)["kd"]
        for words in ("", "--kd_scheduling")
    )
    torch.testing.assert_close(scheduled, (6 / 2) ** 0.5 * plain)


def test_a_regulariser_adds_its_gradient():
    """The release computes the penalty and does not add its gradient."""
    gradients = []
    for words in ("", "--regularizer ewc --reg_importance 7 --reg_no_normalize"):
        step = thin.Step(f"--method LSKD {words}", dtype=torch.float64)
        weights = {name: torch.ones_like(value) for name, value in step.teacher.named_parameters()}
        state = {"model_state": step.teacher.state_dict(), "trainer_state": {"regularizer": {"fisher": weights}}}
        step.method.attach(step.model, step.teacher, state)
        name, parameter = "head.red_conv.weight", step.model.head.red_conv.weight
        moved = parameter.detach() - state["model_state"][name]
        step.begin(thin.images(2, dtype=torch.float64), thin.bands(0, 4, 5, 255))
        step.trainer().train_iteration(thin.images(2, dtype=torch.float64), thin.bands(0, 4, 5, 255))
        gradients.append(parameter.grad)
    torch.testing.assert_close(gradients[1] - gradients[0], 2 * 7 * moved)


# ------------------------------------------------------------------------------ λ


def test_weights_move_by_sgd_with_weight_decay():
    step = thin.Step("--method LSKD --lr 0.25 --weight_decay 0.01", dtype=torch.float64)
    _, trainer = train(step, thin.images(2, dtype=torch.float64), thin.bands(0, 4, 5, 255))
    gradient = trainer.balancer.weights.grad
    # Nesterov's first step: gradient + momentum · gradient
    expected = 1 - 0.25 * 1.9 * (gradient + 0.01)
    torch.testing.assert_close(trainer.balancer.weights.detach(), expected.detach())
    assert gradient.abs().max() > 0


def test_weights_enter_the_loss_and_its_measurement():
    images, labels = thin.images(2), thin.bands(0, 4, 5, 255)
    weights = torch.linspace(0.5, 1.5, 9)
    values, trainer = {}, None
    for inherited in (False, True):
        step = thin.Step("--method LSKD")
        step.begin(images, labels)
        trainer = step.trainer()
        if inherited:
            trainer.balancer.inherit(dict(zip(trainer.balancer.names, weights)))
        values[not inherited] = trainer.train_iteration(images, labels)
    expected = sum(float(w) * values[True][name] for w, name in zip(weights, trainer.balancer.names))
    assert values[False]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("words", ["--freeze", "--fix_bn", "--regularizer ewc"])
def test_goes_together_with(words):
    values, trainer = train(thin.Step(f"--method LSKD {words}"), thin.images(2), thin.bands(0, 4, 5, 255))
    if words == "--fix_bn":
        trainer.network.fix_bn()
        values = trainer.train_iteration(thin.images(2), thin.bands(0, 4, 5, 255))
    assert trainer.balancer.weights.isfinite().all()
    assert len(values) >= 10


# --------------------------------------------------------------------------- edges

OLD, NEW = (0, 0, 255), (4, 5)


@pytest.mark.parametrize("name", ["LSKD", "PLOP", "MiB"])
@pytest.mark.parametrize(
    ("labels", "images"),
    [
        (thin.bands(*OLD), thin.images(2)),  # no pixel new
        (thin.bands(*NEW), thin.images(2)),  # every pixel new
        (thin.bands(255), thin.images(2)),  # nothing labelled
        (thin.bands(4), thin.images(2)),  # one class
        (thin.bands(0, 4, 5, 255, count=1), thin.images(1)),  # batch of one
        (thin.bands(255, count=1), thin.images(1)),
        (torch.cat([thin.bands(*OLD, count=1), thin.bands(*NEW, count=1)]), thin.images(2)),
        (thin.bands(0, 4, 5, 255), torch.zeros(2, 3, 32, 32)),  # black pictures: the views do not differ
        (thin.bands(0, 4, 5, 255, size=64), thin.images(2, 64)),  # taps of 16 to 4
        (thin.bands(0, 4, 5, size=17), thin.images(2, 17)),  # taps of 5 to 2
    ],
)
def test_finite_at_the_edges(labels, images, name):
    terms = assert_finite(thin.Step(f"--method {name}"), images, labels)
    assert set(terms) >= {"ce"}


@pytest.mark.parametrize("name", ["LSKD", "PLOP", "MiB"])
def test_one_class_added_to_one(name):
    step = thin.Step(f"--method {name} --mmm 1", steps=((0, 1), (2,)))
    assert_finite(step, thin.images(2), thin.bands(0, 2, 255))


@pytest.mark.parametrize("groups", [1, 20, 41, 42])  # 42 channels: 2 and 1 are dropped, or none
def test_any_number_of_groups(groups):
    step = thin.Step(f"--method LSKD --mmm {groups}")
    assert assert_finite(step, thin.images(2), thin.bands(0, 4, 5, 255))["mcd"] > 0


def test_the_balance_can_be_left_out():
    """--balance sum: the same terms, all of weight one, and no λ in the checkpoint."""
    images, labels = thin.images(2), thin.bands(0, 3, 4, 255)
    (plain, balanced), (summed, trainer) = (
        train(thin.Step(f"--method LSKD {words}", steps=((0, 1, 2), (3, 4))), images, labels)
        for words in ("", "--balance sum")
    )
    assert summed == pytest.approx(plain, rel=1e-6)  # in the first iteration λ is one
    assert summed["loss"] == pytest.approx(sum(value for name, value in summed.items() if name != "loss"), rel=1e-6)
    assert set(balanced.balancer.loss_weights) == set(plain) - {"loss"} and trainer.balancer.loss_weights == {}


def test_the_mended_channel_rule_is_an_option():
    """It changes the masked terms of taps with channels, and no other."""
    images, labels = thin.images(2), thin.bands(0, 4, 5, 255)
    released, mended = (
        thin.Step(f"--method LSKD --channel_rule {rule}").terms(images, labels) for rule in ("released", "mended")
    )
    changed = {name for name in released if not torch.equal(released[name], mended[name])}
    assert {"md/stage3", "md/stage4"} <= changed <= {"mcd", "md/stage3", "md/stage4", "md/pre_logits"}


@pytest.mark.parametrize("median", ["released", "exact"])
def test_thresholds_of_a_step_without_background(median):
    """Classes that are never predicted have median 0, and the threshold is then --threshold."""
    step = thin.Step(f"--method LSKD --median {median}")
    step.begin(thin.images(2), thin.bands(4, 5))
    (thresholds,) = [part.thresholds for part in step.method.parts if getattr(part, "thresholds", None) is not None]
    assert thresholds.tolist() == [0.001] * 6


def test_teacher_equal_to_student_has_finite_gradients():
    """All distances of features are 0, where the norm has no derivative."""
    step = thin.Step("--method LSKD --pod_factor 1")
    step.model.eval()
    teacher = thin.network(step.opts, [3, 1])
    teacher.load_state_dict({n: v for n, v in step.model.state_dict().items() if not n.startswith("cls.2")})
    step.teacher = teacher.eval().requires_grad_(False)
    nn.init.zeros_(step.model.cls[2].weight)
    nn.init.zeros_(step.model.cls[2].bias)
    terms = assert_finite(step, thin.images(2), thin.bands(0, 4, 5, 255))
    assert all(terms[name] == 0 for name in terms if "/" in name or name == "mcd")


def test_a_long_run_of_such_batches_stays_finite():
    """Terms come and go: every epoch ends with its λ rescaled and finite."""
    step = thin.Step("--method LSKD --lr 0.05")
    kinds = [thin.bands(255), thin.bands(*NEW), thin.bands(*OLD), thin.bands(0, 4, 5, 255)]
    step.begin(thin.images(2), kinds[3])
    trainer = step.trainer()
    for epoch in range(3):
        values = trainer.train_epoch(
            FixedBatches([(thin.images(2, seed=seed), labels) for seed, labels in enumerate(kinds)])
        )
        assert len(values) == 10, epoch
        assert trainer.balancer.weights.isfinite().all()
        assert float(trainer.balancer.weights.sum().detach()) == pytest.approx(9)
        assert {f"lambda/{name}" for name, *_ in OFFICIAL} <= set(trainer.history[-1]["balance"])


def test_preset_is_plops_and_more():
    assert LSKD.preset.items() >= thin.methods.METHODS["PLOP"].preset.items()
