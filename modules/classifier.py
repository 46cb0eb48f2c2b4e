"""One 1×1 classifier per step, with the optional cosine form and several background modes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import UserError

#: How the logits of several background modes are combined; each function maps (B, K, h, w) to (B, 1, h, w).
FUSIONS = {
    "sum": lambda modes: modes.sum(1, keepdim=True),
    "mean": lambda modes: modes.mean(1, keepdim=True),
    "max": lambda modes: modes.amax(1, keepdim=True),
    "softmax": lambda modes: (modes.softmax(1) * modes).sum(1, keepdim=True),
}

#: Bias of a removed background mode: so low that neither the maximum nor the softmax selects it.
_REMOVED_BIAS = -1e4


class CosineClassifier(nn.Conv2d):
    """1×1 conv without bias whose outputs are the cosines between the features and each class's weight.

    Reference: Hou et al., "Learning a Unified Classifier Incrementally via Rebalancing" (LUCIR), CVPR 2019, eq. 4.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, h, w) -> (B, C, h, w) in [-1, 1]."""
        return self._conv_forward(F.normalize(x, dim=1), F.normalize(self.weight, dim=1), None)


class Classifiers(nn.ModuleList):
    """The classifiers of all steps; their outputs, concatenated, are the logits.

    With K > 1 background modes the first classifier holds the K modes alone and the second the other classes of step 0,
    so a class list [16, 5] makes classifiers of K, 15 and 5 channels; the K logits are fused into one, channel 0.

    Args:
        in_channels: channels of the features.
        classes: channels of each step's classifier, background included in the first.
        cosine: cosine classifiers times one learnt scale (`scalar`).
        background_modes: K.
        fusion: a key of `FUSIONS`, used where K > 1.

    Raises:
        UserError: unknown fusion, no mode at all, or cosine with several modes.
    """

    def __init__(
        self,
        in_channels: int,
        classes: Sequence[int],
        cosine: bool = False,
        background_modes: int = 1,
        fusion: str = "sum",
    ) -> None:
        super().__init__()
        if background_modes < 1:
            raise UserError(f"--nb_background_modes {background_modes}: at least one mode is needed")
        if fusion not in FUSIONS:
            raise UserError(f"--multimodal_fusion {fusion}: choose one of {', '.join(FUSIONS)}")
        if cosine and background_modes > 1:
            raise UserError("--cosine works with one background mode only; leave --nb_background_modes out")
        self.classes = tuple(classes)
        self.background_modes = background_modes
        self.fuse = FUSIONS[fusion]
        self.fusion = fusion
        channels = list(classes)
        if background_modes > 1:
            channels = [background_modes, classes[0] - 1, *classes[1:]]
        for count in channels:
            self.append(CosineClassifier(in_channels, count) if cosine else nn.Conv2d(in_channels, count, 1))
        self.scalar = nn.Parameter(torch.ones(())) if cosine else None

    def __iter__(self) -> Iterator[nn.Conv2d]:
        return cast(Iterator[nn.Conv2d], super().__iter__())

    def __getitem__(self, index: int) -> nn.Conv2d:  # type: ignore[override]  # a slice would not be `Classifiers`
        return cast(nn.Conv2d, super().__getitem__(index))

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, h, w) features -> (B, C, h, w) logits of all classes."""
        logits = [classifier(x) for classifier in self]
        if self.background_modes > 1:
            logits[0] = self.fuse(logits[0])
        joined = torch.cat(logits, dim=1)
        return joined if self.scalar is None else joined * self.scalar

    @property
    def num_new(self) -> int:
        """Classes of the last step."""
        return self.classes[-1]

    @torch.no_grad()
    def init_balanced(self) -> None:
        """Initialise the new classes from the background and divide its probability equally among it and them.

        Every new class takes the background's weight. Its bias and that of the background become b - ln(C_new + 1), so that the
        sum of their probabilities is the former probability of the background. With several modes the new classes take the
        linear equivalent of the fusion (the sum of the modes, or their mean), and the shift is distributed over the modes.
        Cosine classifiers have no bias; only the weight is copied.

        Reference: Cermelli et al., "Modeling the Background for Incremental Learning in Semantic Segmentation" (MiB),
            CVPR 2020, eq. 10 and 11.
        """
        shares = self[0].weight.new_ones(1, self.background_modes)  # (1, K)
        self._start_from_background(shares if self.fusion == "sum" else shares / self.background_modes)

    @torch.no_grad()
    def init_from_modes(self, votes: Tensor, how: str) -> None:
        """Start each new class from the background modes that respond to its pixels (`--init_multimodal`).

        Args:
            votes: (C_new, K) response of each mode to the pixels of each new class (`mode_votes` summed over the data).
            how: "max": the weight and bias of the mode with most votes; "softmax": the mean of all modes, weighted by
                their votes. "max_init" and "softmax_init" then give the winning modes new random weights, and "max_remove"
                and "softmax_remove" remove them from the background; otherwise the background and a new class would have
                equal weights. The mode with the fewest votes is always kept. Every bias is lowered by ln(C_new + 1) as in
                `init_balanced`.

        Reference: the official release names these choices without a description; the rule is defined here.
        """
        seen = votes.sum(1, keepdim=True) > 0
        shares = torch.where(seen, votes, torch.ones_like(votes))  # a class without a pixel gets the mean of the modes
        winners = shares.argmax(1)
        if how.startswith("max"):
            picked = F.one_hot(winners, votes.shape[1]).to(votes.dtype)
            shares = torch.where(seen, picked, shares)
        shares = shares / shares.sum(1, keepdim=True)
        self._start_from_background(shares.to(self._background_weight().dtype))
        if how.endswith(("_init", "_remove")):
            replaced = winners[seen.squeeze(1)].unique()
            replaced = replaced[replaced != votes.sum(0).argmin()]
            self._reset_modes(replaced, remove=how.endswith("_remove"))

    def mode_votes(self, x: Tensor, labels: Tensor, how: str) -> Tensor:
        """Responses of the background modes to the pixels of the new classes in one batch.

        Args:
            x: (B, c, h, w) features.
            labels: (B, H, W) label map; the new classes are the last C_new ids.
            how: as in `init_from_modes`; "max..." counts each pixel's strongest mode, "softmax..." sums the softmax.

        Returns:
            (C_new, K).
        """
        modes = F.interpolate(self[0](x), size=labels.shape[1:], mode="bilinear", align_corners=False)  # (B, K, H, W)
        strength = modes.softmax(1)
        if how.startswith("max"):
            strength = F.one_hot(modes.argmax(1), modes.shape[1]).movedim(3, 1).to(modes.dtype)
        first = sum(self.classes[:-1])
        ids = torch.arange(first, first + self.num_new, device=labels.device)
        chosen = (labels.unsqueeze(1) == ids.view(1, -1, 1, 1)).to(modes.dtype)  # (B, C_new, H, W)
        return torch.einsum("bchw,bkhw->ck", chosen, strength)

    @torch.no_grad()
    def align(self, reference: str) -> None:
        """Rescale the new classes' weights so that their mean norm is that of rows of the earlier classifiers.

        Args:
            reference: "all" rows; "old": all but row 0 of the first classifier; "background": row 0 of the first classifier
                and, as released, every row of the later ones (which hold no background). With several background modes
                row 0 is the first mode.

        Raises:
            UserError: another reference, or no rows to take it from.

        Reference: Zhao et al., "Maintaining Discrimination and Fairness in Class Incremental Learning" (WA), CVPR 2020,
            eq. 8, for "old"; the rows of "background" are those of PLOP's release.
        """
        *earlier, new = (classifier.weight.flatten(1).norm(dim=1) for classifier in self)
        first, later = (earlier[0], earlier[1:]) if len(self.classes) > 1 else (new[:0], [])
        chosen = {"old": [first[1:], *later], "background": [first[:1], *later], "all": [first, *later]}
        if reference not in chosen:
            raise UserError(f"--align_weight {reference}: choose one of {', '.join(chosen)}")
        norms = torch.cat(chosen[reference])
        if len(norms) == 0:
            raise UserError(f"--align_weight {reference}: this step has no such weights to align the new classes with")
        self[-1].weight.mul_(norms.mean() / new.mean().clamp(min=1e-12))

    def _background_weight(self) -> Tensor:
        """(K, c, 1, 1) weights of the background modes."""
        return self[0].weight[: self.background_modes]

    def _start_from_background(self, shares: Tensor) -> None:
        """Set the weights of the new classes to Σ_k shares·mode_k; shares is (C_new or 1, K)."""
        weights = self._background_weight()
        first, new = self[0], self[-1]
        new.weight.copy_(torch.einsum("nk,kchw->nchw", shares, weights).expand_as(new.weight))
        if new.bias is None or first.bias is None:
            return
        background = first.bias[: self.background_modes]
        shift = math.log(self.num_new + 1)
        new.bias.copy_((shares @ background - shift).expand_as(new.bias))
        background -= shift / (self.background_modes if self.fusion == "sum" else 1)

    def _reset_modes(self, modes: Tensor, remove: bool) -> None:
        """Give background modes new random weights, or remove them from the fused background."""
        weight, bias = self[0].weight, self[0].bias
        assert bias is not None, "cosine classifiers have one background mode"
        if not remove:
            fresh = nn.Conv2d(self[0].in_channels, self.background_modes, 1)
            assert fresh.bias is not None
            weight[modes] = fresh.weight.to(weight)[modes]
            bias[modes] = fresh.bias.to(bias)[modes]
            return
        weight[modes] = 0.0
        bias[modes] = 0.0 if self.fusion in ("sum", "mean") else _REMOVED_BIAS
        if self.fusion == "mean":  # the mean still divides by the number of all modes: the kept modes are scaled up
            share = self.background_modes / (self.background_modes - len(modes))
            weight.mul_(share)
            bias.mul_(share)
