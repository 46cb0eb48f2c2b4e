"""scripts/benchmark: what it counts, its ratios, and one small run through the command line."""

import json
import subprocess
import sys

import pytest
import torch

from methods.lskd import PUBLISHED_SCHEMES
from modules.atrous import AtrousConv2d
from modules.resnet import Stem
from scripts.benchmark import __main__ as benchmark
from scripts.benchmark import beyond
from scripts.benchmark.workbench import (
    Clock,
    Workbench,
    choose_device,
    options,
    plain_logits,
    ratios,
    synthetic_batch,
    write_files,
)
from tests.support.paths import ROOT
from utils.balance.equilibrium import Coefficients, GradientEquilibrium, TermSpec
from utils.types import IGNORE

SMALL = ["--backbone", "resnet18", "--crop_size", "64", "--device", "cpu", "--repeats", "1"]
CPU = torch.device("cpu")


def small(*words):
    return benchmark.parse([*SMALL, *words])


def test_ratio_is_that_of_medians():
    found = ratios([1.0, 2.0, 4.0], [2.0, 3.0, 4.0])
    assert (found["floor_s"], found["iteration_s"], found["ratio"]) == (2.0, 3.0, 1.5)
    assert (found["pair_ratio_min"], found["pair_ratio_median"], found["pair_ratio_max"]) == (1.0, 1.5, 2.0)


def test_calls_are_timed_in_turn_after_a_round_that_does_not_count():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = Clock(CPU).in_turn(calls, 2)
    assert order == list("ababab")
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_batch_shows_old_new_and_ignored_pixels():
    arguments = small("--old_classes", "16", "--new_classes", "3")
    images, labels = synthetic_batch(arguments, CPU)
    assert images.shape == (2, 3, 64, 64) and labels.shape == (2, 64, 64)
    for label in labels:
        shown = set(label.unique().tolist())
        assert {0, IGNORE} < shown and shown - {0, IGNORE} <= {16, 17, 18}


def test_options_of_run_py_reach_the_measured_training(capsys):
    opts = options(small("--method", "LSKD", "--rge_interval", "8", "--lr", "0.02"))
    assert (opts.rge_interval, opts.lr) == (8, [0.02])
    with pytest.raises(SystemExit):
        options(small("--rge_interval", "0.5"))
    assert "--rge_interval" in capsys.readouterr().err


@pytest.mark.parametrize(("method", "passes"), [("LSKD", 3), ("PLOP", 1), ("MiB", 1), ("FT", 0)])
def test_floor_takes_as_many_teacher_passes_as_the_method_needs(method, passes):
    bench = Workbench(small("--method", method), CPU)
    seen = []
    for name, teacher, student in (
        ("plain", bench.plain_teacher, bench.plain_student),
        ("own", bench.teacher, bench.student),
    ):
        if passes:
            teacher.body.register_forward_hook(lambda *_, name=name: seen.append(f"{name} teacher"))
        student.body.register_forward_hook(lambda *_, name=name: seen.append(f"{name} student"))
    before = [p.clone() for p in bench.student.parameters()]
    bench.floor()
    bench.own_floor()
    assert seen == [
        *["plain teacher"] * passes, "plain student", *["own teacher"] * passes, "own student"
    ]  # fmt: skip
    assert all(torch.equal(p, q) for p, q in zip(before, bench.student.parameters()))  # the floor has no optimiser
    bench.iteration()
    assert not all(torch.equal(p, q) for p, q in zip(before, bench.student.parameters()))


@pytest.mark.parametrize(
    ("method", "terms"),
    [
        ("REMINDER", {"ce", "csw", "pod"}),
        ("SDR", {"ce", "kd", "attraction", "repulsion", "matching", "sparsity"}),
        ("UCD", {"ce", "kd", "contrastive"}),
    ],
)
def test_a_method_that_builds_on_a_state_of_the_step_before_has_one(method, terms):
    bench = Workbench(small("--method", method), CPU, parts=("iteration",))
    assert set(bench.trainer.train_iteration(bench.images, bench.labels)) == {*terms, "loss"}


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("FT", set()),
        ("MiB+AWT", {"init_classifier"}),
        ("PLOP+EWF", {"init_classifier", "begin_step", "fusion_end"}),
        ("MiB+NeST", {"pre-tuning_begin", "pre-tuning_iteration", "pre-tuning_end"}),
        ("RCIL", {"init_classifier"}),
        ("REMINDER", {"init_classifier", "begin_step", "end_step"}),
        (
            "ALIFE-M",
            {"init_classifier", "remembered_crop"}
            | {"rotation_begin", "rotation_iteration", "rotation_end", "replay_iteration"},
        ),
    ],
)
def test_what_a_step_does_beside_its_iterations(method, expected):
    bench = Workbench(small("--method", method), CPU, parts=("iteration",))
    calls = beyond.calls(bench)
    assert set(calls) == expected
    for call in calls.values():
        call()
    assert all(value.isfinite().all() for value in bench.student.state_dict().values())


