"""Look at LSKD's masks: does M cover the old objects of the images of a step?

    python scripts/masks.py checkpoints/step/6-2-shapes_LSKD_0.pth checkpoints/step/6-2-shapes_LSKD_1.pth --out runs/masks
    python scripts/masks.py STEP0.pth STEP1.pth --images 10 --measure 200 --split train --data_root DATA

The first checkpoint is the teacher of step t−1, the second one that of step t, trained with LSKD; its options, thresholds and classes
are used. The masks are those of a training batch: the same functions make the pseudo-labels, the erased views and M, on centre crops.
What it leaves in `--out`:

    masks.png     by image: the image, the truth, the pseudo-labels, M of each masked tap (the share of its channels that is kept)
    masks.csv     for each masked tap the shares of old-object, new-object and background pixels that M covers, over all measured images
    pseudo_labels.csv    which label old-object, new-object and background pixels are trained with, over the same images

An old object is every pixel whose truth is an old class other than background. "Covered" are pixels at which M keeps some channel,
"kept" is the mean of M over channels. M is enlarged to the size of the labels by its nearest position.
"""

from __future__ import annotations

import csv
import math
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dataset  # noqa: E402  (the project is run from its folder, not installed)
from dataset.base import SegmentationSet  # noqa: E402
from dataset.transform import denormalise  # noqa: E402
from methods.lskd import LayerSpecificDistillation  # noqa: E402
from methods.plop import PseudoLabels  # noqa: E402
from scripts.predict import Loaded, load  # noqa: E402
from utils.checkpointing.store import read  # noqa: E402
from utils.errors import UserError  # noqa: E402
from utils.options.spelling import Parser  # noqa: E402
from utils.reporting import figures  # noqa: E402
from utils.runtime import distributed  # noqa: E402
from utils.types import IGNORE, Batch  # noqa: E402

#: Kinds of pixels by their truth.
KINDS = ("old objects", "new objects", "background")
#: What the label of the training is for a pixel, compared with the truth.
OUTCOMES = ("right", "background", "another class", "ignored")
#: Images of a batch.
BATCH = 4


@dataclass
class Coverage:
    """Sums over the pixels of each kind, of one tap.

    Attributes:
        covered, kept: sums of [M keeps a channel] and of the mean of M over channels, by kind.
        pixels: number of pixels by kind.
    """

    covered: list[float] = field(default_factory=lambda: [0.0] * len(KINDS))
    kept: list[float] = field(default_factory=lambda: [0.0] * len(KINDS))
    pixels: list[int] = field(default_factory=lambda: [0] * len(KINDS))

    def add(self, mask: Tensor, truth: Tensor, num_old: int) -> None:
        """Count a batch. Pixels that the truth ignores are of no kind.

        Args:
            mask: (B, 1 or c, h, w), M of `utils.masks.tap_mask`.
            truth: (B, H, W), labels of all classes seen so far.
            num_old: number of old classes, background included.
        """
        size = truth.shape[-2:]
        kept = F.interpolate(mask.mean(1, keepdim=True), size=size)[:, 0]  # B×H×W
        covered = F.interpolate((mask > 0).any(1, keepdim=True).to(mask.dtype), size=size)[:, 0]  # B×H×W
        for place, pixels in enumerate(by_kind(truth, num_old)):
            self.covered[place] += float(covered[pixels].sum())
            self.kept[place] += float(kept[pixels].sum())
            self.pixels[place] += int(pixels.sum())

    def shares(self, place: int) -> tuple[float, float]:
        """Percent of the pixels of a kind that are covered, and that are kept; NaN where there are none."""
        count = self.pixels[place] or math.nan
        return 100 * self.covered[place] / count, 100 * self.kept[place] / count


@dataclass
class LabelCounts:
    """Pixels by what they are and by the label that they are trained with.

    Attributes:
        pixels: number of pixels, by kind and outcome.
    """

    pixels: list[list[int]] = field(default_factory=lambda: [[0] * len(OUTCOMES) for _ in KINDS])

    def add(self, labels: Tensor, truth: Tensor, num_old: int) -> None:
        """Count a batch.

        Args:
            labels: (B, H, W), the labels of the training, with pseudo-labels.
            truth: (B, H, W), labels of all classes seen so far.
            num_old: number of old classes, background included.
        """
        right, ignored = labels == truth, labels == IGNORE
        background = (labels == 0) & ~right
        found = (right, background, ~(right | background | ignored), ignored)
        for place, pixels in enumerate(by_kind(truth, num_old)):
            for outcome, chosen in enumerate(found):
                self.pixels[place][outcome] += int((chosen & pixels).sum())

    def shares(self, place: int) -> list[float]:
        """Percent of the pixels of a kind by outcome; NaN where there are none."""
        count = sum(self.pixels[place]) or math.nan
        return [100 * number / count for number in self.pixels[place]]


