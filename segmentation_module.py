"""The networks of one incremental step: body, head and one classifier per step; the student and its frozen teacher."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dataset.tasks import Task
from modules import backbones
from modules.body import Body
from modules.classifier import Classifiers
from modules.deeplab import DeeplabV3
from modules.fold import fold_frozen
from modules.norm import make_norm
from modules.pretrained import load_backbone
from modules.upsample import upsample
from utils.checkpointing.store import Store, read
from utils.errors import UserError
from utils.runtime.amp import at_least_float32
from utils.types import TAP_NAMES, Taps

#: Channels of the head's output, the features of the classifiers.
HEAD_CHANNELS = 256


class SegmentationModel(nn.Module):
    """Body, head and classifiers; a forward pass returns `Taps`.

    The names and shapes of the state dict are the official ones without the leading "module.".

    Args:
        body: (B, 3, H, W) -> (map, four attentions), see `Body`.
        head: map -> (B, 256, h, w).
        classifiers: (B, 256, h, w) -> (B, C, h, w).
    """

    def __init__(self, body: Body, head: DeeplabV3, classifiers: Classifiers) -> None:
        super().__init__()
        self.body = body
        self.head = head
        self.cls = classifiers
        self._frozen: list[nn.Module] = []
        #: Names of weights that may be missing in a checkpoint; they then keep their initial values.
        self.optional_names: set[str] = set()

    @property
    def classes(self) -> tuple[int, ...]:
        """Channels of each step's classifier, background included in the first."""
        return self.cls.classes

    def forward(self, images: Tensor, full_size: bool = True) -> Taps:
        """Taps of (B, 3, H, W) normalised images.

        Args:
            images: the batch.
            full_size: upsample the logits to the size of the images. Without it `logits` is `logits_small`: passes for feature
                distillation alone need no logits of full size, the largest tensor.
        """
        body, attentions = self.body(images)
        pre_logits = self.head(body)
        small = self.cls(pre_logits)
        logits = small
        if full_size:
            # In half precision, interpolation makes close logits equal, and arg-max then takes the class with the lower index.
            logits = upsample(at_least_float32(small), images.shape[2:])
        return Taps(logits, small, body, pre_logits, attentions, self.body.slope)

    def train(self, mode: bool = True) -> SegmentationModel:
        """Training or evaluation mode; norms of frozen modules stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen:
            for norm in _norms(module):
                norm.eval()
        return self

    def freeze(self, items: Iterable[nn.Module | nn.Parameter]) -> None:
        """Exclude modules and parameters from training permanently.

        Args:
            items: their parameters take no gradient from now on; norms in modules use and keep their running statistics, also
                after `train()`.
        """
        for item in items:
            item.requires_grad_(False)
            if isinstance(item, nn.Module):
                self._frozen.append(item)
        self.train(self.training)

    def fix_bn(self) -> None:
        """Freeze every norm permanently: it uses its running statistics and keeps them, and its weight and bias get no gradient."""
        self.freeze(_norms(self))

    def freeze_body(self) -> None:
        """Exclude the body from training (`--freeze`): its parameters get no gradient."""
        self.body.requires_grad_(False)

    def align_weight(self, reference: str) -> None:
        """Rescale the new classes' weights to the norm of "old", "background" or "all" (`Classifiers.align`)."""
        self.cls.align(reference)

    def watched_weights(self) -> dict[str, nn.Parameter]:
        """RGE's W by tap: one of each stage (`Body.watched_weights`), the weight of the head's last norm for pre_logits and logits."""
        head = self.get_parameter("head.red_bn.weight")
        return dict(zip(TAP_NAMES, (*self.body.watched_weights(), head, head)))


def _norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm)]


def make_model(
    opts: Namespace, classes: Sequence[int], pretrained: bool | None = None, log: Callable[[str], None] = print
) -> SegmentationModel:
    """Build the network that the options ask for.

    Args:
        opts: reads backbone, norm_act, output_stride, pooling, cosine, nb_background_modes, multimodal_fusion, and for the weights
            of the body no_pretrained and pretrained.
        classes: channels of each step's classifier, background included in the first, such as [16, 5].
        pretrained: whether the body starts from ImageNet weights; None follows `--no_pretrained`. False where a
            checkpoint will be loaded anyway.
        log: called with each line that is to be logged.

    Returns:
        The model on the CPU, in training mode.

    Raises:
        UserError: an option without meaning, or backbone weights that are missing or do not fit.
    """
    norm = make_norm(opts.norm_act)
    body = backbones.find(opts.backbone).build(norm, opts.output_stride)
    head = DeeplabV3(body.out_channels, HEAD_CHANNELS, norm, opts.output_stride, opts.pooling)
    classifiers = Classifiers(
        HEAD_CHANNELS,
        classes,
        cosine=opts.cosine,
        background_modes=opts.nb_background_modes,
        fusion=opts.multimodal_fusion,
    )
    if pretrained is None:
        pretrained = not opts.no_pretrained
    if pretrained:
        load_backbone(body, opts.backbone, opts.norm_act, opts.pretrained, log)
    return SegmentationModel(body, head, classifiers)


