"""Pictures: Pascal's colours, strips, confusion matrices."""

import numpy as np
import torch

from utils.reporting import visualize


def test_colours_are_those_of_pascal_voc():
    colours = visualize.colour_map()
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    assert {number: tuple(colours[number]) for number in known} == known
    assert len({tuple(colour) for colour in colours}) == 256


def test_strip_by_hand():
    image = torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None, None].expand(3, 2, 2)
    strip = visualize.strip(image, torch.tensor([[0, 1], [255, 2]]), torch.tensor([[1, 1], [0, 0]]))
    assert strip.shape == (2, 6, 3) and strip.dtype == np.uint8
    assert strip[0, 0].tolist() == [124, 116, 104]
    assert strip[0, 2:4].tolist() == [[0, 0, 0], [128, 0, 0]]
    assert strip[1, 2:4].tolist() == [[255, 255, 255], [0, 128, 0]]
    assert strip[0, 4:].tolist() == [[128, 0, 0]] * 2


def test_confusion_picture():
    names = ["background", "cat", "dog"]
    certain = visualize.confusion_picture(torch.tensor([[9, 0, 0], [0, 3, 0], [0, 0, 0]]), names)
    spread = visualize.confusion_picture(torch.tensor([[3, 3, 3], [0, 3, 0], [0, 0, 0]]), names)
    assert certain.shape == spread.shape and certain.shape[2] == 3 and certain.dtype == np.uint8
    assert (certain != spread).any()
    scaled = visualize.confusion_picture(torch.tensor([[900, 0, 0], [0, 3, 0], [0, 0, 0]]), names)
    assert (certain == scaled).all()  # rows are shares of their class
