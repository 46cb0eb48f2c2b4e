"""The pictures that are kept of a test: the same images at every step of a task."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence

from torch import Tensor

import dataset
from dataset.tasks import Task
from dataset.transform import denormalise
from utils.reporting import pictures, results
from utils.reporting.logger import Logger
from utils.reporting.pictures import Legend, Sample

#: Maps normalised images (3, H, W) to predicted classes (H, W) int64 on the CPU.
Predict = Callable[[Sequence[Tensor]], list[Tensor]]


def keep_pictures(opts: Namespace, task: Task, predict: Predict, log: Logger, iterations: int) -> None:
    """Write image, labels and prediction of some test images beside the results, and panels of them to TensorBoard with `--visualize`.

    If they cannot be written, a note is logged and the run continues: the scores are recorded already.

    Args:
        opts: pictures, visualize and where the results are.
        task: the step that was tested.
        predict: the network that was tested.
        log: where TensorBoard's pictures and the note go.
        iterations: that were trained, the abscissa in TensorBoard.
    """
    if opts.pictures == 0:
        return
    shown = dataset.pictured(opts, task, opts.pictures)
    images, truths = zip(*(shown[position] for position in range(len(shown))))
    masks = [prediction.byte().numpy() for prediction in predict(images)]
    pixels = [denormalise(image).permute(1, 2, 0).numpy() for image in images]  # 3×H×W → H×W×3
    samples = [Sample(*parts) for parts in zip(pixels, (truth.numpy() for truth in truths), masks)]
    names, ids = dataset.class_names(opts), task.at(task.last_step).label_ids
    legend = Legend.of_task([names[label] for label in ids], ids, dataset.colours(opts))
    panels = [pictures.panel(sample, legend, f"{task.name}, after step {task.step}") for sample in samples]
    folder = pictures.folder_of(results.csv_path(opts, task))
    try:
        pictures.write(folder, task.step, samples, legend)
        pictures.write_panels(folder, task.step, panels)
    except OSError as error:
        log.info(f"note: the pictures of step {task.step} are not kept: {error}")
    for number, panel in enumerate(panels if opts.visualize else ()):
        log.image(f"test/picture{number}", panel, iterations)
