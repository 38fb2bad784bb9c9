"""Tables written as CSV, whose text no spreadsheet runs as a formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from ..escaping import csv_cell


def write_csv(table: pd.DataFrame, path: Path | None = None, **options: Any) -> str | None:
    """Write a table as `DataFrame.to_csv` does, with `without_formulas`; without a path, return its text."""
    return without_formulas(table).to_csv(path, **options)


def without_formulas(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table whose text no spreadsheet runs.

    Cells, names of columns and labels of rows that are text and begin with `=`, `+`, `-` or `@` get an apostrophe in front,
    unless they are numbers.
    """
    safe = table.copy()
    for place in range(safe.shape[1]):
        column = safe.iloc[:, place]
        if isinstance(column.dtype, pd.CategoricalDtype) or not (pd.api.types.is_numeric_dtype(column) or pd.api.types.is_datetime64_any_dtype(column)):
            safe.isetitem(place, column.astype(object).map(csv_cell))
    safe.columns = safe.columns.map(csv_cell)
    names = [csv_cell(name) for name in safe.index.names]
    if isinstance(safe.index, pd.MultiIndex):
        safe.index = pd.MultiIndex.from_tuples([tuple(map(csv_cell, label)) for label in safe.index], names=names)
    elif not (pd.api.types.is_numeric_dtype(safe.index) or pd.api.types.is_datetime64_any_dtype(safe.index)):
        safe.index = pd.Index([csv_cell(label) for label in safe.index], name=names[0], dtype=object)
    else:
        safe.index = safe.index.rename(names[0])
    return safe
