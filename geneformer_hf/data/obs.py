"""Data frames inside .h5ad files (obs, var) by column and row range, without reading all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np
import pandas as pd

from ..errors import CellFileError, ColumnNotFoundError


def require_frame(group: Any, where: str) -> None:
    """Raise unless the group is a data frame as anndata 0.7 and later write it.

    Raises:
        CellFileError
    """
    if not isinstance(group, h5py.Group) or str(group.attrs.get("_index", "")) not in group:
        msg = f"{where}: {group.name} is not a data frame as anndata 0.7 and later write it. Open the file with anndata and write it again."
        raise CellFileError(msg)


def frame_length(group: h5py.Group) -> int:
    """Return the number of rows."""
    return len(_values_of(group[str(group.attrs["_index"])]))


def frame_columns(group: h5py.Group) -> list[str]:
    """Return the names of the columns, in order."""
    return [str(name) for name in group.attrs.get("column-order", ())]


def text_columns(group: h5py.Group) -> list[str]:
    """Return the names of the columns that hold text, as such or as categories."""
    return [name for name in frame_columns(group) if _is_text(group, name)]


def read_index(group: h5py.Group, start: int = 0, stop: int | None = None) -> list[str]:
    """Return the index of some rows."""
    return [str(name) for name in _read_column(group, str(group.attrs["_index"]), start, stop)]


def read_frame(group: h5py.Group, columns: Sequence[str], start: int = 0, stop: int | None = None, *, where: str = "") -> pd.DataFrame:
    """Return columns of some rows, indexed by the frame's index; categories stay categories.

    Raises:
        ColumnNotFoundError: listing the columns there are.
    """
    known = frame_columns(group)
    missing = [name for name in columns if name not in known]
    if missing:
        msg = f"{where}: {group.name.lstrip('/')} has no column {', '.join(map(repr, missing))}. Found: {', '.join(known) or 'none'}."
        raise ColumnNotFoundError(msg)
    return pd.DataFrame({name: _read_column(group, name, start, stop) for name in columns}, index=pd.Index(read_index(group, start, stop), dtype=object))


def _values_of(item: h5py.Dataset | h5py.Group) -> h5py.Dataset:
    if isinstance(item, h5py.Dataset):
        return item
    return item["codes"] if "codes" in item else item["values"]


def _read_column(group: h5py.Group, name: str, start: int, stop: int | None) -> Any:
    item = group[name]
    values = _read_values(_values_of(item), start, stop)
    if isinstance(item, h5py.Dataset):
        if isinstance(reference := item.attrs.get("categories"), h5py.Reference):
            # anndata 0.7 kept categories in a dataset beside the columns.
            return pd.Categorical.from_codes(values, _read_values(group.file[reference], 0, None))
        return values
    if "codes" in item:
        return pd.Categorical.from_codes(values, _read_values(_values_of(item["categories"]), 0, None), ordered=bool(item.attrs.get("ordered", False)))
    return _masked(values, item["mask"][start:stop])


def _read_values(dataset: h5py.Dataset, start: int, stop: int | None) -> np.ndarray:
    if h5py.check_string_dtype(dataset.dtype) is not None:
        return dataset.asstr()[start:stop]
    return dataset[start:stop]


def _masked(values: np.ndarray, mask: np.ndarray) -> Any:
    if values.dtype == bool:
        return pd.arrays.BooleanArray(values, mask)
    if values.dtype.kind in "iu":
        return pd.arrays.IntegerArray(values, mask)
    out = values.astype(object)
    out[mask] = None
    return out


def _is_text(group: h5py.Group, name: str) -> bool:
    item = group[name]
    if isinstance(item, h5py.Dataset) and isinstance(reference := item.attrs.get("categories"), h5py.Reference):
        item = group.file[reference]
    elif isinstance(item, h5py.Group) and "categories" in item:
        item = _values_of(item["categories"])
    return h5py.check_string_dtype(_values_of(item).dtype) is not None
