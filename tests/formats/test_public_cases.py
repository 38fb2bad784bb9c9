"""Inputs that people reported elsewhere: layers called raw, MuData, samples of GEO, matrices in unusual types, odd columns of obs."""

import gzip
import types

import anndata
import datasets
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp
import zarr

from geneformer_hf import GeneformerTokenizer, embed_cells, load_cells, load_model, stream_cells, stream_tokens, tokenize_corpus
from geneformer_hf.anndata_objects import rows_of
from geneformer_hf.cli.main import main
from geneformer_hf.data.collators import DataCollatorForCells, DataCollatorForMaskedGenes
from geneformer_hf.data.readers import open_cells
from geneformer_hf.errors import CellFileError, GeneIdError, NotRawCountsError, SettingError, VocabularyMismatchError
from tests.conftest import make_cells, write


def tokens(cells, tokenizer, **options):
    return load_cells(cells, tokenizer=tokenizer, **options)["input_ids"][:]


@pytest.fixture
def normalised(cells):
    found = cells.copy()
    found.layers["raw"] = found.X.copy()
    found.X = sp.csr_matrix(np.log1p(found.X.toarray()))
    return found


def test_a_layer_called_raw_is_read_and_reported(normalised, cells, tokenizer, tmp_path):
    write(normalised, tmp_path / "cells.h5ad")
    for found in (normalised, tmp_path / "cells.h5ad"):
        assert open_cells(found).counts_described == "layers['raw']"
        for name in (None, "raw", "layers/raw"):
            assert tokens(found, tokenizer, counts_layer=name, cache_dir=tmp_path / "cache") == tokens(cells, tokenizer)
    assert tokenizer(normalised, counts_layer="raw")["input_ids"] == tokenizer(cells)["input_ids"]


def test_a_raw_slot_goes_before_a_layer_called_raw_and_both_can_be_named(normalised, tmp_path):
    slot = anndata.AnnData(normalised.layers["raw"] * 2, normalised.obs, normalised.var)
    normalised.raw = slot
    write(normalised, tmp_path / "cells.h5ad")
    for found in (normalised, tmp_path / "cells.h5ad"):
        for name, counts, factor in ((None, "raw.X", 2), ("raw", "raw.X", 2), ("raw.X", "raw.X", 2), ("layers/raw", "layers['raw']", 1)):
            source = open_cells(found, counts_layer=name)
            assert source.counts_described == counts
            assert next(source.iter_blocks()).counts_ng.sum() == factor * normalised.layers["raw"].sum()


def write_mudata(path, **modalities):
    """What `mudata.MuData(…).write` lays out: a group of modalities, each as an AnnData file has it."""
    with h5py.File(path, "w") as file:
        file.attrs["encoding-type"] = "MuData"
        anndata.io.write_elem(file, "obs", pd.DataFrame(index=next(iter(modalities.values())).obs_names))
        anndata.io.write_elem(file, "var", pd.DataFrame(index=[name for cells in modalities.values() for name in cells.var_names]))
        for name, cells in modalities.items():
            anndata.io.write_elem(file, f"mod/{name}", cells)
    return path


def mudata(**modalities):
    """As much of `mudata.MuData` as is read."""
    return types.SimpleNamespace(mod=modalities, obs=pd.DataFrame(), var=pd.DataFrame())


@pytest.fixture
def proteins(cells):
    return make_cells(["CD4_p", "CD8_p"], cells.n_obs)


