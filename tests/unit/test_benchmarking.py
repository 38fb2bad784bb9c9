"""A table over models and datasets that can be cut off, gone on with and added to."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from geneformer_hf import BenchmarkDataset, GeneformerForMaskedLM, benchmark, evaluate_cells
from geneformer_hf.analysis import benchmarking
from geneformer_hf.cli.main import main
from geneformer_hf.errors import CellFileError, ColumnNotFoundError, OutputError, OutputExistsError, SettingError
from tests.conftest import tiny_config, write
from tests.unit.test_evaluation import make_labelled

OPTIONS = {"pooling": "mean", "n_folds": 2, "progress": False}


@pytest.fixture(scope="module")
def labelled(genes):
    adata = make_labelled(genes)
    del adata.obsm["X_other"]
    return adata


@pytest.fixture
def place(labelled, model_folder, tokenizer, tmp_path):
    """Two files of cells and two models."""
    write(labelled, tmp_path / "first.h5ad")
    write(labelled[::2].copy(), tmp_path / "second.h5ad")
    torch.manual_seed(7)
    GeneformerForMaskedLM(tiny_config(tokenizer)).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    return tmp_path


@pytest.fixture
def counted(monkeypatch):
    """What is judged: dataset and models of each part."""
    done = []
    real = benchmarking.evaluate_cells

    def spy(models, cells, **options):
        what = "untrained" if options["tokenizer"] is not None else "model" if models else "expression"
        done.append((cells.rsplit("/", 1)[-1], what))
        return real(models, cells, **options)

    monkeypatch.setattr(benchmarking, "evaluate_cells", spy)
    return done


def datasets_in(place, *names):
    return [BenchmarkDataset(path=str(place / f"{name}.h5ad"), labels="cell_type", batch="batch") for name in names]


def test_figures_are_those_of_evaluate_cells(place, labelled):
    table = benchmark({"mine": place / "model"}, datasets_in(place, "first"), place / "table", **OPTIONS)
    found = evaluate_cells({"mine": place / "model"}, labelled, labels="cell_type", batch="batch", **OPTIONS).table
    assert table["name"].tolist() == ["mine", "untrained", "PCA of 60 variable genes", "log counts of 60 variable genes"]
    numbers = [column for column in found if found[column].dtype == float]
    np.testing.assert_allclose(table[numbers].to_numpy(dtype=float), found[numbers].to_numpy(), atol=1e-6)
    assert table["cells_judged"].tolist() == [60] * 4
    assert {p.name for p in (place / "table").iterdir()} - {".lock"} == {"rows", "benchmark.csv", "benchmark.json", "report.html", "pictures"}
    pd.testing.assert_frame_equal(pd.read_csv(place / "table" / "benchmark.csv"), table.drop(columns="notes"), check_dtype=False)
    assert len(json.loads((place / "table" / "benchmark.json").read_text())["rows"]) == 4


@pytest.mark.slow
def test_what_is_finished_is_not_computed_again_and_new_models_are_added(place, counted):
    first = benchmark({"mine": place / "model"}, datasets_in(place, "first"), place / "table", **OPTIONS)
    assert counted == [("first.h5ad", "model"), ("first.h5ad", "untrained"), ("first.h5ad", "expression")]
    del counted[:]
    again = benchmark({"renamed": place / "model"}, datasets_in(place, "first"), place / "table", **OPTIONS)
    assert counted == []
    assert again["name"].tolist()[0] == "renamed"
    pd.testing.assert_frame_equal(again.drop(columns=["name", "notes"]), first.drop(columns=["name", "notes"]))
    grown = benchmark({"mine": place / "model", "other": place / "other"}, datasets_in(place, "first", "second"), place / "table", **OPTIONS)
    assert counted == [("first.h5ad", "model"), *(("second.h5ad", what) for what in ("model", "model", "untrained", "expression"))]
    assert grown["dataset"].value_counts().tolist() == [5, 5], "one untrained model for both, which have one shape"


def test_a_run_that_was_cut_off_goes_on(place, counted, monkeypatch):
    real = benchmarking.evaluate_cells

    def breaks(models, cells, **options):
        if cells.endswith("second.h5ad"):
            raise KeyboardInterrupt
        return real(models, cells, **options)

    with monkeypatch.context() as patch:
        patch.setattr(benchmarking, "evaluate_cells", breaks)
        with pytest.raises(KeyboardInterrupt):
            benchmark({"mine": place / "model"}, datasets_in(place, "first", "second"), place / "table", **OPTIONS)
    assert not (place / "table" / "benchmark.csv").exists()
    assert len(list((place / "table" / "rows").iterdir())) == 3
    del counted[:]
    table = benchmark({"mine": place / "model"}, datasets_in(place, "first", "second"), place / "table", **OPTIONS)
    assert counted == [("second.h5ad", "model"), ("second.h5ad", "untrained"), ("second.h5ad", "expression")]
    assert table["dataset"].unique().tolist() == ["first", "second"]


@pytest.mark.slow
def test_other_cells_weights_or_options_are_computed_anew(place, labelled, counted):
    benchmark(place / "model", datasets_in(place, "first"), place / "table", **OPTIONS)
    del counted[:]
    benchmark(place / "model", datasets_in(place, "first"), place / "table", **(OPTIONS | {"seed": 5}))
    assert len(counted) == 3
    write(labelled[:50].copy(), place / "first.h5ad")
    benchmark(place / "model", datasets_in(place, "first"), place / "table", **OPTIONS)
    assert len(counted) == 6
    (place / "other").rename(place / "moved")
    (place / "model").rename(place / "away")
    (place / "moved").rename(place / "model")
    benchmark(place / "model", datasets_in(place, "first"), place / "table", **OPTIONS)
    assert counted[6:] == [("first.h5ad", "model")], "the rest is the same"


def test_what_cannot_be_judged_stops_after_what_is_finished_was_kept(place, counted):
    bad = [*datasets_in(place, "first"), BenchmarkDataset(path=str(place / "second.h5ad"), labels="nothing")]
    with pytest.raises(ColumnNotFoundError, match="nothing"):
        benchmark(place / "model", bad, place / "table", **OPTIONS)
    assert len(list((place / "table" / "rows").iterdir())) == 3


def test_folders_of_others_and_running_tables_are_left_alone(place):
    (place / "mine").mkdir()
    (place / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match="is not the table of a benchmark"):
        benchmark(place / "model", datasets_in(place, "first"), place / "mine", **OPTIONS)
    with benchmarking._table(place / "held"), pytest.raises(OutputError, match="another process"):
        benchmark(place / "model", datasets_in(place, "first"), place / "held", **OPTIONS)
    (place / "file").write_text("")
    with pytest.raises(OutputExistsError):
        benchmark(place / "model", datasets_in(place, "first"), place / "file", **OPTIONS)


@pytest.mark.parametrize(
    ("names", "options", "error", "message"),
    [
        pytest.param([], {}, SettingError, "called nothing", id="no_dataset"),
        pytest.param(["first", "first"], {}, SettingError, "called first, first", id="a_dataset_twice"),
        pytest.param(["nowhere"], {}, CellFileError, "nowhere.h5ad cannot be read", id="no_such_file"),
        pytest.param(["first"], {"layers": 2}, SettingError, "no option layers", id="an_unknown_option"),
    ],
)
def test_settings_that_make_no_table_are_refused(place, names, options, error, message):
    with pytest.raises(error, match=message):
        benchmark(place / "model", datasets_in(place, *names), place / "table", **(OPTIONS | options))


def test_the_command_reads_yaml_and_prints_each_dataset(place, capsys):
    config = {
        "models": {"mine": str(place / "model")},
        "datasets": [{"path": str(place / "second.h5ad"), "labels": "cell_type", "name": "half"}],
        "pooling": "mean",
        "n_folds": 2,
    }
    (place / "run.yaml").write_text(yaml.safe_dump(config))
    arguments = ["benchmark", "--config", str(place / "run.yaml"), "--output", str(place / "table")]
    assert main([*arguments, "--model", f"more={place / 'other'}"]) == 0
    printed = capsys.readouterr().out
    assert "half: 30 cells" in printed
    assert "mine " in printed
    assert "more " in printed
    assert main(arguments) == 0, "the same command goes on with its table"
    page = (place / "table" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("models: [a]", "expected `models:`", id="no_datasets"),
        pytest.param("models: [a]\ndatasets: [{path: x}]", "a dataset without path or labels", id="no_labels"),
        pytest.param("models: [a]\ndatasets: [{path: x, labels: y, colour: z}]", "unknown datasets.colour", id="an_unknown_key"),
        pytest.param("models: [a]\ndatasets: []\nepochs: 3", "unknown epochs", id="an_unknown_setting"),
        pytest.param("models: [", "not valid YAML", id="no_yaml"),
        pytest.param("models: [a]\ndatasets: [{path: 3, labels: y}]", "datasets.path is 3; expected text", id="a_number_for_a_path"),
        pytest.param("models: [a]\ndatasets: [{path: x, labels: [y]}]", "datasets.labels is ['y']; expected text", id="a_list_for_a_column"),
        pytest.param("models: [a]\ndatasets: [{path: x, labels: y}]\nseed: -5", "seed is -5; expected a whole number from 0 to", id="a_negative_seed"),
        pytest.param("models: [a]\ndatasets: [{path: x, labels: y}]\nseed: 1.5", "seed is 1.5; expected a whole number from 0 to", id="half_a_seed"),
        pytest.param("models: [a]\ndatasets: [{path: x, labels: y}]\nlayer: last", "layer is 'last'; expected a whole number.", id="a_word_for_a_layer"),
        pytest.param("models: [a]\ndatasets: [{path: x, labels: y}]\nn_folds: 1", "n_folds is 1; expected a whole number, 2 or more.", id="one_fold"),
        pytest.param("models: [a]\ndatasets: [{path: x, labels: y}]\nbatch_size: many", "batch_size is 'many'; expected", id="a_word_for_a_size"),
    ],
)
def test_a_config_that_says_something_else_is_refused(tmp_path, capsys, text, message):
    (tmp_path / "run.yaml").write_text(text)
    assert main(["benchmark", "--config", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "table")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "table").exists()
