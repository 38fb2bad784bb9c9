"""What became of every cell of a dataset: the report that goes with it, and the warnings it gives rise to."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import datasets
import numpy as np
import pandas as pd

from ..errors import CellFileError
from ..genes import GeneTable
from ..models.tokenization_geneformer import GeneformerTokenizer
from .sources import CellSource

logger = logging.getLogger(__name__)

CHUNK_CELLS = 1 << 16


@dataclass(frozen=True)
class FileReport:
    """What was found in one file."""

    file: str
    cells: int
    filter_pass: int
    """Cells whose `obs["filter_pass"]` is 0."""
    counts: str
    genes: str
    provenance: dict[str, Any] | None = None
    """Where it is from, for cells of a database."""
    gene_names: dict[str, Any] | None = None
    """What names the genes, and the numbers behind `genes`."""
    genome: str | None = None
    """What became of the cells of a file that mixes genomes."""

    @classmethod
    def of(cls, source: CellSource, table: GeneTable, *, name: str | None = None) -> FileReport:
        """Return the report of a source matched against a vocabulary."""
        n_filtered = 0 if source.passing is None else int((~source.passing).sum())
        genes = source.match_genes(table).report
        return cls(
            name or source.name,
            source.n_cells,
            n_filtered,
            source.counts_described,
            genes.describe(),
            source.provenance,
            genes.numbers(),
            source.describe_genome(),
        )


@dataclass(frozen=True)
class SkippedFile:
    """A file that could not be used, and why."""

    file: str
    reason: str


def with_report(
    dataset: datasets.Dataset, files: Sequence[FileReport], tokenizer: GeneformerTokenizer, skipped: Sequence[SkippedFile] = ()
) -> datasets.Dataset:
    """Attach what was read and left out as JSON in `info.description`, and warn of what a user may not expect.

    Raises:
        CellFileError: if no cell is left.
    """
    n_filtered = sum(f.filter_pass for f in files)
    n_empty = sum(f.cells for f in files) - n_filtered - len(dataset)
    if skipped:
        logger.warning("%s files were skipped: %s", f"{len(skipped):,}", "; ".join(s.reason for s in skipped))
    if n_filtered:
        logger.warning("%s cells were left out because obs['filter_pass'] is 0.", f"{n_filtered:,}")
    for file in files:
        if file.genome:
            logger.warning("%s: %s.", file.file, file.genome)
    if n_empty:
        logger.warning("%s cells were left out because they hold no gene of the vocabulary.", f"{n_empty:,}")
    if not len(dataset):
        names = ", ".join(f.file for f in files[:3])
        msg = f"{names}: none of {n_filtered + n_empty:,} cells is left: {n_filtered:,} have filter_pass 0, {n_empty:,} hold no gene of the vocabulary."
        raise CellFileError(msg)
    n_repeated, examples = repeated_cell_ids(dataset)
    if n_repeated:
        logger.warning("%s cells carry a cell id that another cell carries too (%s). They are all kept.", f"{n_repeated:,}", ", ".join(examples))
    report = {
        "encoding": tokenizer.encoding_fingerprint,
        "cells": len(dataset),
        "left_out_by_filter_pass": n_filtered,
        "left_out_without_genes": n_empty,
        "cells_with_repeated_ids": n_repeated,
        "files": [asdict(f) for f in files],
        "skipped_files": [asdict(s) for s in skipped],
    }
    dataset.info.description = json.dumps(report, indent=1)
    return dataset


def repeated_cell_ids(dataset: datasets.Dataset) -> tuple[int, list[str]]:
    """Return how many cells share their id with another one, and up to three such ids; 8 bytes of memory a cell."""
    hashes = [pd.util.hash_array(ids) for ids in _cell_ids(dataset)]
    if not hashes:
        return 0, []
    values, counts = np.unique(np.concatenate(hashes), return_counts=True)
    repeated = values[counts > 1]
    if not len(repeated):
        return 0, []
    examples: list[str] = []
    for ids in _cell_ids(dataset):
        examples = list(dict.fromkeys([*examples, *ids[np.isin(pd.util.hash_array(ids), repeated)]]))[:3]
        if len(examples) == 3:
            break
    return int(counts[counts > 1].sum()), examples


def _cell_ids(dataset: datasets.Dataset) -> Iterator[np.ndarray]:
    for table in dataset.select_columns(["cell_id"]).with_format("arrow").iter(CHUNK_CELLS):
        yield table.column("cell_id").to_numpy(zero_copy_only=False) if hasattr(table, "column") else np.asarray(table)
