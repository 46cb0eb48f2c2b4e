"""`--pod_options` and the related options, parsed and checked: the embedding of each tap, and how it is compared."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from utils.errors import UserError

#: Taps that belong to the ResNet body; those after them belong to the DeepLab head (`--pod_apply`).
BACKBONE_TAPS = 4


def loads(text: str) -> dict[str, Any] | None:
    """The JSON object of `--pod_options`; anything else is an error of the command line."""
    if text.count("[") + text.count("{") > 100:
        raise ArgumentTypeError("it is nested more than 100 times; is it another text?")
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text[:80]!r} is not valid JSON ({error}); quote it for the shell") from None
    if value is not None and not isinstance(value, dict):
        raise ArgumentTypeError(f'{text[:80]!r} is not a JSON object such as {{"switch": {{"after": {{}}}}}}')
    return value


_CHOICES = {
    "type": ("local", "spatial", "global"),
    "prepro": ("pow", "none", "abs", "relu"),
    "extra_channels": ("sum", "trim"),
    "difference_function": ("frobenius", "l1", "kl", "bce"),
    "normalize_per_scale": (False, True, "spm"),
    "norm": (False, True),
    "use_adaptative_factor": (False, True),
}


def _known(given: Any, keys: set[str], place: str) -> None:
    """Refuse a value that is not a JSON object, and unknown keys."""
    if not isinstance(given, Mapping):
        raise UserError(f"{place} is {given!r}; it must be a JSON object with keys out of {', '.join(sorted(keys))}.")
    for key in given:
        if key not in keys:
            raise UserError(f"Unknown key {key!r} in {place}; known are {', '.join(sorted(keys))}.")


def _scales(scales: Any) -> tuple[int, ...]:
    """The scales as a tuple of positive integers."""
    if not isinstance(scales, (list, tuple)) or not scales or any(not isinstance(s, int) or s < 1 for s in scales):
        raise UserError(f"spp_scales={scales!r} is not a list of positive integers; the usual one is 1 2 4.")
    return tuple(scales)


@dataclass(frozen=True)
class TapOptions:
    """How one tap is compared. The names are those of the official `--pod_options`.

    Attributes:
        type: embedding, `local`, `spatial` or `global` (`--pod`).
        factor: weight of the term (`--pod_factor`).
        prepro: `pow`, `none`, `abs`, `relu` (`--pod_prepro`).
        spp_scales: sides of the grids of cells (`--spp_scales`).
        norm: scale each embedding to length 1.
        normalize_per_scale: False; True: divide a scale by its number of cells; `spm`: spatial pyramid weights.
        extra_channels: how the student's logits of new classes are used, `sum` or `trim`.
        use_adaptative_factor: weight each image by its share of old pixels.
        difference_function: `frobenius`, `l1`, `kl`, `bce`.
    """

    type: str = "local"
    factor: float = 5.0
    prepro: str = "pow"
    spp_scales: tuple[int, ...] = (1, 2, 4)
    norm: bool = False
    normalize_per_scale: bool | str = False
    extra_channels: str = "sum"
    use_adaptative_factor: bool = False
    difference_function: str = "frobenius"

    def __post_init__(self) -> None:
        object.__setattr__(self, "spp_scales", _scales(self.spp_scales))
        for key, choices in _CHOICES.items():
            value = getattr(self, key)
            if not isinstance(value, (str, bool)) or value not in choices:
                allowed = ", ".join(map(repr, choices))
                raise UserError(f"{key}={value!r} in the POD options is unknown; use one of {allowed}.")
        if isinstance(self.factor, bool) or not isinstance(self.factor, (int, float)):
            raise UserError(f"factor={self.factor!r} in the POD options is not a number; give one such as 0.01.")

    def updated(self, changes: Any, place: str) -> TapOptions:
        """These options with the user's changes.

        Raises:
            UserError: a key that does not exist, named with its place and the known ones.
        """
        _known(changes, {field.name for field in fields(self)}, place)
        return replace(self, **changes)


class TapPlace(NamedTuple):
    """Settings that depend on the position of a tap: background mask, its factor, and whether the map is enlarged first."""

    background_mask: bool
    downscale: bool
    factor: float | None
    interpolate: bool


@dataclass(frozen=True)
class PodOptions:
    """All settings of the POD terms of a step.

    Attributes:
        before: options of all taps but the last.
        after: options of the last tap.
        apply: `all`, `backbone` (the four stages) or `deeplab` (the taps after them) (`--pod_apply`).
        deeplab_mask: keep only old pixels in the last tap, or in all if `mask_position` is `all`.
        deeplab_mask_factor: factor of masked taps; None: the factor of the tap.
        deeplab_mask_downscale: resize the mask to the tap, not the tap to the mask.
        mask_position: `last` or `all`.
        interpolate_last: enlarge the last tap to the labels' size first (`--pod_interpolate_last`).
    """

    before: TapOptions = TapOptions()
    after: TapOptions = TapOptions()
    apply: str = "all"
    deeplab_mask: bool = False
    deeplab_mask_factor: float | None = None
    deeplab_mask_downscale: bool = False
    mask_position: str = "last"
    interpolate_last: bool = False

    def __post_init__(self) -> None:
        if self.apply not in ("all", "backbone", "deeplab"):
            raise UserError(f"--pod_apply {self.apply!r} is unknown; use 'all', 'backbone' or 'deeplab'.")
        if self.mask_position not in ("last", "all"):
            raise UserError(f"mask_position={self.mask_position!r} in --pod_options is unknown; use 'last' or 'all'.")
        if self.deeplab_mask and self.deeplab_mask_factor == 0 and self.mask_position == "all":
            raise UserError(
                "--pod_deeplab_mask_factor 0 with mask_position 'all' in --pod_options leaves no tap; "
                "give a factor above 0 or mask_position 'last'."
            )

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, default: TapOptions | None = None, **rest: Any) -> PodOptions:
        """Parse `--pod_options`.

        Args:
            options: the decoded JSON: `{"switch": {"before": {…}, "after": {…}, "mask_position": …,
                "normalize_per_scale": …}, "difference_function": …, "difference_function_all": …}`, or None. The
                first difference function is the last tap's, the second that of the taps before it.
            default: options from the other flags (`--pod`, `--pod_factor`, `--pod_prepro`, `--spp_scales`).
            **rest: further attributes of this class.

        Returns:
            The options; `before` and `after` each start from `default`.

        Raises:
            UserError: an unknown key or value, named with the known ones.
        """
        default = default or TapOptions()
        options = {} if options is None else options
        _known(options, {"switch", "difference_function", "difference_function_all"}, "--pod_options")
        switch = options.get("switch", {})
        _known(switch, {"before", "after", "mask_position", "normalize_per_scale"}, '"switch" in --pod_options')
        if "normalize_per_scale" in switch:
            default = replace(default, normalize_per_scale=switch["normalize_per_scale"])
        before = default.updated(switch.get("before", {}), '"before" in --pod_options')
        after = default.updated(switch.get("after", {}), '"after" in --pod_options')
        if "difference_function" in options:
            after = replace(after, difference_function=options["difference_function"])
        if "difference_function_all" in options:
            before = replace(before, difference_function=options["difference_function_all"])
        if "mask_position" in switch:
            rest["mask_position"] = switch["mask_position"]
        return cls(before, after, **rest)

    def tap(self, index: int, last: int) -> TapOptions:
        """The options of tap `index` of taps 0..last."""
        return self.after if index == last else self.before

    def applies(self, index: int, last: int) -> bool:
        """Whether tap `index` takes part."""
        masked_off = self.deeplab_mask_factor == 0.0 and self.at(index, last).background_mask
        in_backbone = index < BACKBONE_TAPS
        return not masked_off and (self.apply == "all" or in_backbone == (self.apply == "backbone"))

    def at(self, index: int, last: int) -> TapPlace:
        """The settings for the position of tap `index`."""
        masked = self.deeplab_mask and (index == last or self.mask_position == "all")
        return TapPlace(
            masked, self.deeplab_mask_downscale, self.deeplab_mask_factor, self.interpolate_last and index == last
        )
