"""Each live flag of the official command line changes what it should: a table from flags to checks, held complete by a test."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch

import dataset
import methods
import run
import segmentation_module
from dataset.sampler import FixedBatches
from dataset.step_data import StepData
from dataset.tasks import Task
from methods.regularizer import REGULARIZERS, normalised
from modules.classifier import CosineClassifier
from modules.norm import ABN, InPlaceABN
from tests.support import thin
from tests.support.loss_flags import ALL, LOSSES, OLD, PSEUDO, Scene
from tests.support.paths import ROOT
from train import Trainer
from utils import pseudo
from utils.checkpointing import checkpoint_files
from utils.checkpointing.store import Store
from utils.options import flags
from utils.reporting.logger import Logger

#: Flags → the function that checks them.
CHECKS = {}
#: Flag → where else it is shown.
ELSEWHERE = {
    "local_rank": "program/test_argparser.py::test_local_rank_in_both_spellings_and_from_the_environment",
    "data_root": "dataset/test_dataset.py::test_voc_layout",
    "dataset": "dataset/test_domain.py::test_steps_of_a_method",
    "debug": "program/test_refusals.py::test_debug_says_where",
    "backbone": "modules/test_backbones.py::test_the_network_has_no_branch_per_backbone",
    "opt_level": "utils/runtime/test_amp.py::test_levels",
    "pooling": "program/test_segmentation_module.py::test_pooling_in_evaluation_is_a_sliding_window",
    "reg_alpha": "methods/test_regularizer.py::test_fisher_is_a_moving_average_of_squared_gradients",
    "reg_iterations": "methods/test_regularizer.py::test_riemannian_score_by_hand",
}


pytestmark = pytest.mark.usefixtures("small")


def shows(*names):
    def register(check):
        CHECKS[names] = check
        return check

    return register


def test_every_live_flag_is_shown_once():
    shown = [*(name for names in CHECKS for name in names), *LOSSES, *ELSEWHERE]
    assert sorted(shown) == sorted(flag for flag, status in flags.FLAGS.items() if status == flags.LIVE)
    for place in ELSEWHERE.values():
        file, name = place.split("::")
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), place


@pytest.mark.parametrize("flag", LOSSES)
def test_flag_of_a_loss(flag):
    base, given, term, expected = LOSSES[flag]
    scene = Scene(f"{base} {given}")
    torch.testing.assert_close(scene.terms[term], expected(scene).detach(), rtol=1e-9, atol=1e-12)
    without = Scene(base).terms.get(term)
    assert without is None or abs(without - scene.terms[term]) > 1e-6 * abs(scene.terms[term])


# ------------------------------------------------------------------------ all others


def test_every_check_is_a_test():
    assert all(globals()[check.__name__] is check and check.__name__.startswith("test_") for check in CHECKS.values())


@shows("pseudo")
def test_pseudo():
    scene, unlabelled = Scene("--pseudo naive"), Scene("")
    old = scene.truth < OLD
    assert torch.equal(scene.y[old], scene.T.argmax(1)[old]) and torch.equal(scene.y[~old], scene.truth[~old])
    assert torch.equal(unlabelled.y, unlabelled.truth)


@shows("threshold", "step_threshold")
def test_thresholds():
    assert Scene("--pseudo entropy --threshold 0.9").thresholds.tolist() == [0.9] * ALL
    assert Scene(PSEUDO).thresholds.min() == 0.001
    # step 2: 0.001 + 2 · 0.25
    assert Scene(f"{PSEUDO} --step_threshold 0.25").thresholds.tolist() == [0.501] * ALL


@shows("pseudo_nb_bins")
def test_bins():
    counted = []
    for words in ("", "--pseudo_nb_bins 7"):
        made = pseudo.MedianThresholds.__init__

        def remember(medians, *args, made=made):
            made(medians, *args)
            counted.append(medians.num_bins)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pseudo.MedianThresholds, "__init__", remember)
            Scene(f"{PSEUDO} {words}")
    assert counted == [100, 7]


@shows("adaptivealpha", "adaptivebeta", "adaptivegamma")
def test_equilibrium():
    """Where they stand in the formula is test_equilibrium.py's matter."""
    step = thin.Step("--method LSKD --adaptivealpha 2 --adaptivebeta 3 --adaptivegamma 4")
    balancer = step.method.make_balancer(step.model)
    assert (balancer.alpha, balancer.beta, balancer.gamma) == (2, 3, 4)


