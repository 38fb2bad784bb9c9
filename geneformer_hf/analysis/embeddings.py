"""Embeddings of cells and genes from any Geneformer checkpoint.

The encoder runs only up to the layer asked for, over packed cells, and never the masked-gene head; memory is bounded by the
tokens of one pass. Rows follow the caller's order. A cell without any gene of the vocabulary gets NaN, and is counted in a
warning.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from tqdm.auto import tqdm

from ..device import resolve_device, resolve_dtype
from ..errors import CheckpointError, LayerError, SettingError, VocabularyMismatchError
from ..genes import GeneTable
from ..models.configuration_geneformer import GeneformerConfig
from ..models.encoding import PackedEncoder
from ..models.loading import load_model, require_same_vocabulary, tokenizer_of
from ..models.tokenization_geneformer import GeneformerTokenizer
from .cells import Cells, TokenChunk, open_tokens

logger = logging.getLogger(__name__)


def rows_for(wanted: Sequence[str | None], known: Sequence[str]) -> np.ndarray:
    """Return the place of each wanted gene among those that are known, versions aside; -1 where it is none of them."""
    row_of = {name: row for row, name in enumerate(known)}
    return np.array([row_of.get(str(name).split(".")[0], -1) for name in wanted], dtype=np.int64)


@dataclass(frozen=True)
class GeneEmbeddings:
    """Mean contextual embedding of every gene that was seen."""

    ensembl_ids: list[str]
    """Genes, in the order of their token ids."""
    vectors: np.ndarray
    """float32 of shape `(genes, e)`."""
    n_cells: np.ndarray
    """int64 of shape `(genes,)`: cells each mean is over."""

    def for_genes(self, ensembl_ids: Sequence[str]) -> np.ndarray:
        """Return the rows of these genes, NaN where a gene was not seen: for instance for `adata.varm`."""
        rows = rows_for(ensembl_ids, self.ensembl_ids)
        out = np.full((len(rows), self.vectors.shape[1]), np.nan, dtype=np.float32)
        out[rows >= 0] = self.vectors[rows[rows >= 0]]
        return out

    def to_frame(self) -> pd.DataFrame:
        """Return a table: Ensembl id as index, `n_cells`, then one column per dimension."""
        frame = pd.DataFrame(self.vectors, index=pd.Index(self.ensembl_ids, name="ensembl_id"))
        frame.insert(0, "n_cells", self.n_cells)
        return frame


def embed_cells(
    model: Any,
    cells: Any,
    *,
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
    progress: bool = True,
) -> np.ndarray:
    """Embed cells.

    Args:
        model (`PreTrainedModel`, `PeftModel`, `str` or `Path`):
            any Geneformer, base or fine-tuned, or its folder or Hub id; adapters and quantised checkpoints as well.
        cells (`AnnData`, `str`, `Path` or `datasets.Dataset`):
            Raw counts in memory or in a file of cells, a tokenized dataset, or the folder of one. All cells are embedded;
            `filter_pass` decides about datasets, not about embeddings.
        tokenizer (`GeneformerTokenizer`, *optional*): the one in the model's folder otherwise.
        layer (`int`, *optional*, defaults to -2):
            Index into `hidden_states`: -1 is the last layer, -2 the second to last (which the published package calls
            emb_layer -1), 0 the input embeddings.
        pooling (`"cls"` or `"mean"`, *optional*):
            The `<cls>` vector, or the mean over genes without special tokens. The default is `cls` where the vocabulary has it.
        batch_size (`int`, *optional*): most cells in one pass; passes are bounded by tokens anyway.
        device (`str`, *optional*): CUDA, MPS or CPU, whatever is there, otherwise.
        dtype (`"bf16"`, `"fp16"` or `"fp32"`, *optional*): compute in that type (autocast); results are float32 always.
        quantization (`"int8"`, `"nf4"` or `"none"`, *optional*): as in `load_model`, for a folder or Hub id.
        gene_ids, counts_layer, genome (`str`, *optional*): as in `load_cells`.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar.

    Returns:
        `np.ndarray` of shape `(n, e)`, float32, rows as in `cells`. NaN for cells without genes.

    Raises:
        LayerError: if the layer or `<cls>` does not exist in this model.
        VocabularyMismatchError: if the tokens were made for another model.
        CellFileError, NotRawCountsError, GeneIdError: as `load_cells`.
    """
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
    return runner.embed(runner.open(cells, gene_ids=gene_ids, counts_layer=counts_layer, genome=genome))


def embed_genes(
    model: Any,
    cells: Any,
    *,
    tokenizer: GeneformerTokenizer | None = None,
    layer: int = -2,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantization: str | None = None,
    gene_ids: str | None = None,
    counts_layer: str | None = None,
    genome: str | None = None,
    progress: bool = True,
) -> GeneEmbeddings:
    """Return the mean contextual embedding of every gene over the cells that express it.

    Special tokens are left out. Sums are float64, so the result does not depend on the order of cells. Arguments and errors
    as in `embed_cells`.
    """
    runner = Embedder(
        model, tokenizer=tokenizer, layer=layer, pooling="mean", batch_size=batch_size, device=device, dtype=dtype, quantization=quantization, progress=progress
    )
    tokens = runner.open(cells, gene_ids=gene_ids, counts_layer=counts_layer, genome=genome)
    table = runner.gene_table(tokens)
    sums = torch.zeros(runner.config.vocab_size, runner.config.hidden_size, dtype=torch.float64)
    counts = torch.zeros(runner.config.vocab_size, dtype=torch.int64)
    for part in runner.iter_hidden(tokens):
        keep = part.genes()
        ids = part.input_ids[keep]
        sums.index_add_(0, ids, part.hidden[keep.to(part.hidden.device)].double().cpu())
        counts += torch.bincount(ids, minlength=len(counts))
    rows = np.argsort(table.token_ids)
    rows = rows[counts.numpy()[table.token_ids[rows]] > 0]
    seen = torch.from_numpy(table.token_ids[rows].astype(np.int64))
    vectors = (sums[seen] / counts[seen].unsqueeze(1)).float().numpy()
    return GeneEmbeddings([table.ensembl_ids[row] for row in rows], vectors, counts[seen].numpy())


def iter_gene_embeddings(
    model: Any, cells: Any, *, gene_ids: str | None = None, counts_layer: str | None = None, genome: str | None = None, **options: Any
) -> Iterator[pa.RecordBatch]:
    """Yield the embedding of every gene in every cell, a pass at a time: for writing, not for holding.

    Arguments as in `embed_genes`.

    Yields:
        `pa.RecordBatch` with the columns `cell_id`, `ensembl_id`, `rank` (0 is the highest) and `embedding`.
    """
    runner = Embedder(model, pooling="mean", **options)
    tokens = runner.open(cells, gene_ids=gene_ids, counts_layer=counts_layer, genome=genome)
    table = runner.gene_table(tokens)
    names = np.full(runner.config.vocab_size, None, dtype=object)
    names[table.token_ids] = list(table.ensembl_ids)
    for part in runner.iter_hidden(tokens):
        for cell, start, stop in part.cells():
            first, last = part.gene_span(start, stop)
            ids = part.input_ids[first:last].numpy()
            vectors = part.hidden[first:last].float().cpu().numpy()
            yield pa.RecordBatch.from_pydict(
                {
                    "cell_id": pa.array([part.cell_ids[cell]] * len(ids), pa.string()),
                    "ensembl_id": pa.array(names[ids], pa.string()),
                    "rank": pa.array(np.arange(len(ids), dtype=np.int32)),
                    "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
                }
            )


def state_embeddings(
    model: Any,
    cells: Any,
    states: str | Sequence[Any],
    *,
    gene_ids: str | None = None,
    counts_layer: str | None = None,
    genome: str | None = None,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Return the exact mean embedding of the cells in each state.

    Args:
        model, cells, and options: as in `embed_cells`.
        states (`str` or a sequence of length n): a column of obs or of the dataset, or the state of each cell. Missing values
            are left out.

    Returns:
        `dict[str, np.ndarray]`: state to a float64 vector of shape `(e,)`, in sorted order; sums are float64.
    """
    runner = Embedder(model, **options)
    tokens = runner.open(cells, gene_ids=gene_ids, counts_layer=counts_layer, genome=genome)
    labels = np.asarray(tokens.column(states) if isinstance(states, str) else list(states), dtype=object)
    if len(labels) != tokens.n_cells:
        msg = f"states has {len(labels):,} entries and there are {tokens.n_cells:,} cells."
        raise ValueError(msg)
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for chunk, vectors in runner.iter_cells(tokens):
        for label, vector in zip(labels[chunk.start : chunk.start + len(vectors)], vectors.astype(np.float64), strict=True):
            if not pd.isna(label) and not np.isnan(vector[0]):
                sums[str(label)] = sums.get(str(label), 0.0) + vector
                counts[str(label)] = counts.get(str(label), 0) + 1
    return {state: sums[state] / counts[state] for state in sorted(sums)}


