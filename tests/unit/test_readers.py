import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from geneformer_hf.data import matrices, transpose
from geneformer_hf.data.readers import open_cells
from geneformer_hf.errors import CellFileError, ColumnNotFoundError
from tests.conftest import make_cells, random_counts, with_row, write


def read_all(source, start=0, stop=None) -> np.ndarray:
    blocks = [block.counts_ng.toarray() for block in source.iter_blocks(start, stop)]
    return np.concatenate(blocks) if blocks else np.empty((0, len(source.gene_names)))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(matrices, "BLOCK_VALUES", 100)
    monkeypatch.setattr(matrices, "BLOCK_CELLS", 7)
    monkeypatch.setattr(transpose, "CHUNK_VALUES", 64)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("layout", ["csr", "csc", "dense", "gzip"])
@pytest.mark.parametrize(("start", "stop"), [(0, None), (3, 17), (29, 30), (5, 5)])
def test_every_layout_gives_every_cell_once(layout, start, stop, tmp_path, cells):
    source = open_cells(write(cells, tmp_path / "a.h5ad", layout))
    assert source.layout == ("csr" if layout == "gzip" else layout)
    assert np.array_equal(read_all(source, start, stop), cells.X.toarray()[start:stop])
    assert np.array_equal(read_all(source, start, stop), cells.X.toarray()[start:stop]), "a second pass"


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("convert", [lambda x: x, sp.csc_matrix, lambda x: x.toarray(), sp.csr_array], ids=["csr", "csc", "dense", "array"])
def test_cells_in_memory_give_the_same(convert, cells):
    expected = cells.X.toarray()
    cells.X = convert(cells.X)
    assert np.array_equal(read_all(open_cells(cells)), expected)
    assert np.array_equal(read_all(open_cells(cells[4:11])), expected[4:11]), "a view"


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.int64, np.uint16])
def test_other_number_types(dtype, tmp_path, cells):
    cells.X = sp.csr_matrix(cells.X.astype(dtype))
    assert np.array_equal(read_all(open_cells(write(cells, tmp_path / "a.h5ad"))), cells.X.toarray())


def test_a_csc_file_with_an_entry_stored_twice_is_summed(tmp_path, genes):
    counts = sp.csc_matrix((np.array([1.0, 2.0, 4.0], dtype=np.float32), np.array([0, 0, 1]), np.array([0, 3, *([3] * 59)])), shape=(2, 60))
    cells = anndata.AnnData(counts, pd.DataFrame(index=["a", "b"]), pd.DataFrame(index=genes))
    cells.write_h5ad(tmp_path / "a.h5ad")
    assert read_all(open_cells(tmp_path / "a.h5ad"))[:, 0].tolist() == [3, 4]


def test_counts_in_raw_bring_their_own_genes(tmp_path, genes):
    cells = make_cells(genes, 9)
    shown = cells[:, 10:30].copy()
    shown.raw = cells
    shown.X = np.log1p(shown.X.toarray())
    for source in (open_cells(shown), open_cells(write(shown, tmp_path / "a.h5ad", "as it is"))):
        assert source.counts == "raw.X"
        assert source.gene_names == genes
        assert np.array_equal(read_all(source), cells.X.toarray())


def test_counts_in_a_layer(tmp_path, cells):
    expected = cells.X.toarray()
    cells.layers["counts"] = cells.X.copy()
    cells.layers["umi"] = cells.X * 2
    cells.X = np.log1p(cells.X.toarray())
    path = write(cells, tmp_path / "a.h5ad", "as it is")
    assert open_cells(path).counts == "counts"
    assert np.array_equal(read_all(open_cells(path)), expected)
    assert np.array_equal(read_all(open_cells(path, counts_layer="umi")), expected * 2)


