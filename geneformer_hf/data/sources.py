"""What a source of cells is, whatever file it comes from: its genes, its counts in blocks of cells, its obs columns."""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp

from ..anndata_objects import matrices_of, of_rna, require_distinct_columns, rows_of, samples_of, sound_matrix, text_columns, texts
from ..errors import CellFileError, ColumnNotFoundError
from ..gene_ids import LEAST_OF_CELL, GeneFeatures
from ..genes import GeneColumns, GeneTable
from ..ranking import check_counts, choose_counts
from . import matrices
from .frames import Frame
from .matrices import Layout
from .store_checks import require_memory
from .transpose import CsrOnDisk, transpose_to_disk

logger = logging.getLogger(__name__)

TOTAL_COLUMNS = ("n_counts", "total_counts")
CELL_BYTES = 16
"""Memory of a cell in what is held of all cells: where its counts begin, and whether it passes."""


@dataclass(frozen=True)
class CellBlock:
    """Some consecutive cells of a source."""

    counts_ng: sp.csr_array
    """Raw counts, checked, of shape `(n, g)`; stored zeros and unsorted columns may occur."""
    start: int
    """Position of the first cell in its source."""
    genome_fraction_n: np.ndarray | None = None
    """Fraction of the counts of each cell in the genome that is read; None for a source of one genome."""


@dataclass(frozen=True)
class SourceOptions:
    """What the user says about a file instead of leaving it to the rules."""

    gene_ids: str | None = None
    """Column of var that names the genes, or `index`."""
    counts_layer: str | None = None
    """Layer that holds the raw counts, or `X` or `raw.X`."""
    total_counts: str | None = None
    """Column of obs that holds the counts per cell over all genes."""
    genome: str | None = None
    """Genome to read of a file that mixes several: its name there (`hg19`), or a species (`human`)."""


