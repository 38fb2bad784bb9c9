"""Bad input through the command line: one clear message, exit code 1, no traceback, nothing half-written."""

import re

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from geneformer_hf.cli.main import main
from tests.conftest import make_cells, write


def dense(cells):
    return cells.X.toarray()


def as_given(cells, x):
    cells = cells.copy()
    cells.X = x
    return cells


def log_normalised(cells):
    return as_given(cells, np.log1p(dense(cells) / 10))


def scaled(cells):
    return as_given(cells, dense(cells) - dense(cells).mean(0))


def with_value(value):
    def change(cells):
        x = dense(cells).astype(np.float32)
        x[3, 5] = value
        return as_given(cells, x)

    return change


def named(names, columns=None):
    def change(cells):
        return anndata.AnnData(cells.X, cells.obs, pd.DataFrame(columns or {}, index=names))

    return change


def with_obs(**obs):
    def change(cells):
        cells = cells.copy()
        for name, values in obs.items():
            cells.obs[name] = values
        return cells

    return change


N = 60
REFUSED = [
    pytest.param(log_normalised, r"no raw counts: X looks log-normalised \(largest value", id="log_normalised"),
    pytest.param(scaled, r"X looks scaled \(smallest value -", id="scaled"),
    pytest.param(with_value(-1), r"X holds negative values \(smallest value -1, 1 of ", id="negative"),
    pytest.param(with_value(np.nan), "X holds 1 values that are NaN or infinite", id="nan"),
    pytest.param(with_value(np.inf), "X holds 1 values that are NaN or infinite", id="infinite"),
    pytest.param(with_value(2.5), r"X holds fractions \(largest value .* 1 of ", id="not_whole"),
    pytest.param(named([str(i) for i in range(N)]), "nothing in var names the genes", id="no_gene_ids"),
    pytest.param(named([f"ENSMUSG{i:011d}" for i in range(N)]), "mouse Ensembl ids", id="mouse_ids"),
    pytest.param(named([f"Abc{i}" for i in range(N)]), "look like mouse or rat symbols", id="mouse_symbols"),
    pytest.param(
        named([f"ENSG{90000 + i:011d}" for i in range(N)]), "only 0 of 60 genes .* human Ensembl ids, but not those of this vocabulary", id="low_overlap"
    ),
]


@pytest.mark.parametrize(("change", "words"), REFUSED)
@pytest.mark.parametrize("command", ["embed", "tokenize"])
def test_cells_that_cannot_be_ranked(command, change, words, cells, model_folder, tmp_path, capsys):
    path = tmp_path / "bad.h5ad"
    change(cells).write_h5ad(path)
    check_refused([command, str(path), "--model", str(model_folder), "--output", str(tmp_path / "out.h5ad")], words, tmp_path, capsys, file="bad.h5ad")


def check_refused(command, words, folder, capsys, file=""):
    before = sorted(p.name for p in folder.iterdir())
    assert main(command) == 1
    error = capsys.readouterr().err
    message = [line for line in error.splitlines() if line.startswith(f"geneformer-hf {command[0]}: ")]
    assert len(message) == 1, error
    assert "Traceback" not in error
    assert file in message[0]
    assert re.search(words, message[0]), message[0]
    assert sorted(p.name for p in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(lambda p: p.write_bytes(p.read_bytes()[:3000]), "cannot be opened.*cut off", id="truncated"),
        pytest.param(lambda p: p.write_bytes(b""), r"is empty \(0 bytes\)", id="empty"),
        pytest.param(lambda p: p.write_text("a,b\n"), "is not an HDF5 file", id="text"),
        pytest.param(lambda p: p.unlink(), "does not exist", id="gone"),
    ],
)
@pytest.mark.parametrize("command", ["embed", "tokenize", "medians"])
def test_files_that_cannot_be_read(command, damage, words, h5ad, model_folder, tmp_path, capsys):
    damage(h5ad)
    model = [] if command == "medians" else ["--model", str(model_folder)]
    check_refused([command, str(h5ad), *model, "--output", str(tmp_path / "out.h5ad")], words, tmp_path, capsys, file="cells.h5ad")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param(["--layer", "7"], "layer 7 does not exist: this model has 3 layers", id="layer"),
        pytest.param(["--plot", "donor"], "obs has no column 'donor'. Found: cell_type", id="plot_column"),
        pytest.param(["--counts-layer", "umi"], "there is no layer 'umi'. Found: X", id="counts_layer"),
        pytest.param(["--gene-ids", "names"], "var has no column 'names'", id="gene_ids"),
        pytest.param(["--device", "nonsense"], "device 'nonsense' is not known to torch", id="device"),
        pytest.param(["--genes", "contextual"], "only a .parquet file takes", id="contextual_into_h5ad"),
        pytest.param(["--genes", "--plot", "cell_type"], "leave out --genes or --plot", id="genes_and_plot"),
    ],
)
def test_options_that_do_not_fit(options, words, h5ad, model_folder, tmp_path, capsys):
    check_refused(["embed", str(h5ad), "--model", str(model_folder), "--output", str(tmp_path / "out.h5ad"), *options], words, tmp_path, capsys)