def obs_frame(n: int = 12) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "text": [f"ü{i}" for i in range(n)],
            "category": pd.Categorical([["B", "T", None][i % 3] for i in range(n)], categories=["T", "B", "unused"]),
            "ordered": pd.Categorical(["lo", "hi"] * (n // 2), categories=["lo", "hi"], ordered=True),
            "whole": np.arange(n),
            "number": np.linspace(0, 1, n, dtype=np.float32),
            "flag": [True, False] * (n // 2),
            "nullable": pd.array([1, None] * (n // 2), dtype="Int64"),
            "maybe": pd.array([True, None] * (n // 2), dtype="boolean"),
        },
        index=[f"cell-{i}" for i in range(n)],
    )


@pytest.mark.parametrize(("start", "stop"), [(0, None), (3, 8)])
def test_obs_of_a_file_reads_like_anndata_reads_it(start, stop, tmp_path, genes):
    frame = obs_frame()
    anndata.AnnData(random_counts(12, 60), frame, pd.DataFrame(index=genes)).write_h5ad(tmp_path / "a.h5ad")
    expected = anndata.read_h5ad(tmp_path / "a.h5ad").obs[start:stop]
    source = open_cells(tmp_path / "a.h5ad")
    got = source.read_obs(source.obs_columns, start, stop)
    assert source.obs_columns == list(frame.columns)
    pd.testing.assert_frame_equal(got, expected, check_index_type=False, check_dtype=False)
    assert got["category"].cat.categories.tolist() == expected["category"].cat.categories.tolist()
    assert got["ordered"].cat.ordered


def test_a_missing_obs_column_is_named(h5ad):
    with pytest.raises(ColumnNotFoundError, match=r"obs has no column 'donor'. Found: cell_type"):
        open_cells(h5ad).read_obs(["donor"])


@pytest.mark.parametrize(
    ("values", "passing"),
    [
        ([1, 0, 1], [True, False, True]),
        ([True, False, True], [True, False, True]),
        ([1.0, 0.0, 1.0], [True, False, True]),
        (["1", "0", "1"], [True, False, True]),
    ],
    ids=["int", "bool", "float", "text"],
)
def test_filter_pass_is_zero_or_one(values, passing, genes):
    assert open_cells(make_cells(genes, 3, filter_pass=values)).passing.tolist() == passing


@pytest.mark.parametrize("values", [[1, 2, 0], ["yes", "no", "yes"], [1.0, np.nan, 0.0]])
def test_other_values_of_filter_pass_are_refused(values, genes):
    with pytest.raises(CellFileError, match=r"obs\['filter_pass'\] holds [123] values that are neither 0 nor 1"):
        _ = open_cells(make_cells(genes, 3, filter_pass=values)).passing


def test_totals_come_from_obs_only_where_they_can_be_true(genes, caplog):
    cells = make_cells(genes, 5)
    sums = cells.X.sum(axis=1).A1 if hasattr(cells.X.sum(axis=1), "A1") else np.asarray(cells.X.sum(axis=1)).ravel()

    def totals(source):
        return np.concatenate([source.totals(block) for block in source.iter_blocks()]).tolist()

    assert (open_cells(cells).totals_from, totals(open_cells(cells))) == (None, sums.tolist())
    cells.obs["n_counts"] = sums + 100
    assert (open_cells(cells).totals_from, totals(open_cells(cells))) == ("n_counts", (sums + 100).tolist())
    cells.obs["n_counts"] = sums - 1
    assert (open_cells(cells).totals_from, totals(open_cells(cells))) == (None, sums.tolist())
    assert "below the counts of 5 cells" in caplog.text
    with pytest.raises(CellFileError, match="below the counts of 5 of 5 cells"):
        _ = open_cells(cells, total_counts="n_counts").totals_from
    with pytest.raises(ColumnNotFoundError, match="no column 'mine'"):
        _ = open_cells(cells, total_counts="mine").totals_from


def test_a_bad_value_far_down_is_found_and_placed(tmp_path, cells, monkeypatch):
    monkeypatch.setattr(matrices, "SAMPLE_VALUES", 50)
    monkeypatch.setattr(matrices, "BLOCK_CELLS", 10)
    cells.X = with_row(cells.X, 25, 0.5)
    source = open_cells(write(cells, tmp_path / "a.h5ad"))
    with pytest.raises(ValueError, match=r"a\.h5ad: X \(cells 20 to 29\) looks (log-)?normalised"):
        read_all(source)


def damage(path, how):
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("cell,gene\n1,2\n")
    elif how == "lfs":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    elif how == "gone":
        path.unlink()
    elif how == "other_hdf5":
        with h5py.File(path, "w") as file:
            file["x"] = 1
    elif how == "index":
        with h5py.File(path, "r+") as file:
            file["X/indices"][3] = 10_000
    elif how == "shape":
        with h5py.File(path, "r+") as file:
            file["X"].attrs["shape"] = [5, 60]
    return path


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("truncated", "cannot be opened.*cut off"),
        ("empty", r"is empty \(0 bytes\)"),
        ("text", "is not an HDF5 file"),
        ("lfs", "is a git-lfs pointer"),
        ("gone", "does not exist"),
        ("other_hdf5", r"an HDF5 file, but neither .h5ad nor .loom nor 10x .h5 \(it holds: x\)"),
        ("index", "X: points outside its 60 genes"),
        ("shape", r"X has shape \(5, 60\), but obs has 30 rows and var 60"),
    ],
)
def test_a_damaged_file_says_what_is_wrong_with_it(how, words, h5ad):
    with pytest.raises(CellFileError, match=words):
        read_all(open_cells(damage(h5ad, how)))


def test_something_else_is_refused(tmp_path):
    with pytest.raises(CellFileError, match="is a folder"):
        open_cells(tmp_path)
    with pytest.raises(CellFileError, match="Expected an AnnData or the path"):
        open_cells(5)
