"""Write the network of a finished step for use elsewhere: torch.export, ONNX, or the weights alone as safetensors.

    python scripts/export.py checkpoints/step/15-5s-voc_PLOP_5.pth network.pt2 --size 512 512
    python scripts/export.py checkpoints/step/15-5s-voc_PLOP_5.pth network.onnx --size 512 512      # needs onnx, onnxscript, onnxruntime
    python scripts/export.py checkpoints/step/15-5s-voc_PLOP_5.pth weights.safetensors              # needs safetensors

The programs take images (1, 3, H, W) of the given size, normalised with the mean and standard deviation of ImageNet, and return logits
(1, C, H, W); channel k is the k-th class in the order of learning. NAME.classes.json has the class id and the name of each channel.
A program is read again and compared with the network before the file gets its name.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dataset  # noqa: E402  (the project is run from its folder, not installed)
from modules.fold import fold_frozen  # noqa: E402
from scripts.predict import Loaded, load  # noqa: E402
from utils.errors import UserError  # noqa: E402

#: Greatest difference of a logit from that of the network, relative to the largest logit.
TOLERANCE = 1e-4


class Logits(nn.Module):
    """A network whose forward pass returns only its full-size logits.

    Args:
        network: a `SegmentationModel` in evaluation mode.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised → (B, C, H, W)."""
        return self.network(images).logits


def require(*names: str) -> None:
    """Refuse a format whose packages are not installed.

    Raises:
        UserError: names the packages and how to install them.
    """
    missing = []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise UserError(f"this format needs {', '.join(missing)}; install with: pip install {' '.join(missing)}")


def write_program(network: Logits, images: Tensor, path: Path) -> Callable[[], Tensor]:
    """Write a program of torch.export; returns a function that runs the written file on the images."""
    torch.export.save(torch.export.export(network, (images,)), path)
    return lambda: torch.export.load(path).module()(images)


def write_onnx(network: Logits, images: Tensor, path: Path) -> Callable[[], Tensor]:
    """Write an ONNX file; returns a function that runs it on the images with onnxruntime."""
    require("onnx", "onnxscript", "onnxruntime")
    torch.onnx.export(
        network,
        (images,),
        str(path),
        input_names=["images"],
        output_names=["logits"],
        dynamo=True,
        external_data=False,
        verbose=False,
    )

    def run() -> Tensor:
        runtime = importlib.import_module("onnxruntime")
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return run


def write_weights(loaded: Loaded, path: Path) -> None:
    """Write only the weights, by their names in the network."""
    require("safetensors")
    weights = {name: value.contiguous().clone() for name, value in loaded.model.state_dict().items()}
    importlib.import_module("safetensors.torch").save_file(
        weights, str(path), metadata={"task": loaded.task.name, "step": str(loaded.task.step)}
    )


#: Functions that write a program, by the suffix of the file.
PROGRAMS = {".pt2": write_program, ".onnx": write_onnx}


@torch.no_grad()
def export(path: Path, target: Path, size: tuple[int, int]) -> str:
    """Export the network of a checkpoint.

    Args:
        path: of a finished step.
        target: the new file; its suffix chooses the format.
        size: height and width of the images in pixels.

    Returns:
        The result of the comparison, as text.

    Raises:
        UserError: an unknown suffix, a missing package, a checkpoint that cannot be used, or a program whose logits differ.
    """
    if target.suffix not in (*PROGRAMS, ".safetensors"):
        raise UserError(f"{target} has an unknown suffix; end the name in {', '.join(PROGRAMS)} or .safetensors")
    loaded = load(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    names = dataset.class_names(loaded.opts)
    classes = [{"channel": k, "id": label, "name": names[label]} for k, label in enumerate(loaded.task.label_ids)]
    described = json.dumps(classes, indent=1, ensure_ascii=False) + "\n"
    if target.suffix == ".safetensors":
        write_weights(loaded, target)
        said = "the weights alone"
    else:
        said = _export_program(loaded, target, size)
    target.with_suffix(".classes.json").write_text(described, encoding="utf-8")
    return said


def _export_program(loaded: Loaded, target: Path, size: tuple[int, int]) -> str:
    """Write a program and compare the written file with the network on an image of noise."""
    loaded.method.begin_test(loaded.model)
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = loaded.model(images).logits
    aside = target.with_stem(f".{target.stem}")
    try:
        run = PROGRAMS[target.suffix](Logits(fold_frozen(loaded.model)).eval(), images, aside)
        error = float((run() - expected).abs().max() / expected.abs().max())
        if not error < TOLERANCE:
            raise UserError(
                f"the logits of the exported program differ from those of the network by {error:.2g}; {target} is not written"
            )
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
    return f"its logits differ from those of the network by at most {error:.1g} of the largest"


def main(argv: list[str] | None = None) -> int:
    """Export one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="of a finished step")
    parser.add_argument("out", type=Path, help="file to write: NAME.pt2, NAME.onnx or NAME.safetensors")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("H", "W"), help="of the images")
    arguments = parser.parse_args(argv)
    try:
        if min(arguments.size) < 1:
            raise UserError(f"--size {arguments.size[0]} {arguments.size[1]} is no size of an image; give pixels")
        said = export(arguments.checkpoint, arguments.out, tuple(arguments.size))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.out}: {said}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
