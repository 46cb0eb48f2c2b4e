"""The two networks of a step: the student, started from the previous step, and its frozen teacher."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dataset.tasks import Task
from modules.fold import fold_frozen
from segmentation_module import make_model
from utils.store import Store, read


def build_network(opts: Namespace, classes: Sequence[int], pretrained: bool) -> nn.Module:
    """The network for these classifiers.

    Args:
        opts: network options.
        classes: channels of each classifier.
        pretrained: whether the body may start from ImageNet weights (`--no_pretrained` forbids it in any case).

    Returns:
        The network on the CPU.
    """
    return make_model(opts, classes, pretrained and not opts.no_pretrained)


def build_teacher(opts: Namespace, task: Task, previous: dict[str, Any]) -> nn.Module:
    """The frozen model of step t-1, in evaluation mode.

    Args:
        opts: network options.
        task: the step being trained, not step 0.
        previous: checkpoint of step t-1, as `Store.load_previous` returns it.

    Returns:
        The teacher on the CPU, without gradient, its norms folded into its convs: it computes the same in less time.
    """
    store = Store(opts, task)
    teacher = build_network(opts, task.at(task.step - 1).classes_per_step, pretrained=False)
    load_weights(teacher, previous["model_state"], store.previous(), strict=opts.strict_weights)
    return fold_frozen(teacher.eval(), in_place=True)


def build_student(opts: Namespace, task: Task, previous: dict[str, Any], pretrained: bool) -> nn.Module:
    """The model to be trained.

    Args:
        opts: network options, init_balanced, base_weights, ckpt, freeze.
        task: the step being trained.
        previous: checkpoint of step t-1, empty at step 0.
        pretrained: whether the body starts from ImageNet weights.

    Returns:
        The student on the CPU.

    Reference: MiB (Cermelli et al., CVPR 2020), section 3.3, for the balanced initialisation.
    """
    model = build_network(opts, task.classes_per_step, pretrained)
    if previous:
        store = Store(opts, task)
        weights = dict(previous["model_state"])
        if opts.base_weights and task.step > 1:
            base = store.finished(0)
            weights |= read(base)["model_state"]
        grows = not task.domain
        load_weights(model, weights, store.previous(), opts.strict_weights, len(model.cls) - 1 if grows else None)
        if opts.init_balanced and grows:
            model.init_new_classifier()
    if opts.ckpt is not None and not opts.test:
        load_weights(model, read(Path(opts.ckpt))["model_state"], Path(opts.ckpt), strict=opts.strict_weights)
    if opts.freeze:
        model.freeze_body()
    return model


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], path: Path, strict: bool, new_classifier: int | None = None
) -> None:
    """Load weights by name.

    Args:
        model: takes the weights.
        weights: by parameter name, without the wrapper's prefix.
        path: where they come from, for messages.
        strict: refuse missing and unexpected names; otherwise what fits is taken.
        new_classifier: number of the classifier that these weights cannot have yet, or None.

    Raises:
        ValueError: names or shapes do not fit, or values are not finite.
    """
    own = model.state_dict()
    fresh = f"cls.{new_classifier}."
    missing = [name for name in own if name not in weights and not name.startswith(fresh)]
    unexpected = [name for name in weights if name not in own]
    misshapen = [name for name in own if name in weights and not _alike(own[name], weights[name])]
    tolerant = " (or --strict_weights to take what fits)"
    for names, what, more in (
        (misshapen, "of another shape or kind", ""),
        (missing if strict else [], "missing", tolerant),
        (unexpected if strict else [], "unexpected", tolerant),
    ):
        if names:
            raise ValueError(
                f"{path} does not fit the network: {names[0]} and {len(names) - 1} more are {what}; use the same --backbone, "
                f"--task and classifier options as for that checkpoint{more}"
            )
    if spoilt := [name for name in own if name in weights and not bool(weights[name].isfinite().all())]:
        raise ValueError(
            f"{path} holds a network that went astray: {spoilt[0]} and {len(spoilt) - 1} more have values that are not finite; "
            "train that step again, with a lower --lr"
        )
    model.load_state_dict({name: value for name, value in weights.items() if name in own}, strict=False)


def _alike(mine: Tensor, theirs: Tensor) -> bool:
    """Whether one weight can take the other's values; the types of floating numbers may differ."""
    return mine.shape == theirs.shape and mine.is_floating_point() == theirs.is_floating_point()
