"""Search the schemes of the taps, and any other option of a method, on held-out training images of a step.

    python scripts/tune.py scripts/studies/tune_shapes.yaml
    python scripts/tune.py scripts/studies/tune_shapes.yaml --trials 60 --jobs 2 --out runs/try -- --device cpu
    python run.py --preset runs/tune_shapes/preset.yaml --step 1 ...

The search has two levels. The upper one is Optuna: TPE chooses the scheme of each tap and the other values that the file names, a
successive-halving pruner ends bad trials early, and SQLite keeps the trials, so that the same command continues a search that was
stopped. The lower one is run.py, which trains the step with these values in a process of its own, its λ by RGE.

The score of a trial is the mIoU of old and new classes on a fifth of the step's training images, which the trial is not trained on
(--cross_val --val_by_teacher). The labels of the step exist: pixels of its classes, and of old classes under --data_masking
current+old, count with their label. A pixel that is labelled background counts as the class, old or background, that the frozen
network of step t−1 predicts with at least the file's `confidence`; where it is less sure, the pixel is not counted. No test image and
no image of another step is read (--no_test). The masks of the training images are scanned once to find those of the step, as in any run.

scripts/studies/search.py describes the file. What the search leaves in `--out`:

    preset.yaml      the best trial, for run.py --preset       trials.csv       all trials
    trials.png       the trials, and what mattered             trials.sqlite3   the storage of Optuna
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.studies import plan, search  # noqa: E402  (the project is run from its folder, not installed)
from utils.errors import UserError  # noqa: E402


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of this script, and run.py's under `words`."""
    mine, words = plan.split_words(argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="what follows -- goes to run.py")
    parser.add_argument("search", type=Path, help="YAML or JSON file, such as scripts/studies/tune_shapes.yaml")
    parser.add_argument("--out", type=Path, default=None, help="folder of all files (default: runs/NAME)")
    parser.add_argument(
        "--trials", type=int, default=None, help="trials in all, those done before included (default: the file's)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="trials at a time; more than 1: the order, and so the result, may differ"
    )
    parser.add_argument(
        "--list", action="store_true", help="print the command lines of the steps before and of trial 1, and end"
    )
    arguments = parser.parse_args(mine)
    arguments.words = words
    return arguments


def require_optuna() -> None:
    """Refuse to go on without Optuna.

    Raises:
        UserError: says how to install it.
    """
    if importlib.util.find_spec("optuna") is None:
        raise UserError("scripts/tune.py needs Optuna, which is not installed; install it with: pip install optuna")


def tune(runs: search.Runs, jobs: int) -> None:
    """Run the trials that are left and write what a search leaves.

    Args:
        runs: of the search.
        jobs: trials at a time.

    Raises:
        UserError: the folder holds another search, or no trial was trained to the end.
    """
    from scripts.studies import search_results, trials  # these need Optuna

    out = runs.out
    out.mkdir(parents=True, exist_ok=True)
    study = trials.open_study(runs.search, out / "trials.sqlite3")
    work = trials.Trials(runs, study, lambda line: print(line, flush=True))
    try:
        work.prepare()
        work.run(jobs)
    except trials.Failed as error:
        raise UserError(str(error)) from error
    except trials.Stopped as error:
        raise KeyboardInterrupt(str(error)) from error
    if not search_results.completed(study):
        raise UserError(f"no trial of {runs.search.path} was trained to the end; raise trials or halving, min_epochs")
    search_results.write_table(runs, study, out / "trials.csv")
    search_results.draw(runs, study, out / "trials.png")
    search_results.write_preset(runs, study, out / "preset.yaml")
    mattered = ", ".join(f"{name} {share:.2f}" for name, share in search_results.importances(study).items())
    print(f"best: {trials.describe(study.best_trial, len(study.trials))}")
    print(
        f"what mattered: {mattered or 'too few different trials to tell'}\n-> {out / 'preset.yaml'}, {out / 'trials.png'}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Search; exit code 2 for a user's mistake or a run that failed, 130 after a stop request."""
    arguments = parse(argv)
    try:
        found = search.read(arguments.search, arguments.words)
        if arguments.jobs < 1:
            raise UserError(f"--jobs {arguments.jobs} is not a number of processes; give at least 1")
        if arguments.trials is not None:
            if arguments.trials < 1:
                raise UserError(f"--trials {arguments.trials} is not a number of trials; give at least 1")
            found = replace(found, trials=arguments.trials)
        runs = search.Runs(found, arguments.out or Path("runs") / plan.file_name(found.name))
        if arguments.list:
            seed = found.seeds[0]
            lines = [*runs.before(seed), runs.trial(0, runs.published(), seed)]
            print("\n".join(f"run.py {' '.join(words)}" for words in lines))
            return 0
        require_optuna()
        tune(runs, arguments.jobs)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"stopped; {stop or 'the same command continues the search'}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
