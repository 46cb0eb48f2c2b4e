"""methods/: every method through the real command line, all steps, with one process and with two; presets and what is said of them."""

import contextlib
import math
import os
import socket
from argparse import Namespace

import pytest
import torch

import methods
import run
from dataset.tasks import Task
from methods.ft import Classification
from tests.support import thin
from tests.support.loss_flags import OLD, PSEUDO, Scene
from train import Trainer
from utils import loss, pseudo
from utils.checkpointing.store import read
from utils.options import flags
from utils.types import Batch

TASK = {"Joint": "--task offline --step 0"}
EVERY_STEP = "--task 6-2 --step 0 1 2"
#: Command lines by name, and the loss terms that each has at step 0 and from step 1 on.
TERMS = {
    "FT": ("ce", "ce"),
    "Joint": ("ce", None),
    "LWF": ("ce", "ce kd"),
    "LWF-MC": ("ce", "ce icarl"),
    "LWF-MC --icarl_disjoint": ("ce", "icarl"),
    "ILT": ("ce", "ce kd body"),
    "EWC": ("ce", "ce regularizer"),
    "RW": ("ce", "ce regularizer"),
    "PI": ("ce", "ce regularizer"),
    "MiB": ("ce", "ce kd"),
    "PLOP": ("ce", "ce pod"),
    "REMINDER": ("ce", "ce csw pod"),
    "ALIFE": ("ce", "ce ali kd"),
    "ALIFE-M --alife_memory 3 --alife_rotation_epochs 1": ("ce", "ce ali kd"),
    "RCIL": ("ce", "ce kd pcd/spatial pcd/channel"),
    "UCD": ("ce", "ce kd contrastive"),
    "SDR": ("ce sparsity", "ce kd attraction repulsion matching sparsity"),
    "LSKD": ("ce", "ce mcd kd pod/stage1 pod/stage2 md/stage3 md/stage4 md/pre_logits md/logits"),
    "MiB+AWT": ("ce", "ce kd"),
    "MiB+EWF": ("ce", "ce kd"),
    "PLOP+EWF": ("ce", "ce pod"),
    "LSKD+EWF": ("ce", "ce mcd kd pod/stage1 pod/stage2 md/stage3 md/stage4 md/pre_logits md/logits"),
    "MiB+NeST": ("ce", "ce kd"),
    "PLOP+NeST": ("ce", "ce pod"),
    "LSKD+NeST": ("ce", "ce mcd kd pod/stage1 pod/stage2 md/stage3 md/stage4 md/pre_logits md/logits"),
}
#: Methods whose step 0 serves no other: all classes at once, or other layers.
OWN_STEP_0 = ("Joint", "RCIL")
REGULARISED = {"EWC": ["fisher"], "RW": ["fisher", "score"], "PI": ["score"]}


pytestmark = pytest.mark.usefixtures("small")


def declared(terms):
    """`Method.terms`, which also holds that the parts declare exactly the terms that they yield."""

    def checked(method, batch):
        found = terms(method, batch)
        assert set(found) == {spec.name for part in method.parts for spec in part.term_specs()}
        return found

    return checked


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """method -> the folder in which all its steps were run, once."""
    folders = {}

    def run_once(method):
        if method not in folders:
            folder = tmp_path_factory.mktemp("run")
            words = f"{TASK.get(method, EVERY_STEP)} --method {method}"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(methods.Method, "terms", declared(methods.Method.terms))
                assert thin.launch(folder, words) == 0
            folders[method] = folder
        return folders[method]

    return run_once


# ------------------------------------------------------------------- all the steps


def test_every_method_is_run():
    assert {name.split()[0] for name in TERMS} == set(methods.METHODS)


@pytest.mark.parametrize("method", TERMS)
def test_all_steps_of_a_method(method, finished):
    folder = finished(method)
    steps = 1 if method == "Joint" else 3
    rows = thin.rows(folder)
    assert [row[0] for row in rows] == [str(step) for step in range(steps)]
    for step, row in enumerate(rows):
        known = 11 if method == "Joint" else 7 + 2 * step
        assert len(row) == 1 + 11 + 1
        assert row[1 + known : -1] == ["x"] * (11 - known)
        assert 0 <= float(row[-1]) <= 1
    for step, entry in thin.document(folder)["steps"].items():
        ((losses, _),) = [(epoch["losses"], epoch["balance"]) for epoch in entry["epochs"] if "phase" not in epoch]
        assert set(losses) == {*TERMS[method][step != "0"].split(), "loss"}
        assert all(math.isfinite(value) for value in losses.values())


