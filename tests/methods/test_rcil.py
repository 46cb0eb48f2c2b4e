"""RCIL: the doubled network from step to step, what is frozen, the draws, the initialisation, and the merge for use."""

import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

import argparser
import methods
import run
from dataset.sampler import FixedBatches
from dataset.tasks import Task
from methods.rcil import PooledCubeDistillation, RepresentationCompensation, layers_of
from scripts import merge_branches, predict
from tests.support import interrupted, thin
from utils.checkpointing import checkpoint_files
from utils.checkpointing.store import read
from utils.pod import cube

TEXT = "--method RCIL --task 6-2 --lr 0.001 --pcd_factors 1e-4 1e-5 1e-4 1e-5"
OLD = ("conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var")


pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder in which steps 0 to 2 were run."""
    folder = tmp_path_factory.mktemp("rcil")
    with thin.program():
        assert thin.launch(folder, f"{TEXT} --step 0 1 2") == 0
    return folder


def part_of(step, kind=RepresentationCompensation):
    (found,) = (part for part in step.method.parts if type(part) is kind)
    return found


class Step(thin.Step):
    """A step whose networks have the doubled layers."""

    def __init__(self, text=TEXT, steps=((0, 1, 2), (3,)), **kwargs):
        super().__init__("--method FT", steps, **kwargs)
        self.opts = thin.options(text, self.task.step)
        self.method = methods.build(self.opts, self.task)
        for network in (self.model, self.teacher):
            if network is not None:
                self.method.wrap_model(network)
                network.to(self.dtype)
        self.method.attach(self.model, self.teacher)


# ------------------------------------------------------------------- from step to step


def test_step_0_has_no_biases_and_later_steps_have_those_of_the_merge(finished):
    states = [read(thin.checkpoint(finished, step))["model_state"] for step in range(3)]
    biases = {"body.mod2.block1.convs.conv1.bias", *(f"head.map_convs.{i}.bias" for i in range(4))}
    assert not biases & set(states[0]) and biases <= set(states[1]) and biases <= set(states[2])
    assert all(states[step][name].any() for step in (1, 2) for name in biases)


@pytest.mark.parametrize("step", [1, 2])
def test_the_old_branch_is_the_merge_of_the_step_before_and_stays_frozen(finished, step):
    before, after = (read(thin.checkpoint(finished, number))["model_state"] for number in (step - 1, step))
    expected = thin.network(thin.options(), [7, 2][:step])
    part = RepresentationCompensation(thin.options(TEXT, step), Task("shapes", "6-2", step, ((0,) * 7, (1, 2), (3, 4))))
    part.wrap_model(expected)
    expected.load_state_dict(before, strict=step > 1)
    for layer in layers_of(expected).values():
        layer.merge()
    for path in ("body.mod2.block1", "body.mod5.block1"):
        for name in OLD:
            mine = expected.state_dict()[f"{path}.convs.{name}"]
            torch.testing.assert_close(after[f"{path}.convs.{name}"], mine, rtol=1e-6, atol=1e-7)
        for name in ("conv1_new.weight", "bn1_new.weight", "bn1_new.running_mean"):
            mine, theirs = (state[f"{path}.convs.{name}"] for state in (before, after))
            assert not torch.equal(mine, theirs) and torch.allclose(mine, theirs, atol=0.5)  # trained on, not replaced
    assert torch.equal(after["head.map_bn.running_var"], torch.ones_like(after["head.map_bn.running_var"]))


def test_eps_of_merged_norms_is_0_in_training_and_that_of_a_loaded_network_in_the_test():
    step = Step()
    step.method.init_classifier(step.model, step.teacher, FixedBatches([]), torch.device("cpu"))
    norms = [layer.branch(new=False).norm for layer in layers_of(step.model).values()]
    assert {norm.eps for norm in norms} == {0.0}
    step.method.begin_test(step.model)
    assert {norm.eps for norm in norms} == {float(np.float32(1e-5))}


def test_a_second_test_finds_the_same_scores(finished, tmp_path):
    found = thin.document(finished)["steps"]["2"]
    words = f"{TEXT} --step 2 --test --ckpt '{thin.checkpoint(finished, 2)}'"
    assert thin.launch(tmp_path, words) == 0
    again = thin.document(tmp_path)["steps"]["2"]
    assert [again[key] for key in ("all", "old", "new")] == [found[key] for key in ("all", "old", "new")]


@pytest.mark.parametrize("at", [1, 3])
def test_a_resume_continues_to_the_bit(tmp_path, at):
    interrupted.assert_equal_to_the_bit(*interrupted.run_twice(tmp_path, f"{TEXT} --epochs 2", step=1, at=at))


def test_a_resume_of_step_0_continues_to_the_bit(finished, tmp_path):
    words = f"{TEXT} --step 0 --ckpt_minutes 0.000001"
    train, done = run.Trainer.train_iteration, []

    def count(*args):
        if len(done) == 2:
            raise interrupted.Killed
        done.append(args)
        return train(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Trainer, "train_iteration", count)
        with pytest.raises(interrupted.Killed):
            thin.launch(tmp_path, words)
    assert thin.launch(tmp_path, f"{words} --resume") == 0
    whole, parts = (checkpoint_files.load(thin.checkpoint(folder, 0)) for folder in (finished, tmp_path))
    interrupted.assert_equal_to_the_bit(whole, parts)


def test_a_trial_batch_changes_nothing(finished, tmp_path):
    assert thin.launch(tmp_path, f"{TEXT} --step 0 --trial_batch") == 0
    mine, theirs = (read(thin.checkpoint(folder, 0)) for folder in (tmp_path, finished))
    assert checkpoint_files.digest(mine["model_state"]) == checkpoint_files.digest(theirs["model_state"])


def test_half_precision(tmp_path):
    assert thin.launch(tmp_path, f"{TEXT} --step 0 1 --opt_level O1") == 0


# ----------------------------------------------------------------------- the mixture


def test_every_pass_draws_anew_and_every_layer_for_itself():
    step = Step()
    part, images, labels = part_of(step), thin.images(2), thin.bands(0, 3)
    shares = []
    for _ in range(2):
        step.batch(images, labels)
        part.after_step(step.model, None)
        shares.append([layer.share.clone() for layer in part.layers.values()])
    assert len(part.layers) == 5 and not torch.equal(shares[0][0], shares[1][0])
    assert not torch.equal(shares[0][0], shares[0][1])
    joined = torch.cat([share for found in shares for share in found])
    assert set(joined.unique().tolist()) == {0.0, 0.5, 1.0}


def test_draws_are_uniform_and_depend_on_seed_and_step():
    step = Step()
    part = part_of(step)
    values = []
    for part.passes in range(400):
        values.append(torch.cat(list(part.draws().values())))
    joined = torch.cat(values)
    assert float(joined.min()) >= 0 and float(joined.max()) < 1
    assert float((joined < 0.33).double().mean()) == pytest.approx(0.33, abs=0.01)
    other = part_of(Step(f"{TEXT} --random_seed 7"))
    later = part_of(Step(steps=((0, 1), (2,), (3,))))
    part.passes = 0
    for changed in (other, later):
        assert not torch.equal(changed.draws()["head"], part.draws()["head"])


def test_the_new_branch_starts_as_a_copy_of_pretrained_weights():
    for words, equal in (("", False), ("--pretrained torchvision", True)):
        opts = thin.options(TEXT)
        opts.no_pretrained = not words
        model = thin.network(thin.options(), [3])
        before = {name: value.clone() for name, value in model.body.state_dict().items()}
        RepresentationCompensation(opts, Task("shapes", "t", 0, ((0, 1, 2),))).wrap_model(model)
        after = model.body.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert (
            torch.equal(after["mod3.block1.convs.conv1_new.weight"], after["mod3.block1.convs.conv1.weight"]) == equal
        )
        assert torch.equal(after["mod3.block1.convs.bn1_new.weight"], after["mod3.block1.convs.bn1.weight"])


def test_the_stem_has_no_activation_unless_mended():
    x = thin.images(2)
    for version in ("released", "mended"):
        step = Step(f"{TEXT} --rcil_stem {version}")
        norm = step.model.body.mod1.bn1
        assert bool((norm(step.model.body.mod1.conv1(x)) < -0.5).any()) == (version == "released")


# ------------------------------------------------------------------ the classifier


def initialised(text, steps=((0, 1, 2), (3, 4)), domain=False):
    step = Step(text, steps)
    if domain:
        part_of(step).task = Task("shapes", "d", 1, ((1,), (2,)), domain=True)
    before = [(c.weight.clone(), c.bias.clone()) for c in step.model.cls]
    part_of(step).init_classifier(step.model, step.teacher, FixedBatches([]), torch.device("cpu"))
    return before, [(c.weight, c.bias) for c in step.model.cls]


def test_new_classifiers_take_the_weight_of_the_background_and_no_bias():
    (old, new), (old_after, new_after) = initialised(TEXT)
    assert torch.equal(new_after[0], old[0][:1].expand(2, -1, -1, -1)) and torch.equal(new_after[1], new[1])
    assert torch.equal(old_after[0], old[0]) and torch.equal(old_after[1], old[1])


def test_the_mended_start_is_that_of_mib():
    (old, _), (old_after, new_after) = initialised(f"{TEXT} --rcil_init mended")
    assert torch.equal(new_after[0], old[0][:1].expand(2, -1, -1, -1))
    lowered = old[1][0] - torch.tensor(3.0).log()
    torch.testing.assert_close(new_after[1], lowered.expand(2))
    torch.testing.assert_close(old_after[1][0], lowered)


def test_in_a_domain_all_rows_become_the_first_unless_mended():
    *_, (_, after) = initialised(TEXT, domain=True)
    assert torch.equal(after[0], after[0][:1].expand_as(after[0]))
    before, after = initialised(f"{TEXT} --rcil_init mended", domain=True)
    assert all(torch.equal(a, b) for pair in zip(before, after) for a, b in zip(*pair))


# -------------------------------------------------------------------------- the terms


def test_pooled_cubes_are_scheduled_and_take_activated_stages_and_folded_logits():
    step = Step(f"{TEXT} --pcd_factors 1 2 3 4", ((0, 1, 2), (3, 4)), dtype=torch.float64)
    images = thin.images(2, dtype=torch.float64)
    step.model.train()
    batch = step.batch(images, thin.bands(0, 3))
    terms = part_of(step, PooledCubeDistillation).terms(batch)
    a = [*batch.teacher.stages, batch.teacher.pre_logits, batch.teacher.logits_small]
    student = batch.student.logits_small
    folded = torch.cat([student[:, :1] + student[:, 3:].sum(1, keepdim=True), student[:, 1:3]], 1)
    b = [*batch.student.stages, batch.student.pre_logits, folded]
    growth = (5 / 2) ** 0.5
    torch.testing.assert_close(terms["pcd/spatial"], growth * cube.spatial(a, b, [1] * 5 + [2]))
    torch.testing.assert_close(terms["pcd/channel"], growth * cube.channel(a[:5], b[:5], [3] * 4 + [4]))


@pytest.mark.parametrize(
    ("words", "factors"),
    [
        ("--dataset voc --task 15-5s", [0.01, 0.0005, 0.01, 0.0005]),
        ("--dataset ade --task 100-10", [5e-6, 5e-7, 5e-6, 5e-7]),
        ("--dataset cityscapes_domain --task 11-5", [5e-4, 1e-4, 1e-4, 0.0]),
    ],
)
def test_factors_are_those_of_the_data_set(words, factors):
    opts = methods_options(f"--method RCIL {words}")
    assert (opts.pcd_factors, opts.loss_kd, opts.unce, opts.unkd) == (factors, 100.0, True, True)
    assert not opts.init_balanced and opts.pseudo is None and opts.pod is None


def methods_options(text):
    return argparser.parse(shlex.split(text))


# ------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--method RCIL --backbone mobilenet_v2", "--rcil_network doubled"),
        ("--method RCIL --rcil_network merged", "--rcil_network merged"),
        ("--method LSKD --rcil_network doubled", "--mask_rule"),
        ("--method RCIL --ewf", "--ewf"),
        ("--method RCIL --pcd_factors 1 1 -1 1", "--pcd_factors -1"),
    ],
)
def test_what_cannot_work_is_refused(words, said, tmp_path, capsys):
    assert thin.launch(tmp_path, f"--task 6-2 {words}") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


@pytest.mark.parametrize(("first", "second"), [("FT", "RCIL"), ("RCIL", "PLOP")])
def test_step_0_must_be_of_rcil_for_rcil_alone(first, second, tmp_path, capsys):
    assert thin.launch(tmp_path, f"--task 6-2 --method {first} --step 0 --shapes_train 2") == 0
    assert thin.launch(tmp_path, f"--task 6-2 --method {second} --step 1") == 2
    error = capsys.readouterr().err
    assert "was trained with --rcil_network" in error and error.count("\n") == 1


# --------------------------------------------------------------------- for use


def test_a_merged_checkpoint_predicts_and_tests_alike(finished, tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number in range(2):
        Image.fromarray(rng.integers(0, 256, (48, 40, 3), dtype=np.uint8)).save(tmp_path / "pictures" / f"{number}.png")
    merged = tmp_path / "new" / "merged.pth"
    assert merge_branches.main([str(thin.checkpoint(finished, 2)), str(merged)]) == 0
    doubled, plain = (predict.load(path)[0] for path in (thin.checkpoint(finished, 2), merged))
    assert layers_of(doubled) and not layers_of(plain)
    x = thin.images(2, 48)
    with torch.no_grad():
        torch.testing.assert_close(plain(x).logits, doubled(x).logits, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in plain.body.parameters()) < sum(p.numel() for p in doubled.body.parameters())
    for name, path in (("doubled", thin.checkpoint(finished, 2)), ("merged", merged)):
        assert (
            predict.main([str(path), str(tmp_path / "pictures"), "--out", str(tmp_path / name), "--device", "cpu"]) == 0
        )
    for number in range(2):
        masks = [np.array(Image.open(tmp_path / name / f"{number}.png")) for name in ("doubled", "merged")]
        assert (masks[0] == masks[1]).mean() > 0.999
    words = f"{TEXT} --step 2 --rcil_network merged --test --ckpt '{merged}'"
    assert thin.launch(tmp_path, words) == 0
    mine, theirs = (thin.document(folder)["steps"]["2"]["all"] for folder in (tmp_path, finished))
    assert mine == pytest.approx(theirs, abs=0.05)


def test_a_checkpoint_of_another_method_is_not_merged(tmp_path, capsys):
    assert thin.launch(tmp_path, "--task 6-2 --method FT --step 0 --shapes_train 2") == 0
    path = thin.checkpoint(tmp_path, 0)
    for target, said in ((tmp_path / "out.pth", "it does not have two branches"), (path, "is the checkpoint itself")):
        assert merge_branches.main([str(path), str(target)]) == 2
        assert said in capsys.readouterr().err


def test_a_dry_run_counts_the_doubled_convs(tmp_path, capsys):
    counts = []
    for method in ("FT", "RCIL"):
        assert thin.launch(tmp_path, f"--task 6-2 --method {method} --step 0 --dry_run") == 0
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
        counts.append(json.loads(line)["parameters"])
    assert counts[1] > counts[0]


def test_the_state_before_a_divergence_has_the_weights_alone(tmp_path):
    assert thin.launch(tmp_path, "--method RCIL --task 6-2 --step 0 --lr 1000 --epochs 8 --val_interval 9") == 3
    (aside,) = (tmp_path / "checkpoints").glob("*.nonfinite.pth")
    assert not any(name.endswith("share") for name in checkpoint_files.load(aside)["state"]["model"])
