import json
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest

from geneformer_hf import CellDatasetBuilder, GeneformerTokenizer, GeneTable, load_cells
from geneformer_hf.data import encoder, matrices
from geneformer_hf.errors import CellFileError, ColumnNotFoundError, GeneIdError
from tests import reference
from tests.conftest import ensembl, make_cells, with_row, write
from tests.unit.test_readers import obs_frame


def tokens_of(dataset) -> list[list[int]]:
    return [list(row) for row in dataset["input_ids"][:]]


def expected_tokens(adata, table) -> list[list[int]]:
    return [[2, *reference.rank_cell(row.astype(np.float64), table.token_ids, table.medians)[:62], 3] for row in adata.X.toarray()]


def test_a_file_becomes_a_dataset(h5ad, cells, tokenizer, table):
    dataset = load_cells(h5ad, tokenizer=tokenizer)
    assert dataset.column_names == ["input_ids", "length", "cell_id", "cell_type"]
    assert tokens_of(dataset) == expected_tokens(cells, table)
    assert dataset["length"][:] == [len(t) for t in tokens_of(dataset)]
    assert dataset["cell_id"][:] == cells.obs_names.tolist()
    assert dataset.features["input_ids"] == datasets.List(datasets.Value("int16"))
    assert [dataset.features["cell_type"].int2str(i) for i in dataset["cell_type"][:]] == cells.obs["cell_type"].tolist()


@pytest.mark.parametrize(
    ("layout", "num_proc"), [("csr", None), ("csc", None), ("dense", None), ("gzip", None), ("csr", 2), pytest.param("csc", 2, marks=pytest.mark.slow)]
)
def test_layout_blocks_and_processes_change_nothing(layout, num_proc, tmp_path, genes, tokenizer, table, monkeypatch):
    monkeypatch.setattr(matrices, "BLOCK_VALUES", 500)
    monkeypatch.setattr(encoder, "RANGE_CELLS", 100)
    cells = make_cells(genes, 300)
    dataset = load_cells(write(cells, tmp_path / f"{layout}.h5ad", layout), tokenizer=tokenizer, num_proc=num_proc, cache_dir=tmp_path)
    assert tokens_of(dataset) == expected_tokens(cells, table)
    assert dataset["cell_id"][:] == cells.obs_names.tolist()
    assert not list(tmp_path.glob("geneformer-hf-*")), "rows of a transposed file were left behind"


@pytest.mark.slow
def test_several_processes_are_cached_and_say_the_same_again(tmp_path, genes, tokenizer, caplog):
    path = write(make_cells(genes, 300, filter_pass=np.arange(300) % 3 > 0), tmp_path / "a.h5ad")
    first = load_cells(path, tokenizer=tokenizer, num_proc=2, cache_dir=tmp_path / "cache")
    caplog.clear()
    again = load_cells(path, tokenizer=tokenizer, num_proc=2, cache_dir=tmp_path / "cache")
    assert "100 cells were left out" in caplog.text
    assert again.cache_files == first.cache_files
    assert again[:] == first[:] == load_cells(path, tokenizer=tokenizer, cache_dir=tmp_path / "cache")[:]
    assert again.info.description == first.info.description


def test_cells_in_memory_equal_the_file(h5ad, cells, tokenizer):
    from_file, from_memory = load_cells(h5ad, tokenizer=tokenizer), load_cells(cells, tokenizer=tokenizer)
    assert from_file.features == from_memory.features
    assert from_file[:] == from_memory[:]


def test_several_files_keep_their_order_and_unite_their_categories(tmp_path, genes, tokenizer, table):
    first = make_cells(genes, 6, seed=1)
    second = make_cells(genes, 4, seed=2, cell_type=pd.Categorical(["Mono", "T", None, "Mono"]), donor=[1, 2, 3, 4])
    second = second[:, ::-1].copy()
    paths = [write(second, tmp_path / "b.h5ad"), write(first, tmp_path / "a.h5ad")]
    dataset = load_cells(paths, tokenizer=tokenizer)
    # Ties keep the column order of their own file.
    backwards = GeneTable(table.ensembl_ids[::-1], table.token_ids[::-1], table.medians[::-1])
    assert tokens_of(dataset) == expected_tokens(second, backwards) + expected_tokens(first, table)
    assert dataset.features["cell_type"].names == ["Mono", "T", "B", "NK"]
    names = [None if i is None else dataset.features["cell_type"].names[i] for i in dataset["cell_type"][:]]
    assert names == ["Mono", "T", None, "Mono", "B", "T", "NK", "B", "T", "NK"]
    assert dataset["donor"][:] == [1, 2, 3, 4, None, None, None, None, None, None]
    sorted_dataset = load_cells(str(tmp_path / "*.h5ad"), tokenizer=tokenizer)
    assert sorted_dataset["cell_id"][:6] == first.obs_names.tolist()
    assert load_cells(tmp_path, tokenizer=tokenizer)["length"][:] == sorted_dataset["length"][:]


def test_every_kind_of_obs_column_survives(tmp_path, genes, tokenizer):
    frame = obs_frame()
    cells = make_cells(genes, 12, **{name: frame[name].to_numpy() if name == "text" else frame[name].array for name in frame})
    dataset = load_cells(write(cells, tmp_path / "a.h5ad"), tokenizer=tokenizer)
    row = dataset[1]
    assert (row["text"], row["whole"], row["flag"], row["nullable"], row["maybe"]) == ("ü1", 1, False, None, None)
    assert dataset["category"][:3] == [1, 0, None]
    assert dataset.features["category"].names == ["T", "B", "unused"]
    assert dataset.features["number"].dtype == "float32"


