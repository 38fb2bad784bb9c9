"""Pipelines of transformers over cells."""

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import pipeline

from geneformer_hf import GeneformerForMaskedLM, GeneformerForSequenceClassification, add_adapter, embed_cells, load_cells, predict, predict_masked_genes
from geneformer_hf.errors import CheckpointError, SettingError, UnknownGeneError, VocabularyMismatchError
from geneformer_hf.models.adapters import save_adapter
from tests.conftest import make_cells, tiny_config
from tests.tolerances import SAME_MODEL


@pytest.fixture
def classifier_folder(tmp_path, tokenizer):
    torch.manual_seed(4)
    labels = {0: "B", 1: "NK", 2: "T"}
    GeneformerForSequenceClassification(tiny_config(tokenizer, id2label=labels, label2id={v: k for k, v in labels.items()}, pooling="mean")).save_pretrained(
        tmp_path / "classifier"
    )
    tokenizer.save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


def test_cell_embedding(model_folder, model, tokenizer, cells, h5ad):
    embed = pipeline("cell-embedding", model=str(model_folder), device="cpu")
    expected = embed_cells(model, cells, tokenizer=tokenizer, progress=False)
    dataset = load_cells(h5ad, tokenizer=tokenizer)
    for given in (cells, h5ad, str(h5ad), dataset):
        found = embed(given)
        assert list(found.index) == list(cells.obs_names)
        assert found.index.name == "cell_id"
        assert np.abs(found.to_numpy() - expected).max() < SAME_MODEL
    assert (embed(cells, batch_size=3).to_numpy() == embed(cells).to_numpy()).all() or np.abs(
        embed(cells, batch_size=3) - embed(cells)
    ).max().max() < SAME_MODEL
    mean = pipeline("cell-embedding", model=model, tokenizer=tokenizer, device="cpu", pooling="mean", layer=-1)
    assert np.abs(mean(cells).to_numpy() - embed_cells(model, cells, tokenizer=tokenizer, pooling="mean", layer=-1, progress=False)).max() < SAME_MODEL
    # A call may ask for something else, and a list of files gives a list.
    assert np.abs(mean(cells, pooling="cls", layer=-2).to_numpy() - expected).max() < SAME_MODEL
    several = embed([str(h5ad), str(h5ad)])
    assert len(several) == 2
    assert several[0].equals(several[1])
    again = pipeline("cell-embedding", model=str(model_folder), device="cpu", batch_size=4)([str(h5ad), str(h5ad)])
    assert np.abs(again[1].to_numpy() - expected).max() < SAME_MODEL
    with pytest.raises(
        TypeError, match="CellEmbeddingPipeline knows no top_k; it takes gene_ids, counts_layer, genome, layer, pooling, batch_size and progress"
    ):
        embed(cells, top_k=3)


def test_cell_classification(classifier_folder, cells, tmp_path, tokenizer):
    found = pipeline("cell-classification", model=str(classifier_folder), device="cpu")(cells)
    expected = predict(classifier_folder, cells, progress=False).to_frame()
    pd.testing.assert_frame_equal(found, expected, atol=SAME_MODEL)
    assert set(found.filter(like="_predicted").iloc[:, 0]) <= {"B", "NK", "T"}


