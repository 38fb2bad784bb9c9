"""Pictures of embeddings, training and cell quality: UMAP and heat map by an obs column, loss curves, histograms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..errors import MissingExtraError

MAX_CLASSES = 40
"""More categories than that get no legend that could be read."""


def require_plots(*, umap: bool = False) -> None:
    """Raise unless the plotting libraries are installed; called before the computation.

    Raises:
        MissingExtraError
    """
    missing = [name for name in ("matplotlib", *(("scanpy",) if umap else ())) if find_spec(name) is None]
    if missing:
        msg = f"Plots need {' and '.join(missing)}. Install the extra: `pip install 'geneformer-hf[plot]'`."
        raise MissingExtraError(msg)


def new_figure(n_rows: int = 1, n_columns: int = 1, *, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """Return a figure and its axes, as `matplotlib.pyplot.subplots` does, without pyplot, so that the backend and figures of the session are unaffected.

    Raises:
        MissingExtraError
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        msg = "Plots need matplotlib. Install the extra: `pip install 'geneformer-hf[plot]'`."
        raise MissingExtraError(msg) from error
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(n_rows, n_columns, **options)


def colour_map(name: str) -> Any:
    """Return a colour map of matplotlib by its name."""
    from matplotlib import colormaps

    return colormaps[name]


def umap_coordinates(embeddings: np.ndarray, *, seed: int = 0, n_neighbors: int = 15) -> np.ndarray:
    """Return UMAP coordinates, float32 of shape `(n, 2)`; NaN where an embedding is NaN.

    Computed by scanpy (neighbours, then UMAP) with its defaults.
    """
    try:
        import anndata
        import scanpy as sc
    except ModuleNotFoundError as error:
        msg = "UMAP needs scanpy. Install it with `pip install 'geneformer-hf[plot]'`."
        raise MissingExtraError(msg) from error
    keep = ~np.isnan(embeddings).any(axis=1)
    out = np.full((len(embeddings), 2), np.nan, dtype=np.float32)
    if keep.sum() < 4:
        return out
    adata = anndata.AnnData(obs=pd.DataFrame(index=[str(i) for i in np.flatnonzero(keep)]), obsm={"X": embeddings[keep]})
    # Exact: scanpy 1.11 cannot read the neighbours of pynndescent 0.7, which it takes beyond 4,096 cells, and these are the same on every machine.
    sc.pp.neighbors(adata, use_rep="X", n_neighbors=min(n_neighbors, int(keep.sum()) - 1), transformer="sklearn", random_state=seed)
    sc.tl.umap(adata, random_state=seed)
    out[keep] = adata.obsm["X_umap"]
    return out


