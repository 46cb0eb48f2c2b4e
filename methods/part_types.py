"""What a part is given and what it declares: the state of step t−1, and the rules of its options."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from utils.errors import UserError


class Previous(NamedTuple):
    """What step t−1 left for a part; both are empty at step 0.

    Attributes:
        state: what the part's own `state_dict` returned at the end of step t−1; empty where that step had no such part.
        weights: the network of step t−1 as its checkpoint stores it, by parameter and buffer name.
        file: name of that checkpoint, for messages.
    """

    state: Mapping[str, Any] = {}
    weights: Mapping[str, Tensor] = {}
    file: str = "the checkpoint of the previous step"

    @classmethod
    def of_part(cls, checkpoint: Mapping[str, Any], state_key: str) -> Previous:
        """What a checkpoint holds for a part.

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


class Rules(NamedTuple):
    """What the command line may ask of a part; `argparser.check` reads the rules of all parts.

    Attributes:
        ranges: least and greatest value by dest, both inclusive.
        exclusive: pairs of (sentence for the first option, whether it is given, the same for the second); both given is refused.
        requires: (dest, sentence for what it needs, whether that is given); a given dest without it is refused.
    """

    ranges: Mapping[str, tuple[float, float]] = {}
    exclusive: Sequence[tuple[str, Callable[[Namespace], bool], str, Callable[[Namespace], bool]]] = ()
    requires: Sequence[tuple[str, str, Callable[[Namespace], bool]]] = ()