def test_classifiers_of_all_steps_are_in_the_last_checkpoint(finished):
    state = read(thin.checkpoint(finished("LSKD"), 2))["model_state"]
    assert [state[f"cls.{step}.weight"].shape[0] for step in range(3)] == [7, 2, 2]


@pytest.mark.parametrize("method", [name for name in TERMS if name not in OWN_STEP_0])
def test_step_0_of_any_method_serves_lskd(method, finished, tmp_path):
    words = f"--task 6-2 --step 1 --method LSKD --step_ckpt '{thin.checkpoint(finished(method), 0)}'"
    assert thin.launch(tmp_path, words) == 0
    losses = thin.document(tmp_path)["steps"]["1"]["epochs"][0]["losses"]
    assert set(losses) == {*TERMS["LSKD"][1].split(), "loss"}


def test_weights_of_the_terms_go_from_step_to_step(finished, tmp_path, monkeypatch):
    """λ of step 1's checkpoint is where step 2 starts; a step of another method hands it on."""
    folder = finished("LSKD")
    first = read(thin.checkpoint(folder, 1))["loss_weights"]
    values = torch.stack(list(first.values()))
    assert values.shape == (9,) and float(values.sum()) == pytest.approx(9) and len(values.unique()) > 1
    started = []
    train = run.StepRun._train

    def remember(step, trainer, *args):
        started.append(trainer.balancer.loss_weights)
        train(step, trainer, *args)

    monkeypatch.setattr(run.StepRun, "_train", remember)
    for method in ("LSKD", "FT"):
        words = f"--task 6-2 --step 2 --method {method} --step_ckpt '{thin.checkpoint(folder, 1)}' --name {method}"
        assert thin.launch(tmp_path, words) == 0
    assert started == [first, {}]
    assert read(tmp_path / "checkpoints" / "6-2-shapes_FT_2.pth")["loss_weights"] == first


# --------------------------------------------------------------------- regularisers


@pytest.mark.parametrize("method", REGULARISED)
def test_importance_is_carried_over_all_steps(method, finished):
    assert_carried(method, finished(method))


def assert_carried(method, folder):
    """Each checkpoint has the importance of all steps so far, that of the step's own classifier included."""
    states = [read(thin.checkpoint(folder, step)) for step in range(3)]
    for kind in REGULARISED[method]:
        for step in (1, 2):
            before, after = (states[i]["trainer_state"]["regularizer"][kind] for i in (step - 1, step))
            joined = {"module." + name for name in states[step]["model_state"] if name.startswith(f"cls.{step}.")}
            assert len(joined) == 2 and set(after) - set(before) == joined
            assert all((after[name] != 0).any() for name in joined)
            # one iteration takes α of the Fisher information away and adds a square; RW halves the score, PI keeps it
            iterations = states[step]["scheduler_state"]["last_epoch"]
            kept = {"fisher": 0.1**iterations, "score": 0.5 if method == "RW" else 1.0}[kind]
            for name, importance in before.items():
                assert importance.isfinite().all() and (after[name] >= 0.999 * kept * importance).all()
                assert (importance > 0).any()


def test_regulariser_after_a_step_without_says_so_and_works(finished, tmp_path, capsys):
    words = "--task 6-2 --method EWC --step"
    assert thin.launch(tmp_path, f"{words} 1 2 --step_ckpt '{thin.checkpoint(finished('FT'), 0)}'") == 0
    printed = capsys.readouterr().out
    assert printed.count("note: no fisher in the checkpoint of step 0") == 1
    assert "checkpoint of step 1:" not in printed
    steps = thin.document(tmp_path)["steps"]
    assert "regularizer" not in steps["1"]["epochs"][0]["losses"]
    assert "regularizer" in steps["2"]["epochs"][0]["losses"]
    assert thin.launch(tmp_path, f"{words} 1 --test") == 0
    assert "note: no fisher" not in capsys.readouterr().out  # a test has no penalty


