"""SOMA experiments, as CELLxGENE Census is one: a query gives the cells it names, with their provenance, a block at a time."""

import builtins
import json
import pickle
import sys
import time
import types
import warnings

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
import tiledbsoma
import tiledbsoma.io
import torch

from geneformer_hf import CellDatasetBuilder, SomaSource, embed_cells, load_cells, open_census
from geneformer_hf.data import soma
from geneformer_hf.data.scdl import write_scdl
from geneformer_hf.errors import CellFileError, ColumnNotFoundError, MissingExtraError, NotRawCountsError, SettingError
from tests.conftest import make_cells
from tests.tolerances import SAME_MODEL


@pytest.fixture(scope="module")
def adata(genes):
    cells = make_cells(genes, 40, cell_type=["B", "T", "NK", "T"] * 10, tissue=["blood", "lung"] * 20, n_counts=np.zeros(40) + 1e6)
    cells.var["feature_id"], cells.var["feature_name"] = list(cells.var_names), [f"SYM{i}" for i in range(60)]
    cells.var_names = [str(i) for i in range(60)]
    return cells


@pytest.fixture(scope="module")
def experiment(adata, tmp_path_factory):
    """The layout of the Census: measurement RNA, layer raw, feature_id in var."""
    place = tmp_path_factory.mktemp("soma") / "experiment"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiledbsoma.io.from_anndata(str(place), adata, measurement_name="RNA", X_layer_name="raw")
    return place


@pytest.fixture
def chosen(adata):
    return adata[(adata.obs["tissue"] == "blood") & adata.obs["cell_type"].isin(["B", "NK"])]


QUERY = "tissue == 'blood' and cell_type in ['B', 'NK']"


def counts_of(source, start=0, stop=None):
    return np.vstack([block.counts_ng.toarray() for block in source.iter_blocks(start, stop)])


def test_a_query_gives_the_cells_it_names(experiment, chosen):
    source = SomaSource(experiment, QUERY)
    assert source.cell_ids == chosen.obs_names.tolist()
    assert np.array_equal(counts_of(source), chosen.X.toarray())
    assert source.gene_names == chosen.var["feature_id"].tolist()
    assert source.read_obs(["tissue", "cell_type"], 3, 6)["cell_type"].tolist() == chosen.obs["cell_type"].astype(str).tolist()[3:6]
    assert SomaSource(experiment).n_cells == 40


@pytest.mark.parametrize("block", [1, 3, 100])
def test_blocks_change_nothing(experiment, chosen, monkeypatch, block):
    monkeypatch.setattr(soma, "BLOCK", block)
    source = SomaSource(experiment, QUERY)
    assert np.array_equal(counts_of(source), chosen.X.toarray())
    assert np.array_equal(counts_of(source, 4, 9), chosen.X.toarray()[4:9])


def test_the_same_cells_give_the_same_tokens_with_their_provenance(experiment, chosen, tokenizer, tmp_path):
    found = load_cells(SomaSource(experiment, QUERY), tokenizer=tokenizer, cache_dir=tmp_path)
    expected = load_cells(chosen.copy(), tokenizer=tokenizer, gene_ids="feature_id")
    assert found["input_ids"][:] == expected["input_ids"][:]
    assert found["cell_id"][:] == chosen.obs_names.tolist()
    provenance = json.loads(found.info.description)["files"][0]["provenance"]
    assert provenance["uri"] == str(experiment)
    assert provenance["obs_filter"] == QUERY
    assert provenance["layer"] == "raw"


def test_tokens_are_streamed_and_cells_embedded(experiment, chosen, model, tokenizer):
    source = SomaSource(experiment, QUERY)
    streamed = list(CellDatasetBuilder(files=(source,), tokenizer=tokenizer).as_streaming_dataset("train"))
    assert [row["cell_id"] for row in streamed] == chosen.obs_names.tolist()
    expected = embed_cells(model, chosen.copy(), tokenizer=tokenizer, gene_ids="feature_id", progress=False)
    np.testing.assert_allclose(embed_cells(model, source, tokenizer=tokenizer, progress=False), expected, atol=SAME_MODEL)


@pytest.mark.parametrize("buffer", [512, 4096])
def test_a_read_in_several_pieces_changes_nothing(experiment, chosen, monkeypatch, buffer):
    monkeypatch.setattr(soma, "BUFFER_BYTES", buffer)
    source = SomaSource(experiment, QUERY)
    assert np.array_equal(counts_of(source), chosen.X.toarray())
    with source._open() as opened:
        assert len(list(opened.ms["RNA"].X["raw"].read().tables())) > 1
    monkeypatch.undo()
    context = tiledbsoma.SOMATileDBContext(tiledb_config={"soma.init_buffer_bytes": buffer})
    assert np.array_equal(counts_of(SomaSource(experiment, QUERY, context=context)), chosen.X.toarray())


def test_forked_workers_of_a_loader_read_too(experiment, chosen, tokenizer):
    """TileDB's threads are those of the process that opened the source; a worker that waits for them never answers."""
    source = SomaSource(experiment, QUERY)
    assert len(counts_of(source)) == len(chosen)
    rows = CellDatasetBuilder(files=(source,), tokenizer=tokenizer).as_streaming_dataset("train")
    loader = torch.utils.data.DataLoader(rows, batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60)
    assert [row["cell_id"] for row in loader] == chosen.obs_names.tolist()


