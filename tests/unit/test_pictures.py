"""Pictures leave pyplot alone, are asked for before the work, and cost no result where they fail."""

import importlib.util
import subprocess
import sys

import anndata
import numpy as np
import pytest

from geneformer_hf.cli.embed import _file_names
from geneformer_hf.cli.main import main
from geneformer_hf.reports import plots
from tests.conftest import make_cells, write


def test_a_session_keeps_its_backend_and_its_figures(tmp_path):
    """A notebook's backend would show no plot any more after a switch to Agg."""
    code = """
import sys, matplotlib
matplotlib.use("svg")
import matplotlib.pyplot as plt
own = plt.figure()
import numpy as np
from pathlib import Path
from geneformer_hf.reports.plots import plot_umap, plot_training
from geneformer_hf.reports.gene_plots import plot_network
folder = Path(sys.argv[1])
plot_umap(np.random.rand(20, 2), ["a", "b"] * 10, folder / "a.png", title="t", name="n")
plot_training([1, 2], [3.0, 2.0], folder / "b.png", held_out={}, references={})
plot_network(np.eye(3), ["a", "b", "c"], folder / "c.png", title="t", what="w")
print(matplotlib.get_backend(), plt.get_fignums(), plt.gcf() is own)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["svg", "[1]", "True"]
    assert all((tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in "abc")


def test_no_module_of_ours_imports_pyplot():
    from tests.test_layers import MODULES

    assert [path.name for path in MODULES if "pyplot" in path.read_text().replace("`matplotlib.pyplot.subplots`", "").replace("without pyplot", "")] == []


@pytest.fixture
def h5ad(genes, tmp_path):
    return write(make_cells(genes, 20, **{"cell type": ["A", "B"] * 10, "cell_type": ["C", "D"] * 10}), tmp_path / "cells.h5ad")


def embed(h5ad, model_folder, tmp_path, *more):
    return main(["embed", str(h5ad), "--model", str(model_folder), "--output", str(tmp_path / "out.h5ad"), *more])


COMMANDS = {
    "embed": ["embed", "CELLS", "--model", "MODEL", "--output", "OUT.h5ad", "--plot", "cell_type"],
    "attention": ["attention", "CELLS", "--model", "MODEL", "--output", "OUT"],
    "evaluate": ["evaluate", "CELLS", "--model", "MODEL", "--labels", "cell_type", "--output", "OUT"],
    "qc": ["qc", "CELLS", "--output", "OUT"],
    "stats": ["stats", "CELLS", "--mode", "effects", "--output", "OUT.csv", "--plot", "OUT.png"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_draws_is_asked_for_before_anything_is_computed(name, h5ad, model_folder, tmp_path, capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(plots, "find_spec", lambda module: None if module in ("matplotlib", "scanpy") else real(module))
    places = {"CELLS": str(h5ad), "MODEL": "no_model_was_opened"}
    words = [places.get(word, word.replace("OUT", str(tmp_path / "out"))) for word in COMMANDS[name]]
    assert main(words) == 1
    assert "Plots need matplotlib" in (said := capsys.readouterr().err)
    assert "pip install 'geneformer-hf[plot]'" in said
    assert [path.name for path in tmp_path.iterdir()] == ["cells.h5ad", "model"] or {path.name for path in tmp_path.iterdir()} == {"cells.h5ad", "model"}


def test_pictures_that_fail_cost_no_embeddings(h5ad, model_folder, tmp_path, capsys, monkeypatch):
    def broken(*args, **kwargs):
        msg = "no neighbours"
        raise RuntimeError(msg)

    monkeypatch.setattr(plots, "umap_coordinates", broken)
    assert embed(h5ad, model_folder, tmp_path, "--plot", "cell_type") == 1
    assert "is complete, but the plots could not be drawn: RuntimeError: no neighbours." in capsys.readouterr().err
    assert np.isfinite(anndata.read_h5ad(tmp_path / "out.h5ad").obsm["X_geneformer"]).any()
    assert not list(tmp_path.glob("*.png"))


def test_columns_whose_names_would_be_one_file_have_two(h5ad, model_folder, tmp_path, capsys):
    assert embed(h5ad, model_folder, tmp_path, "--plot", "cell type", "cell_type") == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        f"out_{kind}_cell_type{number}.png" for kind in ("heatmap", "umap") for number in ("", "_2")
    ]
    assert capsys.readouterr().out.count("Picture:") == 4


def test_names_of_files_differ_whatever_the_case():
    assert _file_names(["a b", "A_B", "a_b_2", "a/b"]) == {"a b": "a_b", "A_B": "A_B_2", "a_b_2": "a_b_2_2", "a/b": "a_b_3"}
