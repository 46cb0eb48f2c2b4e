"""metrics/: scores worked out by hand."""

import pytest
import torch

from metrics.stream_metrics import StreamSegMetrics


def scored(labels, predictions, classes):
    metrics = StreamSegMetrics(classes)
    metrics.update(torch.tensor([[labels]]), torch.tensor([[predictions]]))
    return metrics


def test_scores_by_hand():
    #   truth 0: 4 pixels, 3 hit; truth 1: 2 pixels, 1 hit, 1 called 0; class 2 is absent, and predicted once
    metrics = scored([0, 0, 0, 0, 1, 1], [0, 0, 0, 2, 1, 0], 3)
    assert metrics.confusion_matrix.tolist() == [[3, 0, 1], [1, 1, 0], [0, 0, 0]]
    scores = metrics.get_results()
    iou = {0: 3 / 5, 1: 1 / 2}  # hits / (truth + predicted - hits)
    assert scores["Class IoU"] == {0: pytest.approx(iou[0]), 1: pytest.approx(iou[1]), 2: None}
    assert scores["Class Acc"] == {0: pytest.approx(3 / 4), 1: pytest.approx(1 / 2), 2: None}
    assert scores["Overall Acc"] == pytest.approx(4 / 6)
    assert scores["Mean Acc"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert scores["Mean IoU"] == pytest.approx((iou[0] + iou[1]) / 2)
    assert scores["FreqW Acc"] == pytest.approx(4 / 6 * iou[0] + 2 / 6 * iou[1])
    assert scores["Total samples"] == 6


def test_ignored_pixels_count_nowhere():
    plain = scored([0, 1, 1], [0, 1, 0], 2)
    ignoring = scored([0, 255, 1, 7, 1, -1], [0, 1, 1, 0, 0, 1], 2)
    assert torch.equal(plain.confusion_matrix, ignoring.confusion_matrix)


def test_batches_add_up_and_reset_forgets():
    first, second = scored([0, 1], [0, 0], 2), scored([1, 1], [1, 0], 2)
    both = scored([0, 1], [0, 0], 2)
    both.update(torch.tensor([[[1, 1]]], dtype=torch.uint8), torch.tensor([[[1, 0]]]))
    assert torch.equal(both.confusion_matrix, first.confusion_matrix + second.confusion_matrix)
    both.reset()
    assert both.confusion_matrix.sum() == 0


def test_nothing_but_ignored_pixels():
    scores = scored([255, 255], [0, 1], 2).get_results()
    assert scores["Class IoU"] == {0: None, 1: None}
    assert scores["Mean IoU"] == scores["Overall Acc"] == scores["Mean Acc"] == scores["FreqW Acc"] == 0.0


def test_one_matrix_of_many_pixels_is_exact():
    torch.manual_seed(0)
    labels, predictions = torch.randint(0, 5, (3, 40, 50)), torch.randint(0, 5, (3, 40, 50))
    metrics = StreamSegMetrics(5)
    metrics.update(labels, predictions)
    expected = [[int(((labels == i) & (predictions == j)).sum()) for j in range(5)] for i in range(5)]
    assert metrics.confusion_matrix.tolist() == expected
