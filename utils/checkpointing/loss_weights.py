"""λ in a checkpoint: by term, as this program stores it, and as `head.lossweights`, as the official program does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.checkpointing import checkpoint_files
from utils.errors import UserError

#: Terms of `head.lossweights` in official checkpoints, in its order.
OFFICIAL_TERMS = ("ce", "mcd", "kd", "pod/stage1", "pod/stage2", "md/stage3", "md/stage4", "md/pre_logits", "md/logits")


def stacked(weights: Mapping[str, Tensor]) -> Tensor:
    """Stack λ by term (0-d tensors) to the (n,) tensor that a checkpoint stores."""
    return torch.stack([weight.detach().cpu().float() for weight in weights.values()])


def with_loss_weights(model_state: dict[str, Tensor], loss_weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add λ to the weights of the network at its official position, before the other weights of the head.

    Args:
        model_state: weights by name.
        loss_weights: λ by term; empty: nothing is added.
    """
    if not loss_weights:
        return model_state
    name, ordered = checkpoint_files.PREFIX + checkpoint_files.LOSS_WEIGHTS, {}
    module = name.rpartition(".")[0]
    for key, value in model_state.items():
        if key.startswith(f"{module}.") and name not in ordered:
            ordered[name] = stacked(loss_weights)
        ordered[key] = value
    assert name in ordered, f"the network has no {module}"
    return ordered


def named_loss_weights(path: Path, official: Any, own: Any) -> dict[str, Tensor]:
    """λ by term, from the key of this program, or from `head.lossweights` with nine values in the official order.

    Args:
        path: of the checkpoint, for messages.
        official: entry `head.lossweights`, or None.
        own: entry of this program, or None.

    Raises:
        UserError: λ is not a tensor of finite numbers, or its terms are not known.
    """
    names: Any = OFFICIAL_TERMS
    values = official
    if isinstance(own, dict):
        names, values = own.get("names"), own.get("values")
    elif own is not None:
        values = own
    if values is None:
        return {}
    finite = isinstance(values, Tensor) and values.dim() == 1 and bool(values.isfinite().all())
    named = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    if not finite or not named or len(names) != len(values):
        raise UserError(
            f"{path} has a λ (head.lossweights or loss_weights) that is not a tensor of finite numbers, one for each of "
            f"its terms ({len(OFFICIAL_TERMS)} in official files); train that step again, or name another file with --step_ckpt"
        )
    return dict(zip(names, values))