def test_the_modality_of_rna_is_read(cells, proteins, tokenizer, model_folder, tmp_path, capsys):
    path = write_mudata(tmp_path / "cells.h5mu", prot=proteins, rna=cells)
    expected = tokens(cells, tokenizer)
    for found in (path, path / "rna", path / "mod/rna", mudata(prot=proteins, rna=cells), mudata(anything=cells)):
        assert tokens(found, tokenizer, cache_dir=tmp_path / "cache") == expected
    assert [row["input_ids"].tolist() for row in stream_cells(path / "rna", tokenizer=tokenizer)] == expected
    assert tokenizer(mudata(prot=proteins, rna=cells))["input_ids"] == tokenizer(cells)["input_ids"]
    assert open_cells(path).counts_described == "X of the modality 'rna'"
    tokenize_corpus(path, tmp_path / "tokens", tokenizer=tokenizer, num_proc=2)
    assert datasets.load_from_disk(str(tmp_path / "tokens"))["input_ids"][:] == expected
    assert main(["embed", str(path / "rna"), "--model", str(model_folder), "--output", str(tmp_path / "out.h5ad")]) == 0
    found = anndata.read_h5ad(tmp_path / "out.h5ad").obsm["X_geneformer"]
    assert np.allclose(found, embed_cells(load_model(model_folder), cells, progress=False), equal_nan=True)
    assert main(["info", str(path / "rna")]) == 0
    assert "X of the modality 'rna'" in capsys.readouterr().out


def test_modalities_of_a_zarr_store(cells, proteins, tokenizer, tmp_path):
    group = zarr.open_group(str(tmp_path / "cells.zarr"), mode="w")
    for part, names in (("obs", cells.obs_names), ("var", cells.var_names)):
        anndata.io.write_elem(group, part, pd.DataFrame(index=names))
    group.create_group("mod")
    for name, modality in (("rna", cells), ("prot", proteins)):
        anndata.io.write_elem(group, f"mod/{name}", modality)
    for path in (tmp_path / "cells.zarr", tmp_path / "cells.zarr" / "mod" / "rna"):
        assert tokens(path, tokenizer, cache_dir=tmp_path / "cache") == tokens(cells, tokenizer)
    assert open_cells(tmp_path / "cells.zarr").name == str(tmp_path / "cells.zarr" / "mod" / "rna")
    anndata.io.write_elem(group, "mod/gex", cells)
    with pytest.raises(CellFileError, match=r"of which 2 are known to be RNA\. Name the one .*cells\.zarr/mod/(rna|gex)`"):
        open_cells(tmp_path / "cells.zarr")


@pytest.mark.parametrize(
    ("names", "asked", "words"),
    [
        (("rna", "gex"), "", r"2 modalities \(gex, rna\), of which 2 are known to be RNA\. Name the one .*cells\.h5mu/gex"),
        (("one", "two"), "", r"of which none is known to be RNA"),
        (("prot",), "", r"1 modality \(prot\), of which none is known to be RNA"),
        (("rna", "prot"), "/prot", r"the modality 'prot' holds other features than genes"),
        (("rna", "prot"), "/adt", r"holds no modality 'adt'. Found: prot, rna"),
    ],
)
def test_other_modalities_are_refused(names, asked, words, cells, tmp_path):
    path = write_mudata(tmp_path / "cells.h5mu", **dict.fromkeys(names, cells))
    with pytest.raises(CellFileError, match=words):
        open_cells(f"{path}{asked}")
    if not asked:
        with pytest.raises(CellFileError, match=r"MuData holds .* pass `mdata\["):
            open_cells(mudata(**dict.fromkeys(names, cells)))


def write_sample(cells, folder, prefix="", *, quote="", transposed=False):
    """A 10x folder, gzipped, whose files have a prefix."""
    folder.mkdir(exist_ok=True)
    matrix = sp.coo_matrix(cells.X if transposed else cells.X.T).astype(int)
    scipy.io.mmwrite(folder / "m.mtx", matrix)
    with gzip.open(folder / f"{prefix}matrix.mtx.gz", "wb") as file:
        file.write((folder / "m.mtx").read_bytes())
    (folder / "m.mtx").unlink()
    lines = {"features": [f"{quote}{g}{quote}\t{quote}{g}{quote}\t{quote}Gene Expression{quote}" for g in cells.var_names], "barcodes": cells.obs_names}
    for name, some in lines.items():
        with gzip.open(folder / f"{prefix}{name}.tsv.gz", "wt") as file:
            file.write("".join(f"{line}\n" for line in some))
    return folder


