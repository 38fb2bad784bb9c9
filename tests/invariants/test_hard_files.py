"""Hard files and hard orders of events, each of which once gave a wrong answer, lost something, or ended in a traceback."""

import json
import tempfile

import anndata
import datasets
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from geneformer_hf import GeneformerTokenizer, GeneTable, QualityRules, assess_quality, fit_gene_table, load_cells, stream_tokens, tokenize_corpus
from geneformer_hf.cli.main import main
from geneformer_hf.cli.medians import read_biotypes
from geneformer_hf.cli.qc import Qc, output_names
from geneformer_hf.data.readers import open_cells
from geneformer_hf.errors import CellFileError, SettingError
from geneformer_hf.gene_ids import human_genes
from geneformer_hf.outputs import MARK, unfinished
from tests.conftest import make_cells, with_row, write
from tests.faults.test_bad_input import check_refused
from tests.faults.test_corpus import bad_in_the_middle
from tests.formats import files as formats
from tests.unit.test_readers import read_all

QUICK = QualityRules(doublets=False)


def test_another_tokenizer_or_file_into_the_same_output(tmp_path, genes, tokenizer, table):
    other = GeneformerTokenizer(gene_table=GeneTable(genes, table.token_ids, table.medians[::-1]), cls_token="<cls>", eos_token="<eos>", model_max_length=64)
    first, second = write(make_cells(genes, 20, seed=1), tmp_path / "1.h5ad"), write(make_cells(genes, 20, seed=2), tmp_path / "2.h5ad")
    for path, used in ((first, tokenizer), (first, other), (second, other)):
        written = tokenize_corpus(path, tmp_path / "out", tokenizer=used, overwrite=True)["input_ids"][:]
        assert written == load_cells(path, tokenizer=used, cache_dir=tmp_path / "cache")["input_ids"][:]


@pytest.mark.slow
def test_a_cluster_that_outlives_a_run_remembers_nothing_of_it(tmp_path, genes, tokenizer):
    import distributed

    first, second = write(make_cells(genes, 20, seed=1), tmp_path / "1.h5ad"), write(make_cells(genes, 20, seed=2), tmp_path / "2.h5ad")
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster:
        for path in (first, second):
            written = tokenize_corpus(path, tmp_path / "out", tokenizer=tokenizer, dask=cluster.scheduler_address, overwrite=True)["input_ids"][:]
            assert written == load_cells(path, tokenizer=tokenizer, cache_dir=tmp_path / "cache")["input_ids"][:]


def test_datasets_whose_classes_have_other_numbers_do_not_stream_together(tmp_path, genes, tokenizer):
    for name, kinds in (("a", ["B", "T"]), ("b", ["NK", "T"])):
        cells = make_cells(genes, 4, cell_type=pd.Categorical(kinds * 2))
        tokenize_corpus(write(cells, tmp_path / f"{name}.h5ad"), tmp_path / name, tokenizer=tokenizer)
    with pytest.raises(CellFileError, match=r"other columns than .*: cell_type differ in type, in classes"):
        stream_tokens([tmp_path / "a", tmp_path / "b"])


def chunked_zarr(cells, path, name, *, chunk=50, shards=None):
    formats.write_zarr(cells, path, 3)
    group = zarr.open_group(path, mode="r+", use_consolidated=False)["X"]
    values = group[name][:]
    del group[name]
    group.create_array(name, shape=values.shape, dtype=values.dtype, chunks=(chunk,), shards=shards)[:] = values
    return path


@pytest.mark.parametrize(("name", "number"), [("data", 2), ("indices", 2), ("indptr", 0), ("indptr", 1), ("indptr", 3)])
def test_a_zarr_store_that_lacks_a_chunk_of_anything(name, number, tmp_path, genes):
    path = chunked_zarr(make_cells(genes, 200), tmp_path / "a.zarr", name)
    (path / "X" / name / "c" / str(number)).unlink()
    with pytest.raises(CellFileError, match=r"chunks of its|does not fit its entries|pointers"):
        open_cells(path)


