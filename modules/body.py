"""`Body`: the base class of the feature extractors that `--backbone` chooses from (modules/backbones.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from modules.norm import SLOPE

#: (num_features, activation="leaky_relu") -> norm with its activation; "identity" leaves the activation out.
Norm = Callable[..., nn.Module]

#: The last map, and the four taps.
BodyOutput = tuple[Tensor, tuple[Tensor, ...]]


class Body(nn.Module):
    """A feature extractor of four stages. Subclasses set `out_channels` and override `forward`.

    A subclass takes the norm of `--norm_act` and the output stride, 16 or 8, as its arguments. Its stages are called mod2 to mod5, or it
    overrides `stages`. Its parameters keep their names in every checkpoint.

    Attributes:
        out_channels: channels of the last map.
        slope: negative slope of the activation that follows a tap: 0 for a ReLU, 1 where no activation follows.
            Methods that need the activated taps compute them with it.
        own_norms: the body has its own norms and ignores `--norm_act`. Files of pretrained weights then have no norm in their
            name, and their scales are not converted. With several processes, all take the running statistics of the main process.
    """

    out_channels: int
    mod2: nn.Module
    mod3: nn.Module
    mod4: nn.Module
    mod5: nn.Module
    slope: ClassVar[float] = SLOPE
    own_norms: ClassVar[bool] = False

    def forward(self, images: Tensor) -> BodyOutput:
        """Compute the map for the head, and the taps for distillation.

        Args:
            images: (B, 3, H, W), normalised.

        Returns:
            The last map (B, out_channels, h, w), of the input's size over the output stride; and four taps, the output of each stage before
            its last activation. No later operation may overwrite a tap.
        """
        raise NotImplementedError

    def stages(self) -> tuple[nn.Module, ...]:
        """The four stages, shallow first."""
        return self.mod2, self.mod3, self.mod4, self.mod5

    def watched_weights(self) -> tuple[nn.Parameter, ...]:
        """The parameter of each stage whose gradient LSKD's equilibrium measures: the first one of the stage."""
        return tuple(next(stage.parameters()) for stage in self.stages())

    def renamed(self, state: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Rename the weights of a file that the body's names do not fit; see `from_torchvision`, which does it by default."""
        return self.from_torchvision(state)

    @staticmethod
    def from_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Rename the weights of torchvision's network to the names of the body.

        Args:
            state: weights of a file that the user named, or torchvision's own.

        Returns:
            The renamed weights, without those that the body does not have, such as the ImageNet classifier; None where the names are
            not torchvision's.
        """
        return None
