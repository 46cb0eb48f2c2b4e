"""Segment pictures with the checkpoint of a finished step.

    python scripts/predict.py checkpoints/step/15-5s-voc_PLOP_5.pth picture.jpg folder/ --out runs/predictions
    python scripts/predict.py checkpoints/step/15-5s-voc_PLOP_5.pth 'trip/*.jpg' --scales 0.75 1 1.25 --flip --save overlay mask color

Writes, for every picture, NAME.overlay.png: the colours of the classes over the picture, and NAME.png: a palette PNG of class ids of the
data set; --save chooses, and can add NAME.color.png: the colours alone. legend.png has the names of the classes that occur, areas.json how
many pixels of each picture each class covers.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
from modules.inference import PLAIN, View, class_map, logits_of_views, make_views  # noqa: E402
from modules.tiles import Tiling, Windows, averaged_logits, joined_logits  # noqa: E402
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
        views: how the network sees each picture.
    """

    model: SegmentationModel
    opts: Namespace
    task: Task
    device: torch.device
    tiling: Tiling | Windows
    views: tuple[View, ...] = PLAIN

    @torch.no_grad()
    def segment(self, picture: np.ndarray) -> np.ndarray:
        """Class ids of the data set for every pixel of a picture.

        Args:
            picture: (H, W, 3) uint8.

        Returns:
            (H, W) uint8.
        """
        image = torch.from_numpy(picture).permute(2, 0, 1)  # H×W×3 → 3×H×W
        logits = logits_of_views(self._logits, image, self.views)
        size = (image.shape[1], image.shape[2])
        positions = class_map(logits, size, background=not self.opts.dont_predict_bg).numpy()
        return np.array(self.task.label_ids, dtype=np.uint8)[positions]

    def _logits(self, image: Tensor) -> Tensor:
        """(3, H, W) uint8 of any size → (C, h, w)."""
        if isinstance(self.tiling, Windows):
            return averaged_logits(self._small_logits, image, self.tiling)
        return joined_logits(self._small_logits, image, self.tiling)

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


def make_predictor(
    path: Path,
    device: torch.device,
    tile: int | None = None,
    window: tuple[int, int | None] | None = None,
    views: tuple[View, ...] = PLAIN,
) -> Predictor:
    """What segments pictures with a checkpoint.

    Args:
        path: of the checkpoint.
        device: where to compute.
        tile: greatest side of a tile in pixels; 0: pictures are not cut; None: `TILE`, or more where the overlap asks for it.
        window: side of sliding windows and their distance in pixels, instead of tiles; without a distance two thirds of the side.
        views: how the network sees each picture.

    Raises:
        UserError: as `load`, or a tile or window that is too small for the network.
    """
    model, opts, task, method = load(path)
    method.begin_test(model)
    cut = tiling(opts, tile) if window is None else sliding(opts, *window)
    return Predictor(model.to(device), opts, task, device, cut, views)


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


