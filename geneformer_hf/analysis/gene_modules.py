"""Genes that stand close together in a model: similarity, modules, and whether genes of one class are neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..errors import SettingError
from ..genes import GeneTable
from ..reports.expression import scanpy
from .embeddings import GeneEmbeddings, rows_for
from .gene_classes import known_genes

NEIGHBOURS = 15


def gene_similarity(embeddings: GeneEmbeddings, genes: Sequence[str], *, others: Sequence[str] | None = None) -> pd.DataFrame:
    """Return the cosine similarity of genes to each other, or to other genes, by the Ensembl ids given; NaN where one was not seen.

    The mean over all genes is taken off first: vectors of a transformer share a direction that would make all of them alike.
    """
    unit = _unit(embeddings)
    sides = []
    for names in (genes, others if others is not None else genes):
        rows = rows_for(names, embeddings.ensembl_ids)
        sides.append(np.where(rows[:, None] >= 0, unit[rows], np.nan))
    values = sides[0] @ sides[1].T
    return pd.DataFrame(values, index=list(genes), columns=list(others if others is not None else genes))


def gene_modules(
    embeddings: GeneEmbeddings, *, table: GeneTable | None = None, least_cells: int = 10, n_neighbors: int = NEIGHBOURS, resolution: float = 1.0, seed: int = 0
) -> Any:
    """Group genes by their embeddings: nearest neighbours by cosine, and Leiden clusters of that graph, by scanpy.

    Args:
        embeddings (`GeneEmbeddings`): as `embed_genes` returns them.
        table (`GeneTable`, *optional*): for symbols.
        least_cells (`int`, *optional*, defaults to 10): genes seen in fewer cells are left out.
        n_neighbors, resolution, seed: of scanpy.

    Returns:
        `AnnData` with a row for each gene: X is the embedding less the mean of all; obs has n_cells, symbol and module (numbered by size);
        obsm X_umap; obsp distances and connectivities; uns["genes_left_out"].

    Raises:
        SettingError: if fewer genes than neighbours are left.
        MissingExtraError: without scanpy.
    """
    sc = scanpy()
    import anndata

    kept = embeddings.n_cells >= least_cells
    if kept.sum() <= n_neighbors:
        msg = f"{int(kept.sum()):,} of {len(kept):,} genes were seen in {least_cells} cells or more; expected more than {n_neighbors}. Lower least_cells, or give more cells."
        raise SettingError(msg)
    ids = [name for name, keep in zip(embeddings.ensembl_ids, kept.tolist(), strict=True) if keep]
    vectors = embeddings.vectors[kept].astype(np.float64)
    obs = pd.DataFrame({"n_cells": embeddings.n_cells[kept]}, index=pd.Index(ids, name="ensembl_id"))
    if table is not None:
        obs["symbol"] = [table.symbols[table.row_of[name]] for name in ids]
    adata = anndata.AnnData((vectors - vectors.mean(axis=0)).astype(np.float32), obs=obs)
    # Exact, for the reasons of `umap_coordinates`.
    sc.pp.neighbors(adata, use_rep="X", n_neighbors=n_neighbors, metric="cosine", transformer="sklearn", random_state=seed)
    sc.tl.leiden(adata, resolution=resolution, flavor="igraph", n_iterations=2, directed=False, random_state=seed, key_added="module")
    sc.tl.umap(adata, random_state=seed)
    adata.uns["genes_left_out"] = int((~kept).sum())
    return adata


def neighbours_of_classes(modules: Any, classes: Mapping[str, Sequence[str]], table: GeneTable) -> pd.DataFrame:
    """Tell how often genes of a class are neighbours of each other, beside what chance would give.

    Args:
        modules (`AnnData`): as `gene_modules` returns it.
        classes: class to genes, as Ensembl ids or symbols.

    Returns:
        `pd.DataFrame`, a row a class: class, n_genes, observed (share of its genes' neighbours that are of it), expected (its share of all other genes),
        fold.
    """
    place = {name: i for i, name in enumerate(modules.obs_names)}
    near = modules.obsp["distances"].tocsr()
    rows = []
    for name, genes in classes.items():
        members = np.array([place[gene] for gene in known_genes(table, genes) if gene in place], dtype=np.int64)
        if len(members) < 2:
            rows.append({"class": name, "n_genes": len(members), "observed": np.nan, "expected": np.nan, "fold": np.nan})
            continue
        edges = near[members]
        observed = float(np.isin(edges.indices, members).sum() / max(len(edges.indices), 1))
        expected = (len(members) - 1) / (modules.n_obs - 1)
        rows.append({"class": name, "n_genes": len(members), "observed": observed, "expected": expected, "fold": observed / expected})
    return pd.DataFrame(rows)


def _unit(embeddings: GeneEmbeddings) -> np.ndarray:
    vectors = embeddings.vectors.astype(np.float64)
    vectors = vectors - vectors.mean(axis=0)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
