"""Cells out: an .h5ad of any source, written a block at a time, and columns added to a copy of one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from .anndata_files import AnnDataFileSource
from .sources import CellSource


def copy_as_h5ad(source: CellSource, output: Path) -> None:
    """Write an .h5ad that holds the cells of a source.

    An .h5ad of anndata 0.7 or later is copied byte for byte, with all it holds. Of other sources counts, obs and genes are
    written; what else they hold stays in them.
    """
    if can_be_copied(source):
        shutil.copyfile(source.path, output)  # type: ignore[attr-defined]
    else:
        write_h5ad(source, output)


def can_be_copied(source: CellSource) -> bool:
    """Return True for an .h5ad of anndata 0.7 or later."""
    return isinstance(source, AnnDataFileSource) and source.path.is_file() and not source.is_legacy and not source.modality


def write_h5ad(source: CellSource, output: Path) -> None:
    """Write counts (CSR, gzip), obs and gene names of a source, in memory bounded by a block and one column of obs."""
    import anndata

    with h5py.File(output, "w") as file:
        anndata.io.write_elem(file, "/", {})
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        write_obs(file, source)
        var = pd.DataFrame({"gene_symbol": source.gene_symbols}, index=pd.Index(source.gene_names, dtype=object))
        var["ensembl_id"] = source.gene_names
        anndata.io.write_elem(file, "var", var.drop(columns=["gene_symbol"] if source.gene_symbols == source.gene_names else []))
        for key in ("obsm", "varm", "obsp", "varp", "layers", "uns"):
            anndata.io.write_elem(file, key, {})
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": np.array([source.n_cells, len(source.gene_names)])})
        options: dict[str, Any] = {"shape": (0,), "maxshape": (None,), "chunks": (1 << 16,), "compression": "gzip", "compression_opts": 1}
        # Double precision: whole numbers up to 2 ** 53 stay what they are, and zeros compress.
        data, indices = group.create_dataset("data", dtype="f8", **options), group.create_dataset("indices", dtype="i4", **options)
        indptr, n = np.zeros(source.n_cells + 1, dtype=np.int64), 0
        for block in source.iter_blocks():
            counts = block.counts_ng.astype(np.float64)
            counts.sum_duplicates()
            for dataset, values in ((data, counts.data), (indices, counts.indices)):
                dataset.resize((n + len(values),))
                dataset[n:] = values
            indptr[block.start + 1 : block.start + 1 + counts.shape[0]] = n + counts.indptr[1:]
            n += counts.nnz
        group["indptr"] = indptr


def write_obs(file: h5py.File, source: CellSource) -> None:
    """Write obs of a source, a column at a time."""
    import anndata

    anndata.io.write_elem(file, "obs", source.read_obs([]))
    add_obs(file, {name: source.read_obs([name])[name] for name in source.obs_columns})


def add_obs(file: h5py.File, columns: Mapping[str, Any]) -> None:
    """Add columns to obs of an open .h5ad, or replace them; text becomes categories."""
    _add_columns(file["obs"], columns)


def add_obs_to_file(path: Path, columns: Mapping[str, Any]) -> None:
    """Add columns to obs of an .h5ad, or replace them."""
    with h5py.File(path, "r+") as file:
        add_obs(file, columns)


def add_var(path: Path, columns: Mapping[str, np.ndarray], source: CellSource) -> None:
    """Add columns to the genes of a copy of a source: to raw.var where the counts are there; other features get missing values."""
    with h5py.File(path, "r+") as file:
        place = file["raw/var"] if can_be_copied(source) and source.counts == "raw.X" else file["var"]
        if can_be_copied(source) and source.gene_columns is not None:
            # Antibodies and the like have rows in var as well.
            columns = {name: _spread(values, source.gene_columns, source.n_columns) for name, values in columns.items()}
        _add_columns(place, columns)


def _spread(values: np.ndarray, places: np.ndarray, n: int) -> np.ndarray:
    missing: Any = None if values.dtype == object else np.nan if values.dtype.kind == "f" else 0
    out = np.full(n, missing, dtype=values.dtype)
    out[places] = values
    return out


def _add_columns(obs: h5py.Group, columns: Mapping[str, Any]) -> None:
    import anndata

    order = [str(name) for name in obs.attrs["column-order"]]
    for name, values in columns.items():
        series = pd.Series(values)
        if series.dtype == object or isinstance(series.dtype, pd.StringDtype):
            series = series.where(series.notna(), None).astype("category")
            series = series.cat.rename_categories([str(c) for c in series.cat.categories])
        if name in obs:
            del obs[name]
        anndata.io.write_elem(obs, name, series.array if pd.api.types.is_extension_array_dtype(series.dtype) else series.to_numpy())
        if name not in order:
            order.append(name)
    obs.attrs["column-order"] = np.array(order, dtype=h5py.string_dtype())


def note_in_file(path: Path, key: str, record: dict[str, Any]) -> None:
    """Keep how something was made in uns of an .h5ad; of other files it does nothing."""
    if path.suffix == ".h5ad":
        import anndata

        with h5py.File(path, "r+") as file:
            if "uns" not in file:
                anndata.io.write_elem(file, "uns", {})
            anndata.io.write_elem(file["uns"], key, record)


@contextmanager
def new_array(path: Path, group: str, name: str, shape: tuple[int, ...]) -> Iterator[Any]:
    """Yield a float32 array to fill inside an .h5ad file; nothing else in the file is read or rewritten."""
    with new_arrays(path, group, {name: shape}) as arrays:
        yield arrays[name]


@contextmanager
def new_arrays(path: Path, group: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[dict[str, Any]]:
    """Yield several float32 arrays to fill, as `new_array`."""
    import anndata

    with h5py.File(path, "r+") as file:
        if group not in file:
            anndata.io.write_elem(file, group, {})
        arrays = {}
        for name, shape in shapes.items():
            if name in file[group]:
                del file[group][name]
            arrays[name] = file[group].create_dataset(name, shape, "float32")
            arrays[name].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        yield arrays
