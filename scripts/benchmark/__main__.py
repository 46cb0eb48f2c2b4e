"""Measure the time of a training iteration, relative to a floor: the passes that every implementation of the method needs.

    python scripts/benchmark --method LSKD --backbone resnet101 --crop_size 256 --batch_size 2 --device cpu --json
    python scripts/benchmark --what all --threads 1 --clock cpu --out runs/benchmark

floor       LSKD: three plain teacher passes; other methods that look at the teacher: one; else none; plus a plain forward and
            backward pass of the student with cross entropy. The teacher is in evaluation mode, without gradients, its norms not
            folded; both networks have the norm of --norm_act and are made of ordinary operations (`benchmark_parts.plain`).
            No optimiser, no data loading. own_floor: the same passes through this program's networks.
iteration   `Trainer.train_iteration` with the batch on the device: teacher, pseudo-labels, student, all loss terms, the balancer's
            gradients, backward, optimiser, schedule. The optimiser's step, which the floor lacks, is also shown apart.
memory      peak of a process that does nothing else (resident on the CPU, allocated on CUDA), one each for floor, iteration, and
            iteration without the optimiser's step, whose momentum is as large as the network; libraries_mb of each are there
            before the networks are.
step        what a step does beside its iterations, each over one batch: init_classifier (AWT's attribution, RCIL's merge), begin_step
            (PLOP's thresholds), phases (NeST's pre-tuning, ALIFE-M's rotation and replay, EWF's fusion), end_step (REMINDER's
            prototypes); and the peak memory of a process that does all that after two iterations.
data        a training sample in one process: decoding, crop, normalisation.   scan   reading the masks once, and from the cache.
validation  the confusion matrix against the forward pass.
growth      floor and iteration by image size, batch size, classes and distilled taps, one varied at a time, with a figure.

Floor and iteration run in turn in one process; shown are medians over the rounds and the ratio of the medians. On a machine with other
work, `--threads 1 --clock cpu` counts processor time. --amp_dtype, --channels_last and --compile are compared with eager float32.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402  (the project is run from its folder, not installed)
import torch  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

import argparser  # noqa: E402
import dataset  # noqa: E402
import methods  # noqa: E402
from dataset.source import FileSource  # noqa: E402
from dataset.voc import Voc  # noqa: E402
from methods.lskd import PUBLISHED_SCHEMES  # noqa: E402
from metrics.stream_metrics import StreamSegMetrics  # noqa: E402
from modules.backbones import BackboneNames  # noqa: E402
from modules.norm import NORMS  # noqa: E402
from scripts.benchmark import beyond  # noqa: E402
from scripts.benchmark.workbench import (  # noqa: E402
    Clock,
    Workbench,
    choose_device,
    machine,
    peak_mb,
    ratios,
    write_files,
)
from utils.errors import UserError  # noqa: E402
from utils.reporting.tables import Table  # noqa: E402
from utils.types import TAP_NAMES  # noqa: E402

WHAT = ("iteration", "step", "data", "scan", "validation", "memory", "growth")
#: What a process of the memory measurement runs.
CHILDREN = ("floor", "iteration", "no_optimizer")
#: Number of masks that the scan is reported for.
SCANNED = 10_000
#: Growth: (classes before the step, new ones).
CLASSES = ((16, 5), (51, 10), (100, 50))


def measure_iteration(arguments: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Floor, iteration, optimiser step, and, where options are to make it faster, the same iteration without them."""
    bench = Workbench(arguments, device)
    calls = {
        "floor": bench.floor,
        "iteration": bench.iteration,
        "own_floor": bench.own_floor,
        "optimizer": bench.optimizer_step,
    }
    clock = Clock(device, arguments.clock)
    seconds = clock.in_turn(calls, arguments.repeats)
    found = ratios(seconds["floor"], seconds["iteration"])
    found["own_floor_s"] = statistics.median(seconds["own_floor"])
    found["own_ratio"] = found["iteration_s"] / found["own_floor_s"]
    found["optimizer_s"] = statistics.median(seconds["optimizer"])
    found["iterations_per_s"] = 1 / found["iteration_s"]
    if arguments.amp_dtype or arguments.channels_last or arguments.compile:
        del bench, calls  # frees their memory
        plain = Workbench(arguments, device, fast=False, parts=("iteration",))
        eager = clock.in_turn({"eager": plain.iteration}, arguments.repeats)["eager"]
        found["eager_s"] = statistics.median(eager)
        found["speedup"] = found["eager_s"] / found["iteration_s"]
    return found