# -------------------------------------------------------------------- two processes

#: By name, what two processes and one with twice the batch must both learn in step 1.
JOINED = {
    "joined": "--task 6-2 --method LSKD --norm_act iabn_sync --lr 0.001",
    "measured": "--task 6-2 --method EWC --norm_act iabn_sync --lr 0.001",
    "similar": "--task 6-2 --method REMINDER --norm_act iabn_sync --lr 0.001",
    "attributed": "--task 6-2 --method MiB+AWT --norm_act iabn_sync --lr 0.001 --crop_size 64",
    "fused": "--task 6-2 --method MiB+EWF --norm_act iabn_sync --lr 0.001",
    "latent": "--task 6-2 --method SDR --sdr_mend reshape --norm_act iabn_sync --lr 0.001",
    "tuned": "--task 6-2 --method MiB+NeST --norm_act iabn_sync --lr 0.001 --warm_epochs 2",
}
#: Methods whose parts are those of other commands.
COMPOSED = {"PLOP+EWF", "LSKD+EWF", "PLOP+NeST", "LSKD+NeST"}
#: What a method learns beside its weights.
KINDS = REGULARISED | {
    "PLOP": ["thresholds"],
    "LSKD": ["thresholds"],
    "REMINDER": ["thresholds", "prototypes"],
    "SDR": ["prototypes"],
    "ALIFE-M": ["memory"],
}
#: What the two processes run: every method, flags that touch the parameters besides the loss, and a run that one process repeats.
COMMANDS = {
    method: f"{TASK.get(method, EVERY_STEP)} --method {method}" for method in TERMS if method not in COMPOSED
} | {
    "fixed": f"{EVERY_STEP} --fix_bn",
    "modes": f"{EVERY_STEP} --nb_background_modes 3 --init_multimodal softmax_init",
    "aligned": f"{EVERY_STEP} --align_weight all --align_weight_frequency epoch",
    **{name: f"{words} --step 0 1" for name, words in JOINED.items()},
}


class Remembered(Trainer):
    """Keeps every trainer of the process."""

    made: list = []

    def __init__(self, *args):
        super().__init__(*args)
        if not self.opts.test:
            self.made.append(self)


def learned():
    """What the trainers of the process have learned, step by step."""
    found = []
    for trainer in Remembered.made:
        state = {f"model/{name}": p.detach() for name, p in trainer.network.named_parameters()}
        for part in trainer.method.parts:
            if getattr(part, "regularizer", None) is not None:
                for kind, values in part.regularizer.current.items():
                    state |= {f"{kind}/{name}": value for name, value in values.items()}
            if getattr(part, "thresholds", None) is not None:
                state["thresholds"] = part.thresholds
            if getattr(part, "vectors", None) is not None:
                state["memory"] = part.vectors
            if getattr(part, "prototypes", None) is not None:
                state["prototypes"] = part.prototypes
        if trainer.balancer.loss_weights:
            state["weights"] = torch.stack(list(trainer.balancer.loss_weights.values()))
        found.append({name: value.clone() for name, value in state.items()})
    Remembered.made.clear()
    return found