@shows("regularizer", "reg_importance", "reg_no_normalize")
def test_regularizer():
    gradients = {}
    for words in ("", "--reg_importance 1", "--reg_importance 3", "--reg_importance 3 --reg_no_normalize"):
        step = thin.Step(f"--regularizer ewc {words}", steps=((0, 1, 2), (3,)), dtype=torch.float64)
        importance = {
            name: 1 + torch.arange(p.numel()).double().view(p.shape) for name, p in step.teacher.named_parameters()
        }
        state = {"model_state": step.teacher.state_dict(), "trainer_state": {"regularizer": {"fisher": importance}}}
        step.method.attach(step.model, None, state)
        for parameter in step.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        step.method.after_backward(step.model)
        name, parameter = "head.red_conv.weight", step.model.head.red_conv.weight
        moved = parameter.detach() - state["model_state"][name]
        weight = importance[name] if "normalize" in words else normalised(importance[name])
        gradients[words] = parameter.grad
        torch.testing.assert_close(parameter.grad, (6 if "3" in words else 2) * weight * moved)
    for name, kind in REGULARIZERS.items():
        step = thin.Step(f"--regularizer {name}")
        assert any(type(getattr(part, "regularizer", None)) is kind for part in step.method.parts)
    assert not any(hasattr(part, "regularizer") for part in thin.Step("").method.parts)


# ----------------------------------------------------------------------------- data


def splits(words, step=1):
    opts = thin.options(f"--shapes_train 60 --shapes_val 20 {words}")
    return dataset.build(opts, dataset.load_task(opts, step))


def values(data):
    return {int(value) for index in range(len(data)) for value in data[index][1].unique()}


@shows("overlap")
def test_overlap():
    disjoint = [word for word in thin.words(Path(), "--task 6-2 --shapes_train 60") if word != "--overlap"]
    opts = run.argparser.parse(disjoint)
    task = dataset.load_task(opts, 1)
    apart, overlapped = dataset.build(opts, task).train, splits("").train
    assert len(apart) < len(overlapped) and set(apart.indices) < set(overlapped.indices)


@shows("no_mask", "data_masking", "disable_background")
def test_masking():
    assert values(splits("").train) == {0, 7, 8, 255}
    assert values(splits("--data_masking new").train) == {0, 7, 8, 255}
    assert values(splits("--data_masking current+old").train) == {*range(9), 255}
    assert values(splits("--no_mask").train) == {*range(9), 255}
    assert values(splits("--disable_background").train) == {7, 8, 255}


@shows("val_on_trainset", "cross_val", "test_on_val", "ignore_test_bg")
def test_validation():
    usual, crossed = splits(""), splits("--cross_val")
    assert usual.val.source.title == usual.test.source.title == "split val of shapes"
    assert splits("--val_on_trainset").test.source.title == "split train of shapes"
    assert crossed.val.source.title == "split train of shapes"
    assert len(crossed.val) + len(crossed.train) == len(usual.train)
    assert not set(crossed.val.indices) & set(crossed.train.indices)
    shared = splits("--test_on_val")
    assert [len(part) for part in shared[::2]] == [
        int(0.8 * len(usual.train)),
        len(usual.test) - int(0.8 * len(usual.test)),
    ]
    assert set(shared.test.indices) < set(usual.test.indices)
    assert 0 in values(usual.test) and 0 not in values(splits("--ignore_test_bg").test)


@shows("crop_size", "crop_val", "batch_size", "num_workers", "task")
def test_loaders():
    def loaders(words):
        opts = run.argparser.parse(thin.words(Path(), f"--task 6-2 --shapes_train 40 {words}"))
        return StepData(opts, dataset.load_task(opts, 0), torch.device("cpu"))

    usual = loaders("")
    changed = loaders("--crop_size 48 --batch_size 5 --num_workers 1 --crop_val")
    assert [next(iter(data.batches))[0].shape[0] for data in (usual, changed)] == [2, 5]
    assert [data.batches.loader.num_workers for data in (usual, changed)] == [0, 1]
    assert [data.batches.data[0][0].shape[-1] for data in (usual, changed)] == [32, 48]
    assert [next(iter(data.test_loader))[0].shape[0] for data in (usual, changed)] == [
        2,
        1,
    ]  # full images come one by one
    assert type(usual.test_loader.data.transform) is not type(changed.test_loader.data.transform)
    assert len(loaders("--task 6-4").class_names) == 7


