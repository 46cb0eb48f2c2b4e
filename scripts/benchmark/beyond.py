"""What a step of a method does beside its iterations: its start, statistics, phases and end, each over one batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from dataset.sampler import FixedBatches
from methods.alife import FeatureReplay
from methods.base import Part
from methods.phase import Phase, PhaseRun
from scripts.benchmark.workbench import Workbench

#: Hooks that read images or weights once a step.
HOOKS = ("init_classifier", "begin_step", "end_step")


def calls(bench: Workbench) -> dict[str, Callable[[], object]]:
    """The calls by name; a hook that no part of the method has is left out.

    Args:
        bench: with the part "iteration".

    Returns:
        init_classifier, begin_step and end_step; NAME_begin, NAME_iteration and NAME_end of each phase, without those that do
        nothing; "remembered_crop", a crop of which ALIFE-M takes features, in place of its end_step, which takes thousands.
    """
    trainer, device = bench.trainer, bench.device
    assert trainer is not None
    method, teacher, student = trainer.method, trainer.teacher, bench.student
    loader = FixedBatches([(bench.images, bench.labels)])
    found: dict[str, Callable[[], object]] = {
        "init_classifier": lambda: method.init_classifier(student, teacher, loader, device),
        "begin_step": lambda: method.begin_step(loader, teacher, device),
        "end_step": lambda: method.end_step(student, loader, device),
    }
    for hook in HOOKS:
        if all(getattr(type(part), hook) is getattr(Part, hook) for part in method.parts):
            del found[hook]
    for part in method.parts:
        if isinstance(part, FeatureReplay):
            found.pop("end_step", None)
            found["remembered_crop"] = lambda part=part: _remember(part, bench)  # type: ignore[misc]
    for run in trainer.phase_runs:
        found |= _calls_of_phase(run, bench, loader)
    return found


def _calls_of_phase(run: PhaseRun, bench: Workbench, loader: FixedBatches) -> dict[str, Callable[[], object]]:
    phase = run.phase

    def within(call: Callable[[], object]) -> Callable[[], None]:
        def measured() -> None:
            with run._training_only(phase.parameters()):
                call()

        return measured

    found: dict[str, Callable[[], object]] = {}
    if type(phase).end is not Phase.end:
        found[f"{phase.name}_end"] = within(phase.end)
    if type(phase).begin is not Phase.begin:
        found[f"{phase.name}_begin"] = within(lambda: phase.begin(loader))
    if phase.epochs:
        run.optimizer = phase.make_optimizer()
        found[f"{phase.name}_iteration"] = within(lambda: run._iterate(bench.images, bench.labels))
    return found


@torch.no_grad()
def _remember(part: FeatureReplay, bench: Workbench) -> None:
    with _evaluating(bench.student):
        list(part.vectors_of(bench.student, bench.images[:1], bench.labels[:1] == 0, 0.0))


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
