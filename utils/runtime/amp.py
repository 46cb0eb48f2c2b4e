"""Mixed precision for the official `--opt_level`, by torch.amp, or by NVIDIA's apex with `--amp_backend apex`.

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

from utils.runtime import gate

#: First loss scale of float16 training, torch's own default.
INITIAL_SCALE = 2.0**16


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in at least float32: half precision is converted to float32, float32 and float64 are returned unchanged.

    Losses call this on outputs of the network, because a sum over 10^5 pixels exceeds the range of float16.
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
        dtype: in which autocast computes; None: that of the parameters.
        scaler: gradient scaler, active for float16 only.
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
        """A line for the log that says which precision an official level stands for."""
        if self.dtype is None:
            return "precision: float32 (O0)"
        name = str(self.dtype).removeprefix("torch.")
        scaled = " with a gradient scaler" if self.scaler.is_enabled() else ""
        mapped = "" if opt_level == "O1" else f"; {opt_level} is mapped to O1, torch.amp keeps float32 weights"
        return f"precision: autocast {name}{scaled} ({opt_level}{mapped})"

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        """Model and optimiser, prepared for the backend; torch.amp needs no change of them."""
        return model, optimizer

    def autocast(self) -> contextlib.AbstractContextManager:
        """Context of every forward pass."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    @property
    def gradient_scale(self) -> float:
        """Factor of the loss that keeps small float16 gradients from becoming 0; 1 without a scaler."""
        return self.scaler.get_scale() if self.scaler.is_enabled() else 1.0

    def scale_on_device(self) -> Tensor | float:
        """`gradient_scale`, without a wait for the device."""
        return self.scaler.scale(torch.ones((), device=self.device)) if self.scaler.is_enabled() else 1.0

    @property
    def gates(self) -> bool:
        """Whether the optimiser's step can be withheld on the device, see `utils.runtime.gate`."""
        return self.allows_fused_step

    @property
    def allows_fused_step(self) -> bool:
        """Whether the fused step can be used.

        With a scaler only where `Trainer` initialises the momenta: if the first step overflows, torch's fused SGD keeps momenta that
        were allocated and not initialised.
        """
        return not self.scaler.is_enabled() or gate.asynchronous(self.device)

    def backward(self, loss: Tensor, optimizer: Optimizer, accepted: Tensor | None = None) -> None:
        """Backward pass, after which the gradients are unscaled.

        Args:
            loss: scalar.
            optimizer: of the parameters.
            accepted: 0-d bool; if it is false, the scaler finds NaN in the gradients.
        """
        if self.scaler.is_enabled() and accepted is not None:
            loss = loss * torch.where(accepted, 1.0, torch.nan)
        self.scaler.scale(loss).backward()
        if self.scaler.is_enabled():
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer, accepted: Tensor | None = None) -> None:
        """Update the parameters; after an overflow in float16, skip the update and lower the scale instead.

        Args:
            optimizer: of the parameters; its step is fused if `accepted` is given.
            accepted: 0-d bool; if it is false, parameters, momenta and the scale stay as they are.
        """
        if accepted is None:
            self.scaler.step(optimizer)
            self.scaler.update()
        elif not self.scaler.is_enabled():
            fused: Any = optimizer
            fused.found_inf = (~accepted).float()  # the fused step reads it on the device, as with a scaler
            fused.step()
            del fused.found_inf
        else:
            before = self.scale_on_device()
            self.scaler.step(optimizer)
            self.scaler.update()
            self.scaler.update(torch.where(accepted, self.scale_on_device(), before))

    def state_dict(self) -> dict[str, Any]:
        """State of the scaler."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the scaler."""
        if state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state)


class ApexPrecision(Precision):
    """Mixed precision by NVIDIA's apex, to repeat a run of the official program with the same arithmetic."""

    def __init__(self, opts: Namespace, device: torch.device):
        from apex import amp  # an optional dependency, present only where the user built it

        self.amp = amp
        self.level = opts.opt_level
        self.device = device
        self.dtype = None
        self.scaler = torch.amp.GradScaler(device.type, enabled=False)

    def describe(self, opt_level: str) -> str:
        """A line for the log that names the backend."""
        return f"precision: apex.amp {opt_level}"

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        """Let apex patch model and optimiser."""
        return self.amp.initialize(model, optimizer, opt_level=self.level)

    @property
    def allows_fused_step(self) -> bool:
        """No: apex patches the plain step."""
        return False

    def backward(self, loss: Tensor, optimizer: Optimizer, accepted: Tensor | None = None) -> None:
        """Backward pass under apex's scaler, which unscales on leaving the context."""
        with self.amp.scale_loss(loss, optimizer) as scaled:
            scaled.backward()

    def step(self, optimizer: Optimizer, accepted: Tensor | None = None) -> None:
        """Update the parameters; apex has patched the optimiser to skip overflows."""
        optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """State of apex's scalers."""
        return self.amp.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore apex's scalers."""
        if state:
            self.amp.load_state_dict(state)


def build(opts: Namespace, device: torch.device) -> Precision:
    """Make the precision that the options choose.

    Args:
        opts: opt_level, amp_dtype, amp_backend.
        device: where the run computes.

    Returns:
        The precision.
    """
    return ApexPrecision(opts, device) if opts.amp_backend == "apex" else Precision(opts, device)
