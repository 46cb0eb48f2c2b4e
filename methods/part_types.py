"""What `methods.base.Part` is made of: the state of step t−1, and the hooks after the forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from segmentation_module import SegmentationModel
from utils.errors import UserError
from utils.types import Batch


class Previous(NamedTuple):
    """State and weights of step t−1; both are empty at step 0.

    Attributes:
        state: what the `state_dict` of the same part returned at the end of step t−1; empty if that step had no such part.
        weights: the network of step t−1 as its checkpoint stores it, by parameter and buffer name.
        file: name of that checkpoint, for messages.
    """

    state: Mapping[str, Any] = {}
    weights: Mapping[str, Tensor] = {}
    file: str = "the checkpoint of the previous step"

    @classmethod
    def of_part(cls, checkpoint: Mapping[str, Any], state_key: str) -> Previous:
        """State and weights in a checkpoint, for one part.

        Args:
            checkpoint: of step t−1 as `utils.checkpointing.store.read` returns it; empty at step 0.
            state_key: of the part.

        Raises:
            UserError: the states of the parts are no dictionary.
        """
        file = checkpoint.get("file", "the checkpoint of the previous step")
        states: dict[str, Any] = {}
        for key in ("trainer_state", "method_state"):
            found = checkpoint.get(key)
            if found is None:
                continue
            if not isinstance(found, dict):
                raise UserError(
                    f"{file} has a {key} that is a {type(found).__name__}, not a dictionary; train that step again, or name "
                    "another file with --step_ckpt"
                )
            states |= found
        own = states.get(state_key) if state_key else None
        return cls({} if own is None else own, checkpoint.get("model_state", {}), file)

    def entry(self, name: str) -> Any:
        """An entry of the state; None if there is none, or if the state of a crafted file is no dictionary."""
        state: object = self.state
        return state.get(name) if isinstance(state, dict) else None


class GatedHooks:
    """The hooks of a part that an iteration calls after its losses.

    On CUDA the host may learn after them that the losses are not finite (`utils.runtime.gate`). The trainer then restores the attributes
    of the part, and repeats the iteration or skips it. What the hooks change in place must not change in such an iteration.

    Attributes:
        accepted: 0-d bool on the device, false if the iteration does not count; None where the host has checked the losses.
    """

    #: Whether the two hooks change tensors in place only where `accepted` is true. A part that defines one of the hooks and does not
    #: set this has the host read the losses before the backward pass of every iteration.
    gated: ClassVar[bool] = False
    accepted: Tensor | None = None

    @property
    def takes_part(self) -> bool:
        """Whether the host may read the losses later."""
        mine, base = type(self), GatedHooks
        defined = mine.after_backward is not base.after_backward or mine.after_step is not base.after_step
        return self.gated or not defined

    @property
    def assigned(self) -> Iterable[Any]:
        """Objects whose attributes are restored if an iteration does not count: those to which hooks assign new values."""
        return (self,)

    def after_backward(self, model: SegmentationModel) -> None:
        """Add to the gradients. Called after the main backward pass and before the optimiser's step."""

    def after_step(self, model: SegmentationModel, batch: Batch) -> None:
        """Called after the step of the optimiser. The batch has its labels; its taps are released."""
