"""Against what the published package computes on real cells."""

import datasets
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from geneformer_hf import GeneformerForMaskedLM, GeneformerTokenizer, embed_cells, embed_genes, load_cells, state_embeddings
from geneformer_hf.models.checkpoints import PUBLISHED_TABLES
from geneformer_hf.models.dictionaries import find_dictionaries, identify
from tests.tolerances import GOLDEN_EMBEDDING, RANKED_VALUE

pytestmark = pytest.mark.shared


@pytest.fixture(scope="module")
def v1(request):
    from tests.conftest import shared_folder

    found = find_dictionaries(shared_folder() / "data" / "geneformer_dicts_v1", 25_426)
    assert identify(found) == "V1"
    assert PUBLISHED_TABLES[25_426] == GeneformerTokenizer.from_dictionaries(found).gene_table.fingerprint
    return GeneformerTokenizer.from_dictionaries(found, model_max_length=2048)


@pytest.fixture
def short_cells(shared):
    cells = np.load(shared / "golden" / "v1" / "short_cells.npz")
    ids = np.split(cells["values"].astype(int), cells["offsets"][1:-1])
    return datasets.Dataset.from_dict({"input_ids": ids, "cell_id": cells["cell_id"].astype(str), "cell_type": cells["cell_type"].astype(str)})


@pytest.fixture
def golden_model(shared):
    return GeneformerForMaskedLM.from_pretrained(shared / "golden" / "v1" / "model")


def test_tokens_of_300_cells_are_the_published_ones_up_to_ties(shared, v1):
    golden = np.load(shared / "golden" / "v1" / "tokens_pbmc3k_first300.npz")
    expected = np.split(golden["values"].astype(int), golden["offsets"][1:-1])
    dataset = load_cells(shared / "data" / "pbmc3k" / "pbmc3k_raw_annotated.h5ad", tokenizer=v1, keep_counts=True)
    assert dataset["cell_id"][:300] == golden["cell_id"].astype(str).tolist()
    median = np.zeros(25_426)
    median[v1.gene_table.token_ids] = v1.gene_table.medians
    n_identical = 0
    for row, theirs in zip(dataset.select(range(300)), expected, strict=True):
        ours, values = np.array(row["input_ids"]), np.array(row["counts"])
        value_of = dict(zip(ours.tolist(), (values / median[ours]).tolist(), strict=True))
        if len(theirs) < 2048:
            assert set(ours.tolist()) == set(theirs.tolist())
        ranked = np.array([value_of[t] for t in theirs.tolist() if t in value_of])
        assert (np.diff(ranked) <= RANKED_VALUE * ranked[:-1]).all()
        n_identical += np.array_equal(ours, theirs)
    assert n_identical >= 290


@pytest.mark.parametrize(("file", "layer"), [("layer-1", -2), ("layer0", -1)])
def test_cell_embeddings(file, layer, shared, golden_model, short_cells):
    golden = pd.read_csv(shared / "golden" / "v1" / f"emb_cell_{file}.csv.gz", index_col=0).set_index("cell_id")
    ours = embed_cells(golden_model, short_cells, layer=layer, device="cpu", progress=False)
    np.testing.assert_allclose(ours, golden.loc[short_cells["cell_id"][:]].to_numpy(), atol=GOLDEN_EMBEDDING)


@pytest.mark.parametrize(("file", "layer"), [("layer-1", -2), ("layer0", -1)])
def test_gene_embeddings(file, layer, shared, v1, golden_model, short_cells, monkeypatch):
    # The golden model has 128 positions, the tokenizer of V1 keeps 2,048 tokens.
    monkeypatch.setattr(v1, "model_max_length", 128)
    golden = pd.read_csv(shared / "golden" / "v1" / f"emb_gene_{file}.csv.gz", index_col=0)
    ours = embed_genes(golden_model, short_cells, tokenizer=v1, layer=layer, device="cpu", progress=False)
    assert set(ours.ensembl_ids) == set(golden.index)
    np.testing.assert_allclose(ours.vectors, golden.loc[ours.ensembl_ids].to_numpy(), atol=GOLDEN_EMBEDDING)


def test_state_means(shared, golden_model, short_cells):
    golden = np.load(shared / "golden" / "v1" / "state_embs.npz")
    ours = state_embeddings(golden_model, short_cells, "cell_type", progress=False)
    compared = 0
    for name in golden.files:
        if name in ours:
            np.testing.assert_allclose(ours[name], golden[name].ravel(), atol=GOLDEN_EMBEDDING)
            compared += 1
    assert compared >= 3


def test_500_genecorpus_cells_come_back_from_counts_that_rank_so(shared, v1):
    cells = pd.read_parquet(shared / "data" / "genecorpus30m_500" / "genecorpus_500_samples.parquet")["input_ids"]
    table = v1.gene_table
    row_of_token = np.full(25_426, -1)
    row_of_token[table.token_ids] = np.arange(len(table))
    indices, data, indptr = [], [], [0]
    for ids in cells:
        rows = row_of_token[np.asarray(ids)]
        # Scaled values fall by steps larger than the rounding of the counts to whole numbers.
        wanted = np.linspace(2.0, 1.0, len(rows)) * 1e7
        data.append(np.rint(wanted * table.medians[rows]))
        indices.append(rows)
        indptr.append(indptr[-1] + len(rows))
    counts = sp.csr_array((np.concatenate(data), np.concatenate(indices), indptr), shape=(500, len(table)))
    for ours, theirs in zip(v1.encode_counts(counts, table.ensembl_ids), cells, strict=True):
        assert ours.tolist() == list(theirs)


def test_the_published_vocabulary_line_by_line(shared, v1):
    lines = (shared / "data" / "genecorpus30m_500" / "vocab.txt").read_text().split()
    assert v1.convert_ids_to_tokens(list(range(25_426))) == lines


def test_the_v2_dictionaries(shared):
    found = find_dictionaries(shared / "data" / "geneformer_dicts_v2", 20_275)
    assert identify(found) == "V2"
    assert PUBLISHED_TABLES[20_275] == GeneformerTokenizer.from_dictionaries(found).gene_table.fingerprint
    tokenizer = GeneformerTokenizer.from_dictionaries(found, model_max_length=4096)
    assert len(tokenizer) == 20_275
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.cls_token_id, tokenizer.eos_token_id) == (0, 1, 2, 3)
    assert len(tokenizer.gene_table) == 20_271
    dataset = load_cells(shared / "data" / "sc_mixology" / "sc_mixology_3cl_celseq2_dropseq.h5ad", tokenizer=tokenizer)
    assert max(dataset["length"][:]) == 4096
    assert all(row["input_ids"][0] == 2 and row["input_ids"][-1] == 3 for row in dataset.select(range(20)))


@pytest.mark.parametrize(
    "name",
    [
        "kang_ifnb/kang_ctrl_stim_2000",
        "pbmc_10x_protein_400/pbmc_5k_protein_v3_200",
        "placenta_cellxgene/placenta_cellxgene",
        "gut_crohn_scp1884/gut_crohn_scp1884",
    ],
)
def test_other_real_files_tokenize_with_all_their_cells(name, shared, v1):
    import anndata

    path = shared / "data" / f"{name}.h5ad"
    dataset = load_cells(path, tokenizer=v1)
    assert dataset["cell_id"][:] == anndata.read_h5ad(path, backed="r").obs_names.tolist()
    assert min(dataset["length"][:]) > 0
