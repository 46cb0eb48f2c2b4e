"""AWT: attribution-aware weight transfer, an initialisation of the new step's classifier.

attribution   a(x) = w₀ ⊙ s ⊙ (F(x) − F(0)): integrated gradients of the background's logit with respect to the features F of the
              teacher, from those of the all-zero image to those of x. The layers after F are linear, so the sum over 50 steps that
              the release computes has this closed form: two forward passes, no backward pass
channels      S: the channels whose mean attribution over the pixels of new classes has the highest maximum; one set for all new
              classes (`attribute.py` of the release) or one for each class (`attribute_class.py`), see --awt_channels
start         W_new[k, c] += w₀[c] for c in S, added to PyTorch's own initial weights; the biases keep PyTorch's

It replaces MiB's balanced initialisation; the training is that of the base method. Images are read with the random crops of the
training, as in the release, so S depends on the seed.

Reference: Goswami et al., "Attribution-aware Weight Transfer: A Warm-Start Initialization for Class-Incremental Semantic
    Segmentation", WACV 2023.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dataset.sampler import TrainingBatches
from dataset.tasks import Task
from methods.base import Method, Part, Rules
from methods.mib import MiB
from modules.upsample import upsampling_mass
from segmentation_module import SegmentationModel
from utils.options.groups import add_switch, option_group
from utils.options.rules import LARGE
from utils.random_streams import stream_seed
from utils.runtime import distributed
from utils.types import IGNORE

#: Choices of --att, in percent; 0: no AWT.
PERCENTAGES = (0, 10, 25, 50, 75)
#: What --init_awt transfers unless --att says otherwise.
DEFAULT_PERCENTAGE = 25

Reduction = Callable[[Tensor], Tensor]

#: The options that switch AWT on, as messages name them.
_AWT = "--init_awt (--att)"


def _mean(maps: Tensor) -> Tensor:
    return maps.mean((-2, -1))


def _maximum(maps: Tensor) -> Tensor:
    return maps.amax((-2, -1))


def _as_it_is(maps: Tensor) -> Tensor:
    return maps


#: `--awt_reduce`: the function applied to each image's (…, c, h, w) map before the mean over images, and the one applied to the mean.
REDUCTIONS: dict[str, tuple[Reduction, Reduction]] = {
    "max_after_mean": (_as_it_is, _maximum),
    "mean_after_max": (_maximum, _as_it_is),
    "mean_after_avg": (_mean, _as_it_is),
    "avg_after_mean": (_as_it_is, _mean),
}


def percentage(opts: Namespace) -> int:
    """Percent of the channels that AWT transfers; 0 if AWT is off."""
    return opts.att or (DEFAULT_PERCENTAGE if opts.init_awt else 0)


def attributions(features: Tensor, baseline: Tensor, weight: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Integrated gradients of the sum of the background's full-size logit, with respect to the features.

    Args:
        features: (B, c, h, w), F(x).
        baseline: (1, c, h, w), F of the all-zero image.
        weight: (c,) of the background, w₀.
        size: H, W of the logits.

    Returns:
        (B, c, h, w), signed. The background's bias has no influence.
    """
    mass = upsampling_mass(features.shape[2:], size, features)  # (h, w)
    return weight[:, None, None] * mass * (features - baseline)


