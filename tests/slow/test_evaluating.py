"""Evaluation on real cells with a small random model, published tasks with the labels that are there, and a benchmark that is killed."""

import os
import signal
import subprocess
import sys
import time

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from geneformer_hf import GeneformerForMaskedLM, GeneformerTokenizer, attention_network, evaluate_cells, gene_modules, load_task, regulator_centrality, run_task
from geneformer_hf.analysis.embeddings import GeneEmbeddings
from geneformer_hf.models.dictionaries import find_dictionaries
from tests.conftest import tiny_config, write
from tests.unit.test_evaluation import make_labelled

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """A folder with a small model of the published vocabulary, not trained."""
    from tests.conftest import shared_folder

    folder = tmp_path_factory.mktemp("random")
    tokenizer = GeneformerTokenizer.from_dictionaries(find_dictionaries(shared_folder() / "data" / "geneformer_dicts_v2", 20_275), model_max_length=128)
    torch.manual_seed(0)
    GeneformerForMaskedLM(tiny_config(tokenizer, max_position_embeddings=128)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.shared
def test_known_truth_is_found_in_expression(shared, random_model):
    """Nearest centroids across protocols are right for 98 to 100% of these cells (README of the data)."""
    cells = shared / "data" / "sc_mixology" / "sc_mixology_3cl_celseq2_dropseq.h5ad"
    found = evaluate_cells({"random": random_model}, cells, labels="cell_type", batch="batch", pooling="mean", progress=False)
    rows = found.table.set_index("kind")
    assert found.used.sum() == 499
    assert rows.loc["baseline", "knn_accuracy"].min() > 0.95
    assert rows.loc["baseline", "nmi"].min() > 0.8
    assert rows.loc["baseline", "avg_bio"].min() > rows.loc["model", "avg_bio"]
    assert "below the best of the others" in found.verdict()


@pytest.mark.shared
def test_labels_that_do_not_fit_their_cells_are_doubted(shared, random_model):
    """The types of these cells fit neither their genes nor any embedding."""
    cells = shared / "data" / "placenta_cellxgene" / "placenta_cellxgene.h5ad"
    found = evaluate_cells({"random": random_model}, cells, labels="cell_type", batch="donor_id", pooling="mean", progress=False)
    assert "Labels may not belong to these cells" in found.notes[-1]


@pytest.mark.shared
def test_transcription_factors_are_found_in_real_cells(shared, random_model):
    factors = (shared / "data" / "gene_labels" / "allTFs_hg38.txt").read_text().split()
    cells = anndata.read_h5ad(shared / "data" / "pbmc3k" / "pbmc3k_raw_annotated.h5ad")[:60].copy()
    tokenizer = GeneformerTokenizer.from_pretrained(random_model)
    network = attention_network(random_model, cells, n_genes=100, progress=False)
    found = regulator_centrality(network, factors, table=tokenizer.gene_table)
    assert found["n_regulators"].iloc[0] > 10
    assert abs(found["auc_matched"].iloc[0] - 0.5) < 0.2, "a random model favours nobody"


@pytest.mark.shared
@pytest.mark.parametrize("name", ["dosage-sensitivity", "cell-annotation", "differentiation"])
def test_tasks_whose_labels_are_there_run_end_to_end(name, shared, random_model, tmp_path):
    data = shared / "data"
    files = {"differentiation": data / "cardio_scgps" / "cardio_day2_day5_recovered_counts.h5ad"}
    adata = anndata.read_h5ad(files.get(name, data / "pbmc3k" / "pbmc3k_raw_annotated.h5ad"))
    adata = adata[:: len(adata) // 200].copy()
    cells = write(adata, tmp_path / "cells.h5ad")
    genes = data / "gene_labels" / "dosage_sensitivity_TFs.json" if load_task(name).kind == "genes" else None
    quick = (
        {"num_train_epochs": 1, "disable_tqdm": True, "attention_dropout": 0.0, "rare_threshold": 5}
        if genes is None
        else {"num_train_epochs": 1, "disable_tqdm": True}
    )
    found = run_task(name, random_model, cells=cells, genes=genes, output=tmp_path / "out", settings=quick)
    (by_name,) = found.figures["heads"].values()
    assert 0 <= by_name["this model"]["macro_f1"] <= 1
    assert len(by_name) > 2, "it stands beside baselines"
    assert (found.folder / "report.html").is_file()


def test_a_benchmark_that_is_killed_goes_on_with_its_table(genes, model_folder, tmp_path):
    cells = make_labelled(genes)
    names = [str(write(cells[i:].copy(), tmp_path / f"{i}.h5ad")) for i in range(2)]
    config = {"models": {"mine": str(model_folder)}, "datasets": [{"path": name, "labels": "cell_type", "batch": "batch"} for name in names], "pooling": "mean"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))

    def start(output):
        command = [sys.executable, "-m", "geneformer_hf", "benchmark", "--config", str(tmp_path / "run.yaml"), "--output", str(tmp_path / output)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    run, end = start("killed"), time.monotonic() + 300
    while len(list((tmp_path / "killed").glob("rows/[!.]*"))) < 2:
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    kept = {part.name: part.stat().st_mtime_ns for part in (tmp_path / "killed").glob("rows/[!.]*")}
    assert not (tmp_path / "killed" / "benchmark.csv").exists()
    for output in ("killed", "whole"):
        again = start(output)
        said, _ = again.communicate(timeout=600)
        assert again.returncode == 0, said
    assert all((tmp_path / "killed" / "rows" / name).stat().st_mtime_ns == when for name, when in kept.items())
    pd.testing.assert_frame_equal(*(pd.read_csv(tmp_path / output / "benchmark.csv") for output in ("killed", "whole")), rtol=1e-5)


def test_modules_of_many_genes():
    """Beyond 4,096 genes scanpy would take neighbours by cosine that it cannot read."""
    names = [f"ENSG{i:011d}" for i in range(4_200)]
    vectors = np.random.default_rng(0).normal(size=(4_200, 4)).astype(np.float32)
    assert gene_modules(GeneEmbeddings(names, vectors, np.full(4_200, 20))).n_obs == 4_200
