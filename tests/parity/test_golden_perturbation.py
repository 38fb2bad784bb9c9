"""In silico perturbation against raw values of the published package on real cells."""

import datasets
import numpy as np
import pandas as pd
import pytest

from geneformer_hf import GeneformerForMaskedLM, GeneformerTokenizer, InSilicoPerturber, Perturbation, StateShift, StateVectors
from geneformer_hf.models.dictionaries import find_dictionaries
from geneformer_hf.models.loading import fingerprint_of
from tests.tolerances import GOLDEN_PERTURBATION

pytestmark = pytest.mark.shared
B_CELLS = (20, 10, 22, 21, 57, 33)
"""The B cells that the published run took, longest first."""


@pytest.fixture(scope="module")
def v1():
    from tests.conftest import shared_folder

    return GeneformerTokenizer.from_dictionaries(find_dictionaries(shared_folder() / "data" / "geneformer_dicts_v1", 25_426), model_max_length=128)


@pytest.fixture(scope="module")
def golden():
    from tests.conftest import shared_folder

    return shared_folder() / "golden" / "v1"


@pytest.fixture(scope="module")
def model(golden):
    return GeneformerForMaskedLM.from_pretrained(golden / "model")


@pytest.fixture(scope="module")
def cells(golden):
    content = np.load(golden / "short_cells.npz")
    ids = np.split(content["values"].astype(int), content["offsets"][1:-1])
    return datasets.Dataset.from_dict({"input_ids": ids, "cell_id": content["cell_id"].astype(str), "cell_type": content["cell_type"].astype(str)})


def values_of(table, v1, readout):
    """Return (state or affected token, perturbed tokens) to sorted values."""
    frame = table.to_pandas()
    frame = frame[frame["readout"] == readout]
    tokens = [tuple(v1.gene_table.token_of(genes).tolist()) for genes in frame["genes"]]
    found: dict = {}
    for target, perturbed, value in zip(frame["target"], tokens, frame["value"], strict=True):
        found.setdefault((target, perturbed), []).append(value)
    return {key: np.sort(values) for key, values in found.items()}


def published(path, target):
    raw = pd.read_csv(path)
    perturbed = [tuple(int(token) for token in str(tokens).split()) for tokens in raw["perturbed"]]
    found: dict = {}
    for name, tokens, value in zip(target(raw), perturbed, raw["value"], strict=True):
        found.setdefault((name, tokens), []).append(value)
    return {key: np.sort(values) for key, values in found.items()}


def assert_equal(found, expected):
    assert set(found) == set(expected)
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, atol=GOLDEN_PERTURBATION, err_msg=str(key))


@pytest.mark.parametrize("kind", ["delete", "overexpress"])
def test_every_gene(kind, golden, model, cells, v1):
    perturber = InSilicoPerturber(model, tokenizer=v1, progress=False)
    table = perturber.run(cells.select(range(6)), Perturbation.every(kind))
    assert_equal(values_of(table, v1, "cell"), published(golden / f"isp_V1_{kind}_all.csv.gz", lambda raw: [""] * len(raw)))


def test_every_gene_on_every_other_gene(golden, model, cells, v1):
    table = InSilicoPerturber(model, tokenizer=v1, readout="gene", progress=False).run(cells.select(range(6)), Perturbation.every("delete"))
    expected = published(golden / "isp_V1_delete_all_gene.csv.gz", lambda raw: raw["affected"])
    name_of = dict(zip(map(str, v1.gene_table.token_ids), v1.gene_table.ensembl_ids, strict=True))
    assert_equal(values_of(table, v1, "cell"), {("", tokens): values for (target, tokens), values in expected.items() if target == "cell_emb"})
    assert_equal(values_of(table, v1, "gene"), {(name_of[target], tokens): v for (target, tokens), v in expected.items() if target != "cell_emb"})


def test_a_group_of_genes(golden, model, cells, v1):
    expected = published(golden / "isp_V1_delete_group.csv.gz", lambda raw: [""] * len(raw))
    ((_, tokens),) = expected
    genes = tuple(v1.gene_table.ensembl_of_tokens(tokens))
    table = InSilicoPerturber(model, tokenizer=v1, progress=False).run(cells.select(range(6)), [Perturbation(kind="delete", genes=genes)])
    assert_equal(values_of(table, v1, "cell"), expected)


@pytest.mark.parametrize("kind", ["delete", "overexpress"])
@pytest.mark.parametrize("given", [True, False], ids=["published_vectors", "our_vectors"])
def test_towards_states(kind, given, golden, model, cells, v1):
    states = StateShift(column="cell_type", start="B", goal="NK", alternatives=("CD14+ Mono",))
    if given:
        content = np.load(golden / "state_embs.npz")
        vectors = StateVectors({name: content[name].ravel().astype(np.float64) for name in content.files}, fingerprint_of(model), 2, "mean")
    else:
        vectors = StateVectors.of(model, cells, "cell_type", n_layers=2, pooling="mean", progress=False)
    chosen = cells.select([*B_CELLS, *(i for i, name in enumerate(cells["cell_type"][:]) if name in ("NK", "CD14+ Mono"))][: len(B_CELLS) + 40])
    table = InSilicoPerturber(model, tokenizer=v1, states=states, vectors=vectors, progress=False).run(chosen, Perturbation.every(kind))
    assert_equal(values_of(table, v1, "state"), published(golden / f"isp_V1_{kind}_all_states.csv.gz", lambda raw: raw["state"]))
