"""Predictions: those of the model cell by cell, in the caller's order, whatever the batch; into AnnData and files."""

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from geneformer_hf import (
    CellPredictions,
    GeneformerForMaskedLM,
    GeneformerForMultiTaskClassification,
    GeneformerForSequenceClassification,
    GeneformerForTokenClassification,
    GenePredictions,
    load_cells,
    predict,
)
from geneformer_hf.cli.main import main
from geneformer_hf.errors import CheckpointError
from geneformer_hf.models.heads import softmax
from tests.conftest import make_cells, tiny_config, write
from tests.tolerances import SAME_MODEL

KINDS = {
    "classes": (GeneformerForSequenceClassification, {"id2label": {0: "B", 1: "NK", 2: "T"}, "label2id": {"B": 0, "NK": 1, "T": 2}, "label_columns": ["cell_type"], "problem_type": "single_label_classification", "pooling": "mean"}),
    "heads": (GeneformerForMultiTaskClassification, {"task_labels": {"kind": ["x", "y"], "batch": ["1", "2", "3"]}, "pooling": "attention"}),
    "labels": (GeneformerForSequenceClassification, {"id2label": {0: "CD3", 1: "CD4"}, "label2id": {"CD3": 0, "CD4": 1}, "label_columns": ["markers"], "problem_type": "multi_label_classification"}),
    "numbers": (GeneformerForSequenceClassification, {"id2label": {0: "age", 1: "size"}, "label2id": {"age": 0, "size": 1}, "label_columns": ["age", "size"], "problem_type": "regression", "label_mean": [50.0, 2.0], "label_scale": [10.0, 0.5]}),
    "genes": (GeneformerForTokenClassification, {"id2label": {0: "in", 1: "out"}, "label2id": {"in": 0, "out": 1}}),
}  # fmt: skip


@pytest.fixture(params=list(KINDS))
def kind(request):
    return request.param


@pytest.fixture
def classifier(kind, tokenizer):
    cls, fields = KINDS[kind]
    torch.manual_seed(0)
    return cls(tiny_config(tokenizer, **fields)).eval()


@pytest.fixture
def folder(classifier, tokenizer, tmp_path):
    classifier.save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


def naive(model, cells, tokenizer):
    """Logits of each cell by itself, through the whole model."""
    found = []
    for ids in load_cells(cells, tokenizer=tokenizer, obs="none")["input_ids"][:]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits
        found.append(torch.cat(logits, dim=-1)[0] if isinstance(logits, tuple) else logits[0])
    return found


def test_predictions_are_those_of_the_model_cell_by_cell(kind, classifier, tokenizer, cells):
    found = predict(classifier, cells, tokenizer=tokenizer, progress=False)
    if kind == "genes":
        sums, counts = np.zeros((len(tokenizer), 2)), np.zeros(len(tokenizer))
        for ids, logits in zip(load_cells(cells, tokenizer=tokenizer, obs="none")["input_ids"][:], naive(classifier, cells, tokenizer), strict=True):
            for token, p in zip(ids, softmax(logits.numpy()), strict=True):
                sums[token] += p
                counts[token] += 1
        assert isinstance(found, GenePredictions)
        tokens = tokenizer.gene_table.token_of(found.ensembl_ids)
        np.testing.assert_allclose(found.probabilities, sums[tokens] / counts[tokens, None], atol=SAME_MODEL)
        assert found.n_cells.tolist() == counts[tokens].tolist()
        return
    assert isinstance(found, CellPredictions)
    assert found.cell_ids == cells.obs_names.tolist()
    expected = torch.stack(naive(classifier, cells, tokenizer)).numpy()
    np.testing.assert_allclose(np.concatenate([one.logits for one in found.heads], axis=1), expected, atol=50 * SAME_MODEL, rtol=1e-4)


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 7}], ids=["one_by_one", "seven"])
def test_the_batch_does_not_matter_nor_the_order(classifier, tokenizer, cells, options):
    whole = predict(classifier, cells, tokenizer=tokenizer, progress=False).to_frame()
    other = predict(classifier, cells[::-1].copy(), tokenizer=tokenizer, progress=False, **options).to_frame().loc[whole.index]
    numbers = whole.select_dtypes("number").columns
    np.testing.assert_allclose(other[numbers], whole[numbers], atol=10 * SAME_MODEL, rtol=1e-4)


def test_labels_probabilities_and_entropy(tokenizer, cells):
    torch.manual_seed(0)
    cls, fields = KINDS["classes"]
    model = cls(tiny_config(tokenizer, **fields)).eval()
    adata = cells.copy()
    found = predict(model, adata, tokenizer=tokenizer, progress=False)
    found.add_to(adata)
    p = adata.obsm["cell_type_probabilities"]
    assert adata.obs["cell_type_predicted"].tolist() == np.array(["B", "NK", "T"])[p.argmax(1)].tolist() == found.labels.tolist()
    np.testing.assert_allclose(adata.obs["cell_type_probability"], p.max(1))
    np.testing.assert_allclose(adata.obs["cell_type_entropy"], -(p * np.log(p)).sum(1), atol=1e-6)
    np.testing.assert_allclose(softmax(adata.obsm["cell_type_logits"]), p, atol=1e-6)
    assert adata.uns["geneformer_predictions"]["classes"]["cell_type"].tolist() == ["B", "NK", "T"]
    with pytest.raises(ValueError, match="29 cells, and predictions of 30"):
        found.add_to(adata[:29].copy())


