"""What scripts/benchmark measures: networks on a synthetic batch, synthetic files, clocks and peak memory."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import platform
import resource
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import argparser
import methods
from argparser import options_of_step
from dataset.sampler import FixedBatches
from dataset.tasks import Task
from methods.alife import FeatureReplay
from modules.atrous import AtrousConv2d
from modules.fold import fold_frozen
from modules.norm import ABN
from modules.resnet import Stem
from segmentation_module import SegmentationModel, build_network
from train import Trainer
from utils.errors import UserError
from utils.reporting.context import Context
from utils.reporting.logger import Logger
from utils.types import IGNORE

#: Teacher passes that a method cannot do without: LSKD's whole image and its two erased views, one for the others.
TEACHER_PASSES = {"LSKD": 3}
#: Size of the pictures of VOC, which the synthetic files imitate.
VOC_SIZE = (500, 375)
#: Different pictures among the synthetic files; the others are links to them.
DISTINCT = 40


class Clock:
    """Seconds of a call.

    Args:
        device: its queue is synchronised, if it is a CUDA device.
        kind: "wall", or "cpu" for the processor time of this process, on which other programs have less influence.
    """

    def __init__(self, device: torch.device, kind: str = "wall") -> None:
        self.device = device
        self.now = time.process_time if kind == "cpu" else time.perf_counter

    def seconds(self, call: Callable[[], object]) -> float:
        """Seconds that the call takes."""
        self._wait()
        start = self.now()
        call()
        self._wait()
        return self.now() - start

    def in_turn(self, calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
        """Seconds of each call, one after the other in every round, so that a change of the machine's speed affects all calls.

        Args:
            calls: by name.
            repeats: rounds that are measured; one more is run before them, for caches and lazy initialisation.
        """
        rounds = [{name: self.seconds(call) for name, call in calls.items()} for _ in range(repeats + 1)]
        return {name: [one[name] for one in rounds[1:]] for name in calls}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one.

    Raises:
        UserError: CUDA is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def machine(device: torch.device) -> dict[str, object]:
    """What the numbers depend on: processor or GPU, threads, versions, and how busy the machine is."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    load = round(os.getloadavg()[0], 2)
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": load,
    }


