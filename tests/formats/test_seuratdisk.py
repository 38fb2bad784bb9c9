"""Factors as SeuratDisk writes them: codes in obs, levels in obs/__categories, nothing that connects the two."""

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest

from geneformer_hf import load_cells
from geneformer_hf.data.readers import open_cells
from geneformer_hf.errors import CellFileError
from tests.conftest import make_cells, write


@pytest.fixture
def path(genes, tmp_path):
    cells = make_cells(genes, 6, cell_type=["B", "T", "NK"] * 2, age=np.arange(6))
    found = write(cells, tmp_path / "cells.h5ad")
    with h5py.File(found, "r+") as file:
        del file["obs/cell_type"]
        file["obs/cell_type"] = np.array([0, 2, 1] * 2, dtype="i4")
        file.create_dataset("obs/__categories/cell_type", data=["B", "NK", "T"], dtype=h5py.string_dtype())
    return found


def test_levels_take_the_place_of_codes(path, tokenizer, tmp_path):
    source = open_cells(path)
    assert source.read_obs(["cell_type"])["cell_type"].tolist() == ["B", "T", "NK"] * 2
    assert source.read_obs(["cell_type"], 1, 3)["cell_type"].tolist() == ["T", "NK"]
    found = load_cells(path, tokenizer=tokenizer, cache_dir=tmp_path)
    assert found.features["cell_type"].names == ["B", "NK", "T"]
    assert found["age"][:] == list(range(6))


@pytest.mark.parametrize("missing", [-1, -(2**31)])
def test_missing_values_stay_missing(missing, path):
    with h5py.File(path, "r+") as file:
        file["obs/cell_type"][2] = missing
    assert open_cells(path).read_obs(["cell_type"])["cell_type"].isna().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("code", [3, 7, -2])
def test_codes_beyond_the_levels_are_refused(code, path):
    with h5py.File(path, "r+") as file:
        file["obs/cell_type"][2] = code
    with pytest.raises(CellFileError, match=r"obs/cell_type holds the codes .* for 3 levels of a factor; expected 0 to 2"):
        open_cells(path).read_obs(["cell_type"])


def test_a_column_that_is_named_as_a_factor_but_holds_text_stays_text(path):
    with h5py.File(path, "r+") as file:
        del file["obs/cell_type"]
        file.create_dataset("obs/cell_type", data=list("abcdef"), dtype=h5py.string_dtype())
    assert open_cells(path).read_obs(["cell_type"])["cell_type"].tolist() == list("abcdef")


def test_what_is_written_of_such_a_file_holds_the_levels(path, tmp_path, model_folder):
    from geneformer_hf.data.writing import write_h5ad

    write_h5ad(open_cells(path), tmp_path / "out.h5ad")
    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert isinstance(written.obs["cell_type"].dtype, pd.CategoricalDtype)
    assert written.obs["cell_type"].tolist() == ["B", "T", "NK"] * 2


@pytest.mark.parametrize(("dtype", "missing"), [("f8", np.nan), ("f4", -1), ("u1", 255), ("u4", 2**32 - 1)])
def test_codes_of_other_types(dtype, missing, path):
    with h5py.File(path, "r+") as file:
        del file["obs/cell_type"]
        file["obs/cell_type"] = np.array([0, 2, missing] * 2, dtype=dtype)
    found = open_cells(path).read_obs(["cell_type"])["cell_type"]
    assert [str(v) for v in found] == ["B", "T", "nan"] * 2


def test_numbers_that_share_the_name_of_levels_stay_numbers(path):
    with h5py.File(path, "r+") as file:
        del file["obs/cell_type"]
        file["obs/cell_type"] = np.array([0.5, 2, 1] * 2)
    assert open_cells(path).read_obs(["cell_type"])["cell_type"].tolist() == [0.5, 2, 1] * 2
