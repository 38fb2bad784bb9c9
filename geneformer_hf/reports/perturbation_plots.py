"""Pictures of perturbations: volcano, ranking, heat map of affected genes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .plots import new_figure, save_figure

LABELLED = 12
SIGNIFICANT = 0.05


def plot_volcano(
    effect: Sequence[float], p: Sequence[float], names: Sequence[str], path: Path, *, xlabel: str, ylabel: str, title: str, known: Sequence[bool] | None = None,
    below_resolution: Sequence[bool] | None = None,
) -> None:  # fmt: skip
    """Draw effects against how sure they are; p-values (or false discovery rates) of zero stand at the top. Genes `known` beforehand are ringed.

    Effects below the resolution of float32 are hollow, never red and never named: their p-values say nothing.
    """
    x, y = np.asarray(effect, dtype=float), np.asarray(p, dtype=float)
    found = np.isfinite(x) & np.isfinite(y)
    x, y, labels = x[found], y[found], np.asarray(names, dtype=object)[found]
    smallest = y[y > 0].min() if (y > 0).any() else 1e-300
    height = -np.log10(np.maximum(y, smallest))
    figure, axes = new_figure(size=(7.5, 5.5))
    below = np.zeros(len(x), dtype=bool) if below_resolution is None else np.asarray(below_resolution, dtype=bool)[found]
    sure = (y < SIGNIFICANT) & ~below
    plain = ~sure & ~below
    axes.scatter(x[plain], height[plain], s=10, color="0.7", linewidth=0, rasterized=True)
    if below.any():
        axes.scatter(
            x[below],
            height[below],
            s=12,
            facecolor="none",
            edgecolor="0.6",
            linewidth=0.6,
            rasterized=True,
            label=f"below the resolution of float32 ({int(below.sum()):,})",
        )
    axes.scatter(x[sure], height[sure], s=14, color="C3", linewidth=0, rasterized=True, label=f"below {SIGNIFICANT}")
    if known is not None and (ringed := np.asarray(known, dtype=bool)[found]).any():
        axes.scatter(x[ringed], height[ringed], s=42, facecolor="none", edgecolor="C0", linewidth=1.1, label="known beforehand")
    axes.axhline(-np.log10(SIGNIFICANT), color="0.5", linewidth=0.8, linestyle=":")
    axes.axvline(0, color="0.5", linewidth=0.8)
    axes.margins(0.12)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8)
    order = np.argsort(-np.abs(x) * (height + 1e-9))
    _label(figure, axes, x, height, labels, order[~below[order]])
    save_figure(figure, path)


def _label(figure: Any, axes: Any, x: np.ndarray, y: np.ndarray, labels: np.ndarray, order: np.ndarray) -> None:
    """Name points in an order of importance; a name that would cover another is left out."""
    figure.draw_without_rendering()
    taken: list[Any] = []
    for i in order[: 3 * LABELLED]:
        name = axes.annotate(str(labels[i]), (x[i], y[i]), fontsize=8, xytext=(3, 3), textcoords="offset points")
        place = name.get_window_extent()
        if len(taken) == LABELLED or any(place.padded(2).overlaps(other) for other in taken):
            name.remove()
        else:
            taken.append(place)


def plot_ranking(values: Sequence[float], names: Sequence[str], path: Path, *, ylabel: str, title: str) -> None:
    """Draw perturbations from the lowest to the highest value, with the names of those at both ends."""
    y, labels = np.asarray(values, dtype=float), np.asarray(names, dtype=object)
    known = np.isfinite(y)
    y, labels = y[known], labels[known]
    order = np.argsort(y, kind="stable")
    y, labels = y[order], labels[order]
    figure, axes = new_figure(size=(8, 4.8))
    axes.plot(np.arange(len(y)), y, ".", color="C0", markersize=4)
    ends = min(LABELLED, len(y) // 2 or 1)
    for end, side in ((np.arange(ends), 1), (np.arange(len(y) - ends, len(y)), -1)):
        for step, i in enumerate(end if side == 1 else end[::-1]):
            # Names stand in a column beside the points, a line each.
            place = (0.03 if side == 1 else 0.97, (0.97 if side == 1 else 0.03) - side * 0.045 * step)
            axes.text(
                *place,
                f"{labels[i]}  {y[i]:.3g}",
                transform=axes.transAxes,
                fontsize=7,
                va="top" if side == 1 else "bottom",
                ha="left" if side == 1 else "right",
            )
    axes.set(xlabel="perturbations by rank", ylabel=ylabel, title=title)
    save_figure(figure, path)


def plot_affected_genes(table: pd.DataFrame, path: Path, *, most: int = 30) -> None:
    """Draw a heat map of the genes that are affected most, from `aggregate_gene_shifts`: one minus the mean cosine, perturbed genes in rows."""
    genes = table[table["Affected"].astype(str) != "cell_emb"]
    names = {
        kind: genes[f"{kind}name"].where(genes[f"{kind}name"].notna(), genes[f"{other}"]).astype(str)
        for kind, other in (("Gene_", "Ensembl_ID"), ("Affected_gene_", "Affected_Ensembl_ID"))
    }
    wide = pd.DataFrame({"row": names["Gene_"], "column": names["Affected_gene_"], "shift": 1 - genes["Cosine_sim_mean"]}).pivot_table(
        index="row", columns="column", values="shift"
    )
    wide = wide.loc[wide.mean(axis=1).sort_values(ascending=False).index[:most], wide.max(axis=0).sort_values(ascending=False).index[:most]]
    figure, axes = new_figure(size=(3 + 0.26 * wide.shape[1], 2 + 0.22 * wide.shape[0]))
    image = axes.imshow(wide.to_numpy(), aspect="auto", cmap="viridis")
    axes.set_xticks(range(wide.shape[1]), wide.columns, rotation=90, fontsize=7)
    axes.set_yticks(range(wide.shape[0]), wide.index, fontsize=7)
    axes.set(xlabel="affected gene", ylabel="perturbed gene")
    figure.colorbar(image, ax=axes, label="1 - mean cosine")
    save_figure(figure, path)
