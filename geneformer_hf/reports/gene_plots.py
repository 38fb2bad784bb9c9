"""Pictures of what a model makes of genes: specificity, modules, ranks, attention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .plots import colour_map, new_figure, save_figure

NAMED_GENES = 30


def plot_specificity(table: pd.DataFrame, path: Path, *, title: str) -> None:
    """Draw how much of each gene's spread lies between cell types, beside what permuted types give; the most specific genes by name.

    Args:
        table (`DataFrame`): as `context_specificity` returns it.
    """
    figure, (axes, bars) = new_figure(1, 2, size=(10, 5), width_ratios=(3, 2))
    significant = table["q_value"].to_numpy() <= 0.05
    axes.scatter(table["n_cells"], table["null_mean"], s=6, color="0.75", label="permuted types (mean)", linewidths=0)
    for held, colour, name in ((~significant, "#4c78a8", "not above chance"), (significant, "#e45756", "above chance (q ≤ 0.05)")):
        axes.scatter(table["n_cells"][held], table["between"][held], s=12, color=colour, label=f"{name}: {int(held.sum()):,} genes", linewidths=0)
    axes.set(xscale="log", xlabel="cells that express the gene", ylabel="share of spread between cell types", title=title)
    axes.legend(frameon=False, fontsize=8)
    top = table.head(NAMED_GENES // 2)[::-1]
    bars.barh(range(len(top)), top["between"], color="#e45756")
    bars.set_yticks(range(len(top)), _names(top), fontsize=8)
    bars.set_title("most specific", fontsize=10)
    for each in (axes, bars):
        each.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def plot_modules(coordinates: np.ndarray, modules: Sequence[str], path: Path, *, title: str, most: int = 20) -> None:
    """Draw genes by their module; those beyond the largest modules in grey."""
    figure, axes = new_figure(size=(8, 5.5))
    labels = np.asarray(modules, dtype=object).astype(str)
    names, counts = np.unique(labels, return_counts=True)
    named = names[np.argsort(-counts, kind="stable")][:most]
    rest = ~np.isin(labels, named)
    axes.scatter(*coordinates[rest].T, s=4, color="0.8", linewidths=0)
    for i, name in enumerate(named):
        held = labels == name
        axes.scatter(*coordinates[held].T, s=5, color=colour_map("tab20")(i % 20), label=f"{name} ({int(held.sum()):,} genes)", linewidths=0)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, markerscale=3, fontsize=8)
    axes.set(title=title, xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[])
    save_figure(figure, path)


def plot_ranks(contributions: pd.DataFrame, hidden: pd.DataFrame, path: Path, *, title: str) -> None:
    """Draw by rank how far cells move without genes there or without their order, and how well hidden genes are found.

    Args:
        contributions (`DataFrame`): as `rank_contributions`.
        hidden (`DataFrame`): as `HiddenGenes.by_rank`.
    """
    figure, panels = new_figure(1, 3, size=(13, 4))
    ticks = [f"{row.first}-{row.last}" for row in contributions.itertuples()]
    for axes, columns, ylabel in (
        (panels[0], {"hidden": "genes hidden", "shuffled": "order lost"}, "move of the cell (1 - cosine)"),
        (panels[1], {"hidden_per_gene": "genes hidden"}, "move for each hidden gene"),
    ):
        for column, label in columns.items():
            axes.plot(range(len(ticks)), np.maximum(contributions[column], 1e-9), "o-", label=label)
        axes.set(yscale="log", ylabel=ylabel)
        axes.legend(frameon=False, fontsize=8)
        axes.set_xticks(range(len(ticks)), ticks, rotation=40, ha="right", fontsize=8)
    names = [f"{row.first}-{row.last}" for row in hidden.itertuples()]
    panels[2].plot(range(len(names)), hidden["loss"], "o-", label="model")
    panels[2].plot(range(len(names)), hidden["baseline_loss"], "o--", color="0.5", label="how often a gene has the rank")
    panels[2].set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    panels[2].set(ylabel="loss of hidden genes (nats)")
    panels[2].legend(frameon=False, fontsize=8)
    for axes in panels:
        axes.set_xlabel("rank in the cell")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    save_figure(figure, path)


def plot_heads(values: np.ndarray, layers: Sequence[int], path: Path, *, title: str, what: str) -> None:
    """Draw a chance for each layer and head around one half, of shape `(layers, heads)`."""
    figure, axes = new_figure(size=(3 + 0.6 * values.shape[1], 1.8 + 0.45 * len(layers)))
    reach = max(0.05, float(np.nanmax(np.abs(values - 0.5))))
    image = axes.imshow(values, cmap="RdBu_r", vmin=0.5 - reach, vmax=0.5 + reach, aspect="auto")
    for i, j in np.ndindex(values.shape):
        axes.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(values.shape[1]))
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_title(title, fontsize=10)
    axes.set(xlabel="head", ylabel="layer")
    figure.colorbar(image, ax=axes, label=what)
    save_figure(figure, path)


def plot_network(weights: np.ndarray, names: Sequence[str], path: Path, *, title: str, what: str) -> None:
    """Draw the attention between some genes, from each row to each column; pairs without an edge are grey."""
    size = 3 + 0.24 * len(names)
    figure, axes = new_figure(size=(size + 1, size))
    image = axes.imshow(np.ma.masked_equal(weights, 0), cmap=colour_map("viridis").with_extremes(bad="0.92"))
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_title(title, fontsize=10)
    axes.set(xlabel="attended to", ylabel="attending")
    figure.colorbar(image, ax=axes, label=what, shrink=0.7)
    save_figure(figure, path)


def plot_received(table: pd.DataFrame, path: Path, *, title: str, marked: Sequence[bool] | None = None, marked_name: str = "") -> None:
    """Draw the genes that receive most attention.

    Args:
        table (`DataFrame`): with `received` and `symbol`, by Ensembl id, the most first.
        marked: which of its genes are set off in colour.
    """
    top = table.head(NAMED_GENES)[::-1]
    flags = np.zeros(len(top), dtype=bool) if marked is None else np.asarray(list(marked))[: len(top)][::-1]
    figure, axes = new_figure(size=(7, 1.2 + 0.2 * len(top)))
    axes.barh(range(len(top)), top["received"], color=np.where(flags, "#e45756", "#4c78a8"))
    axes.set_yticks(range(len(top)), _names(top), fontsize=7)
    axes.axvline(1, color="0.5", linestyle="--", linewidth=1)
    axes.set(title=title, xlabel="attention received (1: uniform)")
    if flags.any():
        axes.barh([0], [0], color="#e45756", label=marked_name)
        axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def _names(table: Any) -> list[str]:
    ids = table.get("ensembl_id", table.index)
    return [str(symbol or name) for symbol, name in zip(table["symbol"], ids, strict=True)]