def peak_mb(device: torch.device) -> float:
    """Largest memory of this process so far in MiB: of the GPU's allocator, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError, StopIteration):
        # On Linux getrusage includes the peak of the parent process, the status file does not.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    unit = 2**20 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# ------------------------------------------------------------------- networks


def options(arguments: Namespace, fast: bool = True) -> Namespace:
    """Options of run.py for a measured iteration.

    Args:
        arguments: of the benchmark.
        fast: with its precision, memory layout and compilation; otherwise eager float32.

    Raises:
        UserError: options that cannot work together.
    """
    words = ["--method", arguments.method, "--backbone", arguments.backbone, "--norm_act", arguments.norm_act]
    words += ["--crop_size", str(arguments.crop_size), "--batch_size", str(arguments.batch_size)]
    words += ["--no_pretrained", "--no_progress", "--device", arguments.device]
    words += [
        "--dataset",
        "shapes",
        "--task",
        "6-2",
        "--step",
        "1",
    ]  # required, but not used: the measured step has its own `Task`
    words += ["--tap_schemes", arguments.tap_schemes] if arguments.tap_schemes else []
    if fast:
        words += ["--opt_level", "O1", "--amp_dtype", arguments.amp_dtype] if arguments.amp_dtype else []
        words += [flag for flag in ("--channels_last", "--compile") if getattr(arguments, flag[2:])]
    opts = argparser.parse([*words, *arguments.options])
    argparser.check(opts)
    return opts


def synthetic_batch(arguments: Namespace, device: torch.device) -> tuple[Tensor, Tensor]:
    """Normalised noise, and labels with a box of new classes, a border that is ignored, and background elsewhere."""
    generator = torch.Generator().manual_seed(0)
    batch, size, old = arguments.batch_size, arguments.crop_size, arguments.old_classes
    images = torch.randn(batch, 3, size, size, generator=generator)
    labels = torch.zeros(batch, size, size, dtype=torch.int64)
    for label in labels:
        box = slice(size // 4, 3 * size // 4)
        label[box, box] = old + int(torch.randint(arguments.new_classes, (1,), generator=generator))
        label[size // 4 - size // 32 : size // 4, box] = IGNORE
    return images.to(device), labels.to(device)


def plain(model: SegmentationModel) -> SegmentationModel:
    """The network of ordinary operations: all nine taps of every dilated conv, pooling in the default memory layout."""
    for module in model.modules():
        if isinstance(module, AtrousConv2d):
            module.__class__ = nn.Conv2d  # type: ignore[assignment]  # the class that it extends by a method
        elif isinstance(module, Stem):
            module.__class__ = nn.Sequential  # type: ignore[assignment]  # likewise
    return model


def plain_logits(model: SegmentationModel, images: Tensor) -> Tensor:
    """(B, C, H, W) logits of a plain network, upsampled by the ordinary operation."""
    small = model.cls(model.head(model.body(images)[0]))
    return F.interpolate(small, size=images.shape[2:], mode="bilinear", align_corners=False)


class Workbench:
    """The networks and the trainer of one step of a method, on a synthetic batch, without data loading.

    Args:
        arguments: of the benchmark.
        device: where to compute.
        fast: see `options`.
        parts: "floor", "iteration" or both; what is not measured is not built, so that it takes no memory.
    """

    def __init__(self, arguments: Namespace, device: torch.device, fast: bool = True,
                 parts: tuple[str, ...] = ("floor", "iteration")):  # fmt: skip
        opts = options(arguments, fast)
        old, new = arguments.old_classes, arguments.new_classes
        steps = (tuple(range(old)), tuple(range(old, old + new)))
        self.task = Task("voc", f"{old}-{new}", 1, steps)
        self.opts = options_of_step(opts, self.task)
        self.device = device
        self.layout = torch.channels_last if opts.channels_last else torch.contiguous_format
        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = True
        self.images, self.labels = synthetic_batch(arguments, device)
        method = methods.build(self.opts, self.task)
        teacher = self._plain_teacher(method) if method.needs_teacher else None
        self.passes = TEACHER_PASSES.get(method.name, 1) if teacher is not None else 0
        self.student = self._student(method, teacher)
        self.checkpoint = self._checkpoint(teacher)
        method.attach(self.student, teacher, self.checkpoint)
        self.teacher = self.plain_teacher = self.plain_student = None
        if "floor" in parts:
            # If only the floor is built, one set of networks is kept, because its memory is measured
            copied = (lambda network: network) if parts == ("floor",) else copy.deepcopy
            self.teacher = teacher
            self.plain_teacher = None if teacher is None else plain(copied(teacher))
            self.plain_student = plain(copied(self.student))
        self.trainer = None
        if "iteration" in parts:
            folded = None if teacher is None else fold_frozen(teacher, in_place="floor" not in parts)
            method.begin_step(FixedBatches([(self.images, self.labels)]), folded, device)
            context = Context(device, Logger(progress=False))
            self.trainer = Trainer(
                self.opts, self.task, method, self.student, folded, context, iterations_per_epoch=1000
            )
            self.trainer.model.train()

    def _plain_teacher(self, method: methods.Method) -> SegmentationModel:
        """The frozen model of the step before, with the statistics of the batch; with initial statistics the values would overflow."""
        classes = self.task.at(0).classes_per_step
        teacher = build_network(self.opts, classes, False, method.wrap_model).to(self.device)
        momenta = {norm: norm.momentum for norm in teacher.modules() if isinstance(norm, ABN)}
        with torch.no_grad():
            for norm in momenta:
                norm.momentum = 1.0
            teacher(self.images)
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        return teacher.eval().requires_grad_(False).to(memory_format=self.layout)

    def _checkpoint(self, teacher: SegmentationModel | None) -> dict[str, Any]:
        """State of the step before for methods that need it, such as prototypes, computed from this batch only."""
        if teacher is None:
            return {}
        method = methods.build(self.opts, self.task.at(0))
        method.attach(teacher)
        for part in method.parts:
            if isinstance(part, FeatureReplay):
                # To take features from a thousand crops for each class lasts minutes; invented ones cost the same later
                part.remember = self._invented_features  # type: ignore[method-assign, assignment]
        old = torch.where(self.labels < self.task.num_old, self.labels, 0)
        method.end_step(teacher, FixedBatches([(self.images, old)]), self.device)
        return {"model_state": teacher.state_dict(), "method_state": method.state_dict()}

    def _invented_features(self, model: SegmentationModel, *_: object) -> Tensor:
        """(--alife_memory, D) of noise."""
        return torch.randn(self.opts.alife_memory, model.cls[0].in_channels, device=self.device)

    def _student(self, method: methods.Method, teacher: nn.Module | None) -> SegmentationModel:
        student = build_network(self.opts, self.task.classes_per_step, False, method.wrap_model).to(self.device)
        if teacher is not None:
            student.load_state_dict(teacher.state_dict(), strict=False)
            student.cls.init_balanced()
        return student.to(memory_format=self.layout).train()

    def floor(self) -> None:
        """Passes of plain networks: teacher, student forward and backward; no optimiser step."""
        assert self.plain_student is not None
        self._passes(self.plain_teacher, self.plain_student, plain_logits)

    def own_floor(self) -> None:
        """The same passes through this program's networks, norms not folded."""
        self._passes(self.teacher, self.student, lambda network, images: network(images).logits)

    def _passes(
        self,
        teacher: SegmentationModel | None,
        student: SegmentationModel,
        logits_of: Callable[[SegmentationModel, Tensor], Tensor],
    ) -> None:
        student.zero_grad(set_to_none=True)
        images = self.images.contiguous(memory_format=self.layout)
        amp = torch.bfloat16 if self.opts.amp_dtype == "bfloat16" else torch.float16
        with torch.autocast(self.device.type, dtype=amp, enabled=self.opts.opt_level != "O0"):
            if teacher is not None:
                with torch.no_grad():
                    for _ in range(self.passes):
                        logits_of(teacher, images)
            logits = logits_of(student, images)
        F.cross_entropy(logits.float(), self.labels, ignore_index=IGNORE).backward()

    def iteration(self) -> None:
        """`Trainer.train_iteration`, the data on the device."""
        assert self.trainer is not None
        values = self.trainer.train_iteration(self.images, self.labels)
        assert values or self.trainer.settle(), "the iteration was skipped"

    def optimizer_step(self) -> None:
        """The optimiser's step alone, on the gradients of the last iteration."""
        assert self.trainer is not None
        self.trainer.optimizer.step()


