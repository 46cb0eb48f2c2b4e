"""Segment pictures with the checkpoint of a finished step.

    python scripts/predict.py checkpoints/step/15-5s-voc_PLOP_5.pth picture.jpg folder/ --out runs/predictions

Writes, for every picture, NAME.png: a palette PNG of class ids of the data set, and NAME.overlay.png: the colours over the picture.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import argparser  # noqa: E402  (the project is run from its folder, not installed)
import dataset  # noqa: E402
import methods  # noqa: E402
import segmentation_module  # noqa: E402
from dataset import pictures  # noqa: E402
from dataset.files import read_picture  # noqa: E402
from dataset.tasks import Task  # noqa: E402
from dataset.transform import normalise  # noqa: E402
from modules.inference import class_map  # noqa: E402
from modules.tiles import Tiling, joined_logits  # noqa: E402
from segmentation_module import SegmentationModel  # noqa: E402
from utils.checkpointing.store import read  # noqa: E402
from utils.errors import UserError  # noqa: E402
from utils.options.spelling import Parser  # noqa: E402
from utils.reporting.visualize import colour_map  # noqa: E402
from utils.runtime import distributed, memory  # noqa: E402

#: Greatest side of what the network sees at once, in pixels, where `--tile` does not say it.
TILE = 2048


@dataclass(frozen=True)
class Predictor:
    """A network of a finished step, as the test of the step sees it.

    Attributes:
        model: in evaluation mode on the device.
        opts: with which it was trained.
        task: the step.
        device: where it is.
        tiling: how pictures are cut.
    """

    model: SegmentationModel
    opts: Namespace
    task: Task
    device: torch.device
    tiling: Tiling

    @torch.no_grad()
    def segment(self, picture: np.ndarray) -> np.ndarray:
        """Class ids of the data set for every pixel of a picture.

        Args:
            picture: (H, W, 3) uint8.

        Returns:
            (H, W) uint8.
        """
        image = torch.from_numpy(picture).permute(2, 0, 1)  # H×W×3 → 3×H×W
        logits = joined_logits(self._small_logits, image, self.tiling)
        size = (image.shape[1], image.shape[2])
        positions = class_map([logits], size, background=not self.opts.dont_predict_bg).numpy()
        return np.array(self.task.label_ids, dtype=np.uint8)[positions]

    def _small_logits(self, tile: Tensor) -> Tensor:
        """(3, H, W) uint8 → (C, h, w)."""
        return self.model(normalise(tile)[None].to(self.device), full_size=False).logits_small[0]


class Loaded(NamedTuple):
    """A finished step: its network with the weights of the checkpoint, and what it was trained with."""

    model: SegmentationModel
    opts: Namespace
    task: Task
    method: methods.Method


def load(path: Path) -> Loaded:
    """The network of a checkpoint of this program, in evaluation mode, and the step it has learned.

    Raises:
        UserError: a checkpoint without options and class order, such as an official one, or with unusable ones.
    """
    state = read(path)
    if "options" not in state or state.get("task") is None:
        raise UserError(f"{path} says neither its network nor its classes; give a checkpoint that run.py wrote")
    opts, task = argparser.restore(state["options"], path), dataset.described_task(state["task"])
    method = methods.build(opts, task)
    classes = segmentation_module.network_classes(opts, task)
    model = segmentation_module.build_network(opts, classes, pretrained=False, wrap=method.wrap_model)
    segmentation_module.load_weights(model, state["model_state"], path, strict=True)
    return Loaded(model.eval(), opts, task, method)


def make_predictor(path: Path, device: torch.device, tile: int | None) -> Predictor:
    """What segments pictures with a checkpoint.

    Args:
        path: of the checkpoint.
        device: where to compute.
        tile: greatest side of a tile in pixels; 0: pictures are not cut; None: `TILE`, or more where the overlap asks for it.

    Raises:
        UserError: as `load`, or a tile that is too small for the network.
    """
    model, opts, task, method = load(path)
    method.begin_test(model)
    return Predictor(model.to(device), opts, task, device, tiling(opts, tile))


def tiling(opts: Namespace, tile: int | None) -> Tiling:
    """How pictures are cut for a network: tiles overlap by the window of its pooled branch, the widest that a cell looks.

    Args:
        opts: pooling and output_stride of the network.
        tile: as in `make_predictor`.

    Raises:
        UserError: the tile is not twice as large as the overlap.
    """
    overlap = opts.pooling * opts.output_stride
    if tile == 0:
        return Tiling(sys.maxsize, 0, opts.output_stride)
    side = max(TILE, 2 * overlap) if tile is None else tile
    if side < 2 * overlap:
        raise UserError(
            f"--tile {side} is too small: the tiles of this network overlap by {overlap} pixels; give {2 * overlap} or more, "
            "or 0 for pictures in one piece"
        )
    return Tiling(side - side % opts.output_stride, overlap, opts.output_stride)


def segment_all(predictor: Predictor, found: Sequence[pictures.Picture]) -> list[str]:
    """Segment every picture and write its results; a sentence for each that could not be read."""
    colours, faults = colour_map(), []
    for picture in tqdm(found, desc="pictures"):
        try:
            pixels = read_picture(str(picture.path))
            ids = predictor.segment(pixels)
        except UserError as error:
            faults.append(str(error))
            continue
        except (RuntimeError, MemoryError) as error:
            if not memory.shortage(error):
                raise
            faults.append(f"{picture.path} does not fit into the memory; give a smaller --tile")
            continue
        pictures.write(picture, pixels, ids, colours)
    return faults


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="of a finished step")
    parser.add_argument("paths", type=Path, nargs="+", help="pictures, or folders of pictures")
    parser.add_argument("--out", type=Path, default=Path("runs/predictions"), help="folder of the results")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: CUDA if there is one")
    parser.add_argument(
        "--tile", type=int, default=None, help=f"greatest side of what the network sees at once; 0: any; none: {TILE}"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Segment every picture; exit code 2 if one could not be segmented."""
    arguments = parse(argv)
    try:
        distributed.check_device(arguments.device)
        cuda = arguments.device != "cpu" and torch.cuda.is_available()
        found = pictures.find(arguments.paths, arguments.out)
        device = torch.device("cuda" if cuda else "cpu")
        faults = segment_all(make_predictor(arguments.checkpoint, device, arguments.tile), found)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(found) - len(faults)} pictures -> {arguments.out}")
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if faults:
        print(f"error: {len(faults)} of {len(found)} pictures could not be segmented", file=sys.stderr)
    return 2 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
