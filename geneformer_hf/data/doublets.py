"""Doublet scores: scrublet, as scanpy keeps it, sample by sample."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import scipy.sparse as sp

from ..errors import MissingExtraError, SettingError

FEWEST_CELLS = 100
"""A smaller sample has no neighbourhood to speak of; its cells get no score."""
MOST_CELLS = 100_000
"""A sample is held in memory as a whole; droplets of one sample are fewer."""


def require_scrublet() -> Any:
    """Return scanpy.

    Raises:
        MissingExtraError
    """
    try:
        import scanpy
        import skimage  # noqa: F401 - scrublet finds its threshold with it
    except ModuleNotFoundError as error:
        msg = "Doublet scores need scanpy and scikit-image. Install them with `pip install 'geneformer-hf[quality]'`, or leave doublets out (`--no-doublets`)."
        raise MissingExtraError(msg) from error
    return scanpy


def require_sample_size(name: str, n_cells: int) -> None:
    """Raise if a sample is too large to be held at once.

    Raises:
        SettingError
    """
    if n_cells > MOST_CELLS:
        msg = f"{name}: {n_cells:,} cells as one sample; doublets form within a sample, of {MOST_CELLS:,} cells at most here. Name the column of obs that holds the sample (`--sample COL`), or leave doublets out (`--no-doublets`)."
        raise SettingError(msg)


def doublet_scores(counts_ng: sp.csr_array, *, seed: int = 0) -> tuple[np.ndarray, float]:
    """Return scrublet's score per cell and the threshold it finds between singlets and doublets.

    Args:
        counts_ng (`scipy.sparse.csr_array` of shape `(n, g)`): raw counts of one sample.

    Returns:
        float32 of shape `(n,)`, NaN for samples of fewer than 100 cells and for cells without counts; and the threshold, NaN
        where the scores have no valley between two peaks.

    Source: Wolock et al. 2019 (doi:10.1016/j.cels.2018.11.005).
    """
    scanpy = require_scrublet()
    import anndata
    from threadpoolctl import threadpool_limits

    scores = np.full(counts_ng.shape[0], np.nan, dtype=np.float32)
    counted = np.asarray(counts_ng.sum(axis=1)).ravel() > 0
    if counted.sum() < FEWEST_CELLS:
        return scores, np.nan
    cells = anndata.AnnData(sp.csr_matrix(counts_ng[counted].astype(np.float32)))
    # One thread: sums in another order would change the last bits.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")
        try:
            # Exact neighbours: the same on every machine, and those of pynndescent 0.7 are not what scanpy 1.11 expects.
            scanpy.pp.scrublet(cells, use_approx_neighbors=False, random_state=seed, verbose=False)
        except ValueError:
            # Too few genes vary for its 30 principal components.
            return scores, np.nan
    scores[counted] = cells.obs["doublet_score"].to_numpy()
    threshold = cells.uns["scrublet"].get("threshold", np.nan)
    return scores, float(threshold) if threshold is not None else np.nan
