"""Inputs that broke an earlier state of this package, or would break a careless one."""

import anndata
import datasets
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from transformers import BertConfig, BertForMaskedLM

from geneformer_hf import GeneformerForMaskedLM, GeneTable, embed_cells, embed_genes, fit_gene_table, load_cells, rank_genes, state_embeddings
from geneformer_hf.data.readers import open_cells
from geneformer_hf.errors import CellFileError, CheckpointError, ColumnNotFoundError, SettingError, UnknownGeneError
from geneformer_hf.models.loading import load_model
from geneformer_hf.ranking import MAX_COLUMNS
from tests.conftest import ensembl, make_cells, random_counts, tiny_config, write
from tests.tolerances import SAME_MODEL


def shuffled_rows(counts: sp.csr_matrix, seed: int = 0) -> sp.csr_matrix:
    """The same matrix with the entries of each row in random order."""
    rng = np.random.default_rng(seed)
    data, indices = counts.data.copy(), counts.indices.copy()
    for start, stop in zip(counts.indptr, counts.indptr[1:], strict=False):
        order = rng.permutation(stop - start) + start
        data[start:stop], indices[start:stop] = counts.data[order], counts.indices[order]
    return sp.csr_matrix((data, indices, counts.indptr.copy()), shape=counts.shape)


@pytest.mark.parametrize("names", ["distinct", "in_pairs"])
def test_the_callers_matrix_is_not_touched(names, tokenizer, genes):
    counts = shuffled_rows(random_counts(20, 60))
    before = counts.copy()
    ids = genes if names == "distinct" else genes[:30] * 2
    tokenizer.encode_counts(counts, ids)
    rank_genes(counts, np.arange(60) // 2, np.ones(60))
    for part in ("data", "indices", "indptr"):
        assert np.array_equal(getattr(counts, part), getattr(before, part)), part


def test_rows_in_any_order_give_the_same_tokens(tokenizer, genes):
    cells = make_cells(genes, 20)
    mixed = cells.copy()
    mixed.X = shuffled_rows(cells.X)
    a, b = (load_cells(x, tokenizer=tokenizer, keep_uncropped=True, keep_counts=True) for x in (cells, mixed))
    assert a[:] == b[:]
    assert all(row["input_ids"][1:-1] == row["input_ids_uncropped"][: row["length"] - 2] for row in b)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, bool])
@pytest.mark.parametrize("where", ["memory", "csr", "csc"])
def test_sums_of_narrow_integers_do_not_overflow(dtype, where, tokenizer, genes, tmp_path):
    largest = 1 if dtype is bool else 100 if dtype is np.int8 else 128 if dtype is np.uint8 else np.iinfo(dtype).max
    values = np.array([[largest, 1, largest]], dtype=dtype)
    cells = anndata.AnnData(
        sp.csr_matrix(values), pd.DataFrame(index=["a"]), pd.DataFrame({"ensembl_id": [genes[0], genes[1], genes[0]]}, index=["x", "y", "z"])
    )
    source = cells if where == "memory" else write(cells, tmp_path / "a.h5ad", where)
    assert load_cells(source, tokenizer=tokenizer)[0]["input_ids"] == [2, 4, 5, 3]
    assert len(fit_gene_table(source)) == 2


def test_more_columns_than_fit_beside_a_value(tokenizer, genes):
    """Multiome files have a million peaks beside the genes."""
    names = [f"chr1:{i}-{i + 1}" for i in range(MAX_COLUMNS)] + genes
    counts = sp.csr_matrix(([3.0, 9.0, 5.0], ([0, 0, 0], [MAX_COLUMNS, MAX_COLUMNS + 1, 7])), shape=(1, len(names)))
    columns = tokenizer.gene_table.resolve(names, source="test")
    assert [c.tolist() for c in tokenizer.encode_block(sp.csr_array(counts), columns).split()] == [[2, 5, 4, 3]]
    with pytest.raises(ValueError, match="at most 1,048,576 can be ranked"):
        rank_genes(counts, np.arange(len(names)), np.ones(len(names)))


