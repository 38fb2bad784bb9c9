"""The same cells in every kind of file, written by hand where no library writes them any more."""

from __future__ import annotations

import gzip
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp


def write_zarr(cells: anndata.AnnData, path: Path, version: int) -> Path:
    with anndata.settings.override(zarr_write_format=version):
        cells.write_zarr(path)
    return path


def write_loom(cells: anndata.AnnData, path: Path, *, ensembl: str = "Accession", dtype="f4", layers: dict | None = None) -> Path:
    """Loom as loompy writes it: genes by cells, chunked and compressed, attributes beside."""
    text = h5py.string_dtype()
    with h5py.File(path, "w") as file:
        by_gene = cells.X.toarray().T.astype(dtype)
        options = {"chunks": tuple(min(64, n) or 1 for n in by_gene.shape), "compression": "gzip"} if by_gene.size else {}
        file.create_dataset("matrix", data=by_gene, **options)
        for name, matrix in (layers or {}).items():
            file.create_dataset(f"layers/{name}", data=np.asarray(matrix).T, **options)
        file.require_group("layers")
        file.create_dataset(f"row_attrs/{ensembl}", data=list(cells.var_names), dtype=text)
        file.create_dataset("row_attrs/Gene", data=[f"sym{i % 50}" for i in range(cells.n_vars)], dtype=text)
        file.create_dataset("col_attrs/CellID", data=list(cells.obs_names), dtype=text)
        for name in cells.obs.columns:
            values = (
                cells.obs[name].astype(str).tolist() if cells.obs[name].dtype.kind in "OS" or hasattr(cells.obs[name], "cat") else cells.obs[name].to_numpy()
            )
            file.create_dataset(f"col_attrs/{name}", data=values, **({"dtype": text} if isinstance(values, list) else {}))
        file.create_dataset("col_attrs/UMAP", data=np.zeros((cells.n_obs, 2)))
    return path


def write_tenx_h5(cells: anndata.AnnData, path: Path, *, version: int = 3, antibodies: int = 0, int64: bool = False) -> Path:
    counts = sp.csr_matrix(cells.X).astype(np.int32)
    ids, kinds = list(cells.var_names), ["Gene Expression"] * cells.n_vars
    if antibodies:
        # An antibody named like a gene: its counts must not be added to the gene's.
        counts = sp.hstack([counts, sp.csr_matrix(np.full((cells.n_obs, antibodies), 1000, dtype=np.int32))], format="csr")
        ids, kinds = ids + [f"SYM{i}" for i in range(antibodies)], kinds + ["Antibody Capture"] * antibodies
    as_bytes = lambda names: np.array(names, dtype="S")  # noqa: E731 - Cell Ranger writes fixed-length bytes
    index = np.int64 if int64 else np.int32
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix" if version == 3 else "GRCh38")
        group["data"], group["indices"], group["indptr"] = counts.data, counts.indices.astype(index), counts.indptr.astype(np.int64)
        group["shape"] = np.array(counts.shape[::-1], dtype=np.int64)
        group["barcodes"] = as_bytes(list(cells.obs_names))
        if version == 3:
            features = group.create_group("features")
            features["id"], features["name"] = as_bytes(ids), as_bytes([f"NAME{i}" for i in range(len(ids))])
            features["feature_type"], features["genome"] = as_bytes(kinds), as_bytes(["GRCh38"] * len(ids))
            features["_all_tag_keys"] = as_bytes(["genome"])
        else:
            group["genes"], group["gene_names"] = as_bytes(ids), as_bytes([f"NAME{i}" for i in range(len(ids))])
    return path


def write_tenx_folder(cells: anndata.AnnData, path: Path, *, zipped: bool = True, version: int = 3, shuffled: bool = False) -> Path:
    path.mkdir()
    by_gene = sp.coo_matrix(cells.X.T).astype(np.int64)
    # Cell Ranger writes cell by cell.
    order = np.lexsort((by_gene.row, by_gene.col)) if not shuffled else np.random.default_rng(0).permutation(by_gene.nnz)
    lines = [f"{g + 1} {c + 1} {v}" for g, c, v in zip(by_gene.row[order], by_gene.col[order], by_gene.data[order], strict=True)]
    header = ["%%MatrixMarket matrix coordinate integer general", "%", f"{cells.n_vars} {cells.n_obs} {by_gene.nnz}"]
    symbols = [f"NAME{i}" for i in range(cells.n_vars)]
    if version == 3:
        features = [f"{i}\t{s}\tGene Expression" for i, s in zip(cells.var_names, symbols, strict=True)]
    else:
        features = [f"{i}\t{s}" for i, s in zip(cells.var_names, symbols, strict=True)]
    for name, content in (("matrix.mtx", header + lines), ("features.tsv" if version == 3 else "genes.tsv", features), ("barcodes.tsv", list(cells.obs_names))):
        text = ("\n".join(content) + "\n").encode()
        (path / (f"{name}.gz" if zipped else name)).write_bytes(gzip.compress(text) if zipped else text)
    return path


