"""bionemo-scdl archives: memory-mapped rows of counts, read and written through the package's own classes.

What is known to go wrong in bionemo-scdl 0.1.3 is looked for before a cell is read: an archive that was cast or joined after it was opened again keeps
the header it had, and reads back wrong without a word.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ..errors import CellFileError, ColumnNotFoundError, GeneformerError, MissingExtraError, NotRawCountsError
from ..input_files import read_json, read_json_object
from ..outputs import new_folder
from ..pickles import require_plain_objects
from ..ranking import check_counts
from .frames import ArraysFrame, Frame
from .matrices import require_sound_index, sample_of
from .sources import CellSource, FileSource, SourceOptions
from .store_checks import files_of

PARTS = ("metadata.json", "data.npy", "col_ptr.npy", "row_ptr.npy")
CELL_IDS = ("obs_feature_id", "_index", "index", "cell_id", "barcode")
GENE_INDEX = ("var_feature_id", "feature_id", "_index", "index")
EXACT_IN_SINGLE = 1 << 24
"""Whole numbers beyond that are not exact in single precision."""


def is_scdl_archive(path: Path) -> bool:
    """Return True for the folder of an archive."""
    return all((path / part).is_file() for part in PARTS)


def scdl_dataset(**arguments: Any) -> Any:
    """Open or make an archive with bionemo-scdl, or say how to get it.

    Raises:
        MissingExtraError
    """
    try:
        from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset
    except ModuleNotFoundError as error:
        msg = "scDL archives need the package bionemo-scdl. Install it with `pip install 'geneformer-hf[scdl]'`."
        raise MissingExtraError(msg) from error
    with warnings.catch_warnings():
        # A missing header is looked at by ourselves.
        warnings.simplefilter("ignore")
        return SingleCellMemMapDataset(**arguments)


class ScdlSource(FileSource):
    """The folder of an archive of cells with one set of genes."""

    layout = "csr"
    counts = "X"
    _store: Any = None

    def __init__(self, path: Path, options: SourceOptions) -> None:
        self.path, self.name, self.options = path, str(path), options
        if options.counts_layer not in (None, "X"):
            msg = f"{path} is an scDL archive, which has one matrix and no layer {options.counts_layer!r}."
            raise ColumnNotFoundError(msg)
        with self._open() as store:
            self.n_cells = len(store.row_index) - 1
            genes = self._genes(store)
            self.n_columns = len(next(iter(genes.values()), ()))
            self._require_whole(store)
            sample = sample_of(self._matrix(store))
            self._require_not_recast(sample)
            try:
                check_counts(sample, self.name)
            except NotRawCountsError as error:
                msg = f"{error} An archive that was cast (cast_data_to_dtype) after it was opened again reads back as other numbers, too: write it anew from its .h5ad."
                raise NotRawCountsError(msg) from None
        index = next((name for name in GENE_INDEX if name in genes), next(iter(genes)))
        self._name_genes(genes, genes[index], index)

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            if self._store is None:
                for file in files_of(self.path):
                    # bionemo-scdl lets numpy unpickle labels.npy, and trusts the sizes that headers declare.
                    if file.name == "labels.npy" or (file.suffix == ".npy" and _begins_as_npy(file)):
                        require_plain_objects(file)
                    elif file.name == "metadata.json":
                        read_json_object(file)
                    elif file.suffix == ".json":
                        read_json(file)
                # Opening reads all of obs; once is enough.
                self._store = scdl_dataset(data_path=str(self.path))
            yield self._store
        except PermissionError as error:
            msg = f"{self.path}: bionemo-scdl opens archives for writing, and this one cannot be written ({error.strerror}). Copy it to a place of your own."
            raise CellFileError(msg) from error
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            if isinstance(error, GeneformerError):
                raise
            msg = f"{self.path} cannot be read as an scDL archive: {type(error).__name__}: {' '.join(str(error).split())}. It may be damaged, or joined from archives that were opened from disk; write it anew from its .h5ad."
            raise CellFileError(msg) from error

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files to this process."""
        return {name: value for name, value in vars(self).items() if name != "_store"}

    def _matrix(self, store: Any) -> Any:
        return {"data": store.data, "indices": store.col_index, "indptr": store.row_index}

    def _obs(self, store: Any) -> Frame:
        blocks, _ = store.obs_features()[0 : self.n_cells]
        shared = [name for name in (blocks[0] if blocks else ()) if all(name in block for block in blocks)]
        arrays = {str(name): _joined([block[name] for block in blocks]) for name in shared}
        short = next((name for name, values in arrays.items() if len(values) != self.n_cells), None)
        if short is not None:
            msg = f"{self.path}: {short} of its cells has {len(arrays[short]):,} entries for {self.n_cells:,} cells. The archive is damaged; write it anew from its .h5ad."
            raise CellFileError(msg)
        return _ObsFrame("obs", arrays, self.n_cells, next((name for name in CELL_IDS if name in arrays), None))

    def _genes(self, store: Any) -> dict[str, list[str]]:
        """Return what is text about genes.

        Raises:
            CellFileError: if joined archives have other genes.
        """
        tables = sorted((self.path / "var_features").glob("*.parquet")) or sorted((self.path / "features").glob("*.parquet"))
        index = store.var_features()
        if len(index) != 1 or not tables:
            sizes = ", ".join(f"{n:,}" for n in index.column_dims())
            msg = f"{self.path} joins {len(index)} sets of genes ({sizes or 'none'}); expected one. Read the archives it was joined from, each by itself."
            raise CellFileError(msg)
        names = pq.read_schema(tables[0]).names
        values, _ = index.lookup(0, select_features=names)
        text = {name: [str(v) for v in column] for name, column in zip(names, values, strict=True) if np.asarray(column).dtype.kind in "OSU"}
        if not text:
            msg = f"{self.path} does not name its genes: its var_features hold no text ({', '.join(names) or 'nothing'})."
            raise CellFileError(msg)
        return text

    def _require_whole(self, store: Any) -> None:
        """Raise unless sizes on disk, header and pointers agree.

        Raises:
            CellFileError
        """
        n_values, last = len(store.data), int(store.row_index[-1]) if len(store.row_index) else 0
        expected = store.metadata.get("num_rows")
        if n_values != last or len(store.col_index) != last:
            msg = (
                f"{self.path}: its header says {store.data.dtype} values, which makes {n_values:,} values and {len(store.col_index):,} columns for {last:,} entries. It was cast or joined after it was opened "
                "again, which bionemo-scdl 0.1.3 does not write into the header (its README's own example), so it would read back wrong. Write it anew from its .h5ad."
            )
            raise CellFileError(msg)
        if expected != self.n_cells or store.var_features().number_of_rows() != self.n_cells:
            msg = f"{self.path}: {self.n_cells:,} rows of counts, {expected} in its metadata and {store.var_features().number_of_rows():,} in its index of genes. It is damaged, or was joined from archives opened from disk; write it anew."
            raise CellFileError(msg)
        require_sound_index(self._matrix(store), (self.n_cells, self.n_columns), "csr", self.name)

    def _require_not_recast(self, sample: np.ndarray) -> None:
        """Raise where integers are the bits of whole numbers in floating point: a cast that the header does not know of.

        Raises:
            CellFileError
        """
        other = {"uint16": np.float16, "uint32": np.float32, "uint64": np.float64}.get(sample.dtype.name)
        values = sample[sample != 0]
        if other is None or not len(values):
            return
        as_float = values.view(other).astype(np.float64)
        one = np.ones(1, dtype=other).view(sample.dtype)[0]
        if (values >= one).all() and np.isfinite(as_float).all() and (as_float == np.floor(as_float)).all():
            msg = f"{self.path}: its header says {sample.dtype} values, such as {int(values[0]):,}, whose bits are the {np.dtype(other)} number {as_float[0]:g}. It was cast after it was opened again; write it anew from its .h5ad."
            raise CellFileError(msg)


