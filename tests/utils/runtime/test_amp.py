"""Mixed precision: what the levels mean, that half precision trains, and the calls that apex gets."""

import contextlib
import sys
import types
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support import thin
from utils.checkpointing import checkpoint_files
from utils.runtime import amp

CPU = torch.device("cpu")


def precision(level="O1", dtype=None, backend="torch", device=CPU):
    return amp.build(Namespace(opt_level=level, amp_dtype=dtype, amp_backend=backend), device)


@pytest.mark.parametrize(
    ("level", "dtype", "computes_in", "said"),
    [
        ("O0", None, torch.float32, "precision: float32 (O0)"),
        ("O1", None, torch.bfloat16, "precision: autocast bfloat16 (O1)"),
        ("O2", None, torch.bfloat16, "precision: autocast bfloat16 (O2; O2 is mapped to O1, torch.amp keeps float32 weights)"),
        ("O3", None, torch.bfloat16, "precision: autocast bfloat16 (O3; O3 is mapped to O1, torch.amp keeps float32 weights)"),
        ("O1", "float16", torch.float16, "precision: autocast float16 with a gradient scaler (O1)"),
        ("O0", "float16", torch.float32, "precision: float32 (O0)"),
    ],
)  # fmt: skip
def test_levels(level, dtype, computes_in, said):
    policy = precision(level, dtype)
    with policy.autocast():
        assert nn.Linear(3, 2)(torch.ones(1, 3)).dtype is computes_in
    assert policy.describe(level) == said
    assert policy.scaler.is_enabled() == (computes_in is torch.float16)


@pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler is enabled")
def test_float16_is_the_default_on_cuda():
    assert precision(device=torch.device("cuda")).dtype is torch.float16


def test_full_widens_half_precision_only():
    for kind, expected in (
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        assert amp.at_least_float32(torch.ones(1, dtype=kind)).dtype is expected
    exact = torch.ones(1)
    assert amp.at_least_float32(exact) is exact


def test_gradients_are_left_unscaled_and_overflow_skips_the_move():
    policy = precision(dtype="float16")
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    policy.backward((weight * 2).sum(), optimizer)
    assert weight.grad.item() == 2.0
    assert policy.gradient_scale == amp.INITIAL_SCALE
    policy.step(optimizer)
    assert weight.item() == pytest.approx(0.8)
    optimizer.zero_grad()
    policy.backward((weight * float("inf")).sum(), optimizer)
    policy.step(optimizer)
    assert weight.item() == pytest.approx(0.8)
    assert policy.gradient_scale == amp.INITIAL_SCALE / 2

    continued = precision(dtype="float16")
    continued.load_state_dict(policy.state_dict())
    assert continued.gradient_scale == amp.INITIAL_SCALE / 2
    assert precision("O0").gradient_scale == 1.0
    precision("O0").load_state_dict({})


def test_momentum_is_sound_after_an_overflow_in_the_first_step():
    policy = precision(dtype="float16")
    weight = nn.Parameter(torch.ones(1))
    fused = policy.allows_fused_step
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, nesterov=True, fused=fused)
    for factor in (float("inf"), 2.0):
        optimizer.zero_grad()
        policy.backward((weight * factor).sum(), optimizer)
        policy.step(optimizer)
    assert weight.item() == pytest.approx(1 - 0.1 * (2 + 0.9 * 2))
    assert precision().allows_fused_step and precision("O0").allows_fused_step


