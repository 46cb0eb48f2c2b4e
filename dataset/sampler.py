"""The samples of each process and their order, which depend only on seed, step and epoch, so a run can continue at any batch."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dataset.base import JoinedSet, SegmentationSet
from dataset.draws import ClassDraws, ClassShares
from utils.errors import UserError
from utils.random_streams import TRAINING, stream_seed
from utils.runtime import distributed, memory, workers
from utils.runtime.signals import StopRequest


class EpochSampler(Sampler[int]):
    """The samples of a shuffled epoch, distributed over the processes in turn; incomplete last batches are dropped.

    The k-th batches of all processes together are the k-th batch of one process with a batch size multiplied by their number.

    Args:
        length: size of the data set.
        batch_size: per process.
        seed: of the run.
        rank, world_size: this process and how many there are.
        step: of the task; each step has its own order.
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
        """Choose the epoch, and its first batch, of the next pass."""
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
    """The samples of one process of an evaluation; all processes together have each sample exactly once.

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


class Loader:
    """Batches of a data set, loaded by worker processes.

    Args:
        data: the samples. It is pickled for each worker.
        sampler: which samples, in which order.
        batch_size: samples of a batch.
        opts: num_workers, random_seed.
        pin_memory: put the batches into pinned memory, from which a GPU copies faster.
        lasting: for a training: complete batches only, and worker processes that are kept over epochs.
    """

    def __init__(
        self,
        data: Dataset,
        sampler: Iterable[int],
        batch_size: int,
        opts: Namespace,
        pin_memory: bool,
        lasting: bool = False,
    ):
        self.data, self.num_workers = data, opts.num_workers
        self._loader: DataLoader | None = DataLoader(
            data,
            batch_size,
            sampler=sampler,
            num_workers=opts.num_workers,
            pin_memory=pin_memory,
            drop_last=lasting,
            persistent_workers=lasting and opts.num_workers > 0,
            worker_init_fn=workers.follow_training,
            multiprocessing_context=workers.START_METHOD if opts.num_workers > 0 else None,
            # Its own generator: starting an iterator must not change the state of torch's, which a resume restores
            generator=torch.Generator().manual_seed(opts.random_seed),
        )

    def __len__(self) -> int:
        assert self._loader is not None
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        assert self._loader is not None
        if self.num_workers == 0:
            yield from self._loader
            return
        workers.start_server()
        try:
            with workers.stall_watch():
                batches = iter(self._loader)
            while True:
                with workers.stall_watch():
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch
        except Exception as error:  # the run ends; torch would first wait five seconds for each process
            workers.kill_workers()
            if isinstance(error, (ConnectionError, EOFError)) and not str(error).startswith("Caught "):
                # A worker ended while its batch was fetched: the connection to it breaks. "Caught" begins the message of an error
                # that the data set itself raised in a worker.
                raise UserError(memory.WORKER_ENDED) from error
            raise

    def close(self) -> None:
        """End the worker processes now; otherwise they end when the loader is garbage collected."""
        self._loader = None


class TrainingBatches(Protocol):
    """Batches of a training set, which can be read from any position of any epoch."""

    def set_position(self, epoch: int, first_batch: int = 0, purpose: str = TRAINING) -> None:
        """Choose what the next pass reads.

        Args:
            epoch: its order and its random crops.
            first_batch: the batch that it begins with.
            purpose: what the batches are read for; each purpose has its own random crops.
        """
        ...

    @property
    def indices(self) -> np.ndarray:
        """Indices in the training split of the step's images, which a replay memory can store."""
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

    def class_shares(self) -> Tensor:
        """(N, 256) share of each class id in the annotation of each of this step's N images; all processes call it together."""
        ...

    def draws(self, positions: Sequence[int], label: int, count: int) -> Iterable[tuple[Tensor, Tensor]]:
        """Batches of random crops of some images, drawn with replacement; the same on every process that asks for them.

        Args:
            positions: of the images among the N.
            label: of the step; each has its own draws.
            count: number of crops.
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
        pin_memory: put the batches into pinned memory, from which a GPU copies faster.
    """

    def __init__(self, data: SegmentationSet | JoinedSet, sampler: EpochSampler, opts: Namespace, pin_memory: bool):
        self.data, self.sampler, self.opts, self.pin_memory = data, sampler, opts, pin_memory
        self.loader = Loader(data, sampler, sampler.batch_size, opts, pin_memory, lasting=True)

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
        return Loader(self.data, own, self.sampler.batch_size, self.opts, self.pin_memory)

    def class_shares(self) -> Tensor:
        """See `TrainingBatches`; each process reads its part of the annotations."""
        data, rank, world = self._own, distributed.rank(), distributed.world_size()
        shares = torch.zeros(len(data), 256, dtype=torch.float64)
        own = range(rank, len(data), world)
        for found, positions in Loader(ClassShares(data), own, self.sampler.batch_size, self.opts, pin_memory=False):
            shares[positions] = found
        return sum(distributed.gather_objects(shares), torch.zeros_like(shares))

    def draws(self, positions: Sequence[int], label: int, count: int) -> Iterable[tuple[Tensor, Tensor]]:
        """See `TrainingBatches`."""
        drawn = ClassDraws(self._own, positions, label, count)
        return Loader(drawn, range(count), self.sampler.batch_size, self.opts, self.pin_memory)

    @property
    def _own(self) -> SegmentationSet:
        """The images of the step itself, without those of a replay memory."""
        return self.data.parts[0] if isinstance(self.data, JoinedSet) else self.data

    def files(self, number: int) -> list[str]:
        """Names of the files of a batch of the chosen epoch."""
        return [name for index in self.sampler.batch(number) for name in self.data.files(index)]

    @property
    def indices(self) -> np.ndarray:
        """See `TrainingBatches`."""
        return self.data.indices

    def close(self) -> None:
        """End the worker processes now; otherwise they end when the loader is garbage collected."""
        self.loader.close()


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
        """See `TrainingBatches`; epoch and purpose have no effect."""
        self.first_batch = first_batch

    def __len__(self) -> int:
        return len(self.batches) - self.first_batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches[self.first_batch :])

    def every_image(self) -> Iterable[tuple[Tensor, Tensor]]:
        """See `TrainingBatches`."""
        return iter(self.batches)

    def class_shares(self) -> Tensor:
        """See `TrainingBatches`; the labels are taken as class ids."""
        labels = [label for _, batch in self.batches for label in batch.long()]
        return torch.stack([label.flatten().bincount(minlength=256) / label.numel() for label in labels])

    def draws(self, positions: Sequence[int], label: int, count: int) -> Iterable[tuple[Tensor, Tensor]]:
        """See `TrainingBatches`; returns the images in turn, without a crop."""
        samples = [pair for images, labels in self.batches for pair in zip(images, labels)]
        for number in range(count):
            image, mask = samples[positions[number % len(positions)]]
            yield image[None], mask[None]


class Interruptible:
    """Batches whose passes end early after a stop request, but not before the first batch.

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

    def class_shares(self) -> Tensor:
        """See `TrainingBatches`."""
        return self.batches.class_shares()

    def draws(self, positions: Sequence[int], label: int, count: int) -> Iterable[tuple[Tensor, Tensor]]:
        """See `TrainingBatches`."""
        return self._until_stopped(self.batches.draws(positions, label, count))

    def _until_stopped(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            yield batch
            if self.stop.signum:
                return
