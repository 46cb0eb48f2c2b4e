"""NeST: similarity, transformation and write-back by hand, the pre-tuning as a phase, combinations, and runs by the command line."""

import math

import pytest
import torch

from dataset.sampler import FixedBatches
from methods import nest
from methods.phase import PhaseRun
from modules.classifier import Classifiers
from tests.support import interrupted, thin
from tests.support.command_lines import parse, refusal
from utils import loss
from utils.checkpointing.store import read
from utils.reporting.context import Context
from utils.reporting.logger import Logger

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("small")


def checkpoint(folder, name):
    return folder / "checkpoints" / f"6-2-shapes_{name}.pth"


# ---------------------------------------------------------------------- by hand

OLD = torch.tensor([[1.0, 1.0], [-1.0, 0.0]])


def maps(*values):
    """(1, c, 4, 4) of one value a channel."""
    return torch.tensor(values)[None, :, None, None].expand(1, -1, 4, 4)


def test_similarity_by_hand():
    """Two images of the class, p = (3/4, 1/4) and f = (2, −1), then p = (1/2, 1/2) and f = (−2, 1/2): means of p where f · W > 0."""
    similarity = nest.Similarity(OLD, 1)
    similarity.update(maps(math.log(3), 0.0), maps(2.0, -1.0), torch.full((1, 8, 8), 2))
    similarity.update(maps(0.0, 0.0), maps(-2.0, 0.5), torch.full((1, 8, 8), 2))
    shares, mixture, seen = similarity.finish()
    torch.testing.assert_close(shares, torch.tensor([[[0.375, 0.25], [0.25, 0.0]]]))
    torch.testing.assert_close(mixture, torch.tensor([[0.625, 0.25]]).softmax(1))
    assert seen.tolist() == [True]


def test_only_positions_of_the_class_count():
    similarity = nest.Similarity(OLD, 1)
    logits = torch.zeros(1, 2, 128, 128)
    logits[:, 0, :64] = math.log(3)
    labels = torch.zeros(1, 128, 128, dtype=torch.long)
    labels[:, :64], labels[:, 100:] = 2, 255
    similarity.update(logits, maps(2.0, 1.0), labels)
    assert similarity.counts.tolist() == [64 * 128]
    torch.testing.assert_close(similarity.finish()[0], torch.tensor([[[0.75, 0.75], [0.0, 0.0]]]))


def test_a_class_without_a_position_takes_the_mean_of_the_others():
    """The release makes it NaN."""
    similarity = nest.Similarity(OLD, 3)
    similarity.update(maps(math.log(3), 0.0), maps(2.0, 1.0), torch.full((1, 8, 8), 2))
    similarity.update(maps(0.0, 0.0), maps(-2.0, 1.0), torch.full((1, 8, 8), 4))
    shares, mixture, seen = similarity.finish()
    assert seen.tolist() == [True, False, True]
    torch.testing.assert_close(shares[1], (shares[0] + shares[2]) / 2)
    torch.testing.assert_close(mixture[1], (mixture[0] + mixture[2]) / 2)
    shares, mixture, _ = nest.Similarity(OLD, 2).finish()
    assert (shares == 1).all() and (mixture == 0.5).all()


def transformation(shares, mixture, bias, background, scale):
    tuned = nest.Transformation(2, len(bias), 2)
    values = (torch.tensor(shares), torch.tensor(mixture), torch.tensor(bias))
    values += (torch.tensor([background]), torch.tensor([[scale]]))
    for parameter, value in zip(tuned.parameters(), values, strict=True):
        parameter.data.copy_(value)
    return tuned


def classifiers(weights, biases, new=1):
    cls = Classifiers(2, [2, new])
    cls[0].weight.data.copy_(torch.tensor(weights)[:, :, None, None])
    cls[0].bias.data.copy_(torch.tensor(biases))
    return cls


def test_logits_during_the_pre_tuning_by_hand():
    tuned = transformation([[[2.0, 1.0], [1.0, 3.0]]], [[1.0, -1.0]], [0.5], [1.0, 2.0], 3.0)
    cls = classifiers([[1.0, 2.0], [3.0, 4.0]], [10.0, 20.0])
    found = tuned(torch.tensor([1.0, 10.0]).view(1, 2, 1, 1), cls)
    # background 3·(1·1, 2·2) = (3, 12); new (1·2 − 3·1, 2·1 − 4·3) = (−1, −10)
    assert found.flatten().tolist() == [3 + 120 + 10, 3 + 40 + 20, -1 - 100 + 0.5]


def test_write_back_by_hand():
    tuned = transformation([[[1.0, 1.0], [1.0, 1.0]]], [[1.0, 0.0]], [2.0], [1.0, 0.0], -7.0)
    cls = classifiers([[3.0, 4.0], [0.0, 1.0]], [3.0, 4.0])
    tuned.write_back(cls)
    # the new weight (3, 4) has the norm 5, the old ones 5 and 1; the biases (3, 4) have the norm 5; the background is −21·(1, 0)
    torch.testing.assert_close(cls[1].weight.flatten(), torch.tensor([1.8, 2.4]))
    torch.testing.assert_close(cls[1].bias, torch.tensor([5.0]))
    torch.testing.assert_close(cls[0].weight.flatten(1), torch.tensor([[-5.0, 0.0], [0.0, 1.0]]))
    assert cls[0].bias.tolist() == [3.0, 4.0]


