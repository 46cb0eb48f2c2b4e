"""Which samples a process sees, in which order: a function of seed, step and epoch alone. A run can stop and continue anywhere."""

from __future__ import annotations

import multiprocessing
import signal
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dataset.base import JoinedSet, SegmentationSet
from utils.random_streams import TRAINING, stream_seed
from utils.runtime.signals import StopRequest, outlive_stop_signals

#: A process that loads data and hands over no batch for so long is stuck. Up to Python 3.11 one can be from its start: where a thread of
#: the back end is about to talk to Python in the moment of the fork, the child waits for that thread, which it does not have.
STALLED_SECONDS = 300


class EpochSampler(Sampler[int]):
    """A shuffled epoch, dealt out to the processes like cards; incomplete last batches are dropped.

    The union of the k-th batches of all processes is the k-th batch that one process would draw with their joint batch size.

    Args:
        length: size of the data set.
        batch_size: per process.
        seed: of the run.
        rank, world_size: this process and how many there are.
        step: of the task; steps have orders of their own.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, step: int = 0):
        self.length = length
        self.batch_size = batch_size
        self.seed, self.step = seed, step
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.first_batch = 0

    @property
    def batches(self) -> int:
        """Complete batches of an epoch."""
        return self.length // (self.batch_size * self.world_size)

    def set_position(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch, and the batch within it, that the next iteration starts with."""
        self.epoch = epoch
        self.first_batch = first_batch

    def indices(self, complete_batches: bool = True) -> list[int]:
        """This process's samples of the current epoch.

        Args:
            complete_batches: leave out the last samples, which do not fill a batch of all processes.
        """
        generator = torch.Generator().manual_seed(stream_seed(self.seed, "order", self.step, self.epoch))
        order = torch.randperm(self.length, generator=generator)
        if complete_batches:
            order = order[: self.batches * self.batch_size * self.world_size]
        return order[self.rank :: self.world_size].tolist()

    def batch(self, number: int) -> list[int]:
        """The samples of one batch of the current epoch."""
        return self.indices()[number * self.batch_size : (number + 1) * self.batch_size]

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices()[self.first_batch * self.batch_size :])

    def __len__(self) -> int:
        return (self.batches - self.first_batch) * self.batch_size


class PartSampler(Sampler[int]):
    """Every sample exactly once over all processes, in order: evaluation counts no image twice.

    Args:
        length: size of the data set.
        rank, world_size: this process and how many there are.
    """

    def __init__(self, length: int, rank: int = 0, world_size: int = 1):
        self.samples = range(rank, length, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.samples)

    def __len__(self) -> int:
        return len(self.samples)


def make_loader(
    data: Dataset, sampler: Iterable[int], batch_size: int, opts: Namespace, pin_memory: bool, lasting: bool = False
) -> DataLoader:
    """Batches of a data set.

    Args:
        data: what is loaded.
        sampler: which samples, in which order.
        batch_size: samples of a batch.
        opts: num_workers, random_seed.
        pin_memory: put the batches where a GPU fetches them faster.
        lasting: complete batches only, worker processes kept from epoch to epoch, as a training wants it.
    """
    return DataLoader(
        data,
        batch_size,
        sampler=sampler,
        num_workers=opts.num_workers,
        pin_memory=pin_memory,
        drop_last=lasting,
        persistent_workers=lasting and opts.num_workers > 0,
        worker_init_fn=outlive_stop_signals,
        timeout=STALLED_SECONDS if opts.num_workers > 0 else 0,
        # A generator of its own: starting an iterator must not move torch's, which a resume restores.
        generator=torch.Generator().manual_seed(opts.random_seed),
    )


class TrainingBatches(Protocol):
    """Batches of a training set, which can be read from any position of any epoch."""

    def set_position(self, epoch: int, first_batch: int = 0, purpose: str = TRAINING) -> None:
        """Choose what the next pass reads.

        Args:
            epoch: its order and its random crops.
            first_batch: the batch that it begins with.
            purpose: what the batches serve; each purpose has its own random crops.
        """
        ...

    @property
    def indices(self) -> np.ndarray:
        """The images of the step by their place in the training split, which a replay memory can keep."""
        ...

    def __len__(self) -> int:
        """Batches of a pass from the chosen position on."""
        ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels) of each batch."""
        ...

    def every_image(self) -> Iterable[tuple[Tensor, Tensor]]:
        """One pass over this process's share of all images, those included that fill no batch: the last batch may be smaller.

        The n-th image of process r is the (r + n · processes)-th one of the chosen epoch's order, both counted from 0.
        """
        ...


class EvaluationBatches(Protocol):
    """Batches of a validation or test set, read from the first to the last."""

    def __len__(self) -> int:
        """Number of batches."""
        ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels) of each batch."""
        ...


