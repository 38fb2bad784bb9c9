"""`.loom` files: HDF5 with a row a gene and a column a cell (loompy.org, version 2 and 3), read directly."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..errors import CellFileError
from ..ranking import choose_counts
from .frames import ArraysFrame, Frame
from .matrices import sample_of
from .sources import FileSource, SourceOptions
from .stores import open_h5

logger = logging.getLogger(__name__)

CELL_IDS = ("CellID", "obs_names", "cell_id", "barcode")
GENE_INDEX = ("Gene", "var_names", "gene_name")


class LoomSource(FileSource):
    """A `.loom` file: `matrix`, `layers`, `row_attrs` (genes) and `col_attrs` (cells)."""

    layout = "dense by gene"

    def __init__(self, path: Path, options: SourceOptions) -> None:
        self.path, self.name, self.options = path, str(path), options
        with self._open() as store:
            self.n_columns, self.n_cells = map(int, store["matrix"].shape)
            keys = {"X": "matrix"} | {name: f"layers/{name}" for name in store.get("layers", ()) if name != "X"}
            samples = {n: lambda key=key: sample_of(store[key]) for n, key in keys.items()}
            self.counts = choose_counts(samples, options.counts_layer, where=self.name)
            self._key = keys[self.counts]
            if store[self._key].shape != store["matrix"].shape:
                msg = f"{path}: {self._key} has shape {store[self._key].shape}, but matrix {store['matrix'].shape}. The file is damaged; write it again."
                raise CellFileError(msg)
            var = _attributes(store, "row_attrs", "var", self.n_columns, GENE_INDEX, self.name)
            columns = var.text() | ({var.index_name: var.index()} if var.index_name else {})
            self._name_genes(columns, var.index(), var.index_name)
            self._obs(store)
            left_out = [f"{key}/{name}" for key in ("row_attrs", "col_attrs") for name, item in store.get(key, {}).items() if not _is_column(item)]
            if left_out:
                logger.warning("%s: attributes that hold more than one value a row, such as embeddings, are left out: %s.", path, ", ".join(left_out))

    def _open(self) -> AbstractContextManager[Any]:
        return open_h5(self.path)

    def _matrix(self, store: Any) -> Any:
        return store[self._key]

    def _obs(self, store: Any) -> Frame:
        return _attributes(store, "col_attrs", "obs", self.n_cells, CELL_IDS, self.name)


def _attributes(store: h5py.File, key: str, name: str, n_rows: int, index: tuple[str, ...], where: str) -> ArraysFrame:
    """Return row or column attributes; what has more than one number a row, such as an embedding, is no column."""
    arrays = {str(k): v for k, v in store.get(key, {}).items() if _is_column(v)}
    short = {k: len(v) for k, v in arrays.items() if len(v) != n_rows}
    if short:
        column, length = next(iter(short.items()))
        msg = f"{where}: {key}/{column} has {length:,} entries, but the matrix {n_rows:,}. The file is damaged; write it again."
        raise CellFileError(msg)
    return ArraysFrame(name, arrays, n_rows, next((c for c in index if c in arrays and _is_distinct(arrays[c], name)), None))


def _is_column(item: Any) -> bool:
    """Return whether an attribute has one value a row: no table, no fields (compound types)."""
    return isinstance(item, h5py.Dataset) and item.ndim == 1 and item.dtype.names is None


def _is_distinct(array: h5py.Dataset, name: str) -> bool:
    # Symbols repeat, and an index may not; cell ids are kept as they are.
    return name == "obs" or len(np.unique(array[:])) == len(array)
