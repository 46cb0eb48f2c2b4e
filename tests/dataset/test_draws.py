"""Random crops of single classes, and the shares of classes in whole annotations."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dataset.draws import ClassDraws, ClassShares
from dataset.sampler import EpochSampler, FixedBatches, LoadedBatches
from tests.support.tiny_folder import build, options, write_folder


@pytest.fixture
def data(tmp_path):
    """The ten training images of step 0, all classes of which are learned: 2 and 1."""
    return build(write_folder(tmp_path)).train


def test_shares_are_those_of_the_whole_annotation(data):
    """Bands of background, a class and 255, 3 columns each, in an image of 24 columns: 9, 9 and 6; classes of other steps count too."""
    shares = ClassShares(data)
    positions = {int(index): position for position, index in enumerate(data.indices)}
    found, _ = shares[positions[0]]  # shows class 1
    assert found.shape == (256,) and float(found.sum()) == pytest.approx(1)
    assert [float(found[k]) for k in (0, 1, 255)] == pytest.approx([9 / 24, 9 / 24, 6 / 24])
    assert float(shares[positions[5]][0][3]) > 0  # class 3 belongs to a later step


@pytest.mark.parametrize("workers", [0, 2])
def test_draws_do_not_depend_on_workers_or_the_epoch(data, workers):
    draws = ClassDraws(data, [1, 4], label=1, length=6)
    first = [draws[number] for number in range(6)]
    data.set_epoch(3)
    loader = DataLoader(draws, 2, sampler=range(6), num_workers=workers)
    again = [pair for images, labels in loader for pair in zip(images, labels)]
    assert all(torch.equal(a, b) for one, other in zip(first, again) for a, b in zip(one, other))


def test_draws_are_with_replacement_and_each_label_has_its_own(data):
    positions = [0, 2, 3]
    taken = {"crop": []}
    data.crop = lambda position, stream: taken["crop"].append((position, stream)) or (torch.zeros(0), torch.zeros(0))
    for label in (1, 2):
        draws = ClassDraws(data, positions, label, 300)
        for number in range(300):
            draws[number]
    chosen, streams = zip(*taken["crop"])
    assert len(set(streams)) == 600
    counts = np.bincount(chosen[:300], minlength=4)
    assert counts[1] == 0 and (counts[positions] > 70).all() and (counts[positions] < 130).all()
    assert chosen[:300] != chosen[300:]


def test_batches_of_a_training_set(data, tmp_path):
    opts = options(tmp_path, num_workers=0, batch_size=2)
    batches = LoadedBatches(data, EpochSampler(len(data), 2, 42), opts, pin_memory=False)
    assert batches.class_shares().shape == (len(data), 256)
    drawn = list(batches.draws([0, 1], label=1, count=5))
    assert [len(images) for images, _ in drawn] == [2, 2, 1]


def test_fixed_batches_give_their_own_images():
    images, labels = torch.arange(4.0).view(2, 2, 1, 1, 1), torch.tensor([[0, 1], [1, 1]])
    batches = FixedBatches([(images[i], labels[i].view(2, 1, 1)) for i in range(2)])
    assert batches.class_shares()[:, 1].tolist() == [0, 1, 1, 1]
    assert [float(image) for image, _ in batches.draws([1, 3], label=1, count=3)] == [1, 3, 1]