def test_an_overflow_is_no_non_finite_loss(tmp_path, monkeypatch, capsys):
    """A scale at which every gradient of the six iterations is infinite: nothing moves, nothing stops."""
    monkeypatch.setattr(amp, "INITIAL_SCALE", 2.0**127)
    with thin.program():
        assert thin.launch(tmp_path, "--task 6-2 --step 0 --opt_level O1 --amp_dtype float16 --weight_decay 0") == 0
    said = capsys.readouterr()
    assert "non-finite" not in said.out + said.err
    state = checkpoint_files.load(tmp_path / "checkpoints" / "6-2-shapes_n_0.pth")
    assert all(value.isfinite().all() for value in state["model_state"].values())
    assert state["scheduler_state"]["last_epoch"] == 6 and not state["optimizer_state"]["state"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", ["PLOP", "LSKD"])
def test_half_precision_trains_finite_and_close_to_float32(method, dtype):
    found = {}
    with thin.program():
        for level in ("O0", "O1"):
            step = thin.Step(
                f"--method {method} --opt_level {level}" + (f" --amp_dtype {dtype}" if level == "O1" else "")
            )
            step.begin(thin.images(2), thin.bands(0, 4, 5, 255))
            trainer = step.trainer()
            found[level] = [trainer.train_iteration(thin.images(2), thin.bands(0, 4, 5, 255)) for _ in range(3)]
            assert all(p.dtype is torch.float32 and p.isfinite().all() for p in trainer.network.parameters())
    assert found["O1"][0]["ce"] == pytest.approx(found["O0"][0]["ce"], rel=0.05)
    assert all(abs(value) < 1e4 for values in found["O1"] for value in values.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_most_likely_class_is_that_of_float32_logits(dtype):
    """Half precision rounds neighbouring logits to equal ones, of which arg-max takes the lower index: an older class."""
    with thin.program():
        step = thin.Step(f"--method PLOP --opt_level O1 --amp_dtype {dtype}")
        images, labels = thin.images(4, 64), thin.bands(0, 4, 5, 255, count=4, size=64)
        step.begin(images, labels)
        trainer = step.trainer()
        trainer.network.eval()
        with torch.no_grad():  # every class is likely somewhere
            means = trainer.network(images).logits.mean((0, 2, 3)).split(trainer.network.classes)
            for classifier, mean in zip(trainer.network.cls, means):
                classifier.bias -= mean
        with torch.no_grad(), trainer.precision.autocast():
            student, batch = trainer.network(images), step.method.prepare(images, labels, step.teacher)
        for taps in (student, batch.teacher):
            assert taps.logits_small.dtype is getattr(torch, dtype) and taps.logits.dtype is torch.float32
        rounded, exact = (
            F.interpolate(small, size=images.shape[2:], mode="bilinear", align_corners=False).argmax(1)
            for small in (student.logits_small, student.logits_small.float())
        )
        assert (rounded[rounded != exact] < exact[rounded != exact]).all() and (rounded != exact).any()
        assert torch.equal(trainer.predict(images), exact)
        trusted = batch.pseudo_mask
        teacher = F.interpolate(
            batch.teacher.logits_small.float(), size=images.shape[2:], mode="bilinear", align_corners=False
        )
        assert trusted.any() and torch.equal(batch.labels[trusted], teacher.argmax(1)[trusted])


# ------------------------------------------------------------------------- apex


@pytest.fixture
def calls(monkeypatch):
    """A stand-in for apex.amp that notes its calls."""
    made = []
    fake = types.ModuleType("apex.amp")

    def initialize(model, optimizer, opt_level):
        made.append(("initialize", opt_level))
        return model, optimizer

    @contextlib.contextmanager
    def scale_loss(loss, optimizer):
        made.append("scale_loss")
        yield loss * 2
        made.append("unscaled")

    fake.initialize, fake.scale_loss = initialize, scale_loss
    fake.state_dict = lambda: {"loss_scaler0": {"loss_scale": 4.0}}
    fake.load_state_dict = lambda state: made.append(("load", state))
    package = types.ModuleType("apex")
    package.amp, package.__path__ = fake, []
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.amp", fake)
    return made


def test_apex_is_called_as_its_manual_says(calls):
    policy = precision("O2", backend="apex")
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.weight.item()
    assert policy.prepare(model, optimizer) == (model, optimizer)
    assert policy.describe("O2") == "precision: apex.amp O2"
    with policy.autocast():
        out = model(torch.ones(1, 1))
    assert out.dtype is torch.float32  # apex patches the functions itself
    policy.backward(out.sum(), optimizer)
    policy.step(optimizer)
    assert model.weight.item() == pytest.approx(before - 0.1 * 2)
    assert calls == [("initialize", "O2"), "scale_loss", "unscaled"]
    policy.load_state_dict(policy.state_dict())
    assert calls[-1] == ("load", {"loss_scaler0": {"loss_scale": 4.0}})


def test_apex_is_found_only_with_its_amp(calls, monkeypatch):
    sys.modules["apex.amp"].__spec__ = types.SimpleNamespace(name="apex.amp")
    assert amp.apex_available()
    monkeypatch.delitem(sys.modules, "apex.amp")
    assert not amp.apex_available()  # the package of that name on PyPI
    monkeypatch.setitem(sys.modules, "apex", None)
    assert not amp.apex_available()