@dataclass(frozen=True)
class HiddenPart:
    """The hidden states of some packed cells."""

    rows: list[int]
    """Place of each cell among all cells."""
    cell_ids: list[str]
    input_ids: torch.Tensor
    """int64 of shape `(t,)` on the CPU."""
    lengths: list[int]
    hidden: torch.Tensor
    """`(t, e)` on the device."""
    config: GeneformerConfig

    def cells(self) -> Iterator[tuple[int, int, int]]:
        """Yield number, first and last position of each cell."""
        start = 0
        for cell, length in enumerate(self.lengths):
            yield cell, start, start + length
            start += length

    def gene_span(self, first: int, last: int) -> tuple[int, int]:
        """Return the positions of a cell's genes: without `<cls>` and `<eos>` where they stand."""
        first += int(self.config.cls_token_id is not None and int(self.input_ids[first]) == self.config.cls_token_id)
        last -= int(last > first and self.config.eos_token_id is not None and int(self.input_ids[last - 1]) == self.config.eos_token_id)
        return first, last

    def genes(self) -> torch.Tensor:
        """Return a bool of shape `(t,)`: True at genes."""
        keep = torch.ones(len(self.input_ids), dtype=torch.bool)
        for special in (self.config.cls_token_id, self.config.eos_token_id):
            if special is not None:
                keep &= self.input_ids != special
        return keep