def test_a_stored_minus_zero_is_not_detected(tokenizer, genes):
    counts = sp.csr_array((np.array([3.0, -0.0, 2.0]), np.array([0, 1, 2]), np.array([0, 3])), shape=(1, 60))
    assert [c.tolist() for c in tokenizer.encode_counts(counts, genes)] == [[2, 4, 6, 3]]


def test_no_cells_give_no_lists(tokenizer, genes):
    assert tokenizer.encode_counts(sp.csr_array((0, 60)), genes) == []
    assert rank_genes(np.zeros((0, 3)), np.arange(3), np.ones(3)) == []


def test_pads_in_a_dataset_are_left_out(model, tokenizer, cells):
    padded = datasets.Dataset.from_dict(dict(tokenizer(cells, padding=True)))
    plain = load_cells(cells, tokenizer=tokenizer)
    for pooling in ("cls", "mean"):
        a, b = (embed_cells(model, x, pooling=pooling, progress=False) for x in (padded, plain))
        np.testing.assert_allclose(a, b, atol=SAME_MODEL)
    a, b = (embed_genes(model, x, tokenizer=tokenizer, progress=False) for x in (padded, plain))
    np.testing.assert_allclose(a.vectors, b.vectors, atol=SAME_MODEL)


def test_lists_of_fixed_length(model):
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"), length=4)})
    fixed = datasets.Dataset.from_dict({"input_ids": [[2, 5, 6, 3], [2, 9, 8, 3]]}, features=features)
    free = datasets.Dataset.from_dict({"input_ids": [[2, 5, 6, 3], [2, 9, 8, 3]]})
    np.testing.assert_array_equal(*(embed_cells(model, x, progress=False) for x in (fixed, free)))


@pytest.mark.parametrize("layout", ["csr", "csc"])
@pytest.mark.parametrize("how", ["swapped", "short", "data"])
def test_a_damaged_index_is_refused(layout, how, cells, tmp_path):
    path = write(cells, tmp_path / "a.h5ad", layout)
    with h5py.File(path, "r+") as file:
        for name in ("indptr",) if how != "data" else ("data",):
            values = file["X"][name][:]
            if how == "swapped":
                values[[3, 4]] = values[[4, 3]]
            else:
                values = values[:-2]
            del file["X"][name]
            file["X"][name] = values
    with pytest.raises(CellFileError, match="its index does not fit its entries"):
        open_cells(path)


def test_own_names_in_obs_never_collide(genes, tokenizer):
    dataset = load_cells(make_cells(genes, 4, length=[1, 2, 3, 4], obs_length=[9, 9, 9, 9], cell_id=["a", "b", "c", "d"]), tokenizer=tokenizer)
    assert dataset["obs_length"][:] == [9] * 4
    assert dataset["obs_obs_length"][:] == [1, 2, 3, 4]
    assert dataset["obs_cell_id"][:] == ["a", "b", "c", "d"]


def test_tokenizer_and_dataset_find_the_counts_in_the_same_place(tokenizer, genes):
    cells = make_cells(genes, 100)
    cells.layers["counts"] = cells.X.copy()
    x = np.zeros((100, 60))
    x[80:] = 0.5
    cells.X = x
    expected = load_cells(cells, tokenizer=tokenizer)["input_ids"][:]
    assert tokenizer(cells)["input_ids"] == [list(row) for row in expected]


def test_a_file_whose_normalised_values_come_late(tokenizer, genes, tmp_path, monkeypatch):
    from geneformer_hf.data import matrices

    monkeypatch.setattr(matrices, "SAMPLE_VALUES", 200)
    cells = make_cells(genes, 100)
    cells.layers["counts"] = cells.X.copy()
    x = cells.X.toarray()
    x[80:] += 0.5
    cells.X = x
    assert open_cells(write(cells, tmp_path / "a.h5ad", "as it is")).counts == "counts"


def test_a_backed_anndata_in_the_tokenizer(h5ad, cells, tokenizer):
    backed = anndata.read_h5ad(h5ad, backed="r")
    assert tokenizer(backed)["input_ids"] == tokenizer(cells)["input_ids"]
    backed.file.close()


