"""What ranks contribute to a cell's embedding: genes of some ranks hidden, or put in another order, and how far the embedding moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..errors import SettingError
from ..models.tokenization_geneformer import GeneformerTokenizer
from .cells import Cells, TokenChunk
from .embeddings import Embedder

EDGES = (0, 4, 16, 64, 256, 1024, 4096)


def rank_contributions(
    model: Any,
    cells: Any,
    *,
    edges: Sequence[int] = EDGES,
    tokenizer: GeneformerTokenizer | None = None,
    layer: int = -2,
    pooling: str | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantization: str | None = None,
    gene_ids: str | None = None,
    counts_layer: str | None = None,
    genome: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Measure how far a cell's embedding moves when the genes of some ranks are hidden, and when only their order is lost.

    Hidden genes become `<mask>`, so that all others keep their ranks; the order of genes is lost by shuffling them among their ranks. The move is
    1 less the cosine to the embedding of the cell as it is.

    Args:
        model, cells, tokenizer, layer, pooling, batch_size, device, dtype, quantization, gene_ids, counts_layer, genome, progress: as in `embed_cells`.
        edges (`Sequence[int]`, *optional*): bins of ranks, from each edge up to the next; 0 is the highest rank.
        seed (`int`, *optional*, defaults to 0): of the shuffling.

    Returns:
        `pd.DataFrame`, a row for each bin that some cell reaches: first, last (ranks from 1 on), n_cells (that have a gene there), genes (mean of them there),
        hidden, shuffled (mean moves of those cells), hidden_per_gene.

    Raises:
        SettingError: for edges that do not grow; and as `embed_cells`.
    """
    if len(edges) < 2 or edges[0] < 0 or any(b <= a for a, b in pairwise(edges)):
        msg = f"edges are {list(edges)}; expected two or more ranks that grow, from 0 on."
        raise SettingError(msg)
    runner = Embedder(
        model,
        tokenizer=tokenizer,
        layer=layer,
        pooling=pooling,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        quantization=quantization,
        progress=progress,
    )
    tokens = runner.open(cells, gene_ids=gene_ids, counts_layer=counts_layer, genome=genome)
    mask = runner.tokenizer().mask_token_id
    special = np.array(runner.tokenizer().all_special_ids)
    before = _unit_vectors(runner, tokens)
    rows = []
    for first, last in pairwise(edges):
        genes = _genes_between(tokens, special, first, last)
        reached = (genes > 0) & ~np.isnan(before[:, 0])
        if not reached.any():
            continue
        moves = {}
        for name, change in (("hidden", _hiding(mask)), ("shuffled", _shuffling(seed))):
            after = _unit_vectors(runner, Altered(tokens, special, first, last, change))
            moves[name] = float((1 - (before[reached] * after[reached]).sum(axis=1)).mean())
        mean_genes = float(genes[reached].mean())
        rows.append(
            {"first": first + 1, "last": last, "n_cells": int(reached.sum()), "genes": mean_genes} | moves | {"hidden_per_gene": moves["hidden"] / mean_genes}
        )
    return pd.DataFrame(rows)


Change = Callable[[np.ndarray, int], np.ndarray]
"""Some tokens of a cell, and the number of the cell, to what stands in their place."""


class Altered(Cells):
    """Cells whose tokens at some ranks are others.

    Args:
        cells: as they are.
        special: ids of tokens that have no rank.
        first, last: ranks from 0 on, the last one excluded.
    """

    def __init__(self, cells: Cells, special: np.ndarray, first: int, last: int, change: Change) -> None:
        self._cells, self._special, self._first, self._last, self._change = cells, special, first, last, change
        self.n_cells = cells.n_cells

    def chunks(self) -> Iterator[TokenChunk]:
        """Yield all cells in order."""
        for chunk in self._cells.chunks():
            ids = chunk.input_ids.copy()
            for cell, (start, stop) in enumerate(_spans(chunk, self._special)):
                at = slice(min(start + self._first, stop), min(start + self._last, stop))
                ids[at] = self._change(ids[at], chunk.start + cell)
            yield replace(chunk, input_ids=ids)

    def column(self, name: str) -> list[Any]:
        """Return a column of the cells as they are."""
        return self._cells.column(name)

    def require_made_for(self, config: Any) -> None:
        """Do nothing: the cells as they are were checked."""


def _hiding(mask: int) -> Change:
    return lambda ids, cell: np.full_like(ids, mask)


def _shuffling(seed: int) -> Change:
    return lambda ids, cell: np.random.default_rng([seed, cell]).permutation(ids)


def _spans(chunk: TokenChunk, special: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield where the genes of each cell begin and end: between `<cls>` and `<eos>` or pads."""
    is_gene = ~np.isin(chunk.input_ids, special)
    for start, stop in zip(chunk.offsets[:-1].tolist(), chunk.offsets[1:].tolist(), strict=True):
        at = np.flatnonzero(is_gene[start:stop])
        yield (start + int(at[0]), start + int(at[-1]) + 1) if len(at) else (start, start)


def _genes_between(tokens: Cells, special: np.ndarray, first: int, last: int) -> np.ndarray:
    """Return how many genes each cell has at some ranks."""
    sizes = np.array([stop - start for chunk in tokens.chunks() for start, stop in _spans(chunk, special)], dtype=np.int64)
    return np.clip(sizes, first, last) - first


def _unit_vectors(runner: Embedder, tokens: Cells) -> np.ndarray:
    vectors = runner.embed(tokens).astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
