"""`--backbone timm:NAME`: a network of the package timm as the body, by its `features_only` interface."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.body import Body, BodyOutput, Norm
from utils.errors import UserError
from utils.options.spelling import suggestion

#: Downsampling of the four stages; the last two are less where timm has the output stride.
_REDUCTIONS = (4, 8, 16, 32)
_PROBE = 64  # side of the image that a new body is tried on


def package() -> Any:
    """The package timm.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise UserError(
            f"--backbone timm:NAME needs the package timm, which cannot be imported ({error}); install it with: pip install timm"
        ) from error


def create(name: str, output_stride: int) -> nn.Module:
    """The network with the output stride, or with timm's own one where timm does not offer a choice.

    Raises:
        UserError: timm has no such network, or not its stages.
    """
    timm = package()
    if not timm.is_model(name):
        hint = suggestion(name, timm.list_models())
        raise UserError(f"--backbone timm:{name[:80]}: timm {timm.__version__} has no network of that name{hint}")
    try:
        return timm.create_model(name, pretrained=False, features_only=True, output_stride=output_stride)
    except (TypeError, AssertionError, NotImplementedError):  # timm has the output stride for some networks alone
        pass
    try:
        return timm.create_model(name, pretrained=False, features_only=True)
    except (TypeError, AssertionError, NotImplementedError, RuntimeError, AttributeError) as error:
        raise UserError(f"--backbone timm:{name}: timm does not give the stages of this network ({error})") from error


class TimmBody(Body):
    """The last four stages of a network of timm.

    The taps are the outputs of the stages, after their activation. Where timm cannot build the network with the output stride, which is so
    for most transformers, the last map is interpolated to that size; the taps keep their own. All norms are those of timm.

    Args:
        name: of the network in timm.
        norm: not used.
        output_stride: input size over the size of the last map, 16 or 8.

    Raises:
        UserError: timm is not installed, has no such network, or the network has not four stages from a fourth of the input's size on.
    """

    slope = 1.0
    own_norms = True

    def __init__(self, name: str, norm: Norm, output_stride: int = 16) -> None:
        super().__init__()
        self.output_stride = output_stride
        self.net = create(name, output_stride)
        self._fill_zero_scales()
        info: Any = self.net.feature_info
        reductions = info.reduction()
        stages = _REDUCTIONS[: len(reductions[-4:])]
        strides = tuple(min(stride, output_stride) for stride in stages)
        if tuple(reductions[-4:]) not in (_REDUCTIONS, strides) or len(reductions) < 4:
            raise UserError(
                f"--backbone timm:{name} has maps of 1/{', 1/'.join(map(str, reductions))} of the input's size, but a backbone needs four "
                "stages of 1/4, 1/8, 1/16 and 1/32; choose a network with such stages, such as timm:resnet50 or timm:pvt_v2_b0"
            )
        self.channels_last = str(getattr(self.net, "output_fmt", "NCHW")).endswith("NHWC")
        self.out_channels = info.channels()[-1]
        self._stage_names = tuple(self._module_name(module) for module in info.module_name()[-4:])
        self._try(name, info.channels()[-4:])

    def forward(self, images: Tensor) -> BodyOutput:
        """(B, 3, H, W) -> the last map (B, out_channels, h, w), and the outputs of the four stages."""
        taps = tuple(self.net(images)[-4:])
        if self.channels_last:
            taps = tuple(tap.permute(0, 3, 1, 2).contiguous() for tap in taps)  # B×h×w×C → B×C×h×w
        size = [-(-side // self.output_stride) for side in images.shape[2:]]
        last = taps[3]
        if list(last.shape[2:]) != size:
            last = F.interpolate(last, size=size, mode="bilinear", align_corners=False)
        return last, taps

    def stages(self) -> tuple[nn.Module, ...]:
        """The modules whose outputs are the taps, shallow first."""
        first, second, third, fourth = (self.net.get_submodule(name) for name in self._stage_names)
        return first, second, third, fourth

    def renamed(self, state: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Rename the weights of the whole network, as timm stores them; without its classifier."""
        own = self.state_dict()
        names = {key: f"net.{key}" if f"net.{key}" in own else f"net.{key.replace('.', '_', 1)}" for key in state}
        if not any(name in own for name in names.values()):
            return None
        return {names[key]: value for key, value in state.items() if names[key] in own}

    def _fill_zero_scales(self) -> None:
        """Set norm scales that are all 0 to 1. timm starts residual branches with 0, so that no weight in them has a gradient at first.

        LSKD's equilibrium measures such a gradient. Pretrained weights replace these values.
        """
        for norm in self.net.modules():
            scale = getattr(norm, "weight", None)
            if isinstance(norm, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm) and scale is not None and not scale.any():
                nn.init.ones_(scale)

    def _module_name(self, module: str) -> str:
        """A module by the name that timm's feature extractor gives it: `stages.0` may be called `stages_0` there."""
        known = dict(self.net.named_modules())
        return module if module in known else module.replace(".", "_")

    def _try(self, name: str, channels: list[int]) -> None:
        """Run the network once on a small image; UserError if it gives other maps than it says, or takes no image of this size."""
        mode = self.net.training
        self.net.eval()
        try:
            with torch.no_grad():
                _, taps = self(torch.zeros(1, 3, _PROBE, _PROBE))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"--backbone timm:{name} does not take images of any size ({error}); choose another network"
            ) from error
        finally:
            self.net.train(mode)
        sizes = [tap.shape[2] for tap in taps]
        weights = [next(stage.parameters(), None) for stage in self.stages()]
        if [tap.shape[1] for tap in taps] != channels or sizes[:2] != [_PROBE // 4, _PROBE // 8] or None in weights:
            raise UserError(
                f"--backbone timm:{name} has not four stages with weights of their own; choose another network"
            )


def pretrained_state(name: str) -> tuple[str, dict[str, Tensor]]:
    """Name and weights of a network as timm publishes them, fetched once into timm's cache.

    Raises:
        UserError: timm has no weights for the network, or they cannot be fetched.
    """
    timm = package()
    if not timm.is_model_pretrained(name):
        raise UserError(f"--pretrained timm: timm has no weights of {name}; name a file, or add --no_pretrained")
    try:
        return f"timm {name}", timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # the hub raises types of its own, of several packages
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"--pretrained timm: the weights of {name} could not be fetched ({reason}); download them elsewhere and name "
            "the file by --pretrained FILE, or add --no_pretrained"
        ) from error