def write_mmwrite(cells: anndata.AnnData, path: Path) -> Path:
    """A folder as scipy's mmwrite leaves it: gene by gene, real numbers."""
    write_tenx_folder(cells, path, zipped=False)
    scipy.io.mmwrite(path / "matrix.mtx", sp.csr_matrix(cells.X.T))
    return path


def write_legacy(cells: anndata.AnnData, path: Path, *, layout: str = "csr", raw: anndata.AnnData | None = None) -> Path:
    """An .h5ad of anndata 0.6: obs and var as tables of records, categories in uns, raw beside them with a dot."""

    def records(frame: pd.DataFrame, uns: h5py.Group) -> np.ndarray:
        columns = {"index": np.array([str(v).encode() for v in frame.index], dtype="S")}
        for name in frame.columns:
            column = frame[name]
            if isinstance(column.dtype, pd.CategoricalDtype):
                columns[name] = column.cat.codes.to_numpy()
                uns[f"{name}_categories"] = np.array([str(c).encode() for c in column.cat.categories], dtype="S")
            else:
                columns[name] = np.array([v.encode() for v in column], dtype="S") if column.dtype == object else column.to_numpy()
        out = np.empty(len(frame), dtype=[(name, values.dtype) for name, values in columns.items()])
        for name, values in columns.items():
            out[name] = values
        return out

    def put(file: h5py.File, key: str, matrix: sp.csr_matrix) -> None:
        if layout == "dense":
            file[key] = matrix.toarray()
            return
        matrix = matrix.asformat(layout)
        group = file.create_group(key)
        group["data"], group["indices"], group["indptr"] = matrix.data, matrix.indices, matrix.indptr
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = layout, np.array(matrix.shape)

    with h5py.File(path, "w") as file:
        uns = file.create_group("uns")
        put(file, "X", sp.csr_matrix(cells.X))
        file["obs"], file["var"] = records(cells.obs, uns), records(cells.var, uns)
        if raw is not None:
            put(file, "raw.X", sp.csr_matrix(raw.X))
            file["raw.var"] = records(raw.var, h5py.File("unused", "w", driver="core", backing_store=False).create_group("uns"))
    return path


def write_07(cells: anndata.AnnData, path: Path) -> Path:
    """An .h5ad of anndata 0.7: frames of one array a column, categories in an array that the column refers to."""
    with h5py.File(path, "w") as file:
        counts = sp.csr_matrix(cells.X)
        group = file.create_group("X")
        group["data"], group["indices"], group["indptr"] = counts.data, counts.indices, counts.indptr
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": np.array(counts.shape)})
        for key, frame in (("obs", cells.obs), ("var", cells.var)):
            group = file.create_group(key)
            group.attrs.update({"_index": "_index", "encoding-type": "dataframe", "encoding-version": "0.1.0"})
            group.attrs["column-order"] = np.array(list(frame.columns), dtype=h5py.string_dtype())
            group.create_dataset("_index", data=list(frame.index), dtype=h5py.string_dtype())
            for name in frame.columns:
                if isinstance(frame[name].dtype, pd.CategoricalDtype):
                    categories = group.require_group("__categories").create_dataset(name, data=list(frame[name].cat.categories), dtype=h5py.string_dtype())
                    categories.attrs["ordered"] = False
                    column = group.create_dataset(name, data=frame[name].cat.codes.to_numpy())
                    column.attrs["categories"] = categories.ref
                elif frame[name].dtype == object:
                    group.create_dataset(name, data=list(frame[name]), dtype=h5py.string_dtype())
                else:
                    group[name] = frame[name].to_numpy()
    return path


def write_cellxgene(cells: anndata.AnnData, path: Path) -> Path:
    """As CELLxGENE offers them: normalised X, counts and all genes in raw, Ensembl ids in the index, genes filtered from X marked."""
    shown = cells.copy()
    filtered = np.arange(cells.n_vars) % 7 == 0
    x = np.log1p(cells.X.toarray() / 3)
    x[:, filtered] = 0
    shown.X = sp.csr_matrix(x)
    shown.raw = cells
    shown.var["feature_is_filtered"] = filtered
    shown.var["feature_name"] = [f"NAME{i}" for i in range(cells.n_vars)]
    shown.var["feature_biotype"] = pd.Categorical(["gene"] * cells.n_vars)
    shown.write_h5ad(path)
    return path


def write_scdl(cells: anndata.AnnData, path: Path) -> Path:
    """An archive as bionemo-scdl itself makes it of an .h5ad; it keeps no names of cells where obs has columns, so one has them."""
    import warnings

    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

    named = cells.copy()
    named.obs.insert(0, "barcode", list(cells.obs_names))
    named.var["feature_id"] = list(cells.var_names)
    source = path.with_name(f"{path.name}-source.h5ad")
    named.write_h5ad(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        SingleCellMemMapDataset(data_path=str(path), h5ad_path=str(source), use_X_not_raw=True)
    source.unlink()
    return path


def write_soma(cells: anndata.AnnData, path: Path) -> Path:
    """An experiment laid out as the Census is."""
    import warnings

    import tiledbsoma.io

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiledbsoma.io.from_anndata(str(path), cells, measurement_name="RNA", X_layer_name="raw")
    return path