def by_kind(truth: Tensor, num_old: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pixels of each of `KINDS`.

    Args:
        truth: (B, H, W), labels of all classes seen so far.
        num_old: number of old classes, background included.
    """
    return (truth > 0) & (truth < num_old), (truth >= num_old) & (truth != IGNORE), truth == 0


class Masks:
    """The masks of a step, as its training makes them.

    Args:
        teacher: of step t−1.
        student: of step t.
        state: checkpoint of step t.
        device: where to compute.
    """

    def __init__(self, teacher: Loaded, student: Loaded, state: dict[str, Any], device: torch.device):
        self.task, self.device = student.task, device
        self.method, self.teacher = student.method, teacher.model.to(device).requires_grad_(False)
        self.part = next(part for part in self.method.parts if isinstance(part, LayerSpecificDistillation))
        for part in self.method.parts:
            if isinstance(part, PseudoLabels):
                part.load_state_dict(state["method_state"][part.state_key])

    def prepare(self, images: Tensor, labels: Tensor) -> Batch:
        """A batch with pseudo-labels and the teacher's views.

        Args:
            images: (B, 3, H, W) normalised.
            labels: (B, H, W) of the step.
        """
        return self.method.prepare(images.to(self.device), labels.to(self.device).long(), self.teacher)

    @torch.no_grad()
    def of(self, batch: Batch) -> dict[str, Tensor]:
        """M by masked tap, (B, 1 or c, h, w)."""
        return {tap: self.part.mask(batch, tap) for tap in self.part.masked}


def checked(teacher: Loaded, student: Loaded, paths: Sequence[Path]) -> None:
    """Refuse checkpoints that are not steps t−1 and t of one run of LSKD.

    Raises:
        UserError: says what is wrong.
    """
    before, task = teacher.task, student.task
    if before.step != task.step - 1 or before.steps != task.steps[:-1] or before.dataset != task.dataset:
        raise UserError(
            f"{paths[0]} is step {before.step} of {before.name}, {paths[1]} step {task.step} of {task.name}; "
            "name the checkpoints of two successive steps of one task"
        )
    found = [part for part in student.method.parts if isinstance(part, LayerSpecificDistillation) and part.masked]
    if not found:
        raise UserError(
            f"{paths[1]} was trained without LSKD's masks; name a step that --method LSKD or --mask_rule trained"
        )


def choose(data: SegmentationSet, old: Sequence[int], new: Sequence[int], count: int) -> list[int]:
    """Positions of images that show old and new objects, then of those that show new ones alone.

    Args:
        data: of the step.
        old, new: class ids, without background.
        count: of images; fewer if there are fewer.
    """
    shown = data.source.presence()[data.indices]
    both = shown[:, list(old)].any(axis=1) & shown[:, list(new)].any(axis=1)
    return [*np.flatnonzero(both), *np.flatnonzero(~both)][:count]


def batches(
    labelled: SegmentationSet, truth: SegmentationSet, positions: Sequence[int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(images, labels of the step, labels of all classes seen so far) of the images at these positions."""
    found = []
    for start in range(0, len(positions), BATCH):
        some = positions[start : start + BATCH]
        images, labels = (torch.stack(part) for part in zip(*(labelled[i] for i in some)))
        found.append((images, labels, torch.stack([truth[i][1] for i in some])))
    return found


def draw(rows: Sequence[tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]], colours: np.ndarray, path: Path) -> None:
    """Draw the images with their masks.

    Args:
        rows: for each image (3, H, W) uint8, truth and pseudo-labels (H, W), and by tap M's mean over channels (h, w).
        colours: (256, 3) uint8, by label; ignored pixels are white.
        path: of the PNG.
    """
    taps = list(rows[0][3])
    figure = figures.new_figure(1.2 * (3 + len(taps)), 1.25 * len(rows) + 0.3)
    axes = figure.subplots(len(rows), 3 + len(taps), squeeze=False)
    for place, (image, truth, labels, masks) in enumerate(rows):
        pictures = [image.permute(1, 2, 0).numpy(), colours[truth.numpy()], colours[labels.numpy()]]
        for axis, picture in zip(axes[place], pictures):
            axis.imshow(picture)
        for axis, mask in zip(axes[place][3:], masks.values()):
            axis.imshow(mask.numpy(), vmin=0, vmax=1, cmap="gray", interpolation="nearest")
    for axis, title in zip(axes[0], ("image", "truth", "pseudo-labels", *taps)):
        axis.set_title(title, fontsize="small", color=figures.INK)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path, dpi=150)


