"""Published tables of statistics, from the raw values they were made of."""

import numpy as np
import pandas as pd
import pytest

from geneformer_hf import GeneformerTokenizer
from geneformer_hf.analysis.statistics import perturbation_statistics
from geneformer_hf.models.dictionaries import find_dictionaries
from tests.tolerances import STATISTICS

pytestmark = pytest.mark.shared


@pytest.fixture(scope="module")
def golden():
    from tests.conftest import shared_folder

    return shared_folder() / "golden" / "v1"


@pytest.fixture(scope="module")
def gene_table():
    from tests.conftest import shared_folder

    return GeneformerTokenizer.from_dictionaries(find_dictionaries(shared_folder() / "data" / "geneformer_dicts_v1", 25_426), model_max_length=128).gene_table


@pytest.fixture(scope="module")
def raw(golden, gene_table):
    """Raw values of the published package as a table of ours."""
    name_of = dict(zip(gene_table.token_ids.tolist(), gene_table.ensembl_ids, strict=True))

    def read(name, state=False):
        values = pd.read_csv(golden / f"isp_V1_{name}.csv.gz")
        cell = values["file"].str.extract(r"embs_(\d+)batch")[0]
        is_gene = values["affected"] != "cell_emb"
        affected = [name_of[int(token)] if gene else "" for token, gene in zip(values["affected"], is_gene, strict=True)]
        return pd.DataFrame(
            {
                "cell_id": cell, "kind": "delete", "genes": [(name_of[int(token)],) for token in values["perturbed"]], "target": values["state"] if state else affected,
                "readout": "state" if state else np.where(is_gene, "gene", "cell"), "value": values["value"], "n_genes": 1,
            }
        )  # fmt: skip

    return read


def assert_equal(ours, path, keys):
    """Compare row by row, by what was perturbed; the published order among equals is arbitrary."""
    theirs = pd.read_csv(path, index_col=0)
    assert list(ours.columns) == list(theirs.columns)
    ours, theirs = (t.assign(**{key: t[key].astype(str) for key in keys}).set_index(keys).sort_index() for t in (ours, theirs))
    assert ours.index.equals(theirs.index)
    for column in theirs.columns:
        if pd.api.types.is_numeric_dtype(theirs[column]):
            np.testing.assert_allclose(ours[column].astype(float), theirs[column], atol=STATISTICS, rtol=STATISTICS, err_msg=column)
        else:
            assert ours[column].fillna("").tolist() == theirs[column].fillna("").tolist(), column


@pytest.mark.parametrize("kind", ["delete", "overexpress"])
def test_mixture_model(kind, golden, raw, gene_table):
    ours = perturbation_statistics(raw(f"{kind}_all"), "mixture_model", gene_table=gene_table)
    assert_equal(ours, golden / f"stats_{kind}_all.csv.gz", ["Gene"])
    assert (ours["Impact_component"].diff().dropna() <= 0).all()


@pytest.mark.parametrize("kind", ["delete", "overexpress"])
def test_goal_state_shift(kind, golden, raw, gene_table):
    ours = perturbation_statistics(raw(f"{kind}_all_states", state=True), "goal_state_shift", gene_table=gene_table, goal="NK", alternatives=["CD14+ Mono"])
    assert_equal(ours, golden / f"stats_{kind}_all_states.csv.gz", ["Gene"])


def test_vs_null(golden, raw, gene_table):
    ours = perturbation_statistics(raw("delete_all"), "vs_null", gene_table=gene_table, null=raw("overexpress_all"))
    assert_equal(ours, golden / "stats_vs_null.csv.gz", ["Gene"])


def test_aggregate_gene_shifts(golden, raw, gene_table):
    ours = perturbation_statistics(raw("delete_all_gene"), "aggregate_gene_shifts", gene_table=gene_table)
    assert_equal(ours, golden / "stats_delete_all_gene.csv.gz", ["Perturbed", "Affected"])
