"""ALIFE and ALIFE-M: the stages by hand, the memory from step to step, resumes, schedules and refusals."""

import shlex

import pytest
import torch

import argparser
from dataset.sampler import FixedBatches
from dataset.tasks import Task
from methods.alife import ClassifierReplay, FeatureReplay, Rotation, of_step
from modules.norm import ABN
from tests.support import interrupted, thin
from utils import alife, loss
from utils.checkpointing.store import read

TEXT = "--method ALIFE-M --task 6-2 --lr 0.001 --alife_memory 3 --alife_rotation_epochs 1"
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder in which steps 0 to 2 were run."""
    folder = tmp_path_factory.mktemp("alife")
    with thin.program():
        assert thin.launch(folder, f"{TEXT} --step 0 1 2") == 0
    return folder


def memory_of(folder, step):
    return read(thin.checkpoint(folder, step))["method_state"]["alife"]


def part_of(step, kind=FeatureReplay):
    return next(part for part in step.method.parts if type(part) is kind)


def remembering(words="", classes=4, size=3):
    """A step with an invented memory of its old classes."""
    step = thin.Step("--method ALIFE", ((0, 1, 2, 3), (4, 5)), dtype=torch.float64)
    step.opts = thin.options(f"--method ALIFE-M --alife_memory {size} {words}", 1)
    part = FeatureReplay(step.opts, step.task)
    generator = torch.Generator().manual_seed(4)
    part.vectors = torch.randn(classes, size, thin.FEATURES, generator=generator, dtype=torch.float64)
    part.found = torch.ones(classes, dtype=torch.bool)
    step.part = part
    return step


# -------------------------------------------------------------------------- stage 1


def test_the_terms_of_a_step_have_its_factors():
    words = "--method ALIFE --ali_factor 3 5 --ali_kd_factor 1 10"
    images, labels = thin.images(2, dtype=torch.float64), thin.bands(0, 3, 255)
    for steps, (ali, kd) in {((0, 1, 2), (3,)): (3, 1), ((0, 1), (2,), (3,)): (5, 10)}.items():
        step = thin.Step(words, steps, dtype=torch.float64)
        batch = step.batch(images, labels)
        terms = step.method.terms(batch)
        student, teacher = batch.student.logits, batch.teacher.logits
        assert set(terms) == {"ce", "ali", "kd"}
        torch.testing.assert_close(terms["ali"], ali * alife.adaptive_logit_regulariser(student, teacher, labels))
        torch.testing.assert_close(terms["kd"], kd * alife.foreground_distillation(student, teacher, labels))
        new = labels == 3
        picked = -student.log_softmax(1)[:, 3][new]
        torch.testing.assert_close(terms["ce"], picked.sum() / labels.numel())  # the background and 255 divide it too


def test_ignored_pixels_can_be_left_out():
    images, labels = thin.images(2, dtype=torch.float64), thin.bands(0, 3, 255)
    kd = []
    for version in ("released", "mended"):
        step = thin.Step(f"--method ALIFE --ali_ignored {version}", ((0, 1, 2), (3,)), dtype=torch.float64)
        kd.append(step.method.terms(step.batch(images, labels))["kd"])
    assert kd[0] != kd[1]


def test_the_last_factor_serves_all_further_steps():
    assert [of_step([3.0, 5.0], step) for step in (1, 2, 3, 9)] == [3, 5, 5, 5]


def test_all_norms_but_the_last_are_fixed_from_step_1_on():
    step = thin.Step("--method ALIFE", ((0, 1, 2), (3,)))
    trainer = step.trainer()
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    trainer.network.train()
    trainer.train_iteration(thin.images(2), thin.bands(0, 3))
    moved = {name for name, value in step.model.state_dict().items() if not torch.equal(value, before[name])}
    norms = {name for name, module in step.model.named_modules() if isinstance(module, ABN)}
    assert {norm for norm in norms if f"{norm}.weight" in moved or f"{norm}.running_mean" in moved} == {"head.red_bn"}
    assert {"body.mod2.block1.convs.conv1.weight", "cls.0.weight", "cls.1.weight"} <= moved
    start = thin.Step("--method ALIFE", ((0, 1, 2),))
    assert all(norm.training for norm in start.trainer().network.train().modules() if isinstance(norm, ABN))


# -------------------------------------------------------------------------- stage 2


def test_rotations_start_small_and_alike_on_all_processes():
    step = remembering()
    starts = []
    for _ in range(2):
        phase = Rotation(step.opts, step.task, step.part)
        phase.attach(step.model, step.teacher, CPU)
        torch.rand(3)  # torch's own generator plays no part
        phase.begin(FixedBatches([]))
        starts.append(phase.values.detach().clone())
    count = thin.FEATURES * (thin.FEATURES - 1) // 2
    assert starts[0].shape == (4, count) and torch.equal(*starts)
    assert 0.99 * count**-0.5 < starts[0].abs().max() <= count**-0.5


def test_the_rotation_learns_to_turn_representations_as_the_network_did():
    """The new network is the old one turned: after some iterations the remembered features point where its features are."""
    step = remembering("--alife_lambda 1")
    generator = torch.Generator().manual_seed(5)
    turn = alife.rotations(torch.randn(1, 861, generator=generator, dtype=torch.float64) * 0.1, thin.FEATURES)[0]
    phase = Rotation(step.opts, step.task, step.part)
    phase.attach(step.model, step.teacher, CPU)
    phase.begin(FixedBatches([]))
    step.model.load_state_dict(step.teacher.state_dict(), strict=False)
    step.model.eval()
    step.model.head.register_forward_hook(lambda head, inputs, out: torch.einsum("dk,bkhw->bdhw", turn, out))
    optimizer, images = phase.make_optimizer(), thin.images(4, 64, dtype=torch.float64)
    distances = []
    for _ in range(60):
        optimizer.zero_grad()
        terms = phase.terms(images, torch.zeros(4, 64, 64, dtype=torch.long))
        terms["cosine"].backward()
        optimizer.step()
        distances.append(terms["cosine"].item())
    assert distances[-1] < 0.01 * distances[0]
    before = step.part.vectors.clone()
    phase.end()
    expected = torch.stack([vectors @ turned.T for vectors, turned in zip(before, alife.rotations(phase.values, 42))])
    torch.testing.assert_close(step.part.vectors, expected.detach())
    torch.testing.assert_close(step.part.vectors.norm(dim=2), before.norm(dim=2))


# -------------------------------------------------------------------------- stage 3


def test_the_terms_of_the_replay_by_hand():
    step = remembering("--alife_replay_ali 2 --alife_replay_memory 7")
    phase = ClassifierReplay(step.opts, step.task, step.part)
    phase.attach(step.model.eval(), step.teacher, CPU)
    images, labels = thin.images(2, dtype=torch.float64), thin.bands(0, 4, 255)
    terms = phase.terms(images, labels)
    student, teacher = step.model(images).logits, step.teacher(images).logits
    relabelled = labels.clone()
    relabelled[labels == 0] = teacher.argmax(1)[labels == 0]
    torch.testing.assert_close(terms["ce"], loss.focal(student, relabelled).mean())
    torch.testing.assert_close(terms["ali"], 2 * alife.adaptive_logit_regulariser(student, teacher, labels))
    weight = torch.cat([classifier.weight.flatten(1) for classifier in step.model.cls])
    bias = torch.cat([classifier.bias for classifier in step.model.cls])
    log_p = (step.part.vectors @ weight.T + bias).log_softmax(2)  # (4, 3, 6)
    expected = -torch.stack([log_p[c, :, c] for c in range(4)]).mean()
    torch.testing.assert_close(terms["memory"], 7 * expected)
    step.part.found[1] = False
    expected = -torch.stack([log_p[c, :, c] for c in (0, 2, 3)]).mean()
    torch.testing.assert_close(phase.memory_loss(), expected)


def test_the_replay_trains_all_classifiers_and_nothing_else(finished, tmp_path):
    start = f"--step 1 --step_ckpt '{thin.checkpoint(finished, 0)}'"
    for name, words in (("without", "--alife_replay_epochs 0"), ("with", "")):
        assert thin.launch(tmp_path / name, f"{TEXT} {start} {words}") == 0
    before, after = (read(thin.checkpoint(tmp_path / name, 1))["model_state"] for name in ("without", "with"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"cls.{step}.{kind}" for step in (0, 1) for kind in ("weight", "bias")}


# ------------------------------------------------------------------------- the memory


def test_each_step_leaves_the_rotated_memory_and_its_own_classes(finished):
    first, second, last = (memory_of(finished, step) for step in range(3))
    assert first["vectors"].shape == (7, 3, thin.FEATURES) and second["vectors"].shape == (9, 3, thin.FEATURES)
    assert last["vectors"].shape == (9, 3, thin.FEATURES)  # no step follows
    assert all(state["vectors"].isfinite().all() for state in (first, second, last))
    for before, after in ((first, second), (second, last)):
        old = before["vectors"]
        turned = after["vectors"][: len(old)]
        assert not torch.equal(turned, old)
        torch.testing.assert_close(turned.norm(dim=2), old.norm(dim=2), rtol=1e-4, atol=1e-5)
    assert all(vector.any() for vector, found in zip(first["vectors"].flatten(1), first["found"]) if found)


def test_vectors_are_means_over_the_pixels_of_a_class():
    step = remembering(size=4)
    step.model.eval()
    images, labels = thin.images(2, dtype=torch.float64), thin.bands(4, 5)
    labels[1] = 5
    loader = FixedBatches([(images, labels)])
    with torch.no_grad():
        found = step.part.remember(step.model, loader, 4, loader.class_shares()[:, 4], CPU)
        features = step.model(images).pre_logits
    torch.testing.assert_close(found[0], alife.mean_feature(features[0], labels[0] == 4))
    assert len(found) == 4 and torch.equal(found[0], found[1])  # of the only image that shows the class


def test_a_class_with_few_pixels_is_remembered_from_them_and_an_absent_one_not_at_all():
    step = remembering(size=2)
    labels = torch.full((1, 32, 32), 4)
    labels[0, 0, 0] = 5  # a thousandth of the image
    loader = FixedBatches([(thin.images(1, dtype=torch.float64), labels)])
    shares = loader.class_shares()
    with torch.no_grad():
        assert len(step.part.remember(step.model.eval(), loader, 5, shares[:, 5], CPU)) == 2
        assert len(step.part.remember(step.model, loader, 3, shares[:, 3], CPU)) == 0
    step.part.task = Task("shapes", "t", 1, ((0, 1, 2, 3), (4, 5, 6), (7,)))
    step.part.end_step(step.model, loader, CPU)
    assert step.part.found.tolist() == [True] * 6 + [False]
    assert step.part.vectors.shape[0] == 7 and not step.part.vectors[6].any()


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_resume_continues_to_the_bit(tmp_path, at):
    """Killed in the training, in the rotation and in the replay."""
    interrupted.assert_equal_to_the_bit(*interrupted.run_twice(tmp_path, TEXT, step=1, at=at))


def test_half_precision(tmp_path):
    assert thin.launch(tmp_path, f"{TEXT} --step 0 1 --opt_level O1") == 0


# ---------------------------------------------------------------- schedules, refusals


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--dataset voc --task 19-1", ([1], [1], 0.95, [1], [1])),
        ("--dataset voc --task 15-5", ([2], [1], 0.95, [1], [10])),
        ("--dataset voc --task 15-5s", ([3, 5, 2, 3, 2], [1, 10, 1, 10, 1], 0.99, [3, 5, 2, 3, 1], [1, 20, 1, 2, 1])),
        ("--dataset ade --task 100-50", ([1], [1], 0.99, [0], [0.5])),
        ("--dataset ade --task 100-10", ([1], [1], 0.99, [5, 5, 2, 0, 0], [2, 1, 1, 0.1, 0.5])),
        ("--dataset ade --task 50", ([1], [20], 0.99, [0], [0.1, 0.5])),
        ("--dataset voc --task 10-1", ([1], [1], 0.99, [1], [1])),
    ],
)
def test_weights_are_those_of_the_task(words, expected):
    opts = argparser.parse(shlex.split(f"--method ALIFE-M {words}"))
    found = opts.ali_factor, opts.ali_kd_factor, opts.alife_lambda, opts.alife_replay_ali, opts.alife_replay_memory
    assert found == expected and opts.alife_memory == 1000
    alone = argparser.parse(shlex.split(f"--method ALIFE {words}"))
    assert (alone.ali_factor, alone.ali_kd_factor, alone.alife_memory) == (*expected[:2], 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--method ALIFE --unce", "--ali_factor"),
        ("--method ALIFE --loss_kd 1", "--ali_factor"),
        ("--method ALIFE --ali_factor 1 -1", "--ali_factor -1"),
        ("--method ALIFE-M --alife_lambda 2", "--alife_lambda 2"),
        ("--method ALIFE-M --alife_rotation_lr 0", "--alife_rotation_lr 0"),
    ],
)
def test_what_cannot_work_is_refused(words, said, tmp_path, capsys):
    assert thin.launch(tmp_path, f"--task 6-2 {words}") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_step_0_of_any_method_serves_alife_but_the_memory_needs_its_own(finished, tmp_path, capsys):
    assert thin.launch(tmp_path, "--task 6-2 --method FT --step 0 --shapes_train 2") == 0
    start = f"--task 6-2 --step 1 --step_ckpt '{thin.checkpoint(tmp_path, 0)}'"
    assert thin.launch(tmp_path / "plain", f"{start} --method ALIFE") == 0
    assert thin.launch(tmp_path / "memory", f"{start} --method ALIFE-M") == 2
    assert "train it again with --method ALIFE-M" in capsys.readouterr().err
    words = f"{TEXT} --step 1 --step_ckpt '{thin.checkpoint(finished, 0)}' --alife_memory 4"
    assert thin.launch(tmp_path / "other", words) == 2
    assert "are not 7 classes of 4 finite vectors" in capsys.readouterr().err