def plot_umap(coordinates: np.ndarray, values: Sequence[Any], path: Path, *, title: str, name: str) -> None:
    """Draw UMAP coordinates of shape `(n, 2)`, coloured by a column of classes or numbers."""
    figure, axes = new_figure(size=(8, 5.5))
    drawn = ~np.isnan(coordinates).any(axis=1)
    coordinates, series = coordinates[drawn], pd.Series(list(values))[drawn]
    size = float(np.clip(20_000 / max(1, len(series)), 1, 18))
    if _is_continuous(series):
        points = axes.scatter(*coordinates.T, c=series, s=size, cmap="viridis", linewidths=0)
        figure.colorbar(points, ax=axes, label=name)
    else:
        labels = _class_names(series)
        classes, counts = np.unique(labels, return_counts=True)
        colours = colour_map("tab20" if len(classes) > 10 else "tab10")
        for i, (label, count) in enumerate(zip(classes, counts, strict=True)):
            axes.scatter(*coordinates[labels == label].T, s=size, color=colours(i % colours.N), label=f"{label} ({count:,})", linewidths=0)
        if len(classes) <= MAX_CLASSES:
            axes.legend(
                loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, markerscale=max(1.0, 6 / size**0.5), fontsize=8, ncols=1 + len(classes) // 26
            )
    axes.set(title=title, xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[])
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def plot_heatmap(embeddings: np.ndarray, values: Sequence[Any], path: Path, *, title: str, name: str) -> None:
    """Draw the mean embedding of every class, in standard deviations over cells.

    Classes and dimensions are put in order by similarity. Numbers of more than ten values are cut into tenths.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage

    keep = ~np.isnan(embeddings).any(axis=1)
    series = pd.Series(list(values))[keep]
    if _is_continuous(series):
        series = pd.qcut(series.astype(float), 10, duplicates="drop")
    vectors = embeddings[keep]
    spread = vectors.std(axis=0)
    standardised = (vectors - vectors.mean(axis=0)) / np.where(spread > 0, spread, 1)
    means = pd.DataFrame(standardised).groupby(_class_names(series)).mean()
    names, scaled = means.index.tolist(), means.to_numpy()
    rows = leaves_list(linkage(scaled, "average")) if len(scaled) > 2 else np.arange(len(scaled))
    columns = leaves_list(linkage(scaled.T, "average")) if scaled.shape[1] > 2 and len(scaled) else np.arange(scaled.shape[1])
    figure, axes = new_figure(size=(9, min(30.0, 2.5 + 0.3 * len(means))))
    image = axes.imshow(scaled[rows][:, columns], aspect="auto", cmap="RdBu_r", vmin=-2, vmax=2, interpolation="nearest")
    if len(means) <= 90:
        axes.set_yticks(range(len(means)), [str(names[r]) for r in rows.tolist()], fontsize=8)
    axes.set(title=title, xlabel=f"{embeddings.shape[1]} dimensions, ordered by similarity", ylabel=name, xticks=[])
    figure.colorbar(image, ax=axes, label="mean (SD)")
    save_figure(figure, path)


def _is_continuous(series: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(series) and not pd.api.types.is_bool_dtype(series) and series.nunique() > 10


def _class_names(series: pd.Series) -> np.ndarray:
    """Return classes as text; what is missing or empty says so."""
    text = series.astype(object).where(series.notna(), "(missing)").astype(str)
    return text.where(text.str.strip() != "", "(empty)").to_numpy()


def plot_training(
    steps: Sequence[int],
    losses: Sequence[float],
    path: Path,
    *,
    held_out: Mapping[str, Sequence[tuple[int, float]]],
    references: Mapping[str, Mapping[str, float]],
) -> None:
    """Draw the masked-gene loss in nats by step: of training, and of the held-out cells of each dataset beside its baselines.

    Args:
        held_out: steps and losses by dataset.
        references: other losses on the held-out cells of each dataset, by their names; drawn as lines in the colour of the dataset.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure(size=(9, 4.5))
    if steps:
        axes.plot(steps, losses, color="0.6", label="training", marker="." if len(steps) < 3 else None)
    for i, (name, points) in enumerate(held_out.items()):
        color, of = f"C{i}", f", {name}" if len(held_out) > 1 else ""
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=3, linewidth=1, label=f"held-out cells{of} ({points[-1][1]:.2f})")
        for style, (what, value) in zip(("--", ":", "-."), references.get(name, {}).items(), strict=False):
            axes.axhline(value, linestyle=style, color=color, linewidth=1, label=f"{what}{of} ({value:.2f})")
    axes.set(title="Masked-gene loss", xlabel="step", ylabel="loss (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure; dollar signs in names are not math."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if "$" in text.get_text() and "mathdefault" not in text.get_text():
            text.set_parse_math(False)
    figure.savefig(path, dpi=150)


MAX_NAMED = 8
"""More datasets than that get no colours and names of their own."""
QUALITY_PANELS = {
    "qc_total_counts": ("total counts", "log"),
    "qc_mitochondrial_share": ("mitochondrial share of counts", "linear"),
    "qc_coding_genes": ("detected protein-coding and miRNA genes", "log"),
    "qc_doublet_score": ("doublet score", "linear"),
}


def plot_quality(frames: Iterable[pd.DataFrame], path: Path, *, title: str, bounds: pd.DataFrame) -> None:
    """Draw how the measures of all cells are distributed, passing and not, with the bounds of each dataset.

    Args:
        frames: the verdicts on the cells of some files, as `Quality.cells` returns them; held one at a time.
        bounds (`DataFrame`): a row a dataset with `total_counts_low`, `…_high` and `mitochondrial_share_low`, `…_high`.
    """
    from matplotlib import ticker

    edges = {c: np.logspace(0, 6, 121) if scale == "log" else np.linspace(0, 1, 201) for c, (_, scale) in QUALITY_PANELS.items()}
    heights = {c: np.zeros((2, len(e) - 1)) for c, e in edges.items()}
    for frame in frames:
        passing = frame["filter_pass"].to_numpy(dtype=bool)
        for column, edge in edges.items():
            values = frame[column].to_numpy(dtype=float)
            for row, chosen in enumerate((passing, ~passing)):
                heights[column][row] += np.histogram(values[chosen & ~np.isnan(values)], edge)[0]
    shown = [c for c in QUALITY_PANELS if heights[c].any()]
    figure, all_axes = new_figure(1, len(shown), size=(4.2 * len(shown), 3.6), squeeze=False)
    for axes, column in zip(all_axes[0], shown, strict=True):
        label, scale = QUALITY_PANELS[column]
        both, edge = heights[column], edges[column]
        axes.stairs(both[0], edge, fill=True, color="#4c78a8", label=f"passing ({int(both[0].sum()):,} cells)")
        axes.stairs(both.sum(axis=0), edge, baseline=both[0], fill=True, color="#e45756", label=f"not passing ({int(both[1].sum()):,})")
        name = column.removeprefix("qc_")
        if f"{name}_high" in bounds and len(bounds) <= MAX_CLASSES:
            for number, (dataset, row) in enumerate(bounds.iterrows()):
                named = f"bounds of {Path(str(dataset)).name}" if len(bounds) <= MAX_NAMED else "bounds of a dataset" if number == 0 else None
                color = colour_map("Dark2")(number) if len(bounds) <= MAX_NAMED else "black"
                for value in (row[f"{name}_low"], row[f"{name}_high"]):
                    if edge[0] < value < edge[-1]:
                        axes.axvline(value, color=color, linewidth=1, linestyle="--", label=named)
                        named = None
        filled = np.flatnonzero(both.sum(axis=0))
        axes.set_xscale(scale)
        if scale == "log":
            # Powers of ten and their double and fivefold: more labels overlap.
            axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
            axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set_xlim(edge[max(0, filled[0] - 2)], edge[min(len(edge) - 1, filled[-1] + 3)])
        axes.set_xlabel(label)
        axes.set_ylim(0, 1.4 * both.sum(axis=0).max())
        axes.legend(fontsize="x-small")
    all_axes[0][0].set_ylabel("cells")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