#: Replaces layers of a freshly built network (`Method.wrap_model`).
Wrap = Callable[[SegmentationModel], None]


def keep_layers(model: SegmentationModel) -> None:
    """The `Wrap` of methods that replace no layer."""


def build_network(
    opts: Namespace, classes: Sequence[int], pretrained: bool, wrap: Wrap = keep_layers
) -> SegmentationModel:
    """Build the network, and let the method replace layers.

    Args:
        opts: network options.
        classes: channels of each classifier.
        pretrained: whether the body may start from ImageNet weights (`--no_pretrained` forbids it in any case).
        wrap: replaces layers, after the ImageNet weights are loaded.

    Returns:
        The network on the CPU.
    """
    model = make_model(opts, classes, pretrained and not opts.no_pretrained)
    wrap(model)
    return model


def network_classes(opts: Namespace, task: Task) -> list[int]:
    """Channels of each classifier of a step's network, such as [16, 5]; with `--base_weights` those of step 0 alone."""
    return task.at(0).classes_per_step if opts.base_weights else task.classes_per_step


def build_teacher(opts: Namespace, task: Task, previous: dict[str, Any], wrap: Wrap = keep_layers) -> nn.Module:
    """The frozen model of step t-1, in evaluation mode.

    Args:
        opts: network options.
        task: the step being trained, not step 0.
        previous: checkpoint of step t-1, as `Store.load_previous` returns it.
        wrap: as in `build_network`.

    Returns:
        The teacher on the CPU, without gradients. Its norms are folded into its convs, which makes it faster.
    """
    store = Store(opts, task)
    teacher = build_network(opts, network_classes(opts, task.at(task.step - 1)), pretrained=False, wrap=wrap)
    load_weights(teacher, previous["model_state"], store.previous(), strict=opts.strict_weights)
    return fold_frozen(teacher.eval(), in_place=True)


def build_student(
    opts: Namespace, task: Task, previous: dict[str, Any], pretrained: bool, wrap: Wrap = keep_layers
) -> SegmentationModel:
    """The model to be trained, with the weights of step t-1 and a new classifier in PyTorch's default initialisation.

    Args:
        opts: network options, base_weights, ckpt, freeze.
        task: the step being trained.
        previous: checkpoint of step t-1, empty at step 0.
        pretrained: whether the body starts from ImageNet weights.
        wrap: as in `build_network`.

    Returns:
        The student on the CPU.
    """
    model = build_network(opts, network_classes(opts, task), pretrained, wrap)
    if previous:
        store = Store(opts, task)
        new_classifier = None if task.domain else len(model.cls) - 1
        load_weights(model, previous["model_state"], store.previous(), opts.strict_weights, new_classifier)
    if opts.ckpt is not None and not opts.test:
        load_weights(model, read(Path(opts.ckpt))["model_state"], Path(opts.ckpt), strict=opts.strict_weights)
    if opts.freeze:
        model.freeze_body()
    return model


def load_weights(
    model: SegmentationModel, weights: dict[str, Tensor], path: Path, strict: bool, new_classifier: int | None = None
) -> None:
    """Load weights by name.

    Args:
        model: takes the weights.
        weights: by parameter name, without the wrapper's prefix.
        path: where they come from, for messages.
        strict: refuse missing and unexpected names; otherwise the weights that fit are loaded.
        new_classifier: number of the classifier that these weights cannot have yet, or None.

    Raises:
        UserError: names or shapes do not fit, or values are not finite.
    """
    own = model.state_dict()
    fresh, known = f"cls.{new_classifier}.", weights.keys() | model.optional_names
    missing = [name for name in own if name not in known and not name.startswith(fresh)]
    unexpected = [name for name in weights if name not in own]
    misshapen = [name for name in own if name in weights and not _alike(own[name], weights[name])]
    tolerant = " (or --strict_weights to take what fits)"
    for names, what, more in (
        (misshapen, "of another shape or type", ""),
        (missing if strict else [], "missing", tolerant),
        (unexpected if strict else [], "unexpected", tolerant),
    ):
        if names:
            raise UserError(
                f"{path} does not fit the network: {names[0]} and {len(names) - 1} more are {what}; use the same --backbone, "
                f"--task and classifier options as for that checkpoint{more}"
            )
    if spoilt := [name for name in own if name in weights and not bool(weights[name].isfinite().all())]:
        raise UserError(
            f"{path} is the checkpoint of a training that diverged: {spoilt[0]} and {len(spoilt) - 1} more have values that are not "
            "finite; train that step again, with a lower --lr"
        )
    model.load_state_dict({name: value for name, value in weights.items() if name in own}, strict=False)


def _alike(mine: Tensor, theirs: Tensor) -> bool:
    """Whether one tensor can be copied into the other: equal shapes, both floating or both not."""
    return mine.shape == theirs.shape and mine.is_floating_point() == theirs.is_floating_point()
