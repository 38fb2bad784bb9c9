"""Every kind of file gives the same cells, through the same checks, from any row on."""

import json

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from geneformer_hf import load_cells
from geneformer_hf.cli.main import main
from geneformer_hf.data import matrices, tenx, transpose
from geneformer_hf.data.files import content_hash, find_files
from geneformer_hf.data.readers import open_cells
from geneformer_hf.data.scdl import write_scdl
from geneformer_hf.errors import CellFileError, ColumnNotFoundError, NotRawCountsError
from tests.conftest import make_cells, write
from tests.formats import files
from tests.unit.test_readers import read_all

KINDS = {
    "h5ad": lambda c, p: write(c, p / "a.h5ad"),
    "zarr2": lambda c, p: files.write_zarr(c, p / "a.zarr", 2),
    "zarr3": lambda c, p: files.write_zarr(c, p / "a.zarr", 3),
    "zarr_dense": lambda c, p: files.write_zarr(as_matrix(c, c.X.toarray()), p / "a.zarr", 3),
    "zarr_csc": lambda c, p: files.write_zarr(as_matrix(c, sp.csc_matrix(c.X)), p / "a.zarr", 2),
    "loom": lambda c, p: files.write_loom(c, p / "a.loom"),
    "loom_int": lambda c, p: files.write_loom(c, p / "a.loom", dtype="u2", ensembl="ensembl_id"),
    "tenx_v3": lambda c, p: files.write_tenx_h5(c, p / "a.h5"),
    "tenx_v2": lambda c, p: files.write_tenx_h5(c, p / "a.h5", version=2),
    "tenx_64_bit": lambda c, p: files.write_tenx_h5(c, p / "a.h5", int64=True),
    "tenx_antibodies": lambda c, p: files.write_tenx_h5(c, p / "a.h5", antibodies=3),
    "folder": lambda c, p: files.write_tenx_folder(c, p / "a"),
    "folder_v2": lambda c, p: files.write_tenx_folder(c, p / "a", zipped=False, version=2),
    "folder_shuffled": lambda c, p: files.write_tenx_folder(c, p / "a", shuffled=True),
    "folder_mmwrite": lambda c, p: files.write_mmwrite(c, p / "a"),
    "scdl": lambda c, p: write_scdl(open_cells(c), p / "a"),
    "scdl_converter": lambda c, p: files.write_scdl(c, p / "a"),
    "legacy_0.6": lambda c, p: files.write_legacy(c, p / "a.h5ad"),
    "legacy_0.6_csc": lambda c, p: files.write_legacy(c, p / "a.h5ad", layout="csc"),
    "legacy_0.6_dense": lambda c, p: files.write_legacy(c, p / "a.h5ad", layout="dense"),
    "legacy_0.6_raw": lambda c, p: files.write_legacy(as_matrix(c, np.log1p(c.X)), p / "a.h5ad", raw=c),
    "legacy_0.7": lambda c, p: files.write_07(c, p / "a.h5ad"),
    "cellxgene": lambda c, p: files.write_cellxgene(c, p / "a.h5ad"),
    "int64": lambda c, p: write(as_matrix(c, sp.csr_matrix(c.X).astype(np.int64)), p / "a.h5ad"),
    "float64": lambda c, p: write(as_matrix(c, sp.csr_matrix(c.X).astype(np.float64)), p / "a.h5ad"),
    "64_bit_indices": lambda c, p: write(as_matrix(c, wide(c.X)), p / "a.h5ad"),
}
ONLY_IDS = {k for k in KINDS if k.startswith(("tenx", "folder"))}


def as_matrix(cells, x):
    out = cells.copy()
    out.X = x
    return out


def wide(x):
    x = sp.csr_matrix(x)
    x.indices, x.indptr = x.indices.astype(np.int64), x.indptr.astype(np.int64)
    return x


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(matrices, "BLOCK_VALUES", 100)
    monkeypatch.setattr(matrices, "BLOCK_CELLS", 7)
    monkeypatch.setattr(transpose, "CHUNK_VALUES", 64)
    monkeypatch.setattr(tenx, "CHUNK_VALUES", 64)


@pytest.fixture
def many(genes):
    cells = make_cells(genes, 40)
    cells.obs["donor"] = pd.Categorical([["d1", "d2", None][i % 3] for i in range(40)])
    cells.obs["age"] = np.arange(40) * 1.5
    return cells


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_cells(kind, many, tmp_path):
    source = open_cells(KINDS[kind](many, tmp_path))
    expected = many.X.toarray()
    assert source.gene_names == list(many.var_names)
    assert source.cell_ids == list(many.obs_names)
    assert np.array_equal(read_all(source), expected)
    assert np.array_equal(read_all(source, 13, 29), expected[13:29]), "from the middle, on a second pass"
    assert np.array_equal(read_all(source, 39, 40), expected[39:])


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ONLY_IDS])
def test_obs_comes_along(kind, many, tmp_path):
    obs = open_cells(KINDS[kind](many, tmp_path)).read_obs(["cell_type", "donor", "age"], 3, 9)
    assert obs["cell_type"].astype(str).tolist() == many.obs["cell_type"].astype(str).tolist()[3:9]
    assert obs["age"].tolist() == many.obs["age"].tolist()[3:9]
    expected = many.obs["donor"].astype(object).where(many.obs["donor"].notna(), "nan" if "loom" in kind else None).tolist()[3:9]
    assert [None if pd.isna(v) else v for v in obs["donor"].astype(object)] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_tokens(kind, many, tmp_path, tokenizer):
    expected = load_cells(many, tokenizer=tokenizer)
    tokens = load_cells(KINDS[kind](many, tmp_path), tokenizer=tokenizer, cache_dir=tmp_path / "cache")
    assert tokens["input_ids"][:] == expected["input_ids"][:]
    assert tokens["cell_id"][:] == expected["cell_id"][:]