# ---------------------------------------------------------------------- files


def write_files(root: Path, count: int) -> None:
    """A data set in the layout of VOC: photograph-like JPEGs of 500×375 with masks of a few boxes.

    Args:
        root: the folder for `--data_root`.
        count: number of images in each of the two splits.
    """
    base = root / "PascalVOC12"
    images, masks, splits = base / "VOCdevkit/VOC2012/JPEGImages", base / "SegmentationClassAug", base / "splits"
    for folder in (images, masks, splits):
        folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(count):
        image, mask = images / f"{number:05}.jpg", masks / f"{number:05}.png"
        if number < DISTINCT:
            jpeg, png = _picture(random)
            image.write_bytes(jpeg)
            mask.write_bytes(png)
        else:
            os.link(images / f"{number % DISTINCT:05}.jpg", image)
            os.link(masks / f"{number % DISTINCT:05}.png", mask)
    lines = "".join(f"/JPEGImages/{n:05}.jpg /SegmentationClassAug/{n:05}.png\n" for n in range(count))
    for split in ("train_aug", "train", "val"):
        (splits / f"{split}.txt").write_text(lines)


def _picture(random: np.random.Generator) -> tuple[bytes, bytes]:
    """JPEG of about 100 kB, as in VOC (coarse noise under fine noise), and the PNG of its mask."""
    width, height = VOC_SIZE
    coarse = Image.fromarray(random.integers(0, 256, (height // 12, width // 12, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(VOC_SIZE, Image.Resampling.BICUBIC), dtype=np.float32)
    image = (smooth + random.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
    mask = np.zeros((height, width), dtype=np.uint8)
    # Every mask shows a class of both steps of 15-5, so that all images belong to the measured step.
    for class_id in (int(random.integers(1, 16)), int(random.integers(16, 21))):
        top, left = int(random.integers(0, height // 2)), int(random.integers(0, width // 2))
        box = (slice(top, top + height // 3), slice(left, left + width // 3))
        mask[box] = IGNORE
        mask[box][3:-3, 3:-3] = class_id
    streams = io.BytesIO(), io.BytesIO()
    Image.fromarray(image).save(streams[0], "JPEG", quality=90)
    Image.fromarray(mask).save(streams[1], "PNG")
    return streams[0].getvalue(), streams[1].getvalue()


def ratios(floor: list[float], iteration: list[float]) -> dict[str, float]:
    """Medians, the ratio of the medians, and the smallest and largest ratio of a pair.

    Args:
        floor: seconds by round.
        iteration: seconds of the same rounds.
    """
    pairs = [b / a for a, b in zip(floor, iteration, strict=True)]
    middle_floor, middle_iteration = statistics.median(floor), statistics.median(iteration)
    return {
        "floor_s": middle_floor,
        "iteration_s": middle_iteration,
        "ratio": middle_iteration / middle_floor,
        "pair_ratio_median": statistics.median(pairs),
        "pair_ratio_min": min(pairs),
        "pair_ratio_max": max(pairs),
    }