def measure_memory(arguments: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Peak memory in MiB of one process for each part, which runs this file with `--child`."""
    del device  # each process chooses it
    peaks, libraries = {}, 0.0
    for child in CHILDREN:
        found = ask_child(arguments, child)
        peaks[f"{child}_peak_mb"], libraries = found["peak_mb"], found["libraries_mb"]
    floor = peaks["floor_peak_mb"]
    return peaks | {
        "libraries_mb": libraries,
        "memory_ratio": peaks["iteration_peak_mb"] / floor,
        "memory_ratio_no_optimizer": peaks["no_optimizer_peak_mb"] / floor,
    }


def ask_child(arguments: argparse.Namespace, child: str) -> dict[str, float]:
    """What a process of its own answers that runs this file again with `--child`."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments.words, "--child", child]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise UserError(f"the process that measures the memory of the {child} failed: {answer.stderr[-500:]}")
    found: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return found


def measure_step(arguments: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Seconds of what a step does beside its iterations, and the peak memory in MiB of a step."""
    peak = ask_child(arguments, "step")["peak_mb"]
    calls = beyond.calls(Workbench(arguments, device, parts=("iteration",)))
    seconds = Clock(device, arguments.clock).in_turn(calls, arguments.repeats)
    return {f"{name}_s": statistics.median(values) for name, values in seconds.items()} | {"step_peak_mb": peak}


def run_child(arguments: argparse.Namespace, device: torch.device) -> None:
    """Run the part that `--child` names twice, because the first run allocates the gradients, and print the peak as JSON."""
    libraries = peak_mb(device)
    bench = Workbench(arguments, device, parts=("floor",) if arguments.child == "floor" else ("iteration",))
    if arguments.child == "no_optimizer":
        assert bench.trainer is not None
        vars(bench.trainer.precision)["step"] = lambda *_, **__: None  # its memory is left out
    for _ in range(2):
        bench.floor() if arguments.child == "floor" else bench.iteration()
    for call in beyond.calls(bench).values() if arguments.child == "step" else ():
        call()
    print(json.dumps({"peak_mb": peak_mb(device), "libraries_mb": libraries}))


def measure_data(arguments: argparse.Namespace, root: Path) -> dict[str, float]:
    """Milliseconds of a training sample and of its decoding alone."""
    words = ["--data_root", str(root), "--dataset", "voc", "--task", "15-5", "--step", "1", "--overlap"]
    opts = argparser.parse([*words, "--crop_size", str(arguments.data_crop_size)])
    train = dataset.build(opts, dataset.load_task(opts, 1)).train
    count = min(arguments.samples, len(train))
    clock = Clock(torch.device("cpu"), arguments.clock)
    calls = {
        "decode": lambda: [train.source.read(int(index)) for index in train.indices[:count]],
        "sample": lambda: [train[position] for position in range(count)],
    }
    seconds = clock.in_turn(calls, max(1, arguments.repeats // 3))
    return {f"{name}_ms": 1000 * statistics.median(values) / count for name, values in seconds.items()}


def measure_scan(root: Path) -> dict[str, float]:
    """Wall seconds for 10,000 masks (in proportion, where there are fewer), read from the files and from the cache."""
    clock, source = Clock(torch.device("cpu")), FileSource(Voc(), root, train=True)
    share = SCANNED / len(source)
    first = clock.seconds(lambda: source.inspect(np.arange(len(source))))
    source.presence()  # fills the cache
    cached = clock.seconds(source.presence)
    return {"masks": len(source), "scan_first_s": first * share, "scan_cached_s": cached * share}


def measure_files(arguments: argparse.Namespace, what: list[str]) -> dict[str, float]:
    """Data and scan, on `--data_root` or on files that are written for it."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(arguments.data_root or folder)
        if not arguments.data_root:
            write_files(root, arguments.masks)
        found = measure_scan(root) if "scan" in what else {}
        return found | (measure_data(arguments, root) if "data" in what else {})


def measure_validation(arguments: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Seconds of a batch's forward pass in evaluation and of its entry into the confusion matrix."""
    bench = Workbench(arguments, device, parts=("iteration",))
    bench.student.eval()
    metrics = StreamSegMetrics(bench.task.num_total, device)
    assert bench.trainer is not None
    predict = bench.trainer.predict
    predictions = predict(bench.images)
    calls = {
        "forward": lambda: predict(bench.images),
        "matrix": lambda: metrics.update(bench.labels, predictions),
    }
    seconds = Clock(device, arguments.clock).in_turn(calls, arguments.repeats)
    forward, matrix = (statistics.median(seconds[name]) for name in ("forward", "matrix"))
    return {"forward_s": forward, "confusion_matrix_s": matrix, "confusion_matrix_share": matrix / forward}


def growth_cases(arguments: argparse.Namespace) -> dict[str, list[tuple[float, dict]]]:
    """For each quantity that varies: its values, and the arguments to replace."""
    size, batch = arguments.crop_size, arguments.batch_size
    sizes = sorted({max(64, round(size * factor / 32) * 32) for factor in (0.5, 0.75, 1, 1.25)})
    cases = {
        "crop_size": [(value, {"crop_size": value}) for value in sizes],
        "batch_size": [(value, {"batch_size": value}) for value in sorted({1, batch, 2 * batch})],
        "classes": [(old + new, {"old_classes": old, "new_classes": new}) for old, new in CLASSES],
    }
    if arguments.method == "LSKD":
        schemes = PUBLISHED_SCHEMES
        cases["taps"] = [
            (count, {"tap_schemes": ",".join((*schemes[:count], *["none"] * (len(schemes) - count)))})
            for count in range(0, len(TAP_NAMES) + 1, 2)
        ]
    return cases


def measure_growth(arguments: argparse.Namespace, device: torch.device) -> dict[str, list[dict[str, float]]]:
    """Floor and iteration, one thing varied at a time; writes growth.png and growth.json to `--out`."""
    curves: dict[str, list[dict[str, float]]] = {}
    for name, cases in growth_cases(arguments).items():
        curves[name] = []
        for value, changes in cases:
            changed = copy.copy(arguments)
            vars(changed).update(changes)
            bench = Workbench(changed, device)
            calls = {"floor": bench.floor, "iteration": bench.iteration}
            seconds = Clock(device, arguments.clock).in_turn(calls, arguments.repeats)
            curves[name].append({"value": value, **ratios(seconds["floor"], seconds["iteration"])})
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "growth.json").write_text(json.dumps(curves, indent=1) + "\n")
    draw_growth(curves, f"{arguments.method}, {arguments.backbone}", out / "growth.png")
    return curves


def draw_growth(curves: dict[str, list[dict[str, float]]], title: str, path: Path) -> None:
    """A panel for each thing that varies: seconds of floor and iteration.

    Args:
        curves: as `measure_growth` returns them.
        title: of the figure.
        path: PNG to write.
    """
    figure = Figure(figsize=(3.2 * len(curves), 3), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (name, points) in zip(np.ravel(figure.subplots(1, len(curves))), curves.items()):
        values = [point["value"] for point in points]
        for line in ("floor", "iteration"):
            axes.plot(values, [point[f"{line}_s"] for point in points], marker="o", label=line)
        axes.set_xlabel(name)
        axes.set_ylim(bottom=0)
        axes.set_xticks(values)
    figure.axes[0].set_ylabel("seconds")
    figure.axes[0].legend()
    figure.savefig(path, dpi=150)


def table(found: dict) -> str:
    """Markdown table with a row for each value; growth has further rows."""
    rows = [[name, f"{value:.4g}"] for name, value in found.items() if isinstance(value, (int, float))]
    for name, points in found.get("growth", {}).items():
        for point in points:
            seconds = f"floor {point['floor_s']:.4g} s, iteration {point['iteration_s']:.4g} s"
            rows.append([f"{name} {point['value']}", f"{seconds}, ratio {point['ratio']:.3f}"])
    return Table(["measure", "value"], rows).markdown()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of this script; `words` are the ones that a process of the memory measurement gets again."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--what", nargs="+", default=["iteration", "memory"], choices=[*WHAT, "all"], help="what to measure")
    add("--method", default="LSKD", choices=list(methods.METHODS), help="method")
    add("--backbone", default="resnet101", choices=BackboneNames(), help="body")
    add("--norm_act", default="iabn", choices=list(NORMS), help="norm of both networks")
    add("--crop_size", type=int, default=256, help="side of the images, in pixels")
    add("--batch_size", type=int, default=2, help="images of a batch")
    add("--old_classes", type=int, default=16, help="classes before the step, background included")
    add("--new_classes", type=int, default=5, help="classes that the step adds")
    add("--tap_schemes", default=None, help="as for run.py")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where to compute")
    add("--amp_dtype", default=None, choices=["float16", "bfloat16"], help="mixed precision, against float32")
    add("--channels_last", action="store_true", help="channels-last memory, against the default")
    add("--compile", action="store_true", help="torch.compile, against eager")
    add("--repeats", type=int, default=7, help="rounds")
    add("--threads", type=int, default=0, help="CPU threads; 0: as torch chooses")
    add("--clock", default="wall", choices=["wall", "cpu"], help="cpu: processor seconds of this process")
    add("--data_root", default=None, help="VOC for data and scan; none: files are made for the purpose")
    add("--data_crop_size", type=int, default=512, help="crop of data, in pixels")
    add("--samples", type=int, default=40, help="samples of data")
    add("--masks", type=int, default=2000, help="files that are made for data and scan")
    add("--out", default="runs/benchmark", help="folder of the growth figure")
    add("--json", action="store_true", help="a last line of JSON")
    add("--child", default=None, choices=(*CHILDREN, "step"), help=argparse.SUPPRESS)
    arguments, options = parser.parse_known_args(argv)
    arguments.options = options  # of run.py, which checks them
    for name in ("crop_size", "batch_size", "old_classes", "new_classes", "repeats", "samples", "masks"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} must be at least 1")
    arguments.words = argv
    return arguments


def measure(arguments: argparse.Namespace, device: torch.device) -> dict:
    """All that `--what` names, in one dictionary."""
    what = list(WHAT) if "all" in arguments.what else arguments.what
    found: dict = machine(device)
    for name, call in (
        ("memory", measure_memory),
        ("iteration", measure_iteration),
        ("step", measure_step),
        ("validation", measure_validation),
    ):
        found |= call(arguments, device) if name in what else {}
    if {"data", "scan"} & set(what):
        found |= measure_files(arguments, what)
    if {"data", "iteration"} <= set(what):
        # Worker processes needed to load data as fast as the iterations use it
        found["workers"] = math.ceil(found["sample_ms"] / 1000 * arguments.batch_size / found["iteration_s"])
    if "growth" in what:
        found["growth"] = measure_growth(arguments, device)
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 2 after a message for arguments that cannot work."""
    arguments = parse(argv)
    try:
        device = choose_device(arguments.device)
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        if arguments.child:
            run_child(arguments, device)
            return 0
        found = measure(arguments, device)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    title = f"{arguments.method}, {arguments.backbone}, {arguments.crop_size} px, batch {arguments.batch_size}"
    print(f"{title}; {found['device']}, {found['threads']} thread(s), torch {found['torch']}, load {found['load']}")
    print(f"seconds are of the {arguments.clock} clock\n\n{table(found)}")
    if arguments.json:
        settings = ("method", "backbone", "norm_act", "crop_size", "batch_size", "old_classes", "new_classes", "clock")
        print(json.dumps({name: getattr(arguments, name) for name in settings} | found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
