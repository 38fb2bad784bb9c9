"""Readers: an .h5ad file or an AnnData in memory as a stream of blocks of cells.

`open_cells` returns a `CellSource`, which knows its genes, counts and obs columns and hands out `CellBlock`s of bounded
size. Files are read directly through h5py, a block at a time, whatever their layout: CSR rows as they lie, dense rows in
slabs, CSC through one transposition on disk (`transpose.py`).
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from ..errors import CellFileError, ColumnNotFoundError
from ..genes import GeneColumns, GeneTable, choose_gene_ids
from ..pickles import is_lfs_pointer
from ..ranking import check_counts, choose_counts, stored_values
from .obs import frame_columns, frame_length, read_frame, require_frame, text_columns
from .transpose import CsrOnDisk, transpose_to_disk

logger = logging.getLogger(__name__)

BLOCK_VALUES = 1 << 19
"""Stored values read at once; a block takes about 40 times as many bytes while it is ranked."""
BLOCK_CELLS = 4096
SAMPLE_VALUES = 1 << 18
TOTAL_COLUMNS = ("n_counts", "total_counts")


@dataclass(frozen=True)
class CellBlock:
    """Some consecutive cells of a source."""

    counts_ng: sp.csr_array
    """Raw counts, checked, of shape `(n, g)`; stored zeros and unsorted columns may occur."""
    start: int
    """Position of the first cell in its source."""


@dataclass(frozen=True)
class SourceOptions:
    """What the user says about a file instead of leaving it to the rules."""

    gene_ids: str | None = None
    """Column of var that names the genes, or `index`."""
    counts_layer: str | None = None
    """Layer that holds the raw counts, or `X` or `raw.X`."""
    total_counts: str | None = None
    """Column of obs that holds the counts per cell over all genes."""


class CellSource(ABC):
    """Cells of one file or one AnnData."""

    name: str
    """The path, or `AnnData`."""
    n_cells: int
    counts: str
    """The matrix that holds the raw counts: `X`, `raw.X` or a layer."""
    gene_names: list[str]
    gene_names_from: str
    options: SourceOptions

    @abstractmethod
    def iter_blocks(self, start: int = 0, stop: int | None = None) -> Iterator[CellBlock]:
        """Yield the cells from `start` up to `stop` in order, each once, in blocks of bounded size."""

    @property
    def counts_described(self) -> str:
        """Where the counts are, for people."""
        return self.counts if self.counts in ("X", "raw.X") else f"layers[{self.counts!r}]"

    @property
    @abstractmethod
    def obs_columns(self) -> list[str]:
        """Names of the obs columns, in order."""

    @abstractmethod
    def read_obs(self, columns: Sequence[str], start: int = 0, stop: int | None = None) -> pd.DataFrame:
        """Return obs columns of some cells, indexed by cell id; categories stay categories."""

    @abstractmethod
    def keys_of(self, place: str) -> list[str]:
        """Return the names of what is stored in `obsm` or `varm`."""

    def match_genes(self, table: GeneTable) -> GeneColumns:
        """Match the genes of this source against a table; done once per table."""
        if table.fingerprint not in self._matched:
            self._matched[table.fingerprint] = table.resolve(self.gene_names, source=self.gene_names_from, where=self.name)
        return self._matched[table.fingerprint]

    @cached_property
    def _matched(self) -> dict[str, GeneColumns]:
        return {}

    @property
    def cell_ids(self) -> list[str]:
        """All cell ids, in order."""
        return self.read_obs([]).index.tolist()

    @cached_property
    def passing(self) -> np.ndarray | None:
        """Bool of shape `(n,)` from `obs['filter_pass']`, or None where there is no such column.

        Raises:
            CellFileError: if it holds anything but 0, 1, True and False.
        """
        if "filter_pass" not in self.obs_columns:
            return None
        values = self.read_obs(["filter_pass"])["filter_pass"]
        try:
            numbers = pd.to_numeric(values.astype(object).map(lambda v: {"True": 1, "False": 0}.get(v, v)), errors="raise").to_numpy(dtype=float)
        except (ValueError, TypeError):
            numbers = np.full(len(values), np.nan)
        bad = ~np.isin(numbers, (0, 1))
        if bad.any():
            examples = ", ".join(repr(v) for v in pd.unique(values[bad].astype(object))[:3])
            msg = f"{self.name}: obs['filter_pass'] holds {int(bad.sum()):,} values that are neither 0 nor 1 ({examples}). Expected 1 for cells to keep and 0 for cells to leave out; mend or rename the column."
            raise CellFileError(msg)
        return numbers == 1

    def totals(self) -> tuple[np.ndarray, str]:
        """Return counts per cell over all genes and where they come from.

        The column named, or `n_counts` or `total_counts`, where every value is at least the sum of its cell; else the sums.
        Takes a pass over the counts.
        """
        sums = np.zeros(self.n_cells)
        for block in self.iter_blocks():
            sums[block.start : block.start + block.counts_ng.shape[0]] = np.asarray(block.counts_ng.sum(axis=1)).ravel()
        named = self.options.total_counts
        if named is not None and named not in self.obs_columns:
            msg = f"{self.name}: obs has no column {named!r}. Found: {', '.join(self.obs_columns)}."
            raise ColumnNotFoundError(msg)
        for column in (named,) if named is not None else TOTAL_COLUMNS:
            if column in self.obs_columns:
                values = pd.to_numeric(self.read_obs([column])[column], errors="coerce").to_numpy(dtype=np.float64)
                # float32 sums of large cells may lie one rounding above the column.
                n_short = int((~(values >= sums * (1 - 1e-6))).sum())
                if n_short == 0:
                    return values, f"obs[{column!r}]"
                if named is not None:
                    msg = f"{self.name}: obs[{column!r}] is below the counts of {n_short:,} of {self.n_cells:,} cells, so it belongs to another matrix. Leave it out to use the sums."
                    raise CellFileError(msg)
                logger.warning("%s: obs[%r] is below the counts of %s cells and is not used; totals are the sums.", self.name, column, f"{n_short:,}")
        return sums, "sum of the counts"

    def _check_block(self, values: np.ndarray, start: int, stop: int) -> None:
        check_counts(values, f"{self.name}: {self.counts} (cells {start:,} to {stop - 1:,})")


class AnnDataSource(CellSource):
    """An AnnData in memory, or a view of one."""

    def __init__(self, adata: Any, options: SourceOptions) -> None:
        self.name, self.options, self._adata = "AnnData", options, adata
        self.n_cells = adata.n_obs
        matrices = {} if adata.X is None else {"X": adata.X}
        if adata.raw is not None:
            matrices["raw.X"] = adata.raw.X
        matrices.update(adata.layers)
        samples = {n: partial(stored_values, m) for n, m in matrices.items()}
        self.counts = choose_counts(samples, options.counts_layer, where=self.name)
        matrix = matrices[self.counts]
        # One conversion, not one a block.
        self._matrix = matrix.tocsr() if sp.issparse(matrix) and matrix.format != "csr" else matrix
        var = adata.raw.var if self.counts == "raw.X" else adata.var
        columns = {c: var[c].astype(str).tolist() for c in var.columns if _is_text(var[c])}
        self.gene_names, self.gene_names_from = choose_gene_ids(
            columns, [str(v) for v in var.index], options.gene_ids, index_name=var.index.name, where=self.name
        )

    def keys_of(self, place: str) -> list[str]:
        """Return the names of what is stored in `obsm` or `varm`."""
        return list(getattr(self._adata, place).keys())

    @property
    def obs_columns(self) -> list[str]:
        """Names of the obs columns, in order."""
        return [str(c) for c in self._adata.obs.columns]

    def read_obs(self, columns: Sequence[str], start: int = 0, stop: int | None = None) -> pd.DataFrame:
        """Return obs columns of some cells."""
        place_of = {str(c): i for i, c in enumerate(self._adata.obs.columns)}
        missing = [c for c in columns if c not in place_of]
        if missing:
            msg = f"{self.name}: obs has no column {', '.join(map(repr, missing))}. Found: {', '.join(place_of) or 'none'}."
            raise ColumnNotFoundError(msg)
        frame = self._adata.obs.iloc[start:stop, [place_of[c] for c in columns]].copy()
        frame.columns = pd.Index(list(columns), dtype=object)
        frame.index = frame.index.astype(str)
        return frame

    def iter_blocks(self, start: int = 0, stop: int | None = None) -> Iterator[CellBlock]:
        """Yield the cells in order."""
        stop = self.n_cells if stop is None else stop
        if sp.issparse(self._matrix):
            bounds = _bounds_by_values(np.asarray(self._matrix.indptr), start, stop)
        else:
            bounds = _bounds_by_cells(max(1, BLOCK_VALUES * 8 // max(1, self._matrix.shape[1])), start, stop)
        for first, last in bounds:
            rows = self._matrix[first:last]
            if not sp.issparse(rows):
                rows = np.asarray(rows)
            counts = sp.csr_array(rows)
            self._check_block(counts.data, first, last)
            yield CellBlock(counts, first)


class H5adSource(CellSource):
    """An .h5ad file, read a block at a time."""

    def __init__(self, path: Path, options: SourceOptions) -> None:
        self.path, self.name, self.options = path, str(path), options
        self._transposed: CsrOnDisk | None = None
        with open_h5(path) as file:
            for key in ("obs", "var"):
                if key not in file:
                    msg = f"{path} is an HDF5 file without {key!r} (it holds: {', '.join(file) or 'nothing'}), so it is not an .h5ad file. Write one with `adata.write_h5ad(...)`."
                    raise CellFileError(msg)
                require_frame(file[key], self.name)
            self.n_cells = frame_length(file["obs"])
            self._obs_columns = frame_columns(file["obs"])
            matrices = {}
            if "X" in file:
                matrices["X"] = "X"
            if "raw" in file and "X" in file["raw"]:
                matrices["raw.X"] = "raw/X"
            matrices |= {name: f"layers/{name}" for name in file.get("layers", ())}
            samples = {n: lambda key=key: self._sample(file[key]) for n, key in matrices.items()}
            self.counts = choose_counts(samples, options.counts_layer, where=self.name)
            self._key = matrices[self.counts]
            self._layout, shape = _layout_of(file[self._key], self.name)
            var = file["raw/var"] if self.counts == "raw.X" else file["var"]
            self.gene_names, self.gene_names_from = self._read_gene_names(var)
            if shape != (self.n_cells, len(self.gene_names)):
                msg = f"{path}: {self.counts} has shape {shape}, but obs has {self.n_cells:,} rows and var {len(self.gene_names):,}. The file is damaged; write it again."
                raise CellFileError(msg)

            if self._layout != "dense":
                _require_sound_index(file[self._key], shape, self._layout, f"{path}: {self.counts}")

    def _read_gene_names(self, var: h5py.Group) -> tuple[list[str], str]:
        frame = read_frame(var, text_columns(var), where=self.name)
        columns = {name: frame[name].astype(str).tolist() for name in frame.columns}
        return choose_gene_ids(columns, frame.index.tolist(), self.options.gene_ids, index_name=str(var.attrs["_index"]), where=self.name)

    def _sample(self, matrix: h5py.Group | h5py.Dataset) -> np.ndarray:
        """Return values from the beginning, the middle and the end."""
        values = matrix if isinstance(matrix, h5py.Dataset) else matrix["data"]
        size = max(1, SAMPLE_VALUES // 4 // int(np.prod(values.shape[1:], dtype=int) or 1))
        starts = sorted({max(0, min(start, len(values) - size)) for start in (0, len(values) // 3, 2 * len(values) // 3, len(values))})
        return np.concatenate([values[start : start + size].ravel() for start in starts])

    def keys_of(self, place: str) -> list[str]:
        """Return the names of what is stored in `obsm` or `varm`."""
        with open_h5(self.path) as file:
            return list(file.get(place, ()))

    @property
    def layout(self) -> str:
        """How the counts lie in the file: `csr`, `csc` or `dense`."""
        return self._layout

    @property
    def obs_columns(self) -> list[str]:
        """Names of the obs columns, in order."""
        return self._obs_columns

    def read_obs(self, columns: Sequence[str], start: int = 0, stop: int | None = None) -> pd.DataFrame:
        """Return obs columns of some cells."""
        with open_h5(self.path) as file:
            return read_frame(file["obs"], columns, start, stop, where=self.name)

    def prepare(self, work_dir: Path | None = None) -> None:
        """Transpose a CSC file to disk once, for any number of passes over any of its cells; other layouts need nothing.

        Args:
            work_dir (`Path`, *optional*): a folder the caller removes; otherwise a temporary one that goes with this object.
        """
        if self._layout != "csc" or self._transposed is not None:
            return
        if work_dir is None:
            work_dir = Path(tempfile.mkdtemp(prefix="geneformer-hf-"))
            weakref.finalize(self, shutil.rmtree, work_dir, ignore_errors=True)
        with open_h5(self.path) as file:
            self._transposed = transpose_to_disk(file[self._key], self.n_cells, work_dir)

    def iter_blocks(self, start: int = 0, stop: int | None = None) -> Iterator[CellBlock]:
        """Yield the cells in order."""
        stop = self.n_cells if stop is None else stop
        self.prepare()
        with open_h5(self.path) as file:
            rows = self._iter_dense(file[self._key], start, stop) if self._layout == "dense" else self._iter_sparse(file[self._key], start, stop)
            for counts, first in rows:
                self._check_block(counts.data, first, first + counts.shape[0])
                yield CellBlock(counts, first)

    def _iter_dense(self, matrix: h5py.Dataset, start: int, stop: int) -> Iterator[tuple[sp.csr_array, int]]:
        for first, last in _bounds_by_cells(max(1, BLOCK_VALUES * 8 // max(1, matrix.shape[1])), start, stop):
            rows = matrix[first:last]
            # scipy knows no half precision.
            yield sp.csr_array(rows.astype(np.float32) if rows.dtype == np.float16 else rows), first

    def _iter_sparse(self, matrix: h5py.Group, start: int, stop: int) -> Iterator[tuple[sp.csr_array, int]]:
        store = self._transposed if self._transposed is not None else matrix
        indptr = store.indptr if isinstance(store, CsrOnDisk) else matrix["indptr"][:]
        for first, last in _bounds_by_values(indptr, start, stop):
            begin, end = int(indptr[first]), int(indptr[last])
            if isinstance(store, CsrOnDisk):
                data, indices = store.read(begin, end)
            else:
                data, indices = matrix["data"][begin:end], matrix["indices"][begin:end]
            if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self.gene_names):
                msg = f"{self.name}: {self.counts} points outside its {len(self.gene_names):,} genes (cells {first:,} to {last - 1:,}). The file is damaged; write it again."
                raise CellFileError(msg)
            yield sp.csr_array((data, indices, indptr[first : last + 1] - begin), shape=(last - first, len(self.gene_names))), first


def open_cells(cells: Any, *, gene_ids: str | None = None, counts_layer: str | None = None, total_counts: str | None = None) -> CellSource:
    """Open an .h5ad file or an AnnData.

    Args:
        cells (`str`, `Path` or `AnnData`).
        gene_ids, counts_layer, total_counts (`str`, *optional*): see `SourceOptions`.

    Raises:
        CellFileError, NotRawCountsError, GeneIdError, ColumnNotFoundError
    """
    options = SourceOptions(gene_ids, counts_layer, total_counts)
    if isinstance(cells, (str, Path)):
        return H5adSource(Path(cells), options)
    if all(hasattr(cells, part) for part in ("obs", "var", "X")):
        return AnnDataSource(cells, options)
    msg = f"Expected an AnnData or the path of an .h5ad file, got {type(cells).__name__}."
    raise CellFileError(msg)


def read_ahead(blocks: Iterator[CellBlock]) -> Iterator[CellBlock]:
    """Yield the same blocks, reading the next one in a thread while the caller works on this one."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        coming = reader.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = reader.submit(next, blocks, None)
            yield block


