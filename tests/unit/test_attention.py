"""Attention: the model's own weights, named by gene; networks equal the naive sum over cells; the model is left as it was."""

import json
import xml.etree.ElementTree as ET

import anndata
import networkx
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from geneformer_hf import AttentionNetwork, attention_network, iter_attention, load_cells, regulator_centrality
from geneformer_hf.analysis import attention_networks
from geneformer_hf.cli.main import main
from geneformer_hf.errors import LayerError, SettingError, UnknownGeneError
from geneformer_hf.outputs import MARK
from tests import reference
from tests.conftest import make_cells, with_row, write
from tests.tolerances import NAIVE_TWIN, SAME_MODEL

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def adata(genes):
    return make_cells(genes, 12, seed=8)


@pytest.fixture(scope="module")
def tokens(adata, tokenizer):
    return load_cells(adata, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def network(model, tokens, tokenizer):
    return attention_network(model, tokens, tokenizer=tokenizer, n_genes=20, edges=20, least_cells=2, **QUIET)


def test_weights_are_those_of_transformers_named_by_gene(model, tokens, tokenizer):
    seen = 0
    for number, cell in enumerate(iter_attention(model, tokens, tokenizer=tokenizer, **QUIET)):
        ids = tokens[number]["input_ids"]
        np.testing.assert_allclose(cell.weights, reference.attention_of(model, ids), atol=SAME_MODEL)
        assert cell.weights.shape == (3, 2, len(ids), len(ids))
        np.testing.assert_allclose(cell.weights.sum(-1), 1, atol=1e-5)
        assert cell.names[0] == "<cls>"
        assert cell.names[-1] == "<eos>"
        assert tokenizer.gene_table.token_of(cell.names[1:-1]).tolist() == ids[1:-1]
        assert cell.cell_id == tokens[number]["cell_id"]
        seen += 1
    assert seen == 12


def test_layers_can_be_chosen(model, tokens, tokenizer):
    cell = next(iter_attention(model, tokens, tokenizer=tokenizer, layers=[-1, 0], **QUIET))
    assert cell.layers == [0, 2]
    np.testing.assert_allclose(cell.weights, reference.attention_of(model, tokens[0]["input_ids"])[[0, 2]], atol=SAME_MODEL)


def test_the_model_is_left_as_it_was(model, tokens, tokenizer):
    before, hooks = model.config._attn_implementation, hooks_of(model)
    assert before == "sdpa"
    model.train()
    try:
        attention_network(model, tokens, tokenizer=tokenizer, least_cells=2, **QUIET)
        assert model.training
        cells = iter_attention(model, tokens, tokenizer=tokenizer, **QUIET)
        next(cells)
        cells.close()
    finally:
        model.eval()
    assert model.config._attn_implementation == before
    assert hooks_of(model) == hooks


def hooks_of(model):
    """transformers has some of its own there, once it was asked for attention."""
    return [len(layer.attention.self._forward_hooks) for layer in model.base_model.encoder.layer]


def test_a_cell_without_genes_gives_nothing(model, adata, tokenizer):
    empty = adata.copy()
    empty.X = with_row(empty.X, 3, 0)
    assert [cell.cell_id for cell in iter_attention(model, empty, tokenizer=tokenizer, **QUIET)] == [f"cell{i}" for i in range(12) if i != 3]


def test_pads_have_no_part_in_it(model, tokens, tokenizer):
    padded = tokens.map(lambda row: {"input_ids": row["input_ids"] + [tokenizer.pad_token_id] * 5})
    plain, other = (list(iter_attention(model, cells, tokenizer=tokenizer, **QUIET)) for cells in (tokens, padded))
    for one, two in zip(plain, other, strict=True):
        assert one.names == two.names
        np.testing.assert_array_equal(one.weights, two.weights)


@pytest.mark.parametrize("relative", [True, False])
def test_the_network_is_the_naive_mean_over_cells(model, tokens, tokenizer, relative):
    found = attention_network(model, tokens, tokenizer=tokenizer, n_genes=20, edges=20, least_cells=2, relative=relative, **QUIET)
    chosen = tokenizer.gene_table.token_of(found.genes.index).tolist()
    sums, together = reference.mean_attention(model, tokens["input_ids"][:], chosen, relative)
    means = np.where(together >= 2, sums / np.maximum(together, 1), 0)
    for (layer, head), graph in found.weights.items():
        expected = means[layer, head].copy()
        np.fill_diagonal(expected, 0)
        np.testing.assert_allclose(graph.toarray(), expected, atol=NAIVE_TWIN * (40 if relative else 1))
    expected = means.mean(axis=(0, 1))
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(found.mean.toarray(), expected, atol=NAIVE_TWIN * (40 if relative else 1))


def test_what_a_gene_receives_is_the_sum_of_its_column(network, model, tokens, tokenizer):
    gene = network.received.index[5]
    token = int(tokenizer.gene_table.token_of([gene])[0])
    columns = [reference.attention_of(model, ids)[:, :, :, ids.index(token)].sum(-1) for ids in tokens["input_ids"][:] if token in ids]
    expected = np.mean(columns, axis=0)
    assert network.received.loc[gene, "n_cells"] == len(columns)
    for layer in range(3):
        for head in range(2):
            assert network.received.loc[gene, f"layer{layer}_head{head}"] == pytest.approx(expected[layer, head], abs=NAIVE_TWIN)


def test_genes_are_those_in_most_cells_with_their_mean_rank(network, tokens, tokenizer):
    counts = np.bincount(np.concatenate(tokens["input_ids"][:]), minlength=64)
    assert network.genes["n_cells"].min() >= np.sort(counts[4:])[-20]
    gene = network.genes.index[0]
    token = int(tokenizer.gene_table.token_of([gene])[0])
    ranks = [(ids.index(token) - 1) / (len(ids) - 2) for ids in tokens["input_ids"][:] if token in ids]
    assert network.genes.loc[gene, "mean_rank"] == pytest.approx(np.mean(ranks))


def test_layers_in_several_passes_change_nothing(network, model, tokens, tokenizer, monkeypatch):
    monkeypatch.setattr(attention_networks, "MEMORY", 2 * 20 * 20 * 8)
    again = attention_network(model, tokens, tokenizer=tokenizer, n_genes=20, edges=20, least_cells=2, **QUIET)
    np.testing.assert_allclose(again.mean.toarray(), network.mean.toarray(), atol=1e-6)
    assert list(again.weights) == list(network.weights)


def test_only_the_strongest_edges_are_kept(network, model, tokens, tokenizer):
    few = attention_network(model, tokens, tokenizer=tokenizer, n_genes=20, edges=3, least_cells=2, **QUIET)
    whole, cut = network.mean.toarray(), few.mean.toarray()
    assert ((cut > 0).sum(axis=1) <= 3).all()
    for row, kept in zip(whole, cut, strict=True):
        assert sorted(kept[kept > 0]) == pytest.approx(sorted(row)[-3:])


def test_genes_can_be_named(model, adata, tokenizer, genes):
    found = attention_network(model, adata, tokenizer=tokenizer, genes=["SYM3", genes[7], genes[3]], least_cells=1, **QUIET)
    assert found.genes.index.tolist() == [genes[3], genes[7]]
    assert found.genes["symbol"].tolist() == ["SYM3", "SYM7"]


REFUSED = [
    pytest.param({"layers": [3]}, LayerError, r"3 layers of attention, from 0 \(or -3\) to 2", id="a_layer_too_many"),
    pytest.param({"layers": []}, LayerError, "3 layers of attention", id="no_layer"),
    pytest.param({"genes": ["NOGENE"]}, UnknownGeneError, "NOGENE", id="an_unknown_gene"),
    pytest.param({"least_cells": 13}, SettingError, "none of the genes is in 13 of 12 cells", id="too_few_cells"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_networks_that_cannot_be_made_are_refused(model, tokens, tokenizer, options, error, message):
    with pytest.raises(error, match=message):
        attention_network(model, tokens, tokenizer=tokenizer, **options, **QUIET)


def test_more_genes_than_fit_are_refused_with_the_number_that_does(model, tokens, tokenizer, monkeypatch):
    monkeypatch.setattr(attention_networks, "MEMORY", 2 * 10 * 10 * 8)
    with pytest.raises(SettingError, match="Name 10 genes or fewer"):
        attention_network(model, tokens, tokenizer=tokenizer, n_genes=20, least_cells=2, **QUIET)


def test_graphml_and_anndata_hold_the_same_edges(network, tmp_path):
    network.write_graphml(tmp_path / "mean.graphml")
    graph = networkx.read_graphml(tmp_path / "mean.graphml")
    names = [graph.nodes[node]["ensembl_id"] for node in graph.nodes]
    assert names == network.genes.index.tolist()
    assert graph.is_directed()
    np.testing.assert_allclose(networkx.to_numpy_array(graph), network.mean.toarray(), rtol=1e-6)
    assert ET.parse(tmp_path / "mean.graphml").getroot().tag.endswith("graphml")
    network.to_anndata().write_h5ad(tmp_path / "network.h5ad")
    back = anndata.read_h5ad(tmp_path / "network.h5ad")
    assert back.obs_names.tolist() == network.genes.index.tolist()
    assert set(back.obsp) == {"mean", *(f"layer{layer}_head{head}" for layer in range(3) for head in range(2))}
    np.testing.assert_allclose(back.obsp["layer1_head0"].toarray(), network.weights[1, 0].toarray())
    assert back.uns["attention"]["direction"] == "row attends to column"
    network.write_graphml(tmp_path / "head.graphml", layer=1, head=0)
    np.testing.assert_allclose(networkx.to_numpy_array(networkx.read_graphml(tmp_path / "head.graphml")), network.weights[1, 0].toarray(), rtol=1e-6)
    with pytest.raises(LayerError, match=r"layer 7, head 0 is not in this network: it has layers \[0, 1, 2\]"):
        network.write_graphml(tmp_path / "no.graphml", layer=7, head=0)


def test_centrality_is_plain_sums(network):
    found = network.centrality()
    assert found["received"].is_monotonic_decreasing
    gene = found.index[0]
    number = network.genes.index.get_loc(gene)
    assert found.loc[gene, "in_strength"] == pytest.approx(network.mean.toarray()[:, number].sum(), rel=1e-5)
    assert found.loc[gene, "out_strength"] == pytest.approx(network.mean.toarray()[number].sum(), rel=1e-5)
    assert found["pagerank"].sum() == pytest.approx(1)


def made_up(n=200, seed=0, bonus=0.0, by_rank=0.0):
    """A network whose first fifty genes are regulators of low rank."""
    rng = np.random.default_rng(seed)
    rank = np.concatenate([rng.uniform(0.5, 1, 50), rng.uniform(0, 1, n - 50)])
    received = rng.normal(1, 0.1, n) + bonus * (np.arange(n) < 50) + by_rank * rank
    index = pd.Index([f"G{i}" for i in range(n)], name="ensembl_id")
    frame = pd.DataFrame(
        {"symbol": [f"S{i}" for i in range(n)], "n_cells": 5, "mean_rank": rank, "layer0_head0": received, "layer0_head1": rng.normal(1, 0.1, n)}, index=index
    )
    empty = sp.csr_array((0, 0))
    return AttentionNetwork(frame[["symbol", "n_cells", "mean_rank"]], {(0, 0): empty, (0, 1): empty}, empty, frame, 9, True), [f"S{i}" for i in range(50)]


def test_regulators_that_receive_more_are_found():
    network, regulators = made_up(bonus=0.15)
    found = regulator_centrality(network, regulators).set_index(["layer", "head"])
    assert found.loc[(0, 0), "auc_matched"] > 0.75
    assert found.loc[(0, 0), "p_matched"] < 1e-6
    assert abs(found.loc[(0, 1), "auc_matched"] - 0.5) < 0.15
    assert found.loc[(-1, -1), "n_regulators"] == 50
    assert found.loc[(-1, -1), "n_others"] == 150


def test_what_rank_alone_explains_is_not_put_down_to_regulators():
    network, regulators = made_up(by_rank=1.0)
    found = regulator_centrality(network, regulators, n_bins=20).set_index(["layer", "head"])
    assert found.loc[(0, 0), "auc"] > 0.65, "they do receive more"
    assert found.loc[(0, 0), "p_value"] < 1e-4
    assert abs(found.loc[(0, 0), "auc_matched"] - 0.5) < 0.1, "as genes of their rank do"
    assert found.loc[(0, 0), "p_matched"] > 0.05


def test_the_matched_chance_counts_pairs_within_bins():
    values, mine, bins = np.array([1.0, 2, 3, 4, 5, 6]), np.array([1, 0, 0, 1, 0, 0], dtype=bool), np.array([0, 0, 0, 1, 1, 1])
    chance, _ = attention_networks._stratified(values, mine, bins)
    assert chance == 0
    chance, _ = attention_networks._stratified(values[::-1], mine, bins)
    assert chance == 1


def test_regulators_that_no_cell_holds_are_refused():
    network, _ = made_up()
    with pytest.raises(SettingError, match="0 of 200 genes in these cells are among the 1 regulators"):
        regulator_centrality(network, ["TP53"])


def test_the_command_writes_networks_tables_and_a_page(adata, model_folder, tmp_path, capsys):
    path = write(adata, tmp_path / "cells.h5ad")
    (tmp_path / "tf.txt").write_text("# factors\n" + "\n".join(f"SYM{i}" for i in range(20)))
    arguments = ["attention", str(path), "--model", str(model_folder), "--output", str(tmp_path / "out"), "--least-cells", "2", "--n-genes", "15"]
    assert main([*arguments, "--regulators", str(tmp_path / "tf.txt")]) == 0
    printed = capsys.readouterr().out
    assert "12 cells, 15 genes, 6 heads" in printed
    assert "A regulator receives more attention than another gene of like rank with chance 0." in printed
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        MARK,
        "network.h5ad",
        "network.graphml",
        "centrality.csv",
        "received.csv",
        "regulators.csv",
        "report.html",
        "pictures",
    }
    assert len(pd.read_csv(tmp_path / "out" / "regulators.csv")) == 7
    assert anndata.read_h5ad(tmp_path / "out" / "network.h5ad").shape == (15, 0)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert main(arguments) == 1
    assert "exists" in capsys.readouterr().err
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == json.dumps(["cells.h5ad", "model", "out", "tf.txt"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        pytest.param(["--regulators", "none.txt"], "--regulators none.txt does not exist", id="no_list"),
        pytest.param(["--layers", "9"], "this model has 3 layers of attention", id="no_layer"),
        pytest.param(["--regulators", "TP53"], "expected some, and others to compare with", id="no_regulator"),
    ],
)
def test_the_command_refuses_and_leaves_nothing(adata, model_folder, tmp_path, capsys, more, message):
    path = write(adata, tmp_path / "cells.h5ad")
    assert main(["attention", str(path), "--model", str(model_folder), "--output", str(tmp_path / "out"), "--least-cells", "2", *more]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