def sliding(opts: Namespace, side: int, step: int | None) -> Windows:
    """The windows that slide over a picture.

    Args:
        opts: output_stride of the network.
        side: of a window in pixels.
        step: pixels from one window to the next; None: two thirds of the side.

    Raises:
        UserError: a side or step below the stride of the network, or windows with gaps between them.
    """
    least = opts.output_stride
    step = max(least, 2 * side // 3) if step is None else step
    if side < least:
        raise UserError(f"--window {side} is too small for this network; give {least} pixels or more")
    if not least <= step <= side:
        raise UserError(f"--stride {step} does not fit --window {side}; give pixels from {least} to {side}")
    return Windows(side, step, least)


def look_of(opts: Namespace, task: Task, data_root: str | None, opacity: float) -> pictures.Look:
    """Names and colours of the classes of a step.

    Args:
        opts: of the checkpoint; says the data set and where it was.
        task: the step.
        data_root: folder of the data set; None: that of the training, and numbers instead of names if it is not there.
        opacity: of the colours in an overlay.

    Raises:
        UserError: the data set at `data_root` has no usable names.
    """
    named = Namespace(**{**vars(opts), "data_root": data_root or opts.data_root})
    try:
        names, colours = dataset.class_names(named), dataset.colours(named)
    except UserError as error:
        if data_root is not None:
            raise
        print(
            f"note: classes have numbers instead of names ({error}); name the folder of the data set with --data_root"
        )
        names, colours = (), colour_map()
    table = {label: names[label] if label < len(names) else f"class {label}" for label in task.label_ids}
    return pictures.Look(table, colours, None if task.domain else 0, opacity)


def segment_all(predictor: Predictor, arguments: Namespace, found: Sequence[pictures.Picture]) -> list[str]:
    """Segment every picture and write its results; a sentence for each that could not be read."""
    look = look_of(predictor.opts, predictor.task, arguments.data_root, arguments.opacity)
    covered: list[dict[str, Any]] = []
    present: set[int] = set()
    faults = []
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
            smaller = "--tile" if arguments.window is None else "--window"
            faults.append(f"{picture.path} does not fit into the memory; give a smaller {smaller}")
            continue
        pictures.write(picture, pixels, ids, look)
        covered.append(pictures.areas(picture, ids, look))
        present.update(np.unique(ids).tolist())
    if covered:
        pictures.write_legend(arguments.out, sorted(present), look)
        pictures.write_areas(arguments.out, arguments.checkpoint, covered, look)
    return faults


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", type=Path, help="of a finished step")
    add("paths", type=Path, nargs="+", help="pictures, patterns such as 'trip/*.jpg', or folders of pictures")
    add("--out", type=Path, default=Path("runs/predictions"), help="folder of the results")
    add(
        "--save",
        nargs="+",
        default=["overlay", "mask"],
        choices=list(pictures.KINDS),
        help="what to write of a picture",
    )
    add("--opacity", type=float, default=0.5, help="of the colours in an overlay, from 0 to 1")
    add(
        "--data_root",
        default=None,
        help="folder of the data set, for the names of its classes; none: as in the training",
    )
    add("--scales", type=float, nargs="+", default=None, help="sum the class probabilities at these scales; none: 1")
    add("--flip", action="store_true", help="also see each picture mirrored")
    add(
        "--window",
        type=int,
        default=None,
        metavar="SIDE",
        help="slide a window of this side in pixels over the picture",
    )
    add("--stride", type=int, default=None, help="pixels from one --window to the next; none: two thirds of its side")
    add("--tile", type=int, default=None, help=f"greatest side of what the network sees at once; 0: any; none: {TILE}")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: CUDA if there is one")
    add("--threads", type=int, default=0, help="CPU threads; 0: as torch chooses")
    return parser.parse_args(argv)


def check(arguments: Namespace) -> None:
    """Refuse options that cannot work.

    Raises:
        UserError: the first one found.
    """
    limits = {
        "opacity": (0, 1),
        "scales": (0.1, 10),
        "threads": (0, 4096),
        "tile": (0, 1 << 20),
        "window": (1, 1 << 20),
    }
    for name, (low, high) in limits.items():
        value = getattr(arguments, name)
        for number in value if isinstance(value, list) else [] if value is None else [value]:
            if not low <= number <= high:  # a NaN fails this too
                raise UserError(f"--{name} {number:.10g} is out of range; give a value from {low} to {high}")
    if arguments.window is not None and arguments.tile is not None:
        raise UserError("--window and --tile both say how a picture is cut; give one of them")
    if arguments.stride is not None and arguments.window is None:
        raise UserError("--stride is the distance of windows; give --window too")
    distributed.check_device(arguments.device)


def main(argv: Sequence[str] | None = None) -> int:
    """Segment every picture; exit code 2 if one could not be segmented."""
    arguments = parse(argv)
    try:
        check(arguments)
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        found = pictures.find(arguments.paths, arguments.out, arguments.save)
        device = torch.device("cuda" if arguments.device != "cpu" and torch.cuda.is_available() else "cpu")
        window = None if arguments.window is None else (arguments.window, arguments.stride)
        views = make_views(arguments.scales, arguments.flip)
        predictor = make_predictor(arguments.checkpoint, device, arguments.tile, window, views)
        faults = segment_all(predictor, arguments, found)
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