class Embedder:
    """A model made ready to embed: checked, on its device, and what to read from it."""

    doing = "Embedding"

    def __init__(
        self,
        model: Any,
        *,
        tokenizer: GeneformerTokenizer | None = None,
        layer: int = -2,
        pooling: str | None = None,
        batch_size: int | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        quantization: str | None = None,
        base: str | None = None,
        allow_missing_weights: bool = False,
        progress: bool = True,
    ) -> None:
        self.model = load_model(model, quantization=quantization, base=base, device=device, allow_missing_weights=allow_missing_weights)
        self.config: GeneformerConfig = self.model.config
        n_layers = resolve_layer(layer, self.config.num_hidden_layers)
        self.pooling = resolve_pooling(pooling, self.config)
        if batch_size is not None and batch_size < 1:
            msg = f"batch_size is {batch_size}; expected at least 1."
            raise SettingError(msg)
        self.progress, self._tokenizer = progress, tokenizer
        self.encoder = PackedEncoder(self.model, n_layers=n_layers, device=resolve_device(device), dtype=resolve_dtype(dtype), batch_size=batch_size)

    def open(self, cells: Any, *, gene_ids: str | None = None, counts_layer: str | None = None, genome: str | None = None) -> Cells:
        """Open cells as tokens for this model."""
        tokens = open_tokens(cells, self.tokenizer, gene_ids=gene_ids, counts_layer=counts_layer, genome=genome)
        tokens.require_made_for(self.config)
        return tokens

    def tokenizer(self) -> GeneformerTokenizer:
        """Return the tokenizer, checked against the model."""
        if self._tokenizer is None:
            self._tokenizer = tokenizer_of(self.model)
        require_same_vocabulary(self.config, self._tokenizer)
        return self._tokenizer

    def gene_table(self, tokens: Cells) -> GeneTable:
        """Return the gene table, which names the tokens."""
        return self.tokenizer().gene_table

    def embed(self, tokens: Cells) -> np.ndarray:
        """Return the embeddings of all cells, float32 of shape `(n, e)`; NaN for cells without genes."""
        out = np.full((tokens.n_cells, self.config.hidden_size), np.nan, dtype=np.float32)
        for chunk, vectors in self.iter_cells(tokens):
            out[chunk.start : chunk.start + len(vectors)] = vectors
        return out

    def iter_cells(self, tokens: Cells) -> Iterator[tuple[TokenChunk, np.ndarray]]:
        """Yield consecutive cells and their embeddings, float32 of shape `(m, e)`, in order."""
        n_empty = 0
        for chunk, parts in self._iter_chunks(tokens):
            vectors = np.full((chunk.n_cells, self.config.hidden_size), np.nan, dtype=np.float32)
            for part in parts:
                pooled = torch.stack([self._pool(part, first, last) for _, first, last in part.cells()])
                vectors[np.array(part.rows) - chunk.start] = pooled.float().cpu().numpy()
            is_empty = chunk.n_genes(self.config) == 0
            n_lost = int((np.isnan(vectors[:, 0]) & ~is_empty).sum())
            if n_lost:
                msg = f"the embeddings of {n_lost:,} of {chunk.n_cells:,} cells are not numbers (NaN), though they have genes: the weights are damaged, or too large for half precision. Compute in fp32, or save or download the model again."
                raise CheckpointError(msg)
            n_empty += int(is_empty.sum())
            yield chunk, vectors
        if n_empty:
            logger.warning("%s of %s cells hold no gene of the vocabulary; their embeddings are NaN.", f"{n_empty:,}", f"{tokens.n_cells:,}")

    def iter_hidden(self, tokens: Cells) -> Iterator[HiddenPart]:
        """Yield the hidden states of all cells with genes, in passes."""
        for _, parts in self._iter_chunks(tokens):
            yield from parts

    def _iter_chunks(self, tokens: Cells) -> Iterator[tuple[TokenChunk, Iterator[HiddenPart]]]:
        with self.encoder.ready(), tqdm(total=tokens.n_cells, unit=" cells", desc=self.doing, disable=not self.progress) as bar:
            for given in tokens.chunks():
                chunk = given.without(self.config.pad_token_id)
                chunk.require_fits(self.config)
                yield chunk, self._run_chunk(chunk, bar)

    def _run_chunk(self, chunk: TokenChunk, bar: tqdm) -> Iterator[HiddenPart]:
        full = np.flatnonzero(chunk.n_genes(self.config) > 0)
        bar.update(chunk.n_cells - len(full))
        for done in self.encoder.encode(chunk.input_ids, chunk.offsets, full):
            bar.update(len(done.cells))
            yield HiddenPart(
                rows=(chunk.start + done.cells).tolist(),
                cell_ids=[chunk.cell_ids[i] for i in done.cells],
                input_ids=done.input_ids,
                lengths=done.lengths,
                hidden=done.hidden,
                config=self.config,
            )

    def _pool(self, part: HiddenPart, first: int, last: int) -> torch.Tensor:
        if self.pooling == "mean":
            first, last = part.gene_span(first, last)
            return part.hidden[first:last].float().mean(0)
        if int(part.input_ids[first]) != self.config.cls_token_id:
            msg = f"pooling 'cls': a cell begins with token {int(part.input_ids[first])} instead of <cls> ({self.config.cls_token_id}). The dataset was tokenized without special tokens; tokenize it with this model's tokenizer, or use pooling='mean'."
            raise VocabularyMismatchError(msg)
        return part.hidden[first].float()


