import copy
import logging

import anndata
import datasets
import numpy as np
import pytest
import torch

from geneformer_hf import (
    GeneformerForMultiTaskClassification,
    GeneformerForSequenceClassification,
    GeneformerForTokenClassification,
    GeneformerTokenizer,
    GeneTable,
    embed_cells,
    embed_genes,
    iter_gene_embeddings,
    load_cells,
    state_embeddings,
)
from geneformer_hf.analysis.embeddings import Embedder, resolve_layer
from geneformer_hf.device import resolve_device
from geneformer_hf.errors import CheckpointError, ColumnNotFoundError, LayerError, VocabularyMismatchError
from geneformer_hf.models import attention, encoding
from tests import reference
from tests.conftest import ensembl, make_cells, tiny_config, with_row, write
from tests.tolerances import BF16, NAIVE_TWIN, SAME_MODEL


@pytest.fixture
def dataset(cells, tokenizer):
    return load_cells(cells, tokenizer=tokenizer)


@pytest.fixture
def quiet():
    return {"progress": False, "device": "cpu"}


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("layer", [-1, -2, 0, 1, 3, -4])
def test_cells_equal_one_naive_pass_each(pooling, layer, model, dataset, quiet):
    got = embed_cells(model, dataset, layer=layer, pooling=pooling, **quiet)
    expected = np.stack([reference.embed_cell(model, cell, layer, pooling) for cell in dataset["input_ids"][:]])
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=NAIVE_TWIN)


def test_v1_cells_have_no_special_tokens_to_leave_out(v1_model, v1_tokenizer, cells, quiet):
    dataset = load_cells(cells, tokenizer=v1_tokenizer)
    expected = np.stack([reference.embed_cell(v1_model, cell, -2, "mean") for cell in dataset["input_ids"][:]])
    np.testing.assert_allclose(embed_cells(v1_model, dataset, **quiet), expected, atol=NAIVE_TWIN)


@pytest.mark.parametrize(("batch_size", "tokens"), [(1, 8192), (3, 8192), (None, 40), (None, 8192)])
def test_batch_size_and_budget_change_nothing(batch_size, tokens, model, dataset, quiet, monkeypatch):
    whole = embed_cells(model, dataset, **quiet)
    monkeypatch.setattr(encoding, "TOKENS_PER_PASS_ON_CPU", tokens)
    np.testing.assert_allclose(embed_cells(model, dataset, batch_size=batch_size, **quiet), whole, atol=SAME_MODEL)


def test_order_and_company_change_nothing(model, dataset, quiet):
    whole = embed_cells(model, dataset, **quiet)
    order = np.random.default_rng(0).permutation(len(dataset))
    np.testing.assert_allclose(embed_cells(model, dataset.select(order), **quiet), whole[order], atol=SAME_MODEL)
    np.testing.assert_allclose(embed_cells(model, dataset.select([7]), **quiet), whole[[7]], atol=SAME_MODEL)


def test_the_padded_path_of_accelerators_equals_the_cell_by_cell_path(model):
    """What runs on CUDA and MPS, run on the CPU."""
    torch.manual_seed(0)
    lengths = [5, 1, 9, 9]
    query, key, value = torch.randn(3, sum(lengths), 16)
    padded = attention._Padded(torch.tensor(lengths), longest=9)
    by_cell = attention._cell_by_cell(query, key, value, 2, lengths)
    torch.testing.assert_close(padded.attend(query, key, value, heads=2), by_cell, atol=1e-6, rtol=1e-5)
    even = attention._Padded(torch.tensor([3, 3]), longest=3)
    assert even.mask is None


def test_padding_a_cell_changes_its_hidden_states_by_nothing(model, dataset):
    cell = dataset[0]["input_ids"]
    alone = reference.hidden_states(model, cell, -2)
    padded = torch.tensor([cell + [0] * 7])
    with torch.no_grad():
        together = model(input_ids=padded, attention_mask=(padded != 0).long(), output_hidden_states=True).hidden_states[-2][0, : len(cell)]
    torch.testing.assert_close(together, alone, atol=SAME_MODEL, rtol=0)