@pytest.fixture
def geo(cells, genes, tmp_path):
    """Two samples in one folder, with barcodes in common."""
    write_sample(cells, tmp_path / "geo", "GSM1_lung_")
    return write_sample(make_cells(genes, 7, seed=5), tmp_path / "geo", "GSM2-skin.")


def test_samples_with_prefixes_are_sources_of_their_own(geo, cells, genes, tokenizer, tmp_path):
    found = load_cells(geo, tokenizer=tokenizer, cache_dir=tmp_path / "cache")
    assert found["input_ids"][:] == tokens(cells, tokenizer) + tokens(make_cells(genes, 7, seed=5), tokenizer)
    assert found["cell_id"][:] == [f"GSM1_lung_{name}" for name in cells.obs_names] + [f"GSM2-skin.cell{i}" for i in range(7)]
    assert len(set(found["cell_id"])) == len(found)
    one = geo / "GSM1_lung_matrix.mtx.gz"
    assert open_cells(one).cell_ids == found["cell_id"][:30]
    tokenize_corpus(geo, tmp_path / "tokens", tokenizer=tokenizer, num_proc=2)
    assert datasets.load_from_disk(str(tmp_path / "tokens"))["cell_id"][:] == found["cell_id"][:]


def test_a_change_in_one_sample_is_a_change_of_its_content_alone(geo):
    from geneformer_hf.data.files import content_hash

    one, other = sorted(geo.glob("*matrix.mtx.gz"))
    before = content_hash(one), content_hash(other)
    with gzip.open(geo / "GSM1_lung_barcodes.tsv.gz", "wt") as file:
        file.write("changed\n")
    assert content_hash(one) != before[0]
    assert content_hash(other) == before[1]


def test_one_sample_with_a_prefix_is_a_folder_of_10x(cells, tokenizer, tmp_path):
    folder = write_sample(cells, tmp_path / "one", "GSM1_")
    assert tokens(folder, tokenizer, cache_dir=tmp_path / "cache") == tokens(cells, tokenizer)
    (folder / "GSM1_barcodes.tsv.gz").unlink()
    with pytest.raises(CellFileError, match=r"has no GSM1_barcodes\.tsv, plain or \.gz"):
        open_cells(folder)


def test_a_folder_of_several_samples_is_named_where_one_file_is_meant(geo, model_folder, tmp_path, capsys):
    with pytest.raises(CellFileError, match=r"holds 2 samples \(GSM1_lung_, GSM2-skin\.\)\. Name the matrix of one: .*GSM1_lung_matrix\.mtx\.gz"):
        open_cells(geo)
    assert main(["info", str(geo)]) == 1
    assert "GSM1_lung_matrix.mtx.gz" in capsys.readouterr().err


def test_quoted_fields_are_read(cells, tokenizer, tmp_path):
    source = open_cells(write_sample(cells, tmp_path / "quoted", quote='"'))
    assert source.gene_names == cells.var_names.tolist()
    assert source.gene_symbols == cells.var_names.tolist()
    assert tokens(source, tokenizer) == tokens(cells, tokenizer)


def test_a_transposed_matrix_is_named_and_can_be_read(cells, tokenizer, tmp_path):
    folder = write_sample(cells, tmp_path / "turned", transposed=True)
    with pytest.raises(CellFileError, match=r"is transposed: it lies as cells x genes.*`counts_layer='matrix\.T'` \(`--counts-layer matrix\.T`\)"):
        open_cells(folder)
    assert tokens(folder, tokenizer, counts_layer="matrix.T", cache_dir=tmp_path / "cache") == tokens(cells, tokenizer)
    assert open_cells(folder, counts_layer="matrix.T").counts_described == "matrix.T"
    with pytest.raises(CellFileError, match=r"is transposed: it lies as genes x cells.* leave `counts_layer` out"):
        open_cells(write_sample(cells, tmp_path / "plain"), counts_layer="matrix.T")