class CellSource(ABC):
    """Cells of one file or one AnnData."""

    name: str
    """The path, or `AnnData`."""
    n_cells: int
    counts: str
    """The matrix that holds the raw counts: `X`, `raw.X`, a layer, or `matrix` in files that have one only."""
    gene_names: list[str]
    """Names of the columns that are genes; antibodies, guides and the like are left out."""
    gene_names_from: str
    gene_symbols: list[str]
    """What else the genes are called: a column of symbols, or the index of var."""
    n_columns: int
    """Columns of the count matrix, genes or not."""
    features: GeneFeatures
    """The table of features: which are genes, and what names them."""
    gene_columns: np.ndarray | None
    """int64 of shape `(g,)`: which columns of the matrix are genes; None if all are."""
    options: SourceOptions
    layout: Layout | Literal["memory"]
    """How the counts lie in the file."""
    provenance: dict[str, Any] | None = None
    """Where the cells are from, for those of a database."""

    @property
    def identity(self) -> str | None:
        """All that the cells depend on, as text, for sources that are no file."""
        return None

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

    def read_obsm(self, key: str) -> np.ndarray:
        """Return an embedding that is stored in `obsm`, float32 of shape `(n, e)`.

        Raises:
            ColumnNotFoundError: if there is none of that name.
            CellFileError: if it is no table of numbers with a row for each cell.
        """
        if key not in self.keys_of("obsm"):
            msg = f"{self.name}: obsm has no {key!r}. Found: {', '.join(self.keys_of('obsm')) or 'nothing'}."
            raise ColumnNotFoundError(msg)
        stored = self._stored_obsm(key)
        try:
            vectors = np.asarray(stored.toarray() if sp.issparse(stored) else stored, dtype=np.float32)
        except (TypeError, ValueError) as error:
            msg = f"{self.name}: obsm[{key!r}] holds something else than numbers ({error})."
            raise CellFileError(msg) from error
        if vectors.ndim != 2 or len(vectors) != self.n_cells or not vectors.shape[1]:
            msg = f"{self.name}: obsm[{key!r}] has shape {vectors.shape}; expected a row of numbers for each of {self.n_cells:,} cells."
            raise CellFileError(msg)
        return vectors

    def _stored_obsm(self, key: str) -> Any:
        """Return what is stored in `obsm`; called where it is there."""
        raise NotImplementedError

    @abstractmethod
    def _iter_counts(self, start: int, stop: int) -> Iterator[tuple[sp.csr_array, int]]:
        """Yield the rows of the count matrix in order, each block with the number of its first cell."""

    def iter_blocks(self, start: int = 0, stop: int | None = None) -> Iterator[CellBlock]:
        """Yield the cells from `start` up to `stop` in order, each once, in blocks of bounded size.

        Raises:
            NotRawCountsError: if a block holds anything but raw counts.
        """
        for counts, first in self._iter_counts(start, self.n_cells if stop is None else stop):
            check_counts(counts.data, f"{self.name}: {self.counts} (cells {first:,} to {first + counts.shape[0] - 1:,})")
            of_genes, fractions = self.features.select(counts)
            yield CellBlock(of_genes, first, fractions)

    @property
    def counts_described(self) -> str:
        """Where the counts are, for people."""
        return self.counts if self.counts in ("X", "raw.X", "matrix", "matrix.T") else f"layers[{self.counts!r}]"

    def match_genes(self, table: GeneTable) -> GeneColumns:
        """Match the genes of this source against a table; done once per table."""
        if table.fingerprint not in self._matched:
            self._matched[table.fingerprint] = table.match(self.features, where=self.name)
        return self._matched[table.fingerprint]

    @cached_property
    def genome_fractions(self) -> np.ndarray | None:
        """float32 of shape `(n,)`: fraction of the counts of each cell that is in genes of the genome read; None for a file of one genome.

        Takes a pass over the counts. Cells below one half are read as cells without genes.
        """
        if self.features.other_columns is None:
            return None
        parts = [np.asarray(self.features.genome_fractions(counts)) for counts, _ in self._iter_counts(0, self.n_cells)]
        return np.concatenate([np.zeros(0), *parts]).astype(np.float32)

    def describe_genome(self) -> str | None:
        """Return which cells of a file that mixes genomes are of another one than is read, for people; None where there are none."""
        low = np.flatnonzero(self.genome_fractions < LEAST_OF_CELL) if self.genome_fractions is not None else np.zeros(0, dtype=np.int64)
        if not len(low):
            return None
        ids = self.cell_ids
        names = ", ".join(ids[i] for i in low[:10].tolist()) + (f", and {len(low) - 10:,} more" if len(low) > 10 else "")
        return f"{len(low):,} of {self.n_cells:,} cells have less than half of their counts in genes of {self.features.genome} and are read as cells without genes ({names})"

    def describe_genes(self) -> tuple[str, bool]:
        """Return which features are read as genes and by what name, for people, and whether that was anything but one plain column.

        Takes a pass over the counts of a file that mixes genomes.
        """
        named, of_others = self.features.named(), self.describe_genome()
        is_plain = not (named.n_filled or named.n_inside or named.notes or of_others)
        return "; ".join([named.describe(), *([of_others] if of_others else [])]), is_plain

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
            numbers = pd.to_numeric(values.astype(object).map(lambda v: {"True": 1, "False": 0, "TRUE": 1, "FALSE": 0}.get(v, v)), errors="raise").to_numpy(
                dtype=float
            )
        except (ValueError, TypeError):
            numbers = np.full(len(values), np.nan)
        bad = ~np.isin(numbers, (0, 1))
        if bad.any():
            examples = ", ".join(repr(v) for v in pd.unique(values[bad].astype(object))[:3])
            msg = f"{self.name}: obs['filter_pass'] holds {int(bad.sum()):,} values that are neither 0 nor 1 ({examples}). Expected 1 for cells to keep and 0 for cells to leave out; mend or rename the column."
            raise CellFileError(msg)
        return numbers == 1

    @property
    def totals_candidates(self) -> list[str]:
        """Columns of obs that may hold the counts per cell over all genes: the one named, or `n_counts` and `total_counts`.

        Raises:
            ColumnNotFoundError: if the column named is not there.
        """
        named = self.options.total_counts
        if named is not None and named not in self.obs_columns:
            msg = f"{self.name}: obs has no column {named!r}. Found: {', '.join(self.obs_columns)}."
            raise ColumnNotFoundError(msg)
        return [c for c in ((named,) if named is not None else TOTAL_COLUMNS) if c in self.obs_columns]

    @cached_property
    def totals_from(self) -> str | None:
        """The first of `totals_candidates` that is nowhere below the counts, None where their sums take its place.

        Takes a pass over the counts for every candidate.

        Raises:
            ColumnNotFoundError, CellFileError: if the column named is not there, or below the counts.
        """
        for column in self.totals_candidates:
            n_short = sum(self.short_of(column, block) for block in self.iter_blocks())
            if n_short == 0:
                return column
            self.reject_totals(column, n_short)
        return None

    def short_of(self, column: str, block: CellBlock) -> int:
        """Return how many cells of a block have fewer counts in a column of obs than in the matrix."""
        # float32 sums of large cells may lie one rounding above the column.
        return int((~(self._numbers(column, block) >= sums_of(block) * (1 - 1e-6))).sum())

    def reject_totals(self, column: str, n_short: int) -> None:
        """Say that a column of totals belongs to other counts.

        Raises:
            CellFileError: if the user named it.
        """
        if column == self.options.total_counts:
            msg = f"{self.name}: obs[{column!r}] is below the counts of {n_short:,} of {self.n_cells:,} cells, so it belongs to another matrix. Leave it out to use the sums."
            raise CellFileError(msg)
        logger.warning("%s: obs[%r] is below the counts of %s cells and is not used; totals are the sums.", self.name, column, f"{n_short:,}")

    def totals(self, block: CellBlock) -> np.ndarray:
        """Return the counts per cell over all genes of a block, float64 of shape `(n,)`; see `totals_from`."""
        return sums_of(block) if self.totals_from is None else self._numbers(self.totals_from, block)

    def _numbers(self, column: str, block: CellBlock) -> np.ndarray:
        values = self.read_obs([column], block.start, block.start + block.counts_ng.shape[0])[column]
        return pd.to_numeric(values.astype(object), errors="coerce").to_numpy(dtype=np.float64)

    def _name_genes(self, columns: Mapping[str, Sequence[str]], index: Sequence[str], index_name: str | None) -> None:
        """Decide on the names of the genes and which columns of the matrix they are."""
        require_memory(self.n_cells * CELL_BYTES, f"{self.name}: its index of {self.n_cells:,} cells")
        self.features = GeneFeatures(columns, index, gene_ids=self.options.gene_ids, genome=self.options.genome, index_name=index_name, where=self.name)
        self.n_columns, self.gene_columns = self.features.n_columns, self.features.columns
        named = self.features.named()
        self.gene_names, self.gene_names_from, self.gene_symbols = named.names, named.source, self.features.symbols
        types = self.features.types
        if types is not None and types.unknown:
            shown = ", ".join(f"{kind} ({types.left_out[kind]:,})" for kind in types.unknown)
            logger.warning("%s: features of unknown types are left out, by %s: %s. Genes have the type 'Gene Expression'.", self.name, types.source, shown)