@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_anndata_file_folder_and_dataset_give_the_same(layout, model, model_folder, tokenizer, cells, dataset, tmp_path, quiet):
    whole = embed_cells(model, dataset, **quiet)
    dataset.save_to_disk(tmp_path / "tokens")
    path = write(cells, tmp_path / "cells.h5ad", layout)
    for source in (cells, path, str(path), tmp_path / "tokens"):
        np.testing.assert_allclose(embed_cells(model_folder, source, **quiet), whole, atol=SAME_MODEL)
    np.testing.assert_allclose(embed_cells(model, cells, tokenizer=tokenizer, **quiet), whole, atol=SAME_MODEL)


@pytest.mark.parametrize("cls", [GeneformerForSequenceClassification, GeneformerForTokenClassification, GeneformerForMultiTaskClassification])
def test_fine_tuned_models_embed_like_their_encoder(cls, model, tokenizer, dataset, quiet):
    tuned = cls(tiny_config(tokenizer, task_labels={"a": ["x", "y"]}))
    tuned.bert.load_state_dict(model.bert.state_dict(), strict=False)
    np.testing.assert_array_equal(embed_cells(tuned, dataset, **quiet), embed_cells(model, dataset, **quiet))


def test_the_model_is_left_as_it_was(model, dataset, quiet):
    trained = copy.deepcopy(model).train()
    before = {name: p.clone() for name, p in trained.named_parameters()}
    embed_cells(trained, dataset, dtype="bf16", **quiet)
    assert trained.training
    assert all(torch.equal(p, before[name]) and p.dtype == torch.float32 for name, p in trained.named_parameters())


def test_bf16_is_close_and_comes_as_float32(model, dataset, quiet):
    full, half = embed_cells(model, dataset, **quiet), embed_cells(model, dataset, dtype="bf16", **quiet)
    assert half.dtype == np.float32
    assert not np.array_equal(full, half)
    np.testing.assert_allclose(half, full, atol=BF16)


def test_weights_that_are_not_numbers_are_no_cells_without_genes(model, tokenizer, genes, quiet):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        next(p for n, p in broken.named_parameters() if n.endswith("layer.0.output.dense.weight"))[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"the embeddings of 5 of 5 cells are not numbers \(NaN\), though they have genes: the weights are damaged"):
        embed_cells(broken, make_cells(genes, 5), tokenizer=tokenizer, **quiet)


def test_cells_without_genes_are_nan_and_counted(model, tokenizer, genes, caplog, quiet):
    cells = make_cells(genes, 5)
    cells.X = with_row(cells.X, 2, 0)
    with caplog.at_level(logging.WARNING):
        got = embed_cells(model, cells, tokenizer=tokenizer, **quiet)
    assert np.isnan(got).all(axis=1).tolist() == [False, False, True, False, False]
    assert "1 of 5 cells hold no gene" in caplog.text


def test_no_cells_at_all(model, tokenizer, cells, quiet):
    assert embed_cells(model, cells[:0], tokenizer=tokenizer, **quiet).shape == (0, 16)