def test_cell_classification_by_an_adapter(classifier_folder, cells, tmp_path, tokenizer):
    base = GeneformerForSequenceClassification.from_pretrained(classifier_folder)
    adapted = add_adapter(base)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_()
    save_adapter(adapted, tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    found = pipeline("cell-classification", model=str(tmp_path / "adapter"), device="cpu")(cells)
    pd.testing.assert_frame_equal(found, predict(tmp_path / "adapter", cells, progress=False).to_frame(), atol=SAME_MODEL)
    assert not np.allclose(found.filter(like="probability_"), predict(classifier_folder, cells, progress=False).to_frame().filter(like="probability_"))
    # Its encoder, with the adapter at work.
    embedded = pipeline("cell-embedding", model=str(tmp_path / "adapter"), device="cpu")(cells)
    assert np.abs(embedded.to_numpy() - embed_cells(tmp_path / "adapter", cells, device="cpu", progress=False)).max() < SAME_MODEL
    with pytest.raises(CheckpointError, match="is an adapter of a GeneformerForSequenceClassification, and cannot be opened as a GeneformerForMaskedLM"):
        GeneformerForMaskedLM.from_pretrained(tmp_path / "adapter")


def naive(model, tokenizer, cell, hidden):
    """Mask positions of one cell, run plainly, and return probabilities over the vocabulary at each."""
    ids = torch.tensor([cell])
    ids[0, hidden] = tokenizer.mask_token_id
    with torch.inference_mode():
        return model(ids).logits[0, hidden].softmax(-1).numpy()


def test_masked_genes_against_one_cell_at_a_time(model, tokenizer, cells, genes):
    wanted = [genes[3], "SYM7", genes[20]]
    found = predict_masked_genes(model, cells, tokenizer=tokenizer, genes=wanted, top_k=4, progress=False)
    tokens = [cell.tolist() for cell in tokenizer.encode_anndata(cells)]
    ids = set(tokenizer.gene_table.token_of(wanted).tolist())
    gene_tokens = tokenizer.gene_table.token_ids
    rows = []
    for name, cell in zip(cells.obs_names, tokens, strict=True):
        places = [i for i, token in enumerate(cell) if token in ids]
        for place, p in zip(places, naive(model, tokenizer, cell, places) if places else [], strict=True):
            order = gene_tokens[np.argsort(-p[gene_tokens], kind="stable")]
            rows.append(
                (
                    name,
                    place,
                    cell[place],
                    p[cell[place]],
                    int(np.flatnonzero(order == cell[place])[0]) + 1,
                    [tokenizer.convert_ids_to_tokens(int(t)) for t in order[:4]],
                )
            )
    assert list(found["cell_id"]) == [row[0] for row in rows]
    # <cls> is at 0, so the first gene is at 1.
    assert list(found["position"]) == [row[1] for row in rows]
    assert list(found["ensembl_id"]) == [tokenizer.convert_ids_to_tokens(row[2]) for row in rows]
    assert np.abs(found["probability"] - np.array([row[3] for row in rows])).max() < SAME_MODEL
    assert list(found["place"]) == [row[4] for row in rows]
    assert list(found["predicted"]) == [row[5] for row in rows]
    assert found["symbol"][found["ensembl_id"] == genes[7]].eq("SYM7").all()


def test_masked_genes_without_ends_and_whatever_the_batch(v1_model, v1_tokenizer, genes):
    cells = make_cells(genes, 20)
    found = predict_masked_genes(v1_model, cells, tokenizer=v1_tokenizer, share=0.3, progress=False)
    again = predict_masked_genes(v1_model, cells, tokenizer=v1_tokenizer, share=0.3, batch_size=2, progress=False)
    assert found.drop(columns=["probability", "predicted_probability"]).equals(again.drop(columns=["probability", "predicted_probability"]))
    assert 0.2 < len(found) / sum(len(cell) for cell in v1_tokenizer.encode_anndata(cells)) < 0.4
    assert found["position"].min() >= 1
    other = predict_masked_genes(v1_model, cells, tokenizer=v1_tokenizer, share=0.3, seed=1, progress=False)
    assert not other[["cell_id", "position"]].equals(found[["cell_id", "position"]])
    assert predict_masked_genes(v1_model, cells, tokenizer=v1_tokenizer, genes=[genes[0]], progress=False)["ensembl_id"].eq(genes[0]).all()


def test_masked_gene_prediction_and_fill_mask_agree(model_folder, cells, tokenizer, genes):
    table = pipeline("masked-gene-prediction", model=str(model_folder), device="cpu")(cells, genes=[genes[5]], top_k=3)
    fill = pipeline("fill-mask", model=str(model_folder), device="cpu")
    for _, row in table.head(5).iterrows():
        cell = tokenizer.encode_anndata(cells[row["cell_id"]])[0]
        words = tokenizer.convert_ids_to_tokens(cell.tolist())[1:-1]
        words[row["position"] - 1] = tokenizer.mask_token
        guesses = fill(" ".join(words), top_k=10)
        shown = [(g["token_str"], g["score"]) for g in guesses if g["token_str"].startswith("ENSG")][:3]
        assert [name for name, _ in shown] == row["predicted"]
        assert np.allclose([score for _, score in shown], row["predicted_probability"], atol=SAME_MODEL)


def test_what_is_refused(model_folder, classifier_folder, model, tokenizer, v1_tokenizer, cells):
    with pytest.raises(CheckpointError, match="does not predict masked genes"):
        predict_masked_genes(classifier_folder, cells, progress=False)
    with pytest.raises(SettingError, match="top_k is 0"):
        predict_masked_genes(model, cells, tokenizer=tokenizer, top_k=0, progress=False)
    with pytest.raises(SettingError, match="mask_probability is 0"):
        predict_masked_genes(model, cells, tokenizer=tokenizer, share=0, progress=False)
    with pytest.raises(UnknownGeneError, match="TP53"):
        predict_masked_genes(model, cells, tokenizer=tokenizer, genes=["TP53"], progress=False)
    with pytest.raises(CheckpointError, match="has no head to predict labels"):
        pipeline("cell-classification", model=GeneformerForMaskedLM.from_pretrained(model_folder), tokenizer=tokenizer, device="cpu")(cells)
    with pytest.raises(CheckpointError, match="is a GeneformerForMaskedLM, which has no head to predict labels of cells with"):
        pipeline("cell-classification", model=str(model_folder), device="cpu")(cells)
    with pytest.raises(VocabularyMismatchError):
        pipeline("cell-embedding", model=str(model_folder), tokenizer=v1_tokenizer, device="cpu")(cells)