def pixels_of(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels at the size of the features, by the nearest position: (B, H, W) -> (B, h, w), index ⌊i·H/h⌋."""
    rows, columns = (
        torch.arange(small, device=labels.device) * large // small for small, large in zip(size, labels.shape[1:])
    )
    return labels[:, rows][:, :, columns]


class MeanAttributions:
    """Mean attribution over the images that show new pixels, for each set of classes.

    Args:
        sets: number of sets, one for all new classes or one for each.
        reduce: a key of `REDUCTIONS`.
        images: a set is complete with the first contributing image after this many images; 0: the whole data set is used.

    Reference: the release stops its pass over ADE20K in this way. With several processes each has a share of the images, and the image
        that completes a set is the first one of all processes.
    """

    def __init__(self, sets: int, reduce: str, images: int = 0):
        self.sets, self.images = sets, images
        self.of_image, self.of_mean = REDUCTIONS[reduce]
        self.seen = 0
        self.last: list[tuple[int, Tensor] | None] = [None] * sets
        self.sums: Tensor
        self.counts: Tensor

    def add(self, maps: Tensor, masks: Tensor) -> None:
        """Add the images of a batch.

        Args:
            maps: (B, c, h, w) attributions.
            masks: (sets, B, h, w) bool, the pixels of the classes of each set.
        """
        if self.seen == 0:
            like = self.of_image(maps[0])
            self.sums = torch.zeros(self.sets, *like.shape, dtype=torch.float64, device=maps.device)
            self.counts = torch.zeros(self.sets, dtype=torch.float64, device=maps.device)
        places = distributed.rank() + distributed.world_size() * torch.arange(self.seen, self.seen + len(maps))  # (B,)
        early = places < self.images if self.images else torch.ones_like(places, dtype=torch.bool)
        for number, mask in enumerate(masks):
            shown = mask.flatten(1).any(1).cpu()  # (B,)
            chosen = (shown & early).nonzero()[:, 0].to(maps.device)
            if len(chosen):
                self.sums[number] += self.of_image(maps[chosen] * mask[chosen, None]).double().sum(0)
                self.counts[number] += len(chosen)
            late = (shown & ~early).nonzero()[:, 0]
            if len(late) and self.last[number] is None:
                first = int(late[0])
                self.last[number] = (int(places[first]), self.of_image(maps[first] * mask[first]).double())
        self.seen += len(maps)

    @property
    def complete(self) -> bool:
        """Whether all sets are complete, so that further images have no effect."""
        return self.images > 0 and None not in self.last

    def scores(self, cumulative: bool) -> tuple[Tensor, Tensor]:
        """Score of every channel.

        Args:
            cumulative: the mean of a set includes the maps of the sets before it.

        Returns:
            (sets, c) scores in float64, 0 for a set without an image; and (sets,) bool, whether a set has an image. Equal on all processes.
        """
        for number in range(self.sets):
            mine = self.last[number]
            found = [place for place in distributed.gather_objects(mine and mine[0]) if place is not None]
            if mine is not None and mine[0] == min(found):
                self.sums[number] += mine[1]
                self.counts[number] += 1
        sums, counts = distributed.sum_(self.sums), distributed.sum_(self.counts)
        if cumulative:
            sums, counts = sums.cumsum(0), counts.cumsum(0)
        means = sums / counts.clamp(min=1).view(-1, *[1] * (sums.dim() - 1))
        return self.of_mean(means), counts > 0


class AttributionTransfer(Part):
    """Initialise new classes with the background's weights of the channels that respond to them (--init_awt, or --att of the release).

    Attributes:
        scores: (sets, c) of the last initialisation, None before it and with --random_channels.
        selected: (sets, c) bool, the channels that were transferred.
    """

    uses_teacher = True
    purpose = "attribution"
    rules = Rules(
        ranges={"awt_images": (0, LARGE), "rand": (1, LARGE)},
        requires=[
            (
                "att",
                "--mask_att, as in the official program, or --init_awt",
                lambda opts: opts.mask_att or opts.init_awt,
            ),
            ("random_channels", "--init_awt", percentage),
        ],
        exclusive=[
            (_AWT, percentage, "--init_balanced (--orig_init)", lambda opts: "init_balanced" in opts.explicit),
            (_AWT, percentage, "--no_att", lambda opts: opts.no_att),
            (
                "--att 0, which means no AWT,",
                lambda opts: "att" in opts.explicit and opts.att == 0,
                "--init_awt, which --method MiB+AWT sets,",
                lambda opts: opts.init_awt,
            ),
            (_AWT, percentage, "--cosine", lambda opts: opts.cosine),
            (
                _AWT,
                percentage,
                "--nb_background_modes {nb_background_modes}",
                lambda opts: opts.nb_background_modes > 1,
            ),
        ],
        idle=[
            (
                "--init_awt",
                percentage,
                ["mask_att", "awt_channels", "awt_class_mean", "awt_reduce", "awt_images", "awt_copy", "copy_bias"],
            ),
            ("--awt_channels per_class", lambda opts: opts.awt_channels == "per_class", ["awt_class_mean"]),
            ("--random_channels", lambda opts: opts.random_channels, ["rand"]),
        ],
        later=[
            *("init_awt", "att", "mask_att", "awt_channels", "awt_class_mean", "awt_reduce", "awt_images", "awt_copy"),
            *("copy_bias", "random_channels", "rand", "no_att"),
        ],
        classes_only={"init_awt": bool, "att": bool},
    )

    def __init__(self, opts: Namespace, task: Task):
        super().__init__(opts, task)
        self.scores: Tensor | None = None
        self.selected: Tensor

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Add the options of the transfer; those that the release has are spelled as there."""
        group = option_group(parser, "attribution-aware weight transfer (AWT)")
        add = group.add_argument
        add_switch(group, "--init_awt", help="new classifiers start from the background's weights of some channels")
        add("--att", type=int, default=0, choices=PERCENTAGES, help="AWT with so many percent of the channels")
        add_switch(group, "--mask_att", help="attributions count on pixels of new classes alone; AWT has no other form")
        add(
            "--awt_channels",
            default="shared",
            choices=["shared", "per_class"],
            help="one set of channels for all new classes, or one for each",
        )
        add(
            "--awt_class_mean",
            default="released",
            choices=["released", "mended"],
            help="per_class: a class's mean includes the maps of the new classes before it, as released, or not",
        )
        add("--awt_reduce", default="max_after_mean", choices=list(REDUCTIONS), help="how maps become scores")
        add(
            "--awt_images",
            type=int,
            default=0,
            help="the pass ends at the first image that counts after so many images",
        )
        add("--copy", "--awt_copy", dest="awt_copy", action="store_true", help="copy the weights, do not add them")
        add_switch(group, "--copy_bias", help="AWT: biases of new classes and background start as in MiB")
        add_switch(group, "--random_channels", help="AWT with random channels, for comparison")
        add("--rand", type=int, default=64, help="number of random channels")
        add_switch(group, "--no_att", help="new classifiers keep their random start: neither AWT nor --init_balanced")

    @classmethod
    def enabled(cls, opts: Namespace, task: Task) -> bool:
        """From step 1 on, with --init_awt or --att; domains add no class."""
        return percentage(opts) > 0 and task.step > 0 and not task.domain

    @torch.no_grad()
    def init_classifier(
        self, model: SegmentationModel, teacher: nn.Module | None, loader: TrainingBatches, device: torch.device
    ) -> None:
        """Select the channels from the teacher's attributions, and add the background's weights there to the new classes'."""
        if self.opts.random_channels:
            self.selected = self._random_channels(model).to(device)
        else:
            assert teacher is not None
            self.scores, seen = self._measure(model.cls[0].weight[0].flatten(), teacher, loader, device)
            count = math.ceil(percentage(self.opts) * self.scores.shape[1] / 100)  # 26 of 256 for 10 %
            best = self.scores.topk(count, dim=1).indices
            self.selected = torch.zeros_like(self.scores, dtype=torch.bool).scatter_(1, best, True) & seen[:, None]
            if not seen.all() and distributed.is_main():
                unseen = [c for c, found in zip(self.task.new, seen.expand(self.task.num_new).tolist()) if not found]
                print(
                    f"note: AWT found no position of the features on a pixel of the classes {', '.join(map(str, unseen))} of step "
                    f"{self.task.step}; their classifiers keep their random start"
                )
        self._transfer(model)

    def _measure(
        self, weight: Tensor, teacher: nn.Module, loader: TrainingBatches, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Scores of the channels and whether each set has an image, see `MeanAttributions.scores`."""
        opts, task = self.opts, self.task
        per_class = opts.awt_channels == "per_class"
        mean = MeanAttributions(task.num_new if per_class else 1, opts.awt_reduce, opts.awt_images)
        baselines: dict[torch.Size, Tensor] = {}
        for images, labels in loader.every_image():
            images, labels = images.to(device, weight.dtype), labels.to(device).long()
            size = images.shape[2:]
            if size not in baselines:
                baselines[size] = teacher(torch.zeros_like(images[:1]), full_size=False).pre_logits
            features = teacher(images, full_size=False).pre_logits
            small = pixels_of(labels, features.shape[2:])  # (B, h, w)
            if per_class:
                masks = torch.stack([small == task.num_old + k for k in range(task.num_new)])  # (C_new, B, h, w)
            else:
                masks = ((small >= task.num_old) & (small != IGNORE))[None]  # (1, B, h, w)
            mean.add(attributions(features, baselines[size], weight, size), masks)
            if mean.complete:
                break
        return mean.scores(cumulative=per_class and opts.awt_class_mean == "released")

    def _random_channels(self, model: SegmentationModel) -> Tensor:
        """(1, c) bool, --rand channels drawn with the seed."""
        channels = model.cls[0].in_channels
        generator = torch.Generator().manual_seed(stream_seed(self.opts.random_seed, "channels", self.task.step))
        drawn = torch.randperm(channels, generator=generator)[: self.opts.rand]
        return torch.zeros(1, channels, dtype=torch.bool).index_fill_(1, drawn, True)

    def _transfer(self, model: SegmentationModel) -> None:
        """Add (or copy) the background's weights of the selected channels to the new classifier."""
        new, background = model.cls[-1], model.cls[0]
        weights, source = new.weight.flatten(1), background.weight[0].flatten()  # (C_new, c), (c,)
        selected = self.selected.expand(len(weights), -1)
        weights.copy_(torch.where(selected, source if self.opts.awt_copy else weights + source, weights))
        if self.opts.copy_bias and new.bias is not None and background.bias is not None:
            lowered = background.bias[0] - math.log(self.task.num_new + 1)
            new.bias.copy_(lowered.expand_as(new.bias))
            background.bias[0] = lowered


class MiBAWT(Method):
    """MiB whose new classifiers are initialised by attribution."""

    name = "MiB+AWT"
    paper = "Goswami et al., Attribution-aware Weight Transfer, WACV"
    year = 2023
    own_parts = (AttributionTransfer,)
    preset = MiB.preset | {"init_balanced": False, "init_awt": True}
    task_presets = {
        ("ade", "100-5"): {"awt_images": 2000},
        ("ade", "100-10"): {"awt_images": 2000, "awt_channels": "per_class"},
        ("ade", "100-50"): {"awt_images": 2000, "awt_channels": "per_class"},
        ("ade", "50"): {"awt_images": 5000, "awt_channels": "per_class"},
    }
