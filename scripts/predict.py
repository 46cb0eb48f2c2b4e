"""Segment pictures with the checkpoint of a finished step.

    python scripts/predict.py checkpoints/step/15-5s-voc_PLOP_5.pth picture.jpg folder/ --out runs/predictions

Writes, for every picture, NAME.png: a palette PNG of class ids of the data set, and NAME.overlay.png: the colours over the picture.
"""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import argparser  # noqa: E402  (the project is run from its folder, not installed)
import dataset  # noqa: E402
import methods  # noqa: E402
import segmentation_module  # noqa: E402
from dataset.layout import IMAGE_SUFFIXES  # noqa: E402
from dataset.tasks import Task  # noqa: E402
from dataset.transform import normalise  # noqa: E402
from utils.checkpointing.store import read  # noqa: E402
from utils.errors import UserError  # noqa: E402
from utils.reporting.visualize import colour_map  # noqa: E402


def load(path: Path) -> tuple[nn.Module, Task]:
    """The network of a checkpoint of this program, in evaluation mode, and the step it has learned.

    Raises:
        UserError: a checkpoint without options and class order, such as an official one.
    """
    state = read(path)
    if "options" not in state or "task" not in state:
        raise UserError(f"{path} says neither its network nor its classes; give a checkpoint that run.py wrote")
    task = dataset.described_task(state["task"])
    opts = Namespace(**{**vars(argparser.parse([])), **state["options"]})
    wrap = methods.build(opts, task).wrap_model
    model = segmentation_module.build_network(opts, task.classes_per_step, pretrained=False, wrap=wrap)
    segmentation_module.load_weights(model, state["model_state"], path, strict=True)
    return model.eval(), task


def pictures(paths: list[Path]) -> list[Path]:
    """The files among these paths and in the folders among them.

    Raises:
        UserError: a path that does not exist, or no picture at all.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist; give pictures, or folders that hold some")
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES) if path.is_dir() else [path]
        found += inside
    if not found:
        raise UserError(f"no picture in {', '.join(map(str, paths))}; known suffixes: {', '.join(IMAGE_SUFFIXES)}")
    return found


@torch.no_grad()
def segment(model: nn.Module, picture: np.ndarray, device: torch.device) -> np.ndarray:
    """Positions in the order of learning, for every pixel.

    Args:
        model: in evaluation mode on the device.
        picture: (H, W, 3) uint8.
        device: where to compute.

    Returns:
        (H, W) int64.
    """
    image = normalise(torch.from_numpy(picture).permute(2, 0, 1))  # H×W×3 → 3×H×W
    return model(image[None].to(device)).logits.argmax(dim=1)[0].cpu().numpy()


def read_picture(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 values of a picture.

    Raises:
        UserError: it cannot be decoded.
    """
    try:
        with Image.open(path) as opened:
            return np.array(opened.convert("RGB"))
    except Exception as error:  # decoders raise a dozen types on damaged files
        raise UserError(f"picture {path} cannot be read: {error}") from error


def save(picture: np.ndarray, ids: np.ndarray, target: Path) -> None:
    """Write the palette PNG and the overlay."""
    colours = colour_map()
    mask = Image.fromarray(ids.astype(np.uint8), mode="P")
    mask.putpalette(colours.reshape(-1).tolist())
    mask.save(target.with_suffix(".png"))
    blended = (0.5 * picture + 0.5 * colours[ids]).round().astype(np.uint8)
    Image.fromarray(blended).save(target.with_suffix(".overlay.png"))


def main(argv: list[str] | None = None) -> int:
    """Segment every picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="of a finished step")
    parser.add_argument("paths", type=Path, nargs="+", help="pictures, or folders of pictures")
    parser.add_argument("--out", type=Path, default=Path("runs/predictions"), help="folder of the results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args(argv)
    try:
        model, task = load(arguments.checkpoint)
        files = pictures(arguments.paths)
        device = torch.device(arguments.device)
        model = model.to(device)
        classes = np.array(task.label_ids)
        arguments.out.mkdir(parents=True, exist_ok=True)
        for path in tqdm(files, desc="pictures"):
            picture = read_picture(path)
            save(picture, classes[segment(model, picture, device)], arguments.out / path.stem)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(files)} pictures -> {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
