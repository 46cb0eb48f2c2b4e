"""The state of step t−1, as a part gets it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from utils.errors import UserError


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
