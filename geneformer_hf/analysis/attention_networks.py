"""Which genes attend to which: attention weights, mean over cells, as a network for each layer and head.

Weights are summed over cells for chosen genes, a layer at a time while the model runs, so memory does not grow with the number of cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from ..errors import LayerError, SettingError
from ..genes import GeneTable
from ..models.tokenization_geneformer import GeneformerTokenizer
from .attention_weights import AttentionReader
from .cells import Cells
from .embeddings import Embedder

MEMORY = 1 << 30
"""Bytes of sums held at a time; more layers take more passes over the cells."""


@dataclass(frozen=True)
class AttentionNetwork:
    """Mean attention between genes over cells."""

    genes: pd.DataFrame
    """The chosen genes, by Ensembl id: symbol, n_cells, mean_rank (0 the highest, 1 the lowest of a cell)."""
    weights: dict[tuple[int, int], sp.csr_array]
    """Layer and head to float32 of shape `(g, g)`: from a gene (row) to a gene (column), mean over the cells that hold both; the strongest of each row."""
    mean: sp.csr_array
    """The same over all layers and heads."""
    received: pd.DataFrame
    """Every gene that was seen, by Ensembl id: symbol, n_cells, mean_rank, then for each layer and head what it receives from a whole cell, mean over
    cells; 1 is what it would receive if all tokens received alike."""
    n_cells: int
    relative: bool
    """Whether weights are in units of uniform attention (1 / tokens of the cell)."""

    def centrality(self) -> pd.DataFrame:
        """Return how central each chosen gene is: received (mean over layers and heads), in_strength and out_strength (sums of the mean network), pagerank."""
        import networkx

        found = self.genes.copy()
        heads = [column for column in self.received if column.startswith("layer")]
        found["received"] = self.received.loc[found.index, heads].mean(axis=1)
        found["in_strength"], found["out_strength"] = self.mean.sum(axis=0), self.mean.sum(axis=1)
        ranks = networkx.pagerank(networkx.from_scipy_sparse_array(self.mean, create_using=networkx.DiGraph))
        found["pagerank"] = [ranks[i] for i in range(len(found))]
        return found.sort_values("received", ascending=False)

    def to_anndata(self) -> Any:
        """Return the network as AnnData: a row for each gene; obsp has `mean` and one graph for each layer and head (`layer0_head0`), obs what is known of genes."""
        import anndata

        adata = anndata.AnnData(obs=self.centrality().loc[self.genes.index])
        adata.obsp["mean"] = sp.csr_matrix(self.mean)
        for (layer, head), graph in self.weights.items():
            adata.obsp[_key(layer, head)] = sp.csr_matrix(graph)
        adata.uns["attention"] = {"cells": self.n_cells, "unit": "uniform attention" if self.relative else "weight", "direction": "row attends to column"}
        return adata

    def write_graphml(self, path: str | Path, *, layer: int | None = None, head: int | None = None) -> None:
        """Write a network for Cytoscape, Gephi and igraph: of one layer and head, or the mean.

        Raises:
            LayerError: if there is no such layer or head.
        """
        import networkx

        graph = networkx.from_scipy_sparse_array(self.mean if layer is None else self._graph(layer, head), create_using=networkx.DiGraph)
        central = self.centrality().loc[self.genes.index]
        for number, (name, row) in enumerate(central.iterrows()):
            graph.nodes[number].update(
                ensembl_id=str(name),
                label=str(row["symbol"] or name),
                n_cells=int(row["n_cells"]),
                received=float(row["received"]),
                pagerank=float(row["pagerank"]),
            )
        networkx.write_graphml(graph, str(path))

    def _graph(self, layer: int, head: int | None) -> sp.csr_array:
        if (layer, head) not in self.weights:
            layers, heads = sorted({key[0] for key in self.weights}), sorted({key[1] for key in self.weights})
            msg = f"layer {layer}, head {head} is not in this network: it has layers {layers} and heads {heads}, counted from 0."
            raise LayerError(msg)
        return self.weights[layer, head]  # type: ignore[index]


def attention_network(
    model: Any,
    cells: Any,
    *,
    genes: Sequence[str] | None = None,
    n_genes: int = 500,
    layers: Sequence[int] | None = None,
    edges: int = 20,
    least_cells: int = 5,
    relative: bool = True,
    tokenizer: GeneformerTokenizer | None = None,
    device: str | torch.device | None = None,
    quantization: str | None = None,
    gene_ids: str | None = None,
    counts_layer: str | None = None,
    genome: str | None = None,
    progress: bool = True,
) -> AttentionNetwork:
    """Average attention between genes over cells.

    Args:
        model, cells, tokenizer, device, quantization, gene_ids, counts_layer, genome, progress: as in `embed_cells`.
        genes (`Sequence[str]`, *optional*): Ensembl ids or symbols; the `n_genes` that are in most cells otherwise.
        layers (`Sequence[int]`, *optional*): 0 is the first, -1 the last; all otherwise.
        edges (`int`, *optional*, defaults to 20): strongest targets of each gene that are kept.
        least_cells (`int`, *optional*, defaults to 5): pairs that fewer cells hold have no edge; genes of fewer cells are not in `received`.
        relative (`bool`, *optional*, defaults to `True`): multiply the weights of a cell by its tokens, so that 1 is uniform attention whatever its length.

    Returns:
        `AttentionNetwork`.

    Raises:
        SettingError: if no gene is in enough cells, or the genes are too many for a layer in 1 GiB.
        LayerError, UnknownGeneError; and as `embed_cells`.
    """
    reader = AttentionReader(model, layers, tokenizer=tokenizer, device=device, quantization=quantization, progress=progress)
    runner = reader.runner
    tokens = runner.open(cells, gene_ids=gene_ids, counts_layer=counts_layer, genome=genome)
    table, n_heads = runner.gene_table(tokens), runner.config.num_attention_heads
    n_cells_v, ranks_v, n_cells = _seen(tokens, runner, table)
    wanted = table.token_of(genes).astype(np.int64) if genes is not None else np.argsort(-n_cells_v, kind="stable")[:n_genes]
    chosen = np.unique(wanted[n_cells_v[wanted] >= least_cells])
    if not len(chosen):
        msg = f"none of the genes is in {least_cells} of {n_cells:,} cells (the most frequent is in {int(n_cells_v[wanted].max(initial=0))}). Lower least_cells, or give more cells."
        raise SettingError(msg)
    of_layer = n_heads * len(chosen) ** 2 * 8
    if of_layer > MEMORY:
        msg = f"a network of {len(chosen):,} genes takes {of_layer / 2**30:.1f} GiB for each layer of {n_heads} heads; expected 1 GiB at most. Name {int((MEMORY / 8 / n_heads) ** 0.5):,} genes or fewer."
        raise SettingError(msg)
    per_pass = max(1, MEMORY // of_layer)
    known = np.flatnonzero(n_cells_v >= least_cells)
    received, graphs, mean = {}, {}, np.zeros((len(chosen), len(chosen)))
    for start in range(0, len(reader.layers), per_pass):
        block = reader.layers[start : start + per_pass]
        sums, together, columns = _summed(reader, tokens, block, chosen, relative)
        with np.errstate(invalid="ignore", divide="ignore"):
            means = np.where(together >= least_cells, sums / together, 0.0)
        for (i, layer), head in product(enumerate(block), range(n_heads)):
            graphs[layer, head] = _strongest(means[i, head], edges)
            received[_key(layer, head)] = columns[i, head][known] / n_cells_v[known]
        mean += means.sum(axis=(0, 1))
    mean /= len(reader.layers) * n_heads
    facts = {"n_cells": n_cells_v, "mean_rank": ranks_v}
    return AttentionNetwork(
        _gene_frame(table, chosen, facts),
        graphs,
        _strongest(mean, edges),
        pd.concat([_gene_frame(table, known, facts), _indexed(received, table, known)], axis=1),
        n_cells,
        relative,
    )


def regulator_centrality(network: AttentionNetwork, regulators: Sequence[str], *, table: GeneTable | None = None, n_bins: int = 10) -> pd.DataFrame:
    """Ask whether regulators, such as transcription factors, receive more attention than other genes: in each layer and head, and in the mean of all.

    What a gene receives depends on its rank, and regulators are expressed low; so they are also compared with other genes of like rank only.

    Args:
        regulators: Ensembl ids, or symbols.
        table (`GeneTable`, *optional*): finds genes by older names as well.
        n_bins (`int`, *optional*, defaults to 10): of mean rank, with as many genes in each.

    Returns:
        `pd.DataFrame`, a row for each layer and head, the mean first (layer and head -1): n_regulators, n_others, regulators, others (mean attention
        received), auc (chance that a regulator receives more than another gene), p_value (Mann-Whitney, two-sided), auc_matched, p_matched (within bins of rank,
        stratified Mann-Whitney: van Elteren 1960).

    Raises:
        SettingError: if the cells hold none of the regulators, or nothing else.
    """
    from scipy.stats import mannwhitneyu

    frame = network.received
    known = set(map(str, regulators)) if table is None else {str(name) for name in table.ensembl_of_tokens(table.known_tokens(regulators)[0].tolist())}
    is_regulator = np.array([name in known or symbol in known for name, symbol in zip(frame.index, frame["symbol"], strict=True)])
    if not 0 < is_regulator.sum() < len(frame):
        msg = f"{int(is_regulator.sum()):,} of {len(frame):,} genes in these cells are among the {len(regulators):,} regulators; expected some, and others to compare with."
        raise SettingError(msg)
    bins = np.argsort(np.argsort(frame["mean_rank"].to_numpy(), kind="stable"), kind="stable") * n_bins // len(frame)
    columns = [column for column in frame if column.startswith("layer")]
    values = {"": frame[columns].mean(axis=1)} | {column: frame[column] for column in columns}
    rows = []
    for name, series in values.items():
        layer, head = (-1, -1) if not name else (int(part.lstrip("layerhd")) for part in name.split("_"))
        mine, others = series[is_regulator].to_numpy(), series[~is_regulator].to_numpy()
        plain = mannwhitneyu(mine, others)
        matched, p_matched = _stratified(series.to_numpy(), is_regulator, bins)
        rows.append(
            {"layer": layer, "head": head, "n_regulators": len(mine), "n_others": len(others), "regulators": mine.mean(), "others": others.mean(),
             "auc": plain.statistic / (len(mine) * len(others)), "p_value": plain.pvalue, "auc_matched": matched, "p_matched": p_matched}
        )  # fmt: skip
    return pd.DataFrame(rows)


def _stratified(values: np.ndarray, is_regulator: np.ndarray, bins: np.ndarray) -> tuple[float, float]:
    """Return the chance that a regulator has more than another gene of its bin, and the two-sided p-value of its difference from one half."""
    from scipy.stats import norm, rankdata

    wins = pairs = variance = 0.0
    for number in np.unique(bins):
        here = bins == number
        mine, n = is_regulator[here], int(here.sum())
        n_mine, n_others = int(mine.sum()), n - int(mine.sum())
        if not n_mine or not n_others:
            continue
        # In units of pairs, a bin weighs as many as it has.
        wins += rankdata(values[here])[mine].sum() - n_mine * (n_mine + 1) / 2
        pairs += n_mine * n_others
        variance += n_mine * n_others * (n + 1) / 12
    if not pairs:
        return float("nan"), float("nan")
    return float(wins / pairs), float(2 * norm.sf(abs(wins - pairs / 2) / variance**0.5))


def _summed(reader: AttentionReader, tokens: Cells, layers: Sequence[int], chosen: np.ndarray, relative: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return sums of weights `(layers, heads, g, g)`, cells that hold both genes `(g, g)`, and sums of what each token receives `(layers, heads, vocabulary)`."""
    config, g = reader.runner.config, len(chosen)
    place = torch.full((config.vocab_size,), -1, dtype=torch.int64)
    place[torch.from_numpy(chosen)] = torch.arange(g)
    row_of = {layer: i for i, layer in enumerate(layers)}
    sums = torch.zeros(len(layers), config.num_attention_heads, g * g, dtype=torch.float64)
    columns = torch.zeros(len(layers), config.num_attention_heads, config.vocab_size, dtype=torch.float64)
    together = torch.zeros(g * g, dtype=torch.int64)

    def use(layer: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
        columns[row_of[layer]].index_add_(1, ids, weights.double().sum(1).cpu())
        at = torch.nonzero(place[ids] >= 0).squeeze(1)
        some = weights[:, at.to(weights.device)][:, :, at.to(weights.device)].double().cpu() * (len(ids) if relative else 1)
        pairs = (place[ids[at]][:, None] * g + place[ids[at]][None, :]).flatten()
        sums[row_of[layer]].index_add_(1, pairs, some.flatten(1))
        if layer == layers[0]:
            together.index_add_(0, pairs, torch.ones_like(pairs))

    reader.fold(tokens, layers, use)
    return sums.view(len(layers), -1, g, g).numpy(), together.view(g, g).numpy(), columns.numpy()


def _seen(tokens: Cells, runner: Embedder, table: GeneTable) -> tuple[np.ndarray, np.ndarray, int]:
    """Return for each token id of a gene in how many cells it is and its mean rank there (0 to 1), and the number of cells with genes."""
    vocab_size = runner.config.vocab_size
    is_gene = np.zeros(vocab_size, dtype=bool)
    is_gene[table.token_ids] = True
    counts, ranks, n_cells = np.zeros(vocab_size, dtype=np.int64), np.zeros(vocab_size), 0
    for chunk in tokens.chunks():
        for start, stop in zip(chunk.offsets[:-1].tolist(), chunk.offsets[1:].tolist(), strict=True):
            ids = chunk.input_ids[start:stop]
            if (ids := ids[is_gene[ids]]).size:
                counts[ids] += 1
                ranks[ids] += np.arange(len(ids)) / len(ids)
                n_cells += 1
    return counts, ranks / np.maximum(counts, 1), n_cells


def _strongest(values: np.ndarray, edges: int) -> sp.csr_array:
    """Return the largest values of each row, ties by column; a gene to itself is no edge."""
    values = values.copy()
    np.fill_diagonal(values, 0)
    columns = np.argsort(-values, axis=1, kind="stable")[:, :edges]
    rows = np.repeat(np.arange(len(values)), columns.shape[1])
    graph = sp.csr_array((values[rows, columns.ravel()].astype(np.float32), (rows, columns.ravel())), shape=values.shape)
    graph.eliminate_zeros()
    return graph


def _gene_frame(table: GeneTable, token_ids: np.ndarray, facts: dict[str, np.ndarray]) -> pd.DataFrame:
    ids = [str(name) for name in table.ensembl_of_tokens(token_ids.tolist())]
    frame = pd.DataFrame({"symbol": [table.symbols[table.row_of[name]] for name in ids]}, index=pd.Index(ids, name="ensembl_id"))
    return frame.assign(**{name: values[token_ids] for name, values in facts.items()})


def _indexed(received: dict[str, np.ndarray], table: GeneTable, token_ids: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(received, index=pd.Index([str(name) for name in table.ensembl_of_tokens(token_ids.tolist())], name="ensembl_id"))


def _key(layer: int, head: int) -> str:
    return f"layer{layer}_head{head}"
