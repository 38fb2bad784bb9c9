"""A matrix stored by gene (CSC) turned into rows on disk, once, in bounded memory.

Rows of a CSC file cannot be read without reading all of it. Two passes mend that for good: the first counts the entries
of every cell, the second deals chunks of genes out to a file per run of cells; each run is then put in row order and
appended to one pair of flat arrays, from which any range of cells is a plain read.
"""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import scipy.sparse as sp

from ..errors import CellFileError

CHUNK_VALUES = 1 << 22
"""Entries held in memory at once, in either pass."""


@dataclass(frozen=True)
class CsrOnDisk:
    """Rows of a sparse matrix in two flat files."""

    folder: Path
    indptr: np.ndarray
    """int64 of shape `(n + 1,)`."""
    data_type: np.dtype

    def read(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Return values and columns of the entries from `begin` up to `end`."""
        n = end - begin
        data = np.fromfile(self.folder / "data", self.data_type, n, offset=begin * self.data_type.itemsize)
        return data, np.fromfile(self.folder / "indices", np.int32, n, offset=begin * 4)


def transpose_to_disk(matrix: h5py.Group, n_cells: int, work_dir: Path) -> CsrOnDisk:
    """Write the rows of a CSC matrix below `work_dir`; takes as much disk as its values and columns, twice for a moment."""
    work_dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="rows-", dir=work_dir))
    by_gene, n_values = matrix["indptr"][:], int(matrix["indptr"][-1])
    n_genes = len(by_gene) - 1
    row_counts = np.zeros(n_cells, dtype=np.int64)
    for begin in range(0, n_values, CHUNK_VALUES):
        rows = matrix["indices"][begin : begin + CHUNK_VALUES]
        if not 0 <= int(rows.min()) <= int(rows.max()) < n_cells:
            msg = f"{matrix.file.filename}: {matrix.name} points outside its {n_cells:,} cells. The file is damaged; write it again."
            raise CellFileError(msg)
        row_counts += np.bincount(rows, minlength=n_cells)
    indptr = _running_sum(row_counts)

    # Runs of cells that each fit into memory, and a file of (row, gene, value) for each.
    firsts = [0]
    while firsts[-1] < n_cells:
        last = int(np.searchsorted(indptr, indptr[firsts[-1]] + CHUNK_VALUES, side="right")) - 1
        firsts.append(min(max(last, firsts[-1] + 1), n_cells))
    # Wide enough for sums of what names one cell and gene twice.
    value_type = np.promote_types(matrix["data"].dtype, np.float32)
    entry = np.dtype([("row", np.int32), ("gene", np.int32), ("value", value_type)])
    gene = 0
    while gene < n_genes:
        last = int(np.searchsorted(by_gene, by_gene[gene] + CHUNK_VALUES, side="right")) - 1
        last = min(max(last, gene + 1), n_genes)
        begin, end = int(by_gene[gene]), int(by_gene[last])
        chunk = sp.csc_array((matrix["data"][begin:end], matrix["indices"][begin:end], by_gene[gene : last + 1] - begin), shape=(n_cells, last - gene)).tocsr()
        entries = np.empty(end - begin, dtype=entry)
        entries["row"] = np.repeat(np.arange(n_cells, dtype=np.int32), np.diff(chunk.indptr))
        entries["gene"], entries["value"] = chunk.indices + gene, chunk.data
        for run, (first, stop) in enumerate(itertools.pairwise(firsts)):
            part = entries[chunk.indptr[first] : chunk.indptr[stop]]
            if len(part):
                with (folder / f"run-{run}").open("ab") as file:
                    part.tofile(file)
        gene = last

    with (folder / "data").open("wb") as data, (folder / "indices").open("wb") as indices:
        for run, (first, stop) in enumerate(itertools.pairwise(firsts)):
            path = folder / f"run-{run}"
            if not path.exists():
                continue
            entries = np.fromfile(path, dtype=entry)
            rows = sp.coo_array((entries["value"], (entries["row"] - first, entries["gene"])), shape=(stop - first, n_genes)).tocsr()
            # Entries that name one cell and gene twice were added up.
            row_counts[first:stop] = np.diff(rows.indptr)
            rows.data.astype(value_type, copy=False).tofile(data)
            rows.indices.astype(np.int32, copy=False).tofile(indices)
            path.unlink()
    return CsrOnDisk(folder, _running_sum(row_counts), value_type)


def _running_sum(counts: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(counts)))
