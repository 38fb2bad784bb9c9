"""How well an embedding keeps cell types apart and batches together: the measures of scIB (Luecken et al. 2022), counted by scib-metrics."""

from __future__ import annotations

import logging
import math
import warnings
from typing import Any

import numpy as np

from ..errors import MissingExtraError

NEIGHBOURS = 15
BIO = ("nmi", "ari", "asw_label")
BATCH = ("asw_batch", "graph_connectivity", "pcr")
BIO_WEIGHT = 0.6


def scib_metrics() -> Any:
    """Return scib_metrics, or say how to get it.

    Raises:
        MissingExtraError
    """
    try:
        # jax looks for accelerators, and says that it found none.
        logging.getLogger("jax").setLevel(logging.ERROR)
        import scib_metrics as found
    except ModuleNotFoundError as error:
        msg = "An evaluation needs scib-metrics and scanpy. Install them with `pip install 'geneformer-hf[evaluation,plot]'`."
        raise MissingExtraError(msg) from error
    return found


def integration_figures(
    vectors_ne: np.ndarray, labels_n: np.ndarray, batches_n: np.ndarray | None = None, *, expression_ng: np.ndarray | None = None, seed: int = 0
) -> dict[str, float]:
    """Measure an embedding; more is better, and figures lie between 0 and 1, but for `ari`, which is a little below 0 where clusters agree less than by chance.

    Args:
        vectors_ne (`np.ndarray` of shape `(n, e)`): without NaN.
        labels_n (int array of shape `(n,)`): of cell types; two or more.
        batches_n (int array of shape `(n,)`, *optional*): two or more; without them there are no figures of batches.
        expression_ng (`np.ndarray` of shape `(n, g)`, *optional*): expression before any integration, which `pcr` compares with.
        seed: of clustering.

    Returns:
        nmi, ari: between labels and the Leiden clusters of 15 exact neighbours, at the best of ten resolutions; asw_label: silhouette of labels;
        avg_bio: mean of these three. With batches: asw_batch, 1 less the silhouette of batches within labels; graph_connectivity: share of each label's cells
        in its largest component; pcr: how much less variance batches explain than in expression, 0 where it is more; avg_batch: mean of those that
        are defined; overall: 0.6 avg_bio + 0.4 avg_batch. NaN where something is not defined, such as batches that share no label.

    Source: Luecken et al. 2022, Nature Methods 19:41; Kedzierska et al. 2025, Genome Biology 26:101 (avg_bio).
    """
    scib = scib_metrics()
    vectors_ne = np.ascontiguousarray(vectors_ne, dtype=np.float32)
    near = _exact_neighbours(scib, vectors_ne)
    with warnings.catch_warnings():
        # A negative comparison is 0, as documented; igraph and umap announce their own plans.
        warnings.simplefilter("ignore")
        clusters = scib.nmi_ari_cluster_labels_leiden(near, labels_n, optimize_resolution=True, seed=seed)
        found = {name: float(clusters[name]) for name in ("nmi", "ari")} | {"asw_label": float(scib.silhouette_label(vectors_ne, labels_n))}
        found["avg_bio"] = float(np.mean([found[name] for name in BIO]))
        if batches_n is None:
            return found
        shared = [label for label in np.unique(labels_n) if 1 < len(np.unique(batches_n[labels_n == label])) < (labels_n == label).sum()]
        found["asw_batch"] = float(scib.silhouette_batch(vectors_ne, labels_n, batches_n)) if shared else math.nan
        found["graph_connectivity"] = float(scib.graph_connectivity(near, labels_n))
        found["pcr"] = math.nan if expression_ng is None else float(scib.pcr_comparison(expression_ng, vectors_ne, batches_n, categorical=True))
    known = [found[name] for name in BATCH if not math.isnan(found[name])]
    found["avg_batch"] = float(np.mean(known))
    found["overall"] = BIO_WEIGHT * found["avg_bio"] + (1 - BIO_WEIGHT) * found["avg_batch"]
    return found


def _exact_neighbours(scib: Any, vectors_ne: np.ndarray) -> Any:
    """Return each cell and its nearest ones; exact, so that they are the same on every machine."""
    from sklearn.neighbors import NearestNeighbors

    k = min(NEIGHBOURS, len(vectors_ne))
    distances, indices = NearestNeighbors(n_neighbors=k).fit(vectors_ne).kneighbors(vectors_ne)
    # Of cells that lie upon each other any may come first; a cell's own place is the first.
    own = np.arange(len(vectors_ne))
    for row in np.flatnonzero(indices[:, 0] != own):
        at = np.flatnonzero(indices[row] == row)
        place = int(at[0]) if len(at) else k - 1
        indices[row, 1 : place + 1], indices[row, 0] = indices[row, :place].copy(), row
        distances[row, 1 : place + 1], distances[row, 0] = distances[row, :place].copy(), 0.0
    return scib.nearest_neighbors.NeighborsResults(indices=indices, distances=distances)