@contextmanager
def open_h5(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading; what is wrong with a file that does not open, or breaks while it is read, is said.

    Raises:
        CellFileError
    """
    if not path.is_file():
        msg = f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; expected an .h5ad file."
        raise CellFileError(msg)
    size = path.stat().st_size
    if size == 0:
        msg = f"{path} is empty (0 bytes); expected an .h5ad file. Write or download it again."
        raise CellFileError(msg)
    if is_lfs_pointer(path):
        msg = f"{path} is a git-lfs pointer of {size} bytes, not the file itself. Run `git lfs pull`."
        raise CellFileError(msg)
    if not h5py.is_hdf5(path):
        msg = f"{path} ({size:,} bytes) is not an HDF5 file, so not an .h5ad file either. Write it with `adata.write_h5ad(...)`."
        raise CellFileError(msg)
    try:
        # Chunks are read in order; the larger cache keeps one from being unpacked for each of two neighbouring blocks.
        file = h5py.File(path, "r", rdcc_nbytes=16 << 20)
    except OSError as error:
        msg = f"{path} ({size:,} bytes) cannot be opened: {error}. It may be cut off; write or download it again."
        raise CellFileError(msg) from error
    with file:
        try:
            yield file
        except OSError as error:
            msg = f"{path} ({size:,} bytes) broke off while it was read: {error}. It may be damaged or cut off; write or download it again."
            raise CellFileError(msg) from error


def _layout_of(matrix: h5py.Group | h5py.Dataset, where: str) -> tuple[str, tuple[int, int]]:
    if isinstance(matrix, h5py.Dataset):
        return "dense", matrix.shape
    encoding = matrix.attrs.get("encoding-type") or f"{matrix.attrs.get('h5sparse_format', '')}_matrix"
    shape = matrix.attrs.get("shape", matrix.attrs.get("h5sparse_shape"))
    if encoding not in ("csr_matrix", "csc_matrix") or shape is None:
        msg = f"{where}: {matrix.name} is encoded as {encoding!r}; expected a dense, CSR or CSC matrix."
        raise CellFileError(msg)
    return encoding[:3], (int(shape[0]), int(shape[1]))


def _require_sound_index(matrix: h5py.Group, shape: tuple[int, int], layout: str, where: str) -> None:
    """Raise unless the index pointer of a sparse matrix divides its entries into its rows (CSR) or columns (CSC)."""
    indptr, n = matrix["indptr"][:], shape[0] if layout == "csr" else shape[1]
    n_data, n_indices = len(matrix["data"]), len(matrix["indices"])
    sound = len(indptr) == n + 1 and indptr[0] == 0 and indptr[-1] == n_data == n_indices and bool((np.diff(indptr.astype(np.int64)) >= 0).all())
    if not sound:
        msg = f"{where}: its index does not fit its entries ({len(indptr):,} pointers for {n:,} {'cells' if layout == 'csr' else 'genes'}, {n_data:,} values, {n_indices:,} indices). The file is damaged; write it again."
        raise CellFileError(msg)


def _bounds_by_values(indptr: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut rows into runs of at most BLOCK_VALUES stored values and BLOCK_CELLS cells; a run has at least one cell."""
    while start < stop:
        last = int(np.searchsorted(indptr, indptr[start] + BLOCK_VALUES, side="right")) - 1
        last = min(max(last, start + 1), start + BLOCK_CELLS, stop)
        yield start, last
        start = last


def _bounds_by_cells(step: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, min(step, BLOCK_CELLS)):
        yield first, min(first + min(step, BLOCK_CELLS), stop)


def _is_text(column: pd.Series) -> bool:
    values = column.cat.categories if isinstance(column.dtype, pd.CategoricalDtype) else column
    return pd.api.types.is_string_dtype(values) or values.dtype == object
