"""Train the methods of a study over several seeds, and make the table that papers print, figures and one page.

    python scripts/study.py scripts/studies/shapes.yaml --jobs 2
    python scripts/study.py scripts/studies/shapes.yaml --methods FT LSKD --seeds 1 --out runs/try -- --device cpu

The file of a study names data, task, backbone, methods with their options, seeds and schedule; scripts/studies/plan.py describes it.
What stands after `--` goes to run.py, for all runs. Rows that differ in options of later steps alone share one step 0 per seed, as in the
papers. A study that was stopped continues where it was. What it leaves in `--out`:

    report.html     one page with everything       table.md, .csv  the tables
    scores.json     the scores of every run, step and class
    results/        CSV, JSON and pictures of each run              study.json      seconds of each run, machine, versions, commit
    *.png           mIoU by step; by variant, and over the mIoU of step 0, where the study has variants
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402  (the project is run from its folder, not installed)

from scripts.studies import execute, plan  # noqa: E402
from scripts.studies.plan import Job, Plan, Study  # noqa: E402
from utils.errors import UserError  # noqa: E402
from utils.reporting import figures, page, results, runs  # noqa: E402
from utils.reporting.runs import Run, TaskRuns  # noqa: E402
from utils.reporting.tables import Table  # noqa: E402


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of this script, and run.py's under `words`."""
    mine, words = plan.split_words(argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="what follows -- goes to run.py")
    parser.add_argument("study", type=Path, help="YAML or JSON file, such as scripts/studies/shapes.yaml")
    parser.add_argument("--out", type=Path, default=None, help="folder of all files (default: runs/NAME)")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default: 1)")
    parser.add_argument("--methods", nargs="+", default=None, metavar="ROW", help="these rows of the study alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=None, help="these seeds instead of the study's")
    parser.add_argument("--variants", nargs="+", default=None, metavar="NAME", help="these variants of the study alone")
    parser.add_argument(
        "--table", action="store_true", help="train nothing: tables and page of the runs that have ended"
    )
    parser.add_argument("--list", action="store_true", help="print the command lines of all runs, and end")
    arguments = parser.parse_args(mine)
    arguments.words = words
    return arguments


def selected(study: Study, arguments: argparse.Namespace) -> Study:
    """The rows, variants and seeds that the command line asks for.

    Raises:
        UserError: a row or a variant that the study does not have.
    """
    if arguments.jobs < 1:
        raise UserError(f"--jobs {arguments.jobs} is not a number of processes; give at least 1")
    methods = _named(study, "--methods", "row", arguments.methods, study.methods)
    variants = _named(study, "--variants", "variant", arguments.variants, study.variants)
    seeds = tuple(dict.fromkeys(arguments.seeds or study.seeds))
    return replace(study, methods=methods, variants=variants, seeds=seeds)


def _named(
    study: Study, option: str, kind: str, names: Sequence[str] | None, entries: dict[str, Any]
) -> dict[str, Any]:
    """The entries that an option names, in its order; all of them without it."""
    if names is None:
        return entries
    if missing := [name for name in names if name not in entries]:
        raise UserError(f"{option}: {study.path} has no {kind} {missing[0]!r}; its {kind}s are {', '.join(entries)}")
    return {name: entries[name] for name in names}


def all_jobs(plans: Sequence[Plan]) -> list[Job]:
    """The jobs of all variants: shared steps 0 first, then the rows, the last one first.

    The last named method, mostly the newest, takes longest: started first, it does not run on alone at the end.
    """
    first = {job.title: job for one in plans for job in one.first}
    return [*first.values(), *(job for one in plans for job in reversed(one.jobs))]


def variants_table(tasks: dict[str, list[TaskRuns]]) -> str:
    """Markdown tables, one a variant and task."""
    parts = []
    for variant, found in tasks.items():
        for task in found:
            title = f"{task.title}, {variant}" if variant else task.title
            parts.append(f"{title}\n\n{page.summary_table(task).markdown()}")
    return "\n\n".join(parts)


def table_csv(tasks: dict[str, list[TaskRuns]]) -> str:
    """The tables as CSV: one table, whose first columns name variant and task."""
    lines: list[str] = []
    for variant, found in tasks.items():
        for task in found:
            table = page.summary_table(task)
            rows = [[variant, f"{task.dataset} {task.task}", *row] for row in table.rows]
            text = Table(["variant", "task", *table.header], rows).csv().split("\n")
            lines += text if not lines else text[1:]
    return "\n".join(lines) + "\n"


def scores(tasks: dict[str, list[TaskRuns]]) -> list[dict[str, Any]]:
    """What every run scored, in percent: an entry a run, with the figures of each of its steps."""
    kept = ("old", "new", "all", "harmonic_mean", "average_over_steps", "class_iou")
    return [
        {
            "variant": variant, "dataset": task.dataset, "task": run.document["task"], "method": group.label, "name": run.document["name"],
            "steps": {step: {key: entry.get(key) for key in kept} for step, entry in run.steps.items()},
        }
        for variant, found in tasks.items() for task in found for group in (*task.groups, *task.references) for run in group.runs
    ]  # fmt: skip


def record(study: Study, seconds: dict[str, float], out: Path) -> None:
    """Write what a reader needs to repeat the study and to judge its times."""
    document: dict[str, Any] = {
        "study": study.name,
        "options": study.options, "step0": study.step0, "later": study.later, "variants": study.variants,
        "methods": study.methods, "seeds": list(study.seeds),
        "seconds": {title: round(value, 1) for title, value in sorted(seconds.items())},
        "machine": {"processors": os.cpu_count(), "type": platform.machine(), "gpu": torch.cuda.is_available()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": results.commit(),
    }  # fmt: skip
    (out / "study.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print the tables, write the page; exit code 2 for a user's mistake, 1 if a run failed."""
    arguments = parse(argv)
    try:
        whole = plan.read(arguments.study)
        study = selected(whole, arguments)
        out = arguments.out or Path("runs") / plan.file_name(study.name)
        plans = plans_of(whole, study, out, arguments.words)
        jobs = all_jobs(plans)
        if arguments.list:
            print("\n".join(f"run.py {' '.join(job.words)}" for job in jobs))
            return 0
        if not arguments.table:
            out.mkdir(parents=True, exist_ok=True)
            began = time.monotonic()
            seconds, failed = execute.run_all(jobs, arguments.jobs)
            if failed:
                print("\n\n".join(f"error: {sentence}" for sentence in failed), file=sys.stderr)
                print("\n--table makes the tables of the runs that have ended", file=sys.stderr)
                return 1
            record(study, seconds, out)
            print(f"\n{len(jobs)} runs in {(time.monotonic() - began) / 60:.1f} min")
        show(study, ended_runs(plans, out), out)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\nthe page to open: {out / 'report.html'}")
    return 0


def plans_of(whole: Study, study: Study, out: Path, words: Sequence[str]) -> list[Plan]:
    """The plans of the variants that are asked for, which share the steps 0 of the whole study.

    A variant that is not asked for may be one that run.py refuses, such as one that needs other words after "--".

    Args:
        whole: the file.
        study: the part of it that is asked for.
        out: folder of the study.
        words: for all runs.

    Raises:
        UserError: options that run.py refuses.
    """
    shared: dict[str, Job] = {}
    plans: dict[str, Plan] = {}
    for variant in whole.variants:
        try:
            plans[variant] = Plan(replace(whole, seeds=study.seeds), variant, out, words, study.methods, shared)
        except UserError:
            if variant in study.variants:
                raise
    return [plans[variant] for variant in study.variants]


def ended_runs(plans: Sequence[Plan], out: Path) -> dict[str, list[TaskRuns]]:
    """The runs that have scores of their last step, by variant and task.

    Raises:
        UserError: there are none.
    """
    found = {one.variant: [job for job in one.jobs if job.has_ended] for one in plans}
    if not any(found.values()):
        raise UserError(f"no run of the study has ended in {out}; leave --table out, or name another folder with --out")
    return {variant: runs.by_task(_runs(jobs)) for variant, jobs in found.items() if jobs}


def _runs(jobs: Sequence[Job]) -> list[Run]:
    """The results of jobs, each with the name of its row."""
    found = runs.read([job.results for job in jobs if job.results])
    return [replace(run, row=job.row) for run, job in zip(found, jobs)]


def show(study: Study, tasks: dict[str, list[TaskRuns]], out: Path) -> None:
    """Print the tables and write them, the figures and the page."""
    text = variants_table(tasks)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    (out / "table.csv").write_text(table_csv(tasks), encoding="utf-8")
    (out / "scores.json").write_text(json.dumps(scores(tasks), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    named = [replace(task, variant=variant) for variant, found in tasks.items() for task in found]
    page.write(named, out / "report.html", study.name)
    for variant, found in tasks.items():
        suffix = f"_{plan.file_name(variant)}" if variant else ""
        figures.draw_steps(found[0]).savefig(out / f"miou_by_step{suffix}.png", dpi=150)
    if len(tasks) > 1:
        by_variant = {variant: found[0] for variant, found in tasks.items()}
        figures.draw_variants(by_variant).savefig(out / "miou_by_variant.png", dpi=150)
        figures.draw_ripeness(by_variant).savefig(out / "miou_by_step0.png", dpi=150)
    print(f"\nmIoU in % after the last step, {len(study.seeds)} seed(s)\n\n{text}")


if __name__ == "__main__":
    sys.exit(main())
