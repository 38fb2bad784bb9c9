"""The cells argument of every analysis: an AnnData, a path or a tokenized dataset, as chunks of tokens in order."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from ..data.files import is_cells_folder
from ..data.readers import CellSource, open_cells, read_ahead
from ..data.tokenized import gene_table_of, materialized, open_tokenized, report_of, require_lists_of_ids, require_token_ids
from ..errors import CellFileError, ColumnNotFoundError, VocabularyMismatchError
from ..models.configuration_geneformer import GeneformerConfig
from ..models.tokenization_geneformer import GeneformerTokenizer

logger = logging.getLogger(__name__)

CHUNK_CELLS = 512


@dataclass(frozen=True)
class TokenChunk:
    """Some consecutive cells as tokens laid end to end."""

    start: int
    """Place of the first cell among all cells."""
    input_ids: np.ndarray
    """int of shape `(t,)`."""
    offsets: np.ndarray
    """int64 of shape `(m + 1,)`."""
    cell_ids: list[str]

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.offsets) - 1

    def n_genes(self, config: GeneformerConfig) -> np.ndarray:
        """Return the genes of each cell, int64 of shape `(m,)`: its tokens less the special ones."""
        special = np.isin(self.input_ids, [t for t in (config.cls_token_id, config.eos_token_id, config.pad_token_id) if t is not None])
        return np.diff(np.concatenate(([0], np.cumsum(~special)))[self.offsets])

    def without(self, token: int | None) -> TokenChunk:
        """Return the same cells without one token, such as pads."""
        if token is None or not (unwanted := self.input_ids == token).any():
            return self
        kept = np.concatenate(([0], np.cumsum(~unwanted)))
        return TokenChunk(self.start, self.input_ids[~unwanted], kept[self.offsets], self.cell_ids)

    def require_fits(self, config: GeneformerConfig) -> None:
        """Raise unless ids and lengths fit the model.

        Raises:
            VocabularyMismatchError
        """
        require_token_ids(self.input_ids, config.vocab_size, name=self._cell_of)
        longest = int(np.diff(self.offsets).max(initial=0))
        if longest > config.max_position_embeddings:
            msg = f"The cells were tokenized for another model: the longest has {longest:,} tokens, and this model has {config.max_position_embeddings:,} positions. Tokenize them with this model's tokenizer."
            raise VocabularyMismatchError(msg)

    def _cell_of(self, place: int) -> str:
        row = int(np.searchsorted(self.offsets, place, side="right")) - 1
        return f"cell {self.cell_ids[row]!r} (row {self.start + row:,})"


class Cells(ABC):
    """Tokenized cells in order."""

    n_cells: int

    @abstractmethod
    def chunks(self) -> Iterator[TokenChunk]:
        """Yield all cells in order."""

    @abstractmethod
    def column(self, name: str) -> list[Any]:
        """Return a column of obs or of the dataset, labels as text.

        Raises:
            ColumnNotFoundError
        """

    @abstractmethod
    def require_made_for(self, config: GeneformerConfig) -> None:
        """Raise if these cells are known to have been tokenized with another gene table."""


class SourceCells(Cells):
    """Counts that are ranked on the way."""

    def __init__(self, source: CellSource, tokenizer: GeneformerTokenizer) -> None:
        self.source, self._tokenizer = source, tokenizer
        self.n_cells = source.n_cells
        self.genes = source.match_genes(tokenizer.gene_table)
        logger.info("%s: counts in %s; %s.", source.name, source.counts_described, self.genes.report.describe())
        if mixed := source.describe_genome():
            logger.warning("%s: %s.", source.name, mixed)

    def chunks(self) -> Iterator[TokenChunk]:
        """Yield all cells in order."""
        cell_ids = self.source.cell_ids
        for block in read_ahead(self.source.iter_blocks()):
            cells = self._tokenizer.encode_block(block.counts_ng, self.genes)
            yield TokenChunk(block.start, cells.input_ids, cells.offsets, cell_ids[block.start : block.start + len(cells.offsets) - 1])

    def require_made_for(self, config: GeneformerConfig) -> None:
        """Do nothing: these cells are ranked with a tokenizer that was checked against the model."""

    def column(self, name: str) -> list[Any]:
        """Return a column of obs."""
        return self.source.read_obs([name])[name].astype(object).tolist()


class DatasetCells(Cells):
    """A dataset as `load_cells` makes it, or any with `input_ids`."""

    def __init__(self, dataset: Any) -> None:
        if isinstance(dataset, datasets.IterableDataset):
            dataset = materialized(dataset)
        if "input_ids" not in dataset.column_names:
            msg = f"The dataset has no column 'input_ids' (found: {', '.join(dataset.column_names)}). Make one with `load_cells` or `geneformer-hf tokenize`."
            raise ColumnNotFoundError(msg)
        require_lists_of_ids(dataset, name="The dataset")
        self.dataset, self.n_cells = dataset, len(dataset)

    @cached_property
    def report(self) -> dict[str, Any]:
        """What `load_cells` recorded, empty for other datasets."""
        return report_of(self.dataset)

    def require_made_for(self, config: GeneformerConfig) -> None:
        """Raise if the dataset records another gene table than the model."""
        table = gene_table_of(self.dataset)
        if table and config.vocabulary_fingerprint is not None and table != config.vocabulary_fingerprint:
            msg = f"The dataset was tokenized with gene table {table} and the model was made for {config.vocabulary_fingerprint}. Tokenize the cells with this model's tokenizer."
            raise VocabularyMismatchError(msg)

    def chunks(self) -> Iterator[TokenChunk]:
        """Yield all cells in order."""
        names = [n for n in ("input_ids", "cell_id") if n in self.dataset.column_names]
        start = 0
        for table in self.dataset.select_columns(names).with_format("arrow").iter(CHUNK_CELLS):
            lists = table.column("input_ids").combine_chunks()
            if isinstance(lists, pa.ChunkedArray):
                lists = lists.chunk(0)
            if pa.types.is_fixed_size_list(lists.type):
                lists = lists.cast(pa.list_(lists.type.value_type))
            if lists.null_count or lists.flatten().null_count:
                msg = f"{lists.null_count or 'some'} of the cells {start:,} to {start + len(lists) - 1:,} are missing, or hold a missing token (null). Tokenize the cells again."
                raise VocabularyMismatchError(msg)
            offsets = np.asarray(lists.offsets, dtype=np.int64)
            ids = np.asarray(lists.values)[offsets[0] : offsets[-1]]
            cell_ids = table.column("cell_id").to_pylist() if "cell_id" in names else [str(i) for i in range(start, start + len(lists))]
            yield TokenChunk(start, ids, offsets - offsets[0], cell_ids)
            start += len(lists)

    def column(self, name: str) -> list[Any]:
        """Return a column of the dataset, classes by name."""
        if name not in self.dataset.column_names:
            msg = f"The dataset has no column {name!r}. Found: {', '.join(self.dataset.column_names)}."
            raise ColumnNotFoundError(msg)
        feature = self.dataset.features[name]
        values = self.dataset[name][:]
        return [None if v is None else feature.int2str(v) for v in values] if hasattr(feature, "int2str") else list(values)


def open_tokens(
    cells: Any, tokenizer: Callable[[], GeneformerTokenizer], *, gene_ids: str | None = None, counts_layer: str | None = None, genome: str | None = None
) -> Cells:
    """Open what the user calls cells.

    Args:
        cells (`AnnData`, `str`, `Path` or `datasets.Dataset`).
        tokenizer: called only where counts have to be ranked.
    """
    if isinstance(cells, (str, Path)) and Path(cells).is_dir() and not is_cells_folder(Path(cells)):
        if not (Path(cells) / "dataset_info.json").is_file():
            msg = f"{cells} is not the folder of a tokenized dataset (it holds no dataset_info.json), nor a zarr store, 10x folder or scDL archive. Make one with `geneformer-hf tokenize`."
            raise CellFileError(msg)
        cells = open_tokenized(cells)
    if isinstance(cells, (str, Path)) and Path(cells).suffix == ".parquet" and Path(cells).is_file():
        cells = open_tokenized(cells)
    if hasattr(cells, "column_names"):
        return DatasetCells(cells)
    return SourceCells(open_cells(cells, gene_ids=gene_ids, counts_layer=counts_layer, genome=genome), tokenizer())