def test_unknown_genes_are_named_by_every_way_in(tokenizer):
    ways = (lambda: tokenizer.encode(["FOO"], is_split_into_words=True), lambda: tokenizer.tokenize("FOO"), lambda: tokenizer(ensembl(1), text_pair="FOO"))
    for way in ways:
        with pytest.raises(UnknownGeneError, match="1 genes are not in this vocabulary of 60 Ensembl ids: FOO"):
            way()


def test_columns_named_by_numbers_and_missing_ones(model, tokenizer, cells):
    cells.obs[3] = range(30)
    assert load_cells(cells, tokenizer=tokenizer)["3"][:] == list(range(30))
    with pytest.raises(ColumnNotFoundError, match="obs has no column 'nope'"):
        state_embeddings(model, cells, "nope", tokenizer=tokenizer, progress=False)


def test_half_precision_and_large_numbers_in_obs(tokenizer, genes, tmp_path):
    cells = make_cells(genes, 5, big=np.array([2**63 + 1] * 5, dtype=np.uint64))
    expected = load_cells(cells, tokenizer=tokenizer)
    assert expected["big"][:] == [2**63 + 1] * 5
    path = write(cells, tmp_path / "a.h5ad", "dense")
    with h5py.File(path, "r+") as file:
        values, attributes = file["X"][:].astype(np.float16), dict(file["X"].attrs)
        del file["X"]
        file["X"] = values
        file["X"].attrs.update(attributes)
    assert load_cells(path, tokenizer=tokenizer)["input_ids"][:] == expected["input_ids"][:]


def test_an_alias_that_leads_nowhere_is_refused(genes):
    with pytest.raises(ValueError, match=rf"1 aliases lead to genes that are not in the table: {ensembl(900)}"):
        GeneTable(genes, range(60), np.ones(60), (), {ensembl(900): ensembl(901)})


def test_the_index_may_be_called_by_its_name(tokenizer, cells, tmp_path):
    cells.var.index.name = "ensembl_id"
    expected = load_cells(cells, tokenizer=tokenizer)["input_ids"][:]
    for source in (cells, write(cells, tmp_path / "a.h5ad")):
        assert load_cells(source, tokenizer=tokenizer, gene_ids="ensembl_id")["input_ids"][:] == expected


def test_precision_that_is_lost_is_not_promised(model, tokenizer, cells):
    half = GeneformerForMaskedLM(model.config).to(torch.bfloat16)
    assert np.isfinite(embed_cells(half, cells, tokenizer=tokenizer, progress=False)).all()
    for dtype in ("fp32", "fp16"):
        with pytest.raises(SettingError, match=r"the weights are torch\.bfloat16"):
            embed_cells(half, cells, tokenizer=tokenizer, dtype=dtype)


def test_a_plain_bert_object_is_refused_with_the_remedy(cells, tokenizer):
    plain = BertForMaskedLM(BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    with pytest.raises(CheckpointError, match=r"Open its checkpoint with GeneformerForMaskedLM\.from_pretrained"):
        embed_cells(plain, cells, tokenizer=tokenizer)


def test_a_subfolder_of_a_local_folder(model, tmp_path):
    model.save_pretrained(tmp_path / "repository" / "sub")
    assert type(load_model(tmp_path / "repository", subfolder="sub")) is GeneformerForMaskedLM


@pytest.mark.parametrize("items", [None, 0, torch.tensor(0)])
def test_a_step_without_labels_has_no_loss_and_no_nan(items, tokenizer):
    model = GeneformerForMaskedLM(tiny_config(tokenizer)).train()
    ids = torch.tensor([[2, 5, 6, 3]])
    assert model(input_ids=ids, labels=torch.full_like(ids, -100), num_items_in_batch=items).loss.item() == 0


def test_the_copy_on_y_has_one_name_everywhere():
    cells = make_cells(["ENSG00000182378.15", "ENSG00000182378.15_PAR_Y"], 3)
    cells.X = np.ones((3, 2), dtype=np.float32)
    assert fit_gene_table(cells).ensembl_ids == ("ENSG00000182378", "ENSGR0000182378")


def test_one_file_by_two_names(h5ad, tokenizer, tmp_path):
    (tmp_path / "link.h5ad").symlink_to(h5ad)
    with pytest.raises(CellFileError, match="Named more than once"):
        load_cells([h5ad, tmp_path / "link.h5ad"], tokenizer=tokenizer)
