"""Tables of text that a user keeps beside the cells, such as classes of genes or donors of cells: CSV and TSV, plain or gzip."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path

import pandas as pd

from ..errors import CellFileError
from ..input_files import require_regular

MOST_BYTES = 2 << 30
"""Most text of a table, unpacked."""
MOST_COLUMNS = 10_000


def read_text_table(path: Path) -> pd.DataFrame:
    """Read a table as text: separated by commas, or by tabs in `.tsv` and `.txt`; `.gz` is unpacked.

    Raises:
        CellFileError: if it cannot be read, unpacks to more than `MOST_BYTES`, or has more than `MOST_COLUMNS` columns.
    """
    require_regular(path)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    try:
        with gzip.open(path, "rb") if suffixes[-1:] == [".gz"] else path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            msg = f"{path} unpacks to more than {MOST_BYTES:,} bytes; expected a table of genes or cells. It is damaged, or was made to fill memory."
            raise CellFileError(msg)
        separator = "\t" if {".tsv", ".txt"} & set(suffixes[-2:]) else ","
        n_columns = content.partition(b"\n")[0].count(separator.encode()) + 1
        if n_columns > MOST_COLUMNS:
            msg = f"{path} has {n_columns:,} columns in its first line; expected a table of genes or cells, with at most {MOST_COLUMNS:,}."
            raise CellFileError(msg)
        return pd.read_csv(io.BytesIO(content), sep=separator, dtype=str)
    except (OSError, EOFError, zlib.error, ValueError, pd.errors.ParserError) as error:
        if isinstance(error, CellFileError):
            raise
        msg = f"{path} cannot be read as a table: {error}."
        raise CellFileError(msg) from error
