"""The methods: a registry, and `build`, which composes a method from the parts that its options switch on.

To add one: write methods/mine.py with a subclass of `Method` (name, paper, preset, and a `Part` with what is new in `own_parts`), and
add it to `METHODS`.
"""

from __future__ import annotations

from argparse import Namespace

from dataset.tasks import Task
from methods.alife import ALIFE, ALIFEM
from methods.awt import MiBAWT
from methods.base import Method, Part
from methods.ewc import EWC, WeightPenalty
from methods.ewf import LSKDEWF, PLOPEWF, MiBEWF
from methods.ft import FT, BackgroundModes, Classification, EntropyMinimisation, WeightAlignment
from methods.ilt import ILT, BodyDistillation
from methods.joint import Joint
from methods.lskd import LSKD, LayerSpecificDistillation
from methods.lwf import LWF, OutputDistillation
from methods.lwf_mc import LWFMC, ICarl
from methods.mib import BalancedInitialisation, MiB
from methods.nest import LSKDNeST, MiBNeST, PLOPNeST
from methods.pi import PI
from methods.plop import PLOP, PodDistillation, PseudoLabels
from methods.rcil import RCIL
from methods.reminder import REMINDER
from methods.rw import RW
from methods.sdr import SDR
from methods.ucd import UCD

#: `--method` by name.
METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        FT,
        Joint,
        LWF,
        LWFMC,
        ILT,
        EWC,
        RW,
        PI,
        MiB,
        PLOP,
        LSKD,
        REMINDER,
        MiBAWT,
        RCIL,
        MiBEWF,
        PLOPEWF,
        LSKDEWF,
        SDR,
        UCD,
        MiBNeST,
        PLOPNeST,
        LSKDNeST,
        ALIFE,
        ALIFEM,
    )
}

#: In the order in which they prepare a batch and list their terms: pseudo-labels come before the parts that read labels.
PARTS: tuple[type[Part], ...] = (
    BalancedInitialisation,
    BackgroundModes,
    PseudoLabels,
    Classification,
    LayerSpecificDistillation,
    OutputDistillation,
    BodyDistillation,
    ICarl,
    PodDistillation,
    EntropyMinimisation,
    WeightPenalty,
    WeightAlignment,
)


def all_parts() -> tuple[type[Part], ...]:
    """`PARTS`, and the own parts of the registered methods."""
    own = (part for method in METHODS.values() for part in method.own_parts)
    return tuple(dict.fromkeys((*PARTS, *own)))


def build(opts: Namespace, task: Task) -> Method:
    """The method that the options name, with the parts that they switch on.

    Args:
        opts: parsed and checked.
        task: the step to be trained.

    Returns:
        The method; plain fine-tuning without `--method`.
    """
    return METHODS[opts.method or "FT"](opts, task, all_parts())


def describe() -> str:
    """Text of `--list_methods`, a line for each method: name, paper, year, preset, what it stores beside the network, required step 0."""
    lines = []
    for method in METHODS.values():
        preset = ", ".join(f"{key}={value}" for key, value in method.preset.items()) or "no preset"
        kept = f"stores {method.stores}; step 0: {method.step0}"
        lines.append(f"{method.name:<8} {method.paper} {method.year}; {preset}; {kept}")
    return "\n".join(lines)
