"""What any embedding of cells has to beat: log counts of variable genes, and their principal components, by scanpy as in its tutorials."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import scipy.sparse as sp

from ..errors import MissingExtraError

VARIABLE_GENES = 2000
COMPONENTS = 50
CELLS_FOR_A_BATCH = 20
"""A batch of fewer cells says nothing of which genes vary."""


def scanpy() -> Any:
    """Return scanpy, or say how to get it.

    Raises:
        MissingExtraError
    """
    try:
        import scanpy as found
    except ModuleNotFoundError as error:
        msg = "Baselines of expression need scanpy. Install it with `pip install 'geneformer-hf[plot]'`."
        raise MissingExtraError(msg) from error
    return found


def variable_expression(matrix_ng: sp.csr_matrix, batches_n: np.ndarray | None = None, *, counts: bool = True) -> np.ndarray:
    """Return the expression of the most variable genes, float32 of shape `(n, up to 2000)`.

    Args:
        matrix_ng (`csr_matrix` of shape `(n, g)`): raw counts; or log expression, where `counts` is False.
        batches_n (*optional*): genes are chosen that vary within batches, where each has 20 cells or more.
    """
    sc = scanpy()
    import anndata

    adata = anndata.AnnData(sp.csr_matrix(matrix_ng, dtype=np.float32))
    if counts:
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata)
    detected = np.asarray((adata.X > 0).sum(axis=0)).ravel() > 0
    adata = adata[:, detected].copy()
    key = None
    if batches_n is not None and np.unique(batches_n, return_counts=True)[1].min() >= CELLS_FOR_A_BATCH:
        adata.obs["batch"] = [str(batch) for batch in batches_n]
        key = "batch"
    if adata.n_vars > VARIABLE_GENES:
        with warnings.catch_warnings():
            # Few cells, and genes that are in none of a batch.
            warnings.simplefilter("ignore")
            sc.pp.highly_variable_genes(adata, n_top_genes=VARIABLE_GENES, batch_key=key)
        adata = adata[:, adata.var["highly_variable"]]
    return np.asarray(adata.X.toarray(), dtype=np.float32)


def principal_components(expression_ng: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Return the first 50 principal components, float32 of shape `(n, up to 50)`."""
    n_components = min(COMPONENTS, min(expression_ng.shape) - 1)
    return np.asarray(scanpy().pp.pca(expression_ng, n_comps=n_components, random_state=seed), dtype=np.float32)
