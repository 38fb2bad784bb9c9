"""Readers: a file of cells, whatever its kind, or an AnnData in memory, as a stream of blocks of cells.

`open_cells` looks at what a file holds, not at its name, and returns a `CellSource`. Every kind goes through the same
blocks and the same checks: `.h5ad` and `.zarr` (anndata_files.py), `.loom` (loom.py), 10x `.h5` and folders (tenx.py), scDL archives
(scdl.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import CellFileError
from ..input_files import require_regular
from .anndata_files import AnnDataFileSource, split_modality
from .loom import LoomSource
from .scdl import ScdlSource, is_scdl_archive
from .sources import AnnDataSource, CellBlock, CellSource, FileSource, SourceOptions
from .stores import is_zarr, open_h5
from .tenx import TenXFileSource, TenXFolderSource, is_tenx_folder, is_tenx_matrix, prefixes_in, tenx_groups

__all__ = ["CellBlock", "CellSource", "FileSource", "SourceOptions", "open_cells", "read_ahead"]


def open_cells(
    cells: Any, *, gene_ids: str | None = None, counts_layer: str | None = None, genome: str | None = None, total_counts: str | None = None
) -> CellSource:
    """Open a file of cells or an AnnData.

    Args:
        cells (`str`, `Path`, `AnnData` or `CellSource`): `.h5ad`, `.zarr`, `.loom`, 10x `.h5`, a 10x folder (or its `matrix.mtx`), an scDL archive, or a modality of MuData (`cells.h5mu`, `cells.h5mu/rna`);
            a source that is open already, such as a `SomaSource`, is returned as it is.
        gene_ids, counts_layer, genome, total_counts (`str`, *optional*): see `SourceOptions`.

    Raises:
        CellFileError, NotRawCountsError, GeneIdError, ColumnNotFoundError
    """
    options = SourceOptions(gene_ids, counts_layer, total_counts, genome)
    if isinstance(cells, CellSource):
        return cells
    if isinstance(cells, (str, Path)):
        path = Path(cells)
        return kind_of(path)(path, options)
    if all(hasattr(cells, part) for part in ("obs", "var")):
        return AnnDataSource(cells, options)
    msg = f"Expected an AnnData or the path of a file of cells, got {type(cells).__name__}."
    raise CellFileError(msg)


def kind_of(path: Path) -> Any:
    """Return the class of sources that reads a file.

    Raises:
        CellFileError: if the file is none of them, saying what it holds.
    """
    require_regular(path)
    if split_modality(path)[1]:
        return AnnDataFileSource
    if path.is_dir():
        if is_tenx_folder(path):
            return TenXFolderSource
        if is_zarr(path):
            return AnnDataFileSource
        if is_scdl_archive(path):
            return ScdlSource
        if prefixes := prefixes_in(path):
            msg = f"{path} holds {len(prefixes)} samples ({', '.join(prefixes[:5])}{', …' if len(prefixes) > 5 else ''}). Name the matrix of one: {next(p for p in sorted(path.iterdir()) if is_tenx_matrix(p))}; `tokenize` and `load_cells` take the folder."
            raise CellFileError(msg)
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:5])
        msg = f"{path} is a folder, but neither a zarr store nor a 10x folder with matrix.mtx nor an scDL archive (it holds: {inside or 'nothing'})."
        raise CellFileError(msg)
    if is_tenx_matrix(path):
        return TenXFolderSource
    with open_h5(path) as file:
        if "obs" in file and "var" in file:
            return AnnDataFileSource
        if "matrix" in file and "row_attrs" in file:
            return LoomSource
        if tenx_groups(file):
            return TenXFileSource
        msg = f"{path} is an HDF5 file, but neither .h5ad nor .loom nor 10x .h5 (it holds: {', '.join(file) or 'nothing'}). Write one with `adata.write_h5ad(...)`."
        raise CellFileError(msg)


def read_ahead(blocks: Iterator[CellBlock]) -> Iterator[CellBlock]:
    """Yield the same blocks, reading the next one in a thread while the caller works on this one."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        coming = reader.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = reader.submit(next, blocks, None)
            yield block
