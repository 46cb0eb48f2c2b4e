"""Iterations whose losses the host reads one iteration later, so that it never waits for the device.

A training must not use a loss that is not finite, or that diverges: `Trainer` then skips the batch or ends, with the state before it.
To know the losses, the host would wait in every iteration until the device has computed them, and the device would then wait
for the host. With the gate the device decides whether the update is made:

    message = agree(total, terms, requests)   # losses and requests, averaged over processes
    accepted = acceptable(message, limit)     # 0-d, on the device
    outcome = Outcome(...)                    # starts the copy to the host and does not wait for it
    ...                                       # backward pass; the optimiser updates nothing unless accepted
    outcome.read()                            # before the next iteration

Without acceptance, weights, momenta, λ, running statistics and the state of the method are not changed. The trainer reads this before the
next iteration, repeats the iteration, reads its losses at once, and continues as on a CPU, with the same messages, counts and files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from utils.runtime import distributed
from utils.types import Batch

#: Types of devices that compute while the host goes on.
ASYNCHRONOUS = ("cuda",)


def asynchronous(device: torch.device) -> bool:
    """Whether a device computes while the host goes on."""
    return device.type in ASYNCHRONOUS


class ForwardPass(NamedTuple):
    """Result of an iteration before its backward pass.

    Attributes:
        batch: its taps are released.
        loss: scalar, with its graph.
        names: of the losses, the total last.
        message: of `agree`.
    """

    batch: Batch
    loss: Tensor
    names: tuple[str, ...]
    message: Tensor


class Requests(NamedTuple):
    """Requests of a process to all processes.

    Attributes:
        stop: number of the signal to stop on, or 0.
        save: whether it is time to save the state.
    """

    stop: int = 0
    save: bool = False


def agree(total: Tensor, terms: Mapping[str, Tensor], requests: Requests) -> Tensor:
    """Losses and requests in one message, averaged over processes.

    Args:
        total: scalar, the total loss.
        terms: the n loss terms by name.
        requests: of this process.

    Returns:
        (n + 3,) on the device: terms, total, and means of the stop and save requests, above 0 if any process has one.
    """
    losses = torch.stack([value.detach().reshape(()) for value in (*terms.values(), total)])  # n+1
    # Filled on the device: a tensor made of a Python number would be copied to it, which waits
    asked = [losses.new_full((1,), float(request)) for request in requests]
    return distributed.mean_(torch.cat([losses, *asked]))  # n+3


def acceptable(message: Tensor, limit: float) -> Tensor:
    """Whether an iteration may update the parameters.

    Args:
        message: of `agree`.
        limit: greatest |total| that does not diverge.

    Returns:
        0-d bool: all losses are finite, and the total is within the limit.
    """
    losses = message[:-2]
    return losses.isfinite().all() & (losses[-1].double().abs() <= limit)


@dataclass
class Outcome:
    """Losses of an iteration that are copied to the host, and what a repetition of the iteration needs.

    Args:
        names: of the losses, the total last.
        message: of `agree`.
        accepted: of `acceptable`.
        batch: images and labels as the loader gave them.
        kept: attributes before the iteration.
    """

    names: tuple[str, ...]
    message: Tensor
    accepted: Tensor
    batch: tuple[Tensor, Tensor]
    kept: Kept
    _copied: torch.cuda.Event | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        joined = torch.cat([self.message, self.accepted.to(self.message.dtype)[None]])
        self.message = joined.to("cpu", non_blocking=True)  # to pinned memory
        if joined.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> tuple[bool, dict[str, float], Requests]:
        """Wait for the copy: it was started in the forward pass, so the device still has the backward pass to compute.

        Returns:
            Whether the iteration was accepted, its losses by name, and the requests of any process.
        """
        if self._copied is not None:
            self._copied.synchronize()
        *losses, stop, save, accepted = self.message.tolist()
        return bool(accepted), dict(zip(self.names, losses)), Requests(stop > 0, save > 0)


class Kept:
    """Shallow copies of the attributes of objects, such as balancer and parts, that an iteration assigns new values to.

    Args:
        objects: tensors that they hold are not copied; their hooks change these only in accepted iterations.
    """

    def __init__(self, objects: Iterable[Any]) -> None:
        self._kept = [(item, dict(vars(item))) for item in objects]

    def restore(self) -> None:
        """Assign the attributes their earlier values."""
        for item, attributes in self._kept:
            vars(item).clear()
            vars(item).update(attributes)


class KeptBuffers:
    """Copies of the buffers of a network, which the forward pass of its norms changes in place.

    Args:
        network: whose buffers.
    """

    def __init__(self, network: nn.Module) -> None:
        self._types = {name: buffer.dtype for name, buffer in network.named_buffers()}
        self._by_type: dict[torch.dtype, list[Tensor]] = {}
        for buffer in network.buffers():
            self._by_type.setdefault(buffer.dtype, []).append(buffer)
        self._kept = {dtype: _joined(buffers) for dtype, buffers in self._by_type.items()}

    @torch.no_grad()
    def restore(self, accepted: Tensor | None = None) -> None:
        """Restore the earlier values of the buffers; call it after the backward pass, which reads the buffers.

        Args:
            accepted: 0-d bool on the device; if it is true, the buffers are not changed.
        """
        for dtype, buffers in self._by_type.items():
            kept = self._kept[dtype]
            chosen = kept if accepted is None else torch.where(accepted, _joined(buffers), kept)
            torch._foreach_copy_(buffers, _parted(chosen, buffers))

    def named(self) -> dict[str, Tensor]:
        """The copies by name."""
        parts = {dtype: iter(_parted(self._kept[dtype], buffers)) for dtype, buffers in self._by_type.items()}
        return {name: next(parts[dtype]) for name, dtype in self._types.items()}


def _joined(tensors: list[Tensor]) -> Tensor:
    """The numbers of tensors of one type in one vector: one operation on the device instead of hundreds."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _parted(joined: Tensor, like: list[Tensor]) -> list[Tensor]:
    """The inverse of `_joined`: views."""
    return [part.view_as(one) for part, one in zip(joined.split([one.numel() for one in like]), like)]
