"""Rows of a matrix on disk, for files that do not hold rows: CSC files (by gene) and text in any order.

Two passes, in bounded memory: the first counts the entries of every cell, the second deals them out to a file per run of
cells; each run is then put in row order and appended to one pair of flat arrays, from which any range of cells is a plain
read.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import scipy.sparse as sp

from ..errors import CellFileError, OutputError

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

    def save(self) -> None:
        """Write what another process needs to open these rows."""
        np.save(self.folder / "indptr.npy", self.indptr)
        (self.folder / "rows.json").write_text(json.dumps({"data_type": self.data_type.str}), encoding="utf-8")

    @classmethod
    def open(cls, folder: Path) -> CsrOnDisk:
        """Open rows that were saved."""
        data_type = np.dtype(json.loads((folder / "rows.json").read_text(encoding="utf-8"))["data_type"])
        return cls(folder, np.load(folder / "indptr.npy"), data_type)


def transpose_to_disk(matrix: Any, n_cells: int, work_dir: Path, *, where: str = "") -> CsrOnDisk:
    """Write the rows of a stored CSC matrix below `work_dir`; takes as much disk as its values and columns, twice for a moment.

    Args:
        matrix: group of an HDF5 file or zarr store with `data`, `indices` and `indptr`.

    Raises:
        CellFileError: if it points outside its cells.
    """
    by_gene = np.asarray(matrix["indptr"][:])
    n_values, n_genes = int(by_gene[-1]), len(by_gene) - 1
    row_counts = np.zeros(n_cells, dtype=np.int64)
    for begin in range(0, n_values, CHUNK_VALUES):
        rows = np.asarray(matrix["indices"][begin : min(begin + CHUNK_VALUES, n_values)])
        if not 0 <= int(rows.min()) <= int(rows.max()) < n_cells:
            msg = f"{where}: points outside its {n_cells:,} cells. The file is damaged; write it again."
            raise CellFileError(msg)
        row_counts += np.bincount(rows, minlength=n_cells)

    def chunks() -> Iterator[tuple[sp.csr_array, int]]:
        gene = 0
        while gene < n_genes:
            last = int(np.searchsorted(by_gene, by_gene[gene] + CHUNK_VALUES, side="right")) - 1
            last = min(max(last, gene + 1), n_genes)
            begin, end = int(by_gene[gene]), int(by_gene[last])
            part = (np.asarray(matrix["data"][begin:end]), np.asarray(matrix["indices"][begin:end]), by_gene[gene : last + 1] - begin)
            yield sp.csc_array(part, shape=(n_cells, last - gene)).tocsr(), gene
            gene = last

    # Wide enough for sums of what names one cell and gene twice.
    return rows_on_disk(chunks(), row_counts, n_genes, np.promote_types(matrix["data"].dtype, np.float32), work_dir)


def rows_on_disk(chunks: Iterable[tuple[sp.csr_array, int]], row_counts: np.ndarray, n_genes: int, data_type: np.dtype, work_dir: Path) -> CsrOnDisk:
    """Write rows that come in pieces.

    Args:
        chunks: arrays of shape `(n, k)` of entries of any of the cells, and the gene of their first column.
        row_counts (int64 of shape `(n,)`): entries of every cell over all chunks.
    """
    folder = new_rows_folder(work_dir)
    try:
        return _deal(chunks, row_counts, n_genes, data_type, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def new_rows_folder(work_dir: Path) -> Path:
    """Make a folder for rows."""
    work_dir.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="rows-", dir=work_dir))


def _deal(chunks: Iterable[tuple[sp.csr_array, int]], row_counts: np.ndarray, n_genes: int, data_type: np.dtype, folder: Path) -> CsrOnDisk:
    n_cells, indptr = len(row_counts), running_sum(row_counts)
    # Runs of cells that each fit into memory, and a file of (row, gene, value) for each.
    firsts = [0]
    while firsts[-1] < n_cells:
        last = int(np.searchsorted(indptr, indptr[firsts[-1]] + CHUNK_VALUES, side="right")) - 1
        firsts.append(min(max(last, firsts[-1] + 1), n_cells))
    entry = np.dtype([("row", np.int32), ("gene", np.int32), ("value", data_type)])
    for chunk, gene in chunks:
        entries = np.empty(chunk.nnz, dtype=entry)
        entries["row"] = np.repeat(np.arange(n_cells, dtype=np.int32), np.diff(chunk.indptr))
        entries["gene"], entries["value"] = chunk.indices + gene, chunk.data
        for run, (first, stop) in enumerate(itertools.pairwise(firsts)):
            part = entries[chunk.indptr[first] : chunk.indptr[stop]]
            if len(part):
                with (folder / f"run-{run}").open("ab") as file:
                    put(file, part)

    row_counts = row_counts.copy()
    with (folder / "data").open("wb") as data, (folder / "indices").open("wb") as indices:
        for run, (first, stop) in enumerate(itertools.pairwise(firsts)):
            path = folder / f"run-{run}"
            if not path.exists():
                continue
            entries = np.fromfile(path, dtype=entry)
            rows = sp.coo_array((entries["value"], (entries["row"] - first, entries["gene"])), shape=(stop - first, n_genes)).tocsr()
            # Entries that name one cell and gene twice were added up.
            row_counts[first:stop] = np.diff(rows.indptr)
            put(data, rows.data.astype(data_type, copy=False))
            put(indices, rows.indices.astype(np.int32, copy=False))
            path.unlink()
    return CsrOnDisk(folder, running_sum(row_counts), data_type)


def put(file: BinaryIO, values: np.ndarray) -> None:
    """Append the bytes of an array.

    Raises:
        OutputError: if they do not fit; otherwise a full disk would pass for a damaged input, which is open at that time.
    """
    try:
        file.write(np.ascontiguousarray(values).view(np.uint8).data)
        file.flush()
    except OSError as error:
        msg = f"cannot write {file.name}: {error.strerror or error}. Its rows need as much disk as the values and columns of the input, twice for a moment."
        raise OutputError(msg) from error


def running_sum(counts: np.ndarray) -> np.ndarray:
    """Return the sums of the first 0, 1, … counts, int64."""
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
