"""The optimiser of a step."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from utils.types import TaskLike


def make_optimizer(
    opts: Namespace, task: TaskLike, model: nn.Module, extra: list[nn.Parameter], fused: bool
) -> torch.optim.SGD:
    """SGD with Nesterov momentum over the official parameter groups: body, head and classifiers, in the order of the network.

    With `--lr_old` the classifiers form two groups, those of earlier steps and the new one. A group without trainable
    parameters is left out. In the official LSKD program λ is a parameter of the head itself, `head.lossweights`, and
    the parameters of a module come before those of the modules in it: here λ opens the head's group, so that
    `optimizer_state` numbers the parameters as there.

    Args:
        opts: lr_of_step, lr_old, momentum, weight_decay.
        task: the classifiers of earlier steps learn with `--lr_old` times the step's learning rate.
        model: the student, not wrapped.
        extra: parameters of the balancer, λ.
        fused: whether the precision allows the fused step.

    Returns:
        The optimiser.
    """

    def group(parameters: Iterable[nn.Parameter], lr: float = opts.lr_of_step) -> dict[str, Any]:
        return {"params": [p for p in parameters if p.requires_grad], "lr": lr, "weight_decay": opts.weight_decay}

    groups = [group(model.body.parameters()), group([*extra, *model.head.parameters()])]
    if opts.lr_old is not None and task.step > 0:
        earlier = [p for classifier in list(model.cls)[:-1] for p in classifier.parameters()]
        held = {id(p) for p in earlier}
        groups += [
            group(earlier, opts.lr_old * opts.lr_of_step),
            group(p for p in model.cls.parameters() if id(p) not in held),
        ]
    else:
        groups.append(group(model.cls.parameters()))
    return torch.optim.SGD(
        [g for g in groups if g["params"]],
        lr=opts.lr_of_step,
        momentum=opts.momentum,
        nesterov=opts.momentum > 0,
        fused=fused,  # one pass over weights, gradients and momenta instead of five
    )
