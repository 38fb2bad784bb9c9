"""evaluate_cells and its report: the same cells for all, nothing left out without a word, figures of each embedding by itself."""

import json
import re

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from geneformer_hf import GeneformerForMaskedLM, embed_cells, evaluate_cells, load_cells
from geneformer_hf.analysis import evaluation as evaluation_module
from geneformer_hf.analysis.evaluation_report import write_evaluation
from geneformer_hf.analysis.representations import named_models
from geneformer_hf.cli.main import main
from geneformer_hf.errors import CellFileError, ColumnNotFoundError, LayerError, MissingExtraError, SettingError
from geneformer_hf.outputs import MARK
from geneformer_hf.reports.expression import principal_components, variable_expression
from geneformer_hf.reports.integration import integration_figures
from tests.conftest import make_cells, tiny_config, with_row, write
from tests.tolerances import SAME_MODEL

N = 60
QUIET = {"progress": False}


def make_labelled(genes) -> anndata.AnnData:
    """Three types, each with genes of its own; two batches; six donors."""
    adata = make_cells(genes, N, cell_type=["B", "NK", "T"] * (N // 3), batch=["one"] * (N // 2) + ["two"] * (N // 2), donor=[f"d{i // 10}" for i in range(N)])
    counts = adata.X.toarray()
    for i in range(N):
        counts[i, 20 * (i % 3) : 20 * (i % 3) + 20] *= 8
    adata.X = sp.csr_matrix(counts)
    rng = np.random.default_rng(5)
    adata.obsm["X_other"] = (rng.normal(size=(N, 4)) + 9 * np.eye(4)[np.arange(N) % 3]).astype(np.float32)
    return adata


@pytest.fixture(scope="module")
def labelled(genes):
    return make_labelled(genes)


@pytest.fixture(scope="module")
def found(labelled, model, tokenizer):
    return evaluate_cells({"mine": model}, labelled, tokenizer=tokenizer, labels="cell_type", batch="batch", obsm=["X_other"], pooling="mean", **QUIET)


def test_models_come_first_and_baselines_last(found):
    assert found.table["name"].tolist() == ["mine", "untrained", "obsm X_other", "PCA of 60 variable genes", "log counts of 60 variable genes"]
    assert found.table["kind"].tolist() == ["model", "untrained", "obsm", "baseline", "baseline"]
    assert found.table["dimensions"].tolist() == [16, 16, 4, 50, 60]
    assert found.used.all()
    assert found.notes == []


def test_embeddings_are_those_of_embed_cells(found, labelled, model, tokenizer):
    expected = embed_cells(model, labelled, tokenizer=tokenizer, pooling="mean", progress=False)
    np.testing.assert_allclose(found.judged[0].representation.vectors, expected, atol=SAME_MODEL)
    assert not np.allclose(found.judged[1].representation.vectors, expected, atol=0.1), "the untrained model is another"


def test_expression_is_that_of_the_file(found, labelled):
    expected = variable_expression(labelled.X, np.repeat([0, 1], N // 2))
    np.testing.assert_allclose(found.judged[4].representation.vectors, expected)
    np.testing.assert_allclose(found.judged[3].representation.vectors, principal_components(expected), atol=1e-4)


def test_figures_are_those_of_each_embedding_alone(found, labelled):
    labels = pd.factorize(labelled.obs["cell_type"], sort=True)[0]
    batches = pd.factorize(labelled.obs["batch"], sort=True)[0]
    expression = found.judged[4].representation.vectors
    assert integration_figures(labelled.obsm["X_other"], labels, batches, expression_ng=expression) == pytest.approx(found.judged[2].integration)


def test_a_clear_embedding_beats_the_model_and_the_verdict_says_so(found):
    row = found.table.set_index("name")
    assert row.loc["obsm X_other", "avg_bio"] > 0.9
    assert row.loc["obsm X_other", "knn_accuracy"] == 1
    assert "mine" in found.verdict()
    assert "below the best of the others (obsm X_other" in found.verdict()


def test_label_transfer_holds_whole_batches_out(found):
    assert found.held_out == "batch"
    assert set(found.transfer["fold"]) == {"one", "two"}
    assert set(found.transfer["n_test"]) == {30}
    assert found.majority["balanced_accuracy"] == pytest.approx(1 / 3)


def test_donors_can_be_held_out_instead(labelled, model, tokenizer):
    other = evaluate_cells(model, labelled, tokenizer=tokenizer, labels="cell_type", held_out="donor", untrained=False, baselines=False, n_folds=3, **QUIET)
    assert other.held_out == "donor"
    assert {name.split(" groups, ")[1] for name in other.transfer["fold"]} == {"part 1", "part 2", "part 3"}
    assert set(other.transfer.groupby("method")["n_test"].sum()) == {N}
    assert "overall" not in other.table, "no batch was named"


def test_the_same_seed_gives_the_same_figures(found, labelled, model, tokenizer):
    again = evaluate_cells(
        {"mine": model}, labelled, tokenizer=tokenizer, labels="cell_type", batch="batch", obsm=["X_other"], pooling="mean", batch_size=3, **QUIET
    )
    pd.testing.assert_frame_equal(again.table, found.table, atol=1e-4)


def test_the_order_of_cells_changes_nothing(found, labelled, model, tokenizer):
    turned = labelled[::-1].copy()
    again = evaluate_cells({"mine": model}, turned, tokenizer=tokenizer, labels="cell_type", batch="batch", untrained=False, pooling="mean", **QUIET)
    np.testing.assert_allclose(again.judged[0].representation.vectors[::-1], found.judged[0].representation.vectors, atol=SAME_MODEL)
    assert again.judged[0].integration["asw_label"] == pytest.approx(found.judged[0].integration["asw_label"], abs=1e-5)


def test_cells_that_cannot_be_judged_are_left_out_of_all_and_counted(labelled, model, tokenizer):
    adata = labelled.copy()
    adata.X = with_row(adata.X, 4, 0)
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(object)
    adata.obs.loc[adata.obs_names[[1, 2]], "cell_type"] = None
    adata.obsm["X_other"] = adata.obsm["X_other"].copy()
    adata.obsm["X_other"][9, 1] = np.nan
    other = evaluate_cells({"mine": model}, adata, tokenizer=tokenizer, labels="cell_type", batch="batch", obsm=["X_other"], untrained=False, **QUIET)
    assert np.flatnonzero(~other.used).tolist() == [1, 2, 4, 9]
    assert other.notes == [
        "2 of 60 cells have no cell_type; they are not judged.",
        "1 of 60 cells hold no gene of the vocabulary of mine; they are not judged.",
        "1 of 60 cells are not finite in obsm X_other; they are not judged.",
    ]
    assert set(other.transfer.groupby("name")["n_test"].sum()) == {3 * 56}
    assert np.isnan(other.judged[-1].representation.vectors[4]).all()


def test_one_untrained_model_for_each_shape(labelled, model, tokenizer):
    torch.manual_seed(3)
    same, wide = GeneformerForMaskedLM(tiny_config(tokenizer)), GeneformerForMaskedLM(tiny_config(tokenizer, hidden_size=32))
    other = evaluate_cells({"a": model, "b": same, "c": wide}, labelled, tokenizer=tokenizer, labels="cell_type", baselines=False, **QUIET)
    assert other.table["name"].tolist() == ["a", "b", "c", "untrained, shape of a", "untrained, shape of c"]
    assert other.table["dimensions"].tolist() == [16, 16, 32, 16, 32]


def test_models_of_other_vocabularies_are_set_side_by_side(labelled, model_folder, v1_model, v1_tokenizer, tmp_path):
    v1_model.save_pretrained(tmp_path / "v1")
    v1_tokenizer.save_pretrained(tmp_path / "v1")
    other = evaluate_cells([model_folder, tmp_path / "v1"], labelled, labels="cell_type", baselines=False, **QUIET)
    assert other.table["name"].tolist() == ["model", "v1", "untrained, shape of model", "untrained, shape of v1"]


def test_a_dataset_is_judged_by_its_tokens(labelled, model, tokenizer):
    plain = load_cells(labelled, tokenizer=tokenizer)
    other = evaluate_cells(model, plain, tokenizer=tokenizer, labels="cell_type", batch="batch", untrained=False, **QUIET)
    assert other.table["name"].tolist()[1:] == ["PCA of 60 variable genes", "gene ranks of 60 variable genes"]
    counted = load_cells(labelled, tokenizer=tokenizer, keep_counts=True)
    other = evaluate_cells(model, counted, tokenizer=tokenizer, labels="cell_type", batch="batch", untrained=False, **QUIET)
    assert other.table["name"].tolist()[2] == "log counts of 60 variable genes"


def test_expression_alone_needs_no_model(labelled):
    other = evaluate_cells(None, labelled, labels="cell_type", obsm=["X_other"], **QUIET)
    assert other.table["kind"].tolist() == ["obsm", "baseline", "baseline"]
    assert other.verdict().strip() == ""


def test_labels_that_follow_nothing_are_doubted(labelled, found, tokenizer, model):
    adata = labelled.copy()
    del adata.obsm["X_other"]
    adata.obs["shuffled"] = np.random.default_rng(2).choice([f"type {i}" for i in range(6)], N)
    other = evaluate_cells(model, adata, tokenizer=tokenizer, labels="shuffled", untrained=False, **QUIET)
    assert "Labels may not belong to these cells" in other.notes[0]
    assert not found.notes


REFUSED = [
    pytest.param({"labels": "nothing"}, ColumnNotFoundError, "no column 'nothing'", id="a_column_that_is_not_there"),
    pytest.param({"labels": "cell_type", "batch": "nothing"}, ColumnNotFoundError, "no column 'nothing'", id="a_batch_that_is_not_there"),
    pytest.param({"labels": "same"}, SettingError, "same has one value among the 60 cells", id="one_label"),
    pytest.param({"labels": "cell_type", "batch": "same"}, SettingError, "same has one value", id="one_batch"),
    pytest.param({"labels": "cell_type", "held_out": "same"}, SettingError, "nobody to test on", id="one_donor"),
    pytest.param({"labels": "missing"}, SettingError, "0 of 60 cells can be judged; expected 16", id="no_label_at_all"),
    pytest.param({"labels": "cell_type", "obsm": ["X_none"]}, ColumnNotFoundError, "obsm has no 'X_none'. Found: X_other", id="an_embedding_that_is_not_there"),
    pytest.param({"labels": "cell_type", "n_folds": 1}, SettingError, "n_folds is 1", id="one_fold"),
    pytest.param({"labels": "cell_type", "seed": -5}, SettingError, "seed is -5; expected a whole number from 0 to 4294967295.", id="a_negative_seed"),
    pytest.param({"labels": "cell_type", "seed": True}, SettingError, "seed is True", id="no_number"),
    pytest.param({"labels": "cell_type", "layer": 9}, LayerError, "layer 9 does not exist", id="a_layer_that_is_not_there"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_what_cannot_be_judged_is_refused_before_anything_is_embedded(labelled, model, tokenizer, monkeypatch, options, error, message):
    adata = labelled.copy()
    adata.obs["same"], adata.obs["missing"] = "x", ""
    monkeypatch.setattr("geneformer_hf.analysis.embeddings.Embedder.embed", lambda *args: pytest.fail("embedded in vain"))
    with pytest.raises(error, match=re.escape(message)):
        evaluate_cells(model, adata, tokenizer=tokenizer, **options, **QUIET)


def test_nothing_to_judge_is_refused(labelled):
    with pytest.raises(SettingError, match="nothing to judge"):
        evaluate_cells([], labelled, labels="cell_type", baselines=False, **QUIET)


def test_a_dataset_without_a_model_is_refused(labelled, tokenizer):
    with pytest.raises(SettingError, match="can only be judged with a model"):
        evaluate_cells(None, load_cells(labelled, tokenizer=tokenizer), labels="cell_type", **QUIET)
    with pytest.raises(ColumnNotFoundError, match="holds no obsm"):
        evaluate_cells(tiny_model(tokenizer), load_cells(labelled, tokenizer=tokenizer), tokenizer=tokenizer, labels="cell_type", obsm=["X_other"], **QUIET)


def tiny_model(tokenizer):
    return GeneformerForMaskedLM(tiny_config(tokenizer))


def test_without_scib_metrics_the_remedy_comes_first(labelled, monkeypatch):
    def missing():
        msg = "An evaluation needs scib-metrics"
        raise MissingExtraError(msg)

    monkeypatch.setattr(evaluation_module, "scib_metrics", missing)
    with pytest.raises(MissingExtraError):
        evaluate_cells(None, labelled, labels="cell_type", **QUIET)


@pytest.mark.parametrize("layout", ["h5ad", "zarr"])
def test_embeddings_in_files_are_read(labelled, tmp_path, layout):
    adata = labelled.copy()
    adata.obsm["X_sparse"] = sp.csr_matrix(adata.obsm["X_other"])
    adata.obsm["X_frame"] = pd.DataFrame(adata.obsm["X_other"], index=adata.obs_names, columns=list("abcd"))
    path = tmp_path / f"cells.{layout}"
    (adata.write_h5ad if layout == "h5ad" else adata.write_zarr)(path)
    other = evaluate_cells(None, path, labels="cell_type", obsm=["X_other", "X_sparse", "X_frame"], baselines=False, **QUIET)
    for one in other.judged:
        np.testing.assert_array_equal(one.representation.vectors, labelled.obsm["X_other"])


def test_an_embedding_of_words_is_refused(labelled):
    adata = labelled.copy()
    adata.obsm["X_words"] = pd.DataFrame({"a": ["x"] * N}, index=adata.obs_names)
    with pytest.raises(CellFileError, match="holds something else than numbers"):
        evaluate_cells(None, adata, labels="cell_type", obsm=["X_words"], **QUIET)


def test_models_are_called_by_what_tells_them_apart():
    assert list(named_models("runs/a/model")) == ["model"]
    assert list(named_models(["runs/a/model", "runs/b/model"])) == ["a/model", "b/model"]
    with pytest.raises(SettingError, match="two models are called model"):
        named_models([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)])
    with pytest.raises(SettingError, match="no model was given"):
        named_models([])


def test_the_report_is_one_page_that_needs_nothing_beside_it(found, tmp_path):
    write_evaluation(found, tmp_path, title="Cells <of> somebody", settings={"labels": "cell_type", "batch": "batch"}, progress=False)
    assert {p.name for p in tmp_path.iterdir()} == {"report.html", "evaluation.json", "evaluation.csv", "pictures"}
    page = (tmp_path / "report.html").read_text()
    assert "Cells &lt;of&gt; somebody" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("data:image/png;base64,") == len(list((tmp_path / "pictures").iterdir())) == 2 + 5 * 2
    assert 'name="viewport"' in page
    table = pd.read_csv(tmp_path / "evaluation.csv")
    pd.testing.assert_frame_equal(table, found.table, check_dtype=False)
    stored = json.loads((tmp_path / "evaluation.json").read_text())
    assert stored["cells_judged"] == N
    assert stored["labels"] == {"B": 20, "NK": 20, "T": 20}
    assert [one["name"] for one in stored["representations"]] == found.table["name"].tolist()
    assert stored["representations"][2]["transfer"][0]["f1_by_class"]
    assert stored["versions"]["scib_metrics"]


def test_the_command_writes_the_report_and_says_where_the_model_stands(labelled, model_folder, tmp_path, capsys):
    path = write(labelled, tmp_path / "cells.h5ad")
    arguments = [
        "evaluate",
        str(path),
        "--model",
        f"mine={model_folder}",
        "--labels",
        "cell_type",
        "--batch",
        "batch",
        "--pooling",
        "mean",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*arguments, "--obsm", "X_other", "--no-umap", "--no-baselines", "--genes"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^mine +0\.\d{3}", printed, re.M)
    assert "below the best of the others (obsm X_other" in printed
    assert {p.name for p in (tmp_path / "out").iterdir()} == {MARK, "report.html", "evaluation.json", "evaluation.csv", "genes.json", "pictures"}
    genes = json.loads((tmp_path / "out" / "genes.json").read_text())["mine"]
    assert {"context_specificity", "neighbours_of_classes", "rank_contributions", "hidden_by_class", "hidden_by_rank", "modules"} == set(genes)
    page = (tmp_path / "out" / "report.html").read_text()
    for words in ("Genes: mine", "Hidden genes by rank", "What ranks contribute", "Largest modules"):
        assert words in page
    assert main(arguments) == 1
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        pytest.param(["--model", "a=x", "a=y"], "two models have one name", id="two_models_of_one_name"),
        pytest.param(["--model", "nowhere"], "nowhere", id="no_such_model"),
        pytest.param(["--gene-classes", "x.json"], "--gene-classes is of use with --genes", id="classes_without_genes"),
        pytest.param(["--no-baselines"], "nothing to judge", id="nothing_to_judge"),
    ],
)
def test_the_command_refuses_with_a_message_and_leaves_nothing(labelled, tmp_path, capsys, more, message):
    path = write(labelled, tmp_path / "cells.h5ad")
    assert main(["evaluate", str(path), "--labels", "cell_type", "--output", str(tmp_path / "out"), *more]) == 1
    assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["cells.h5ad"]


NESTED = {
    "every_label_in_one_batch": (lambda i: f"type{i // 30}", 2),
    "two_labels_in_each_batch": (lambda i: f"type{i // 30}{i % 2}", 2),
    "one_label_in_both_batches": (lambda i: "both" if i % 3 else f"type{i // 30}", 0),
}


@pytest.mark.parametrize("option", ["--batch", "--held-out"])
@pytest.mark.parametrize("name", NESTED)
def test_labels_nested_in_batches_leave_figures_undefined_and_the_rest_written(name, option, labelled, tmp_path, capsys):
    label, n_undefined = NESTED[name]
    adata = labelled.copy()
    adata.obs["nested"] = [label(i) for i in range(N)]
    write(adata, tmp_path / "cells.h5ad")
    words = ["evaluate", str(tmp_path / "cells.h5ad"), "--labels", "nested", option, "batch", "--output", str(tmp_path / "out"), "--no-umap"]
    assert main(words) == 0
    said = capsys.readouterr().out
    table = pd.read_csv(tmp_path / "out" / "evaluation.csv")
    assert np.isfinite(table["nmi"]).all()
    assert table["knn_macro_f1"].isna().all() == bool(n_undefined)
    assert ("Label transfer is undefined in all folds (held out: batch): no held-out cell has a nested that occurs in the training cells" in said) == bool(
        n_undefined
    )
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text(), parse_constant=lambda value: pytest.fail(f"{value} is no JSON"))
    assert written
    assert ("Undefined metrics, left empty" in said) == table.drop(columns=[c for c in table if c.startswith(("knn", "probe"))]).isna().any(axis=None)
    assert "undefined in all folds" in (tmp_path / "out" / "report.html").read_text() or not n_undefined
