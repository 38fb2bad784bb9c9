"""Pictures of an evaluation: figures of every embedding as a table in colour, figures against a size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .classification_plots import short
from .plots import colour_map, new_figure, save_figure

NUMBERED = 400
"""A table of more entries gets no numbers."""


def plot_table(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], path: Path, *, title: str, what: str, n_marked: int = 0) -> None:
    """Draw figures between 0 and 1 as colours with their numbers; grey where there is none.

    Args:
        values (`np.ndarray` of shape `(rows, columns)`)
        n_marked: first rows that are set off from the others.
    """
    figure, axes = new_figure(size=(3.2 + 0.75 * len(columns), float(np.clip(1.6 + 0.36 * len(rows), 2.4, 24))))
    image = axes.imshow(np.ma.masked_invalid(values), cmap=colour_map("viridis").with_extremes(bad="0.9"), vmin=0, vmax=1, aspect="auto")
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
    save_figure(figure, path)


def plot_curves(
    panels: Mapping[str, Sequence[tuple[float, float]]], lines: Mapping[str, Mapping[str, float]], path: Path, *, title: str, xlabel: str, ylabel: str
) -> None:
    """Draw a figure against a size, a panel for each dataset, with what has no size as lines across.

    Args:
        panels: dataset to points of size and figure.
        lines: dataset to names and figures.
    """
    n_columns = min(3, len(panels))
    n_rows = -(-len(panels) // n_columns)
    figure, grid = new_figure(n_rows, n_columns, size=(1.2 + 3.4 * n_columns, 0.8 + 2.8 * n_rows), squeeze=False, sharex=True)
    for axes, (name, points) in zip(grid.flat, panels.items(), strict=False):
        axes.plot(*zip(*sorted(points), strict=True), "o-", color="#4c78a8", label="pretrained")
        for style, colour, (what, value) in zip(
            ("--", "-.", ":", (0, (5, 1))), ("#e45756", "#f58518", "0.4", "#54a24b"), lines.get(name, {}).items(), strict=False
        ):
            axes.axhline(value, color=colour, linestyle=style, linewidth=1.2, label=what)
        axes.set(xscale="log", title=name, ylim=(0, 1.02))
        axes.set_xticks([size for size, _ in points], [f"{size:,}" for size, _ in points])
        axes.minorticks_off()
        axes.title.set_fontsize(9)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    figure.suptitle(title)
    figure.supxlabel(xlabel, fontsize=9)
    figure.supylabel(ylabel, fontsize=9)
    save_figure(figure, path)
