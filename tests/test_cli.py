"""The command line on good input; what it refuses is in faults/test_bad_input.py."""

import subprocess
import sys

import anndata
import datasets
import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from geneformer_hf import GeneTable, embed_cells
from geneformer_hf.cli.main import COMMANDS, main
from tests.conftest import make_cells, write
from tests.formats import files as formats
from tests.tolerances import SAME_MODEL


@pytest.mark.parametrize("command", [c.name for c in COMMANDS])
def test_every_command_has_help(command, capsys):
    try:
        code = main([command, "--help"])
    except SystemExit as done:
        code = done.code
    assert code == 0
    assert "usage: geneformer-hf" in capsys.readouterr().out


@pytest.mark.parametrize("seed", ["-5", "4294967296", "one", "1.5"])
@pytest.mark.parametrize(
    "words",
    [
        ["demo"],
        ["qc", "cells.h5ad", "--output", "out"],
        ["embed", "cells.h5ad", "--model", "m", "--output", "out.h5ad"],
        ["evaluate", "cells.h5ad", "--model", "m", "--labels", "cell_type", "--output", "out"],
        ["stats", "table.parquet", "--mode", "effects", "--output", "out.csv"],
    ],
    ids=lambda words: words[0],
)
def test_seeds_that_no_generator_takes_are_refused(words, seed, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--seed", seed])
    assert f"argument --seed: '{seed}' is not a whole number from 0 to 4294967295" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_installed_command_runs():
    done = subprocess.run([sys.executable, "-m", "geneformer_hf.cli.main", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("geneformer-hf 0.")


def test_tokenize(h5ad, cells, model_folder, tmp_path, capsys):
    assert main(["tokenize", str(h5ad), "--model", str(model_folder), "--output", str(tmp_path / "out"), "--num-proc", "2"]) == 0
    dataset = datasets.load_from_disk(str(tmp_path / "out"))
    assert dataset["cell_id"][:] == cells.obs_names.tolist()
    printed = capsys.readouterr().out
    assert "30 cells, counts in X; 60 of 60 genes in the vocabulary, by index of var" in printed
    assert "30 cells written to" in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cells.h5ad", "model", "out"], "the cache is gone"


def test_tokenize_keeps_the_columns_asked_for(h5ad, model_folder, tmp_path):
    assert main(["tokenize", str(h5ad), "--model", str(model_folder), "--output", str(tmp_path / "none"), "--obs"]) == 0
    assert datasets.load_from_disk(str(tmp_path / "none")).column_names == ["input_ids", "length", "cell_id"]


def test_embed_into_a_copy_of_the_file(h5ad, cells, model, tokenizer, model_folder, tmp_path, capsys):
    out = tmp_path / "out.h5ad"
    assert main(["embed", str(h5ad), "--model", str(model_folder), "--output", str(out), "--plot", "cell_type"]) == 0
    result = anndata.read_h5ad(out)
    np.testing.assert_allclose(result.obsm["X_geneformer"], embed_cells(model, cells, tokenizer=tokenizer, progress=False), atol=SAME_MODEL)
    assert result.obsm["X_geneformer_umap"].shape == (30, 2)
    assert np.array_equal(result.X.toarray(), cells.X.toarray())
    assert (tmp_path / "out_umap_cell_type.png").stat().st_size > 5000
    assert (tmp_path / "out_heatmap_cell_type.png").stat().st_size > 5000
    assert result.uns["X_geneformer"]["pooling"] == "cls"
    assert result.uns["X_geneformer"]["gene_table"] == tokenizer.gene_table.fingerprint
    assert "Embeddings of cells (layer -2, cls, 16 dimensions)" in capsys.readouterr().out


def test_embed_keeps_everything_else_in_the_file(h5ad, model_folder, tmp_path):
    with h5py.File(h5ad, "r+") as file:
        file["uns/strange"] = np.arange(3)
        file.attrs["note"] = "kept"
    assert main(["embed", str(h5ad), "--model", str(model_folder), "--output", str(tmp_path / "out.h5ad")]) == 0
    with h5py.File(tmp_path / "out.h5ad") as file:
        assert file.attrs["note"] == "kept"
        assert file["uns/strange"][:].tolist() == [0, 1, 2]


@pytest.mark.parametrize("source", ["file", "dataset"])
def test_embed_into_parquet(source, h5ad, cells, model, tokenizer, model_folder, tmp_path):
    given = h5ad
    if source == "dataset":
        given = tmp_path / "tokens"
        assert main(["tokenize", str(h5ad), "--model", str(model_folder), "--output", str(given)]) == 0
    assert main(["embed", str(given), "--model", str(model_folder), "--output", str(tmp_path / "out.parquet"), "--pooling", "mean", "--layer", "-1"]) == 0
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column("cell_id").to_pylist() == cells.obs_names.tolist()
    expected = embed_cells(model, cells, tokenizer=tokenizer, pooling="mean", layer=-1, progress=False)
    np.testing.assert_allclose(np.stack(table.column("embedding").to_pylist()), expected, atol=SAME_MODEL)


def test_embed_genes(h5ad, genes, model_folder, tmp_path):
    assert main(["embed", str(h5ad), "--model", str(model_folder), "--output", str(tmp_path / "out.h5ad"), "--genes"]) == 0
    varm = anndata.read_h5ad(tmp_path / "out.h5ad").varm["X_geneformer"]
    assert main(["embed", str(h5ad), "--model", str(model_folder), "--output", str(tmp_path / "out.parquet"), "--genes"]) == 0
    table = pq.read_table(tmp_path / "out.parquet").to_pandas().set_index("ensembl_id")
    np.testing.assert_allclose(varm[3], table.loc[genes[3], "embedding"], atol=SAME_MODEL)
    assert main(["embed", str(h5ad), "--model", str(model_folder), "--output", str(tmp_path / "all.parquet"), "--genes", "contextual"]) == 0
    every = pq.read_table(tmp_path / "all.parquet")
    assert every.column_names == ["cell_id", "ensembl_id", "rank", "embedding"]
    assert every.num_rows == int(table["n_cells"].sum())


def test_medians_and_info(h5ad, model_folder, tmp_path, capsys):
    assert main(["medians", str(h5ad), "--output", str(tmp_path / "gene_table.json")]) == 0
    assert len(GeneTable.load(tmp_path / "gene_table.json")) == 60
    assert main(["tokenize", str(h5ad), "--model", str(model_folder), "--output", str(tmp_path / "tokens")]) == 0
    capsys.readouterr()
    for what, words in {
        tmp_path / "gene_table.json": "Gene table: 60 human genes",
        h5ad: "Cells: 30 x 60 genes",
        tmp_path / "tokens": "Tokenized dataset: 30 cells",
        model_folder: "GeneformerForMaskedLM",
        "Geneformer-V2-316M": "layers 18; hidden 1,152",
    }.items():
        assert main(["info", str(what)]) == 0
        assert words in capsys.readouterr().out
    assert main(["info", str(h5ad), "--model", str(model_folder)]) == 0
    assert "60 of 60 genes in the vocabulary" in capsys.readouterr().out


def test_export(model_folder, tmp_path, capsys):
    assert main(["export", str(model_folder), str(tmp_path / "bert"), "--format", "bert"]) == 0
    assert "all tensors equal" in capsys.readouterr().out


def test_overwrite_replaces(h5ad, model_folder, tmp_path, genes):
    out = tmp_path / "out.h5ad"
    command = ["embed", str(h5ad), "--model", str(model_folder), "--output", str(out)]
    assert main(command) == 0
    write(make_cells(genes, 9), h5ad)
    assert main(command) == 1
    assert anndata.read_h5ad(out).n_obs == 30
    assert main([*command, "--overwrite"]) == 0
    assert anndata.read_h5ad(out).n_obs == 9


@pytest.mark.parametrize("kind", ["loom", "zarr", "tenx", "folder", "legacy"])
def test_embed_other_kinds_of_files_into_an_h5ad(kind, cells, model, tokenizer, model_folder, tmp_path, capsys):
    make = {
        "loom": lambda: formats.write_loom(cells, tmp_path / "a.loom"),
        "zarr": lambda: formats.write_zarr(cells, tmp_path / "a.zarr", 3),
        "tenx": lambda: formats.write_tenx_h5(cells, tmp_path / "a.h5", antibodies=2),
        "folder": lambda: formats.write_tenx_folder(cells, tmp_path / "a"),
        "legacy": lambda: formats.write_legacy(cells, tmp_path / "a.h5ad"),
    }
    path, out = make[kind](), tmp_path / "out.h5ad"
    assert main(["embed", str(path), "--model", str(model_folder), "--output", str(out)]) == 0
    assert "and nothing else of it." in capsys.readouterr().out
    result = anndata.read_h5ad(out)
    np.testing.assert_allclose(result.obsm["X_geneformer"], embed_cells(model, cells, tokenizer=tokenizer, progress=False), atol=SAME_MODEL)
    assert np.array_equal(result.X.toarray(), cells.X.toarray())
    assert main(["embed", str(path), "--model", str(model_folder), "--output", str(tmp_path / "genes.h5ad"), "--genes"]) == 0
    assert anndata.read_h5ad(tmp_path / "genes.h5ad").varm["X_geneformer"].shape == (60, 16)


def test_gene_embeddings_of_a_file_with_antibodies(cells, model_folder, tmp_path):
    more = anndata.AnnData(np.hstack([np.ones((30, 2)), cells.X.toarray()]).astype(np.float32), cells.obs)
    more.var_names = ["CD3", "SYM1", *cells.var_names]
    more.var["feature_types"] = ["Antibody Capture"] * 2 + ["Gene Expression"] * 60
    path = write(more, tmp_path / "more.h5ad")
    assert main(["embed", str(path), "--model", str(model_folder), "--output", str(tmp_path / "out.h5ad"), "--genes"]) == 0
    vectors = anndata.read_h5ad(tmp_path / "out.h5ad").varm["X_geneformer"]
    assert np.isnan(vectors[:2]).all()
    assert not np.isnan(vectors[2:]).any()


def test_info_of_what_holds_files_and_of_what_is_not_there(h5ad, tmp_path, capsys):
    assert main(["info", str(tmp_path)]) == 1
    assert "is a folder of 1 files of cells, which tokenize, qc and medians take as a whole. Name one of them: cells.h5ad" in capsys.readouterr().err
    assert main(["info", str(tmp_path / "gone.loom")]) == 1
    assert "gone.loom does not exist; expected a file of cells" in capsys.readouterr().err
