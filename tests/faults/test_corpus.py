"""Tokenizing a corpus when things go wrong: what is there afterwards is whole, the same, or not there."""

import json
import os
import re
import resource
import subprocess
import sys

import anndata
import datasets
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from geneformer_hf import load_cells, tokenize_corpus
from geneformer_hf.cli.main import main
from geneformer_hf.data import corpus
from geneformer_hf.errors import CellFileError, OutputError, OutputExistsError
from geneformer_hf.outputs import unfinished
from tests.conftest import make_cells, with_row, write
from tests.faults.test_bad_input import check_refused


def content_of(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def files(tmp_path, genes):
    """Three files in three layouts, some categories missing, some cells left out."""
    folder = tmp_path / "files"
    folder.mkdir()
    paths = []
    for i, layout in enumerate(("csr", "csc", "dense")):
        cells = make_cells(genes, 600, seed=i)
        cells.obs["donor"] = pd.Categorical([[f"d{i}", None, "Ünïcode 名前"][j % 3] for j in range(600)])
        cells.obs["filter_pass"] = np.arange(600) % 10 != 3
        cells.obs_names = [f"file{i}-{n}" for n in cells.obs_names]
        cells.X = with_row(cells.X, 5, 0)
        paths.append(write(cells, folder / f"{i}.h5ad", layout))
    return paths


@pytest.fixture
def whole(tmp_path, files, tokenizer):
    """What an undisturbed run writes."""
    tokenize_corpus(files, tmp_path / "whole", tokenizer=tokenizer)
    return content_of(tmp_path / "whole")


def test_a_corpus_is_the_dataset_that_load_cells_makes(tmp_path, files, tokenizer):
    written = tokenize_corpus(files, tmp_path / "out", tokenizer=tokenizer)
    loaded = load_cells(files, tokenizer=tokenizer, cache_dir=tmp_path / "cache")
    opened = datasets.load_from_disk(str(tmp_path / "out"))
    assert written.features == opened.features == loaded.features
    assert written[:] == opened[:] == loaded[:]
    assert [opened["donor"][i] for i in (0, 1, 2)] == [0, None, 1]
    assert json.loads(opened.info.description) == json.loads(loaded.info.description)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| 0.h5ad | 600 | 60 | X |" in card
    assert str(tmp_path) not in card
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "files", "out"], "nothing is left beside the output"


@pytest.mark.slow
def test_several_processes_write_the_same_bytes(tmp_path, files, tokenizer):
    for num_proc, name in ((1, "one"), (2, "several")):
        tokenize_corpus(files, tmp_path / name, tokenizer=tokenizer, keep_counts=True, num_proc=num_proc)
    assert content_of(tmp_path / "one") == content_of(tmp_path / "several")


class Stop(BaseException):
    """As a pulled plug would: nothing expects it."""


@pytest.fixture
def stop_after(monkeypatch):
    written = []

    def arrange(n: int) -> list[str]:
        def write_part(*args):
            if len(written) == n:
                raise Stop
            written.append(args[-1])
            return original(*args)

        monkeypatch.setattr(corpus, "write_part", write_part)
        return written

    original = corpus.write_part
    return arrange


@pytest.mark.parametrize("n", [0, 1, 4, 8])
def test_an_interrupted_run_goes_on_where_it_was(n, tmp_path, files, tokenizer, whole, stop_after, monkeypatch, caplog):
    done = stop_after(n)
    with pytest.raises(Stop):
        tokenize_corpus(files, tmp_path / "out", tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.unfinished").exists() == (n > 0)
    assert (f".out.unfinished ({n}); the next run goes on" in caplog.text) == (n > 0)
    first = list(done)
    done.clear()
    stop_after(1000)
    tokenize_corpus(files, tmp_path / "out", tokenizer=tokenizer)
    assert not set(first) & set(done), "finished parts are not done again"
    assert content_of(tmp_path / "out") == whole
    assert not (tmp_path / ".out.unfinished").exists()


def test_a_file_changed_between_two_runs_is_done_again(tmp_path, genes, files, tokenizer, stop_after):
    stop_after(6)
    with pytest.raises(Stop):
        tokenize_corpus(files, tmp_path / "out", tokenizer=tokenizer)
    changed = make_cells(genes, 600, seed=77)
    changed.obs["donor"], changed.obs["filter_pass"] = pd.Categorical(["d0"] * 600), True
    stamp = files[0].stat()
    write(changed, files[0])
    os.utime(files[0], ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    stop_after(1000)
    tokenize_corpus(files, tmp_path / "out", tokenizer=tokenizer)
    tokenize_corpus(files, tmp_path / "afresh", tokenizer=tokenizer)
    assert content_of(tmp_path / "out") == content_of(tmp_path / "afresh")


def test_other_options_share_no_parts(tmp_path, files, tokenizer, stop_after):
    stop_after(6)
    with pytest.raises(Stop):
        tokenize_corpus(files, tmp_path / "out", tokenizer=tokenizer)
    stop_after(1000)
    tokenize_corpus(files, tmp_path / "out", tokenizer=tokenizer, obs="none")
    assert datasets.load_from_disk(str(tmp_path / "out")).column_names == ["input_ids", "length", "cell_id"]


def test_two_runs_into_one_folder(h5ad, model_folder, tmp_path, capsys):
    command = ["tokenize", str(h5ad), "--model", str(model_folder), "--output", str(tmp_path / "out")]
    with unfinished(tmp_path / "out") as other:
        check_refused(command, "out is being written by another process", tmp_path, capsys)
        (other.folder / "dataset").mkdir()
        other.put_in_place(other.folder / "dataset")
    check_refused(command, "out exists. Choose another name, or pass --overwrite", tmp_path, capsys)


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path, h5ad, tokenizer, monkeypatch):
    original = corpus.write_part

    def write_part(*args):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "mine").write_text("x")
        return original(*args)

    monkeypatch.setattr(corpus, "write_part", write_part)
    with pytest.raises(OutputExistsError):
        tokenize_corpus(h5ad, tmp_path / "out", tokenizer=tokenizer)
    assert content_of(tmp_path / "out") == {"mine": b"x"}