def test_cls_pooling_without_cls(h5ad, v1_model, v1_tokenizer, tmp_path, capsys):
    v1_model.save_pretrained(tmp_path / "v1")
    v1_tokenizer.save_pretrained(tmp_path / "v1")
    command = ["embed", str(h5ad), "--model", str(tmp_path / "v1"), "--output", str(tmp_path / "out.h5ad")]
    check_refused([*command, "--pooling", "cls"], "needs a <cls> token, and this model's vocabulary of 62 has none", tmp_path, capsys)
    assert main(command) == 0


@pytest.mark.parametrize("command", ["embed", "tokenize", "medians", "export", "convert", "demo"])
def test_an_output_that_exists_is_not_touched(command, h5ad, model_folder, tmp_path, capsys):
    out = tmp_path / "out.h5ad"
    out.write_text("mine")
    arguments = {
        "embed": [str(h5ad), "--model", str(model_folder), "--output", str(out)],
        "tokenize": [str(h5ad), "--model", str(model_folder), "--output", str(out)],
        "medians": [str(h5ad), "--output", str(out)],
        "export": [str(model_folder), str(out)],
        "convert": [str(model_folder), str(out)],
        "demo": ["--output", str(out)],
    }
    if command != "convert":
        check_refused([command, *arguments[command]], "exists. Choose another name, or pass --overwrite", tmp_path, capsys)
    else:
        check_refused([command, *arguments[command]], "exists|No token_dictionary", tmp_path, capsys)
    assert out.read_text() == "mine"


def test_model_and_tokenizer_that_differ(h5ad, model_folder, v1_tokenizer, tmp_path, capsys):
    v1_tokenizer.save_pretrained(model_folder)
    check_refused(
        ["embed", str(h5ad), "--model", str(model_folder), "--output", str(tmp_path / "out.h5ad")],
        "do not belong together: the model has 64 tokens and the tokenizer 62",
        tmp_path,
        capsys,
    )


