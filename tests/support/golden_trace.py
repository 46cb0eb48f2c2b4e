"""Replays a golden training trace: two epochs of step 1, through the program's own parser, method, balancer and trainer, in float64."""

from __future__ import annotations

import shlex
from argparse import Namespace
from collections.abc import Callable, Sequence
from itertools import accumulate
from zlib import crc32

import numpy as np
import torch
from torch import nn

import argparser
import methods
from dataset.sampler import FixedBatches
from dataset.tasks import Task
from modules.fold import fold_frozen
from segmentation_module import make_model
from tests.support.golden_compare import close_by_column, compare_output, log_figures
from train import Trainer
from utils.balance import equilibrium
from utils.checkpointing import checkpoint_files
from utils.reporting.context import Context
from utils.reporting.logger import Logger


def random_of(name: str) -> np.random.RandomState:
    """The generator that belongs to a name."""
    return np.random.RandomState(crc32(name.encode()) & 0x7FFFFFFF)


def fill(name: str, like: torch.Tensor) -> torch.Tensor:
    """The tensor that the golden programs put under this parameter or buffer name."""
    random, shape = random_of(name), tuple(like.shape)
    if name.endswith("running_mean"):
        value = 0.1 * random.randn(*shape)
    elif name.endswith("running_var"):
        value = 1 + 0.1 * random.rand(*shape)
    elif name.endswith("num_batches_tracked"):
        value = np.zeros(shape)
    elif name.endswith("lossweights"):
        value = np.ones(shape)
    elif len(shape) >= 2:
        value = random.randn(*shape) * np.sqrt(2 / np.prod(shape[1:]))
    elif name.endswith("weight"):
        value = 1 + 0.1 * random.randn(*shape)
    else:
        value = 0.1 * random.randn(*shape)
    return torch.as_tensor(np.asarray(value)).to(like.dtype)


def filled_model(
    opts: Namespace, classes: list[int], wrap: Callable[[nn.Module], None] = lambda model: None
) -> nn.Module:
    """A float64 network, its layers replaced by `wrap`, filled from the names of its parameters and buffers."""
    model = make_model(opts, classes)
    wrap(model)
    model = model.double()
    model.load_state_dict({name: fill(name, value) for name, value in model.state_dict().items()})
    return model


