"""The optimiser of a step, and its parameter groups."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from utils.runtime import gate

Group = dict[str, Any]


def parameter_groups(opts: Namespace, step: int, model: nn.Module) -> list[Group]:
    """The official groups: body, head and classifiers, in the order of the network.

    With `--lr_old` the classifiers form two groups, those of earlier steps and the new one.

    Args:
        opts: lr_of_step, lr_old (factor of the learning rate of earlier classifiers), weight_decay.
        step: number of the step.
        model: the student, not wrapped.

    Returns:
        Groups of `torch.optim.SGD`, each with "name", of the parameters that take a gradient; a group may be empty.
    """

    def group(name: str, parameters: Iterable[nn.Parameter], rate: float = opts.lr_of_step) -> Group:
        trained = [p for p in parameters if p.requires_grad]
        return {"name": name, "params": trained, "lr": rate, "weight_decay": opts.weight_decay}

    body, head, classifiers = (model.get_submodule(name) for name in ("body", "head", "cls"))
    groups = [group("body", body.parameters()), group("head", head.parameters())]
    if opts.lr_old is None or step == 0:
        return [*groups, group("cls", classifiers.parameters())]
    earlier = [p for classifier in list(classifiers.children())[:-1] for p in classifier.parameters()]
    held = {id(p) for p in earlier}
    newest = (p for p in classifiers.parameters() if id(p) not in held)
    return [*groups, group("cls/old", earlier, opts.lr_old * opts.lr_of_step), group("cls", newest)]


def make_optimizer(opts: Namespace, groups: list[Group], extra: list[nn.Parameter], fused: bool) -> torch.optim.SGD:
    """SGD with Nesterov momentum.

    In the official LSKD program λ is a parameter of the head itself, `head.lossweights`, and the parameters of a module come before
    those of the modules in it. λ is therefore the first parameter of the head's group, so that `optimizer_state` has the same numbers.

    Args:
        opts: lr_of_step, momentum.
        groups: of `parameter_groups`, after the changes of the method's parts; empty ones are left out.
        extra: parameters of the balancer, λ.
        fused: whether the precision allows the fused step.

    Returns:
        The optimiser.
    """
    placed = [
        {key: value for key, value in group.items() if key != "name"}
        | {"params": [*extra, *group["params"]] if group["name"] == "head" else group["params"]}
        for group in groups
    ]
    return torch.optim.SGD(
        [group for group in placed if group["params"]],
        lr=opts.lr_of_step,
        momentum=opts.momentum,
        nesterov=opts.momentum > 0,
        fused=fused,  # one pass over weights, gradients and momenta instead of five
    )


def allocate_momenta(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimiser of `make_optimizer` the momenta that its first step would allocate."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else []:
            if parameter.requires_grad:
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def initialise_momenta(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """`allocate_momenta` where a step can be withheld on the device: a first one would leave momenta that are not initialised."""
    if gate.asynchronous(device):
        allocate_momenta(optimizer)
