import filecmp
import json

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from geneformer_hf import GeneformerTokenizer, GeneTable
from geneformer_hf.errors import CheckpointError, NotRawCountsError, UnknownGeneError, VocabularyMismatchError
from tests import reference
from tests.conftest import ensembl, make_cells, random_counts


def test_v1_has_pad_and_mask_alone(v1_tokenizer):
    assert (v1_tokenizer.pad_token_id, v1_tokenizer.mask_token_id, v1_tokenizer.cls_token_id, v1_tokenizer.eos_token_id) == (0, 1, None, None)
    assert v1_tokenizer(ensembl(1))["input_ids"] == [2]


def test_v2_puts_cls_and_eos_around(tokenizer):
    assert (tokenizer.cls_token_id, tokenizer.eos_token_id) == (2, 3)
    encoded = tokenizer([f"{ensembl(1)} {ensembl(3)}", ensembl(2)], padding=True, return_tensors="np")
    assert encoded["input_ids"].tolist() == [[2, 4, 6, 3], [2, 5, 3, 0]]
    assert encoded["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert tokenizer.decode([2, 4, 3]) == f"<cls> {ensembl(1)} <eos>"


def test_gene_lists_are_cut_with_room_for_special_tokens(tokenizer):
    ids = tokenizer([ensembl(i) for i in range(1, 11)], is_split_into_words=True, truncation=True, max_length=5)["input_ids"]
    assert ids == [2, 4, 5, 6, 3]


@pytest.mark.parametrize("which", ["v1_tokenizer", "tokenizer"])
def test_two_saves_of_one_tokenizer_are_the_same_bytes(which, request, tmp_path):
    first = request.getfixturevalue(which)
    # What the last call asked for must not leak into the files.
    first([ensembl(1)], padding="max_length", max_length=9, truncation=True)
    first.save_pretrained(tmp_path / "a")
    second = AutoTokenizer.from_pretrained(tmp_path / "a", local_files_only=True)
    assert type(second) is GeneformerTokenizer
    second([ensembl(1)], padding="max_length", max_length=7, truncation=True)
    second.save_pretrained(tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["gene_table.json", "tokenizer.json", "tokenizer_config.json"]
    match, mismatch, errors = filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", names, shallow=False)
    assert (sorted(match), mismatch, errors) == (names, [], [])
    assert "padding" not in (tmp_path / "a" / "tokenizer_config.json").read_text()
    assert second.get_vocab() == first.get_vocab()
    assert second.gene_table.fingerprint == first.gene_table.fingerprint
    assert second.model_max_length == first.model_max_length


def test_a_vocabulary_with_a_gap_keeps_its_ids(tmp_path):
    tokenizer = GeneformerTokenizer(gene_table=GeneTable([ensembl(1), ensembl(2)], [2, 9], [1, 1]))
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.convert_tokens_to_ids([ensembl(1), ensembl(2), "<pad>", "<mask>"]) == [2, 9, 0, 1]


def test_the_folder_opens_without_the_plugin_with_the_same_ids(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    plain = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert plain(f"{ensembl(1)} {ensembl(3)}")["input_ids"] == [2, 4, 6, 3]


def test_unknown_genes_are_refused_by_name(tokenizer):
    with pytest.raises(UnknownGeneError, match="2 genes are not in this vocabulary of 60 Ensembl ids: NOPE, ENSG99"):
        tokenizer(["NOPE", ensembl(1), "ENSG99"], is_split_into_words=True)
    with pytest.raises(UnknownGeneError, match="NOPE"):
        tokenizer.convert_tokens_to_ids([ensembl(1), "NOPE"])
    with pytest.raises(UnknownGeneError, match="NOPE"):
        tokenizer.gene_table.token_of(["NOPE"])


def test_other_mistakes_keep_their_own_error(tokenizer):
    with pytest.raises((ValueError, TypeError)):
        tokenizer(5)


def test_counts_matrices_and_anndata_give_the_same_tokens(tokenizer, table, genes):
    cells = make_cells(genes, 12)
    expected = [[2, *reference.rank_cell(row.astype(np.float64), table.token_ids, table.medians)[:62], 3] for row in cells.X.toarray()]
    assert [c.tolist() for c in tokenizer.encode_counts(cells.X, genes)] == expected
    assert [c.tolist() for c in tokenizer.encode_counts(cells.X.toarray(), genes, totals_n=np.full(12, 1e6))] == expected
    assert tokenizer(cells)["input_ids"] == expected
    assert tokenizer(sp.csr_matrix(cells.X), gene_ids=genes)["input_ids"] == expected
    padded = tokenizer(cells, padding=True, return_tensors="pt")
    assert padded["input_ids"].shape == (12, max(map(len, expected)))
    assert padded["attention_mask"].sum() == sum(map(len, expected))


def test_cells_longer_than_the_model_lose_their_lowest_ranks(genes, table):
    tokenizer = GeneformerTokenizer(gene_table=table, cls_token="<cls>", eos_token="<eos>", model_max_length=10)
    full = GeneformerTokenizer(gene_table=table, cls_token="<cls>", eos_token="<eos>", model_max_length=64)
    counts = random_counts(5, len(genes), density=1.0)
    for short, long in zip(tokenizer.encode_counts(counts, genes), full.encode_counts(counts, genes), strict=True):
        assert short.tolist() == [*long[:9].tolist(), 3]


def test_an_empty_cell_holds_special_tokens_alone(tokenizer, v1_tokenizer, genes):
    empty = np.zeros((1, len(genes)))
    assert [c.tolist() for c in tokenizer.encode_counts(empty, genes)] == [[2, 3]]
    assert [c.tolist() for c in v1_tokenizer.encode_counts(empty, genes)] == [[]]


def test_counts_beside_tokens(tokenizer, genes, table):
    counts = sp.csr_array(random_counts(6, len(genes)).astype(np.float64))
    totals = np.asarray(counts.sum(1)).ravel() + 10
    columns = table.resolve(genes, source="x")
    block = tokenizer.encode_block(counts, columns, totals_n=totals)
    column_of = {int(t): i for i, t in enumerate(table.token_ids)}
    for i, cell in enumerate(block.split()):
        beside = block.counts[block.offsets[i] : block.offsets[i + 1]]
        assert beside[0] == beside[-1] == 0
        expected = [counts[i, column_of[t]] / totals[i] * 1e4 for t in cell[1:-1].tolist()]
        np.testing.assert_allclose(beside[1:-1], expected, rtol=1e-12)


def test_anndata_counts_in_raw_come_with_the_genes_of_raw(v1_tokenizer, genes):
    cells = make_cells(genes, 5)
    expected = v1_tokenizer(cells)["input_ids"]
    log = cells.copy()
    log.raw = cells
    log = log[:, ::-1].copy()
    log.X = np.log1p(log.X.toarray())
    assert v1_tokenizer(log)["input_ids"] == expected


def test_wrong_calls_say_what_is_missing(tokenizer, genes):
    with pytest.raises(ValueError, match="pass `gene_ids=`"):
        tokenizer(np.ones((1, 2)))
    with pytest.raises(ValueError, match="counts have 2 columns and gene_ids 60 names"):
        tokenizer.encode_counts(np.ones((1, 2)), genes)
    with pytest.raises(NotRawCountsError, match="belongs to another matrix"):
        tokenizer.encode_counts(np.ones((1, 60)), genes, totals_n=np.array([1.0]))
    with pytest.raises(CheckpointError, match="needs a gene table"):
        GeneformerTokenizer()


def test_files_of_two_vocabularies_are_refused(tokenizer, v1_tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "gene_table.json").write_text(v1_tokenizer.gene_table.to_json())
    with pytest.raises(VocabularyMismatchError, match="60 of them have other ids"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_nothing_on_disk_is_a_pickle(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        assert json.loads(path.read_text())


def test_symbols_of_an_anndata(tokenizer):
    cells = anndata.AnnData(np.array([[1, 5]], dtype=np.float32), pd.DataFrame(index=["c"]), pd.DataFrame(index=["SYM4", "SYM9"]))
    tokens = tokenizer(cells)["input_ids"][0]
    assert sorted(tokens[1:-1]) == [8, 13]
