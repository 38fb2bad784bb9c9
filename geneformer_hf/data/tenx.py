"""What Cell Ranger writes: feature-barcode matrices as `.h5` (version 2 and 3) and as folders of text."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pandas as pd
import scipy.sparse as sp

from ..errors import CellFileError, ColumnNotFoundError, GeneformerError
from ..ranking import check_counts
from .frames import ArraysFrame, Frame
from .matrices import require_sound_index, sample_of
from .sources import FileSource, SourceOptions
from .store_checks import require_memory
from .stores import TEXT_BYTES, is_group, open_h5, read_values
from .transpose import CHUNK_VALUES, CsrOnDisk, new_rows_folder, put, rows_on_disk, running_sum

GENE_ARRAYS = {"id": "gene_ids", "genes": "gene_ids", "name": "gene_symbol", "gene_names": "gene_symbol", "feature_type": "feature_types", "genome": "genome"}
MATRIX = re.compile(r"(?P<prefix>.*)matrix\.mtx(\.gz)?")
TRANSPOSED = "matrix.T"
"""What a user calls the counts of a matrix with a row a cell."""
LINE_BYTES = 1 << 16
HEADER_BYTES = 1 << 20
"""Most text of comments before the size of a Matrix Market file, and slack for every other text."""
ENTRY_BYTES, NAME_BYTES = 128, 4096
"""Most text of one entry of a matrix, and of the names of one gene or cell."""


class TenXFileSource(FileSource):
    """A 10x `.h5`: one sparse matrix by cell; with several genomes (version 2), one group each."""

    layout = "csr"
    counts = "matrix"

    def __init__(self, path: Path, options: SourceOptions) -> None:
        self.path, self.name, self.options = path, str(path), options
        _require_no_layer(options, self.name)
        with self._open() as store:
            groups = tenx_groups(store)
            if len(groups) != 1:
                msg = f"{path} holds {len(groups)} genomes ({', '.join(groups)}), each with its own matrix. Write the one you want with `scanpy.read_10x_h5(path, genome=...)`."
                raise CellFileError(msg)
            self._key = groups[0]
            matrix = store[self._key]
            missing = [k for k in ("data", "indices", "indptr", "barcodes", "shape") if k not in matrix]
            if missing:
                msg = f"{path}: {self._key} lacks {', '.join(missing)}, so it is not a 10x matrix. Write or download the file again."
                raise CellFileError(msg)
            if matrix["shape"].shape != (2,):
                msg = f"{path}: {self._key}/shape has the shape {matrix['shape'].shape}; expected two numbers, genes and cells. The file is damaged; write it again."
                raise CellFileError(msg)
            self.n_columns, self.n_cells = map(int, matrix["shape"][:])
            require_sound_index(matrix, (self.n_cells, self.n_columns), "csr", f"{path}: {self._key}")
            check_counts(sample_of(matrix), f"{path}: {self._key}")
            features = matrix.get("features", matrix)
            columns = {GENE_ARRAYS[k]: read_values(features[k]).tolist() for k in GENE_ARRAYS if k in features and not is_group(features[k])}
            if "gene_ids" not in columns or {len(c) for c in columns.values()} != {self.n_columns} or matrix["barcodes"].shape[0] != self.n_cells:
                msg = f"{path}: {self._key} has shape {self.n_columns:,} x {self.n_cells:,}, which its features and barcodes do not fit. The file is damaged; write it again."
                raise CellFileError(msg)
            self._name_genes(columns, columns["gene_ids"], "gene_ids")

    def _open(self) -> AbstractContextManager[Any]:
        return open_h5(self.path)

    def _matrix(self, store: Any) -> Any:
        return store[self._key]

    def _obs(self, store: Any) -> Frame:
        return ArraysFrame("obs", {"barcodes": store[self._key]["barcodes"]}, self.n_cells, "barcodes")


def tenx_groups(store: Any) -> list[str]:
    """Return the groups of a file that are 10x matrices."""
    return [name for name, item in store.items() if is_group(item) and "barcodes" in item and "indptr" in item]


class TenXFolderSource(FileSource):
    """A 10x folder: `matrix.mtx`, `genes.tsv` or `features.tsv`, `barcodes.tsv`, each plain or `.gz`.

    All may have one prefix, as in GEO (`GSM1_lung_matrix.mtx.gz`), which then goes before the barcodes; of a folder that holds several
    samples so, the path of one matrix names one. The counts `matrix.T` are those of a matrix with a row a cell.

    Text cannot be read from the middle; the rows are written to disk once, in one pass where the entries come cell by cell,
    as Cell Ranger writes them.
    """

    layout = "text"

    def __init__(self, path: Path, options: SourceOptions) -> None:
        self.path, self.name, self.options = path, str(path), options
        self.counts = TRANSPOSED if options.counts_layer == TRANSPOSED else "matrix"
        if self.counts == "matrix":
            _require_no_layer(options, self.name)
        folder, prefix = sample_of_matrix(path)
        self._text = require_part(folder, "matrix.mtx", prefix=prefix)
        features, barcodes = require_part(folder, "features.tsv", "genes.tsv", prefix=prefix), require_part(folder, "barcodes.tsv", prefix=prefix)
        with _open_text(self._text) as text:
            (self.n_columns, self.n_cells, self._n_entries), self._n_header = _read_header(text, self._text)
        if self.counts == TRANSPOSED:
            self.n_columns, self.n_cells = self.n_cells, self.n_columns
        # One line more for a header; either way round, so that a transposed matrix is named as such.
        most = max(self.n_columns, self.n_cells) + 1
        rows = _read_table(features, most)
        self._barcodes = [row[0] for row in _read_table(barcodes, most)]
        if self._barcodes[:1] == ["barcode"]:
            # A header line, which Cell Ranger does not write and others do.
            del self._barcodes[0]
        if len(rows) == self.n_columns + 1:
            del rows[0]
        if (len(rows), len(self._barcodes)) != (self.n_columns, self.n_cells):
            if (len(rows), len(self._barcodes)) == (self.n_cells, self.n_columns):
                turned, remedy = (
                    ("cells x genes", f"read it with `counts_layer={TRANSPOSED!r}` (`--counts-layer {TRANSPOSED}`)")
                    if self.counts == "matrix"
                    else ("genes x cells", "leave `counts_layer` out")
                )
                msg = f"{path}: {self._text.name} is transposed: it lies as {turned}, by the {len(rows):,} lines of {features.name} and {len(self._barcodes):,} of {barcodes.name}. To use it, {remedy}."
                raise CellFileError(msg)
            msg = f"{path}: matrix.mtx has {self.n_columns:,} genes and {self.n_cells:,} cells, but {features.name} {len(rows):,} lines and {barcodes.name} {len(self._barcodes):,}. The files belong to different matrices, or one is cut off."
            raise CellFileError(msg)
        # Samples have barcodes in common.
        self._barcodes = [f"{prefix}{barcode}" for barcode in self._barcodes]
        names = ("gene_ids", "gene_symbol", "feature_types")
        width = min((len(row) for row in rows), default=1)
        columns = {name: [row[i] for row in rows] for i, name in enumerate(names[:width])}
        self._name_genes(columns, columns["gene_ids"], "gene_ids")

    @contextmanager
    def _open(self) -> Iterator[None]:
        yield None

    def _matrix(self, store: Any) -> Any:
        return self._rows

    def _obs(self, store: Any) -> Frame:
        return ArraysFrame("obs", {"barcodes": np.array(self._barcodes, dtype=object)}, self.n_cells, "barcodes")

    def _write_rows(self, work_dir: Path) -> CsrOnDisk:
        folder = new_rows_folder(work_dir)
        try:
            return self._spool(folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _spool(self, folder: Path) -> CsrOnDisk:
        row_counts, in_order, last, n_read = np.zeros(self.n_cells, dtype=np.int64), True, 0, 0
        with (folder / "data").open("wb") as data, (folder / "indices").open("wb") as indices, (folder / "cells").open("wb") as cells:
            for genes, rows, values in self._entries():
                n_read += len(rows)
                in_order = in_order and last <= int(rows[0]) and bool((np.diff(rows) >= 0).all())
                last = int(rows[-1])
                row_counts += np.bincount(rows, minlength=self.n_cells)
                for file, array in ((data, values), (indices, genes), (cells, rows)):
                    put(file, array)
        if n_read != self._n_entries:
            msg = f"{self._text}: {n_read:,} entries, but its header says {self._n_entries:,}. It is cut off; write or download it again."
            raise CellFileError(msg)
        if in_order:
            (folder / "cells").unlink()
            return CsrOnDisk(folder, running_sum(row_counts), np.dtype(np.float64))
        done = rows_on_disk(self._spooled(folder), row_counts, self.n_columns, np.dtype(np.float64), folder.parent)
        shutil.rmtree(folder)
        return done

    def _entries(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield gene, cell and value of some entries at a time, checked, counted from 0."""
        try:
            with (
                _open_bytes(self._text) as raw,
                pd.read_csv(
                    BoundedReader(raw, self._text, HEADER_BYTES + self._n_entries * ENTRY_BYTES), sep=r"\s+", header=None, skiprows=self._n_header, names=[*(("gene", "cell") if self.counts == "matrix" else ("cell", "gene")), "value", "more"], comment="%",
                    dtype={"gene": np.int64, "cell": np.int64, "value": np.float64, "more": object}, chunksize=max(1, CHUNK_VALUES // 4), engine="c", skip_blank_lines=True,
                ) as parts,
            ):  # fmt: skip
                for part in parts:
                    if part["more"].notna().any():
                        msg = f"{self._text}: lines have more than three fields (for instance {' '.join(map(str, part[part['more'].notna()].iloc[0]))}); expected gene, cell and count."
                        raise CellFileError(msg)
                    if len(part):
                        yield self._checked(*(part[c].to_numpy() for c in ("gene", "cell", "value")))
        except (ValueError, OverflowError, EOFError, OSError, zlib.error) as error:
            if isinstance(error, GeneformerError):
                raise
            msg = f"{self._text} broke off while it was read: {error}. It may be damaged or cut off; write or download it again."
            raise CellFileError(msg) from error

    def _checked(self, genes: np.ndarray, cells: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if genes.min() < 1 or genes.max() > self.n_columns or cells.min() < 1 or cells.max() > self.n_cells:
            msg = f"{self._text}: points outside its {self.n_columns:,} genes and {self.n_cells:,} cells (gene {genes.min()} to {genes.max()}, cell {cells.min()} to {cells.max()}). The file is damaged; write it again."
            raise CellFileError(msg)
        check_counts(values, str(self._text))
        return (genes - 1).astype(np.int32), (cells - 1).astype(np.int32), values

    def _spooled(self, folder: Path) -> Iterator[tuple[sp.csr_array, int]]:
        for begin in range(0, self._n_entries, CHUNK_VALUES):
            n = min(CHUNK_VALUES, self._n_entries - begin)
            values, genes, cells = (
                np.fromfile(folder / name, kind, n, offset=begin * np.dtype(kind).itemsize)
                for name, kind in (("data", np.float64), ("indices", np.int32), ("cells", np.int32))
            )
            yield sp.coo_array((values, (cells, genes)), shape=(self.n_cells, self.n_columns)).tocsr(), 0


def is_tenx_folder(path: Path) -> bool:
    """Return True for a folder with one matrix of 10x: `matrix.mtx`, plain or `.gz`, or one with a prefix."""
    prefixes = prefixes_in(path)
    return "" in prefixes or len(prefixes) == 1


def prefixes_in(folder: Path) -> list[str]:
    """Return what goes before `matrix.mtx` in the names of files in a folder."""
    return sorted({match["prefix"] for path in folder.iterdir() if (match := MATRIX.fullmatch(path.name)) and path.is_file()})


def is_tenx_matrix(path: Path) -> bool:
    """Return True for the matrix of a 10x folder."""
    return MATRIX.fullmatch(path.name) is not None and path.is_file()


def sample_of_matrix(path: Path) -> tuple[Path, str]:
    """Return the folder of a sample and what goes before the names of its files, given the folder or its matrix."""
    if is_tenx_matrix(path):
        return path.parent, MATRIX.fullmatch(path.name)["prefix"]  # type: ignore[index]
    prefixes = prefixes_in(path)
    return path, "" if "" in prefixes or not prefixes else prefixes[0]


def parts_of_sample(path: Path) -> list[Path]:
    """Return the files of one of several samples in a folder, given its matrix."""
    folder, prefix = sample_of_matrix(path)
    return [require_part(folder, *names, prefix=prefix) for names in (("matrix.mtx",), ("features.tsv", "genes.tsv"), ("barcodes.tsv",))]


def require_part(folder: Path, *names: str, prefix: str = "") -> Path:
    """Return one of the files of a 10x folder.

    Raises:
        CellFileError
    """
    for name in names:
        for path in (folder / f"{prefix}{name}", folder / f"{prefix}{name}.gz"):
            if path.is_file():
                return path
    msg = f"{folder} has no {' or '.join(prefix + name for name in names)}, plain or .gz; expected matrix.mtx, features.tsv (or genes.tsv) and barcodes.tsv."
    raise CellFileError(msg)


def _require_no_layer(options: SourceOptions, name: str) -> None:
    if options.counts_layer not in (None, "X", "matrix"):
        msg = f"{name}: a 10x matrix has no layer {options.counts_layer!r}. Leave the option out."
        raise ColumnNotFoundError(msg)


class BoundedReader(io.RawIOBase):
    """Bytes of a text, refused where there are more than its header announces, or a line without end.

    A small gzip file can stand for more text than memory holds.
    """

    def __init__(self, raw: Any, path: Path, most_bytes: int) -> None:
        self._raw, self._path, self._left, self._most, self._line = raw, path, most_bytes, most_bytes, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read some bytes.

        Raises:
            CellFileError
        """
        content = self._raw.read(min(len(buffer), LINE_BYTES))
        self._left -= len(content)
        end = content.rfind(b"\n")
        self._line = self._line + len(content) if end < 0 else len(content) - end
        if self._left < 0 or self._line > LINE_BYTES:
            found = f"a line of more than {LINE_BYTES:,} bytes" if self._left >= 0 else f"more than {self._most:,} bytes of text"
            msg = f"{self._path} unpacks to {found}, which does not fit the size in its header. It is damaged, or was made to fill memory; write or download it again."
            raise CellFileError(msg)
        buffer[: len(content)] = content
        return len(content)


@contextmanager
def _open_bytes(path: Path) -> Iterator[Any]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as raw:
        yield raw


@contextmanager
def _open_text(path: Path, most_bytes: int | None = None) -> Iterator[TextIO]:
    try:
        with _open_bytes(path) as raw:
            bounded = BoundedReader(raw, path, HEADER_BYTES if most_bytes is None else most_bytes)
            yield io.TextIOWrapper(io.BufferedReader(bounded), encoding="utf-8", errors="backslashreplace", newline="")
    except (OSError, EOFError, zlib.error) as error:
        msg = f"{path} cannot be read: {error}. It may be damaged or cut off; write or download it again."
        raise CellFileError(msg) from error


def _read_table(path: Path, most_lines: int) -> list[list[str]]:
    require_memory(most_lines * TEXT_BYTES, f"{path.name}, by the size in matrix.mtx,")
    with _open_text(path, HEADER_BYTES + most_lines * NAME_BYTES) as text:
        # Files of Cell Ranger have up to six columns.
        rows = ([_unquoted(field) for field in row[:6]] for row in csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE) if row)
        # One line more than fits, so that the caller sees that there are more.
        return list(itertools.islice(rows, most_lines + 1))


def _unquoted(field: str) -> str:
    """Return a field without the quotes around all of it, which R writes."""
    return field[1:-1].replace('""', '"') if len(field) > 1 and field[0] == field[-1] == '"' else field


def _read_header(text: TextIO, path: Path) -> tuple[tuple[int, int, int], int]:
    """Return genes, cells and entries of a Matrix Market file, and the lines its header takes."""
    first = text.readline().lower()
    if not first.startswith("%%matrixmarket matrix coordinate") or "general" not in first or "complex" in first or "pattern" in first:
        msg = f"{path} begins with {first[:60]!r}; expected '%%MatrixMarket matrix coordinate integer general' (or real)."
        raise CellFileError(msg)
    for number, line in enumerate(text, start=2):
        if line.startswith("%") or not line.strip():
            continue
        try:
            n_genes, n_cells, n_entries = map(int, line.split())
        except ValueError:
            break
        if min(n_genes, n_cells, n_entries) < 0 or n_entries > n_genes * n_cells:
            msg = f"{path} declares {n_genes:,} genes, {n_cells:,} cells and {n_entries:,} entries, more than they hold or fewer than none. It is damaged; write or download it again."
            raise CellFileError(msg)
        return (n_genes, n_cells, n_entries), number
    msg = f"{path} has no line of genes, cells and entries after its comments. It may be cut off; write or download it again."
    raise CellFileError(msg)