def test_a_source_can_be_sent_to_another_process(experiment, chosen):
    context = tiledbsoma.SOMATileDBContext(tiledb_config={"soma.init_buffer_bytes": 4096})
    sent = pickle.loads(pickle.dumps(SomaSource(experiment, QUERY, context=context)))
    assert np.array_equal(counts_of(sent), chosen.X.toarray())


def test_a_context_of_the_past_shows_the_cells_of_then(adata, tmp_path):
    place = str(tmp_path / "experiment")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiledbsoma.io.from_anndata(place, adata[:20].copy(), measurement_name="RNA", X_layer_name="raw")
        then = int(time.time() * 1000)
        time.sleep(0.01)
        with tiledbsoma.Experiment.open(place, "w") as opened:
            tiledbsoma.io.update_obs(opened, adata[:20].obs.assign(tissue="liver"))
    past = SomaSource(place, "tissue == 'blood'", context=tiledbsoma.SOMATileDBContext(timestamp=then))
    assert past.n_cells == 10
    assert SomaSource(place, "tissue == 'liver'").n_cells == 20
    assert SomaSource(place, context=tiledbsoma.SOMATileDBContext(timestamp=then)).identity != SomaSource(place).identity


def test_another_query_or_another_write_is_another_dataset(adata, tokenizer, tmp_path):
    place = str(tmp_path / "experiment")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiledbsoma.io.from_anndata(place, adata[:20].copy(), measurement_name="RNA", X_layer_name="raw")
        first = SomaSource(place).identity
        assert SomaSource(place).identity == first
        assert SomaSource(place, QUERY).identity != first
        with tiledbsoma.Experiment.open(place, "w") as opened:
            tiledbsoma.io.update_obs(opened, adata[:20].obs.assign(new=1))
        assert SomaSource(place).identity != first


def test_cells_of_an_experiment_can_be_written(experiment, chosen, tmp_path):
    from geneformer_hf.data.readers import open_cells

    written = open_cells(write_scdl(SomaSource(experiment, QUERY), tmp_path / "archive"))
    assert np.array_equal(counts_of(written), chosen.X.toarray())


REFUSED = [
    pytest.param({"obs_filter": "colour == 'red'"}, SettingError, "the query .* cannot be asked: .*colour", id="an_unknown_column"),
    pytest.param({"obs_filter": "tissue ="}, SettingError, "cannot be asked", id="no_query"),
    pytest.param({"obs_filter": "tissue == 'brain'"}, CellFileError, r"no cell has tissue == 'brain'\. Columns of obs: .*cell_type", id="no_cells"),
    pytest.param({"measurement": "ATAC"}, CellFileError, "no measurement 'ATAC'. Found: RNA", id="no_measurement"),
    pytest.param({"layer": "normalized"}, ColumnNotFoundError, "no layer 'normalized'. Found: raw", id="no_layer"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_what_cannot_be_found_is_refused(experiment, options, error, message):
    with pytest.raises(error, match=message):
        SomaSource(experiment, **options)


def test_no_experiment_is_refused(tmp_path):
    with pytest.raises(CellFileError, match="cannot be opened as a SOMA experiment"):
        SomaSource(tmp_path / "nothing")


def test_an_unknown_column_is_named(experiment):
    with pytest.raises(ColumnNotFoundError, match=r"no column 'nothing'. Found: cell_type, tissue"):
        SomaSource(experiment).read_obs(["nothing"])


def test_normalised_values_are_refused(adata, tmp_path):
    logged = anndata.AnnData(sp.csr_matrix(np.log1p(adata.X.toarray())), adata.obs, adata.var)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiledbsoma.io.from_anndata(str(tmp_path / "a"), logged, measurement_name="RNA", X_layer_name="raw")
    with pytest.raises(NotRawCountsError, match="log-normalised"):
        SomaSource(tmp_path / "a")


def test_without_the_packages_the_remedy_is_named(experiment, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith(("tiledbsoma", "cellxgene_census")):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"geneformer-hf\[soma\]"):
        SomaSource(experiment)
    with pytest.raises(MissingExtraError, match=r"geneformer-hf\[census\]"):
        open_census("tissue == 'blood'")


def test_the_census_is_found_by_its_version(experiment, chosen, monkeypatch, tmp_path):
    """With a stand-in for cellxgene-census, whose functions need a network, and an experiment where the Census has it."""
    census = tmp_path / "soma"
    (census / "census_data").mkdir(parents=True)
    (census / "census_data" / "homo_sapiens").symlink_to(experiment)
    stand_in = types.SimpleNamespace(
        get_census_version_description=lambda version: {"release_build": "2026-01-31", "soma": {"uri": f"{census}/", "s3_region": "us-west-2"}},
        get_default_soma_context=lambda tiledb_config: tiledbsoma.SOMATileDBContext(),
    )
    monkeypatch.setitem(sys.modules, "cellxgene_census", stand_in)
    source = open_census(QUERY, version="stable")
    assert source.cell_ids == chosen.obs_names.tolist()
    assert source.provenance["census_version"] == "2026-01-31"
    assert source.provenance["organism"] == "homo_sapiens"