def test_folders_that_are_no_checkpoint(h5ad, model_folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    embed = ["embed", str(h5ad), "--output", str(tmp_path / "out.h5ad"), "--model"]
    check_refused([*embed, str(tmp_path / "empty")], "holds no config.json", tmp_path, capsys)
    check_refused([*embed, str(tmp_path / "nothing" / "there")], "does not exist", tmp_path, capsys)
    check_refused(["info", str(tmp_path / "empty")], "neither a checkpoint .* nor a dataset", tmp_path, capsys)
    (model_folder / "gene_table.json").unlink()
    check_refused([*embed, str(model_folder)], "holds no gene_table.json: published checkpoints come without a tokenizer", tmp_path, capsys)


def test_a_dataset_goes_into_parquet(h5ad, model_folder, tmp_path, capsys):
    assert main(["tokenize", str(h5ad), "--model", str(model_folder), "--output", str(tmp_path / "tokens")]) == 0
    capsys.readouterr()
    check_refused(["embed", str(tmp_path / "tokens"), "--model", str(model_folder), "--output", str(tmp_path / "out.h5ad")], "is a dataset", tmp_path, capsys)
    check_refused(["embed", str(h5ad), "--model", str(model_folder), "--output", str(tmp_path / "out.csv")], "ends in .h5ad or .parquet", tmp_path, capsys)


def test_filter_pass_that_is_neither(cells, model_folder, tmp_path, capsys):
    path = tmp_path / "bad.h5ad"
    with_obs(filter_pass=[2] * 30)(cells).write_h5ad(path)
    command = ["tokenize", str(path), "--model", str(model_folder), "--output", str(tmp_path / "out")]
    check_refused(command, r"obs\['filter_pass'\] holds 30 values that are neither 0 nor 1 \(2\)", tmp_path, capsys)


@pytest.mark.parametrize("processes", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_bad_cell_far_down_is_found_by_every_process(processes, genes, model_folder, tmp_path, capsys):
    # More values than are looked at before the work starts; the bad cell lies between the places looked at.
    cells = make_cells(genes, 20_000)
    x = dense(cells)
    x[5_000] = 0.5
    path = tmp_path / "bad.h5ad"
    as_given(cells, sp.csr_matrix(x)).write_h5ad(path)
    command = ["tokenize", str(path), "--model", str(model_folder), "--output", str(tmp_path / "out"), "--num-proc", processes]
    check_refused(command, r"bad\.h5ad: X \(cells [\d,]+ to [\d,]+\) holds fractions", tmp_path, capsys)


def test_no_cell_is_left(genes, model_folder, tmp_path, capsys):
    cells = make_cells(genes, 4, filter_pass=[0, 0, 0, 0])
    cells.write_h5ad(tmp_path / "none.h5ad")
    command = ["tokenize", str(tmp_path / "none.h5ad"), "--model", str(model_folder), "--output", str(tmp_path / "out")]
    check_refused(command, "none of 4 cells is left: 4 have filter_pass 0", tmp_path, capsys)
    cells.X = sp.csr_matrix((4, 60), dtype=np.float32)
    cells.write_h5ad(tmp_path / "none.h5ad")
    command = ["embed", str(tmp_path / "none.h5ad"), "--model", str(model_folder), "--output", str(tmp_path / "out.h5ad")]
    check_refused(command, "none of its 4 cells holds a gene", tmp_path, capsys)
    cells[:0].copy().write_h5ad(tmp_path / "none.h5ad")
    check_refused(command, "holds no cells", tmp_path, capsys)


def test_an_output_where_nothing_can_be_written(h5ad, model_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    command = ["embed", str(h5ad), "--model", str(model_folder), "--output", str(tmp_path / "file" / "out.h5ad")]
    check_refused(command, "cannot write .*file is not a folder", tmp_path, capsys)


def test_files_of_two_species_have_no_common_medians(h5ad, genes, tmp_path, capsys):
    make_cells([f"ENSMUSG{i:011d}" for i in range(60)], 5).write_h5ad(tmp_path / "mouse.h5ad")
    check_refused(
        ["medians", str(h5ad), str(tmp_path / "mouse.h5ad"), "--output", str(tmp_path / "t.json")],
        r"several species: .*\(human\), .*\(mouse\)",
        tmp_path,
        capsys,
    )


def test_info_shows_what_there_is_before_it_refuses(cells, tmp_path, capsys):
    log_normalised(cells).write_h5ad(tmp_path / "log.h5ad")
    assert main(["info", str(tmp_path / "log.h5ad")]) == 1
    printed = capsys.readouterr()
    assert "Cells: 30 x 60 genes; matrices: X" in printed.out
    assert "looks log-normalised" in printed.err


def test_what_is_mended_is_counted(genes, model_folder, tmp_path, capsys):
    """Duplicate, retired and versioned ids, symbols, an empty cell and a cell with one gene."""
    cells = make_cells(genes, 6)
    x = cells.X.toarray()
    x[1], x[2] = 0, 0
    x[2, 7] = 3
    names = genes.copy()
    names[0], names[1], names[2], names[3] = genes[4], "ENSG00000009001", f"{genes[2]}.4", "SYM9"
    var = pd.DataFrame({"ensembl_id": names}, index=[f"g{i}" for i in range(60)])
    anndata.AnnData(sp.csr_matrix(x), cells.obs, var).write_h5ad(tmp_path / "a.h5ad")
    assert main(["tokenize", str(tmp_path / "a.h5ad"), "--model", str(model_folder), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for words in (
        "60 of 60 genes",
        "1 by symbol",
        "1 version suffixes taken off",
        "1 retired",
        "2 columns summed",
        "5 cells written",
    ):
        assert words in printed
    assert main(["info", str(tmp_path / "out")]) == 0
    assert "Left out: 1 cells without any gene" in capsys.readouterr().out
    assert main(["embed", str(tmp_path / "a.h5ad"), "--model", str(model_folder), "--output", str(tmp_path / "out.h5ad")]) == 0
    embedded = anndata.read_h5ad(tmp_path / "out.h5ad").obsm["X_geneformer"]
    assert np.isnan(embedded).all(axis=1).tolist() == [False, True, False, False, False, False]


def test_counts_elsewhere_need_no_option(cells, model_folder, tmp_path, capsys):
    shown = cells.copy()
    shown.layers["counts"] = cells.X.copy()
    shown.X = np.log1p(dense(cells))
    path = write(shown, tmp_path / "a.h5ad", "as it is")
    assert main(["tokenize", str(path), "--model", str(model_folder), "--output", str(tmp_path / "out")]) == 0
    assert "counts in layers['counts']" in capsys.readouterr().out


def test_an_interrupted_write_leaves_nothing(h5ad, model_folder, tmp_path, capsys, monkeypatch):
    from geneformer_hf.models import encoding

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(encoding, "encode_packed", stop)
    before = sorted(p.name for p in tmp_path.iterdir())
    assert main(["embed", str(h5ad), "--model", str(model_folder), "--output", str(tmp_path / "out.h5ad")]) == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_full_disk_leaves_nothing(h5ad, model_folder, tmp_path, capsys, monkeypatch):
    import shutil

    def full(*_, **__):
        raise OSError(28, "No space left on device", str(tmp_path / "out.h5ad"))

    monkeypatch.setattr(shutil, "copyfile", full)
    check_refused(["embed", str(h5ad), "--model", str(model_folder), "--output", str(tmp_path / "out.h5ad")], "No space left on device", tmp_path, capsys)