def importance(teacher: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """The step-0 importance of the golden runs of EWC, PI and RW."""
    return {
        kind: {n: fill_importance(kind, n, p) for n, p in teacher.named_parameters()} for kind in ("fisher", "score")
    }


def fill_importance(kind: str, name: str, like: torch.Tensor) -> torch.Tensor:
    """|randn| from the generator of "fisher:name" or "score:name"."""
    return torch.as_tensor(np.abs(random_of(f"{kind}:{name}").randn(*like.shape))).to(like.dtype)


class Recorder(Trainer):
    """A trainer that keeps the loss terms of every iteration, at a constant learning rate."""

    def __init__(self, *args):
        super().__init__(*args)
        self.recorded = []
        self.scheduler.get_lr = lambda: list(self.scheduler.base_lrs)

    def train_iteration(self, images, labels):
        """One iteration, its terms kept."""
        values = super().train_iteration(images, labels)
        self.recorded.append(values)
        return values


def relabel_in_place(method) -> None:
    """Write pseudo-labels back into the batch, as the official programs do.

    With a data loader nobody notices; the golden runs fed the same two tensors in both epochs, so their second epoch starts from
    the labels that the first one left.
    """
    prepare = method.prepare

    def prepare_and_write(images, labels, teacher):
        batch = prepare(images, labels.clone(), teacher)
        labels.copy_(batch.labels)
        return batch

    method.prepare = prepare_and_write


class Trace:
    """A golden training trace, replayed in the order of the official programs.

    A method whose runs have further inputs, outputs or steps has a subclass in tests/support/golden_methods/, which overrides what
    differs.

    Args:
        case: the arrays of the file.
        meta: its decoded meta.

    Attributes:
        opts: the case's flags, parsed by the program.
        task: the step of the case.
        method, model, teacher, loader, trainer: what `run` builds; teacher is the network as run.py trains with it.
        out: what the golden file calls out_*, filled by `run`.
    """

    def __init__(self, case: dict[str, np.ndarray], meta: dict):
        self.case, self.meta = case, meta
        self.opts = self.options()
        self.task = self.make_task()
        self.out: dict[str, np.ndarray] = {}

    def words(self) -> list[str]:
        """The command line: the case's flags, and what its meta says beside them."""
        meta = self.meta
        words = [*shlex.split(meta["flags"]), "--norm_act", meta["norm_act"], "--backbone", meta["backbone"]]
        words += ["--lr", str(meta["lr"]), "--momentum", str(meta["momentum"])]
        words += ["--weight_decay", str(meta["weight_decay"]), "--epochs", str(meta["epochs"])]
        words += ["--no_pretrained", "--step", str(meta.get("step", 1)), "--no_progress"]
        return [*words, "--dataset", "shapes", "--task", "offline"]

    def options(self) -> Namespace:
        """The options of the step, as run.py sees them."""
        opts = argparser.parse(self.words())
        opts.lr_of_step = self.meta["lr"]
        return opts

    def make_task(self) -> Task:
        """The step of the case: `meta["classes"]` new classes a step, or the old classes in one step and the new ones in another."""
        meta = self.meta
        counts = meta.get("classes", [meta["old_classes"], meta["new_classes"]])
        ends = list(accumulate(counts))
        steps = tuple(tuple(range(end - count, end)) for count, end in zip(counts, ends))
        return Task("golden", "golden", meta.get("step", 1), steps)

    def build_network(self, classes: Sequence[int]) -> nn.Module:
        """A float64 network filled from the names of its parameters and buffers."""
        return filled_model(self.opts, list(classes), self.method.wrap_model)

    def previous_checkpoint(self, teacher: nn.Module) -> dict:
        """What step t−1 left, for `Method.attach`."""
        if not self.meta["regularizer_state"]:
            return {"model_state": teacher.state_dict()}
        return {"model_state": teacher.state_dict(), "trainer_state": {"regularizer": importance(teacher)}}

    def batches(self) -> FixedBatches:
        """The batches of an epoch."""
        return FixedBatches(
            [
                (torch.as_tensor(self.case[f"in_images_{i}"]), torch.as_tensor(self.case[f"in_labels_{i}"]).long())
                for i in range(self.meta["batches_per_epoch"])
            ]
        )

    def run(self) -> None:
        """Train the case and fill `out`."""
        device = torch.device("cpu")
        self.method = methods.build(self.opts, self.task)
        classes = self.task.classes_per_step
        teacher = self.build_network(classes[:-1]).eval().requires_grad_(False)
        self.teacher = fold_frozen(teacher)  # what run.py trains with
        self.model = self.build_network(classes)
        self.method.attach(self.model, self.teacher, self.previous_checkpoint(teacher))
        self.loader = self.batches()
        self.method.init_classifier(self.model, self.teacher, self.loader, device)
        context = Context(device, Logger(progress=False))
        self.trainer = Recorder(
            self.opts, self.task, self.method, self.model, self.teacher, context, self.meta["batches_per_epoch"]
        )
        self.before_training()
        self.train()
        self.after_training()

    def before_training(self) -> None:
        """What the program does between the initialisation and the first iteration; fills the outputs of that moment."""
        self.out["out_probe_logits_before"] = self.probe_logits()
        self.method.begin_step(self.loader, self.teacher, torch.device("cpu"))

    def train(self) -> None:
        """The epochs of the case."""
        relabel_in_place(self.method)
        weights = []
        for _ in range(self.meta["epochs"]):
            self.trainer.train_epoch(self.loader)
            balance = self.trainer.history[-1]["balance"]
            weights.append([balance.get(f"lambda/{name}") for name in getattr(self.trainer.balancer, "names", ())])
        self.out["out_loss_weights"] = np.array(weights)

    def after_training(self) -> None:
        """Fill the outputs of the trained network."""
        self.out["out_probe_logits_after"] = self.probe_logits()
        if isinstance(self.trainer.balancer, equilibrium.GradientEquilibrium):
            self.out["out_initial_task_losses"] = self.trainer.balancer.initial_losses.numpy()
        thresholds = [part.thresholds for part in self.method.parts if getattr(part, "thresholds", None) is not None]
        if thresholds:
            self.out["out_thresholds"] = thresholds[0].numpy()

    @torch.no_grad()
    def probe_logits(self) -> np.ndarray:
        """Full-size logits of the student for `in_probe`, in evaluation mode."""
        network = self.trainer.network
        network.eval()
        logits = network(torch.as_tensor(self.case["in_probe"]).double()).logits.numpy()
        network.train()
        return logits

    def epoch_row(self, means: dict[str, float]) -> list[float]:
        """The golden columns of one epoch: the means of our terms under the official names."""
        return epoch_row(means, self.meta)

    def log_line(self, values: dict[str, float]) -> dict[str, float]:
        """The figures of an iteration under the names that the official log gives them."""
        return log_line(values, self.meta)

    def check(self) -> None:
        """Compare what `run` filled with the golden file, number by number.

        Raises:
            AssertionError: a number differs, or an output of the file is not compared.
        """
        case, meta = self.case, self.meta
        if meta.get("loss_lines"):
            lines = [log_figures(line) for line in meta["loss_lines"]]
            names = list(lines[0])
            mine = [[self.log_line(values)[name] for name in names] for values in self.trainer.recorded]
            close_by_column(mine, [[line[name] for name in names] for line in lines], "log lines", names)
        rows = [self.epoch_row(entry["losses"]) for entry in self.trainer.history if "phase" not in entry]
        close_by_column(rows, case["out_epochs"], "epochs", meta["epoch_columns"])
        for name, value in self.out.items():
            if name in case:
                compare_output(name, value, case[name])
        missing = {name for name in case if name.startswith("out_")} - {*self.out, "out_epochs"}
        assert not missing, f"golden outputs that are not compared: {sorted(missing)}"
        assert checkpoint_files.LOSS_WEIGHTS not in self.trainer.network.state_dict()


def log_line(values: dict[str, float], meta: dict) -> dict[str, float]:
    """The figures of an iteration under the names that the official logs give them."""
    pod = values.get("pod", 0.0)
    if meta["official"] == "LSKD":
        # A logged figure only: PLOP's mean over six taps plus the context term, scheduled; none of it enters the loss.
        taps = [value for name, value in values.items() if "/" in name]
        pod = equilibrium_total(taps, values["mcd"], meta)
    return {
        "CE": values["ce"],
        "LKD": values.get("kd", 0.0),
        "LDE": values.get("body", 0.0),
        "LReg": values.get("regularizer", 0.0),
        "POD": pod,
        "EntMin": values.get("entropy", 0.0),
    }


def equilibrium_total(taps: list[float], context: float, meta: dict) -> float:
    """The logged POD total of the LSKD release."""
    old, new = meta["old_classes"], meta["new_classes"]
    return float(np.sqrt((old + new) / new) * (sum(taps) / 6 + context))


def epoch_row(means: dict[str, float], meta: dict) -> list[float]:
    """The golden columns of one epoch."""
    if meta["official"] != "LSKD":
        extra = sum(means.get(name, 0.0) for name in ("kd", "body", "icarl", "regularizer"))
        return [means["ce"], extra]
    taps = [value for name, value in means.items() if "/" in name]
    return [means["ce"], means["kd"], equilibrium_total(taps, means["mcd"], meta), *taps, means["mcd"]]
