"""Pictures of an evaluation: figures of every embedding as a table in colour, figures against a size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .classification_plots import short
from .plots import pyplot, save_figure

NUMBERED = 400
"""A table of more entries gets no numbers."""


def plot_table(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], path: Path, *, title: str, what: str, n_marked: int = 0) -> None:
    """Draw figures between 0 and 1 as colours with their numbers; grey where there is none.

    Args:
        values (`np.ndarray` of shape `(rows, columns)`)
        n_marked: first rows that are set off from the others.
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(3.2 + 0.75 * len(columns), float(np.clip(1.6 + 0.36 * len(rows), 2.4, 24))), layout="constrained")
    image = axes.imshow(np.ma.masked_invalid(values), cmap=plt.get_cmap("viridis").with_extremes(bad="0.9"), vmin=0, vmax=1, aspect="auto")
    if values.size <= NUMBERED:
        for i, j in np.ndindex(values.shape):
            if np.isfinite(values[i, j]):
                axes.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=8, color="black" if values[i, j] > 0.6 else "white")
    axes.set_xticks(range(len(columns)), [short(name) for name in columns], rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), [short(name) for name in rows], fontsize=8)
    for label in axes.get_yticklabels()[:n_marked]:
        label.set_fontweight("bold")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, label=what, shrink=0.8)
    save_figure(plt, figure, path)


def plot_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]], path: Path, *, title: str, xlabel: str, ylabel: str, lines: Mapping[str, float] | None = None
) -> None:
    """Draw a figure against a size on a logarithmic axis, one line a name, and figures that have no size as dashed lines."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, (name, points) in enumerate(curves.items()):
        axes.plot(*zip(*points, strict=True), "o-", color=f"C{i % 10}", label=name)
    for i, (name, value) in enumerate((lines or {}).items()):
        axes.axhline(value, color=f"C{(len(curves) + i) % 10}", linestyle="--", linewidth=1, label=f"{name} ({value:.2f})")
    axes.set_xscale("log")
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(plt, figure, path)