TYPES = ["float16", ">f4", ">f8", ">i4", "longdouble", "int8", "uint16", "float64", "bool"]


@pytest.mark.parametrize("dtype", TYPES)
def test_dense_matrices_of_any_number_type_give_the_same_tokens(dtype, cells, tokenizer, tmp_path):
    counts = (cells.X.toarray() > 3) if dtype == "bool" else cells.X.toarray()
    expected = tokens(anndata.AnnData(sp.csr_matrix(counts.astype(np.float32)), cells.obs, cells.var), tokenizer)
    dense = anndata.AnnData(counts.astype(dtype), cells.obs.copy(), cells.var.copy())
    assert tokens(dense, tokenizer) == expected
    assert [cell for cell in tokenizer(dense)["input_ids"] if len(cell) > 2] == expected
    assert [c.tolist() for c in tokenizer.encode_counts(counts.astype(dtype), cells.var_names) if len(c) > 2] == expected
    if dtype not in ("longdouble", "bool"):
        dense.write_h5ad(tmp_path / "cells.h5ad")
        for found in (tmp_path / "cells.h5ad", anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")):
            assert tokens(found, tokenizer, cache_dir=tmp_path / "cache") == expected


@pytest.mark.parametrize("dtype", [np.longdouble, np.int64, np.uint8])
@pytest.mark.parametrize("form", ["csr", "csc", "coo", "bsr"])
def test_sparse_matrices_of_any_form_give_the_same_tokens(dtype, form, cells, tokenizer):
    found = cells.X.astype(dtype).asformat(form)
    assert [c.tolist() for c in tokenizer.encode_counts(found, cells.var_names)] == tokenizer(cells)["input_ids"]


@pytest.mark.parametrize("form", ["csr", "csc"])
def test_a_matrix_in_memory_stays_as_it_is(form, cells, tokenizer):
    """Types of indices, order and stored zeros among them."""
    found = cells.copy()
    matrix = found.X.asformat(form)
    matrix.indices, matrix.indptr = matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64)
    matrix.data[::7] = 0
    found._X = matrix
    before = [getattr(matrix, part).copy() for part in ("data", "indices", "indptr")]
    expected = tokens(found, tokenizer)
    assert [cell for cell in tokenizer(found)["input_ids"] if len(cell) > 2] == expected
    assert [c.tolist() for c in tokenizer.encode_counts(matrix, cells.var_names) if len(c) > 2] == expected
    after = [getattr(matrix, part) for part in ("data", "indices", "indptr")]
    assert all(one.dtype == two.dtype and np.array_equal(one, two) for one, two in zip(before, after, strict=True))


@pytest.mark.parametrize("chunk", ["sparse", "dense"])
def test_dask_arrays_are_computed_by_block(chunk, cells, tokenizer):
    dask = pytest.importorskip("dask.array", reason="needs dask")
    lazy = dask.from_array(cells.X.toarray(), chunks=(8, cells.n_vars))
    found = anndata.AnnData(lazy.map_blocks(sp.csr_matrix) if chunk == "sparse" else lazy, cells.obs.copy(), cells.var.copy())
    assert tokens(found, tokenizer) == tokens(cells, tokenizer)
    assert tokenizer(found)["input_ids"] == tokenizer(cells)["input_ids"]


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_arrays_of_cupy_are_copied_to_the_host(form, cells):
    """With a stand-in, which has what is used of a CuPy array: slices, and `get`."""

    class Array:
        __module__ = "cupy"

        def __init__(self, host):
            self.host = host

        def __getitem__(self, rows):
            return Array(self.host[rows])

        def get(self):
            return self.host

        def __array__(self, *args, **kwargs):
            raise TypeError

    host = cells.X if form == "sparse" else cells.X.toarray()
    assert (rows_of(Array(host), 3, 9).toarray() == cells.X[3:9].toarray()).all()


