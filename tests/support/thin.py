"""The program on a network of few channels: real command lines in a second, and one batch for the tests of loss terms."""

from __future__ import annotations

import contextlib
import json
import shlex
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import argparser
import methods
import run
import segmentation_module
from dataset.sampler import FixedBatches
from dataset.tasks import Task
from modules.backbones import BACKBONES, Backbone
from modules.body import Body, Norm
from modules.deeplab import DeeplabV3, xavier_
from modules.residual import ResidualBlock, Stage
from modules.resnet import ARCHITECTURES, DILATIONS, ResNet, Stem
from train import Trainer
from utils.reporting.context import Context
from utils.reporting.logger import Logger

#: Channels of the features; 20 groups, LSKD's preset, leave two of them over.
FEATURES = 42

#: Makes a teacher that was never trained sure of some pixels, so that there are pseudo-labels.
SURE = 5

#: A step of 11 classes on `shapes`: small pictures, few of them, one epoch.
SMALL = (
    "--dataset shapes --overlap --backbone resnet18 --no_pretrained --crop_size 32 --batch_size 2 --epochs 1 --shapes_train 12 "
    "--shapes_val 4 --num_workers 0 --device cpu --norm_act iabn --no_progress --visualize --lr 0.01 --date d --name n"
)


class ThinResNet(Body):
    """The body with one block a stage and 8 or 12 channels."""

    out_channels = 12
    forward = ResNet.forward

    def __init__(self, norm: Norm, output_stride: int = 16) -> None:
        super().__init__()
        conv, pool = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False), nn.MaxPool2d(3, stride=2, padding=1)
        self.mod1 = Stem(OrderedDict(conv1=conv, bn1=norm(8), pool1=pool))
        inputs = 8
        for i, (width, dilation) in enumerate(zip((8, 8, 12, 12), DILATIONS[output_stride])):
            stride = 2 if i > 0 and dilation == 1 else 1
            block = ResidualBlock(inputs, (width, width), norm, stride, dilation)
            self.add_module(f"mod{i + 2}", Stage(OrderedDict(block1=block)))
            inputs = width
        # The norms of a teacher in evaluation mode do not make up for small weights: with PyTorch's start it would tell
        # no pixels apart.
        xavier_(self)


@contextlib.contextmanager
def program() -> Iterator[None]:
    """The program builds thin networks and computes in one thread."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for name in ARCHITECTURES:
            patch.setitem(BACKBONES, name, Backbone(ThinResNet))
        patch.setattr(segmentation_module, "HEAD_CHANNELS", FEATURES)
        patch.setattr(DeeplabV3, "hidden_channels", 8)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def words(folder: Path, text: str) -> list[str]:
    """The small command line, with its outputs in a folder; what `text` says comes last and wins."""
    folders = f"--checkpoint '{folder}/checkpoints' --results '{folder}/results' --logdir '{folder}/logs'"
    return shlex.split(f"{SMALL} {folders} {text}")


def launch(folder: Path, text: str) -> int:
    """Run the program; the exit code."""
    return run.main(words(folder, text))


def checkpoint(folder: Path, step: int, task: str = "6-2", name: str = "n") -> Path:
    """Where `launch` puts the checkpoint of a finished step."""
    return folder / "checkpoints" / f"{task}-shapes_{name}_{step}.pth"


def rows(folder: Path) -> list[list[str]]:
    """The lines of the only CSV of a folder, cut at the commas."""
    (path,) = (folder / "results").glob("*.csv")
    return [line.split(",") for line in path.read_text().splitlines()]


def document(folder: Path) -> dict[str, Any]:
    """The only JSON of a folder."""
    (path,) = (folder / "results").glob("*.json")
    return json.loads(path.read_text())


def options(text: str = "", step: int = 0) -> Namespace:
    """Parsed, checked, and with what `run` resolves for a step."""
    opts = argparser.parse(shlex.split(f"{SMALL} --task 6-2 --step {step} {text}"))
    argparser.check(opts)
    opts.lr_of_step = opts.lr[0]
    return opts


def network(opts: Namespace, classes: Iterable[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A network of that seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return segmentation_module.make_model(opts, list(classes), pretrained=False).to(dtype)


def images(count: int, size: int = 32, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """(count, 3, size, size) of noise."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Step:
    """A step of a task with student, teacher and method, as `run` puts them together.

    Args:
        text: the command line.
        steps: class ids of each step; the last one is trained.
        dtype: of the networks.
        checkpoint: what step t−1 left, as `Method.attach` takes it.
    """

    def __init__(
        self,
        text: str,
        steps=((0, 1, 2), (3,), (4, 5)),
        dtype: torch.dtype = torch.float32,
        checkpoint: dict[str, Any] | None = None,
    ):
        self.task = Task("shapes", "thin", len(steps) - 1, tuple(steps))
        self.opts = options(text, self.task.step)
        self.dtype = dtype
        self.model = network(self.opts, self.task.classes_per_step, dtype, seed=1)
        self.teacher = None
        if self.task.step:
            before = self.task.at(self.task.step - 1)
            self.teacher = network(self.opts, before.classes_per_step, dtype, seed=2).eval().requires_grad_(False)
            for classifier in self.teacher.cls:
                classifier.weight *= SURE
        self.method = methods.build(self.opts, self.task)
        self.method.attach(self.model, self.teacher, checkpoint)

    def trainer(self, iterations: int = 10) -> Trainer:
        """The trainer, with so many iterations an epoch."""
        context = Context(torch.device("cpu"), Logger(progress=False), save_minutes=self.opts.ckpt_minutes)
        return Trainer(self.opts, self.task, self.method, self.model, self.teacher, context, iterations)

    def begin(self, images: Tensor, labels: Tensor) -> None:
        """Statistics over one batch."""
        self.method.begin_step(FixedBatches([(images, labels)]), self.teacher, torch.device("cpu"))

    def batch(self, images: Tensor, labels: Tensor):
        """The batch with teacher and student."""
        return self.method.prepare(images, labels, self.teacher).with_student(self.model(images))

    def terms(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The method's terms of a batch, statistics over the same batch."""
        self.begin(images, labels)
        return self.method.terms(self.batch(images, labels))


def bands(*values: int, count: int = 2, size: int = 32) -> Tensor:
    """(count, size, size) labels: horizontal bands of these values, the second image upside down."""
    column = torch.tensor(values).repeat_interleave(-(-size // len(values)))[:size]
    label = column[:, None].expand(size, size)
    return torch.stack([label.flip(0) if i % 2 else label for i in range(count)])