def test_the_vector_of_new_biases_takes_the_norm_of_that_of_the_old_ones():
    tuned = transformation([[[1.0, 1.0]] * 2] * 4, [[1.0, 0.0]] * 4, [-0.1] * 4, [1.0, 1.0], 1.0)
    cls = classifiers([[3.0, 4.0], [0.0, 1.0]], [3.0, 4.0], new=4)
    tuned.write_back(cls)
    torch.testing.assert_close(cls[1].bias, torch.full((4,), -2.5))


def test_a_transformation_that_became_zero_stays_finite():
    tuned = transformation([[[0.0, 0.0], [0.0, 0.0]]], [[0.0, 0.0]], [0.0], [0.0, 0.0], 0.0)
    cls = classifiers([[3.0, 4.0], [0.0, 1.0]], [0.0, 0.0])
    tuned.write_back(cls)
    assert all(parameter.isfinite().all() for parameter in cls.parameters())


# -------------------------------------------------------------------- the phase


def begun(words="", steps=((0, 1, 2), (3,), (4, 5))):
    """The step, its phase, and batches."""
    step = thin.Step(f"--method MiB+NeST --warm_epochs 2 {words}", steps)
    (phase,) = step.method.phases()
    phase.attach(step.model, step.teacher, CPU)
    loader = FixedBatches([(thin.images(2, seed=i), thin.bands(0, 1, 4, 5)) for i in range(2)])
    phase.begin(loader)
    return step, phase, loader


def test_the_bias_starts_from_one_number_that_the_seed_draws():
    found = [begun(f"--random_seed {seed}")[1].tuned.new_bias for seed in (1, 1, 2)]
    assert all(len(bias.unique()) == 1 and 0 < bias[0].abs() <= 1 / math.sqrt(thin.FEATURES) for bias in found)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_learning_rate_ends_with_zero():
    _, phase, _ = begun("--lr 0.01 --warm_lr_scale 3")
    (group,) = phase.make_optimizer().param_groups
    assert group["lr"] == pytest.approx(0.03) and group["momentum"] == 0.9 and group["weight_decay"] == 1e-4
    assert [phase.rate(j, 4) for j in range(4)] == pytest.approx([0.75**0.9, 0.5**0.9, 0.25**0.9, 0])


def test_only_the_transformation_learns_and_the_statistics_of_the_norms_move():
    step, phase, loader = begun()
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    start = phase.state_dict()
    run = PhaseRun(phase, Context(CPU, Logger(progress=False)), 2, [])
    run.begun = True
    written = []
    phase.end = lambda: written.append({name: value.clone() for name, value in step.model.state_dict().items()})
    run.run(loader, lambda: None, 0)
    moved = {name for name, value in written[0].items() if not torch.equal(value, before[name])}
    assert moved and all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in moved)
    assert all(not torch.equal(value, start[name]) for name, value in phase.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in step.model.parameters())


@pytest.mark.parametrize(
    ("words", "criterion"),
    [
        ("--method FT --warm_up --unce_in_warm", lambda x, y: loss.unbiased_cross_entropy(x, y, 4)),
        ("--method MiB --warm_up", lambda x, y: loss.unbiased_cross_entropy(x, y, 4)),
        ("--method FT --warm_up", loss.cross_entropy),
        ("--method FT --nest", lambda x, y: loss.unbiased_cross_entropy(x, y, 4)),
    ],
)
def test_criterion(words, criterion):
    step, phase, _ = begun(words)
    images, labels = thin.images(2), thin.bands(0, 4, 5, 255)
    found = phase.terms(images, labels)["ce"]
    step.model.eval()
    logits = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(0))
    small = labels[:, ::4, ::4]
    torch.testing.assert_close(phase.criterion(logits, small), criterion(logits, small))
    assert found.isfinite() and found.requires_grad


def test_a_state_of_another_shape_is_refused():
    _, phase, _ = begun()
    state = phase.state_dict() | {"new_bias": torch.zeros(5)}
    with pytest.raises(ValueError, match="new_bias of the interrupted run does not fit"):
        phase.load_state_dict(state)


def test_a_class_without_a_pixel_is_named(capsys):
    step = thin.Step("--method MiB+NeST")
    (phase,) = step.method.phases()
    phase.attach(step.model, step.teacher, CPU)
    phase.begin(FixedBatches([(thin.images(2), thin.bands(0, 4))]))
    assert "NeST found no pixel of the classes 5 of step 2" in capsys.readouterr().out
    assert all(value.isfinite().all() for value in phase.state_dict().values())


# ------------------------------------------------------------------ command line