def test_tables_that_are_not_in_memory_are_refused_with_the_call(cells, tokenizer):
    """`anndata.experimental.read_lazy` needs xarray; its tables are no pandas ones."""
    lazy = types.SimpleNamespace(X=cells.X, obs=types.SimpleNamespace(columns=[]), var=cells.var, layers={}, raw=None, n_obs=30)
    for door in (lambda: open_cells(lazy), lambda: tokenizer(lazy)):
        with pytest.raises(CellFileError, match=r"obs is a SimpleNamespace, not a table in memory.*Pass the path of the file.*adata\.to_memory\(\)"):
            door()


def test_a_broken_sparse_index_is_refused(cells, tokenizer):
    for part, place, value, words in (("indices", 3, 500, "indices must be < 60"), ("indptr", 3, 10**6, "indptr"), ("indices", 2, -1, "indices must be >= 0")):
        broken = cells.X.copy()
        getattr(broken, part)[place] = value
        found = anndata.AnnData(cells.X.copy(), cells.obs.copy(), cells.var.copy())
        found._X = broken
        for door in (open_cells, tokenizer):
            with pytest.raises(CellFileError, match=f"is not a sound sparse matrix: .*{words}"):
                door(found)


@pytest.mark.parametrize("names", [["a", "a"], [1, "1"]])
def test_two_columns_of_one_name_are_refused(names, cells, tokenizer):
    found = cells.copy()
    found.obs = pd.DataFrame(np.zeros((30, 2)), index=cells.obs_names, columns=names)
    with pytest.raises(CellFileError, match=rf"obs has duplicate column names: '{names[0]}'"):
        load_cells(found, tokenizer=tokenizer)
    # Columns that are not read are no reason to refuse.
    assert tokenizer(found)["input_ids"] == tokenizer(cells)["input_ids"]
    assert open_cells(found).cell_ids == cells.obs_names.tolist()
    found = cells.copy()
    found.var = pd.DataFrame([["x", "y"]] * 60, index=cells.var_names, columns=names)
    for door in (open_cells, tokenizer):
        with pytest.raises(CellFileError, match="var has duplicate column names"):
            door(found)


def test_rounding_noise_is_named(cells, tokenizer):
    noisy = np.expm1(np.log1p(cells.X.toarray().astype(np.float32)))
    assert (noisy != np.rint(noisy)).any()
    found = anndata.AnnData(noisy, cells.obs.copy(), cells.var.copy())
    with pytest.raises(NotRawCountsError, match=r"X holds counts with rounding noise \([\d,]+ of 1,800 values are up to \S+e-0[67] from a whole number"):
        load_cells(found, tokenizer=tokenizer)
    found.X = np.rint(found.X)
    assert tokens(found, tokenizer) == tokens(cells, tokenizer)
    found.X = np.log1p(found.X)
    with pytest.raises(NotRawCountsError, match="looks log-normalised"):
        load_cells(found, tokenizer=tokenizer)


