"""Tensors of device "cuda" on a machine without one: torch's FakeTensorMode knows their shapes, types and devices, and no values.

A pass through fake tensors raises an error where an operation mixes devices. The modes of this file answer what the host reads from
the device, count it, and refuse large copies from the host. The backward pass needs a real device.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda", 0)
#: Elements of a tensor that may be copied from the host to the device in an iteration: a vector of classes or terms, no image.
SMALL_COPY = 256

__all__ = [
    "DEVICE",
    "SMALL_COPY",
    "HostReads",
    "counting",
    "fake_cuda",
    "on_device",
    "tensors_of",
    "unset_fake_temporarily",
]


class HostReads(TorchDispatchMode):
    """Counts what the host reads from tensors, and copies of a tensor from the host to the device.

    Args:
        answer: whether to answer the reads, as fake tensors need it: numbers are 1, and half of the elements are not zero.

    Attributes:
        reads: by operation.
        copies: shapes of the copied tensors of more than `SMALL_COPY` elements.
    """

    def __init__(self, answer: bool = False) -> None:
        super().__init__()
        self.answer = answer
        self.reads: Counter[str] = Counter()
        self.copies: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2"):
            self.reads[name] += 1
            if self.answer:
                return self._answer(name, args, kwargs)
        if name == "index" and self.answer and any(_is_mask(index) for index in args[1]):
            (mask,) = (index for index in args[1] if _is_mask(index))
            self.reads["nonzero"] += 1
            rows = self._answer("nonzero", (mask,), {}).unbind(1)
            at = next(place for place, index in enumerate(args[1]) if _is_mask(index))
            args = (args[0], [*args[1][:at], *rows, *args[1][at + 1 :]])
        out = func(*args, **kwargs)
        source = args[1] if name == "copy_" else args[0] if name == "_to_copy" else None
        if source is not None and source.device.type == "cpu" and out.device.type != "cpu":
            self.copies += [tuple(source.shape)] if source.numel() > SMALL_COPY else []
        return out

    def _answer(self, name: str, args: Any, kwargs: Any) -> Any:
        first = args[0]
        half = max(1, first.numel() // 2)
        if name == "_local_scalar_dense":
            return True if first.dtype is torch.bool else 1.0 if first.is_floating_point() else 1
        if name == "nonzero":
            return first.new_zeros(half, first.dim(), dtype=torch.int64)
        if name == "masked_select":
            return first.new_zeros(
                first.shape[1] * max(1, args[1].numel() // 2)
            )  # features (B, D, h, w) by a mask (B, 1, h, w)
        if name == "bincount":
            return first.new_zeros(max(1, kwargs.get("minlength", args[2] if len(args) > 2 else 0)))
        values = first.new_zeros(half)
        return values, first.new_zeros(first.shape, dtype=torch.int64), first.new_zeros(half, dtype=torch.int64)


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype is torch.bool


@contextlib.contextmanager
def counting(answer: bool = False) -> Iterator[HostReads]:
    """Count reads by dispatched operations, and those by `tolist`, `cpu` and `numpy` of real tensors, which are not dispatched."""
    mode = HostReads(answer)

    def counted(name: str) -> Any:
        read = getattr(Tensor, name)

        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            mode.reads[name] += 1
            return read(tensor, *args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for name in ("tolist", "cpu", "numpy"):
            stack.enter_context(mock.patch.object(Tensor, name, counted(name)))
        stack.enter_context(mode)
        yield mode


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """A machine whose tensors are fake; autocast of "cuda" is possible on it."""
    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        mock.patch("torch.cuda.is_bf16_supported", lambda *_, **__: True),
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
    ):
        yield mode


def on_device(module: nn.Module) -> nn.Module:
    """A real module, its parameters and buffers replaced by fakes on the device; call it within `fake_cuda`."""
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            fake = torch.empty_like(parameter, device=DEVICE)
            layer._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
        layer._buffers |= {
            name: torch.empty_like(buffer, device=DEVICE) for name, buffer in layer.named_buffers(recurse=False)
        }
    return module


def tensors_of(value: Any) -> Iterator[tuple[str, Tensor]]:
    """All tensors in a nested structure, with their place in it."""
    if isinstance(value, Tensor):
        yield "", value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from ((f"/{key}{place}", tensor) for place, tensor in tensors_of(item))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from ((f"/{number}{place}", tensor) for place, tensor in tensors_of(item))
    elif hasattr(value, "__dataclass_fields__"):
        yield from tensors_of(vars(value))