class LoadedBatches:
    """The training batches of a process, read by a `DataLoader`.

    Args:
        data: the training set.
        sampler: of this process.
        opts: num_workers, random_seed.
        pin_memory: put the batches where a GPU fetches them faster.
    """

    def __init__(self, data: SegmentationSet | JoinedSet, sampler: EpochSampler, opts: Namespace, pin_memory: bool):
        self.data, self.sampler, self.opts, self.pin_memory = data, sampler, opts, pin_memory
        self.loader = make_loader(data, sampler, sampler.batch_size, opts, pin_memory, lasting=True)

    def set_position(self, epoch: int, first_batch: int = 0, purpose: str = TRAINING) -> None:
        """See `TrainingBatches`."""
        self.sampler.set_position(epoch, first_batch)
        self.data.set_epoch(epoch, purpose)

    def __len__(self) -> int:
        return self.sampler.batches - self.sampler.first_batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.loader)

    def every_image(self) -> Iterable[tuple[Tensor, Tensor]]:
        """See `TrainingBatches`; its worker processes end with the pass."""
        own = self.sampler.indices(complete_batches=False)
        return make_loader(self.data, own, self.sampler.batch_size, self.opts, self.pin_memory)

    def files(self, number: int) -> list[str]:
        """Names of the files of a batch of the chosen epoch."""
        return [name for index in self.sampler.batch(number) for name in self.data.files(index)]

    @property
    def indices(self) -> np.ndarray:
        """See `TrainingBatches`."""
        return self.data.indices

    def close(self) -> None:
        """End the worker processes now, and not when the garbage collector finds the loader."""
        end_workers(self.loader)


class FixedBatches:
    """The same batches in every epoch, for benchmarks and tests.

    Args:
        batches: (images, labels) of each.
    """

    def __init__(self, batches: Sequence[tuple[Tensor, Tensor]]):
        self.batches = list(batches)
        self.first_batch = 0

    @property
    def indices(self) -> np.ndarray:
        """See `TrainingBatches`; the batches stand for themselves."""
        return np.arange(len(self.batches))

    def set_position(self, epoch: int, first_batch: int = 0, purpose: str = TRAINING) -> None:
        """See `TrainingBatches`; epoch and purpose change nothing."""
        self.first_batch = first_batch

    def __len__(self) -> int:
        return len(self.batches) - self.first_batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches[self.first_batch :])

    def every_image(self) -> Iterable[tuple[Tensor, Tensor]]:
        """See `TrainingBatches`."""
        return iter(self.batches)


class Interruptible:
    """Batches whose passes end early, after at least one batch, once a stop is asked for.

    Args:
        batches: what is read.
        stop: the process's stop request.
    """

    def __init__(self, batches: TrainingBatches, stop: StopRequest):
        self.batches = batches
        self.stop = stop

    def set_position(self, epoch: int, first_batch: int = 0, purpose: str = TRAINING) -> None:
        """See `TrainingBatches`."""
        self.batches.set_position(epoch, first_batch, purpose)

    @property
    def indices(self) -> np.ndarray:
        """See `TrainingBatches`."""
        return self.batches.indices

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._until_stopped(self.batches)

    def every_image(self) -> Iterable[tuple[Tensor, Tensor]]:
        """See `TrainingBatches`."""
        return self._until_stopped(self.batches.every_image())

    def _until_stopped(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            yield batch
            if self.stop.signum:
                return


def kill_workers() -> None:
    """End every process that loads data: one that is stuck does not hear SIGTERM, and Python would wait for it at its exit."""
    left = [process for process in multiprocessing.active_children() if process.daemon]
    if not left:
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error for each of them
    for process in left:
        process.kill()
        process.join()
    signal.signal(signal.SIGCHLD, before)


def end_workers(loader: DataLoader) -> None:
    """End the worker processes that a loader keeps between epochs, now and not when the garbage collector finds it.

    Args:
        loader: may have none.
    """
    iterator = getattr(loader, "_iterator", None)  # torch offers no public way
    if iterator is not None:
        loader._iterator = None
        iterator._shutdown_workers()