def test_obs_columns_can_be_chosen_and_own_names_are_kept_apart(tmp_path, genes, tokenizer):
    cells = make_cells(genes, 4, length=[9, 8, 7, 6], donor=["a", "b", "c", "d"])
    dataset = load_cells(cells, tokenizer=tokenizer)
    assert dataset["obs_length"][:] == [9, 8, 7, 6]
    assert load_cells(cells, tokenizer=tokenizer, obs=["donor"]).column_names == ["input_ids", "length", "cell_id", "donor"]
    assert load_cells(cells, tokenizer=tokenizer, obs="none").column_names == ["input_ids", "length", "cell_id"]
    with pytest.raises(ColumnNotFoundError, match=r"obs has no column 'tissue'. Found: length, donor"):
        load_cells(write(cells, tmp_path / "a.h5ad"), tokenizer=tokenizer, obs=["tissue"])


def test_filter_pass_and_empty_cells_are_left_out_and_counted(tmp_path, genes, tokenizer, caplog):
    cells = make_cells(genes, 6, filter_pass=[1, 0, 1, 1, 0, 1])
    cells.X = with_row(cells.X, 2, 0)
    dataset = load_cells(write(cells, tmp_path / "a.h5ad"), tokenizer=tokenizer)
    assert dataset["cell_id"][:] == ["cell0", "cell3", "cell5"]
    report = json.loads(dataset.info.description)
    assert (report["cells"], report["left_out_by_filter_pass"], report["left_out_without_genes"]) == (3, 2, 1)
    assert "2 cells were left out because obs['filter_pass'] is 0" in caplog.text
    assert "1 cells were left out because they hold no gene" in caplog.text


def test_counts_and_uncropped_ids_on_request(genes, table):
    tokenizer = GeneformerTokenizer(gene_table=table, cls_token="<cls>", eos_token="<eos>", model_max_length=10)
    cells = make_cells(genes, 5)
    row = load_cells(cells, tokenizer=tokenizer, keep_counts=True, keep_uncropped=True)[0]
    assert len(row["input_ids"]) == len(row["counts"]) == row["length"] == 10
    assert row["input_ids"][1:-1] == row["input_ids_uncropped"][:8]
    assert row["length_uncropped"] == len(row["input_ids_uncropped"]) == int((cells.X.toarray()[0] > 0).sum())
    total = cells.X.toarray()[0].sum()
    expected = [cells.X.toarray()[0][t - 4] / total * 1e4 for t in row["input_ids"][1:-1]]
    np.testing.assert_allclose(row["counts"][1:-1], expected, rtol=1e-6)


def test_the_cache_follows_content_table_and_options_not_names(tmp_path, genes, tokenizer, table):
    cells, cache = make_cells(genes, 8), tmp_path / "cache"
    path = write(cells, tmp_path / "a.h5ad")

    def built(path=path, **options):
        return load_cells(path, **({"tokenizer": tokenizer, "cache_dir": cache} | options)).cache_files[0]["filename"]

    first = built()
    assert built() == first
    assert built(Path(shutil.copy(path, tmp_path / "renamed.h5ad"))) == first, "the same content under another name"
    assert built(obs="none") != first
    assert (
        built(
            tokenizer=GeneformerTokenizer(
                gene_table=GeneTable(genes, table.token_ids, table.medians * 2), cls_token="<cls>", eos_token="<eos>", model_max_length=64
            )
        )
        != first
    )
    stamp = path.stat()
    write(make_cells(genes, 8, seed=9), path)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert built() != first, "another content under the same name and time stamp"


def test_the_smallest_type_that_holds_the_tokens(genes):
    for largest, dtype in ((30_000, "int16"), (40_000, "uint16"), (70_000, "int32")):
        tokenizer = GeneformerTokenizer(gene_table=GeneTable([genes[0]], [largest], [1.0]))
        dataset = load_cells(make_cells(genes[:1], 4), tokenizer=tokenizer)
        assert dataset.features["input_ids"].feature.dtype == dtype
        assert all(row["input_ids"] == [largest] for row in dataset)


def test_the_builder_streams(h5ad, cells, tokenizer, table):
    streamed = CellDatasetBuilder(files=(str(h5ad),), tokenizer=tokenizer).as_streaming_dataset("train")
    assert [row["input_ids"] for row in streamed] == expected_tokens(cells, table)


def test_a_dataset_survives_the_disk(h5ad, tokenizer, tmp_path):
    dataset = load_cells(h5ad, tokenizer=tokenizer)
    dataset.save_to_disk(tmp_path / "out")
    again = datasets.load_from_disk(str(tmp_path / "out"))
    assert again[:] == dataset[:]
    assert json.loads(again.info.description)["encoding"] == tokenizer.encoding_fingerprint


def test_a_cell_with_one_gene(tokenizer):
    cells = make_cells([ensembl(1)], 3)
    cells.X = np.ones((3, 1), dtype=np.float32)
    assert tokens_of(load_cells(cells, tokenizer=tokenizer)) == [[2, 4, 3]] * 3


def test_files_that_are_not_there(tmp_path, tokenizer, h5ad):
    with pytest.raises(CellFileError, match=r"no file of cells there"):
        load_cells(str(tmp_path / "nothing*.h5ad"), tokenizer=tokenizer)
    with pytest.raises(CellFileError, match="does not exist"):
        load_cells(tmp_path / "gone.h5ad", tokenizer=tokenizer)
    with pytest.raises(CellFileError, match="Named more than once"):
        load_cells([h5ad, h5ad], tokenizer=tokenizer)


def test_genes_that_match_nothing_are_refused_before_any_work(tmp_path, tokenizer):
    cells = make_cells([f"ENSMUSG{i:011d}" for i in range(60)], 5)
    with pytest.raises(GeneIdError, match="mouse"):
        load_cells(write(cells, tmp_path / "mouse.h5ad"), tokenizer=tokenizer)