def process(rank, folder, ports):
    """One of two processes: all methods in turn, each joining and leaving a process group of its own."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    run.Trainer = Remembered
    found = {}
    with thin.program():
        for (name, words), port in zip(COMMANDS.items(), ports, strict=True):
            # A port of its own for each group: the store of the one before may still be there when the other process joins
            os.environ["MASTER_PORT"] = str(port)
            assert thin.launch(folder / name, f"--shapes_train 24 {words}") == 0
            found[name] = learned()
    torch.save(found, folder / f"{rank}.pt")


def free_ports(count):
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def assert_the_same(name, mine, theirs):
    """Two processes have learned the same, and what belongs to the method."""
    assert mine.keys() == theirs.keys()
    for key in mine:
        assert torch.equal(mine[key], theirs[key]), (name, key)
        assert mine[key].isfinite().all(), (name, key)
    kinds = {key.split("/")[0] for key in mine} - {"model", "weights"}
    measured = KINDS.get(JOINED.get(name, f"--method {name}").split("--method ")[1].split()[0], [])
    assert kinds == set(measured)


def test_two_processes_learn_the_same_and_balance_as_one(tmp_path, monkeypatch):
    """One test for all methods, because starting the processes takes longer than what they do."""
    torch.multiprocessing.spawn(process, (tmp_path, free_ports(len(COMMANDS))), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name in COMMANDS:
        steps = len(found[0][name])
        assert [row[0] for row in thin.rows(tmp_path / name)] == [str(step) for step in range(steps)], name
        assert steps == len(found[1][name]) == (1 if name == "Joint" else 2 if name in JOINED else 3)
        assert_the_same(name, found[0][name][-1], found[1][name][-1])
    for method in REGULARISED:
        assert_carried(method, tmp_path / method)

    monkeypatch.setattr(run, "Trainer", Remembered)
    for name, words in JOINED.items():
        base = f"--step 1 --step_ckpt '{thin.checkpoint(tmp_path / name, 0)}'"
        assert thin.launch(tmp_path / f"{name} alone", f"{words} {base} --shapes_train 24 --batch_size 4") == 0
        (one,), two = learned(), found[0][name][1]
        assert one.keys() == two.keys()
        for key in one:
            relative, absolute = (0, 1e-6) if key == "thresholds" else (1e-3, 1e-4)
            torch.testing.assert_close(two[key], one[key], rtol=relative, atol=absolute)
        if name == "joined":
            moved = (one["weights"] - 1).abs().max()
            assert moved > 0 and (two["weights"] - one["weights"]).abs().max() < 0.02 * moved
        else:
            for key in (key for key in one if key.startswith("fisher/")):
                assert (two[key] - one[key]).abs().max() < 0.01 * one[key].max(), key


# ------------------------------------------------------------------- what is printed


def test_list_of_methods_has_a_line_for_each(capsys):
    assert run.main(["--list_methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(methods.METHODS)
    for line, method in zip(lines, methods.METHODS.values()):
        assert line.startswith(method.name + " ") and method.paper in line and str(method.year) in line
        assert all(f"{dest}={value}" in line for dest, value in method.preset.items())
        assert line.endswith(f"; stores {method.stores}; step 0: {method.step0}")


def test_presets_are_printed_and_those_of_a_task_marked(tmp_path, capsys):
    words = f"--data_root '{tmp_path}' --method PLOP --dataset"
    assert thin.launch(tmp_path, f"{words} ade --task 100-5") == 2  # there is no ADE20K here
    printed = capsys.readouterr().out
    assert "--method PLOP: pod=local, pod_factor=0.001" in printed
    assert "note: --method PLOP on ade 100-5 has a preset of its own: pod_factor=0.001" in printed
    thin.launch(tmp_path, f"{words} voc --task 15-5")
    printed = capsys.readouterr().out
    assert "pod_factor=0.01" in printed and "preset of its own" not in printed


def test_flags_without_effect_are_said_once(tmp_path, capsys):
    words = "--num_classes 3 --code_directory x --fusion-mode max --yess 2 --pooling_without_zero"
    assert thin.launch(tmp_path, f"--task 6-2 --step 0 1 {words}") == 0
    printed = capsys.readouterr().out
    for flag, status in flags.FLAGS.items():
        assert printed.count(f"note: --{flag} has no effect in the official program either: ") == (status != flags.LIVE)


# ---------------------------------------------------------------------- by hand


def test_soft_pseudo_labels_can_be_mended():
    words = f"{PSEUDO} --pseudo_soft soft_certain --pseudo_soft_factor 0.5 --soft_loss"
    scene, released = Scene(f"{words} mended"), Scene(f"{words} released")
    hard = loss.cross_entropy(scene.S, scene.truth)
    soft = -0.5 * (scene.T.softmax(1) * scene.S[:, :OLD].log_softmax(1)).sum(1)
    torch.testing.assert_close(scene.terms["ce"], torch.where(scene.truth >= OLD, hard, soft).mean().detach())
    assert scene.terms["ce"] > 0 > released.terms["ce"]  # the released one falls without end


def test_exact_median_differs_from_the_released(monkeypatch):
    monkeypatch.setattr(thin, "SURE", 1)  # high entropies: in the first two bins the two agree
    images, labels = thin.images(4, 64), thin.bands(0, 0, 0, 4, count=4, size=64)
    found = {}
    for median in ("released", "exact"):
        step = thin.Step(f"--method PLOP --median {median} --threshold 0")
        step.begin(images, labels)
        (part,) = (part for part in step.method.parts if part.state_key == "pseudo_labels")
        found[median] = part.thresholds
    logits = step.teacher(images).logits
    value, predicted = pseudo.measure_pixels(logits, "entropy", 6)
    for label in predicted[labels == 0].unique():
        true = value[(labels == 0) & (predicted == label)].median()
        assert abs(float(found["exact"][label]) - float(true)) < 0.01  # the width of a bin
    assert not torch.allclose(found["released"], found["exact"])


def test_thresholds_survive_a_resume():
    step = thin.Step("--method PLOP")
    step.begin(thin.images(2), thin.bands(0, 4))
    other = thin.Step("--method PLOP")
    other.method.load_state_dict(step.method.state_dict())
    images, labels = thin.images(2), thin.bands(0, 4, 255)
    assert torch.equal(other.batch(images, labels).labels, step.batch(images, labels).labels)


def test_teacher_is_not_asked_where_nobody_looks():
    step = thin.Step("--method EWC")
    assert step.batch(thin.images(2), thin.bands(0, 4)).teacher is None
    assert thin.Step("--method LWF").batch(thin.images(2), thin.bands(0, 4)).teacher is not None


@pytest.mark.parametrize("words", ["--unce", "--focal_loss_new --focal_loss_gamma 0", "--method MiB"])
def test_background_of_domains_hides_no_class(words):
    """All labels are known from the first city on: none of them counts as background."""
    opts = thin.options(words)
    task = Task("cityscapes_domain", "cities", 1, ((0,), (1,)), domain=True)
    method = methods.build(opts, task)
    logits = torch.randn(2, 19, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(19).repeat(7)[:128].view(2, 8, 8)
    (part,) = (part for part in method.parts if isinstance(part, Classification))
    value = part.terms(Batch(logits, labels, labels, student=Namespace(logits=logits)))["ce"]
    torch.testing.assert_close(value, loss.cross_entropy(logits, labels).mean())


@pytest.mark.parametrize(
    ("words", "criterion"), [("", loss.nca), ("--unce", lambda *args, **rest: loss.unbiased_nca(*args, OLD, **rest))]
)
def test_margin_of_nca_is_one_of_cosines(words, criterion):
    """The logits are cosines times the classifier's learnt scale, so the margin is scaled alike."""
    step = thin.Step(f"--cosine --nca --nca_margin 0.5 {words}")
    with torch.no_grad():
        step.model.cls.scalar.fill_(3.0)
    images, labels = thin.images(2), thin.bands(0, 1, 3, 4, 5, 255)
    batch = step.batch(images, labels)
    expected = criterion(batch.student.logits, labels, margin=1.5).mean()
    torch.testing.assert_close(step.method.terms(batch)["ce"], expected)


def test_icarl_classifies_by_sigmoids():
    scene = Scene("--icarl")
    torch.testing.assert_close(scene.terms["ce"], loss.binary_cross_entropy(scene.S, scene.y).mean().detach())


def test_adaptive_factor_is_for_entropy_alone():
    words = "--pseudo median --threshold 0.9"
    assert torch.equal(Scene(f"{words} --classif_adaptive_factor").terms["ce"], Scene(words).terms["ce"])


def test_balanced_initialisation_wins_over_that_from_modes():
    """Both at once would lower the background twice."""
    kinds = [
        {
            type(part).__name__
            for part in thin.Step(f"--nb_background_modes 3 --init_multimodal max {more}").method.parts
        }
        for more in ("", "--init_balanced")
    ]
    assert kinds[0] - kinds[1] == {"BackgroundModes"}
