"""Evaluation of a network: the scores over a loader, and predictions."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dataset.sampler import EvaluationBatches
from dataset.tasks import Task
from metrics.stream_metrics import StreamSegMetrics
from modules.inference import PLAIN, View, make_views, most_likely
from segmentation_module import SegmentationModel
from utils.reporting.context import Context
from utils.runtime import amp, distributed


class Evaluator:
    """Evaluates the model of one step.

    Args:
        opts: the parsed command line.
        task: which classes the step learns.
        network: the student on its device, not wrapped.
        context: device, log and stop request.

    Attributes:
        test_views: how the test of the step sees its images.
        stop_agreed: signal that all processes agreed to stop on, or 0.
    """

    def __init__(self, opts: Namespace, task: Task, network: SegmentationModel, context: Context) -> None:
        self.opts, self.task, self.network, self.context = opts, task, network, context
        self.device, self.log = context.device, context.log
        self.dtype = next(network.parameters()).dtype
        self.layout = torch.channels_last if opts.channels_last else torch.contiguous_format
        self.precision = amp.build(opts, self.device)
        self.stop_agreed = 0
        self.test_views = make_views(opts.scales, opts.flip)

    @torch.no_grad()
    def evaluate(
        self, loader: EvaluationBatches, title: str = "test", keep: int = 0, views: Sequence[View] = PLAIN
    ) -> dict[str, Any] | None:
        """Scores of the student over a loader; every image counts once, whatever the number of processes.

        Args:
            loader: yields (images, labels); each process holds its own part of the images.
            title: text before the progress bar.
            keep: number of (image, label, prediction) triples to return under "samples", on the main process.
            views: how the network sees each image.

        Returns:
            The scores of `StreamSegMetrics.get_results`, with the (C, C) "Confusion Matrix"; None if a stop was asked for.
        """
        metrics = StreamSegMetrics(self.task.num_total, self.device)
        distributed.broadcast_(
            list(self.network.buffers())
        )  # norms without synchronisation take the main process's statistics
        was_training = self.network.training
        self.network.eval()
        samples: list[tuple[Tensor, Tensor, Tensor]] = []
        for images, labels in self.log.bar(loader, title, len(loader)):
            if self.context.stop.signum:
                break
            predictions = self.predict(images, views)
            metrics.update(labels.to(self.device, non_blocking=True), predictions)
            if len(samples) < keep:
                samples += list(zip(images, labels, predictions.cpu()))[: keep - len(samples)]
        self.network.train(was_training)
        self.stop_agreed = distributed.max_over_ranks(self.context.stop.signum)
        if self.stop_agreed:
            return None
        distributed.sum_(metrics.confusion_matrix)
        return metrics.get_results() | {"Confusion Matrix": metrics.confusion_matrix.cpu(), "samples": samples}

    @torch.no_grad()
    def predict(self, images: Tensor, views: Sequence[View] = PLAIN) -> Tensor:
        """(B, 3, H, W) normalised → the most likely class of every pixel, (B, H, W) int64; `views` as for `evaluate`."""
        images = images.to(self.device, self.dtype, non_blocking=True, memory_format=self.layout)
        with self.precision.autocast():
            return most_likely(self.network, images, views, background=not self.opts.dont_predict_bg)

    def predict_each(self, images: Iterable[Tensor]) -> list[Tensor]:
        """Most likely class of every pixel of single images, as in the test of a step; may be called on one process alone.

        Args:
            images: (3, H, W) normalised, of any sizes.

        Returns:
            For each (H, W) int64 on the CPU.
        """
        was_training = self.network.training
        self.network.eval()
        predictions = [self.predict(image[None], self.test_views)[0].cpu() for image in images]
        self.network.train(was_training)
        return predictions