def test_out_of_memory_halves_the_pass_and_goes_on(model, dataset, quiet, monkeypatch, caplog):
    whole = embed_cells(model, dataset, **quiet)
    real, seen = encoding.encode_packed, []

    def small_device(bert, input_ids, lengths, n_layers):
        seen.append(len(input_ids))
        if len(input_ids) > 300:
            raise torch.OutOfMemoryError
        return real(bert, input_ids, lengths, n_layers)

    monkeypatch.setattr(encoding, "encode_packed", small_device)
    with caplog.at_level(logging.WARNING):
        got = embed_cells(model, dataset, **quiet)
    np.testing.assert_allclose(got, whole, atol=SAME_MODEL)
    assert max(seen) > 300
    assert "going on with smaller passes" in caplog.text
    monkeypatch.setattr(encoding, "encode_packed", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(torch.OutOfMemoryError):
        embed_cells(model, dataset, **quiet)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing_and_are_given_back(threads, model, dataset, quiet, monkeypatch):
    whole = embed_cells(model, dataset, **quiet)
    monkeypatch.setattr(encoding, "TOKENS_PER_PASS_ON_CPU", 60)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = embed_cells(model, dataset, **quiet)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(got, whole, atol=SAME_MODEL)


def test_the_head_never_runs_and_layers_stop(model, dataset, quiet, monkeypatch):
    calls = []
    for i, layer in enumerate(model.bert.encoder.layer):
        monkeypatch.setattr(layer.output.dense, "forward", lambda *a, i=i, real=layer.output.dense.forward: calls.append(i) or real(*a))
    monkeypatch.setattr(model.cls, "forward", lambda *_: pytest.fail("the masked-gene head ran"))
    embed_cells(model, dataset, layer=1, **quiet)
    assert set(calls) == {0}


def test_mean_gene_embeddings(model, tokenizer, dataset, quiet):
    genes = embed_genes(model, dataset, tokenizer=tokenizer, **quiet)
    sums, counts = {}, {}
    for cell in dataset["input_ids"][:]:
        for token, vector in zip(cell, reference.hidden_states(model, cell, -2).double(), strict=True):
            if token > 3:
                sums[token] = sums.get(token, 0) + vector
                counts[token] = counts.get(token, 0) + 1
    tokens = sorted(sums)
    assert genes.ensembl_ids == tokenizer.convert_ids_to_tokens(tokens)
    assert genes.n_cells.tolist() == [counts[t] for t in tokens]
    np.testing.assert_allclose(genes.vectors, np.stack([(sums[t] / counts[t]).numpy() for t in tokens]), atol=NAIVE_TWIN)
    frame = genes.to_frame()
    assert frame.index.tolist() == genes.ensembl_ids
    aligned = genes.for_genes([ensembl(2), "ENSG00000099999", f"{ensembl(1)}.7"])
    np.testing.assert_array_equal(aligned[[0, 2]], genes.vectors[[1, 0]])
    assert np.isnan(aligned[1]).all()


def test_contextual_gene_embeddings_hold_each_cells_genes_and_no_others(model, tokenizer, dataset, quiet):
    batches = list(iter_gene_embeddings(model, dataset, tokenizer=tokenizer, **quiet))
    assert len(batches) == len(dataset)
    for row, batch in zip(dataset, batches, strict=True):
        assert set(batch.column("cell_id").to_pylist()) == {row["cell_id"]}
        assert batch.column("ensembl_id").to_pylist() == tokenizer.convert_ids_to_tokens(row["input_ids"][1:-1])
        assert batch.column("rank").to_pylist() == list(range(row["length"] - 2))
        vectors = np.stack(batch.column("embedding").to_pylist())
        np.testing.assert_allclose(vectors, reference.hidden_states(model, row["input_ids"], -2)[1:-1].numpy(), atol=NAIVE_TWIN)


def test_state_means_are_exact(model, tokenizer, cells, dataset, quiet):
    whole = embed_cells(model, dataset, **quiet).astype(np.float64)
    labels = cells.obs["cell_type"].astype(str).to_numpy()
    expected = {state: whole[labels == state].mean(0) for state in ("B", "NK", "T")}
    for got in (
        state_embeddings(model, dataset, "cell_type", **quiet),
        state_embeddings(model, cells, "cell_type", tokenizer=tokenizer, **quiet),
        state_embeddings(model, dataset, labels, **quiet),
    ):
        assert list(got) == ["B", "NK", "T"]
        for state, vector in got.items():
            np.testing.assert_allclose(vector, expected[state], atol=1e-6)
    with pytest.raises(ColumnNotFoundError, match="no column 'donor'"):
        state_embeddings(model, dataset, "donor", **quiet)
    with pytest.raises(ValueError, match="states has 2 entries and there are 30 cells"):
        state_embeddings(model, dataset, ["a", "b"], **quiet)


@pytest.mark.parametrize("layer", [4, -5, 99])
def test_a_layer_out_of_range_names_the_range(layer, model, dataset):
    with pytest.raises(LayerError, match=rf"layer {layer} does not exist: this model has 3 layers.*from -4 .* to 3"):
        embed_cells(model, dataset, layer=layer)
    assert [resolve_layer(i, 3) for i in (-1, -2, 3, 0, -4)] == [3, 2, 3, 0, 0]


def test_pooling_that_the_model_lacks(model, v1_model, dataset, v1_tokenizer, cells, quiet):
    with pytest.raises(LayerError, match=r"pooling 'cls' needs a <cls> token, and this model's vocabulary of 62 has none"):
        embed_cells(v1_model, dataset, pooling="cls")
    with pytest.raises(LayerError, match="pooling 'max'"):
        embed_cells(model, dataset, pooling="max")
    bare = datasets.Dataset.from_dict({"input_ids": [[5, 6], [7]]})
    with pytest.raises(VocabularyMismatchError, match="a cell begins with token 5 instead of <cls>"):
        embed_cells(model, bare, **quiet)


def test_model_and_tokenizer_that_do_not_belong_together(model, v1_model, v1_tokenizer, tokenizer, table, cells):
    with pytest.raises(VocabularyMismatchError, match=r"the model has 64 tokens and the tokenizer 62; cls_token_id is 2 in the model and None"):
        embed_cells(model, cells, tokenizer=v1_tokenizer)
    other = GeneformerTokenizer(
        gene_table=GeneTable(table.ensembl_ids, table.token_ids, table.medians * 2), cls_token="<cls>", eos_token="<eos>", model_max_length=64
    )
    with pytest.raises(VocabularyMismatchError, match="the model was made for gene table"):
        embed_cells(model, cells, tokenizer=other)
    longer = GeneformerTokenizer(gene_table=table, cls_token="<cls>", eos_token="<eos>", model_max_length=100)
    with pytest.raises(VocabularyMismatchError, match="the tokenizer keeps 100 tokens a cell and the model has 64 positions"):
        embed_cells(model, cells, tokenizer=longer)


def test_a_dataset_of_another_vocabulary_or_length(model, v1_model, dataset, quiet):
    with pytest.raises(VocabularyMismatchError, match="was tokenized with gene table"):
        embed_cells(v1_model, dataset, **quiet)
    for ids, words in (([[2, 900, 3]], "holds the token id 900; expected token ids from 0 to 63"), ([[2, *([5] * 100), 3]], "the longest has 102 tokens")):
        with pytest.raises(VocabularyMismatchError, match=words):
            embed_cells(model, datasets.Dataset.from_dict({"input_ids": ids}), **quiet)


def test_a_model_from_nowhere_needs_a_tokenizer(model, cells, dataset):
    model.config.name_or_path = ""
    with pytest.raises(CheckpointError, match="Pass `tokenizer=`"):
        embed_cells(model, cells)
    with pytest.raises(ColumnNotFoundError, match="no column 'input_ids'"):
        embed_cells(model, dataset.remove_columns("input_ids"))


def test_bad_settings(model):
    with pytest.raises(ValueError, match="batch_size is 0"):
        Embedder(model, batch_size=0)
    with pytest.raises(ValueError, match="dtype 'int4' is not one of"):
        Embedder(model, dtype="int4")
    with pytest.raises(ValueError, match="device 'tpu9' is not known"):
        Embedder(model, device="tpu9")


@pytest.mark.gpu
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_an_accelerator_gives_the_same(pooling, model, dataset):
    on_cpu = embed_cells(model, dataset, pooling=pooling, device="cpu", progress=False)
    np.testing.assert_allclose(embed_cells(model, dataset, pooling=pooling, device=resolve_device(), progress=False), on_cpu, atol=NAIVE_TWIN)


def test_a_backed_anndata_is_read_where_it_lies(h5ad, model, tokenizer, dataset, quiet):
    backed = anndata.read_h5ad(h5ad, backed="r")
    np.testing.assert_allclose(embed_cells(model, backed, tokenizer=tokenizer, **quiet), embed_cells(model, dataset, **quiet), atol=SAME_MODEL)
    backed.file.close()
