"""Learning rates: of each step of a task, and schedules within a step, stepped once per iteration."""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR


def rate_of_step(rates: Sequence[float], steps: Sequence[int], step: int) -> float:
    """Learning rate that `--lr` gives a step.

    Args:
        rates: values of `--lr`.
        steps: values of `--step`.
        step: one of them.

    Returns:
        The only rate, if there is one. The rate at the step's place in `--step`, if there are as many rates as steps, as
        in the official programs. Otherwise the first rate for step 0 and the last one for every later step.
    """
    if len(rates) > 1 and len(rates) == len(steps):
        return rates[list(steps).index(step)]
    return rates[0] if step == 0 else rates[-1]


class PolyLR(LRScheduler):
    """lr = lr_0 · (1 − iteration / total)^power.

    Args:
        optimizer: its groups keep their own lr_0.
        total: number of iterations of the whole step.
        power: exponent; the protocol uses 0.9.

    Reference: the "poly" policy of DeepLab (Chen et al., TPAMI 2018), section 4.1.
    """

    def __init__(self, optimizer: Optimizer, total: int, power: float = 0.9):
        self.total = max(1, total)
        self.power = power
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Learning rate of every group for the coming iteration."""
        left = max(0.0, 1.0 - self.last_epoch / self.total)
        return [base * left**self.power for base in self.base_lrs]


def build(opts: Namespace, optimizer: Optimizer, total: int) -> LRScheduler:
    """The schedule that `--lr_policy` names.

    Args:
        opts: lr_policy, lr_power, lr_decay_step, lr_decay_factor.
        optimizer: whose learning rates are scheduled.
        total: number of iterations of the step.

    Returns:
        A scheduler to be stepped after every iteration.
    """
    # torch warns if the optimiser makes no step, which is the case after an overflow in half precision and for a skipped loss
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    if opts.lr_policy == "poly":
        return PolyLR(optimizer, total, opts.lr_power)
    return StepLR(optimizer, step_size=opts.lr_decay_step, gamma=opts.lr_decay_factor)