def test_zarr_chunks_that_are_rightly_not_there(tmp_path, genes):
    """zarr does not write a chunk of zeros: empty cells at the beginning, cells with the first gene alone."""
    x = make_cells(genes, 200).X.toarray()
    x[:80], x[120:190] = 0, 0
    x[120:190, 0] = 3
    cells = make_cells(genes, 200)
    cells.X = sp.csr_matrix(x)
    for name in ("indices", "indptr"):
        path = chunked_zarr(cells, tmp_path / f"{name}.zarr", name, chunk=20)
        assert np.array_equal(read_all(open_cells(path)), x)


def test_zarr_in_shards(tmp_path, genes):
    cells = make_cells(genes, 200)
    assert np.array_equal(read_all(open_cells(chunked_zarr(cells, tmp_path / "a.zarr", "data", shards=(350,)))), cells.X.toarray())


def test_outputs_of_files_with_one_name_are_all_there(tmp_path, genes):
    assert output_names(["x/a.h5ad", "y/b.loom"]) == ["a.h5ad", "b.h5ad"]
    names = output_names(["x/a.h5ad", "y/a.h5ad", "z/0001-a.h5ad"])
    assert len(set(names)) == 3
    paths = []
    for i, folder in enumerate("xyz"):
        (tmp_path / folder).mkdir()
        paths.append(str(write(make_cells(genes, 5, seed=i), tmp_path / folder / ("0001-a.h5ad" if folder == "z" else "a.h5ad"))))
    assert main(["qc", *paths, "--output", str(tmp_path / "out"), "--no-doublets"]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [MARK, "0000-a.h5ad", "0001-a.h5ad", "0002-0001-a.h5ad", "qc.csv", "qc.png"]


def test_qc_stopped_while_it_writes_leaves_nothing_of_it_in_the_next_output(tmp_path, genes, monkeypatch):
    paths = [str(write(make_cells(genes, 5, seed=i), tmp_path / f"{i}.h5ad")) for i in range(3)]

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Qc, "_draw", stop)
        assert main(["qc", *paths, "--output", str(tmp_path / "out"), "--no-doublets"]) == 130
    assert main(["qc", *paths[:2], "--output", str(tmp_path / "out"), "--no-doublets"]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [MARK, "0.h5ad", "1.h5ad", "qc.csv", "qc.png"]


@pytest.mark.parametrize("n_cells", [2, 3, 7, 30, 50])
def test_cells_that_are_all_alike_pass(n_cells):
    coding = sorted(g for g, kind in human_genes().biotype_of.items() if kind == "protein_coding")[:12]
    mitochondrial = [g for g, s in human_genes().symbol_of.items() if s == "MT-CO1"]
    cells = anndata.AnnData(np.tile(np.array([1] * 12 + [1], dtype=np.float32), (n_cells, 1)))
    cells.var_names = [*coding, *mitochondrial]
    assert assess_quality(cells, rules=QUICK).cells()["filter_pass"].all()


def test_medians_take_the_next_column_of_totals_from_files_as_from_memory(tmp_path, genes):
    cells = make_cells(genes, 20)
    sums = np.asarray(cells.X.sum(1)).ravel()
    cells.obs["n_counts"], cells.obs["total_counts"] = sums - 1, sums * 3
    path = write(cells, tmp_path / "a.h5ad")
    assert fit_gene_table(path).medians.tolist() == fit_gene_table(cells).medians.tolist()
    cells.obs["total_counts"] = sums - 2
    assert fit_gene_table(write(cells, path)).medians.tolist() == fit_gene_table(cells).medians.tolist()


def test_cells_without_a_dataset_are_judged_as_one(genes):
    cells = make_cells(genes, 40)
    cells.X = with_row(cells.X, 2, 500)
    cells.obs["study"] = pd.Categorical(pd.array(["A", "B", None, "A"] * 10, dtype="string"))
    quality = assess_quality(cells, rules=QualityRules(dataset="study", doublets=False, min_genes=0, n_sd=2))
    assert quality.summary["cells"].to_dict() == {"A": 20, "B": 10, "nan": 10}
    assert "high counts" in quality.cells()["filter_reason"].iloc[2]


def test_a_layer_that_is_called_x_is_not_x(tmp_path, genes):
    cells = make_cells(genes, 6)
    cells.layers["X"] = cells.X * 2
    for source in (
        open_cells(cells),
        open_cells(write(cells, tmp_path / "a.h5ad")),
        open_cells(formats.write_loom(cells, tmp_path / "a.loom", layers={"X": cells.X.toarray() * 2})),
    ):
        assert np.array_equal(read_all(source), cells.X.toarray())


def change_matrix(path, change):
    lines = (path / "matrix.mtx").read_text().splitlines()
    change(lines)
    (path / "matrix.mtx").write_text("\n".join(lines) + "\n")
    return path


def test_text_matrices_by_the_letter(tmp_path, cells, tokenizer):
    path = formats.write_tenx_folder(cells, tmp_path / "a", zipped=False)
    change_matrix(path, lambda lines: lines.__setitem__(0, "%%MatrixMarket Matrix Coordinate Real General"))
    assert np.array_equal(read_all(open_cells(path)), cells.X.toarray())
    assert (
        load_cells(path / "matrix.mtx", tokenizer=tokenizer, cache_dir=tmp_path / "c")["input_ids"][:] == load_cells(cells, tokenizer=tokenizer)["input_ids"][:]
    )
    change_matrix(path, lambda lines: lines.__setitem__(slice(3, None), [f"{line} 7" for line in lines[3:]]))
    with pytest.raises(CellFileError, match="more than three fields"):
        read_all(open_cells(path))
    change_matrix(path, lambda lines: lines.__setitem__(slice(3, None), ["99999999999999999999 1 1", *(line[:-2] for line in lines[4:])]))
    with pytest.raises(CellFileError, match=r"broke off|points outside"):
        read_all(open_cells(path))


def test_outputs_that_would_replace_what_they_are_made_from(tmp_path, genes, model_folder, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    path = write(make_cells(genes, 6), folder / "a.h5ad")
    (folder / "notes.txt").write_text("mine")
    for command in (["tokenize", str(folder), "--model", str(model_folder)], ["qc", str(folder), "--no-doublets"], ["medians", str(folder)]):
        check_refused([*command, "--output", str(folder), "--overwrite"], "in holds the input .*a.h5ad, which writing there would replace", tmp_path, capsys)
        check_refused([*command, "--output", str(path), "--overwrite"], "is the input", tmp_path, capsys)
    for output, tokenizer in ((tmp_path / "t", tmp_path / "t"), (tmp_path / "t" / "table.json", tmp_path / "t")):
        check_refused(["medians", str(path), "--output", str(output), "--tokenizer", str(tokenizer)], "which writing there would replace", tmp_path, capsys)
    assert sorted(p.name for p in folder.iterdir()) == ["a.h5ad", "notes.txt"]


def test_biotypes_as_people_keep_them(tmp_path, genes):
    (tmp_path / "kinds.csv").write_bytes("\ufeffensembl_id,biotype\nENSMUSG00000000001.7,protein_coding\n".encode())
    assert read_biotypes(tmp_path / "kinds.csv") == {"ENSMUSG00000000001": "protein_coding"}
    with pytest.raises(SettingError, match=r"none of its 60 genes .* is among the 1 of the biotypes given"):
        assess_quality(make_cells(genes, 5), rules=QUICK, gene_biotypes={"ENSMUSG00000000001": "protein_coding"})


def test_qc_writes_columns_with_gaps(tmp_path, genes):
    cells = make_cells(genes, 6)
    cells.obs["flag"], cells.obs["n"] = pd.array([True, None] * 3, dtype="boolean"), pd.array([1, None] * 3, dtype="Int64")
    path = formats.write_zarr(cells, tmp_path / "a.zarr", 3)
    assert main(["qc", str(path), "--output", str(tmp_path / "out.h5ad"), "--no-doublets"]) == 0
    written = anndata.read_h5ad(tmp_path / "out.h5ad").obs
    assert written["flag"].isna().tolist() == written["n"].isna().tolist() == [False, True] * 3


def test_the_byte_order_of_another_machine(tmp_path, cells):
    path = write(cells, tmp_path / "a.h5ad", "dense")
    with h5py.File(path, "r+") as file:
        attributes, values = dict(file["X"].attrs), file["X"][:]
        del file["X"]
        file.create_dataset("X", data=values.astype(">f4")).attrs.update(attributes)
    assert np.array_equal(read_all(open_cells(path)), cells.X.toarray())
    assert np.array_equal(read_all(open_cells(formats.write_loom(cells, tmp_path / "a.loom", dtype=">i2"))), cells.X.toarray())


def test_attributes_as_bytes(tmp_path, cells):
    path = write(cells, tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as file:
        file["obs"].attrs["_index"] = np.bytes_(b"_index")
        file["obs"].attrs["column-order"] = np.array([b"cell_type"])
    assert open_cells(path).read_obs(["cell_type"]).index.tolist() == cells.obs_names.tolist()


def test_numbers_that_no_common_type_keeps(tmp_path, genes, tokenizer):
    first, second = (
        make_cells(genes, 3, size=np.array([16_777_217, 1, 2], dtype=np.int32)),
        make_cells(genes, 3, seed=1, size=np.array([0.5, 1, 2], dtype=np.float32)),
    )
    paths = [write(first, tmp_path / "a.h5ad"), write(second, tmp_path / "b.h5ad")]
    assert load_cells(paths, tokenizer=tokenizer, cache_dir=tmp_path / "c")["size"][:] == [16_777_217, 1, 2, 0.5, 1, 2]
    first.obs["size"] = np.array([2**60 + 1, 1, 2])
    write(first, paths[0])
    with pytest.raises(CellFileError, match=r"obs\['size'\] holds numbers that no type shared by all files keeps"):
        load_cells(paths, tokenizer=tokenizer, cache_dir=tmp_path / "c")


def test_columns_of_every_type_pandas_has(genes, tokenizer):
    cells = make_cells(genes, 3)
    cells.obs["zone"] = pd.date_range("2020", periods=3, tz="UTC")
    cells.obs["period"] = pd.period_range("2020", periods=3)
    cells.obs["interval"] = pd.arrays.IntervalArray.from_breaks([0, 1, 2, 3])
    dataset = load_cells(cells, tokenizer=tokenizer)
    assert dataset["zone"][0].startswith("2020-01-01 00:00:00")
    assert dataset["period"][:] == ["2020-01-01", "2020-01-02", "2020-01-03"]


def test_classes_that_are_numbers_are_one_class_with_and_without_gaps(tmp_path, genes, tokenizer):
    first = make_cells(genes, 4, cluster=pd.Categorical([1, 2, 1, 2]))
    second = make_cells(genes, 4, seed=1, cluster=pd.Categorical([1.0, np.nan, 3.0, 2.0]))
    dataset = load_cells([write(first, tmp_path / "a.h5ad"), write(second, tmp_path / "b.h5ad")], tokenizer=tokenizer, cache_dir=tmp_path / "c")
    assert dataset.features["cluster"].names == ["1", "2", "3"]
    assert dataset["cluster"][:] == [0, 1, 0, 1, 0, None, 2, 1]


def without(key):
    def damage(path):
        with h5py.File(path, "r+") as file:
            del file[key]

    return damage


def wrong_codes(path):
    with h5py.File(path, "r+") as file:
        file["obs/cell_type/codes"][0] = 100


def short_column(path):
    with h5py.File(path, "r+") as file:
        values = file["obs/n"][:-3]
        attributes = dict(file["obs/n"].attrs)
        del file["obs/n"]
        file.create_dataset("obs/n", data=values).attrs.update(attributes)


DAMAGE = [without("X/indptr"), without("X/data"), without("obs/cell_type/categories"), without("obs/n"), wrong_codes, short_column]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_of_any_kind_is_the_file_s(damage, tmp_path, genes, model_folder, tokenizer, capsys):
    good, bad = write(make_cells(genes, 8), tmp_path / "good.h5ad"), tmp_path / "bad.h5ad"
    cells = make_cells(genes, 8, seed=1)
    cells.obs["n"] = range(8)
    write(cells, bad)
    damage(bad)
    command = ["tokenize", str(good), str(bad), "--model", str(model_folder), "--output", str(tmp_path / "out")]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "bad.h5ad" in error
    assert "Traceback" not in error
    assert main([*command, "--skip-bad-files"]) == 0
    dataset = datasets.load_from_disk(str(tmp_path / "out"))
    assert len(dataset) == 8
    assert [f["file"] for f in json.loads(dataset.info.description)["skipped_files"]] == [str(bad)]


def test_qc_says_what_it_did_not_do(tmp_path, genes, caplog):
    cells = make_cells(genes, 30)
    cells.obs["flag"] = np.array([1.0, 0.0] * 15)
    assess_quality(cells)
    assert "30 of 30 cells have no doublet score" in caplog.text
    with pytest.raises(SettingError, match=r"max_doublet_score is 0\.1, but doublets are not scored"):
        QualityRules(doublets=False, max_doublet_score=0.1)
    marked = assess_quality(cells, rules=QualityRules(exclude=(("flag", ("1",)), ("cell_type", ("Mono",))), doublets=False)).cells()
    assert (marked["filter_reason"].str.contains("excluded by flag")).tolist() == [True, False] * 15
    assert "No cell is marked by obs['cell_type'] being Mono" in caplog.text


def test_lists_with_gaps_stream_as_they_are(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"input_ids": pa.array([[1, 2], None, [3, None]], pa.list_(pa.int16()))}), tmp_path / "a.parquet")
    assert [row["input_ids"] for row in stream_tokens(tmp_path / "a.parquet")] == [[1, 2], None, [3, None]]


def test_a_position_is_for_the_files_it_was_saved_for(tmp_path, genes, tokenizer):
    streams = []
    for i, n in enumerate((40, 44)):
        tokenize_corpus(write(make_cells(genes, n, seed=i), tmp_path / f"{i}.h5ad"), tmp_path / f"t{i}", tokenizer=tokenizer)
        streams.append(stream_tokens(tmp_path / f"t{i}", shuffle=True))
    next(iter(streams[0]))
    streams[1].load_state_dict(streams[0].state_dict())
    with pytest.raises(SettingError, match="saved by another stream"):
        next(iter(streams[1]))
    with pytest.raises(SettingError, match="shard_cells is -1"):
        stream_tokens(tmp_path / "t0", shard_cells=-1)


def test_a_bad_file_and_its_copy_are_both_skipped(tmp_path, genes, tokenizer):
    good, bad, copy = write(make_cells(genes, 8), tmp_path / "good.h5ad"), tmp_path / "bad.h5ad", tmp_path / "copy.h5ad"
    bad_in_the_middle(bad, genes)
    copy.write_bytes(bad.read_bytes())
    dataset = tokenize_corpus([bad, good, copy], tmp_path / "out", tokenizer=tokenizer, skip_bad_files=True)
    assert len(dataset) == 8
    assert [s["file"] for s in json.loads(dataset.info.description)["skipped_files"]] == [str(bad), str(copy)]


def test_parts_of_a_relative_output_have_absolute_names(tmp_path, monkeypatch):
    """Workers of a cluster run in folders of their own."""
    monkeypatch.chdir(tmp_path)
    with unfinished("out") as work:
        assert work.parts.is_absolute()


def test_a_refused_verdict_leaves_no_temporary_folder(tmp_path, genes, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(CellFileError):
        assess_quality(make_cells(genes, 3)[:0].copy(), rules=QUICK)
    assert not list(tmp_path.iterdir())