class AnnDataSource(CellSource):
    """An AnnData in memory, or a view of one."""

    layout = "memory"

    def __init__(self, adata: Any, options: SourceOptions) -> None:
        adata = of_rna(adata)
        self.name, self.options, self._adata = "AnnData", options, adata
        self.n_cells = adata.n_obs
        stored = matrices_of(adata)
        self.counts = choose_counts(samples_of(stored), options.counts_layer, where=self.name)
        # One conversion, not one a block.
        self._matrix = sound_matrix(stored[self.counts], f"AnnData: {self.counts_described}")
        var = adata.raw.var if self.counts == "raw.X" else adata.var
        self._name_genes(text_columns(var), texts(var.index), var.index.name)

    def keys_of(self, place: str) -> list[str]:
        """Return the names of what is stored in `obsm` or `varm`."""
        return list(getattr(self._adata, place).keys())

    def _stored_obsm(self, key: str) -> Any:
        return self._adata.obsm[key]

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
        obs = self._adata.obs
        require_distinct_columns(obs, "obs", columns)
        return pd.DataFrame(
            {c: _native(obs.iloc[:, place_of[c]].iloc[start:stop].array) for c in columns}, index=pd.Index(texts(obs.index[start:stop]), dtype=object)
        )

    def _iter_counts(self, start: int, stop: int) -> Iterator[tuple[sp.csr_array, int]]:
        if sp.issparse(self._matrix):
            bounds = matrices.bounds_by_values(np.asarray(self._matrix.indptr).astype(np.int64), start, stop)
        else:
            bounds = matrices.bounds_by_cells(max(1, matrices.BLOCK_VALUES * 8 // max(1, self._matrix.shape[1])), start, stop)
        for first, last in bounds:
            yield rows_of(self._matrix, first, last), first


class FileSource(CellSource):
    """A file or folder of cells, read a block at a time."""

    path: Path
    layout: Layout
    _rows: CsrOnDisk | None = None
    """Rows on disk, for a layout that holds none."""

    @abstractmethod
    def _open(self) -> AbstractContextManager[Any]:
        """Open the file."""

    @abstractmethod
    def _matrix(self, store: Any) -> Any:
        """Return the count matrix as it lies in the open file."""

    @abstractmethod
    def _obs(self, store: Any) -> Frame:
        """Return obs of the open file."""

    def keys_of(self, place: str) -> list[str]:
        """Return the names of what is stored in `obsm` or `varm`: nothing, in files other than anndata's."""
        return []

    @property
    def obs_columns(self) -> list[str]:
        """Names of the obs columns, in order."""
        return self._obs_columns

    @cached_property
    def _obs_columns(self) -> list[str]:
        with self._open() as store:
            return self._obs(store).columns

    def read_obs(self, columns: Sequence[str], start: int = 0, stop: int | None = None) -> pd.DataFrame:
        """Return obs columns of some cells."""
        with self._open() as store:
            return self._obs(store).read(columns, start, stop, where=self.name)

    @property
    def holds_rows(self) -> bool:
        """False for a file whose cells cannot be read one by one; `prepare` writes its rows to disk."""
        return self.layout not in ("csc", "text")

    def prepare(self, work_dir: Path | None = None) -> None:
        """Write the rows of a file that holds none to disk, once, for any number of passes over any of its cells.

        Args:
            work_dir (`Path`, *optional*): a folder the caller removes; otherwise a temporary one that goes with this object.
        """
        if self.holds_rows or self._rows is not None:
            return
        if work_dir is None:
            work_dir = Path(tempfile.mkdtemp(prefix="geneformer-hf-"))
            weakref.finalize(self, shutil.rmtree, work_dir, ignore_errors=True)
        self._rows = self._write_rows(work_dir)

    def write_rows(self, folder: Path) -> None:
        """Write the rows for other processes; the folder is whole or not there."""
        rows = self._write_rows(folder.parent)
        rows.save()
        try:
            rows.folder.rename(folder)
        except OSError:
            # Another process was faster.
            shutil.rmtree(rows.folder, ignore_errors=True)
            if not folder.is_dir():
                raise

    def use_rows(self, folder: Path) -> None:
        """Read the rows that `write_rows` wrote."""
        self._rows = CsrOnDisk.open(folder)

    def _write_rows(self, work_dir: Path) -> CsrOnDisk:
        with self._open() as store:
            return transpose_to_disk(self._matrix(store), self.n_cells, work_dir, where=f"{self.name}: {self.counts}")

    def _iter_counts(self, start: int, stop: int) -> Iterator[tuple[sp.csr_array, int]]:
        self.prepare()
        with self._open() as store:
            matrix = self._rows if self._rows is not None else self._matrix(store)
            yield from matrices.iter_rows(matrix, self.layout, (self.n_cells, self.n_columns), start, stop, where=f"{self.name}: {self.counts}")


def _native(values: Any) -> Any:
    """Return a column in numbers that pandas can take rows of."""
    numbers = np.asarray(values) if isinstance(getattr(values, "dtype", None), np.dtype) and values.dtype.kind in "iuf" else None
    return values if numbers is None or numbers.dtype.isnative else numbers.astype(numbers.dtype.newbyteorder("="))


def sums_of(block: CellBlock) -> np.ndarray:
    """Return the counts per cell of a block, float64 of shape `(n,)`."""
    return np.asarray(block.counts_ng.sum(axis=1, dtype=np.float64)).ravel()
