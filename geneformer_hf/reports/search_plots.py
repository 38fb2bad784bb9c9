"""Pictures of a hyperparameter search: the trials in their order and their course, and which settings mattered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .plots import new_figure, save_figure


def plot_trials(study: Any, path: Path, *, metric: str) -> None:
    """Draw the figure of each trial, the best so far, and what each had reached after each evaluation."""
    from matplotlib.ticker import MaxNLocator

    figure, (left, right) = new_figure(1, 2, size=(11, 4))
    better = max if study.direction.name == "MAXIMIZE" else min
    done = [t for t in study.trials if t.state.name == "COMPLETE"]
    pruned = [t for t in study.trials if t.state.name == "PRUNED" and t.intermediate_values]
    left.plot([t.number for t in done], [t.value for t in done], "o", color="C0", label="finished")
    if pruned:
        left.plot([t.number for t in pruned], [t.intermediate_values[max(t.intermediate_values)] for t in pruned], "x", color="0.6", label="pruned")
    best: list[float] = []
    for t in done:
        best.append(better([*best, t.value]))
    left.step([t.number for t in done], best, where="post", color="C3", linewidth=1, label="best so far")
    what = metric.removeprefix("eval_").replace("_", " ")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set(xlabel="trial", ylabel=f"{what} of validation cells")
    left.legend(fontsize=8)
    for t in (*pruned, *done):
        steps = sorted(t.intermediate_values)
        mine = t.number == study.best_trial.number
        color = "C3" if mine else "0.6" if t in pruned else "C0"
        right.plot(steps, [t.intermediate_values[s] for s in steps], ".-", color=color, linewidth=2 if mine else 0.8, alpha=1 if mine else 0.6)
    right.set(xlabel="step", ylabel=what, title="course of the trials (red: the best)")
    save_figure(figure, path)


def plot_importances(study: Any, path: Path, *, metric: str, logarithmic: Sequence[str] = ()) -> None:
    """Draw the figure against each setting; from four trials on with the share of its spread that the setting explains (fANOVA, by Optuna)."""
    import optuna

    done = [t for t in study.trials if t.state.name == "COMPLETE"]
    names: Sequence[str] = sorted({name for t in done for name in t.params})
    importances: dict[str, float] = {}
    if len(done) > 3 and len({t.value for t in done}) > 1:
        importances = optuna.importance.get_param_importances(study)
    names = sorted(names, key=lambda name: -importances.get(name, 0.0))[:6]
    from matplotlib.ticker import MaxNLocator

    figure, panels = new_figure(1, len(names), size=(3.2 * len(names), 3.4), squeeze=False)
    for axes, name in zip(panels[0], names, strict=True):
        pairs = [(t.params[name], t.value) for t in done if name in t.params]
        axes.plot([p if isinstance(p, (int, float)) and not isinstance(p, bool) else str(p) for p, _ in pairs], [v for _, v in pairs], "o", color="C0")
        if name in logarithmic:
            axes.set_xscale("log")
        elif all(isinstance(p, int) and not isinstance(p, bool) for p, _ in pairs):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        share = f"\nexplains {importances[name]:.0%}" if name in importances else ""
        axes.set(xlabel=name, title=f"{name}{share}")
    panels[0, 0].set_ylabel(f"{metric.removeprefix('eval_').replace('_', ' ')} of validation cells")
    save_figure(figure, path)