# --------------------------------------------------------------------- optimisation


@shows("lr", "lr_old", "momentum", "weight_decay")
def test_optimizer():
    words = "--lr 0.3 0.2 --lr_old 0.1 --momentum 0.5 --weight_decay 0.25"
    opts, steps = thin.options(words), ((0, 1), (2,), (3,))
    of_step = run.argparser.options_of_step
    assert [of_step(opts, Task("shapes", "t", i, steps)).lr_of_step for i in range(3)] == [0.3, 0.2, 0.2]
    step = thin.Step(words, steps)
    *others, old, new = step.trainer().optimizer.param_groups
    assert all((group["momentum"], group["weight_decay"]) == (0.5, 0.25) for group in (*others, old, new))
    assert all(group["initial_lr"] == 0.3 for group in (*others, new)) and old["initial_lr"] == pytest.approx(0.03)
    earlier = {id(p) for i in (0, 1) for p in step.model.cls[i].parameters()}
    assert {id(p) for p in old["params"]} == earlier
    assert {id(p) for p in new["params"]} == {id(p) for p in step.model.cls[2].parameters()}


@shows("lr_policy", "lr_decay_step", "lr_decay_factor", "lr_power")
def test_schedule():
    def rates(words):
        trainer = thin.Step(f"--lr 1 {words}").trainer()  # ten iterations
        found = []
        for _ in range(4):
            trainer.optimizer.step()
            trainer.scheduler.step()
            found.append(round(trainer.scheduler.get_last_lr()[0], 12))
        return found

    assert rates("") == pytest.approx([(1 - i / 10) ** 0.9 for i in (1, 2, 3, 4)])
    assert rates("--lr_power 2") == pytest.approx([0.81, 0.64, 0.49, 0.36])
    assert rates("--lr_policy step") == [1] * 4
    assert rates("--lr_policy step --lr_decay_step 2") == pytest.approx([1, 0.1, 0.1, 0.01])
    assert rates("--lr_policy step --lr_decay_step 3 --lr_decay_factor 0.5") == [1, 1, 0.5, 0.5]


@shows("freeze", "fix_bn")
def test_frozen():
    opts = thin.options("--freeze")
    student = segmentation_module.build_student(opts, dataset.load_task(opts, 0), {}, pretrained=False)
    assert not any(p.requires_grad for p in student.body.parameters())
    assert all(p.requires_grad for p in student.head.parameters())
    step = thin.Step("--fix_bn")
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    step.trainer().train_epoch(FixedBatches([(thin.images(2), thin.bands(0, 4))]))
    norms = {name for name, module in step.model.named_modules() if isinstance(module, ABN)}
    for name, value in step.model.state_dict().items():
        assert torch.equal(value, before[name]) == (name.rpartition(".")[0] in norms), name


@shows("epochs", "val_interval", "ckpt_interval")
def test_epochs(tmp_path, monkeypatch):
    saves = []
    monkeypatch.setattr(Store, "save_unfinished", lambda store, state: saves.append(state["position"][0]))
    assert thin.launch(tmp_path, "--task 6-2 --epochs 5 --val_interval 2 --ckpt_interval 3") == 0
    epochs = thin.document(tmp_path)["steps"]["0"]["epochs"]
    assert len(epochs) == 5 and saves == [3]
    assert ["validation_miou" in epoch for epoch in epochs] == [False, True, False, True, False]


# -------------------------------------------------------------------------- network


@shows("output_stride", "norm_act", "no_pretrained")
def test_network(monkeypatch):
    sizes = {}
    for stride in (8, 16):
        model = thin.network(thin.options(f"--output_stride {stride}"), [7])
        sizes[stride] = model(thin.images(2, 64)).pre_logits.shape[-1]
    assert sizes == {8: 8, 16: 4}
    norms = {name: type(thin.network(thin.options(f"--norm_act {name}"), [7]).head.red_bn) for name in ("abn", "iabn")}
    assert norms == {"abn": ABN, "iabn": InPlaceABN}
    loaded = []
    monkeypatch.setattr(segmentation_module, "load_backbone", lambda *args: loaded.append(args[1]))
    opts = thin.options("")
    segmentation_module.build_network(opts, [7], pretrained=True)
    assert loaded == []
    opts.no_pretrained = False
    segmentation_module.build_network(opts, [7], pretrained=True)
    assert loaded == ["resnet18"]


