"""What only a GPU can show; skipped without one. `scripts/gpu_check.sh --device cpu` runs these tests on the CPU, to test them."""

import contextlib
import math
import os
import signal
import subprocess
import sys

import pytest
import torch

import methods
from dataset.sampler import FixedBatches
from modules.norm import InPlaceABN
from scripts.benchmark.__main__ import parse
from scripts.benchmark.workbench import Workbench
from tests.support import thin
from tests.support.paths import ROOT
from train import Trainer
from utils.checkpointing import checkpoint_files
from utils.checkpointing.checkpoint_files import digest
from utils.runtime import gate
from utils.runtime.divergence import copy_to_cpu
from utils.runtime.errors import NonFiniteLoss

#: Set by scripts/gpu_check.
CHOSEN = os.environ.get("GPU_CHECK_DEVICE") or ("cuda" if torch.cuda.is_available() else "")
DEVICE = torch.device(CHOSEN or "cpu")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CHOSEN, reason="there is no GPU")]
on_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="only CUDA has it")

SMALL = "--backbone resnet18 --crop_size 64 --batch_size 2 --old_classes 4 --new_classes 2"
MAIN = ("FT", "MiB", "PLOP", "LSKD")
#: Joint has no step 1; on the CPU other tests compare the methods.
METHODS = [name for name in methods.METHODS if name != "Joint"] if DEVICE.type == "cuda" else MAIN
STEP = f"--task 6-2 --step 0 --method FT --epochs 2 --device {DEVICE.type}"


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """float32 without the TensorFloat-32 of convolutions, and the gate on whichever device; on the CPU networks of few channels."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(gate, "ASYNCHRONOUS", ("cuda", DEVICE.type))
    with thin.program() if DEVICE.type == "cpu" else contextlib.nullcontext():
        yield


def bench_of(text, device=DEVICE):
    """A step 1 on synthetic images; its first weights are drawn on the CPU."""
    return Workbench(parse(f"{SMALL} --device {device.type} {text}".split()), device, parts=("iteration",))


def losses(bench, iterations):
    """Losses of each iteration."""
    found = []
    for _ in range(iterations):
        values = bench.trainer.train_iteration(bench.images, bench.labels)
        found.append(bench.trainer.settle() if values is None else values)
        bench.trainer.iteration += 1
    return found


@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", ["leaky_relu", "identity"])
def test_in_place_norm_is_that_of_the_package(activation, dtype, monkeypatch):
    pytest.importorskip("inplace_abn")
    found = []
    for package in (True, False):
        torch.manual_seed(0)
        norm = InPlaceABN(8, activation).to(DEVICE)
        x = torch.randn(4, 8, 9, 9, device=DEVICE).to(dtype).requires_grad_()
        with monkeypatch.context() as patch:
            if not package:
                patch.setattr("modules.norm.inplace_abn", None)
            out = norm(x * 2)  # the package overwrites its input, which may be no leaf
            out.float().square().sum().backward()
        found.append((out.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var))
    rtol = 1e-4 if dtype is torch.float32 else 2e-2
    for own, theirs in zip(*found):
        torch.testing.assert_close(own, theirs, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("method", METHODS)
def test_iterations_are_those_of_the_cpu(method):
    """The first one closely; then rounding differences grow."""
    expected, actual = (losses(bench_of(f"--method {method}", d), 4) for d in (torch.device("cpu"), DEVICE))
    for number, (mine, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert mine == pytest.approx(theirs, rel=2e-3 if number == 0 else 5e-2, abs=1e-4)


@pytest.mark.parametrize("options", ["--amp_dtype float16", "--amp_dtype bfloat16", "--channels_last", "--compile"])
@pytest.mark.parametrize("method", MAIN)
def test_faster_options_train_like_float32(method, options):
    """The first loss is that of float32. Distances from the teacher, which the student starts as, are 0 there but for rounding."""
    plain, fast = (losses(bench_of(f"--method {method} {words}"), 3) for words in ("", options))
    assert fast[0]["ce"] == pytest.approx(plain[0]["ce"], rel=0.05, abs=1e-2)
    assert fast[0]["loss"] == pytest.approx(plain[0]["loss"], rel=0.1, abs=0.1)
    assert all(math.isfinite(value) for values in fast for value in values.values())


@pytest.mark.parametrize("options", ["", "--amp_dtype float16"])
@pytest.mark.parametrize("method", [*METHODS, *(["RW"] if "RW" not in METHODS else [])])
def test_an_iteration_that_is_not_finite_changes_nothing(method, options):
    bench = bench_of(f"--method {method} {options}")
    trainer = bench.trainer
    losses(bench, 2)
    before = copy_to_cpu(trainer.state_dict())
    kept = {name: digest(before[name]) for name in before if name not in ("precision", "random")}
    assert trainer.train_iteration(bench.images * torch.nan, bench.labels) is None
    on_device = trainer.state_dict()
    assert digest(on_device["model"]) == kept["model"]
    assert digest(on_device["optimizer"]["state"]) == digest(before["optimizer"]["state"])
    assert on_device["precision"].get("scale") == before["precision"].get("scale")
    trainer.iteration += 1
    with pytest.raises(NonFiniteLoss):
        trainer.settle()
    after = trainer.state_dict()
    assert [name for name in kept if name != "balancer" and digest(after[name]) != kept[name]] == []


@on_cuda
@pytest.mark.parametrize("options", ["", "--amp_dtype float16"])
@pytest.mark.parametrize("method", METHODS)
def test_an_iteration_does_not_wait_for_the_device(method, options):
    bench = bench_of(f"--method {method} {options}")
    losses(bench, 3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert bench.trainer.train_iteration(bench.images, bench.labels) is None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bench.trainer.settle()


def test_a_resume_goes_on_where_the_run_was_stopped(tmp_path, monkeypatch):
    train = Trainer.train_iteration

    def interrupted(trainer, *batch):
        if trainer.total_iterations == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return train(trainer, *batch)

    with thin.program():
        assert thin.launch(tmp_path / "whole", STEP) == 0
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_iteration", interrupted)
            assert thin.launch(tmp_path / "stopped", STEP) == 143
        assert thin.launch(tmp_path / "stopped", f"{STEP} --resume") == 0
    states = [
        checkpoint_files.load(tmp_path / name / "checkpoints" / "6-2-shapes_n_0.pth") for name in ("whole", "stopped")
    ]
    for name, value in states[0]["model_state"].items():
        torch.testing.assert_close(states[1]["model_state"][name], value, rtol=1e-2, atol=1e-3)


@on_cuda
@pytest.mark.parametrize("method", ["PLOP", "LSKD"])
def test_a_trial_batch_takes_the_memory_of_the_training(method):
    bench = bench_of(f"--method {method}")
    torch.cuda.reset_peak_memory_stats(DEVICE)
    bench.trainer.trial(FixedBatches([(bench.images, bench.labels)]))
    trial = torch.cuda.max_memory_allocated(DEVICE)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    losses(bench, 3)
    assert torch.cuda.max_memory_allocated(DEVICE) <= 1.02 * trial


def test_all_devices_train_together(tmp_path):
    """nccl with all GPUs; on the CPU two processes with gloo."""
    processes = torch.cuda.device_count() if DEVICE.type == "cuda" else 2
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "run.py"]
    options = (
        f"--dataset shapes --task 6-2 --overlap --step 0 1 --method LSKD --backbone resnet18 --no_pretrained --crop_size 64 --epochs 1 "
        f"--shapes_train {12 * processes} --shapes_val 4 --batch_size 2 --num_workers 0 --no_progress --device {DEVICE.type}"
    )
    folders = [f"--{name}={tmp_path / name}" for name in ("checkpoint", "results", "logdir")]
    done = subprocess.run([*command, *options.split(), *folders], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]
    assert len(list((tmp_path / "checkpoint").glob("*_[01].pth"))) == 2
