"""One interface for one process and for several; the rest of the program does not call torch.distributed.

Processes are started by torchrun or torch.distributed.launch (RANK, WORLD_SIZE and LOCAL_RANK in the environment); without
them the program is one process and every function here is the identity.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.errors import UserError

#: A process that waits longer than this for the others ends with an error. It is longer than the main process's first scan of a large
#: data set. That another process died is noticed earlier: at once with gloo, and with nccl the launcher ends all processes.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)

#: The same while the processes join at the start, when no process has other work.
RENDEZVOUS_TIMEOUT = timedelta(minutes=5)

#: Parts of the messages of the back ends if another process is gone or cannot be reached.
_PEER_LOST = ("closed by peer", "reset by peer", "broken pipe", "connection refused", "timed out", "remote process")


class SharedError(UserError):
    """A user's error that is raised on all processes; only the main process prints it."""


def initialise(device: str = "auto", local_rank: int = 0) -> torch.device:
    """Join the process group that the launcher announces, and pick this process's device.

    Args:
        device: "auto" (CUDA where there is one), "cpu" or "cuda".
        local_rank: the official `--local_rank`; LOCAL_RANK in the environment has priority.

    Returns:
        The device this process computes on.

    Raises:
        UserError: CUDA is asked for on a machine without it, or there are more processes than GPUs.
        DistError: not all processes joined within `RENDEZVOUS_TIMEOUT`.
    """
    local_rank = _number("LOCAL_RANK", local_rank)
    check_device(device)
    use_cuda = torch.cuda.is_available() and device != "cpu"
    here = max(local_rank + 1, _number("LOCAL_WORLD_SIZE", 1))
    if use_cuda and here > torch.cuda.device_count():
        raise UserError(
            f"{here} processes on this machine, but torch sees {torch.cuda.device_count()} GPU(s); start at most that many "
            "(--nproc_per_node), or add --device cpu"
        )
    chosen = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(chosen)
    if _number("WORLD_SIZE", 1) > 1 and not dist.is_initialized():
        _check_environment()
        store, rank_, world = next(dist.rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
        store.set_timeout(COLLECTIVE_TIMEOUT)
        backend = "nccl" if use_cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank_, world_size=world, timeout=COLLECTIVE_TIMEOUT)
    return chosen


def check_device(device: str) -> None:
    """Refuse `--device cuda` where there is none.

    Raises:
        UserError: with the remedy.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: torch sees no CUDA device here; use --device cpu or install a CUDA build of torch"
        )


def _number(variable: str, default: int) -> int:
    """A number in an environment variable of the launcher."""
    text = os.environ.get(variable) or str(default)
    if not text.isdecimal():
        raise UserError(f"{variable}={text!r} in the environment is not a number; unset it or start with torchrun")
    return int(text)


def _check_environment() -> None:
    """Refuse environment variables with which the processes could not find each other."""
    world, variables = _number("WORLD_SIZE", 1), ("RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in variables if not os.environ.get(name)]
    if missing or _number("RANK", 0) >= world or _number("MASTER_PORT", 0) > 65535:
        wrong = f"{missing[0]} is not set" if missing else ", ".join(f"{name}={os.environ[name]}" for name in variables)
        raise UserError(
            f"WORLD_SIZE={world} in the environment announces {world} processes, but {wrong}; start with torchrun, or unset WORLD_SIZE"
        )


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


def wrap(model: nn.Module, device: torch.device, follow_main: bool) -> DistributedDataParallel:
    """The model with gradients averaged over the processes.

    The gradients are views of the buffers that are sent, not copies, which saves the memory of one set of gradients. Every
    trained parameter takes part in every forward pass, so DDP does not search for unused ones. docs/reliability.md says why the
    graph is not declared static, and what happens in the partial backward passes of RGE.

    Args:
        model: on its device.
        device: of this process.
        follow_main: copy the buffers of the main process to all others before every forward pass.

    Returns:
        The wrapper; the model is its `module`.
    """
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch renamed it
    chosen: dict[str, Any] = {"device_ids": [device] if device.type == "cuda" else None, option: follow_main}
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **chosen)


def first_here() -> bool:
    """Whether this is the first process of its machine; may be called before the processes have joined."""
    return os.environ.get("LOCAL_RANK", "0") in ("", "0")


def should_print(error: Exception) -> bool:
    """Whether this process prints an error. An error of all processes is printed once, that of one process by this process.

    Before the processes have joined, all processes of a machine have the same errors: those of the command line.
    """
    if active():
        return is_main() or not isinstance(error, SharedError)
    return first_here() or "LOCAL_WORLD_SIZE" not in os.environ


def peer_lost(error: Exception) -> bool:
    """Whether an exception means that another process ended or did not start."""
    if isinstance(error, dist.DistError):
        return True
    return active() and any(sign in str(error).lower() for sign in _PEER_LOST)


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


def broadcast_(tensors: Sequence[Tensor]) -> None:
    """Give the main process's values of tensors to all processes, in place; tensors of one type are sent in one message."""
    if not active():
        return
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.dtype, []).append(tensor)
    for same in by_type.values():
        joined = torch.cat([tensor.detach().reshape(-1) for tensor in same])
        dist.broadcast(joined, src=0)
        for tensor, values in zip(same, joined.split([tensor.numel() for tensor in same])):
            tensor.detach().copy_(values.view_as(tensor))


def broadcast_module(module: nn.Module) -> None:
    """Give the main process's parameters and buffers of a module to all processes."""
    broadcast_([*module.parameters(), *module.buffers()])


def gather_objects(value: Any) -> list[Any]:
    """The value of every process, in order of rank, on every process."""
    if not active():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def _attempt(action: Callable[[], Any]) -> tuple[Any, str | None]:
    """What an action returned, and the text of its UserError or OSError; without other processes the error itself is raised."""
    try:
        return action(), None
    except (UserError, OSError) as error:
        if not active():
            raise
        return None, str(error)


def on_main(action: Callable[[], Any], local: bool = False) -> Any:
    """Run an action on the main process and give its result, or its error, to all processes.

    Otherwise the other processes would wait if the main process ended with an error, such as a checkpoint that cannot be written.

    Args:
        action: called without arguments on rank 0.
        local: keep the result on rank 0, for one that cannot be pickled, such as a lock.

    Returns:
        What the action returned on rank 0; None on the others if `local`.

    Raises:
        SharedError: with the text of the main process's UserError or OSError.
    """
    result, fault = _attempt(action) if is_main() else (None, None)
    outcome: list[Any] = [None if local else result, fault]
    if active():
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise SharedError(outcome[1])
    return result if is_main() else outcome[0]


def run_on_all(action: Callable[[], Any]) -> Any:
    """Run an action on every process; an error on one is raised on all, so that no process waits for one that has ended.

    Args:
        action: called without arguments; must not communicate with the other processes.

    Returns:
        What the action returned on this process.

    Raises:
        SharedError: with the texts of the UserError or OSError of all processes; equal texts occur once.
    """
    result, fault = _attempt(action)
    faults = [text for text in gather_objects(fault) if text is not None]
    if faults:
        raise SharedError("; ".join(dict.fromkeys(faults)))
    return result


def max_over_ranks(number: int) -> int:
    """The largest number of all processes, such as the signal of a stop request."""
    return max(gather_objects(number))
