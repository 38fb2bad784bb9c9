"""Does a gene's embedding know the cell it is in? Spread of its contextual vectors between cell types, against permuted types."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..data.labels import class_ids
from ..errors import SettingError
from ..models.heads import IGNORED
from ..models.tokenization_geneformer import GeneformerTokenizer
from .cells import Cells
from .embeddings import Embedder, HiddenPart

MEMORY = 512 << 20
"""Bytes of sums held at a time; more genes take more passes over the cells."""


def context_specificity(
    model: Any,
    cells: Any,
    *,
    labels: str,
    genes: Sequence[str] | None = None,
    n_genes: int = 200,
    least_cells: int = 20,
    permutations: int = 100,
    tokenizer: GeneformerTokenizer | None = None,
    layer: int = -2,
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
    """Measure how much of the spread of a gene's contextual vectors lies between cell types.

    The measure is the share of the summed squared distance to the mean vector that means of cell types explain (eta squared, over all
    dimensions). It is compared with cell types permuted over cells, the same permutations for all genes. A type can differ in depth or in how many
    genes its cells express, and vectors with it: what is above chance is context, not necessarily biology.

    Args:
        model, cells, tokenizer, layer, batch_size, device, dtype, quantization, gene_ids, counts_layer, genome, progress: as in `embed_genes`.
        labels (`str`): column with cell types; cells without one are left out.
        genes (`Sequence[str]`, *optional*): Ensembl ids or symbols; the `n_genes` in most labelled cells otherwise.
        least_cells (`int`, *optional*, defaults to 20): genes in fewer labelled cells are left out.
        permutations (`int`, *optional*, defaults to 100): the smallest p-value is 1 / (permutations + 1).
        seed (`int`, *optional*, defaults to 0): of the permutations.

    Returns:
        `pd.DataFrame`, a row a gene, the most specific first: ensembl_id, symbol, n_cells, n_types, between (eta squared), null_mean, null_sd,
        z, p_value (of as much or more), q_value (Benjamini-Hochberg).

    Raises:
        SettingError: if there are fewer than two types, or no gene is in enough cells.
        UnknownGeneError, ColumnNotFoundError, and as `embed_genes`.
    """
    if permutations < 1:
        msg = f"permutations is {permutations}; expected 1 or more."
        raise SettingError(msg)
    runner = Embedder(
        model, tokenizer=tokenizer, layer=layer, pooling="mean", batch_size=batch_size, device=device, dtype=dtype, quantization=quantization, progress=progress
    )
    tokens = runner.open(cells, gene_ids=gene_ids, counts_layer=counts_layer, genome=genome)
    names, ids_n = class_ids(tokens.column(labels))
    if len(names) < 2:
        msg = f"{labels} has {len(names)} value ({', '.join(names) or 'none'}); expected two or more cell types."
        raise SettingError(msg)
    types_pn = _permuted(ids_n, permutations, seed)
    table = runner.gene_table(tokens)
    counts = _labelled_cells_of(tokens, runner, ids_n)
    wanted = table.token_of(genes).astype(np.int64) if genes is not None else np.argsort(-counts, kind="stable")[:n_genes]
    chosen = np.unique(wanted[counts[wanted] >= least_cells])
    if not len(chosen):
        msg = f"no gene is in {least_cells} labelled cells (the most frequent of the genes asked for is in {int(counts[wanted].max(initial=0))}). Lower least_cells, or give more cells."
        raise SettingError(msg)
    block = max(1, MEMORY // ((permutations + 1) * len(names) * runner.config.hidden_size * 8))
    rows = [row for start in range(0, len(chosen), block) for row in _specificity(runner, tokens, chosen[start : start + block], types_pn, len(names))]
    frame, ids = pd.DataFrame(rows), [str(name) for name in table.ensembl_of_tokens(chosen.tolist())]
    frame.insert(0, "symbol", [table.symbols[table.row_of[name]] for name in ids])
    frame.insert(0, "ensembl_id", ids)
    frame["q_value"] = _false_discovery_rate(frame["p_value"].to_numpy())
    return frame.sort_values(["between", "ensembl_id"], ascending=[False, True], ignore_index=True)


def _permuted(ids_n: np.ndarray, permutations: int, seed: int) -> np.ndarray:
    """Return the types of the cells, then permutations of them among the labelled cells: small ints of shape `(1 + permutations, n)`."""
    rng, labelled = np.random.default_rng(seed), np.flatnonzero(ids_n != IGNORED)
    ids_n = ids_n.astype(np.min_scalar_type(-1 - int(ids_n.max())))
    out = np.tile(ids_n, (permutations + 1, 1))
    for row in out[1:]:
        row[labelled] = ids_n[rng.permutation(labelled)]
    return out


def _labelled_cells_of(tokens: Cells, runner: Embedder, ids_n: np.ndarray) -> np.ndarray:
    """Return in how many labelled cells each token is, special ones aside; int64 of shape `(vocabulary,)`."""
    counts = np.zeros(runner.config.vocab_size, dtype=np.int64)
    for chunk in tokens.chunks():
        chunk.require_fits(runner.config)
        of_token = np.repeat(np.arange(chunk.n_cells), np.diff(chunk.offsets)) + chunk.start
        counts += np.bincount(chunk.input_ids[ids_n[of_token] != IGNORED], minlength=len(counts))
    is_gene = np.zeros(len(counts), dtype=bool)
    is_gene[runner.gene_table(tokens).token_ids] = True
    return np.where(is_gene, counts, 0)


def _specificity(runner: Embedder, tokens: Cells, chosen: np.ndarray, types_pn: np.ndarray, n_types: int) -> Iterator[dict[str, Any]]:
    """Sum the vectors of some genes by type, under every permutation, in one pass over the cells."""
    n_sets, size = len(types_pn), runner.config.hidden_size
    place = torch.full((runner.config.vocab_size,), -1, dtype=torch.int64)
    place[torch.from_numpy(chosen)] = torch.arange(len(chosen))
    sums = torch.zeros(n_sets, len(chosen) * n_types, size, dtype=torch.float64)
    counts = torch.zeros(n_sets, len(chosen) * n_types, dtype=torch.float64)
    squares = torch.zeros(len(chosen), dtype=torch.float64)
    for part in runner.iter_hidden(tokens):
        kept, cell_t = _kept(part, place, types_pn[0])
        gene_t, hidden_te = place[part.input_ids[kept]], part.hidden[kept.to(part.hidden.device)].double().cpu()
        squares.index_add_(0, gene_t, hidden_te.square().sum(1))
        for number, types_n in enumerate(types_pn):
            at = gene_t * n_types + torch.from_numpy(types_n[cell_t].astype(np.int64))
            sums[number].index_add_(0, at, hidden_te)
            counts[number] += torch.bincount(at, minlength=counts.shape[1])
    sums, counts = sums.view(n_sets, len(chosen), n_types, size), counts.view(n_sets, len(chosen), n_types)
    overall = sums[0].sum(1).square().sum(-1) / counts[0].sum(1)
    explained = (sums.square().sum(-1) / counts.clamp(min=1)).sum(-1) - overall
    spread = squares - overall
    between = torch.where(spread > 1e-12 * squares, explained / spread, torch.zeros(())).numpy()
    for number in range(len(chosen)):
        seen, null = between[0, number], between[1:, number]
        sd = float(null.std(ddof=1)) if len(null) > 1 else float("nan")
        # Sums in another order differ in their last bits; what is equal is as much.
        as_much = int((null >= seen - 1e-12).sum())
        yield {
            "n_cells": int(counts[0, number].sum()),
            "n_types": int((counts[0, number] > 0).sum()),
            "between": float(seen),
            "null_mean": float(null.mean()),
            "null_sd": sd,
            "z": float((seen - null.mean()) / sd) if sd > 0 else float("nan"),
            "p_value": (as_much + 1) / (len(null) + 1),
        }


def _kept(part: HiddenPart, place: torch.Tensor, ids_n: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """Return which tokens of a part are chosen genes of labelled cells (bool of shape `(t,)`), and the cell of each of those."""
    cell_t = np.repeat(np.asarray(part.rows, dtype=np.int64), part.lengths)
    kept = (place[part.input_ids] >= 0) & torch.from_numpy(ids_n[cell_t] != IGNORED)
    return kept, cell_t[kept.numpy()]


def _false_discovery_rate(p_values: np.ndarray) -> np.ndarray:
    from scipy.stats import false_discovery_control

    return false_discovery_control(p_values, method="bh")
