"""Train several methods on one task, over several seeds, and print the table that papers print.

    python scripts/compare_methods.py --methods FT PLOP LSKD --seeds 1 2 --out runs/shapes -- \
        --dataset shapes --task 6-2 --overlap --backbone resnet18 --no_pretrained --epochs 20

What stands after `--` goes to run.py, for all methods; several values of `--lr` there are meant for all steps of the task.
`--only "EWC=--reg_importance 10"` adds words for one method. Methods that only differ from step 1 on share one step 0 per seed, as
the papers do.
A comparison that was stopped continues where it was. Beside the table, `--out` gets a figure
of the mIoU by step and report.html, one page with everything else.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import argparser  # noqa: E402  (the project is run from its folder, not installed)
import dataset  # noqa: E402
import methods  # noqa: E402
from utils import scheduler  # noqa: E402
from utils.errors import UserError  # noqa: E402
from utils.reporting import figures, page, runs  # noqa: E402

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
    given = list(arguments.words)
    if name == "Joint" and "--task" in given:  # all classes at once, whatever the others compare on
        given[given.index("--task") + 1] = "offline"
    return [
        *given,
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


def run(arguments: argparse.Namespace, words: list[str]) -> None:
    """One process of run.py; what it says goes to a file of its name, its scores to the terminal too.

    Raises:
        RuntimeError: it failed; holds the end of what it said.
    """
    name, steps = words[words.index("--name") + 1], words[words.index("--step") + 1 :]
    log = Path(arguments.out) / f"{name}-step{steps[0]}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-u", str(ROOT / "run.py"), *words]
    with (
        open(log, "w") as file,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            file.flush()
            if "mIoU old" in line or "finished" in line:
                print(f"{name}: {line.split(' (%')[0].strip()}", flush=True)
    if process.returncode:
        raise UserError(
            f"run.py {' '.join(words)}\nended with exit code {process.returncode}:\n{log.read_text()[-2000:]}"
        )


def of_method(arguments: argparse.Namespace, method: str) -> list[str]:
    """Words of run.py that make it train this method, those of `--only` among them."""
    return ["--method", method, *(word for name, words in arguments.only if name == method for word in words)]


def shares_step0(arguments: argparse.Namespace, method: str) -> bool:
    """Whether the method's step 0 is the one that the words of all methods train.

    Methods that differ in options of later steps alone share a step 0; any other difference, such as a learning rate, a crop size or
    a weight of the loss, makes one of its own.
    """

    def of_step0(words: list[str]) -> dict[str, Any]:
        opts = vars(argparser.parse([*words, *_epochs(arguments.epochs_step0)]))
        opts["lr"] = opts["lr"][0]  # of step 0; the others are those of later steps
        left_out = argparser.later_options() | {"method", "explicit", "preset_applied", "task_preset"}
        return {dest: value for dest, value in opts.items() if dest not in left_out}

    return of_step0(arguments.words) == of_step0([*arguments.words, *of_method(arguments, method)])


def train_first(arguments: argparse.Namespace, method: str, seed: int) -> None:
    """Step 0 of a method: the shared one, or its own."""
    name, own = first_run(arguments, method)
    words = [*own, *_epochs(arguments.epochs_step0), *rates(arguments, own, [0])]
    run(arguments, words_of(arguments, seed, name, [*words, "--step", "0"]))


def first_run(arguments: argparse.Namespace, method: str) -> tuple[str, list[str]]:
    """Name of the run that trains the method's step 0, and its words."""
    shared = method != "Joint" and shares_step0(arguments, method)
    return (BASE, []) if shared else (method, of_method(arguments, method))


def train_later(arguments: argparse.Namespace, method: str, seed: int) -> Path:
    """All steps after step 0; returns the JSON of the run, which has the scores of step 0 too."""
    name, _ = first_run(arguments, method)
    if method == "Joint":
        return results_of(arguments, f"{name}-seed{seed}", "offline")
    opts = argparser.parse([*arguments.words, "--method", method])
    task = dataset.load_task(opts, 0)
    start = Path(arguments.out) / "checkpoints" / f"{task.name}-{task.dataset}_{name}-seed{seed}_0.pth"
    own, later = of_method(arguments, method), range(1, task.last_step + 1)
    words = [*own, "--step_ckpt", str(start), *_epochs(arguments.epochs_later), *rates(arguments, own, later)]
    run(arguments, words_of(arguments, seed, method, [*words, "--step", *map(str, later)]))
    return results_of(arguments, f"{method}-seed{seed}", task.name)


def train_all(arguments: argparse.Namespace) -> list[Path]:
    """Every method and seed, `--jobs` processes at a time; returns the JSON files of the runs."""
    first = {first_run(arguments, method)[0]: method for method in arguments.methods}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for job in [pool.submit(train_first, arguments, m, seed) for m in first.values() for seed in arguments.seeds]:
            job.result()
        # The last named method, mostly the newest, takes longest: started first, it does not run on alone at the end.
        order = list(reversed(arguments.methods))
        jobs = {m: [pool.submit(train_later, arguments, m, seed) for seed in arguments.seeds] for m in order}
        return [job.result() for method in arguments.methods for job in jobs[method]]


def rates(arguments: argparse.Namespace, own: list[str], steps: Sequence[int]) -> list[str]:
    """Words of run.py for the learning rates of some steps: several `--lr` are those of all steps of the task.

    Args:
        arguments: of this script.
        own: words of one run beside those of all.
        steps: that the run trains.

    Returns:
        `--lr` with a value for each of the steps; nothing where one value serves all.
    """
    opts = argparser.parse([*arguments.words, *own])
    if len(opts.lr) == 1:
        return []
    task = range(dataset.load_task(opts, 0).last_step + 1)
    return ["--lr", *(str(scheduler.rate_of_step(opts.lr, task, step)) for step in steps)]


def _epochs(number: int | None) -> list[str]:
    return [] if number is None else ["--epochs", str(number)]


def results_of(arguments: argparse.Namespace, name: str, task: str) -> Path:
    """The JSON of one run."""
    data = argparser.parse(arguments.words).dataset
    return Path(arguments.out) / "results" / f"all_{data}_{task}_{name}.json"


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
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time; give each --threads 1 on a CPU")
    parser.add_argument(
        "--out", default="runs/comparison", help="folder of checkpoints, results, logs, table and figure"
    )
    parser.add_argument(
        "--only", nargs="+", type=_only, default=[], metavar="METHOD=WORDS", help="words for one method"
    )
    arguments = parser.parse_args(mine)
    arguments.words = words
    return arguments


def _only(text: str) -> tuple[str, list[str]]:
    """Method and words of "METHOD=WORDS"."""
    method, sign, words = text.partition("=")
    if not sign or method not in methods.METHODS:
        raise argparse.ArgumentTypeError(f"{text!r} is not METHOD=WORDS, such as 'EWC=--reg_importance 10'")
    return method, shlex.split(words)


def main(argv: list[str] | None = None) -> int:
    """Train, print the table, draw the figure."""
    arguments = parse(argv)
    try:
        tasks = runs.by_task(runs.read(train_all(arguments)))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = "\n\n".join(page.summary_table(task).markdown() for task in tasks)
    out = Path(arguments.out)
    (out / "table.md").write_text(text + "\n")
    page.write(tasks, out / "report.html")
    figures.draw_steps(tasks[0]).savefig(out / "miou_by_step.png", dpi=150)
    print(
        f"\nmIoU in %, {len(arguments.seeds)} seed(s), after the last step\n\n{text}\n\nfigure: {out / 'miou_by_step.png'}\n"
        f"page to open: {out / 'report.html'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
