"""Replays a golden training trace: two epochs of step 1, through the program's own parser, method, balancer and trainer, in float64."""

from __future__ import annotations

import shlex
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


def filled_model(opts, classes: list[int]) -> nn.Module:
    """A float64 network filled from the names of its parameters and buffers."""
    model = make_model(opts, classes).double()
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


def options(meta: dict):
    """The case's flags, parsed by the program."""
    words = [
        *shlex.split(meta["flags"]),
        "--norm_act",
        meta["norm_act"],
        "--backbone",
        meta["backbone"],
        "--no_pretrained",
    ]
    words += ["--lr", str(meta["lr"]), "--momentum", str(meta["momentum"]), "--weight_decay", str(meta["weight_decay"])]
    words += [
        "--epochs",
        str(meta["epochs"]),
        "--step",
        "1",
        "--no_progress",
        "--dataset",
        "shapes",
        "--task",
        "offline",
    ]
    opts = argparser.parse(words)
    opts.lr_of_step, opts.threshold_of_step = meta["lr"], opts.threshold
    return opts


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


def replay(case: dict, meta: dict) -> tuple[Recorder, dict[str, np.ndarray]]:
    """Train the case; returns the trainer and what the golden file calls out_*."""
    opts = options(meta)
    old, new = meta["old_classes"], meta["new_classes"]
    task = Task("golden", "golden", 1, (tuple(range(old)), tuple(range(old, old + new))))
    teacher = filled_model(opts, [old]).eval().requires_grad_(False)
    folded = fold_frozen(teacher)  # what run.py trains with
    model = filled_model(opts, [old, new])
    previous = {"model_state": teacher.state_dict(), "trainer_state": {"regularizer": importance(teacher)}}
    method = methods.build(opts, task)
    method.attach(model, folded, previous if meta["regularizer_state"] else {})
    count = meta["batches_per_epoch"]
    loader = FixedBatches(
        [
            (torch.as_tensor(case[f"in_images_{i}"]), torch.as_tensor(case[f"in_labels_{i}"]).long())
            for i in range(count)
        ]
    )
    method.init_classifier(model, folded, loader, torch.device("cpu"))
    context = Context(torch.device("cpu"), Logger(progress=False))
    trainer = Recorder(opts, task, method, model, folded, context, count)
    probe = torch.as_tensor(case["in_probe"]).double()
    out = {"out_probe_logits_before": probe_logits(trainer, probe)}
    method.begin_step(loader, folded, torch.device("cpu"))
    relabel_in_place(method)
    weights = []
    for _ in range(meta["epochs"]):
        trainer.train_epoch(loader)
        weights.append(
            [trainer.history[-1]["balance"].get(f"lambda/{name}") for name in getattr(trainer.balancer, "names", ())]
        )
    out["out_probe_logits_after"] = probe_logits(trainer, probe)
    out["out_loss_weights"] = np.array(weights)
    if isinstance(trainer.balancer, equilibrium.GradientEquilibrium):
        out["out_initial_task_losses"] = trainer.balancer.initial_losses.numpy()
    thresholds = [part.thresholds for part in method.parts if getattr(part, "thresholds", None) is not None]
    if thresholds:
        out["out_thresholds"] = thresholds[0].numpy()
    return trainer, out


@torch.no_grad()
def probe_logits(trainer: Trainer, probe: torch.Tensor) -> np.ndarray:
    """Full-size logits of the student in evaluation mode."""
    trainer.network.eval()
    logits = trainer.network(probe).logits.numpy()
    trainer.network.train()
    return logits


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


def check(case: dict, meta: dict) -> None:
    """Compare a replayed trace with the golden one, number by number.

    Args:
        case: the arrays of the file.
        meta: its decoded meta.

    Raises:
        AssertionError: a number differs, or an output of the file is not compared.
    """
    trainer, out = replay(case, meta)
    lines = [log_figures(line) for line in meta["loss_lines"]]
    names = list(lines[0])
    mine = [[log_line(values, meta)[name] for name in names] for values in trainer.recorded]
    close_by_column(mine, [[line[name] for name in names] for line in lines], "log lines", names)
    rows = [epoch_row(entry["losses"], meta) for entry in trainer.history]
    close_by_column(rows, case["out_epochs"], "epochs", meta["epoch_columns"])
    for name, value in out.items():
        if name in case:
            compare_output(name, value, case[name])
    assert {name for name in case if name.startswith("out_")} <= {*out, "out_epochs"}, "a golden output is not compared"
    assert checkpoint_files.LOSS_WEIGHTS not in trainer.network.state_dict()
