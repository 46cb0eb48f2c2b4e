"""Train several methods on one task, over several seeds, and print the table that papers print.

    python scripts/compare_methods.py --methods FT PLOP LSKD --seeds 1 2 --out runs/shapes -- \
        --dataset shapes --task 6-2 --overlap --backbone resnet18 --no_pretrained --epochs 20

What stands after `--` goes to run.py as it is. Methods that only differ from step 1 on share one step 0 per seed, as the papers do.
A comparison that was stopped continues where it was. Beside the table, `--out` gets a figure of the mIoU by step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import argparser  # noqa: E402  (the project is run from its folder, not installed)
import dataset  # noqa: E402
import methods  # noqa: E402
from scripts.report import draw_steps, markdown  # noqa: E402

#: Options that change step 0 itself, so that a method which sets one needs a step 0 of its own.
STEP0_OPTIONS = ("regularizer", "icarl", "bce", "cosine", "nb_background_modes", "focal_loss")
#: Name under which the shared step 0 is trained.
BASE = "base"


def words_of(arguments: argparse.Namespace, seed: int, name: str, extra: list[str]) -> list[str]:
    """Command line of one run."""
    out = Path(arguments.out)
    folders = [
        "--checkpoint",
        str(out / "checkpoints"),
        "--results",
        str(out / "results"),
        "--logdir",
        str(out / "logs"),
    ]
    return [
        *arguments.words,
        *folders,
        "--random_seed",
        str(seed),
        "--name",
        f"{name}-seed{seed}",
        "--date",
        "all",
        "--resume",
        *extra,
    ]


def run(words: list[str]) -> None:
    """One process of run.py; its output goes to this terminal."""
    print("run.py " + " ".join(words), flush=True)
    code = subprocess.run([sys.executable, str(ROOT / "run.py"), *words], check=False).returncode
    if code:
        sys.exit(code)


def shares_step0(method: str, words: list[str]) -> bool:
    """Whether the method's step 0 is plain training."""
    opts = argparser.parse([*words, "--method", method])
    return not any(getattr(opts, option) not in (None, False, 1) for option in STEP0_OPTIONS)


def train(arguments: argparse.Namespace, method: str, seed: int) -> list[dict]:
    """All steps of one method and seed.

    Returns:
        The JSON entries of its steps, in order.
    """
    opts = argparser.parse([*arguments.words, "--method", method])
    if method == "Joint":
        run(words_of(arguments, seed, method, ["--method", "Joint", "--step", "0", *_epochs(arguments.epochs_step0)]))
        return [document(arguments, f"{method}-seed{seed}", "offline")["steps"]["0"]]
    task = dataset.load_task(opts, 0)
    first_epochs, later_epochs = _epochs(arguments.epochs_step0), _epochs(arguments.epochs_later)
    own = [] if shares_step0(method, arguments.words) else ["--method", method]
    base = f"{method if own else BASE}-seed{seed}"
    run(words_of(arguments, seed, method if own else BASE, [*own, "--step", "0", *first_epochs]))
    later = [str(step) for step in range(1, task.last_step + 1)]
    start = Path(arguments.out) / "checkpoints" / f"{task.name}-{task.dataset}_{base}_0.pth"
    run(
        words_of(
            arguments, seed, method, ["--method", method, "--step", *later, "--step_ckpt", str(start), *later_epochs]
        )
    )
    steps = {
        **document(arguments, base, task.name)["steps"],
        **document(arguments, f"{method}-seed{seed}", task.name)["steps"],
    }
    return [steps[str(step)] for step in range(task.last_step + 1)]


def _epochs(number: int | None) -> list[str]:
    return [] if number is None else ["--epochs", str(number)]


def document(arguments: argparse.Namespace, name: str, task: str) -> dict:
    """JSON of one run."""
    data = argparser.parse(arguments.words).dataset
    return json.loads((Path(arguments.out) / "results" / f"all_{data}_{task}_{name}.json").read_text())


def percent(values: list[float | None]) -> str:
    """Mean ± standard deviation in percent, "-" where there is nothing."""
    present = [100 * value for value in values if value is not None]
    if not present:
        return "-"
    spread = f" ± {statistics.stdev(present):.1f}" if len(present) > 1 else ""
    return f"{statistics.fmean(present):.1f}{spread}"


def table(entries: dict[str, list[list[dict]]]) -> str:
    """Markdown: old, new and all after the last step, and the average over steps.

    Args:
        entries: by method, for each seed the entries of its steps.
    """
    rows = []
    for method, seeds in entries.items():
        last = [steps[-1] for steps in seeds]
        average = [statistics.fmean(step["all"] for step in steps) for steps in seeds]
        columns = [percent([entry[key] for entry in last]) for key in ("old", "new", "all")]
        rows.append([method, *columns, percent(average)])
    return markdown(["method", "old", "new", "all", "average over steps"], rows)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of this script, and run.py's under `words`."""
    argv = sys.argv[1:] if argv is None else argv
    mine, words = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="what follows -- goes to run.py")
    parser.add_argument(
        "--methods", nargs="+", default=["FT", "PLOP", "LSKD"], choices=list(methods.METHODS), help="what to compare"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[42], help="random seeds")
    parser.add_argument("--epochs_step0", type=int, default=None, help="epochs of step 0, instead of run.py's --epochs")
    parser.add_argument(
        "--epochs_later", type=int, default=None, help="epochs of later steps, instead of run.py's --epochs"
    )
    parser.add_argument(
        "--out", default="runs/comparison", help="folder of checkpoints, results, logs, table and figure"
    )
    arguments = parser.parse_args(mine)
    arguments.words = words
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Train, print the table, draw the figure."""
    arguments = parse(argv)
    entries = {method: [train(arguments, method, seed) for seed in arguments.seeds] for method in arguments.methods}
    text = table(entries)
    out = Path(arguments.out)
    (out / "table.md").write_text(text + "\n")
    curves = {
        method: [[step["all"] for step in steps] for steps in seeds]
        for method, seeds in entries.items()
        if len(seeds[0]) > 1
    }
    draw_steps(curves, out / "miou_by_step.png")
    print(
        f"\nmIoU in %, {len(arguments.seeds)} seed(s), after the last step\n\n{text}\n\nfigure: {out / 'miou_by_step.png'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