def test_step_is_measured_with_its_peak(capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "ask_child", lambda arguments, child: {"peak_mb": 300.0, "libraries_mb": 50.0})
    assert benchmark.main([*SMALL, "--method", "MiB+EWF", "--what", "step", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["fusion_end_s"] > 0 and found["step_peak_mb"] == 300


def test_teacher_of_the_floor_keeps_its_norms_and_agrees_with_the_folded_one():
    bench = Workbench(small(), CPU)
    names = [name for name, _ in bench.teacher.named_buffers()]
    assert names and not [name for name, _ in bench.trainer.teacher.named_buffers()]
    with torch.no_grad():
        plain, folded = bench.teacher(bench.images).logits, bench.trainer.teacher(bench.images).logits
    assert plain.isfinite().all() and not bench.teacher.training
    torch.testing.assert_close(plain, folded, rtol=1e-3, atol=1e-3)


def test_plain_networks_compute_the_same_by_ordinary_operations():
    bench = Workbench(small(), CPU)
    with torch.no_grad():
        plain, own = plain_logits(bench.plain_teacher, bench.images), bench.teacher(bench.images).logits
    torch.testing.assert_close(plain, own, rtol=1e-4, atol=1e-4)
    kinds = {type(module) for module in bench.plain_student.modules()}
    assert AtrousConv2d not in kinds and Stem not in kinds
    assert {AtrousConv2d, Stem} <= {type(module) for module in bench.student.modules()}  # a copy was made plain


def test_measuring_one_term_leaves_the_graphs_of_the_others_alone():
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    passes = []
    losses = {}
    for name, weight in zip("abc", weights):
        doubled = 2 * weight
        doubled.register_hook(lambda gradient, name=name: passes.append(name))
        losses[name] = doubled.sum()
    terms = [TermSpec(name, name) for name in "abc"]
    GradientEquilibrium(terms, dict(zip("abc", weights)), Coefficients(1.0, 1.0, 1.0), 1.0).combine(losses)
    assert passes == ["a", "b", "c"]


def test_growth_varies_one_thing_at_a_time():
    cases = benchmark.growth_cases(small("--crop_size", "128"))
    assert [value for value, _ in cases["crop_size"]] == [64, 96, 128, 160]
    assert [value for value, _ in cases["classes"]] == [21, 61, 150]
    assert all(len(changes["tap_schemes"].split(",")) == 6 for _, changes in cases["taps"])
    assert cases["taps"][-1][1]["tap_schemes"] == ",".join(PUBLISHED_SCHEMES)
    assert "taps" not in benchmark.growth_cases(small("--method", "PLOP"))


def test_files_are_a_data_set_that_the_program_reads(tmp_path):
    write_files(tmp_path, 45)  # more than there are different pictures
    found = benchmark.measure_files(small("--data_root", str(tmp_path), "--samples", "2"), ["data", "scan"])
    assert found["masks"] == 45
    assert found["decode_ms"] > 0 and found["sample_ms"] > 0  # which is larger is noise at this size
    assert 0 < found["scan_cached_s"] < found["scan_first_s"]


def test_figure_of_growth(tmp_path):
    points = [{"value": v, "floor_s": v, "iteration_s": 1.5 * v} for v in (1, 2)]
    benchmark.draw_growth({"batch_size": points, "classes": points}, "title", tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_command_line_prints_a_table_and_json(capsys):
    assert benchmark.main([*SMALL, "--what", "iteration", "--json", "--clock", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert found["method"] == "LSKD" and found["clock"] == "cpu"
    assert found["ratio"] == pytest.approx(found["iteration_s"] / found["floor_s"])
    assert any(line.startswith("| floor_s") for line in lines)


def test_memory_is_that_of_a_process_each(monkeypatch):
    peaks = {"floor": 200.0, "iteration": 260.0, "no_optimizer": 210.0}
    commands = []

    def answer(command, **_):
        commands.append(command)
        line = json.dumps({"peak_mb": peaks[command[-1]], "libraries_mb": 50.0})
        return subprocess.CompletedProcess(command, 0, f"a line of the log\n{line}\n", "")

    monkeypatch.setattr(subprocess, "run", answer)
    found = benchmark.measure_memory(small("--method", "PLOP"), CPU)
    assert [command[-2:] for command in commands] == [["--child", child] for child in benchmark.CHILDREN]
    assert all("PLOP" in command for command in commands)
    assert (found["memory_ratio"], found["memory_ratio_no_optimizer"]) == (1.3, 1.05)


def test_process_of_the_memory_measurement_reports_its_peak():
    command = [sys.executable, "scripts/benchmark", *SMALL, "--child", "floor"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert 0 < found["libraries_mb"] < found["peak_mb"]


def test_wrong_arguments_are_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.parse(["--batch_size", "0"])
    assert "--batch_size 0" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA"):
            choose_device("cuda")
        assert benchmark.main(["--device", "cuda"]) == 2
        assert capsys.readouterr().err.startswith("error: --device cuda")
