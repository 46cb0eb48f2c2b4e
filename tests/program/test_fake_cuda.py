"""The passes of an iteration on tensors of device "cuda", without one: devices, types of the losses, copies, reads by the host."""

import shlex

import pytest
import torch

import methods
import segmentation_module
from methods.plop import PseudoLabels
from modules.backbones import BACKBONES
from modules.norm import NORMS
from scripts.benchmark.__main__ import parse
from scripts.benchmark.workbench import Workbench
from tests.support import thin
from tests.support.fake_cuda import (
    DEVICE,
    SMALL_COPY,
    counting,
    fake_cuda,
    on_device,
    tensors_of,
    unset_fake_temporarily,
)
from tests.support.loss_flags import LOSSES
from utils import class_similarity
from utils.pod import distance
from utils.runtime import amp

SMALL = "--backbone resnet18 --crop_size 32 --old_classes 4 --new_classes 2 --device cpu"
METHODS = [name for name in methods.METHODS if name != "Joint"]  # it has no step 1, and is FT at step 0
#: --opt_level, --amp_dtype and the layout of the images.
LEVELS = (
    ("O0", None, torch.contiguous_format),
    ("O1", "float16", torch.contiguous_format),
    ("O1", "bfloat16", torch.channels_last),
)


@pytest.fixture(scope="module", autouse=True)
def machine():
    """One mode for all tests, because caches keep fake tensors; they are emptied afterwards."""
    caches = [
        found
        for module in (distance, class_similarity)
        for found in vars(module).values()
        if hasattr(found, "cache_clear")
    ]
    for cache in caches:
        cache.cache_clear()
    with fake_cuda():
        yield
    for cache in caches:
        cache.cache_clear()


class Step:
    """Step 1 of a method on the device, as a resume leaves it: the state of the method comes from the CPU.

    Args:
        words: method and options.
    """

    def __init__(self, words):
        with unset_fake_temporarily(), thin.program():
            bench = Workbench(parse([*SMALL.split(), *shlex.split(words)]), torch.device("cpu"))
            checkpoint = dict(bench.checkpoint)
            if checkpoint:  # EWC, PI and RW keep theirs under the official key
                checkpoint["trainer_state"] = checkpoint.pop("method_state")
            state = bench.trainer.method.state_dict()
        self.opts, self.bench = bench.opts, bench
        self.student = on_device(bench.student).train()
        self.teacher = None if bench.trainer.teacher is None else on_device(bench.trainer.teacher)
        self.method = methods.build(bench.opts, bench.task)
        with counting(answer=True):
            self.method.attach(self.student, self.teacher, checkpoint)
            self.method.load_state_dict(state)

    def passes(self, layout):
        """Prepare a batch, the student's pass, all terms and penalties; the batch, the losses by name, and what was counted."""
        images = torch.empty_like(self.bench.images, device=DEVICE, memory_format=layout)
        labels = torch.empty_like(self.bench.labels, device=DEVICE)
        precision = amp.build(self.opts, DEVICE)
        with counting(answer=True) as found:
            with precision.autocast():
                batch = self.method.prepare(images, labels, self.teacher)
                batch = batch.with_student(self.student(batch.images))
            losses = self.method.terms(batch) | self.method.penalties(self.student)
            self.method.after_step(self.student, batch)
        return batch, losses, found


@pytest.mark.parametrize("method", METHODS)
def test_a_method_computes_on_the_device(method):
    step = Step(f"--method {method}")
    for level, dtype, layout in LEVELS:
        step.opts.opt_level, step.opts.amp_dtype = level, dtype
        batch, losses, found = step.passes(layout)
        assert losses
        assert {place: tensor.device for place, tensor in tensors_of(batch) if tensor.device != DEVICE} == {}
        assert {(loss.device, loss.dtype) for loss in losses.values()} == {(DEVICE, torch.float32)}
        assert batch.student.body.dtype is (getattr(torch, dtype) if dtype else torch.float32)
        assert found.copies == []
        thresholds = [part.thresholds for part in step.method.parts if isinstance(part, PseudoLabels)]
        assert all(tensor.device == DEVICE for tensor in thresholds)  # copied once, not in every iteration
        assert not found.reads


#: Options that make tensors, beside those of `loss_flags`.
OPTIONS = (
    "--method LSKD --rge_interval 8",
    "--method LSKD --tap_schemes none,none,md,md,mcd,none",
    "--method LSKD --regularizer rw --entropy_min 1",
    "--method FT --pseudo median --nb_background_modes 3 --multimodal_fusion softmax",
    "--method UCD --ucd_mend labels denominator --ucd_freeze later",
    "--method REMINDER --delta_csw 1",
    "--method ALIFE --cosine",
    "--method RCIL --rcil_stem mended --rcil_init mended",
    "--method PI --reg_no_normalize",
    "--method MiB+AWT --fix_pre_cls",
)


@pytest.mark.parametrize("words", [*(f"--method FT {LOSSES[flag][0]} {LOSSES[flag][1]}" for flag in LOSSES), *OPTIONS])
def test_an_option_computes_on_the_device(words):
    step = Step(words)
    step.opts.opt_level, step.opts.amp_dtype = "O1", "float16"
    batch, losses, found = step.passes(torch.contiguous_format)
    assert {place: tensor.device for place, tensor in tensors_of(batch) if tensor.device != DEVICE} == {}
    assert {(loss.device, loss.dtype) for loss in losses.values()} == {(DEVICE, torch.float32)}
    assert not found.reads and not found.copies


@pytest.mark.parametrize(
    ("backbone", "norm"), [*((backbone, "iabn") for backbone in BACKBONES), *(("resnet18", norm) for norm in NORMS)]
)
def test_a_backbone_computes_on_the_device(backbone, norm):
    opts = thin.options(f"--backbone {backbone} --norm_act {norm}")
    with DEVICE:
        model = segmentation_module.make_model(opts, [4, 2], pretrained=False)
    images = torch.empty(2, 3, 64, 64, device=DEVICE)
    for training, dtype in ((True, torch.float16), (False, torch.bfloat16)):
        with counting() as found, torch.autocast("cuda", dtype=dtype):
            taps = model.train(training)(images)
        assert {tensor.device for _, tensor in tensors_of(taps)} == {DEVICE}
        assert taps.logits.dtype is torch.float32 and taps.body.dtype is dtype
        assert not found.reads and not found.copies


def test_large_copies_and_mixed_devices_are_noticed():
    with counting() as found:
        torch.ones(SMALL_COPY).to(DEVICE)
        assert found.copies == []
        torch.ones(SMALL_COPY + 1).to(DEVICE)
        torch.empty(2, SMALL_COPY, device=DEVICE).copy_(torch.ones(2, SMALL_COPY))
    assert found.copies == [(SMALL_COPY + 1,), (2, SMALL_COPY)]
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(2, device=DEVICE) + torch.ones(2)


def test_reads_of_the_host_are_counted():
    value = torch.ones(3, device=DEVICE)
    with counting(answer=True) as found:
        assert float(value.sum()) == 1.0 and bool(value.any()) and value.tolist() == [1.0] * 3
        assert value[value > 0].shape == (1,)
    assert found.reads == {"_local_scalar_dense": 2 + len(value), "nonzero": 1}