def resolve_layer(layer: int, n_layers: int) -> int:
    """Return how many layers to run for an index into `hidden_states`, which has one entry more than there are layers.

    Raises:
        LayerError: naming the legal range.

    Example:
        >>> resolve_layer(-2, 6), resolve_layer(0, 6)
        (5, 0)
    """
    if not -n_layers - 1 <= layer <= n_layers:
        msg = f"layer {layer} does not exist: this model has {n_layers} layers, so hidden_states reaches from {-n_layers - 1} (or 0, the input embeddings) to {n_layers} (or -1, the last)."
        raise LayerError(msg)
    return layer if layer >= 0 else n_layers + 1 + layer


def resolve_pooling(pooling: str | None, config: GeneformerConfig) -> str:
    """Return how cells are pooled: as asked for, else `cls` where the vocabulary has it.

    Raises:
        LayerError: if there is no such pooling, or no `<cls>`.
    """
    found = pooling or ("cls" if config.cls_token_id is not None else "mean")
    if found not in ("cls", "mean"):
        msg = f"pooling {pooling!r} is not 'cls' or 'mean'."
        raise LayerError(msg)
    if found == "cls" and config.cls_token_id is None:
        msg = f"pooling 'cls' needs a <cls> token, and this model's vocabulary of {config.vocab_size:,} has none (V1). Use pooling='mean' (`--pooling mean`)."
        raise LayerError(msg)
    return found
