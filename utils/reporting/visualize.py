"""Pictures: colours of classes, image-label-prediction strips, confusion matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from utils.types import IGNORE


def colour_map(size: int = 256) -> np.ndarray:
    """The colours of Pascal VOC: bit k of a class number is spread over the high bits of red, green and blue.

    Args:
        size: number of classes.

    Returns:
        (size, 3) uint8.
    """
    colours = np.zeros((size, 3), dtype=np.uint8)
    for number in range(size):
        for bit in range(8):
            for channel in range(3):
                colours[number, channel] |= ((number >> (3 * bit + channel)) & 1) << (7 - bit)
    return colours


def strip(image: Tensor, label: Tensor, prediction: Tensor) -> np.ndarray:
    """Image, truth and prediction side by side.

    Args:
        image: (3, H, W) uint8 (`dataset.transform.denormalise`).
        label: (H, W); ignored pixels are drawn white.
        prediction: (H, W).

    Returns:
        (H, 3W, 3) uint8.
    """
    colours = colour_map()
    colours[IGNORE] = 255
    pictures = [
        image.permute(1, 2, 0).numpy(),  # 3×H×W → H×W×3
        colours[label.cpu().numpy().astype(np.uint8)],
        colours[prediction.cpu().numpy().astype(np.uint8)],
    ]
    return np.concatenate(pictures, axis=1)  # H×W×3 → H×3W×3


def confusion_picture(matrix: Tensor, class_names: list[str]) -> np.ndarray:
    """A confusion matrix with rows normalised to the class's pixels.

    Args:
        matrix: (C, C) counts, rows the truth.
        class_names: C names.

    Returns:
        (H, W, 3) uint8.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # needs no display and no global state
    from matplotlib.figure import Figure

    shares = matrix.double() / matrix.sum(dim=1, keepdim=True).clamp(min=1)
    classes = len(class_names)
    side = min(24.0, 3.0 + 0.32 * classes)
    figure = Figure(figsize=(side, side), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues")
    axes.set_xticks(range(classes), class_names, rotation=90)
    axes.set_yticks(range(classes), class_names)
    axes.set_xlabel("prediction")
    axes.set_ylabel("truth")
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the class's pixels")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def pictures_of_test(
    scores: dict[str, Any], class_names: list[str], to_pixels: Callable[[Tensor], Tensor]
) -> dict[str, np.ndarray]:
    """The pictures that TensorBoard shows of a test.

    Args:
        scores: of `Trainer.evaluate`.
        class_names: by position in the order of learning.
        to_pixels: from a normalised image to (3, H, W) uint8.

    Returns:
        By name, (H, W, 3) uint8.
    """
    pictures = {"test/confusion": confusion_picture(scores["Confusion Matrix"], class_names)}
    for number, (image, label, prediction) in enumerate(scores["samples"]):
        pictures[f"test/sample{number}"] = strip(to_pixels(image), label, prediction)
    return pictures
