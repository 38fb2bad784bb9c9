"""Which obs columns a dataset keeps, under what names and types, over all of its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa

from ..anndata_objects import known_to_scipy, texts
from ..errors import CellFileError, ColumnNotFoundError
from .readers import CellSource

OWN = ("input_ids", "length", "cell_id", "counts", "input_ids_uncropped", "length_uncropped", "genome_fraction")


@dataclass(frozen=True)
class ObsHead:
    """The first row of obs of one file, which carries the types and categories of all of its columns."""

    name: str
    first_row: pd.DataFrame

    @classmethod
    def of(cls, source: CellSource) -> ObsHead:
        """Read it."""
        return cls(source.name, source.read_obs(source.obs_columns, 0, 1))


@dataclass(frozen=True)
class ObsColumns:
    """The obs columns of a dataset."""

    names: dict[str, str]
    """Name in obs to name in the dataset."""
    features: dict[str, Any]
    """Name in the dataset to its `datasets` feature."""

    @classmethod
    def of(cls, heads: Sequence[ObsHead], wanted: str | tuple[str, ...]) -> ObsColumns:
        """Decide on the columns of several files.

        Categories are united in the order they appear; a column that a file lacks is empty there when all were asked for.

        Args:
            heads: one per file.
            wanted: `all`, `none` or names.

        Raises:
            ColumnNotFoundError: if a column named by the user is missing in any file.
        """
        if wanted == "none":
            wanted = ()
        if isinstance(wanted, str):
            wanted = tuple(dict.fromkeys(str(name) for head in heads for name in head.first_row.columns))
        else:
            for head in heads:
                missing = [name for name in wanted if name not in head.first_row.columns]
                if missing:
                    msg = f"{head.name}: obs has no column {', '.join(map(repr, missing))}. Found: {', '.join(head.first_row.columns) or 'none'}."
                    raise ColumnNotFoundError(msg)
        names: dict[str, str] = {}
        for name in wanted:
            kept_as = name
            while kept_as in OWN or (kept_as != name and kept_as in wanted):
                kept_as = f"obs_{kept_as}"
            names[name] = kept_as
        samples = {name: [h.first_row[name] for h in heads if name in h.first_row.columns] for name in wanted}
        return cls(names, {names[name]: _feature(columns) for name, columns in samples.items()})

    def read(self, source: CellSource, start: int = 0, stop: int | None = None) -> pa.Table:
        """Return the cell ids and these columns of some cells, typed as the features say."""
        here = [name for name in self.names if name in source.obs_columns]
        frame = source.read_obs(here, start, stop)
        arrays: dict[str, Any] = {"cell_id": pa.array(frame.index.tolist(), pa.string())}
        for name, kept_as in self.names.items():
            feature = self.features[kept_as]
            arrays[kept_as] = _column(frame[name], feature) if name in here else pa.nulls(len(frame), feature.pa_type)
        return pa.table(arrays)


def _feature(columns: list[pd.Series]) -> Any:
    if all(isinstance(c.dtype, pd.CategoricalDtype) for c in columns):
        names = list(dict.fromkeys(_label(v) for c in columns for v in c.cat.categories))
        return datasets.ClassLabel(names=names) if names else datasets.Value("string")
    types = [_numpy_type(c.dtype) for c in columns]
    if all(t.kind == "b" for t in types):
        return datasets.Value("bool")
    if all(t == np.uint64 for t in types):
        return datasets.Value("uint64")
    if all(t.kind in "iu" for t in types):
        return datasets.Value("int64")
    if all(t.kind in "iuf" for t in types):
        return datasets.Value("float32" if all(t.kind == "f" and t.itemsize <= 4 for t in types) else "float64")
    return datasets.Value("string")


def _numpy_type(dtype: Any) -> np.dtype[Any]:
    """Return the numpy type behind a pandas one; object for text and categories."""
    if isinstance(dtype, (pd.CategoricalDtype, pd.StringDtype)):
        return np.dtype(object)
    try:
        return np.dtype(getattr(dtype, "numpy_dtype", dtype))
    except TypeError:
        # Periods, intervals, times with a zone.
        return np.dtype(object)


def _column(values: pd.Series, feature: Any) -> pa.Array:
    if isinstance(feature, datasets.ClassLabel):
        place = {name: i for i, name in enumerate(feature.names)}
        lookup = np.array([place[_label(v)] for v in values.cat.categories], dtype=np.int64)
        codes = values.cat.codes.to_numpy()
        missing = codes < 0
        return pa.array(np.where(missing, 0, lookup[codes] if len(lookup) else 0), pa.int64(), mask=missing)
    if feature.pa_type == pa.string():
        missing = values.isna().to_numpy()
        return pa.array([None if gone else text for text, gone in zip(texts(values.astype(object)), missing, strict=True)], pa.string())
    try:
        if isinstance(values.dtype, np.dtype) and values.dtype.kind in "iuf":
            # Arrow knows neither the byte order of other machines nor long doubles.
            values = values.astype(known_to_scipy(values.dtype))
        return pa.array(values, feature.pa_type, from_pandas=True)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        msg = f"obs[{values.name!r}] holds numbers that no type shared by all files keeps as they are ({error}). Leave the column out (`obs=`, `--obs`), or save it as text."
        raise CellFileError(msg) from error


def _label(value: Any) -> str:
    """Return the name of a category; 1.0 is 1, as it is in the file whose column has no gaps."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else texts([value])[0]
