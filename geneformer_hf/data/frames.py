"""Data frames inside stores (obs, var) by column and row range, without reading all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import h5py
import numpy as np
import pandas as pd

from ..errors import CellFileError, ColumnNotFoundError
from .store_checks import require_h5_dataset
from .stores import attribute, decoded, is_group, is_text, name_of, read_values

R_MISSING = -(2**31)
"""What R stores for a missing integer."""


class Frame(ABC):
    """A data frame that lies in an open store."""

    name: str
    """`obs` or `var`, for messages."""
    index_name: str
    columns: list[str]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def index(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Return the index of some rows."""

    @abstractmethod
    def column(self, name: str, start: int = 0, stop: int | None = None) -> Any:
        """Return some rows of one column as pandas takes it; categories stay categories."""

    @abstractmethod
    def holds_text(self, name: str) -> bool:
        """Return True for a column of text, as such or as categories."""

    def read(self, columns: Sequence[str], start: int = 0, stop: int | None = None, *, where: str = "") -> pd.DataFrame:
        """Return columns of some rows, indexed by the frame's index.

        Raises:
            ColumnNotFoundError: listing the columns there are.
        """
        missing = [name for name in columns if name not in self.columns]
        if missing:
            msg = f"{where}: {self.name} has no column {', '.join(map(repr, missing))}. Found: {', '.join(self.columns) or 'none'}."
            raise ColumnNotFoundError(msg)
        index = pd.Index(self.index(start, stop), dtype=object)
        return pd.DataFrame({name: self.column(name, start, stop) for name in columns}, index=index)

    def text(self) -> dict[str, list[str]]:
        """Return all columns of text."""
        return {name: pd.Series(self.column(name)).astype(str).tolist() for name in self.columns if self.holds_text(name)}


def open_frame(store: Any, key: str, where: str) -> Frame:
    """Open obs or var as any version of anndata writes it.

    Raises:
        CellFileError: if it is no data frame.
    """
    item = store[key]
    if is_group(item) and attribute(item, "_index") in item:
        return GroupFrame(item, where)
    if isinstance(item, h5py.Dataset) and item.dtype.names:
        return RecordFrame(item, store.get("uns", {}))
    msg = f"{where}: {key} is not a data frame as any version of anndata writes it. Open the file with anndata and write it again."
    raise CellFileError(msg)


