"""The values of `--backbone`. A new backbone is a subclass of `Body` in its own file, and one line in `BACKBONES`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import NamedTuple

from modules.body import Body, Norm
from modules.mobilenet import MobileNetV2
from modules.resnet import ARCHITECTURES, ResNet
from modules.timm_body import TimmBody
from utils.errors import UserError


class Backbone(NamedTuple):
    """What `--backbone NAME` builds.

    Attributes:
        build: (norm, output stride) -> body with random weights.
        torchvision: name of torchvision's network whose ImageNet weights `--pretrained torchvision` loads; None where it has none.
    """

    build: Callable[[Norm, int], Body]
    torchvision: str | None = None


#: `--backbone` by name.
BACKBONES: dict[str, Backbone] = {
    **{name: Backbone(partial(ResNet, name), torchvision=name) for name in ARCHITECTURES},
    "mobilenet_v2": Backbone(MobileNetV2, torchvision="mobilenet_v2"),
}


#: What a network of the package timm is called: `timm:resnet50`.
TIMM = "timm:"


class BackboneNames(Collection[str]):
    """The choices of `--backbone`: the names in `BACKBONES`, and any name that begins with `TIMM`."""

    def __contains__(self, word: object) -> bool:
        return isinstance(word, str) and (word in BACKBONES or (word.startswith(TIMM) and len(word) > len(TIMM)))

    def __iter__(self) -> Iterator[str]:
        return iter(BACKBONES)

    def __len__(self) -> int:
        return len(BACKBONES)


def find(name: str) -> Backbone:
    """Look up a backbone.

    Args:
        name: a value of `--backbone`.

    Returns:
        Its entry in `BACKBONES`, or one for a network of timm.

    Raises:
        UserError: no backbone has that name.
    """
    if name.startswith(TIMM):
        return Backbone(partial(TimmBody, name.removeprefix(TIMM)))
    if name not in BACKBONES:
        raise UserError(f"--backbone {name[:80]}: unknown body; choose one of {', '.join(BACKBONES)}")
    return BACKBONES[name]
