"""AnnData and MuData in memory: their matrices, whatever holds them, and the columns that may name genes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse as sp

from .errors import CellFileError, GeneformerError
from .feature_types import kind_of_feature

SAMPLE_ROWS = 256


def rna_modality(names: Sequence[str], where: str, how: str) -> str:
    """Return the name of the one modality of RNA among several; of the only one, unless that is known to be something else.

    Args:
        how (`str`): how to name a modality, with `{}` in the place of its name.

    Raises:
        CellFileError: if there is none, or more than one.
    """
    kinds = {name: kind_of_feature(name) for name in names}
    found = [name for name in names if kinds[name] == "gene"] or [name for name in names if len(names) == 1 and kinds[name] == "unknown"]
    if len(found) == 1:
        return found[0]
    msg = f"{where} holds {len(names)} {'modality' if len(names) == 1 else 'modalities'} ({', '.join(names) or 'none'}), of which {len(found) or 'none'} {'are' if found else 'is'} known to be RNA. Name the one with raw counts of genes: {how.format((found or names or ['rna'])[0])}."
    raise CellFileError(msg)


def of_rna(adata: Any) -> Any:
    """Return an AnnData as it is, of a MuData the modality of RNA.

    Raises:
        CellFileError: if that is not clear, or obs and var are not in memory.
    """
    if hasattr(adata, "mod") and not hasattr(adata, "X"):
        adata = adata.mod[rna_modality([*adata.mod], "MuData", "pass `mdata[{!r}]`")]
    import pandas as pd

    for part in ("obs", "var"):
        frame = getattr(adata, part)
        if not isinstance(frame, pd.DataFrame):
            msg = f"AnnData: {part} is a {type(frame).__name__}, not a table in memory, as `read_lazy` leaves it. Pass the path of the file, which is read a block at a time, or call `adata.to_memory()` first."
            raise CellFileError(msg)
    return adata


def matrices_of(adata: Any) -> dict[str, Any]:
    """Return the matrices of an AnnData by the names that `counts_layer` knows: `X`, `raw.X`, and its layers."""
    found = {} if adata.X is None else {"X": adata.X}
    if getattr(adata, "raw", None) is not None:
        found["raw.X"] = adata.raw.X
    return found | {name: layer for name, layer in adata.layers.items() if name not in ("X", "raw.X")}


def samples_of(found: Mapping[str, Any]) -> dict[str, Callable[[], np.ndarray]]:
    """Return for each matrix a function that gives values of its first rows, of a sparse one in memory all."""
    return {name: partial(_sample, matrix) for name, matrix in found.items()}


def _sample(matrix: Any) -> np.ndarray:
    if sp.issparse(matrix):
        return matrix.data
    return np.asarray(matrix).ravel() if isinstance(matrix, np.ndarray) else rows_of(matrix, 0, SAMPLE_ROWS).data


def sound_matrix(matrix: Any, where: str) -> Any:
    """Return a matrix whose rows `rows_of` can read; a sparse one by row, after a look at its index.

    Raises:
        CellFileError: if the index of a sparse matrix points outside of it.
    """
    if not sp.issparse(matrix):
        return matrix
    try:
        if matrix.format in ("csr", "csc"):
            # Of another object with the same arrays: the check may give its own other types of indices.
            (sp.csr_array if matrix.format == "csr" else sp.csc_array)(matrix).check_format(full_check=True)
        return matrix if matrix.format == "csr" else matrix.tocsr()
    except (ValueError, IndexError) as error:
        msg = f"{where} is not a sound sparse matrix: {error}. Build it again from its values."
        raise CellFileError(msg) from error


def rows_of(matrix: Any, first: int, last: int) -> sp.csr_array:
    """Return some rows of a matrix: sparse or dense in memory, backed by a file, of dask (computed here) or of cupy (copied here).

    Raises:
        CellFileError: if they are not numbers.
    """
    # A slice of all rows would be a copy.
    rows = matrix if sp.issparse(matrix) and first == 0 and last >= matrix.shape[0] else matrix[first:last]
    if hasattr(rows, "compute"):
        rows = rows.compute()
    if type(rows).__module__.split(".")[0] in ("cupy", "cupyx"):
        rows = rows.get()
    try:
        if sp.issparse(rows):
            return sp.csr_array(rows if rows.dtype.itemsize <= 8 else rows.astype(np.float64))
        rows = np.asarray(rows)
        return sp.csr_array(rows.astype(known_to_scipy(rows.dtype), copy=False))
    except (TypeError, ValueError) as error:
        if isinstance(error, GeneformerError):
            raise
        msg = f"the matrix holds values of type {getattr(rows, 'dtype', type(rows).__name__)}; expected raw counts as numbers ({error})."
        raise CellFileError(msg) from error


def known_to_scipy(dtype: np.dtype) -> np.dtype:
    """Return the type in which scipy can hold numbers: it knows neither half precision nor the byte order of other machines.

    Long doubles become doubles, which hold every count below 2^53.
    """
    if dtype.kind == "f" and dtype.itemsize not in (4, 8):
        return np.dtype(np.float32 if dtype.itemsize < 4 else np.float64)
    return dtype.newbyteorder("=")


def require_distinct_columns(frame: Any, part: str, wanted: Sequence[str] | None = None) -> None:
    """Raise if a column name is ambiguous because two columns have it; 1 and "1" are the same name.

    Args:
        part (`str`): `obs` or `var`.
        wanted (`Sequence[str]`, *optional*): the columns to read; all by default.

    Raises:
        CellFileError
    """
    names = [str(name) for name in frame.columns]
    counts = Counter(names)
    twice = [name for name in (counts if wanted is None else wanted) if counts[name] > 1]
    if twice:
        msg = f"AnnData: {part} has duplicate column names: {', '.join(map(repr, twice[:5]))}. Rename or drop them, for instance `adata.{part} = adata.{part}.loc[:, ~adata.{part}.columns.duplicated()]`."
        raise CellFileError(msg)


def text_columns(frame: Any) -> dict[str, list[str]]:
    """Return the columns of text of var, categories included.

    Raises:
        CellFileError: if two columns have one name.
    """
    require_distinct_columns(frame, "var")
    return {str(name): texts(frame[name]) for name in frame.columns if _is_text(frame[name])}


def texts(values: Any) -> list[str]:
    """Return values as text; bytes are read as UTF-8, and what cannot be written as UTF-8 is shown as escapes.

    Example:
        >>> texts([b"CD4", "CD8A", 1])
        ['CD4', 'CD8A', '1']
    """
    return [_text(value) for value in values]


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    text = str(value)
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def _is_text(column: Any) -> bool:
    import pandas as pd

    values = column.cat.categories if isinstance(column.dtype, pd.CategoricalDtype) else column
    return pd.api.types.is_string_dtype(values) or values.dtype == object
