"""ImageNet weights of the body: the official files, torchvision's, or a file that the user names."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from modules import backbones, timm_body
from modules.body import Body
from modules.norm import ABN
from utils.checkpointing import checkpoint_files
from utils.checkpointing.structure import IN_PLACE_NORMS, scales_in_place
from utils.errors import UserError

#: Norms whose scale is the weight itself; the scale of `IN_PLACE_NORMS` is |weight| + eps.
_PLAIN = ("abn", "std")

_SOURCES = (
    "add --pretrained torchvision (torchvision's ImageNet weights), --pretrained FILE, or --no_pretrained; the "
    "in-place ABN files of the official programs are linked from the README of github.com/mapillary/inplace_abn"
)


def load_backbone(body: Body, backbone: str, norm: str, source: str | None, log: Callable[[str], None] = print) -> None:
    """Fill the body with ImageNet weights.

    Args:
        body: that of the backbone.
        backbone: its name, such as "resnet101".
        norm: its norm, a key of `modules.norm.NORMS`; ignored for a body with its own norms.
        source: None for pretrained/<backbone>_<norm>.pth.tar (or the file of another norm with the same scale; for a body with
            its own norms pretrained/<backbone>.pth.tar), "torchvision" for torchvision's weights (IMAGENET1K_V1,
            downloaded once into torch's cache), "timm" for timm's, or a file with the names of the body, of torchvision or of timm.
        log: called with a line that says what was loaded, with the first 12 digits of the file's SHA-256.

    Raises:
        UserError: no such file, a file that is no plain state dict, or one that does not fit the body or is not finite.
    """
    file_norm = norm
    if source == "torchvision":
        name, state = _torchvision_state(backbone)
        digest = ""
    elif source == "timm":
        name, state = _timm_state(backbone)
        digest = ""
    else:
        path, file_norm = (Path(source), norm) if source else _default_file(body, backbone, norm, log)
        state, digest = _read(path)
        name = str(path)
    renamed = body.renamed(state)
    if renamed is not None:
        state, file_norm = renamed, "abn"
    state = {key: value for key, value in state.items() if not key.startswith("classifier.")}
    _check(body, state, name)
    if not body.own_norms:
        _reexpress_scales(state, body, scales_in_place(file_norm), scales_in_place(norm))
    body.load_state_dict(state)
    log(f"backbone weights: {name}{f', sha256 {digest}' if digest else ''}")


def _default_file(body: Body, backbone: str, norm: str, log: Callable[[str], None]) -> tuple[Path, str]:
    """The official file of this backbone, and the norm it was trained with."""
    own = "iabn_sync" if norm == "iabn_sync_test" else norm
    candidates = [own, *(n for n in (*IN_PLACE_NORMS, *_PLAIN) if n != own)]
    paths = {n: Path("pretrained") / f"{backbone}_{n}.pth.tar" for n in candidates}
    if body.own_norms:
        paths = {own: Path("pretrained") / f"{backbone.replace(':', '_')}.pth.tar"}
    for candidate, path in paths.items():
        if path.is_file():
            if candidate != own:
                log(f"no {paths[own]}: {path} is used, whose weights mean the same")
            return path, candidate
    raise UserError(f"no backbone weights at {paths[own]}: {_SOURCES}")


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    """State dict of a file, without "module." prefixes, and the first 12 digits of the file's SHA-256."""
    if not path.is_file():
        raise UserError(f"--pretrained {path}: no such file; {_SOURCES}")
    try:
        content = checkpoint_files.load(path)
    except UserError as error:
        raise UserError(f"--pretrained: {error}, or save its weights again as a state dict") from error
    content = content.get("state_dict", content)
    named = isinstance(content, dict) and all(isinstance(name, str) for name in content)
    if not named or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f'{path} holds no state dict: expected names and tensors, or them under "state_dict"')
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return {re.sub(r"^module\.(body\.)?", "", key): value for key, value in content.items()}, digest


def _torchvision_state(backbone: str) -> tuple[str, dict[str, Tensor]]:
    """Name and state dict of torchvision's ImageNet weights, version 1, from which its segmentation models start."""
    from torchvision import models

    known = backbones.find(backbone).torchvision
    if known is None:
        raise UserError(
            f"--pretrained torchvision: torchvision has no weights of --backbone {backbone}; name a file, or add --no_pretrained"
        )
    weights = models.get_model_weights(known).IMAGENET1K_V1
    try:
        return f"torchvision {backbone} {weights.name}", weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--pretrained torchvision: {weights.url} could not be fetched ({error}); download it elsewhere and name "
            "it by --pretrained FILE, or add --no_pretrained"
        ) from error


def _timm_state(backbone: str) -> tuple[str, dict[str, Tensor]]:
    """Name and state dict of timm's weights of one of its networks."""
    if not backbone.startswith(backbones.TIMM):
        raise UserError(
            f"--pretrained timm: --backbone {backbone} is not of timm; add --pretrained torchvision, or name a file"
        )
    return timm_body.pretrained_state(backbone.removeprefix(backbones.TIMM))


def _check(body: nn.Module, state: dict[str, Tensor], name: str) -> None:
    """Raise UserError unless the state has exactly the names and shapes of the body, and finite numbers."""
    own = body.state_dict()
    # Files older than torch 0.4.1 have no batch counters; nothing computes with them.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unknown = [k for k in state if k not in own]
    shared = [k for k in own if k in state]
    misfits = [k for k in shared if own[k].shape != state[k].shape]
    strange = [k for k in shared if own[k].is_floating_point() != state[k].is_floating_point()]
    spoilt = [k for k in shared if not state[k].to(own[k].dtype).isfinite().all()]
    for problem, keys in (
        ("does not fit this --backbone: it lacks", missing),
        ("does not fit this --backbone: it has the unknown", unknown),
        ("does not fit this --backbone: it has another shape for", misfits),
        ("has numbers of another type in", strange),
        ("has NaN or infinite numbers in", spoilt),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UserError(f"{name} {problem} {keys[0]}{more}; name an intact file of the same {type(body).__name__}")
    for key in own:
        state.setdefault(key, own[key])


def _reexpress_scales(state: dict[str, Tensor], body: nn.Module, source_in_place: bool, in_place: bool) -> None:
    """Convert the weights of norms if the scale of the source's norms is defined otherwise than that of the body's norms.

    In-place norms scale by |weight| + eps, plain ones by the weight. The sign of a negative plain scale is moved into the conv
    before the norm (the filter and the running mean change sign), so that the network computes the same.
    """
    if source_in_place == in_place:
        return
    norms = [key[: -len(".running_mean")] for key in state if key.endswith(".running_mean")]
    for norm in norms:
        eps = cast(ABN, body.get_submodule(norm)).eps
        weight = state[f"{norm}.weight"]
        if source_in_place:
            state[f"{norm}.weight"] = weight.abs() + eps
            continue
        sign = torch.where(weight < 0, -1.0, 1.0).to(weight.dtype)
        conv = re.sub(r"bn(\d?)$", r"conv\1", norm)
        state[f"{norm}.weight"] = (weight.abs() - eps).clamp(min=0)
        state[f"{norm}.running_mean"] = state[f"{norm}.running_mean"] * sign
        state[f"{conv}.weight"] = state[f"{conv}.weight"] * sign.view(-1, 1, 1, 1)
