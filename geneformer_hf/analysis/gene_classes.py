"""Which genes a model finds when they are hidden: by class and by rank, beside a baseline that knows how often a gene stands near a rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from ..errors import SettingError
from ..genes import GeneTable
from ..reports.baselines import RankFrequencyBaseline
from .cells import Cells
from .masked_genes import MaskedGenePredictor
from .rank_contribution import EDGES

ALL = "all genes"
OTHER = "none of these classes"


@dataclass(frozen=True)
class HiddenGenes:
    """Genes that were hidden, and how well they were found."""

    table: pd.DataFrame
    """As `predict_masked_genes`, with `loss` and `baseline_loss` in nats."""
    genes: GeneTable

    def by_class(self, classes: Mapping[str, Sequence[str]]) -> pd.DataFrame:
        """Return figures of each class, of genes of none, and of all.

        Args:
            classes: class to genes, as Ensembl ids or symbols; a gene may be of several.

        Returns:
            `pd.DataFrame`, a row a class: class, n_genes (different ones), n_hidden, loss, baseline_loss (nats), top_1, top_10 (share of genes that
            are among the likeliest), median_place. NaN for classes of which none was hidden.
        """
        ids = self.table["ensembl_id"].to_numpy()
        of_class = {name: np.isin(ids, known_genes(self.genes, genes)) for name, genes in classes.items()}
        rows = [{"class": name} | self._figures(held) for name, held in of_class.items()]
        if of_class:
            rows.append({"class": OTHER} | self._figures(~np.any(list(of_class.values()), axis=0)))
        return pd.DataFrame([*rows, {"class": ALL} | self._figures(np.ones(len(ids), dtype=bool))])

    def by_rank(self, edges: Sequence[int] = EDGES) -> pd.DataFrame:
        """Return the same figures of each bin of ranks that holds a hidden gene, with `first` and `last` (ranks from 1 on) in place of a class."""
        positions = self.table["position"].to_numpy()
        bins = [(first + 1, last, (positions > first) & (positions <= last)) for first, last in pairwise(edges)]
        return pd.DataFrame([{"first": first, "last": last} | self._figures(held) for first, last, held in bins if held.any()])

    def _figures(self, held: np.ndarray) -> dict[str, Any]:
        some = self.table[held]
        found: dict[str, Any] = {"n_genes": int(some["ensembl_id"].nunique()), "n_hidden": len(some)}
        if not len(some):
            return found | dict.fromkeys(("loss", "baseline_loss", "top_1", "top_10", "median_place"), np.nan)
        place = some["place"].to_numpy()
        means = {"loss": some["loss"], "baseline_loss": some["baseline_loss"], "top_1": place <= 1, "top_10": place <= 10}
        return found | {name: float(np.mean(values)) for name, values in means.items()} | {"median_place": float(np.median(place))}


def known_genes(table: GeneTable, names: Sequence[str]) -> list[str]:
    """Return the Ensembl ids of those genes that the vocabulary has."""
    tokens, _ = table.known_tokens(names)
    return [str(name) for name in table.ensembl_of_tokens(tokens.tolist())]


def hide_genes(
    model: Any,
    cells: Any,
    *,
    share: float = 0.15,
    seed: int = 42,
    gene_ids: str | None = None,
    counts_layer: str | None = None,
    genome: str | None = None,
    **options: Any,
) -> HiddenGenes:
    """Hide some genes of each cell, ask the model for them, and ask a baseline that was counted on other cells.

    The baseline says how often a gene stands near a rank (`RankFrequencyBaseline`); it is counted on every other cell and asked about the rest, and
    the other way round, so no cell is judged by itself. The tokens of all cells are held in memory for it.

    Args:
        model, cells, and options: as in `predict_masked_genes`.
        share, seed: of the genes that are hidden, as there.

    Returns:
        `HiddenGenes`.

    Raises:
        SettingError: for fewer than four cells with genes.
        CheckpointError, and as `predict_masked_genes`.
    """
    runner = MaskedGenePredictor(model, **options)
    tokens = runner.open(cells, gene_ids=gene_ids, counts_layer=counts_layer, genome=genome)
    table = runner.gene_table(tokens)
    found = runner.table(tokens, share=share, top_k=1, seed=seed, with_cell=True)
    found["loss"] = -np.log(np.maximum(found["probability"].to_numpy(dtype=np.float64), 1e-45))
    found["baseline_loss"] = _baseline_losses(found, tokens, table, runner.config.vocab_size)
    return HiddenGenes(found, table)


def _baseline_losses(found: pd.DataFrame, tokens: Cells, table: GeneTable, vocab_size: int) -> np.ndarray:
    is_gene = np.zeros(vocab_size, dtype=bool)
    is_gene[table.token_ids] = True
    halves: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for chunk in tokens.chunks():
        for cell, (start, stop) in enumerate(zip(chunk.offsets[:-1].tolist(), chunk.offsets[1:].tolist(), strict=True)):
            ids = chunk.input_ids[start:stop]
            if (genes := ids[is_gene[ids]]).size:
                halves[(chunk.start + cell) % 2].append(genes)
    if min(map(len, halves)) < 2:
        msg = f"{sum(map(len, halves))} cells hold genes; expected four or more, half of them to count the baseline on."
        raise SettingError(msg)
    baselines = [RankFrequencyBaseline(cells, vocab_size) for cells in halves]
    half = found.pop("cell").to_numpy() % 2
    ids = table.token_of(found["ensembl_id"]) if len(found) else np.zeros(0, dtype=np.int64)
    ranks, out = found["position"].to_numpy() - 1, np.full(len(found), np.nan)
    for number, baseline in enumerate(reversed(baselines)):
        out[half == number] = baseline.losses(ids[half == number], ranks[half == number])
    return out
