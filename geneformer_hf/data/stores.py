"""HDF5 files and zarr stores, opened for reading and asked the same few questions."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..errors import CellFileError, GeneformerError
from ..input_files import require_regular
from ..pickles import is_lfs_pointer
from .store_checks import check_h5, check_zarr, require_memory

DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    RuntimeError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    zlib.error,
    lzma.LZMAError,
)
"""What reading a damaged store may raise: a missing part, cut-off bytes, numbers that do not fit together."""
ZARR_MARKS = ("zarr.json", ".zgroup")
MOST_EMPTY_CHUNKS = 1000
"""Chunks of a zarr array from which on those that are there are counted."""
MOST_NOT_STORED = 1 << 20
"""Entries of an HDF5 array from which on those that are stored are counted."""
LONGEST_TEXT = 1 << 16
"""Bytes of a text of fixed length, in an array of them."""
TEXT_BYTES = 64
"""Memory of a short text in Python, for the bound on what is read at once."""


def is_zarr(path: Path) -> bool:
    """Return True for a folder that is the root of a zarr store."""
    return any((path / mark).is_file() for mark in ZARR_MARKS)


@contextmanager
def open_store(path: Path) -> Iterator[Any]:
    """Open an HDF5 file or a zarr store for reading; what is wrong with one that does not open, or breaks off, is said.

    Raises:
        CellFileError
    """
    with open_zarr(path) if path.is_dir() else open_h5(path) as store:
        yield store


@contextmanager
def open_zarr(path: Path) -> Iterator[Any]:
    """Open a zarr store, version 2 or 3.

    Raises:
        CellFileError
    """
    if not is_zarr(path):
        msg = f"{path} is a folder without {' or '.join(ZARR_MARKS)}, so it is not a zarr store."
        raise CellFileError(msg)
    check_zarr(path)
    import zarr

    try:
        # Consolidated metadata may be older than the store.
        yield zarr.open_group(str(path), mode="r", use_consolidated=False)
    except DAMAGE as error:
        if isinstance(error, GeneformerError):
            raise
        msg = f"{path} broke off while it was read: {type(error).__name__}: {error}. It may be damaged or incomplete; write or download it again."
        raise CellFileError(msg) from error


@contextmanager
def open_h5(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file.

    Raises:
        CellFileError
    """
    require_regular(path)
    if not path.is_file():
        msg = f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; expected a file of cells."
        raise CellFileError(msg)
    size = path.stat().st_size
    if size == 0:
        msg = f"{path} is empty (0 bytes); expected a file of cells. Write or download it again."
        raise CellFileError(msg)
    if is_lfs_pointer(path):
        msg = f"{path} is a git-lfs pointer of {size} bytes, not the file itself. Run `git lfs pull`."
        raise CellFileError(msg)
    if not h5py.is_hdf5(path):
        msg = f"{path} ({size:,} bytes) is not an HDF5 file, so neither .h5ad nor .loom nor 10x .h5. Files of cells are written with `adata.write_h5ad(...)`; tokens in .parquet are read by `stream_tokens`."
        raise CellFileError(msg)
    try:
        # Chunks are read in order; the larger cache keeps one from being unpacked for each of two neighbouring blocks.
        file = h5py.File(path, "r", rdcc_nbytes=16 << 20)
    except OSError as error:
        msg = f"{path} ({size:,} bytes) cannot be opened: {error}. It may be cut off; write or download it again."
        raise CellFileError(msg) from error
    with file:
        try:
            check_h5(path, file)
            yield file
        except DAMAGE as error:
            if isinstance(error, GeneformerError):
                raise
            msg = f"{path} ({size:,} bytes) broke off while it was read: {type(error).__name__}: {error}. It may be damaged or cut off; write or download it again."
            raise CellFileError(msg) from error


def is_group(item: Any) -> bool:
    """Return True for a group, False for an array."""
    return hasattr(item, "keys") and not hasattr(item, "dtype")


def is_text(array: Any) -> bool:
    """Return True for an array of strings, of variable or fixed length."""
    if isinstance(array, h5py.Dataset):
        return h5py.check_string_dtype(array.dtype) is not None
    return array.dtype.kind in "OSUT"


def read_values(array: Any, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Return some entries of a one-dimensional array; strings as Python strings.

    Raises:
        CellFileError: if they would not fit into memory.
    """
    n = len(range(*slice(start, stop).indices(int(array.shape[0]))))
    if is_text(array) and array.dtype.itemsize > LONGEST_TEXT:
        msg = f"{_place_of(array)} keeps {array.dtype.itemsize:,} bytes for each of its texts; expected at most {LONGEST_TEXT:,}. Write the store again with anndata."
        raise CellFileError(msg)
    require_memory(n * (max(TEXT_BYTES, array.dtype.itemsize) if is_text(array) else array.dtype.itemsize), f"{_place_of(array)}, which has {n:,} entries,")
    _require_stored(array)
    if not is_text(array):
        values = np.asarray(array[start:stop])
        return values if values.dtype.isnative else values.astype(values.dtype.newbyteorder("="))
    return decoded(array[start:stop])


def _require_stored(array: Any) -> None:
    """Raise if most of a long array is declared and nowhere stored: it would read as zeros or empty text for minutes."""
    if isinstance(array, h5py.Dataset):
        declared = int(array.shape[0])
        stored = array.id.get_num_chunks() * array.chunks[0] if array.chunks else declared * (array.id.get_storage_size() > 0)
        if declared > MOST_NOT_STORED and declared > 2 * stored:
            msg = f"{_place_of(array)} declares {declared:,} entries, and at most {stored:,} are stored. The file is incomplete; write or copy it again."
            raise CellFileError(msg)
        return
    n_chunks = getattr(array, "nchunks", 0)
    if n_chunks > MOST_EMPTY_CHUNKS and n_chunks > 2 * array.nchunks_initialized:
        msg = f"{_place_of(array)} declares {n_chunks:,} chunks, and {array.nchunks_initialized:,} are there. The store is incomplete; write or copy it again."
        raise CellFileError(msg)


def decoded(values: Any) -> np.ndarray:
    """Return strings, bytes or both as Python strings; bytes that are not UTF-8 are shown as escapes."""
    return np.array([v.decode("utf-8", "backslashreplace") if isinstance(v, bytes) else str(v) for v in np.asarray(values).ravel().tolist()], dtype=object)


def attribute(item: Any, name: str) -> str:
    """Return an attribute that is text, as such or as bytes; empty if there is none."""
    value = item.attrs.get(name, "")
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def name_of(item: Any) -> str:
    """Return the path of an item inside its store, without the leading slash; arrays in memory have none."""
    return str(getattr(item, "name", "an array")).lstrip("/")


def _place_of(array: Any) -> str:
    """Return the file or store of an array and its path inside, for messages."""
    file = array.file.filename if isinstance(array, h5py.Dataset) else str(getattr(getattr(array, "store", None), "root", ""))
    return f"{file}: {name_of(array)}" if file else name_of(array)
