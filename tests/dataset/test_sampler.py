"""A pass over every image, those included that fill no batch."""

import pytest
import torch

from dataset.sampler import EpochSampler, LoadedBatches
from dataset.step_data import StepData
from dataset.tasks import load
from tests.support import thin


def test_every_image_is_dealt_out_once_in_the_order_of_the_epoch():
    one = EpochSampler(23, 4, seed=1)
    parts = [EpochSampler(23, 2, seed=1, rank=rank, world_size=2) for rank in range(2)]
    order = one.indices(complete_batches=False)
    assert sorted(order) == list(range(23)) and order[:20] == one.indices()
    dealt = [part.indices(complete_batches=False) for part in parts]
    assert [order[0::2], order[1::2]] == dealt


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_over_every_image_has_the_crops_of_its_purpose_and_a_smaller_last_batch(workers):
    opts = thin.options(f"--num_workers {workers} --shapes_train 40 --batch_size 4", step=1)
    data = StepData(opts, load("shapes", "6-2", 1), torch.device("cpu"), replay=lambda make: [])
    batches: LoadedBatches = data.batches
    count = len(batches.data)
    assert count % 4 and len(batches) == count // 4
    passes = {}
    for purpose in ("training", "other", "training"):
        batches.set_position(0, purpose=purpose)
        passes.setdefault(purpose, []).append(list(batches.every_image()))
    (first, again), (other,) = passes["training"], passes["other"]
    assert [len(images) for images, _ in first] == [4] * (count // 4) + [count % 4]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again))
    assert not torch.equal(first[0][0], other[0][0])
    batches.set_position(0)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(batches, first))
    batches.close()