@pytest.mark.parametrize("kind", ["legacy_0.6", "legacy_0.6_csc", "legacy_0.6_dense", "legacy_0.6_raw", "legacy_0.7"])
@pytest.mark.filterwarnings("ignore")
def test_the_legacy_files_are_files_that_anndata_reads_the_same(kind, many, tmp_path):
    """Our hand-written old files are what anndata itself takes for such files."""
    path = KINDS[kind](many, tmp_path)
    theirs, ours = anndata.read_h5ad(path), open_cells(path)
    matrix = theirs.raw.X if ours.counts == "raw.X" else theirs.X
    assert np.array_equal(read_all(ours), matrix.toarray() if sp.issparse(matrix) else matrix)
    assert ours.obs_columns == list(theirs.obs.columns)
    obs = ours.read_obs(ours.obs_columns)
    for name in ours.obs_columns:
        assert [str(v) for v in obs[name]] == [str(v) for v in theirs.obs[name]], name


def test_counts_of_antibodies_are_left_out_of_genes_and_totals(tmp_path, cells, tokenizer):
    """SYM0 is the name of an antibody here and the symbol of a gene in the table."""
    source = open_cells(files.write_tenx_h5(cells, tmp_path / "a.h5", antibodies=3))
    assert (len(source.gene_names), source.n_columns) == (60, 63)
    assert source.match_genes(tokenizer.gene_table).report.n_mapped == 60
    assert np.array_equal(np.concatenate([source.totals(block) for block in source.iter_blocks()]), np.asarray(cells.X.sum(1)).ravel())


def test_cellxgene_needs_no_option_and_reads_genes_that_x_lacks(tmp_path, cells):
    source = open_cells(files.write_cellxgene(cells, tmp_path / "a.h5ad"))
    assert (source.counts, source.gene_names_from) == ("raw.X", "index of var")
    assert (read_all(source)[:, ::7] > 0).any()


def test_files_with_their_own_column_order_in_one_dataset(tmp_path, genes, tokenizer):
    first, second = make_cells(genes, 6, seed=1), make_cells(genes, 6, seed=2)
    second.obs_names = [f"other{i}" for i in range(6)]
    turned = second[:, ::-1].copy()
    together = [write(first, tmp_path / "a.h5ad"), files.write_loom(turned, tmp_path / "b.loom")]
    dataset = load_cells(together, tokenizer=tokenizer, obs="none")
    assert dataset["cell_id"][:] == [*first.obs_names, *second.obs_names]
    expected = load_cells(turned, tokenizer=tokenizer)["input_ids"][:]
    assert dataset["input_ids"][6:] == expected


def test_a_loom_layer(tmp_path, cells):
    path = files.write_loom(as_matrix(cells, sp.csr_matrix(np.log1p(cells.X.toarray()))), tmp_path / "a.loom", layers={"spliced": cells.X.toarray()})
    with pytest.raises(NotRawCountsError, match=r"X looks log-normalised .* other layers: spliced"):
        open_cells(path)
    assert np.array_equal(read_all(open_cells(path, counts_layer="spliced")), cells.X.toarray())


def test_two_genomes_in_one_file_are_refused(tmp_path, cells):
    path = files.write_tenx_h5(cells, tmp_path / "a.h5", version=2)
    with h5py.File(path, "r+") as file:
        file.copy("GRCh38", "mm10")
    with pytest.raises(CellFileError, match=r"holds 2 genomes \(GRCh38, mm10\)"):
        open_cells(path)