def student(words, step=1, previous=None):
    opts = thin.options(words)
    task = dataset.load_task(opts, step)
    classes = task.at(step - 1).classes_per_step
    state = thin.network(opts, classes, seed=5).state_dict() if previous is None else previous
    model = segmentation_module.build_student(opts, task, {"model_state": state}, pretrained=False)
    run.methods.build(opts, task).init_classifier(model, None, FixedBatches([]), torch.device("cpu"))
    return model


@shows("init_balanced")
def test_balanced():
    plain, balanced = student(""), student("--init_balanced")
    background = balanced.cls[0].weight[:1].expand(2, -1, -1, -1)
    assert torch.equal(balanced.cls[1].weight, background) and not torch.equal(plain.cls[1].weight, background)
    torch.testing.assert_close(balanced.cls[0].bias[0], plain.cls[0].bias[0] - math.log(3))


@shows("cosine", "nb_background_modes", "multimodal_fusion")
def test_classifiers():
    cosine = thin.network(thin.options("--cosine"), [7, 2]).cls
    assert all(isinstance(classifier, CosineClassifier) for classifier in cosine)
    features = thin.images(1, 6)[:, :1].expand(1, thin.FEATURES, 6, 6)
    fused = {}
    for fusion in ("sum", "mean"):
        words = f"--nb_background_modes 3 --multimodal_fusion {fusion}"
        classifiers = thin.network(thin.options(words), [7, 2]).cls
        assert [classifier.out_channels for classifier in classifiers] == [3, 6, 2]
        fused[fusion] = classifiers(features)[:, 0]
    torch.testing.assert_close(fused["sum"], 3 * fused["mean"])


@shows("init_multimodal")
def test_modes():
    step = thin.Step("--nb_background_modes 3 --init_multimodal max")
    with torch.no_grad():
        step.model.cls[0].bias.copy_(torch.tensor([-99.0, 99.0, -99.0]))
    batches = FixedBatches([(thin.images(2), thin.bands(0, 4, 5))])
    step.method.init_classifier(step.model, step.teacher, batches, torch.device("cpu"))
    assert torch.equal(step.model.cls[-1].weight, step.model.cls[0].weight[1:2].expand(2, -1, -1, -1))


@shows("align_weight", "align_weight_frequency")
def test_alignment():
    def ratio(words, hook):
        """Mean norm of the new weights over that of the rows that "old" and "background" name."""
        step = thin.Step(words)
        getattr(step.method, hook)(step.model)
        norms = [classifier.weight.flatten(1).norm(dim=1) for classifier in step.model.cls]
        old, background = (torch.cat([rows, norms[1]]).mean() for rows in (norms[0][1:], norms[0][:1]))
        return [round((norms[2].mean() / reference).item(), 5) for reference in (old, background)]

    untouched = ratio("", "end_validation")
    assert 1 not in untouched
    for reference, position in (("old", 0), ("background", 1)):
        words = f"--align_weight {reference} --align_weight_frequency"
        assert (
            ratio(f"{words} epoch", "end_validation")[position] == ratio(f"{words} task", "begin_test")[position] == 1
        )
        assert ratio(f"{words} task", "end_validation") == ratio(f"{words} epoch", "begin_test") == untouched


# ----------------------------------------------------------------------------- task


@shows("method")
def test_method():
    def terms(words):
        return set(Scene(words).terms)

    assert terms("--method FT") == {"ce"}
    assert terms("--method MiB") == {"ce", "kd"}
    assert terms("--method PLOP") == {"ce", "pod"}
    for name, kind in methods.METHODS.items():
        task = "--task offline" if name == "Joint" else ""
        assert type(methods.build(thin.options(f"--method {name} {task}"), Task("shapes", "t", 0, ((0, 1),)))) is kind


