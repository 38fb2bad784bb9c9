"""What a model makes of genes: against naive twins and planted answers."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from geneformer_hf import (
    GeneformerForMaskedLM,
    GeneformerForSequenceClassification,
    context_specificity,
    embed_genes,
    gene_modules,
    gene_similarity,
    hide_genes,
    load_cells,
    predict_masked_genes,
    rank_contributions,
)
from geneformer_hf.analysis import gene_context
from geneformer_hf.analysis.embeddings import GeneEmbeddings
from geneformer_hf.analysis.gene_classes import ALL, OTHER
from geneformer_hf.analysis.gene_modules import neighbours_of_classes
from geneformer_hf.analysis.gene_report import gene_classes_by_name, gene_section
from geneformer_hf.errors import CheckpointError, ColumnNotFoundError, SettingError, UnknownGeneError
from geneformer_hf.genes import GeneTable
from geneformer_hf.reports.baselines import RankFrequencyBaseline
from tests import reference
from tests.conftest import make_cells, tiny_config
from tests.tolerances import NAIVE_TWIN, SAME_MODEL

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def adata(genes):
    return make_cells(genes, 30, seed=4)


@pytest.fixture(scope="module")
def tokens(adata, tokenizer):
    return load_cells(adata, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def specificity(model, adata, tokenizer):
    return context_specificity(model, adata, tokenizer=tokenizer, labels="cell_type", n_genes=12, least_cells=5, permutations=9, **QUIET)


def contextual(model, tokens, token, layer=-2):
    """Vectors of a gene in each cell that has it, and which cells these are."""
    rows = [i for i, ids in enumerate(tokens["input_ids"][:]) if token in ids]
    return np.stack([reference.hidden_states(model, tokens[i]["input_ids"], layer)[tokens[i]["input_ids"].index(token)].numpy() for i in rows]), rows


def test_the_share_between_types_is_that_of_the_naive_twin(specificity, model, tokens, tokenizer):
    types = tokens["cell_type"][:]
    for row in specificity.head(4).itertuples():
        vectors, cells = contextual(model, tokens, int(tokenizer.gene_table.token_of([row.ensembl_id])[0]))
        assert row.n_cells == len(cells)
        assert row.between == pytest.approx(reference.between_types(vectors.astype(np.float64), [types[i] for i in cells]), abs=NAIVE_TWIN)


def test_genes_are_those_in_most_cells_the_most_specific_first(specificity, tokens, tokenizer):
    counts = np.bincount(np.concatenate(tokens["input_ids"][:]), minlength=64)
    assert specificity["n_cells"].min() >= np.sort(counts[4:])[-12]
    assert specificity["between"].is_monotonic_decreasing
    assert (specificity["p_value"] >= 0.1).all(), "nine permutations cannot say more"
    assert specificity["q_value"].ge(specificity["p_value"]).all()


def test_blocks_of_genes_and_batches_change_nothing(specificity, model, adata, tokenizer, monkeypatch):
    monkeypatch.setattr(gene_context, "MEMORY", 3 * 10 * 3 * 16 * 8)
    options = {"labels": "cell_type", "n_genes": 12, "least_cells": 5, "permutations": 9}
    again = context_specificity(model, adata, tokenizer=tokenizer, batch_size=2, **options, **QUIET)
    pd.testing.assert_frame_equal(again, specificity, atol=1e-6)


def test_types_that_set_the_vectors_apart_are_found_and_random_ones_are_not(genes, tokenizer):
    # Of a few random models, one whose vectors depend on the other genes of a cell.
    torch.manual_seed(1)
    model = GeneformerForMaskedLM(tiny_config(tokenizer)).eval()
    adata = make_cells(genes, 60, seed=6)
    counts = adata.X.toarray()
    # Two kinds of cells, whose other genes lie in two halves: the context of gene 0 tells them apart.
    kinds = np.arange(60) % 2
    counts[kinds == 0, 1:30], counts[kinds == 1, 30:] = 0, 0
    counts[:, 0] = 5
    adata.X = type(adata.X)(counts)
    adata.obs["kind"], adata.obs["random"] = kinds.astype(str), np.random.default_rng(0).permutation(kinds).astype(str)
    planted, chance = (
        context_specificity(model, adata, tokenizer=tokenizer, labels=labels, genes=[genes[0]], permutations=49, layer=-1, **QUIET).iloc[0]
        for labels in ("kind", "random")
    )
    assert planted["p_value"] == 0.02
    assert planted["between"] > 5 * planted["null_mean"]
    assert planted["z"] > 5
    assert chance["p_value"] > 0.05


def test_cells_without_a_type_are_left_out(model, adata, tokenizer):
    some = adata.copy()
    some.obs["cell_type"] = some.obs["cell_type"].astype(object).where(np.arange(30) < 20)
    options = {"labels": "cell_type", "n_genes": 5, "least_cells": 3, "permutations": 2}
    left, cut = (context_specificity(model, cells, tokenizer=tokenizer, **options, **QUIET) for cells in (some, adata[:20].copy()))
    pd.testing.assert_frame_equal(left[["ensembl_id", "between", "n_cells"]], cut[["ensembl_id", "between", "n_cells"]], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        pytest.param({"labels": "nothing"}, ColumnNotFoundError, "nothing", id="no_column"),
        pytest.param({"labels": "same"}, SettingError, "two or more cell types", id="one_type"),
        pytest.param({"labels": "cell_type", "permutations": 0}, SettingError, "permutations is 0", id="no_permutation"),
        pytest.param({"labels": "cell_type", "least_cells": 31}, SettingError, "no gene is in 31 labelled cells", id="too_few_cells"),
        pytest.param({"labels": "cell_type", "genes": ["NOGENE"]}, UnknownGeneError, "NOGENE", id="unknown_gene"),
    ],
)
def test_context_that_cannot_be_measured_is_refused(model, adata, tokenizer, options, error, message):
    adata = adata.copy()
    adata.obs["same"] = "x"
    with pytest.raises(error, match=message):
        context_specificity(model, adata, tokenizer=tokenizer, **options, **QUIET)


EDGES = (0, 2, 6, 40, 60)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_hidden_ranks_are_those_of_the_naive_twin(model, tokens, tokenizer, pooling):
    found = rank_contributions(model, tokens, tokenizer=tokenizer, edges=EDGES, pooling=pooling, batch_size=3, **QUIET)
    assert found["first"].tolist() == [1, 3, 7], "no cell has more than forty genes"
    mask = tokenizer.mask_token_id
    for row in found.itertuples():
        moves, shuffled = [], []
        for number, cell in enumerate(tokens["input_ids"][:]):
            body = cell[1:-1]
            at = slice(row.first - 1, row.last)
            if not body[at]:
                continue
            before = embedded(model, cell, pooling, cell)
            changed = body.copy()
            changed[at] = [mask] * len(body[at])
            moves.append(1 - cosine(before, embedded(model, [cell[0], *changed, cell[-1]], pooling, cell)))
            changed = body.copy()
            changed[at] = np.random.default_rng([0, number]).permutation(np.array(body[at])).tolist()
            shuffled.append(1 - cosine(before, embedded(model, [cell[0], *changed, cell[-1]], pooling, cell)))
        assert row.n_cells == len(moves)
        assert row.hidden == pytest.approx(np.mean(moves), abs=NAIVE_TWIN)
        assert row.shuffled == pytest.approx(np.mean(shuffled), abs=NAIVE_TWIN)


def embedded(model, cell, pooling, whole):
    hidden = reference.hidden_states(model, cell, -2).numpy().astype(np.float64)
    return hidden[0] if pooling == "cls" else hidden[1:-1].mean(axis=0)


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_a_model_without_special_tokens_has_ranks_from_its_first_token(v1_model, v1_tokenizer, adata):
    found = rank_contributions(v1_model, adata, tokenizer=v1_tokenizer, edges=(0, 1, 64), **QUIET)
    assert found["genes"].tolist()[0] == 1
    assert (found["hidden"] > 0).all()


@pytest.mark.parametrize("edges", [(0,), (0, 5, 5), (-1, 3)])
def test_edges_that_do_not_grow_are_refused(model, tokens, tokenizer, edges):
    with pytest.raises(SettingError, match="ranks that grow"):
        rank_contributions(model, tokens, tokenizer=tokenizer, edges=edges, **QUIET)


@pytest.fixture(scope="module")
def hidden(model, tokens, tokenizer):
    return hide_genes(model, tokens, tokenizer=tokenizer, **QUIET)


def test_hidden_genes_are_those_of_predict_masked_genes(hidden, model, tokens, tokenizer):
    expected = predict_masked_genes(model, tokens, tokenizer=tokenizer, top_k=1, **QUIET)
    pd.testing.assert_frame_equal(hidden.table[expected.columns], expected)
    np.testing.assert_allclose(hidden.table["loss"], -np.log(expected["probability"].astype(float)))


def test_figures_of_classes_are_plain_means(hidden, genes):
    classes = {"first": genes[:20], "overlapping": genes[10:30], "absent": ["no gene"]}
    found = hidden.by_class(classes).set_index("class")
    assert found.index.tolist() == ["first", "overlapping", "absent", OTHER, ALL]
    mine = hidden.table[hidden.table["ensembl_id"].isin(genes[:20])]
    assert found.loc["first", "n_hidden"] == len(mine)
    assert found.loc["first", "n_genes"] == mine["ensembl_id"].nunique()
    assert found.loc["first", "loss"] == pytest.approx(mine["loss"].mean())
    assert found.loc["first", "top_10"] == pytest.approx((mine["place"] <= 10).mean())
    assert found.loc["first", "median_place"] == mine["place"].median()
    assert found.loc["absent", "n_hidden"] == 0
    assert np.isnan(found.loc["absent", "loss"])
    assert found.loc[ALL, "n_hidden"] == len(hidden.table)
    assert found.loc[OTHER, "n_hidden"] == (~hidden.table["ensembl_id"].isin(genes[:30])).sum()


def test_figures_of_ranks_count_every_gene_once(hidden):
    found = hidden.by_rank((0, 4, 16, 64))
    assert found["n_hidden"].sum() == len(hidden.table)
    first = hidden.table[hidden.table["position"] <= 4]
    assert found["loss"].iloc[0] == pytest.approx(first["loss"].mean())


def test_the_baseline_is_counted_on_the_other_half(hidden, tokens, tokenizer):
    cells = [np.array(ids[1:-1]) for ids in tokens["input_ids"][:]]
    even = RankFrequencyBaseline(cells[0::2], len(tokenizer))
    row = hidden.table[hidden.table["cell_id"] == "cell3"].iloc[0]
    token = tokenizer.gene_table.token_of([row["ensembl_id"]])
    assert row["baseline_loss"] == pytest.approx(even.loss(token, np.array([row["position"] - 1])))


def test_a_classifier_hides_no_genes(tokenizer, adata):
    classifier = GeneformerForSequenceClassification(tiny_config(tokenizer))
    with pytest.raises(CheckpointError, match="does not predict masked genes"):
        hide_genes(classifier, adata, tokenizer=tokenizer, **QUIET)


def test_one_cell_is_too_few_for_a_baseline(model, adata, tokenizer):
    with pytest.raises(SettingError, match="expected four or more"):
        hide_genes(model, adata[:1].copy(), tokenizer=tokenizer, **QUIET)


def planted():
    """Sixty genes in three groups of vectors."""
    rng = np.random.default_rng(0)
    vectors = 3 + rng.normal(0, 0.1, (60, 8)) + 5 * np.eye(8)[np.arange(60) // 20]
    names = [f"ENSG{i:011d}" for i in range(60)]
    table = GeneTable(names, range(4, 64), np.ones(60), [f"MT-{i}" if i < 20 else f"S{i}" for i in range(60)])
    return GeneEmbeddings(names, vectors.astype(np.float32), np.where(np.arange(60) == 59, 1, 50)), table


def test_modules_are_the_groups_that_were_planted():
    embeddings, table = planted()
    modules = gene_modules(embeddings, table=table, n_neighbors=10, resolution=0.3)
    assert modules.n_obs == 59
    assert modules.uns["genes_left_out"] == 1
    groups = pd.crosstab(modules.obs["module"].astype(str), np.arange(59) // 20)
    assert groups.shape == (3, 3)
    assert (groups > 0).sum().tolist() == [1, 1, 1]
    assert modules.obs["symbol"].iloc[0] == "MT-0"
    assert modules.obsm["X_umap"].shape == (59, 2)


def test_genes_of_a_class_are_neighbours_where_they_lie_together():
    embeddings, table = planted()
    modules = gene_modules(embeddings, table=table, n_neighbors=10)
    found = neighbours_of_classes(
        modules, {"together": [f"MT-{i}" for i in range(20)], "scattered": [f"S{i}" for i in range(20, 60, 4)], "few": ["S21"]}, table
    )
    found = found.set_index("class")
    assert found.loc["together", "observed"] == 1
    assert found.loc["together", "expected"] == pytest.approx(19 / 58)
    assert found.loc["scattered", "fold"] < 2
    assert np.isnan(found.loc["few", "observed"])


def test_similarity_is_the_cosine_of_centred_vectors():
    embeddings, _ = planted()
    names = [embeddings.ensembl_ids[i] for i in (0, 1, 30)]
    found = gene_similarity(embeddings, names, others=[*names, "ENSG00000999999"])
    centred = embeddings.vectors.astype(np.float64) - embeddings.vectors.astype(np.float64).mean(axis=0)
    assert found.iloc[0, 2] == pytest.approx(cosine(centred[0], centred[30]))
    assert found.iloc[0, 1] > 0.9
    assert found.iloc[:, 3].isna().all()


def test_too_few_genes_have_no_modules():
    embeddings, _ = planted()
    with pytest.raises(SettingError, match="59 of 60 genes were seen in 10 cells or more; expected more than 60"):
        gene_modules(embeddings, n_neighbors=60)


def test_classes_that_symbols_tell():
    _, table = planted()
    assert {name: len(found) for name, found in gene_classes_by_name(table).items()} == {"mitochondrial": 20}


def test_the_section_of_a_classifier_says_what_it_cannot_do(adata, tokenizer, tmp_path):
    torch.manual_seed(0)
    classifier = GeneformerForSequenceClassification(tiny_config(tokenizer))
    section, figures = gene_section(
        "mine", classifier, adata, tmp_path, labels="cell_type", classes={"some": list(tokenizer.gene_table.ensembl_ids[:9])}, tokenizer=tokenizer, **QUIET
    )
    assert section.lines == ["mine predicts no masked genes, so none were hidden."]
    assert figures["hidden_by_class"] == []
    assert json.dumps(figures["modules"])
    assert len(section.pictures) == 2


def test_gene_embeddings_feed_modules(model, adata, tokenizer):
    modules = gene_modules(embed_genes(model, adata, tokenizer=tokenizer, progress=False), table=tokenizer.gene_table, least_cells=5)
    centred = embed_genes(model, adata, tokenizer=tokenizer, batch_size=2, progress=False)
    kept = centred.n_cells >= 5
    np.testing.assert_allclose(modules.X, centred.vectors[kept] - centred.vectors[kept].mean(axis=0), atol=SAME_MODEL)