class GroupFrame(Frame):
    """A group with one array or group a column: anndata 0.7 and later."""

    def __init__(self, group: Any, where: str = "") -> None:
        self._group, self._where, self.name = group, where, name_of(group)
        self.index_name = attribute(group, "_index")
        self.columns = decoded(group.attrs.get("column-order", ())).tolist()
        if len(set(self.columns)) < len(self.columns):
            twice = sorted({name for name in self.columns if self.columns.count(name) > 1}) if len(self.columns) < 1000 else ["…"]
            msg = f"{where}: {self.name} lists columns more than once: {', '.join(twice[:3])}. The file is damaged; write it again."
            raise CellFileError(msg)
        # A path from the root would read an array of another part of the file as a column.
        missing = [name for name in self.columns if name.startswith("/") or ".." in name.split("/") or name not in group]
        if missing:
            msg = f"{where}: {self.name} lists columns that are not there: {', '.join(missing[:3])}. The file is damaged; write it again."
            raise CellFileError(msg)

    def __len__(self) -> int:
        return int(_values_of(self._group[self.index_name]).shape[0])

    def index(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Return the index of some rows."""
        return [str(name) for name in self.column(self.index_name, start, stop)]

    def column(self, name: str, start: int = 0, stop: int | None = None) -> Any:
        """Return some rows of one column."""
        item = self._group[name]
        values = read_values(_values_of(item), start, stop)
        if not is_group(item):
            if (categories := self._categories_of(item)) is not None:
                levels = read_values(categories)
                return pd.Categorical.from_codes(_codes(values, len(levels)), levels)
            return values
        if "codes" in item:
            return pd.Categorical.from_codes(values, read_values(_values_of(item["categories"])), ordered=bool(item.attrs.get("ordered", False)))
        return _masked(values, np.asarray(item["mask"][start:stop]))

    def holds_text(self, name: str) -> bool:
        """Return True for a column of text."""
        item = self._group[name]
        if not is_group(item) and (categories := self._categories_of(item)) is not None:
            item = categories
        elif is_group(item) and "categories" in item:
            item = _values_of(item["categories"])
        return is_text(_values_of(item))

    def _categories_of(self, item: Any) -> Any:
        """Return the categories that anndata 0.7 kept in an array beside the columns, None for other columns."""
        reference = item.attrs.get("categories")
        if isinstance(reference, h5py.Reference):
            categories = self._group.file[reference]
            require_h5_dataset(categories, self._where)
            return categories
        # zarr has no references; anndata 0.7 wrote the path within the frame.
        if isinstance(reference, str):
            return self._group[reference.removeprefix("/").removeprefix(f"{self.name}/")]
        # SeuratDisk writes the levels of factors where anndata 0.7 does, without a reference to them.
        name = name_of(item).rsplit("/", 1)[-1]
        levels = self._group.get("__categories")
        if levels is None or name not in levels or item.dtype.kind not in "iuf":
            return None
        values, n = read_values(item), int(levels[name].shape[0])
        if values.dtype.kind == "f" and (np.trunc(values[np.isfinite(values)]) != values[np.isfinite(values)]).any():
            # Numbers, whatever else has their name.
            return None
        codes = _codes(values, n)
        if len(codes) and not -1 <= int(codes.min()) <= int(codes.max()) < n:
            msg = f"{self._where}: {self.name}/{name} holds the codes {int(codes.min())} to {int(codes.max())} for {n:,} levels of a factor; expected 0 to {n - 1}. Write the file again from Seurat, with the column as text."
            raise CellFileError(msg)
        return levels[name]


class RecordFrame(Frame):
    """A table of records, whose categories lie in `uns`: anndata before 0.7."""

    def __init__(self, records: h5py.Dataset, uns: Any) -> None:
        self._records, self.name = records, name_of(records)
        self.index_name, *columns = records.dtype.names
        self.columns = list(columns)
        self._categories = {c: uns[f"{c}_categories"] for c in columns if f"{c}_categories" in uns}

    def __len__(self) -> int:
        return len(self._records)

    def index(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Return the index of some rows."""
        return [str(v) for v in self._values(self.index_name, start, stop)]

    def column(self, name: str, start: int = 0, stop: int | None = None) -> Any:
        """Return some rows of one column."""
        values = self._values(name, start, stop)
        if name in self._categories:
            return pd.Categorical.from_codes(values, decoded(np.atleast_1d(self._categories[name][()])))
        return values

    def holds_text(self, name: str) -> bool:
        """Return True for a column of text."""
        return name in self._categories or self._records.dtype[name].kind in "SUO"

    def _values(self, name: str, start: int, stop: int | None) -> np.ndarray:
        values = self._records.fields(name)[start:stop]
        return decoded(values) if values.dtype.kind in "SUO" else values


class ArraysFrame(Frame):
    """Columns that are arrays of one length, such as the attributes of a loom file.

    Args:
        name (`str`): `obs` or `var`.
        arrays: column to one-dimensional array, of a store or of numpy.
        index (`str`, *optional*): the column that names the rows; counted where there is none.
    """

    def __init__(self, name: str, arrays: Mapping[str, Any], n_rows: int, index: str | None) -> None:
        self.name, self._arrays, self._n, self.index_name = name, arrays, n_rows, index or ""
        self.columns = [column for column in arrays if column != index]

    def __len__(self) -> int:
        return self._n

    def index(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Return the index of some rows."""
        if not self.index_name:
            return [str(i) for i in range(*slice(start, stop).indices(self._n))]
        return [str(v) for v in read_values(self._arrays[self.index_name], start, stop)]

    def column(self, name: str, start: int = 0, stop: int | None = None) -> Any:
        """Return some rows of one column."""
        return read_values(self._arrays[name], start, stop)

    def holds_text(self, name: str) -> bool:
        """Return True for a column of text."""
        return is_text(self._arrays[name])


def _codes(values: np.ndarray, n_levels: int) -> np.ndarray:
    """Return codes of categories, -1 where R, or a type without negative numbers, keeps a missing value."""
    if values.dtype.kind == "f":
        values = np.where(np.isfinite(values), values, -1).astype(np.int64)
    if values.dtype.kind == "u":
        highest = np.iinfo(values.dtype).max
        return values if n_levels > highest else np.where(values == highest, -1, values.astype(np.int64))
    return np.where(values == R_MISSING, -1, values)


def _values_of(item: Any) -> Any:
    if not is_group(item):
        return item
    return item["codes"] if "codes" in item else item["values"]


def _masked(values: np.ndarray, mask: np.ndarray) -> Any:
    if values.dtype == bool:
        return pd.arrays.BooleanArray(values, mask)
    if values.dtype.kind in "iu":
        return pd.arrays.IntegerArray(values, mask)
    out = values.astype(object)
    out[mask] = None
    return out
