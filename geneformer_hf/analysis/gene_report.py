"""The part of an evaluation that is about genes: specificity, modules, hidden genes, ranks; a section of the page for each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..genes import GeneTable
from ..models.modeling_geneformer import GeneformerForMaskedLM
from ..reports.figures import file_name
from ..reports.gene_plots import plot_modules, plot_ranks, plot_specificity
from ..reports.html import Section, Table
from .embeddings import Embedder, embed_genes
from .gene_classes import hide_genes
from .gene_context import context_specificity
from .gene_modules import gene_modules, neighbours_of_classes
from .rank_contribution import rank_contributions

SHOWN_MODULES = 12
SHOWN_GENES = 8


def gene_classes_by_name(table: GeneTable) -> dict[str, list[str]]:
    """Return classes that the symbols of genes tell: mitochondrial, ribosomal."""
    prefixes = {"mitochondrial": ("MT-",), "ribosomal": ("RPL", "RPS")}
    found = {name: [s for s in table.symbols if s.upper().startswith(starts)] for name, starts in prefixes.items()}
    return {name: genes for name, genes in found.items() if genes}


def gene_section(
    name: str, model: Any, cells: Any, pictures: Path, *, labels: str, classes: Mapping[str, Sequence[str]] | None = None, seed: int = 0,
    gene_ids: str | None = None, counts_layer: str | None = None, genome: str | None = None, layer: int = -2, **options: Any,
) -> tuple[Section, dict[str, Any]]:  # fmt: skip
    """Measure what a model makes of genes, and draw it.

    Args:
        name: of the model, for people.
        pictures: folder to draw into.
        classes: class to genes; those that symbols tell otherwise.
        options: layer, pooling, batch_size, device, dtype, quantization, progress, as for `embed_cells`.

    Returns:
        the section, and its figures.
    """
    pooling, opening = options.pop("pooling", None), {name: options.pop(name) for name in ("quantization", "allow_missing_weights") if name in options}
    runner = Embedder(model, **options, **opening, layer=layer, pooling="mean")
    opened, table = runner.model, runner.tokenizer().gene_table
    options |= {"layer": layer, "tokenizer": runner.tokenizer(), "gene_ids": gene_ids, "counts_layer": counts_layer, "genome": genome}
    classes = classes or gene_classes_by_name(table)
    drawn = {kind: pictures / f"genes_{kind}_{file_name(name)}.png" for kind in ("specificity", "modules", "ranks")}

    n_cells = runner.open(cells, gene_ids=gene_ids, counts_layer=counts_layer, genome=genome).n_cells
    # Of few cells, genes in fewer of them have to do.
    specificity = context_specificity(opened, cells, labels=labels, least_cells=max(2, min(20, n_cells // 5)), seed=seed, **options)
    plot_specificity(specificity, drawn["specificity"], title=f"Context of genes, {name}")
    modules = gene_modules(embed_genes(opened, cells, **options), table=table, least_cells=max(2, min(10, n_cells // 10)), seed=seed)
    plot_modules(modules.obsm["X_umap"], modules.obs["module"], drawn["modules"], title=f"Modules of genes, {name}")
    neighbours = neighbours_of_classes(modules, classes, table)
    moves = rank_contributions(opened, cells, pooling=pooling, seed=seed, **options)
    by_class, by_rank = pd.DataFrame(), pd.DataFrame()
    if isinstance(opened, GeneformerForMaskedLM):
        del options["layer"]
        hidden = hide_genes(opened, cells, **options)
        by_class, by_rank = hidden.by_class(classes), hidden.by_rank()
        plot_ranks(moves, by_rank, drawn["ranks"], title=f"Ranks, {name}")
    above = int((specificity["q_value"] <= 0.05).sum())
    section = Section(
        f"Genes: {name}",
        verdict=f"The vectors of {above:,} of {len(specificity):,} genes differ between cell types more than between permuted ones (q ≤ 0.05); the most: {', '.join(specificity['symbol'].head(SHOWN_GENES))}.",
        lines=[] if len(by_rank) else [f"{name} predicts no masked genes, so none were hidden."],
        pictures=[path for path in drawn.values() if path.is_file()],
        further=[Table(by_class.to_dict("records"), title="Hidden genes by class"), Table(by_rank.to_dict("records"), title="Hidden genes by rank"),
                 Table(neighbours.to_dict("records"), title="Neighbours of the same class"), Table(moves.to_dict("records"), title="What ranks contribute"),
                 Table(_module_rows(modules), title="Largest modules")],
    )  # fmt: skip
    figures = {
        "context_specificity": specificity.to_dict("records"),
        "neighbours_of_classes": neighbours.to_dict("records"),
        "rank_contributions": moves.to_dict("records"),
        "hidden_by_class": by_class.to_dict("records"),
        "hidden_by_rank": by_rank.to_dict("records"),
        "modules": {str(gene): str(module) for gene, module in modules.obs["module"].items()},
    }
    return section, figures


def _module_rows(modules: Any) -> list[dict[str, Any]]:
    """Return the largest modules with the genes of most cells in them."""
    rows: list[dict[str, Any]] = []
    for module, genes in modules.obs.groupby("module", observed=True):
        top = genes.sort_values("n_cells", ascending=False, kind="stable").head(SHOWN_GENES)
        rows.append(
            {
                "module": str(module),
                "n_genes": len(genes),
                "in most cells": ", ".join(symbol or name for symbol, name in zip(top["symbol"], top.index, strict=True)),
            }
        )
    return sorted(rows, key=lambda row: row["n_genes"], reverse=True)[:SHOWN_MODULES]
