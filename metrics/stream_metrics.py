"""Segmentation scores from one confusion matrix, kept on the device and summed over batches and processes."""

from __future__ import annotations

import torch
from torch import Tensor

#: Added to denominators, which are 0 for a class that is neither present nor predicted; as in the official programs.
EPSILON = 1e-6


class StreamSegMetrics:
    """Confusion matrix of a stream of predictions.

    Args:
        num_classes: C, number of classes seen so far.
        device: of labels and predictions.

    Reference: the scores of the official programs (MiB, PLOP, LSKD): the mean IoU runs over the classes that occur in the
    ground truth, and the class scores of absent classes are None here ("X" in the official table).
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        self.num_classes = num_classes
        self.confusion_matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def reset(self) -> None:
        """Set all counts to 0."""
        self.confusion_matrix.zero_()

    def update(self, labels: Tensor, predictions: Tensor) -> None:
        """Count a batch. Rows are the truth, columns the prediction.

        Args:
            labels: (B, H, W) integers; pixels outside 0..C-1 (255 among them) are not counted.
            predictions: (B, H, W) integers 0..C-1.
        """
        classes = self.num_classes
        labels = labels.reshape(-1).to(torch.int64)  # B·H·W
        predictions = predictions.reshape(-1).to(torch.int64)  # B·H·W
        # Ignored pixels are counted in one extra bin, which is faster than selecting the others.
        counted = (labels >= 0) & (labels < classes)
        pairs = torch.where(counted, labels * classes + predictions, classes * classes)
        counts = torch.bincount(pairs, minlength=classes * classes + 1)[: classes * classes]
        self.confusion_matrix += counts.view(classes, classes)  # C·C → C×C

    def get_results(self) -> dict:
        """All scores.

        Returns:
            "Overall Acc", "Mean Acc", "FreqW Acc", "Mean IoU": floats in [0, 1]; "Class IoU", "Class Acc": a dict from class
            position to float, or None for a class that does not occur in the ground truth; "Total samples": counted pixels.
        """
        matrix = self.confusion_matrix.double().cpu()
        truth, predicted, hit = matrix.sum(dim=1), matrix.sum(dim=0), matrix.diag()
        present = truth > 0
        union = truth + predicted - hit
        iou = hit / (union + EPSILON)
        accuracy = hit / (truth + EPSILON)
        total = truth.sum()
        frequency = truth / total.clamp(min=1)

        def mean(values: Tensor) -> float:
            return float(values[present].mean()) if bool(present.any()) else 0.0

        def per_class(values: Tensor) -> dict[int, float | None]:
            return {i: float(values[i]) if present[i] else None for i in range(self.num_classes)}

        return {
            "Total samples": int(total),
            "Overall Acc": float(hit.sum() / total.clamp(min=1)),
            "Mean Acc": mean(accuracy),
            "FreqW Acc": float((frequency * iou).sum()),
            "Mean IoU": mean(iou),
            "Class IoU": per_class(iou),
            "Class Acc": per_class(accuracy),
        }
