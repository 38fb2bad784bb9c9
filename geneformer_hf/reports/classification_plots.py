"""Pictures of how well labels are predicted: confusion, ROC, calibration, predicted numbers, figures beside baselines, the course of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .classification import RocCurve
from .plots import colour_map, new_figure, save_figure

NAMED_CELLS = 25
"""More classes than that get no numbers in their confusion matrix."""
MAX_CURVES = 12
LONGEST_NAME = 36


def short(name: str) -> str:
    """Return a name that leaves room for the picture; the tables have it whole."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def plot_confusion(confusion: Sequence[Sequence[int]], names: Sequence[str], path: Path, *, title: str, what: str = "cells") -> None:
    """Draw how often each true class (row) was predicted as each class, in shares of the row."""
    names = [short(name) for name in names]
    counts = np.asarray(confusion, dtype=np.float64)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)
    size = float(np.clip(2.5 + 0.36 * len(names), 4.5, 24))
    figure, axes = new_figure(size=(size + 1.5, size))
    colors = colour_map("Blues").with_extremes(bad="0.92")
    image = axes.imshow(np.ma.masked_invalid(shares), cmap=colors, vmin=0, vmax=1)
    if len(names) <= NAMED_CELLS:
        for i, j in np.ndindex(counts.shape):
            if counts[i, j]:
                axes.text(j, i, f"{int(counts[i, j]):,}", ha="center", va="center", fontsize=7, color="white" if shares[i, j] > 0.6 else "black")
    labels = [f"{name} ({int(n):,})" for name, n in zip(names, totals[:, 0], strict=True)]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), labels, fontsize=8)
    axes.set(title=title, xlabel="predicted", ylabel=f"true ({what})")
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.7)
    save_figure(figure, path)


def plot_roc(curves: Mapping[str, RocCurve], path: Path, *, title: str, mean: RocCurve | None = None, plain: RocCurve | None = None) -> None:
    """Draw ROC curves: of folds with their mean, or of classes against the rest.

    Args:
        mean: the mean weighted by length, as published.
        plain: the mean in which all folds weigh alike; only its area is told.
    """
    figure, axes = new_figure(size=(9, 5.5))
    axes.plot([0, 1], [0, 1], ":", color="0.6")
    shown = sorted(curves.items(), key=lambda item: item[1].auc)[:MAX_CURVES] if len(curves) > MAX_CURVES else list(curves.items())
    colors = colour_map("tab20").colors
    for i, (name, curve) in enumerate(shown):
        thin: dict[str, Any] = {"linewidth": 1, "alpha": 0.5, "color": "0.5"} if mean is not None else {"linewidth": 1.2, "color": colors[i % 20]}
        axes.plot(curve.false_positive_rate, curve.true_positive_rate, label=f"{short(name)} ({curve.auc:.3f})", **thin)
    if len(shown) < len(curves):
        axes.plot([], [], " ", label=f"(the lowest {MAX_CURVES} of {len(curves)})")
    if mean is not None:
        also = f"\nplain mean ({plain.auc:.3f} ± {plain.sd:.3f})" if plain is not None else ""
        label = f"mean by length ({mean.auc:.3f} ± {mean.sd:.3f}){also}"
        axes.plot(mean.false_positive_rate, mean.true_positive_rate, color="C0", linewidth=2.5, label=label)
    axes.set(title=title, xlabel="false-positive rate", ylabel="true-positive rate", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, title="area under the curve", title_fontsize=8)
    save_figure(figure, path)