def test_overwrite_replaces_only_when_all_is_there(tmp_path, files, tokenizer, stop_after):
    tokenize_corpus(files[:1], tmp_path / "out", tokenizer=tokenizer)
    before = content_of(tmp_path / "out")
    stop_after(2)
    with pytest.raises(Stop):
        tokenize_corpus(files[1:], tmp_path / "out", tokenizer=tokenizer, overwrite=True)
    assert content_of(tmp_path / "out") == before
    stop_after(1000)
    tokenize_corpus(files[1:], tmp_path / "out", tokenizer=tokenizer, overwrite=True)
    assert len(datasets.load_from_disk(str(tmp_path / "out"))) == 2 * 539


def damaged(path, genes):
    path.write_bytes(path.read_bytes()[:3000])


def bad_in_the_middle(path, genes):
    """A fraction that the sample taken before the work does not see."""
    cells = make_cells(genes, 20_000)
    x = cells.X.toarray()
    x[5_000] = 0.5
    cells.X = sp.csr_matrix(x)
    cells.write_h5ad(path)


def other_species(path, genes):
    make_cells([f"ENSMUSG{i:011d}" for i in range(60)], 5).write_h5ad(path)


@pytest.mark.parametrize(
    ("damage", "num_proc"), [(damaged, 1), (bad_in_the_middle, 1), (other_species, 1), pytest.param(bad_in_the_middle, 2, marks=pytest.mark.slow)]
)
def test_a_bad_file_among_good_ones(damage, num_proc, tmp_path, genes, files, tokenizer, model_folder, capsys, caplog):
    bad = tmp_path / "files" / "bad.h5ad"
    bad.write_bytes(files[0].read_bytes())
    damage(bad, genes)
    together = [files[0], bad, files[2]]
    command = ["tokenize", *map(str, together), "--model", str(model_folder), "--output", str(tmp_path / "out"), "--num-proc", str(num_proc)]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "bad.h5ad" in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
    assert main([*command, "--skip-bad-files"]) == 0
    assert re.search(r"1 files were skipped: .*bad\.h5ad", caplog.text)
    dataset = datasets.load_from_disk(str(tmp_path / "out"))
    report = json.loads(dataset.info.description)
    assert [s["file"] for s in report["skipped_files"]] == [str(bad)]
    assert [f["file"] for f in report["files"]] == [str(files[0]), str(files[2])]
    assert dataset["input_ids"][:] == load_cells([files[0], files[2]], tokenizer=tokenizer, cache_dir=tmp_path / "cache")["input_ids"][:]


def test_all_files_bad_is_an_error_even_when_they_may_be_skipped(tmp_path, h5ad, model_folder, capsys):
    h5ad.write_text("no")
    command = ["tokenize", str(h5ad), "--model", str(model_folder), "--output", str(tmp_path / "out"), "--skip-bad-files"]
    check_refused(command, "none of the 1 files can be used", tmp_path, capsys)


def test_a_full_disk(tmp_path, files, model_folder, tokenizer, whole):
    """A limit on the size of files stands for the disk: a write that goes beyond fails as on a full one."""
    command = [sys.executable, "-m", "geneformer_hf.cli.main", "tokenize", *map(str, files), "--model", str(model_folder), "--output", str(tmp_path / "out")]
    limit = 12_000
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(r"geneformer-hf tokenize: .*(File too large|cannot write)", done.stderr), done.stderr
    assert not (tmp_path / "out").exists()
    assert not [p for p in tmp_path.glob(".out.unfinished/parts/*") if p.name.startswith(".")], "no half-written part"
    tokenize_corpus(files, tmp_path / "out", tokenizer=tokenizer)
    assert content_of(tmp_path / "out") == whole


