"""What a search leaves: the preset of the best trial, a table of the trials, and a figure of them and of what mattered."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import yaml
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState

from scripts.studies.search import Dimension, Runs
from scripts.studies.trials import describe
from utils.reporting import figures
from utils.types import TAP_NAMES

SCORE = "mIoU on held-out training images (%)"
#: Panels of scores by value in a row of the figure.
PANELS = 4


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
    """Draw the trials, what mattered, the mean score by scheme where schemes of taps were searched, and the scores by every other value.

    Args:
        runs: of the search.
        study: with at least one finished trial.
        path: of the PNG.
    """
    schemes = [dimension for dimension in runs.search.space if dimension.name.startswith("tap_schemes.")]
    others = [dimension for dimension in runs.search.space if dimension not in schemes]
    panels = [others[i : i + PANELS] for i in range(0, len(others), PANELS)]
    rows = 1 + bool(schemes) + len(panels)
    figure = figures.new_figure(2 * figures.WIDTH, 3.4 * rows)
    grid = figure.add_gridspec(rows, 1)
    top = grid[0].subgridspec(1, 2)
    _draw_trials(figure.add_subplot(top[0]), study)
    _draw_importances(figure.add_subplot(top[1]), importances(study))
    if schemes:
        _draw_schemes(figure.add_subplot(grid[1]), study)
    for row, dimensions in zip(range(rows - len(panels), rows), panels):
        cells = grid[row].subgridspec(1, len(dimensions))
        for column, dimension in enumerate(dimensions):
            _draw_values(figure.add_subplot(cells[column]), study, dimension, SCORE if column == 0 else "")
    figure.savefig(path, dpi=150)


def _draw_trials(axes: Axes, study: optuna.Study) -> None:
    _plot_scores(axes, study, lambda trial: trial.number + 1)
    done = completed(study)
    best = np.maximum.accumulate([trial.value or 0.0 for trial in done])
    axes.step([t.number + 1 for t in done], best, where="post", color=figures.INK, linewidth=1, label="best so far")
    figures.prepare(axes, "trial", SCORE)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize="small", frameon=False)


def _draw_values(axes: Axes, study: optuna.Study, dimension: Dimension, title: str) -> None:
    """Scores by the value of one dimension: choices side by side, a range on its own scale."""
    choices = dimension.choices
    place = (lambda value: value) if choices is None else choices.index
    _plot_scores(axes, study, lambda trial: place(trial.params[dimension.name]), dimension.name)
    figures.prepare(axes, dimension.name, title)
    if choices is not None:
        axes.set_xticks(range(len(choices)), list(map(str, choices)))
        axes.set_xlim(-0.5, len(choices) - 0.5)
    elif dimension.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")


def _plot_scores(
    axes: Axes, study: optuna.Study, place: Callable[[FrozenTrial], float], name: str | None = None
) -> None:
    """A mark for each trial that has a score: at its place, and with one form for finished and one for pruned trials.

    Args:
        axes: to draw into.
        study: with the trials.
        place: abscissa of a trial.
        name: dimension that a trial must have; None: every trial is drawn.
    """
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.value is not None]
    trials = [trial for trial in trials if name is None or name in trial.params]
    for index, state in enumerate((TrialState.COMPLETE, TrialState.PRUNED)):
        shown = [trial for trial in trials if trial.state == state]
        style: dict[str, Any] = {"marker": ("o", "x")[index], "color": figures.SERIES[index], "linestyle": "none"}
        label = ("trained to the end", "pruned, its last score")[index]
        axes.plot([place(t) for t in shown], [t.value or 0.0 for t in shown], markersize=5, label=label, **style)


def _draw_importances(axes: Axes, found: dict[str, float]) -> None:
    names = list(found)[::-1]
    axes.barh(names, [found[name] for name in names], color=figures.SERIES[0])
    figures.prepare(axes, "importance (PED-ANOVA)", "")
    if not names:
        axes.text(0.5, 0.5, "too few different trials", ha="center", transform=axes.transAxes, color=figures.INK)


def _draw_schemes(axes: Axes, study: optuna.Study) -> None:
    """Mean score of the finished trials by tap and scheme."""
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