COLUMNS = {
    "big_endian": (np.arange(30).astype(">i4"), 7, "int64"),
    "big_endian_float": (np.arange(30).astype(">f8"), 7.0, "float64"),
    "long_double": (np.arange(30).astype(np.longdouble), 7.0, "float64"),
    "half": (np.arange(30).astype(np.float16), 7.0, "float32"),
    "bytes": ([b"abc"] * 30, "abc", "string"),
    "bytes_that_are_no_text": ([b"a\xff"] * 30, "a\\xff", "string"),
    "half_a_character": (["a\ud800"] * 30, "a\\ud800", "string"),
    "categories_of_bytes": (pd.Categorical([b"x", b"y"] * 15), 1, None),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_odd_columns_of_obs_are_kept(name, cells, tokenizer):
    values, expected, dtype = COLUMNS[name]
    found = cells.copy()
    found.obs[name] = pd.Series(values, index=found.obs_names)
    dataset = load_cells(found, tokenizer=tokenizer)
    assert dataset[7][name] == expected
    assert dataset.features[name] == (datasets.Value(dtype) if dtype else datasets.ClassLabel(names=["x", "y"]))


def test_big_endian_columns_of_a_file_are_kept(cells, tokenizer, tmp_path):
    write(cells, tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        file["obs/age"] = np.arange(30).astype(">f8")
        file["obs"].attrs["column-order"] = np.array([*file["obs"].attrs["column-order"], "age"], dtype=h5py.string_dtype())
        for part in ("data", "indices", "indptr"):
            values = file[f"X/{part}"][:]
            del file[f"X/{part}"]
            file[f"X/{part}"] = values.astype(values.dtype.newbyteorder(">"))
    dataset = load_cells(tmp_path / "cells.h5ad", tokenizer=tokenizer, cache_dir=tmp_path / "cache")
    assert dataset["age"][:] == np.arange(30.0).tolist()
    assert dataset["input_ids"][:] == tokens(cells, tokenizer)


def test_compound_attributes_of_loom_are_left_out_and_named(cells, tokenizer, tmp_path, caplog):
    from tests.formats.files import write_loom

    path = write_loom(cells, tmp_path / "cells.loom")
    with h5py.File(path, "r+") as file:
        file["col_attrs/Embedding"] = np.zeros(30, dtype=[("_X", "f4"), ("_Y", "f4")])
        file["col_attrs/Louvain"] = np.arange(30)
        file["row_attrs/Regulons"] = np.zeros(60, dtype=[("a", "i1")])
    source = open_cells(path)
    assert "Louvain" in source.obs_columns
    assert "Embedding" not in source.obs_columns
    assert "more than one value a row, such as embeddings, are left out: row_attrs/Regulons, col_attrs/Embedding" in caplog.text
    assert tokens(path, tokenizer, cache_dir=tmp_path / "cache") == tokens(cells, tokenizer)


def test_streams_can_be_embedded(cells, tokenizer, model_folder, tmp_path):
    dataset = load_cells(cells, tokenizer=tokenizer)
    dataset.save_to_disk(tmp_path / "tokens")
    model = load_model(model_folder)
    expected = embed_cells(model, dataset, progress=False)
    for stream in (
        dataset.to_iterable_dataset(),
        dataset.to_iterable_dataset(num_shards=3),
        stream_tokens(tmp_path / "tokens"),
        stream_cells(cells, tokenizer=tokenizer),
    ):
        assert np.array_equal(embed_cells(model, stream, progress=False), expected)
    unknown = datasets.IterableDataset.from_generator(lambda: iter([{"input_ids": row} for row in dataset["input_ids"][:]]))
    assert np.array_equal(embed_cells(model, unknown, progress=False), expected)


BAD_IDS = {
    "beyond": ([2, 5, 99_999], VocabularyMismatchError, r"cell 'cell17' \(row 17\) holds the token id 99,999; expected token ids from 0 to 63"),
    "negative": ([2, -5, 3], VocabularyMismatchError, r"cell 'cell17' \(row 17\) holds the token id -5"),
    "null": ([2, None, 3], VocabularyMismatchError, "some of the cells 0 to 29 are missing, or hold a missing token"),
    "missing": (None, VocabularyMismatchError, "1 of the cells 0 to 29 are missing"),
    "fractions": ([2.5], CellFileError, "expected lists of token ids"),
    "text": (["a"], CellFileError, "expected lists of token ids"),
}


@pytest.mark.parametrize("name", BAD_IDS)
def test_token_ids_that_no_vocabulary_has_are_refused_wherever_they_stand(name, cells, tokenizer, model_folder):
    ids, error, words = BAD_IDS[name]
    rows = load_cells(cells, tokenizer=tokenizer, obs="none").to_list()
    convert = {"fractions": float, "text": str}.get(name, int)
    rows = [row | {"input_ids": [convert(i) for i in row["input_ids"]]} for row in rows]
    rows[17]["input_ids"] = ids
    with pytest.raises(error, match=words):
        embed_cells(load_model(model_folder), datasets.Dataset.from_list(rows), progress=False)


@pytest.mark.parametrize("ids", [[2, -5, 3], [2, 99_999], [2, None]])
def test_collators_refuse_token_ids_that_no_vocabulary_has(ids, tokenizer):
    rows = [{"input_ids": [2, 5, 3], "cell_id": "a"}, {"input_ids": ids, "cell_id": "b"}]
    for collate in (DataCollatorForCells(tokenizer), DataCollatorForMaskedGenes(tokenizer)):
        with pytest.raises(VocabularyMismatchError, match=r"cell '[ab]' holds (the token id|missing or non-integer)"):
            collate(rows)


def test_a_cell_without_tokens_stays_in_its_batch(tokenizer):
    batch = DataCollatorForCells(tokenizer)([{"input_ids": [5, 6], "label": 0}, {"input_ids": [], "label": 1}])
    assert batch["input_ids"].tolist() == [[5, 6], [0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 0]]


def test_tokens_cannot_be_added(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    opened = GeneformerTokenizer.from_pretrained(tmp_path / "tokenizer")
    for add in (
        lambda: opened.add_tokens(["GFP"]),
        lambda: opened.add_special_tokens({"sep_token": "<sep>"}),
        lambda: opened.add_tokens("GFP", special_tokens=True),
    ):
        with pytest.raises(SettingError, match=r"'(GFP|<sep>)' cannot be added: the vocabulary is that of the gene table"):
            add()
    opened.add_tokens(["<pad>"])
    opened.save_pretrained(tmp_path / "again")
    assert GeneformerTokenizer.from_pretrained(tmp_path / "again").get_vocab() == tokenizer.get_vocab()


def test_special_tokens_can_be_left_out(cells, tokenizer):
    plain = tokenizer(cells, add_special_tokens=False)["input_ids"]
    whole = tokenizer(cells)["input_ids"]
    assert all(short[:60] == long[1:-1][: len(short)] for short, long in zip(plain, whole, strict=True))
    assert all(len(short) >= len(long) - 2 for short, long in zip(plain, whole, strict=True))
    assert tokenizer(cells.X, gene_ids=cells.var_names, add_special_tokens=False)["input_ids"] == plain
    with pytest.raises(SettingError, match="return_offsets_mapping cannot be used with cells; expected padding"):
        tokenizer(cells, return_offsets_mapping=True)


@pytest.mark.parametrize("names", ["Gene{}", "gene_{}", "Feature {}", "V{}"])
def test_names_that_are_numbers_are_named_so(names, tokenizer):
    with pytest.raises(GeneIdError, match="the names are numbered"):
        load_cells(make_cells([names.format(i) for i in range(60)]), tokenizer=tokenizer)


CASES = ("layer_named_raw.h5ad", "compound_attributes.loom", "modalities.h5mu", "geo_prefix", "quoted_features")


@pytest.mark.shared
@pytest.mark.parametrize("name", CASES)
def test_cases_that_people_reported_are_read(name, shared, tmp_path):
    from geneformer_hf.models.dictionaries import find_dictionaries

    tokenizer = GeneformerTokenizer.from_dictionaries(find_dictionaries(shared / "data" / "geneformer_dicts_v2", 20_275))
    found = load_cells(shared / "cases" / name, tokenizer=tokenizer, cache_dir=tmp_path)
    assert len(found) >= 12
    assert len(set(found["cell_id"])) == len(found)
    assert min(found["length"]) > 20
