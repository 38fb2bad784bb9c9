"""What a fine-tuned model says of cells and genes it has not seen: labels, probabilities, entropy; in the caller's order, in bounded memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from ..errors import CheckpointError
from ..models.heads import LABELS, NUMBERS, Head, entropy, heads_of
from ..models.modeling_geneformer import (
    GeneformerForMultiTaskClassification,
    GeneformerForSequenceClassification,
    GeneformerForTokenClassification,
)
from ..models.tokenization_geneformer import GeneformerTokenizer
from .cells import Cells, TokenChunk
from .embeddings import Embedder, rows_for

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeadPredictions:
    """What one head says of some cells; rows without a gene are NaN."""

    head: Head
    logits: np.ndarray
    """float32 of shape `(n, names)`, as the model gives them."""

    @property
    def probabilities(self) -> np.ndarray:
        """float32 of shape `(n, names)`; for regression, the numbers."""
        return self.head.probabilities(self.logits).astype(np.float32)

    def columns(self) -> dict[str, np.ndarray]:
        """Return columns for obs: label, its probability and the entropy in nats; labels that hold together parted by ";"; numbers as they are."""
        p, name = self.probabilities, self.head.column
        if self.head.kind == NUMBERS:
            return {f"{column.replace('/', '_')}_predicted": p[:, i] for i, column in enumerate(self.head.names)}
        known = ~np.isnan(p).any(axis=1)
        labels = np.full(len(p), None, dtype=object)
        if self.head.kind == LABELS:
            texts = [";".join(label for label, holds in zip(self.head.names, row, strict=True) if holds) for row in p[known] >= 0.5]
            labels[known] = texts
            return {f"{name}_predicted": labels}
        labels[known] = np.array(self.head.names, dtype=object)[p[known].argmax(axis=1)]
        uncertainty = np.full(len(p), np.nan, dtype=np.float32)
        uncertainty[known] = entropy(p[known])
        return {f"{name}_predicted": labels, f"{name}_probability": p.max(axis=1), f"{name}_entropy": uncertainty}


@dataclass(frozen=True)
class CellPredictions:
    """What a fine-tuned model says of cells."""

    heads: list[HeadPredictions]
    cell_ids: list[str]

    def __getitem__(self, name: str) -> HeadPredictions:
        for one in self.heads:
            if one.head.name == name:
                return one
        msg = f"{name!r} is not predicted by this model, which predicts {', '.join(one.head.name for one in self.heads)}."
        raise KeyError(msg)

    @property
    def labels(self) -> np.ndarray:
        """Labels of the only head, None where a cell holds no gene."""
        (only,) = self.heads
        return only.columns()[f"{only.head.column}_predicted"]

    def to_frame(self) -> pd.DataFrame:
        """Return a table: cell id as index; label, probability and entropy of each head, then the probability of each class."""
        columns: dict[str, Any] = {}
        for one in self.heads:
            columns |= one.columns()
        for one in self.heads:
            if one.head.kind != NUMBERS:
                p = one.probabilities
                columns |= {f"{one.head.column}_probability_{name}": p[:, i] for i, name in enumerate(one.head.names)}
        return pd.DataFrame(columns, index=pd.Index(self.cell_ids, name="cell_id"))

    def add_to(self, adata: Any) -> None:
        """Add label, probability and entropy to obs, all probabilities and logits to obsm, class names to uns, of the very cells that were predicted.

        Raises:
            ValueError: if there is another number of cells.
        """
        if adata.n_obs != len(self.cell_ids):
            msg = f"{adata.n_obs:,} cells, and predictions of {len(self.cell_ids):,}."
            raise ValueError(msg)
        for one in self.heads:
            for name, values in one.columns().items():
                adata.obs[name] = pd.Categorical(values) if values.dtype == object else values
            adata.obsm[f"{one.head.column}_probabilities"], adata.obsm[f"{one.head.column}_logits"] = one.probabilities, one.logits
        adata.uns["geneformer_predictions"] = {"classes": {one.head.column: np.array(one.head.names, dtype=object) for one in self.heads}}


@dataclass(frozen=True)
class GenePredictions:
    """What a fine-tuned model says of genes: probabilities averaged over the cells that express each."""

    names: list[str]
    """Classes."""
    ensembl_ids: list[str]
    probabilities: np.ndarray
    """float32 of shape `(genes, classes)`."""
    n_cells: np.ndarray
    """int64 of shape `(genes,)`."""

    @property
    def labels(self) -> np.ndarray:
        """The likeliest class of each gene."""
        return np.array(self.names, dtype=object)[self.probabilities.argmax(axis=1)]

    def to_frame(self) -> pd.DataFrame:
        """Return a table: Ensembl id as index; class, number of cells, and the probability of each class."""
        columns = {"gene_class_predicted": self.labels, "n_cells": self.n_cells}
        columns |= {f"gene_class_probability_{name}": self.probabilities[:, i] for i, name in enumerate(self.names)}
        return pd.DataFrame(columns, index=pd.Index(self.ensembl_ids, name="ensembl_id"))

    def columns_for(self, ensembl_ids: Sequence[str | None]) -> dict[str, np.ndarray]:
        """Return columns for var: of these genes in this order, missing where a gene was not seen."""
        rows = rows_for(ensembl_ids, self.ensembl_ids)
        frame = self.to_frame()
        out: dict[str, np.ndarray] = {}
        for name in frame:
            values = frame[name].to_numpy()
            missing: Any = None if values.dtype == object else 0 if name == "n_cells" else np.nan
            out["gene_class_n_cells" if name == "n_cells" else str(name)] = np.array(
                [values[row] if row >= 0 else missing for row in rows.tolist()], dtype=values.dtype
            )
        return out


def predict(
    model: Any,
    cells: Any,
    *,
    tokenizer: GeneformerTokenizer | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantization: str | None = None,
    gene_ids: str | None = None,
    counts_layer: str | None = None,
    genome: str | None = None,
    progress: bool = True,
) -> CellPredictions | GenePredictions:
    """Apply a fine-tuned model to cells, with or without labels.

    Args:
        model (`PreTrainedModel`, `PeftModel`, `str` or `Path`): a fine-tuned Geneformer, or its folder or Hub id; an adapter as well.
        cells (`AnnData`, `str`, `Path` or `datasets.Dataset`): as in `embed_cells`. All cells are predicted, in their order.
        tokenizer, batch_size, device, dtype, quantization, gene_ids, counts_layer, genome, progress: as in `embed_cells`.

    Returns:
        `CellPredictions`, or `GenePredictions` from a model of genes.

    Raises:
        CheckpointError: if the model has no head to predict with.
        VocabularyMismatchError, CellFileError, NotRawCountsError, GeneIdError: as `embed_cells`.
    """
    options = {"batch_size": batch_size, "device": device, "dtype": dtype, "quantization": quantization, "progress": progress}
    runner = Predictor(model, tokenizer=tokenizer, **options)  # type: ignore[arg-type]
    tokens = runner.open(cells, gene_ids=gene_ids, counts_layer=counts_layer, genome=genome)
    if runner.of_genes:
        return runner.genes(tokens)
    logits = np.full((tokens.n_cells, runner.heads[-1].stop), np.nan, dtype=np.float32)
    cell_ids: list[str] = []
    for chunk, found in runner.iter_logits(tokens):
        logits[chunk.start : chunk.start + len(found)] = found
        cell_ids += chunk.cell_ids
    return CellPredictions(predictions_of(runner.heads, logits), cell_ids)


def predictions_of(heads: Sequence[Head], logits: np.ndarray) -> list[HeadPredictions]:
    """Part the logits of all heads."""
    return [HeadPredictions(replace(head, start=0), logits[:, head.start : head.stop]) for head in heads]


class Predictor(Embedder):
    """A fine-tuned model made ready to predict."""

    doing = "Predicting"

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(model, layer=-1, pooling="mean", **options)
        kinds = (GeneformerForSequenceClassification, GeneformerForMultiTaskClassification, GeneformerForTokenClassification)
        if not isinstance(self.model, kinds):
            msg = f"{type(self.model).__name__} has no head to predict labels with. Fine-tune it first (`geneformer-hf finetune`), or embed with it (`geneformer-hf embed`)."
            raise CheckpointError(msg)
        self.of_genes = isinstance(self.model, GeneformerForTokenClassification)
        self.heads = heads_of(self.config)

    def iter_logits(self, tokens: Cells) -> Iterator[tuple[TokenChunk, np.ndarray]]:
        """Yield consecutive cells and the logits of all heads, float32 of shape `(m, all)`, in order; NaN for cells without genes."""
        n_empty = 0
        for chunk, parts in self._iter_chunks(tokens):
            found = np.full((chunk.n_cells, self.heads[-1].stop), np.nan, dtype=np.float32)
            for part in parts:
                borders = torch.tensor([0, *np.cumsum(part.lengths).tolist()], device=part.hidden.device)
                with torch.inference_mode(), self._computing(part.hidden):
                    logits = self.model.head(part.hidden[None], part.input_ids[None].to(part.hidden.device), None, borders)
                joined = torch.cat(logits, dim=1) if isinstance(logits, tuple) else logits
                found[np.array(part.rows) - chunk.start] = joined.float().cpu().numpy()
            n_empty += int(np.isnan(found[:, 0]).sum())
            yield chunk, found
        if n_empty:
            logger.warning("%s of %s cells hold no gene of the vocabulary; nothing is predicted for them.", f"{n_empty:,}", f"{tokens.n_cells:,}")

    def genes(self, tokens: Cells) -> GenePredictions:
        """Return the mean probabilities of every gene that is expressed."""
        table, names = self.gene_table(tokens), self.heads[0].names
        sums = torch.zeros(self.config.vocab_size, len(names), dtype=torch.float64)
        counts = torch.zeros(self.config.vocab_size, dtype=torch.int64)
        for part in self.iter_hidden(tokens):
            keep = part.genes()
            with torch.inference_mode(), self._computing(part.hidden):
                logits = self.model.head(part.hidden[keep.to(part.hidden.device)])
            sums.index_add_(0, part.input_ids[keep], F.softmax(logits.float(), -1).double().cpu())
            counts += torch.bincount(part.input_ids[keep], minlength=len(counts))
        rows = np.argsort(table.token_ids)
        rows = rows[counts.numpy()[table.token_ids[rows]] > 0]
        seen = torch.from_numpy(table.token_ids[rows].astype(np.int64))
        means = (sums[seen] / counts[seen].unsqueeze(1)).float().numpy()
        return GenePredictions(names, [table.ensembl_ids[row] for row in rows], means, counts[seen].numpy())

    def _computing(self, hidden: torch.Tensor) -> Any:
        """Heads compute in their own precision; hidden states come as they were computed."""
        return torch.autocast(hidden.device.type, dtype=hidden.dtype, enabled=hidden.dtype in (torch.bfloat16, torch.float16))