@shows("step", "name", "date", "checkpoint", "logdir", "print_interval", "visualize", "sample_num", "test")
def test_outputs(tmp_path, monkeypatch):
    scalars, pictures = [], []
    monkeypatch.setattr(Logger, "scalars", lambda log, values, iteration: scalars.append(set(values)))
    monkeypatch.setattr(Logger, "image", lambda log, name, *rest: pictures.append(name))
    words = (
        f"--task 6-2 --name mine --date day --checkpoint '{tmp_path}/kept' --logdir '{tmp_path}/log' --print_interval 2"
    )
    assert thin.launch(tmp_path, f"{words} --step 0") == 0  # six iterations: the first and every second
    assert sum("loss/total" in names for names in scalars) == 4
    assert thin.launch(tmp_path, f"{words} --step 1 --print_interval 1 --shapes_train 24") == 0
    assert sum("loss/total" in names for names in scalars) == 4 + 5
    assert pictures == []
    assert sorted(path.name for path in (tmp_path / "kept").glob("*.pth")) == [
        f"6-2-shapes_mine_{i}.pth" for i in (0, 1)
    ]
    assert (tmp_path / "results" / "day_shapes_6-2_mine.csv").is_file()
    assert (tmp_path / "log" / "6-2-shapes" / "mine" / "step-0").is_dir()
    assert [row[0] for row in thin.rows(tmp_path)] == ["0", "1"]

    monkeypatch.setattr(Trainer, "fit", lambda *args: pytest.fail("--test trains nothing"))
    words += " --step 0 --sample_num 2 --pictures 3 --test"
    shown = [word for word in thin.words(tmp_path, words) if word != "--visualize"]
    assert run.main(shown) == 0
    assert pictures == ["test/confusion", "test/sample0", "test/sample1", *(f"test/picture{i}" for i in range(3))]


@shows("random_seed")
def test_seed(tmp_path):
    found = []
    for number, seed in enumerate((1, 1, 2)):
        assert thin.launch(tmp_path / str(number), f"--task 6-2 --random_seed {seed}") == 0
        found.append(json.dumps(thin.document(tmp_path / str(number))["steps"]["0"]["epochs"]))
    assert found[0] == found[1] != found[2]


@shows("step_ckpt", "ckpt", "base_weights", "strict_weights")
def test_weights(tmp_path):
    def saved(name, classes, seed):
        state = thin.network(thin.options(), classes, seed=seed).state_dict()
        checkpoint_files.save(tmp_path / name, {"model_state": checkpoint_files.with_prefix(state)})
        return state

    previous = saved("6-1-shapes_n_1.pth", [7, 1], 2)
    own = saved("own.pth", [7, 1, 1], 3)
    task = f"--task 6-1 --checkpoint '{tmp_path}'"
    built = partial(student, step=2, previous=previous)
    name = "body.mod1.conv1.weight"
    assert torch.equal(built(task).state_dict()[name], previous[name])
    opts = thin.options(f"{task} --base_weights --test")
    tested = segmentation_module.build_student(opts, dataset.load_task(opts, 2), {}, pretrained=False)
    assert [classifier.out_channels for classifier in tested.cls] == [7]
    assert torch.equal(built(f"{task} --ckpt '{tmp_path}/own.pth'").state_dict()[name], own[name])

    opts = thin.options(f"{task} --step 2 --step_ckpt '{tmp_path}/own.pth'")
    assert Store(opts, dataset.load_task(opts, 2)).previous() == tmp_path / "own.pth"
    assert Store(thin.options(task), dataset.load_task(opts, 2)).previous() == tmp_path / "6-1-shapes_n_1.pth"

    incomplete = {key: value for key, value in previous.items() if key != name}
    with pytest.raises(ValueError, match=name):
        student(task, 2, incomplete)
    assert torch.equal(student(f"{task} --strict_weights", 2, incomplete).cls[1].weight, previous["cls.1.weight"])


@shows("dont_predict_bg")
def test_prediction():
    found = []
    for words in ("", "--dont_predict_bg"):
        step = thin.Step(words)
        with torch.no_grad():
            step.model.cls[0].bias[0] = 99.0
        found.append(step.trainer().predict(thin.images(2)))
    assert (found[0] == 0).all() and (found[1] > 0).all()