def test_neither_balanced_initialisation_nor_anything_at_step_0():
    parts = {type(part).__name__ for part in thin.Step("--method MiB --warm_up --init_balanced").method.parts}
    assert "NewClassifierPreTuning" in parts and "BalancedInitialisation" not in parts
    assert not thin.Step("--method MiB+NeST", ((0, 1, 2),)).method.phases()


@pytest.mark.parametrize(
    ("method", "task", "expected"),
    [
        ("MiB", "voc --task 15-5s", (5, 1.0, False, 10.0)),
        ("PLOP", "voc --task 10-1", (5, 1.0, True, 0.0)),
        ("MiB", "ade --task 100-5", (15, 500.0, False, 10.0)),
        ("PLOP", "ade --task 100-5", (15, 500.0, False, 0.0)),
        ("PLOP", "ade --task 100-50", (5, 1.0, False, 0.0)),
    ],
)
def test_published_settings(method, task, expected):
    opts = parse(f"--method {method}+NeST --dataset {task}")
    assert (opts.warm_epochs, opts.warm_lr_scale, opts.fix_pre_cls, opts.loss_kd) == expected
    assert opts.nest and (method == "MiB" or opts.pod_factor == (0.001 if "ade" in task else 0.01))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--nest --init_awt", ["--nest (--warm_up)", "--init_awt (--att)", "exclude each other"]),
        ("--warm_up --cosine", ["--cosine", "exclude each other"]),
        ("--nest --nb_background_modes 3", ["--nb_background_modes 3", "exclude each other"]),
        ("--nest --warm_epochs 0", ["--warm_epochs 0"]),
        ("--nest --warm_lr_scale 0", ["--warm_lr_scale 0"]),
    ],
)
def test_refusals(words, parts):
    message = refusal(f"{words} --step 1")
    assert all(part in message for part in parts)


def test_an_option_of_the_release_that_no_script_sets_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse("--warm_up --unkd_in_warm")
    assert "--unkd_in_warm" in capsys.readouterr().err


def test_the_releases_factor_of_the_pod_term():
    images, labels = thin.images(2), thin.bands(0, 4, 5)
    plain, scaled = (thin.Step(f"--method PLOP+NeST {words}").terms(images, labels) for words in ("", "--pod_coef 2.5"))
    torch.testing.assert_close(scaled["pod"], 2.5 * plain["pod"])
    torch.testing.assert_close(scaled["ce"], plain["ce"])


def test_domains_have_no_new_classifier(tmp_path, capsys):
    words = f"--data_root '{tmp_path}' --dataset cityscapes_domain --task 11-5 --method MiB+NeST --step 1"
    assert thin.launch(tmp_path, words) == 2
    assert "--nest (of --method MiB+NeST) cannot work on cityscapes_domain" in capsys.readouterr().err


def test_what_the_training_starts_from(tmp_path, capsys):
    """With a learning rate of 0 in effect the checkpoint has what the write-back left."""
    words = "--task 6-2 --lr 0.01 1e-30 --momentum 0 --weight_decay 0 --shapes_train 30 --warm_epochs 2"
    assert thin.launch(tmp_path, f"{words} --method MiB+NeST --step 0 1") == 0
    assert "step 1 pre-tuning epoch 2/2: ce" in capsys.readouterr().out
    first, second = (read(checkpoint(tmp_path, name))["model_state"] for name in ("n_0", "n_1"))
    old, new = first["cls.0.weight"].flatten(1).norm(dim=1), second["cls.1.weight"].flatten(1).norm(dim=1)
    torch.testing.assert_close(new.mean(), old.mean())
    torch.testing.assert_close(second["cls.1.bias"].norm(), first["cls.0.bias"].norm())
    torch.testing.assert_close(second["cls.0.bias"], first["cls.0.bias"], rtol=0, atol=0)
    torch.testing.assert_close(second["cls.0.weight"], first["cls.0.weight"])
    assert not any("weight_old" in name for name in second)
    assert not torch.equal(second["body.mod1.bn1.running_mean"], first["body.mod1.bn1.running_mean"])
    entries = thin.document(tmp_path)["steps"]["1"]["epochs"]
    assert [(entry.get("phase"), entry["epoch"]) for entry in entries] == [
        ("pre-tuning", 0),
        ("pre-tuning", 1),
        (None, 0),
    ]


@pytest.mark.parametrize("words", ["--method MiB+NeST --ewf", "--method LSKD+NeST", "--method PLOP+NeST"])
def test_three_steps_with_other_methods(words, tmp_path):
    assert thin.launch(tmp_path, f"--task 6-2 {words} --warm_epochs 1 --step 0 1 2") == 0
    assert all(value.isfinite().all() for value in read(checkpoint(tmp_path, "n_2"))["model_state"].values())


@pytest.mark.parametrize("at", [1, 4, 7])
def test_a_resume_continues_to_the_bit(tmp_path, at):
    """Killed in the first and in the second epoch of the pre-tuning, and in the training."""
    words = "--task 6-2 --method MiB+NeST --warm_epochs 2 --shapes_train 16"
    interrupted.assert_equal_to_the_bit(*interrupted.run_twice(tmp_path, words, step=1, at=at))
