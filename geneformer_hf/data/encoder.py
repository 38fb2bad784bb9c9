"""Cells turned into Arrow tables of tokens, a row range at a time; what a tokenized dataset holds."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa

from ..models.tokenization_geneformer import EncodedCells, GeneformerTokenizer
from .columns import ObsColumns
from .sources import CellSource

RANGE_CELLS = 8192
"""Most cells in one row range, the unit of work of a process."""
RANGES_OF_A_FILE = 8
"""Row ranges of a file of fewer cells than that many ranges would hold; small files are not cut below 256 cells."""

RANKING_THREADS = 2
GENOME_FRACTION = "genome_fraction"


@dataclass(frozen=True)
class EncodingOptions:
    """What goes into a tokenized dataset beside `input_ids`, `length` and `cell_id`."""

    obs: Literal["all", "none"] | tuple[str, ...] = "all"
    keep_counts: bool = False
    keep_uncropped: bool = False
    genome_fraction: bool = False
    """Keep `genome_fraction`, of cells of a file that mixes genomes."""


class CellEncoder:
    """One source of cells turned into Arrow tables."""

    def __init__(self, source: CellSource, tokenizer: GeneformerTokenizer, columns: ObsColumns, options: EncodingOptions) -> None:
        self.source, self.tokenizer, self.columns, self.options = source, tokenizer, columns, options
        self.genes = source.match_genes(tokenizer.gene_table)
        self.passing = source.passing
        self.schema = features_of(tokenizer, columns, options).arrow_schema
        if options.keep_counts:
            # A column of totals that does not fit is refused here, before any work.
            _ = source.totals_from

    def tables(self, start: int = 0, stop: int | None = None) -> Iterator[pa.Table]:
        """Yield the rows of some cells: those that pass the filter and hold a gene of the vocabulary, in order."""
        passing = self.passing
        obs = self.columns.read(self.source, start, stop)
        # Ranking spends its time in numpy, which leaves other threads alone: one block is read while two are ranked.
        with ThreadPoolExecutor(RANKING_THREADS) as workers:
            pending: deque[Future[pa.Table]] = deque()
            for block in self.source.iter_blocks(start, stop):
                rows = np.arange(block.start, block.start + block.counts_ng.shape[0])
                counts, totals_n = block.counts_ng, self.source.totals(block) if self.options.keep_counts else None
                further = obs.take(pa.array(rows - start))
                if self.options.genome_fraction:
                    further = further.append_column(
                        GENOME_FRACTION,
                        pa.array(block.genome_fraction_n, pa.float32(), from_pandas=True)
                        if block.genome_fraction_n is not None
                        else pa.nulls(len(rows), pa.float32()),
                    )
                if passing is not None and not passing[rows].all():
                    kept = np.flatnonzero(passing[rows])
                    counts, further, totals_n = counts[kept], further.take(pa.array(kept)), None if totals_n is None else totals_n[kept]
                pending.append(workers.submit(self._table, counts, totals_n, further))
                if len(pending) > RANKING_THREADS:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        # Arrow keeps freed memory for itself otherwise, a little more with every range.
        pa.default_memory_pool().release_unused()

    def _table(self, counts: Any, totals_n: np.ndarray | None, obs: pa.Table) -> pa.Table:
        cells = self.tokenizer.encode_block(counts, self.genes, totals_n=totals_n)
        schema = self.schema
        lengths = np.diff(cells.offsets).astype(np.int32)
        arrays: dict[str, Any] = {"input_ids": _lists(cells, cells.input_ids, schema.field("input_ids").type), "length": lengths}
        arrays |= {name: obs.column(name) for name in obs.column_names}
        if self.options.keep_counts:
            arrays["counts"] = _lists(cells, cells.counts, schema.field("counts").type)
        if self.options.keep_uncropped:
            whole = self.tokenizer.encode_block(counts, self.genes, crop=False, special_tokens=False)
            arrays["input_ids_uncropped"] = _lists(whole, whole.input_ids, schema.field("input_ids_uncropped").type)
            arrays["length_uncropped"] = np.diff(whole.offsets).astype(np.int32)
        table = pa.table(arrays).select(schema.names).cast(schema)
        empty = lengths == self.tokenizer.n_special_tokens
        return table.filter(pa.array(~empty)) if empty.any() else table


def features_of(tokenizer: GeneformerTokenizer, columns: ObsColumns, options: EncodingOptions) -> datasets.Features:
    """Return the columns of a tokenized dataset; tokens take the smallest of int16, uint16 and int32 that holds them."""
    largest = int(tokenizer.gene_table.token_ids.max())
    token = datasets.Value("int16" if largest < 1 << 15 else "uint16" if largest < 1 << 16 else "int32")
    features: dict[str, Any] = {"input_ids": datasets.List(token), "length": datasets.Value("int32"), "cell_id": datasets.Value("string")}
    if options.keep_counts:
        features["counts"] = datasets.List(datasets.Value("float32"))
    if options.keep_uncropped:
        features |= {"input_ids_uncropped": datasets.List(token), "length_uncropped": datasets.Value("int32")}
    if options.genome_fraction:
        features[GENOME_FRACTION] = datasets.Value("float32")
    return datasets.Features(features | columns.features)


def row_ranges(n_cells: int) -> list[tuple[int, int]]:
    """Cut a file into row ranges; they depend on nothing but the number of cells, so neither do the shards."""
    size = min(RANGE_CELLS, max(256, -(-n_cells // RANGES_OF_A_FILE)))
    return [(start, min(start + size, n_cells)) for start in range(0, n_cells, size)] or [(0, 0)]


def _lists(cells: EncodedCells, values: Any, arrow_type: pa.DataType) -> pa.ListArray:
    flat = pa.array(values.astype(arrow_type.value_type.to_pandas_dtype(), copy=False))
    return pa.ListArray.from_arrays(pa.array(cells.offsets.astype(np.int32)), flat)