def label_colours(opts: Namespace, ids: Sequence[int]) -> np.ndarray:
    """(256, 3) uint8: the colour of each label of a task."""
    table, found = dataset.colours(opts), np.full((256, 3), 255, dtype=np.uint8)
    found[: len(ids)] = table[list(ids)]
    return found


def examine(masks: Masks, student: Loaded, arguments: Namespace) -> tuple[dict[str, Coverage], LabelCounts]:
    """Draw some images with their masks, and measure more of them; returns the coverage by tap, and the labels."""
    opts, task = student.opts, student.task
    labelled, truth = dataset.examined(opts, task, arguments.split == "train")
    old, new = [c for c in task.old if c != 0], [c for c in task.new if c != 0]
    positions = choose(labelled, old, new, max(arguments.images, arguments.measure))
    coverage, counts = {tap: Coverage() for tap in masks.part.masked}, LabelCounts()
    rows: list[tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]] = []
    for images, labels, everything in batches(labelled, truth, positions):
        batch = masks.prepare(images, labels)
        found = {tap: mask.cpu() for tap, mask in masks.of(batch).items()}
        counts.add(batch.labels.cpu(), everything, task.num_old)
        for tap, mask in found.items():
            coverage[tap].add(mask, everything, task.num_old)
        for i in range(len(images)):
            if len(rows) < arguments.images:
                shown = {tap: mask[i].mean(0) for tap, mask in found.items()}
                rows.append((denormalise(images[i]), everything[i], batch.labels[i].cpu(), shown))
    draw(rows, label_colours(opts, task.label_ids), arguments.out / "masks.png")
    return coverage, counts


def write_labels(counts: LabelCounts, path: Path) -> None:
    """Write the shares of the labels as CSV, and print them."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["pixels of", "number", *(f"{outcome} (%)" for outcome in OUTCOMES)])
        for place, kind in enumerate(KINDS):
            number, shares = sum(counts.pixels[place]), counts.shares(place)
            table.writerow([kind, number, *(f"{share:.2f}" for share in shares)])
            said = ", ".join(f"{share:.2f} % {outcome}" for share, outcome in zip(shares, OUTCOMES))
            print(f"labels     {kind:<11} {number:>9} pixels: {said}")


def write(coverage: dict[str, Coverage], path: Path) -> None:
    """Write the shares of the masks as CSV, and print them."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["tap", "pixels of", "number", "covered (%)", "kept (%)"])
        for tap, found in coverage.items():
            for place, kind in enumerate(KINDS):
                covered, kept = found.shares(place)
                table.writerow([tap, kind, found.pixels[place], f"{covered:.2f}", f"{kept:.2f}"])
                print(
                    f"{tap:<10} {kind:<11} {found.pixels[place]:>9} pixels: {covered:6.2f} % covered, {kept:6.2f} % kept"
                )


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("teacher", type=Path, help="checkpoint of step t-1")
    parser.add_argument("student", type=Path, help="checkpoint of step t, trained with LSKD")
    parser.add_argument("--out", type=Path, default=Path("runs/masks"), help="folder of the results")
    parser.add_argument("--images", type=int, default=10, help="images that are drawn (default: 10)")
    parser.add_argument(
        "--measure", type=int, default=200, help="images over which the shares are measured (default: 200)"
    )
    parser.add_argument(
        "--split", default="train", choices=["train", "test"], help="images of the step (default: train)"
    )
    parser.add_argument("--data_root", default=None, help="folder of the data sets (default: that of the training)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: CUDA if there is one")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw and measure; exit code 2 for a user's mistake."""
    arguments = parse(argv)
    try:
        distributed.check_device(arguments.device)
        for name in ("images", "measure"):
            if getattr(arguments, name) < 1:
                raise UserError(f"--{name} {getattr(arguments, name)} is not a number of images; give at least 1")
        teacher, student = load(arguments.teacher), load(arguments.student)
        checked(teacher, student, (arguments.teacher, arguments.student))
        student.opts.data_root = arguments.data_root or student.opts.data_root
        cuda = arguments.device != "cpu" and torch.cuda.is_available()
        masks = Masks(teacher, student, read(arguments.student), torch.device("cuda" if cuda else "cpu"))
        arguments.out.mkdir(parents=True, exist_ok=True)
        coverage, counts = examine(masks, student, arguments)
        write(coverage, arguments.out / "masks.csv")
        write_labels(counts, arguments.out / "pseudo_labels.csv")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("-> " + ", ".join(str(arguments.out / name) for name in ("masks.png", "masks.csv", "pseudo_labels.csv")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