def plot_calibration(rows: Sequence[Mapping[str, float]], path: Path, *, title: str, error: float) -> None:
    """Draw how often predictions of a confidence are right, with the number of cells of each bin below."""
    figure, (axes, below) = new_figure(2, 1, size=(5.5, 5.5), height_ratios=(3, 1), sharex=True)
    confidence, right = [row["confidence"] for row in rows], [row["right"] for row in rows]
    axes.plot([0, 1], [0, 1], ":", color="0.6")
    axes.plot(confidence, right, "o-", color="C0")
    axes.set(title=f"{title} (expected calibration error {error:.3f})", ylabel="share right", ylim=(-0.02, 1.02))
    below.bar(confidence, [row["n"] for row in rows], width=0.06, color="0.6")
    below.set(xlabel="probability of the predicted class", ylabel="cells", xlim=(0, 1.02))
    save_figure(figure, path)


def plot_numbers(truth: np.ndarray, predicted: np.ndarray, path: Path, *, title: str) -> None:
    """Draw predicted against true numbers."""
    figure, axes = new_figure(size=(5.5, 5.5))
    low, high = float(min(truth.min(), predicted.min())), float(max(truth.max(), predicted.max()))
    axes.plot([low, high], [low, high], ":", color="0.6")
    axes.scatter(truth, predicted, s=max(2.0, min(20.0, 4000 / len(truth))), alpha=0.5, linewidths=0)
    axes.set(title=title, xlabel="true", ylabel="predicted")
    save_figure(figure, path)


def plot_comparison(values: Mapping[str, Sequence[float]], path: Path, *, title: str, what: str) -> None:
    """Draw a figure of the model beside those of the baselines; with folds, each fold as a point and the mean as a bar."""
    names = list(values)[::-1]
    figure, axes = new_figure(size=(7.5, 1.2 + 0.4 * len(names)))
    known = {name: [value for value in values[name] if np.isfinite(value)] for name in names}
    # What could not be measured, such as a correlation of one cell, has no bar.
    means = [float(np.mean(known[name])) if known[name] else 0.0 for name in names]
    axes.barh(range(len(names)), means, color=["C0" if name == next(iter(values)) else "0.7" for name in names])
    for i, name in enumerate(names):
        if len(values[name]) > 1:
            axes.plot(values[name], [i] * len(values[name]), "k.", markersize=4)
        axes.text(max(means[i], 0), i, f" {means[i]:.3f}" if known[name] else " not measured", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.set(title=title, xlabel=what, xlim=(min(0.0, *means), max(1.0, *means) * 1.2))
    save_figure(figure, path)


def plot_course(history: Mapping[str, Sequence[Mapping[str, float]]], path: Path, *, metric: str) -> None:
    """Draw training loss, and loss and one figure of validation cells, by epoch; one line a fold."""
    from matplotlib.ticker import MaxNLocator

    with_figure = any(metric in entry for entries in history.values() for entry in entries)
    figure, panels = new_figure(1, 1 + with_figure, size=(4.8 * (1 + with_figure), 3.8), squeeze=False)
    for i, (name, entries) in enumerate(history.items()):
        for key, style, what in (("loss", "-", "training"), ("eval_loss", "o--", "validation")):
            points = [(entry["epoch"], entry[key]) for entry in entries if key in entry]
            if points:
                marked = f"o{style}" if len(points) < 3 and "o" not in style else style
                label = f"{what}{f', {name}' if len(history) > 1 else ''}"
                panels[0, 0].plot(*zip(*points, strict=True), marked, color=f"C{i % 10}", markersize=3, linewidth=1, label=label)
        points = [(entry["epoch"], entry[metric]) for entry in entries if metric in entry]
        if with_figure and points:
            panels[0, 1].plot(*zip(*points, strict=True), "o-", color=f"C{i % 10}", markersize=3, linewidth=1, label=name)
    panels[0, 0].set(xlabel="epoch", ylabel="loss", xlim=(0, None))
    for axes in panels[0]:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(history) <= 6 and panels[0, 0].lines:
        panels[0, 0].legend(fontsize=8)
    if with_figure:
        panels[0, 1].set(xlabel="epoch", ylabel=f"{metric.removeprefix('eval_').replace('_', ' ')} of validation cells")
    save_figure(figure, path)