DAMAGE = {
    "no barcodes": (lambda p: (p / "barcodes.tsv.gz").unlink(), r"has no barcodes\.tsv"),
    "no features": (lambda p: (p / "features.tsv.gz").unlink(), r"has no features\.tsv or genes\.tsv"),
    "cut text": (lambda p: (p / "matrix.mtx.gz").write_bytes((p / "matrix.mtx.gz").read_bytes()[:-200]), "cut off"),
    "other matrix": (lambda p: (p / "barcodes.tsv.gz").write_bytes(b"AAA\nCCC\n"), "cannot be read|2 lines"),
    "not a matrix": (lambda p: (p / "matrix.mtx.gz").write_bytes(b"hello"), "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_says_what_is_wrong(damage, tmp_path, cells, tokenizer):
    change, words = DAMAGE[damage]
    path = files.write_tenx_folder(cells, tmp_path / "a")
    change(path)
    with pytest.raises(CellFileError, match=words):
        load_cells(path, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("61 1 3", "points outside its 60 genes"),
        ("1 1 x", "broke off while it was read"),
        ("1 1 -3", "negative"),
        ("1 1 2.5", "not whole numbers"),
        ("", "header says"),
    ],
)
def test_a_wrong_line_of_a_matrix(line, words, tmp_path, cells):
    path = files.write_tenx_folder(cells, tmp_path / "a", zipped=False)
    lines = (path / "matrix.mtx").read_text().splitlines()
    lines[20:21] = [line] if line else []
    (path / "matrix.mtx").write_text("\n".join(lines) + "\n")
    with pytest.raises((CellFileError, NotRawCountsError), match=words):
        read_all(open_cells(path))


def test_a_zarr_store_without_one_of_its_chunks_is_refused(tmp_path, cells):
    """zarr reads a missing chunk as zeros without a word."""
    path = files.write_zarr(cells, tmp_path / "a.zarr", 3)
    next(p for p in (path / "X" / "data").rglob("*") if p.is_file() and p.name != "zarr.json").unlink()
    with pytest.raises(CellFileError, match="1 of 1 chunks of its data are missing"):
        open_cells(path)


def test_a_zarr_store_with_a_cut_chunk_is_refused(tmp_path, cells, model_folder, capsys):
    path = files.write_zarr(cells, tmp_path / "a.zarr", 2)
    chunk = next(p for p in (path / "X" / "indices").rglob("*") if p.is_file() and not p.name.startswith("."))
    chunk.write_bytes(chunk.read_bytes()[:20])
    assert main(["tokenize", str(path), "--model", str(model_folder), "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "broke off while it was read" in error
    assert "Traceback" not in error


def test_a_folder_of_several_kinds_is_refused_and_one_kind_is_sorted(tmp_path, cells):
    folder = tmp_path / "many"
    folder.mkdir()
    write(cells, folder / "b.h5ad")
    write(cells, folder / "a.h5ad")
    assert [p.name for p in find_files(folder)] == ["a.h5ad", "b.h5ad"]
    files.write_tenx_folder(cells, folder / "sample")
    with pytest.raises(CellFileError, match=r"several kinds \(2 \.h5ad, 1 10x folder\), so the same cells"):
        find_files(folder)


def test_a_folder_of_tenx_folders(tmp_path, cells, tokenizer):
    for name in ("s2", "s1"):
        files.write_tenx_folder(cells, tmp_path / name)
    dataset = load_cells(tmp_path, tokenizer=tokenizer, cache_dir=tmp_path / "cache")
    report = json.loads(dataset.info.description)
    assert [f["file"].rsplit("/", 1)[1] for f in report["files"]] == ["s1", "s2"]
    assert len(dataset) == 60


def test_the_hash_of_a_folder_follows_its_content(tmp_path, cells):
    a, b = files.write_tenx_folder(cells, tmp_path / "a", zipped=False), files.write_tenx_folder(cells, tmp_path / "b", zipped=False)
    assert content_hash(a) == content_hash(b)
    (b / "barcodes.tsv").write_text((b / "barcodes.tsv").read_text().replace("cell3\n", "cell333\n"))
    assert content_hash(a) != content_hash(b)


def test_options_a_kind_does_not_have(tmp_path, cells):
    with pytest.raises(ColumnNotFoundError, match="a 10x matrix has no layer 'spliced'"):
        open_cells(files.write_tenx_h5(cells, tmp_path / "a.h5"), counts_layer="spliced")


@pytest.mark.parametrize("kind", ["zarr3", "loom", "tenx_v3", "folder", "legacy_0.6"])
def test_info_says_what_a_file_is(kind, cells, tmp_path, capsys):
    assert main(["info", str(KINDS[kind](cells, tmp_path))]) == 0
    assert "Cells: 30 x 60 genes" in capsys.readouterr().out


@pytest.mark.shared
def test_the_published_folder_and_file_of_pbmc3k_hold_the_same_counts(shared):
    folder = open_cells(shared / "data/pbmc3k/filtered_gene_bc_matrices/hg19")
    file = open_cells(shared / "data/pbmc3k/pbmc3k_raw_annotated.h5ad")
    assert folder.n_cells == file.n_cells == 2700
    place = {name: i for i, name in enumerate(folder.gene_names)}
    order = [place[name] for name in file.gene_names]
    ours = sp.vstack([b.counts_ng for b in folder.iter_blocks()], format="csr")
    theirs = sp.vstack([b.counts_ng for b in file.iter_blocks()], format="csr")
    row = {cell.split("-")[0]: i for i, cell in enumerate(folder.cell_ids)}
    ours = ours[[row[cell.split("-")[0]] for cell in file.cell_ids]][:, order]
    assert abs(ours - theirs).sum() == 0
