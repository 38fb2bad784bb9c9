"""scDL archives: the same cells give the same tokens either way, and what bionemo-scdl writes wrong does not reach the user silently."""

import builtins
import os
import shutil
import warnings

import anndata
import datasets
import numpy as np
import pytest
import scipy.sparse as sp

from geneformer_hf import load_cells
from geneformer_hf.cli.main import main
from geneformer_hf.data.readers import open_cells
from geneformer_hf.data.scdl import scdl_dataset, write_scdl
from geneformer_hf.errors import CellFileError, ColumnNotFoundError, MissingExtraError, NotRawCountsError, OutputExistsError
from tests.conftest import make_cells, write
from tests.formats import files
from tests.unit.test_readers import read_all


@pytest.fixture
def archive(cells, tmp_path):
    return write_scdl(open_cells(cells), tmp_path / "archive")


def reopened(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return scdl_dataset(data_path=str(path))


def test_the_same_tokens_either_way(cells, archive, tokenizer, tmp_path):
    expected = load_cells(cells, tokenizer=tokenizer)
    for path in (archive, files.write_scdl(cells, tmp_path / "theirs")):
        found = load_cells(path, tokenizer=tokenizer, cache_dir=tmp_path / "cache")
        assert found["input_ids"][:] == expected["input_ids"][:]


def test_their_package_reads_what_we_write(cells, archive):
    store = reopened(archive)
    assert store.number_of_rows() == 30
    assert store.number_of_variables() == [60]
    dense = cells.X.toarray()
    for row in range(30):
        (values, columns), (names, *_), _ = store.get_row(row, return_var_features=True)
        found = np.zeros(60)
        found[columns] = values
        assert np.array_equal(found, dense[row])
        assert list(names) == list(cells.var_names)
    values, _ = store.obs_features()[3]
    assert values == ["cell3", "B"]


def test_cells_ids_and_columns_survive_the_way_there_and_back(cells, archive):
    source = open_cells(archive)
    assert source.cell_ids == cells.obs_names.tolist()
    assert source.read_obs(["cell_type"])["cell_type"].tolist() == cells.obs["cell_type"].astype(str).tolist()
    assert np.array_equal(read_all(source), cells.X.toarray())


def test_large_counts_are_whole(genes, tmp_path):
    cells = make_cells(genes, 5)
    counts = cells.X.toarray().astype(np.float64)
    counts[2, 3] = 2**24 + 1
    cells.X = sp.csr_matrix(counts)
    assert read_all(open_cells(write_scdl(open_cells(cells), tmp_path / "a")))[2, 3] == 2**24 + 1


def test_an_empty_cell_stays_empty(genes, tmp_path):
    cells = make_cells(genes, 5)
    counts = cells.X.toarray()
    counts[[0, 2, 4]] = 0
    cells.X = sp.csr_matrix(counts)
    assert np.array_equal(read_all(open_cells(write_scdl(open_cells(cells), tmp_path / "a"))), counts)


@pytest.mark.parametrize("dtype", ["float64", "float16", "uint8", "uint16", "uint64"])
def test_a_cast_that_the_header_does_not_know_of_is_refused(archive, dtype):
    """The example of bionemo-scdl's own README; 0.1.3 reads back other numbers without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reopened(archive).cast_data_to_dtype(dtype)
    with pytest.raises(CellFileError, match="It was cast or joined after it was opened again"):
        open_cells(archive)


def test_a_cast_to_integers_of_the_same_size_is_refused(archive):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reopened(archive).cast_data_to_dtype("uint32")
    with pytest.raises(NotRawCountsError, match="An archive that was cast"):
        open_cells(archive)


def test_a_cast_from_integers_of_the_same_size_is_refused(cells, tmp_path):
    """Bits of floating point read as integers are whole numbers; nothing else would see that they are not counts."""
    source = write(cells, tmp_path / "cells.h5ad")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scdl_dataset(data_path=str(tmp_path / "a"), h5ad_path=str(source), use_X_not_raw=True, data_dtype="uint32")
        assert np.array_equal(read_all(open_cells(tmp_path / "a")), cells.X.toarray())
        reopened(tmp_path / "a").cast_data_to_dtype("float32")
    with pytest.raises(CellFileError, match="whose bits are the float32 number"):
        open_cells(tmp_path / "a")


def test_joined_archives_that_cannot_be_read_are_refused(genes, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        files.write_scdl(make_cells(genes, 40, seed=seed), tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reopened(tmp_path / "a").concat([reopened(tmp_path / "b")], output_path=str(tmp_path / "joined"))
    joined = tmp_path / "joined" if (tmp_path / "joined").is_dir() else tmp_path / "a"
    with pytest.raises(CellFileError, match=r"written? it anew|write it anew|sets of genes"):
        open_cells(joined)


def test_archives_of_other_genes_joined_are_refused(genes, tmp_path):
    first, second = make_cells(genes, 9), make_cells(genes[:50], 9)
    store = scdl_dataset(data_path=str(tmp_path / "a"), num_elements=2, num_rows=2)
    store.data[:], store.col_index[:], store.row_index[:] = [1, 2], [0, 1], [0, 1, 2]
    for cells in (first, second):
        store.var_features().append_features(n_obs=1, features={"feature_id": np.array(cells.var_names, dtype=object)})
    store.obs_features().append_features(features={"cell_id": np.array(["x", "y"], dtype=object)})
    store.save()
    with pytest.raises(CellFileError, match="joins 2 sets of genes"):
        open_cells(tmp_path / "a")


@pytest.mark.parametrize("part", ["data.npy", "row_ptr.npy", "col_ptr.npy"])
def test_a_part_that_was_cut_off_is_refused(archive, part):
    content = (archive / part).read_bytes()
    (archive / part).write_bytes(content[: len(content) // 2])
    with pytest.raises(CellFileError):
        open_cells(archive)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_archive_that_cannot_be_written_is_refused_with_the_reason(archive):
    for part in archive.iterdir():
        part.chmod(0o444)
    with pytest.raises(CellFileError, match="opens archives for writing"):
        open_cells(archive)


def test_a_layer_is_refused(archive):
    with pytest.raises(ColumnNotFoundError, match="no layer 'counts'"):
        open_cells(archive, counts_layer="counts")


def test_nothing_is_overwritten_or_left_half_written(cells, archive, tmp_path, monkeypatch):
    with pytest.raises(OutputExistsError):
        write_scdl(open_cells(cells), archive)
    empty = anndata.AnnData(sp.csr_matrix((3, 60), dtype=np.float32), var=cells.var)
    with pytest.raises(CellFileError, match="holds no counts"):
        write_scdl(open_cells(empty), tmp_path / "empty")
    assert [p.name for p in tmp_path.iterdir()] == ["archive"]


def test_without_the_package_the_remedy_is_named(archive, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("bionemo"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"geneformer-hf\[scdl\]"):
        open_cells(archive)


def test_the_commands_take_archives_like_any_file(cells, archive, model_folder, tmp_path, capsys):
    assert main(["info", str(archive)]) == 0
    assert "Cells: 30 x 60 genes" in capsys.readouterr().out
    assert main(["tokenize", str(archive), "--model", str(model_folder), "--output", str(tmp_path / "tokens")]) == 0
    assert datasets.load_from_disk(str(tmp_path / "tokens"))["cell_id"][:] == cells.obs_names.tolist()
    shutil.copytree(archive, tmp_path / "many" / "one")
    assert main(["tokenize", str(tmp_path / "many"), "--model", str(model_folder), "--output", str(tmp_path / "folder")]) == 0
    source = write(cells, tmp_path / "cells.h5ad")
    assert main(["export", str(source), str(tmp_path / "made"), "--format", "scdl"]) == 0
    assert np.array_equal(read_all(open_cells(tmp_path / "made")), cells.X.toarray())
    assert main(["embed", str(archive), "--model", str(model_folder), "--output", str(tmp_path / "out.h5ad")]) == 0
    assert anndata.read_h5ad(tmp_path / "out.h5ad").obsm["X_geneformer"].shape == (30, 16)