class _ObsFrame(ArraysFrame):
    """Columns in memory, whose missing values are None already."""

    def column(self, name: str, start: int = 0, stop: int | None = None) -> Any:
        """Return some rows of one column."""
        return self._arrays[name][start:stop]


def write_scdl(cells: CellSource, output: str | Path, *, obs: Sequence[str] | None = None, overwrite: bool = False) -> Path:
    """Write cells as an scDL archive, a block at a time, in two passes over the counts.

    Args:
        cells (`CellSource`): as `open_cells` returns it.
        output (`str` or `Path`): new folder.
        obs (`Sequence[str]`, *optional*): columns to keep; all otherwise.

    Returns:
        the folder; float32 values, or unsigned integers where counts are too large for it.

    Raises:
        MissingExtraError, OutputExistsError; CellFileError if there are no counts.
    """
    n_values = largest = 0
    for block in cells.iter_blocks():
        n_values += block.counts_ng.nnz
        largest = max(largest, int(block.counts_ng.data.max(initial=0)))
    if not n_values:
        msg = f"{cells.name} holds no counts, and an archive cannot be empty."
        raise CellFileError(msg)
    with new_folder(output, made_by="write_scdl", overwrite=overwrite) as partial:
        target = partial / "archive"
        kind = "float32" if largest <= EXACT_IN_SINGLE else "uint64"
        store = scdl_dataset(data_path=str(target), num_elements=n_values, num_rows=cells.n_cells, data_dtype=kind)
        store.row_index[0], at = 0, 0
        for block in cells.iter_blocks():
            counts = block.counts_ng
            n = counts.nnz
            store.data[at : at + n], store.col_index[at : at + n] = counts.data, counts.indices
            store.row_index[block.start + 1 : block.start + counts.shape[0] + 1] = at + counts.indptr[1:]
            at += n
        genes = {"feature_id": np.array(cells.gene_names, dtype=object), "feature_name": np.array(cells.gene_symbols, dtype=object)}
        store.var_features().append_features(n_obs=cells.n_cells, features=genes, label=cells.name)
        frame = cells.read_obs(list(obs) if obs is not None else cells.obs_columns)
        columns = {"obs_feature_id": np.array([str(name) for name in frame.index], dtype=object)}
        columns |= {str(name): np.asarray(frame[name].astype(object) if frame[name].dtype == "category" else frame[name]) for name in frame}
        store.obs_features().append_features(features=columns, label=cells.name)
        store.save()
        for part in list(target.iterdir()):
            part.rename(partial / part.name)
        target.rmdir()
    return Path(output)


def _begins_as_npy(path: Path) -> bool:
    """Return whether a file has numpy's header; most of an archive are bare numbers, whatever their names."""
    with path.open("rb") as file:
        return file.read(6) == b"\x93NUMPY"


def _joined(blocks: Sequence[Any]) -> np.ndarray:
    arrays = [np.asarray(block) for block in blocks]
    kinds = {array.dtype.kind for array in arrays}
    return np.concatenate(arrays if len(kinds) == 1 else [array.astype(object) for array in arrays])