def test_cells_without_a_gene_are_nan_and_have_no_label(classifier, kind, tokenizer, cells, caplog):
    if kind == "genes":
        pytest.skip("genes have no rows for cells")
    cells = cells.copy()
    counts = cells.X.toarray()
    counts[3] = 0
    cells.X = sp.csr_matrix(counts)
    found = predict(classifier, cells, tokenizer=tokenizer, progress=False)
    frame = found.to_frame()
    assert frame.iloc[3].isna().all()
    assert frame.drop(index="cell3").notna().all().all()
    assert "1 of 30 cells hold no gene of the vocabulary; nothing is predicted for them" in caplog.text


def test_a_model_without_a_head_is_refused(model, cells, tokenizer):
    with pytest.raises(CheckpointError, match=r"GeneformerForMaskedLM has no head to predict labels with\. Fine-tune it first"):
        predict(model, cells, tokenizer=tokenizer)
    assert isinstance(model, GeneformerForMaskedLM)


def test_into_a_copy_of_the_file(kind, folder, genes, tmp_path, capsys, classifier, tokenizer):
    cells = make_cells(genes)
    cells.obsm["X_pca"], cells.layers["other"] = np.ones((30, 2)), cells.X.copy()
    cells.var["note"] = "kept"
    source = write(cells, tmp_path / "cells.h5ad")
    assert main(["predict", str(source), "--model", str(folder), "--output", str(tmp_path / "out.h5ad")]) == 0
    out = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert (out.X != cells.X).nnz == 0
    assert set(out.obsm) >= {"X_pca"}
    assert out.obs["cell_type"].tolist() == cells.obs["cell_type"].tolist()
    found = predict(classifier, cells, tokenizer=tokenizer, progress=False)
    if kind == "genes":
        assert out.var["gene_class_predicted"].tolist() == [None if pd.isna(v) else v for v in found.columns_for(genes)["gene_class_predicted"]]
        np.testing.assert_allclose(out.var["gene_class_probability_in"], found.columns_for(genes)["gene_class_probability_in"], atol=SAME_MODEL)
        return
    for name, values in found.to_frame().filter(regex="_(predicted|entropy)$").items():
        if values.dtype == object:
            assert out.obs[name].astype(object).tolist() == values.tolist()
        else:
            np.testing.assert_allclose(out.obs[name], values, atol=50 * SAME_MODEL, rtol=1e-4)
    for one in found.heads:
        np.testing.assert_allclose(out.obsm[f"{one.head.name}_logits"], one.logits, atol=50 * SAME_MODEL, rtol=1e-4)
    assert "Written to" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_into_tables(kind, folder, genes, tmp_path, suffix, classifier, tokenizer):
    cells = make_cells(genes, n=30)
    source = write(cells, tmp_path / "cells.h5ad")
    output = tmp_path / f"out{suffix}"
    assert main(["predict", str(source), "--model", str(folder), "--output", str(output)]) == 0
    index = "ensembl_id" if kind == "genes" else "cell_id"
    table = pd.read_csv(output).set_index(index) if suffix == ".csv" else pd.read_parquet(output)
    table = table if table.index.name == index else table.set_index(index)
    expected = predict(classifier, cells, tokenizer=tokenizer, progress=False).to_frame()
    assert table.index.tolist() == expected.index.tolist()
    assert list(table.columns) == list(expected.columns)
    numbers = expected.select_dtypes("number").columns
    np.testing.assert_allclose(table[numbers], expected[numbers], atol=50 * SAME_MODEL, rtol=1e-4)


def test_labels_in_the_file_are_compared_and_unknown_ones_named(tokenizer, genes, tmp_path, capsys):
    cls, fields = KINDS["classes"]
    cls(tiny_config(tokenizer, **fields)).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    cells = make_cells(genes)
    cells.obs["cell_type"] = pd.Categorical(["B", "Neutrophil", None] * 10)
    source = write(cells, tmp_path / "cells.h5ad")
    assert main(["predict", str(source), "--model", str(tmp_path / "m"), "--output", str(tmp_path / "out.h5ad")]) == 0
    printed = capsys.readouterr().out
    assert "The input has a column cell_type:" in printed
    assert "of 10 cells agree. 10 cells have a cell_type that the model does not know: Neutrophil." in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cells.h5ad", "--model", "m", "--output", "out.txt"], "expected a name that ends in .h5ad, .parquet or .csv"),
        (["cells.h5ad", "--model", "m", "--output", "cells.h5ad", "--overwrite"], "is the input cells.h5ad, which writing there would replace"),
        (["gone.h5ad", "--model", "m", "--output", "out.csv"], "gone.h5ad does not exist"),
        (["cells.h5ad", "--model", "nowhere", "--output", "out.csv"], "nowhere does not exist"),
        (["cells.h5ad", "--model", "base", "--output", "out.csv"], "has no head to predict labels with"),
    ],
)
def test_what_cannot_be_predicted_is_said_and_nothing_is_written(arguments, message, tokenizer, model, genes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cls, fields = KINDS["classes"]
    for name, one in (("m", cls(tiny_config(tokenizer, **fields))), ("base", model)):
        one.save_pretrained(name)
        tokenizer.save_pretrained(name)
    write(make_cells(genes), tmp_path / "cells.h5ad")
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["predict", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
