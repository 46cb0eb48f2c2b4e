"""One interface for one process and for many: the rest of the program never asks torch.distributed directly.

Processes are started by torchrun or torch.distributed.launch (RANK, WORLD_SIZE and LOCAL_RANK in the environment); without
them the program is one process and every function here is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

#: A process that waits longer than this for the others gives up with an error; none hangs for ever.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


def initialise(device: str = "auto", local_rank: int = 0) -> torch.device:
    """Join the process group that the launcher announces, and pick this process's device.

    Args:
        device: "auto" (CUDA where there is one), "cpu" or "cuda".
        local_rank: the official `--local_rank`; the environment's LOCAL_RANK wins over it.

    Returns:
        The device this process computes on.

    Raises:
        ValueError: CUDA asked for on a machine without it, or more processes than GPUs.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", local_rank))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda: torch sees no CUDA device here; use --device cpu or install a CUDA build of torch"
        )
    use_cuda = torch.cuda.is_available() and device != "cpu"
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU: torch sees {torch.cuda.device_count()}; start at most that many "
            "processes per machine (--nproc_per_node), or add --device cpu"
        )
    chosen = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(chosen)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if use_cuda else "gloo", timeout=COLLECTIVE_TIMEOUT)
    return chosen


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def active() -> bool:
    """Whether several processes work together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if active() else 1


def rank() -> int:
    """Number of this process, 0 for the one that writes files and prints."""
    return dist.get_rank() if active() else 0


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if active():
        dist.barrier()


def sum_(tensor: Tensor) -> Tensor:
    """Sum a tensor over the processes, in place; returned for chaining."""
    if active():
        dist.all_reduce(tensor)
    return tensor


def mean_(tensor: Tensor) -> Tensor:
    """Average a floating tensor over the processes, in place; returned for chaining."""
    if active():
        dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


def any_true(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any process: how all of them agree to stop together."""
    if not active():
        return flag
    votes = torch.tensor([int(flag)], device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


def gather_objects(value: Any) -> list[Any]:
    """The value of every process, in order of rank, on every process."""
    if not active():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(action: Callable[[], Any]) -> Any:
    """Run an action on the main process and hand its result, or its error, to all of them.

    Without this a user's error found by one process (a checkpoint that cannot be written, say) would leave the others waiting.

    Args:
        action: called without arguments on rank 0; what it returns must be picklable.

    Returns:
        What the action returned on rank 0.

    Raises:
        ValueError: with the text of the main process's ValueError or OSError.
    """
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome = [action(), None]
        except (ValueError, OSError) as error:
            if not active():
                raise
            outcome = [None, str(error)]
    if active():
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]
