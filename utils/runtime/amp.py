"""Mixed precision behind the official `--opt_level`, with torch.amp, or with NVIDIA's apex where the user asks for it.

| --opt_level | here |
| --- | --- |
| O0 | float32 everywhere |
| O1 | autocast: float16 with a gradient scaler on CUDA, bfloat16 on the CPU; --amp_dtype chooses |
| O2, O3 | as O1: torch.amp keeps float32 weights, so "almost half" and "pure half" have no counterpart |
"""

from __future__ import annotations

import contextlib
import importlib.util
from argparse import Namespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

#: First loss scale of float16 training, torch's own default.
INITIAL_SCALE = 2.0**16


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in at least float32: half precision is widened, float32 and float64 pass through untouched.

    Losses call this on network outputs, because a sum over 10^5 pixels leaves the range of float16.
    """
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def apex_available() -> bool:
    """Whether NVIDIA's apex with its `amp` can be imported. The package named apex on PyPI is another program without it."""
    with contextlib.suppress(ImportError, ValueError):
        return importlib.util.find_spec("apex.amp") is not None
    return False


class Precision:
    """Autocast and loss scaling of a run.

    Args:
        opts: opt_level, amp_dtype.
        device: where the run computes.

    Attributes:
        dtype: what autocast computes in, or None for the parameters' own type.
        scaler: gradient scaler, active for float16 alone.
    """

    def __init__(self, opts: Namespace, device: torch.device):
        self.device = device
        self.dtype = self._autocast_dtype(opts, device)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=INITIAL_SCALE, enabled=self.dtype is torch.float16)

    @staticmethod
    def _autocast_dtype(opts: Namespace, device: torch.device) -> torch.dtype | None:
        if opts.opt_level == "O0":
            return None
        if opts.amp_dtype is not None:
            return getattr(torch, opts.amp_dtype)
        return torch.float16 if device.type == "cuda" else torch.bfloat16

    def describe(self, opt_level: str) -> str:
        """One line that says what the official level means here."""
        if self.dtype is None:
            return "precision: float32 (O0)"
        name = str(self.dtype).removeprefix("torch.")
        scaled = " with a gradient scaler" if self.scaler.is_enabled() else ""
        mapped = "" if opt_level == "O1" else f"; {opt_level} is mapped to O1, torch.amp keeps float32 weights"
        return f"precision: autocast {name}{scaled} ({opt_level}{mapped})"

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        """Model and optimiser as the backend wants them; torch.amp takes them as they are."""
        return model, optimizer

    def autocast(self) -> contextlib.AbstractContextManager:
        """Context of every forward pass."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    @property
    def gradient_scale(self) -> float:
        """Scale under which small float16 gradients survive; 1 without a scaler."""
        return self.scaler.get_scale() if self.scaler.is_enabled() else 1.0

    @property
    def allows_fused_step(self) -> bool:
        """Not with a scaler: torch's fused SGD allocates its momentum without filling it, and keeps that if the first step overflows."""
        return not self.scaler.is_enabled()

    def backward(self, loss: Tensor, optimizer: Optimizer) -> None:
        """Backward pass that leaves true, unscaled gradients behind."""
        self.scaler.scale(loss).backward()
        if self.scaler.is_enabled():
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer) -> None:
        """Move the parameters, or skip the move and lower the scale when float16 overflowed."""
        self.scaler.step(optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """State of the scaler."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the scaler."""
        if state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state)


class ApexPrecision(Precision):
    """The same through NVIDIA's apex, for those who must repeat a run of the official program on its own arithmetic."""

    def __init__(self, opts: Namespace, device: torch.device):
        from apex import amp  # an optional dependency, present only where the user built it

        self.amp = amp
        self.level = opts.opt_level
        self.device = device
        self.dtype = None
        self.scaler = torch.amp.GradScaler(device.type, enabled=False)

    def describe(self, opt_level: str) -> str:
        """One line that says which backend computes."""
        return f"precision: apex.amp {opt_level}"

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        """Let apex patch model and optimiser."""
        return self.amp.initialize(model, optimizer, opt_level=self.level)

    @property
    def allows_fused_step(self) -> bool:
        """No: apex patches the plain step."""
        return False

    def backward(self, loss: Tensor, optimizer: Optimizer) -> None:
        """Backward pass under apex's scaler, which unscales on leaving the context."""
        with self.amp.scale_loss(loss, optimizer) as scaled:
            scaled.backward()

    def step(self, optimizer: Optimizer) -> None:
        """apex patches the optimiser's own step to skip overflows."""
        optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """State of apex's scalers."""
        return self.amp.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore apex's scalers."""
        if state:
            self.amp.load_state_dict(state)


def build(opts: Namespace, device: torch.device) -> Precision:
    """The precision that the options name.

    Args:
        opts: opt_level, amp_dtype, amp_backend.
        device: where the run computes.

    Returns:
        A precision policy.
    """
    return ApexPrecision(opts, device) if opts.amp_backend == "apex" else Precision(opts, device)