def test_an_output_that_cannot_be_written(h5ad, model_folder, tmp_path, capsys, tokenizer):
    folder = tmp_path / "read-only"
    folder.mkdir()
    # Root may write anywhere but where the kernel says no.
    output = "/proc/out" if os.geteuid() == 0 else str(folder / "out")
    folder.chmod(0o555)
    try:
        assert main(["tokenize", str(h5ad), "--model", str(model_folder), "--output", output]) == 1
    finally:
        folder.chmod(0o755)
    assert re.search(r"geneformer-hf tokenize: cannot write", capsys.readouterr().err)
    with pytest.raises(OutputError):
        tokenize_corpus(h5ad, "/proc/out/deeper", tokenizer=tokenizer)


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_cell_ids_that_repeat_within_and_across_files(tmp_path, genes, tokenizer, caplog):
    first, second = make_cells(genes, 4), make_cells(genes, 4, seed=1)
    first.obs_names = ["a", "b", "b", "c"]
    second.obs_names = ["x", "c", "y", "z"]
    paths = [write(first, tmp_path / "1.h5ad"), write(second, tmp_path / "2.h5ad")]
    for make in (
        lambda: tokenize_corpus(paths, tmp_path / "out", tokenizer=tokenizer),
        lambda: load_cells(paths, tokenizer=tokenizer, cache_dir=tmp_path / "cache"),
    ):
        dataset = make()
        assert dataset["cell_id"][:] == ["a", "b", "b", "c", "x", "c", "y", "z"]
        assert json.loads(dataset.info.description)["cells_with_repeated_ids"] == 4
        assert "4 cells carry a cell id that another cell carries too (b, c). They are all kept." in caplog.text
        caplog.clear()


def test_the_same_file_copied_gives_its_cells_twice_and_says_so(tmp_path, h5ad, tokenizer, caplog):
    copy = tmp_path / "copy.h5ad"
    copy.write_bytes(h5ad.read_bytes())
    dataset = tokenize_corpus([h5ad, copy], tmp_path / "out", tokenizer=tokenizer)
    assert len(dataset) == 60
    assert dataset["input_ids"][:30] == dataset["input_ids"][30:]
    assert "60 cells carry a cell id" in caplog.text


def test_unicode_and_very_long_names(tmp_path, genes, tokenizer):
    cells = make_cells(genes, 5)
    names = ["Zelle-ä", "细胞", "🧬", "x" * 20_000, "with\ttab\nand line"]
    cells.obs_names = names
    cells.obs["Gewebe 組織"] = ["y" * 50_000, "ß", "", "č", "🧫"]
    folder = tmp_path / "Ordner mit Leerzeichen 数据"
    folder.mkdir()
    path = write(cells, folder / ("n" * 200 + ".h5ad"))
    dataset = tokenize_corpus(path, folder / "aus gabe", tokenizer=tokenizer)
    assert dataset["cell_id"][:] == names
    assert dataset["Gewebe 組織"][:] == ["y" * 50_000, "ß", "", "č", "🧫"]


def test_a_file_without_cells_among_others_and_alone(tmp_path, genes, tokenizer):
    full, empty = make_cells(genes, 5), make_cells(genes, 5)[:0].copy()
    paths = [write(full, tmp_path / "a.h5ad"), write(empty, tmp_path / "b.h5ad")]
    assert len(tokenize_corpus(paths, tmp_path / "out", tokenizer=tokenizer)) == 5
    with pytest.raises(CellFileError, match="none of 0 cells is left"):
        tokenize_corpus(paths[1], tmp_path / "alone", tokenizer=tokenizer)
    assert not list(tmp_path.glob(".alone*"))


def test_a_file_without_genes(tmp_path, h5ad, model_folder, capsys):
    anndata.AnnData(sp.csr_matrix((3, 0), dtype=np.float32), pd.DataFrame(index=list("abc")), pd.DataFrame(index=[])).write_h5ad(tmp_path / "none.h5ad")
    command = ["tokenize", str(tmp_path / "none.h5ad"), "--model", str(model_folder), "--output", str(tmp_path / "out")]
    check_refused(command, "there are no genes: var has 0 rows", tmp_path, capsys)


def test_no_cell_passes(tmp_path, genes, tokenizer):
    path = write(make_cells(genes, 5, filter_pass=[0] * 5), tmp_path / "a.h5ad")
    with pytest.raises(CellFileError, match="none of 5 cells is left: 5 have filter_pass 0, 0 hold no gene"):
        tokenize_corpus(path, tmp_path / "out", tokenizer=tokenizer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5ad"]
