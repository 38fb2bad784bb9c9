"""An evaluation as files: one page, one JSON, one table, and the pictures of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm.auto import tqdm

from .._version import __version__
from ..reports.csv_files import write_csv
from ..reports.evaluation_plots import plot_table
from ..reports.figures import file_name, write_figures
from ..reports.html import Page, Section, Table, write_page
from ..reports.label_transfer import KNN
from ..reports.plots import plot_umap, umap_coordinates
from .evaluation import CellEvaluation
from .representations import MODEL

PICTURES = "pictures"
SHOWN = ("nmi", "ari", "asw_label", "avg_bio", "asw_batch", "graph_connectivity", "pcr", "avg_batch", "overall", "knn_accuracy", "knn_macro_f1", "probe_accuracy", "probe_macro_f1")  # fmt: skip
SUMMING_UP = ("avg_bio", "avg_batch", "overall", "knn_macro_f1", "probe_macro_f1")
MEANING = (
    "nmi, ari: clusters of nearest neighbours against labels, at the best of ten resolutions. asw_label: silhouette of labels. avg_bio: mean of the three.",
    "asw_batch: 1 less the silhouette of batches within labels. graph_connectivity: share of each label that hangs together. pcr: how much less batches explain than in expression. avg_batch: mean of the three.",
    "overall: 0.6 avg_bio + 0.4 avg_batch (Luecken et al. 2022). All by scib-metrics; 1 is best.",
    "knn, probe: labels of held-out cells from 15 nearest neighbours and from logistic regression on the embedding, mean over folds. No model was trained on these cells.",
)


def write_evaluation(
    evaluation: CellEvaluation,
    folder: Path,
    *,
    title: str,
    settings: Mapping[str, Any],
    umaps: bool = True,
    seed: int = 0,
    further: Sequence[Section] = (),
    progress: bool = True,
) -> None:
    """Write `report.html`, `evaluation.json`, `evaluation.csv` and `pictures/` into a folder.

    Args:
        settings: how it was made, to keep.
        umaps: whether to draw each embedding.
        further: more sections of the page.
    """
    pictures = folder / PICTURES
    pictures.mkdir(exist_ok=True)
    table = evaluation.table
    write_csv(table, folder / "evaluation.csv", index=False)
    write_figures(figures_of(evaluation, settings), folder / "evaluation.json")
    names, n_models = table["name"].tolist(), int((table["kind"] == MODEL).sum())
    columns = [name for name in SHOWN if name in table]
    overview, classes = pictures / "figures.png", pictures / "classes.png"
    summing_up = [name for name in SUMMING_UP if name in table]
    plot_table(
        table[summing_up].to_numpy(dtype=float), names, summing_up, overview, title="What sums up the others; more is better", what="figure", n_marked=n_models
    )
    class_names, by_class = _f1_by_class(evaluation)
    plot_table(by_class.T, class_names, names, classes, title=f"F1 of each label from {KNN}, mean over folds", what="F1")
    sections = [
        Section("Figures", verdict=evaluation.verdict(), tables=[Table(_shown(evaluation, columns), n_marked=n_models)], pictures=[overview], points=MEANING),
        Section("Label transfer", lines=_transfer_lines(evaluation), pictures=[classes], further=[Table(_transfer_rows(evaluation), title="By fold")]),
    ]
    if umaps:
        sections.append(Section("Embeddings", pictures=_draw_umaps(evaluation, pictures, settings, seed, progress=progress)))
    sections += further
    if evaluation.notes:
        sections.append(Section("Left out, and other remarks", points=evaluation.notes))
    sections.append(Section("Settings", settings=yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)))
    subtitle = f"{int(evaluation.used.sum()):,} of {len(evaluation.used):,} cells, {len(class_names)} labels; nothing was trained on them. geneformer-hf {__version__}, scib-metrics {version('scib-metrics')}."
    write_page(Page(title, subtitle, sections), folder / "report.html")


def figures_of(evaluation: CellEvaluation, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that was measured, for JSON."""
    labels = evaluation.labels[evaluation.used]
    return {
        "settings": dict(settings),
        "versions": {"geneformer_hf": __version__, "scib_metrics": version("scib-metrics")},
        "cells": len(evaluation.used),
        "cells_judged": int(evaluation.used.sum()),
        "labels": {str(name): int(n) for name, n in zip(*np.unique(labels.astype(str), return_counts=True), strict=True)},
        "held_out": evaluation.held_out,
        "majority_class": evaluation.majority,
        "representations": [one.row() | {"transfer": one.transfer} for one in evaluation.judged],
        "verdict": evaluation.verdict(),
        "notes": evaluation.notes,
    }


def _shown(evaluation: CellEvaluation, columns: Sequence[str]) -> list[dict[str, Any]]:
    rows = [one.row() for one in evaluation.judged]
    return [{"": row["name"], "dimensions": row["dimensions"]} | {name: row[name] for name in columns} for row in rows]


def _f1_by_class(evaluation: CellEvaluation) -> tuple[list[str], np.ndarray]:
    """Return labels and F1 by nearest neighbours, of shape `(representations, labels)`; NaN where a label was in no test cells."""
    names = sorted({str(label) for label in evaluation.labels[evaluation.used]})
    out = np.full((len(evaluation.judged), len(names)), np.nan)
    for i, one in enumerate(evaluation.judged):
        rows = [row["f1_by_class"] for row in one.transfer if row["method"] == KNN]
        for j, name in enumerate(names):
            values = [row[name] for row in rows if name in row]
            out[i, j] = np.mean(values) if values else np.nan
    return names, out


def _transfer_lines(evaluation: CellEvaluation) -> list[str]:
    held_out = evaluation.held_out
    how = (
        "Cells were cut into random parts"
        if held_out == "random parts"
        else f"Every {held_out} is wholly on one side: its cells are named from cells of others"
    )
    majority = evaluation.majority
    unseen = sum(row["n_unseen"] for row in evaluation.judged[0].transfer if row["method"] == KNN)
    lines = [f"{how}. Naming all by the most frequent label: accuracy {majority['accuracy']:.3f}, macro F1 {majority['macro_f1']:.3f}."]
    return [*lines, f"{unseen:,} cells are of a label that no training cell of their fold has; they are not counted."] if unseen else lines


def _transfer_rows(evaluation: CellEvaluation) -> list[dict[str, Any]]:
    frame = evaluation.transfer
    return frame[frame["method"] != "majority class"].to_dict("records")


def _draw_umaps(evaluation: CellEvaluation, pictures: Path, settings: Mapping[str, Any], seed: int, *, progress: bool) -> list[Path]:
    """Draw each embedding, coloured by label and by batch."""
    columns = {str(settings.get("labels", "label")): evaluation.labels}
    if evaluation.batches is not None:
        columns[str(settings.get("batch", "batch"))] = evaluation.batches
    drawn = []
    for one in tqdm(evaluation.judged, desc="Drawing", unit=" embeddings", disable=not progress):
        coordinates = umap_coordinates(one.representation.vectors[evaluation.used], seed=seed)
        for column, values in columns.items():
            path = pictures / f"umap_{file_name(one.representation.name)}_{file_name(column)}.png"
            plot_umap(coordinates, values[evaluation.used], path, title=f"{one.representation.name}, by {column}", name=column)
            drawn.append(path)
    return drawn
