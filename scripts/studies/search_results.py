"""What a search leaves: the preset of the best trial, a table of the trials, and a figure of them and of what mattered."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import yaml
from matplotlib.axes import Axes
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState

from scripts.studies.search import Runs
from scripts.studies.trials import describe
from utils.reporting import figures
from utils.types import TAP_NAMES


def completed(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that were trained to the end."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def write_preset(runs: Runs, study: optuna.Study, path: Path) -> None:
    """Write the options of the best trial as a file for `run.py --preset`.

    Args:
        runs: of the search.
        study: with at least one finished trial.
        path: of the file.
    """
    best, search = study.best_trial, runs.search
    published = runs.published()
    start = next((t for t in completed(study) if len(published) == len(search.space) and t.params == published), None)
    lines = [
        f"# Found by scripts/tune.py {search.path.name}, objective {search.objective}, step {search.step}, seeds {list(search.seeds)}:",
        f"# {describe(best, len(study.trials))}",
        *([f"# without a search: {describe(start, len(study.trials))}"] if start else []),
        "# The scores are of held-out training images; use it with: python run.py --preset FILE",
    ]
    text = yaml.safe_dump(runs.preset(best.params), sort_keys=False, allow_unicode=True)
    path.write_text("\n".join(lines) + "\n" + text, encoding="utf-8")


def write_table(runs: Runs, study: optuna.Study, path: Path) -> None:
    """Write a CSV with a row for each trial that has ended: its score, mIoU of all, old and new classes, and its values."""
    names = [dimension.name for dimension in runs.search.space]
    with open(path, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["trial", "state", "epochs", "score", "all", "old", "new", *names])
        for trial in study.get_trials(deepcopy=False):
            if trial.state.is_finished():
                parts: list[Any] = trial.user_attrs.get("parts") or ["", "", ""]
                values = [trial.params.get(name, "") for name in names]
                rows.writerow(
                    [trial.number + 1, trial.state.name.lower(), trial.last_step or 0, trial.value, *parts, *values]
                )


def importances(study: optuna.Study) -> dict[str, float]:
    """How much each dimension decides whether a trial is among the best, largest first, with sum 1; empty if that cannot be told.

    Reference: Watanabe et al., "PED-ANOVA: Efficiently Quantifying Hyperparameter Importance in Arbitrary Subspaces", IJCAI 2023.
    """
    done = completed(study)
    varied = {name for trial in done for name in trial.params if trial.params[name] != done[0].params.get(name)}
    if len({trial.value for trial in done}) < 2 or not varied:
        return {}
    found = optuna.importance.get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    return {name: value for name, value in found.items() if np.isfinite(value)}


def draw(runs: Runs, study: optuna.Study, path: Path) -> None:
    """Draw the trials, what mattered, and the mean score by scheme where schemes of taps were searched.

    Args:
        runs: of the search.
        study: with at least one finished trial.
        path: of the PNG.
    """
    schemes = [dimension for dimension in runs.search.space if dimension.name.startswith("tap_schemes.")]
    figure = figures.new_figure(2 * figures.WIDTH, 3.4 * (2 if schemes else 1))
    grid = figure.add_gridspec(2 if schemes else 1, 2)
    _draw_trials(figure.add_subplot(grid[0, 0]), study)
    _draw_importances(figure.add_subplot(grid[0, 1]), importances(study))
    if schemes:
        _draw_schemes(figure.add_subplot(grid[1, :]), study)
    figure.savefig(path, dpi=150)


def _draw_trials(axes: Axes, study: optuna.Study) -> None:
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.value is not None]
    for index, state in enumerate((TrialState.COMPLETE, TrialState.PRUNED)):
        shown = [trial for trial in trials if trial.state == state]
        style: dict[str, Any] = {"marker": ("o", "x")[index], "color": figures.SERIES[index], "linestyle": "none"}
        label = ("trained to the end", "pruned, its last score")[index]
        axes.plot([t.number + 1 for t in shown], [t.value or 0.0 for t in shown], markersize=5, label=label, **style)
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    best = np.maximum.accumulate([trial.value or 0.0 for trial in done])
    axes.step([t.number + 1 for t in done], best, where="post", color=figures.INK, linewidth=1, label="best so far")
    figures.prepare(axes, "trial", "mIoU on held-out training images (%)")
    axes.legend(fontsize="small", frameon=False)


def _draw_importances(axes: Axes, found: dict[str, float]) -> None:
    names = list(found)[::-1]
    axes.barh(names, [found[name] for name in names], color=figures.SERIES[0])
    figures.prepare(axes, "importance (PED-ANOVA)", "")
    if not names:
        axes.text(0.5, 0.5, "too few different trials", ha="center", transform=axes.transAxes, color=figures.INK)


def _draw_schemes(axes: Axes, study: optuna.Study) -> None:
    """Mean score of the finished trials by tap and scheme, with their number."""
    scores: dict[tuple[str, str], list[float]] = {}
    for trial in completed(study):
        for name, value in trial.params.items():
            if name.startswith("tap_schemes.") and trial.value is not None:
                scores.setdefault((name.removeprefix("tap_schemes."), value), []).append(trial.value)
    taps = [tap for tap in TAP_NAMES if any(tap == known for known, _ in scores)]
    schemes = list(dict.fromkeys(scheme for _, scheme in sorted(scores)))
    means = np.array([[np.mean(scores.get((tap, scheme), [np.nan])) for tap in taps] for scheme in schemes])
    figures.heat(axes, means, float(np.nanmax(means)) or 1.0, "{:.1f}")
    axes.set_xticks(np.arange(len(taps)) + 0.5, taps)
    axes.set_yticks(np.arange(len(schemes)) + 0.5, schemes)
    axes.set_title("mean score of the finished trials by tap and scheme", color=figures.INK, fontsize="medium")
