"""Rows of a stored matrix, a block at a time: CSR as they lie, dense in slabs, everything else through rows on disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp

from ..anndata_objects import known_to_scipy
from ..errors import CellFileError
from .store_checks import require_memory
from .stores import is_group, name_of, read_values
from .transpose import CsrOnDisk

BLOCK_VALUES = 1 << 19
"""Stored values read at once; a block takes about 40 times as many bytes while it is ranked."""
BLOCK_CELLS = 4096
SAMPLE_VALUES = 1 << 18

Layout = Literal["csr", "csc", "dense", "dense by gene", "text"]
"""How a matrix lies in its file; `dense by gene` has a row a gene."""


def layout_of(matrix: Any, where: str) -> tuple[Layout, tuple[int, int]]:
    """Return layout and shape of a matrix that anndata wrote.

    Raises:
        CellFileError: if it is encoded in another way.
    """
    if not is_group(matrix):
        if len(matrix.shape) != 2:
            msg = f"{where}: {name_of(matrix)} has {len(matrix.shape)} dimensions; expected cells and genes. Write it again as a matrix."
            raise CellFileError(msg)
        return "dense", (int(matrix.shape[0]), int(matrix.shape[1]))
    attributes = matrix.attrs
    encoding = attributes.get("encoding-type") or f"{attributes.get('h5sparse_format', '')}_matrix"
    shape = attributes.get("shape", attributes.get("h5sparse_shape"))
    if encoding not in ("csr_matrix", "csc_matrix") or shape is None:
        msg = f"{where}: {name_of(matrix)} is encoded as {encoding!r}; expected a dense, CSR or CSC matrix."
        raise CellFileError(msg)
    return ("csr" if encoding == "csr_matrix" else "csc"), (int(shape[0]), int(shape[1]))


def require_sound_index(matrix: Any, shape: tuple[int, int], layout: Layout, where: str) -> None:
    """Raise unless the index pointer of a sparse matrix divides its entries into its rows (CSR) or columns (CSC).

    Raises:
        CellFileError
    """
    n = shape[0] if layout == "csr" else shape[1]
    n_data, n_indices, n_pointers = (int(matrix[part].shape[0]) for part in ("data", "indices", "indptr"))
    # Read only where its length is the expected one, however large the file says it is.
    indptr = read_values(matrix["indptr"]).astype(np.int64) if n_pointers == n + 1 else np.zeros(0, dtype=np.int64)
    sound = len(indptr) == n + 1 and indptr[0] == 0 and indptr[-1] == n_data == n_indices and bool((np.diff(indptr) >= 0).all())
    if not sound:
        msg = f"{where}: its index does not fit its entries ({n_pointers:,} pointers for {n:,} {'cells' if layout == 'csr' else 'genes'}, {n_data:,} values, {n_indices:,} indices). The file is damaged; write it again."
        raise CellFileError(msg)
    if hasattr(matrix["data"], "nchunks_initialized"):
        _require_all_chunks(matrix, indptr, shape[1] if layout == "csr" else shape[0], where)


def _require_all_chunks(matrix: Any, indptr: np.ndarray, n_across: int, where: str) -> None:
    """Raise if a chunk of a zarr store is missing; it would silently read as zeros.

    A chunk of nothing but zeros is not written either: never one of the values, but one of the indices may be, where every
    row in it has one entry, in the first column, and one of the pointers, where the first rows are empty.
    """
    for name in ("data", "indices", "indptr"):
        array = matrix[name]
        size = (array.shards or array.chunks)[0]
        expected, there = -(-array.shape[0] // size), array.nchunks_initialized // max(1, size // array.chunks[0])
        if there >= expected:
            continue
        damaged = name == "data" or (name == "indptr" and int(np.diff(indptr).max(initial=0)) > n_across)
        if name == "indices":
            for begin in range(0, array.shape[0], size):
                if not np.asarray(array[begin : begin + size]).any():
                    inside = np.clip(indptr, begin, begin + size)
                    damaged |= int(np.diff(inside).max(initial=0)) > 1
        if damaged:
            msg = f"{where}: {expected - there:,} of {expected:,} chunks of its {name} are missing. The store is incomplete; write or copy it again."
            raise CellFileError(msg)


def sample_of(matrix: Any) -> np.ndarray:
    """Return values from the beginning, the middle and the end of a stored matrix."""
    values = matrix["data"] if is_group(matrix) else matrix
    n = values.shape[0]
    require_memory(8 * int(np.prod(values.shape[1:], dtype=object) or 1), f"one row of {values.shape[1:]} values")
    size = max(1, SAMPLE_VALUES // 4 // int(np.prod(values.shape[1:], dtype=int) or 1))
    starts = sorted({max(0, min(start, n - size)) for start in (0, n // 3, 2 * n // 3, n)})
    return np.concatenate([np.asarray(values[start : start + size]).ravel() for start in starts])


def iter_rows(matrix: Any, layout: Layout, shape: tuple[int, int], start: int, stop: int, *, where: str) -> Iterator[tuple[sp.csr_array, int]]:
    """Yield the rows from `start` up to `stop` in blocks of bounded size, each with the number of its first row.

    Args:
        matrix: what lies in the store, or `CsrOnDisk` for a layout that holds no rows.

    Raises:
        CellFileError: if entries point outside the genes.
    """
    if layout == "dense":
        return _iter_dense(matrix, shape[1], start, stop)
    if layout == "dense by gene":
        return _iter_dense_by_gene(matrix, shape[1], start, stop)
    return _iter_sparse(matrix, shape[1], start, stop, where)


def _iter_dense(matrix: Any, n_genes: int, start: int, stop: int) -> Iterator[tuple[sp.csr_array, int]]:
    for first, last in bounds_by_cells(max(1, BLOCK_VALUES * 8 // max(1, n_genes)), start, stop):
        yield sp.csr_array(_native(matrix[first:last])), first


def _iter_dense_by_gene(matrix: Any, n_genes: int, start: int, stop: int) -> Iterator[tuple[sp.csr_array, int]]:
    width = (matrix.chunks or (1, 1))[1]
    # Whole chunks, where one fits: they are compressed across cells.
    step = max(1, BLOCK_VALUES * 8 // max(1, n_genes))
    step = max(width, step // width * width) if width * n_genes <= BLOCK_VALUES * 64 else step
    for first, last in bounds_by_cells(step, start, stop):
        yield sp.csr_array(_native(matrix[:, first:last]).T), first


def _native(rows: Any) -> np.ndarray:
    values = np.asarray(rows)
    return values.astype(known_to_scipy(values.dtype), copy=False)


def _iter_sparse(matrix: Any, n_genes: int, start: int, stop: int, where: str) -> Iterator[tuple[sp.csr_array, int]]:
    indptr = matrix.indptr if isinstance(matrix, CsrOnDisk) else np.asarray(matrix["indptr"][:]).astype(np.int64)
    for first, last in bounds_by_values(indptr, start, stop):
        begin, end = int(indptr[first]), int(indptr[last])
        if isinstance(matrix, CsrOnDisk):
            data, indices = matrix.read(begin, end)
        else:
            data, indices = _native(matrix["data"][begin:end]), _native(matrix["indices"][begin:end])
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < n_genes:
            msg = f"{where}: points outside its {n_genes:,} genes (cells {first:,} to {last - 1:,}). The file is damaged; write it again."
            raise CellFileError(msg)
        yield sp.csr_array((data, indices, indptr[first : last + 1] - begin), shape=(last - first, n_genes)), first


def bounds_by_values(indptr: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut rows into runs of at most BLOCK_VALUES stored values and BLOCK_CELLS cells; a run has at least one cell."""
    while start < stop:
        last = int(np.searchsorted(indptr, indptr[start] + BLOCK_VALUES, side="right")) - 1
        last = min(max(last, start + 1), start + BLOCK_CELLS, stop)
        yield start, last
        start = last


def bounds_by_cells(step: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut rows into runs of `step` cells, at most BLOCK_CELLS."""
    for first in range(start, stop, min(step, BLOCK_CELLS)):
        yield first, min(first + min(step, BLOCK_CELLS), stop)
