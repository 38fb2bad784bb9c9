"""Outputs: created and never replaced unless told to, folders of ours known by their mark, leftovers removed, one run in a folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from geneformer_hf import convert_checkpoint, export_checkpoint, tokenize_corpus
from geneformer_hf.analysis.embeddings import Embedder
from geneformer_hf.cli.main import main
from geneformer_hf.errors import OutputError, OutputExistsError
from geneformer_hf.outputs import MARK, new_file, new_folder, put, require_apart, require_free, unfinished
from geneformer_hf.training.checkpointing import LOCK_FILE, only_run
from tests.conftest import make_cells, write


def inside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["file", "empty folder", "folder"])
@pytest.mark.parametrize("what", [new_file, new_folder], ids=["new_file", "new_folder"])
def test_what_appears_meanwhile_is_left_as_it_is(what, kind, tmp_path):
    output = tmp_path / "out"
    with (
        pytest.raises(OutputExistsError, match=r"out (exists|appeared while the work was done|is a folder)"),
        what(output, **({"made_by": "test"} if what is new_folder else {})) as partial,
    ):
        if what is new_folder:
            (partial / "x").write_text("ours")
        else:
            partial.write_text("ours")
        output.write_text("theirs") if kind == "file" else output.mkdir()
        if kind == "folder":
            (output / "theirs").write_text("1")
    assert output.read_text() == "theirs" if kind == "file" else inside(output) == (["theirs"] if kind == "folder" else [])
    assert inside(tmp_path) == ["out"]


def test_the_last_step_itself_creates(tmp_path):
    for name in ("file", "folder"):
        finished = tmp_path / "finished"
        if name == "file":
            finished.write_text("1")
            (tmp_path / name).write_text("theirs")
        else:
            finished.mkdir()
            (tmp_path / name).mkdir()
        with pytest.raises(OutputExistsError, match="appeared while the work was done"):
            put(finished, tmp_path / name, overwrite=False)
        assert finished.exists()
        finished.unlink() if finished.is_file() else finished.rmdir()
    assert (tmp_path / "file").read_text() == "theirs"


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError

    monkeypatch.setattr(os, "link", no_links)
    with new_file(tmp_path / "a") as partial:
        partial.write_text("1")
    assert (tmp_path / "a").read_text() == "1"
    (tmp_path / "b").write_text("2")
    with pytest.raises(OutputExistsError):
        put(tmp_path / "b", tmp_path / "a", overwrite=False)
    assert (tmp_path / "a").read_text() == "1"


def appear(monkeypatch, target, name, output):
    """Let somebody else write the output while a command runs."""
    real = getattr(target, name)

    def slow(*args, **kwargs):
        output.mkdir(exist_ok=True)
        (output / "theirs.txt").write_text("mine")
        return real(*args, **kwargs)

    monkeypatch.setattr(target, name, slow)


@pytest.mark.parametrize("command", ["embed", "tokenize", "export"])
def test_no_command_replaces_what_appeared_while_it_ran(command, tmp_path, h5ad, model_folder, monkeypatch, capsys):
    from geneformer_hf.data.encoder import CellEncoder
    from geneformer_hf.hub import export

    output = tmp_path / ("out.parquet" if command == "embed" else "out")
    slow = {"embed": (Embedder, "iter_cells"), "tokenize": (CellEncoder, "tables"), "export": (export, "load_model")}[command]
    appear(monkeypatch, *slow, output)
    source = {"embed": [str(h5ad), "--model", str(model_folder), "--output", str(output)], "tokenize": [str(h5ad), "--model", str(model_folder), "--output", str(output)],
              "export": [str(model_folder), str(output)]}[command]  # fmt: skip
    assert main([command, *source]) == 1
    assert re_search(r"out(\.parquet)? (exists|appeared|is a folder)", capsys.readouterr().err)
    assert inside(output) == ["theirs.txt"]


def re_search(pattern, text):
    import re

    return re.search(pattern, text)


@pytest.fixture
def ours(tmp_path):
    """A folder that `evaluate` made."""
    with new_folder(tmp_path / "ours", made_by="evaluate") as folder:
        (folder / "report.html").write_text("1")
    return tmp_path / "ours"


def test_a_folder_of_ours_is_replaced_by_the_same_command_alone(ours):
    assert json.loads((ours / MARK).read_text()) == {"made_by": "evaluate", "of": None, "files": ["report.html"]}
    require_free(ours, overwrite=True, made_by="evaluate")
    with pytest.raises(OutputExistsError, match=r"ours was made by `evaluate`, and this is `export`. It is not replaced"):
        require_free(ours, overwrite=True, made_by="export")
    with pytest.raises(OutputExistsError, match="is a folder, and a file is to be written there"):
        require_free(ours, overwrite=True)
    with pytest.raises(OutputExistsError, match="pass --overwrite"):
        require_free(ours, made_by="evaluate")


def test_a_folder_with_files_of_the_user_is_not_replaced(ours):
    (ours / "cache-12.arrow").write_text("datasets does that")
    require_free(ours, overwrite=True, made_by="evaluate")
    (ours / "sub").mkdir()
    (ours / "sub" / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"holds 1 files that `evaluate` did not write, for instance sub/notes.txt"):
        require_free(ours, overwrite=True, made_by="evaluate")


@pytest.mark.parametrize("mark", [None, "", "[]", "{}", '{"made_by": "evaluate"}', '{"made_by": "evaluate", "files": 3}'])
def test_a_folder_that_no_command_made_is_not_replaced(mark, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "a").write_text("1")
    if mark is not None:
        (tmp_path / "theirs" / MARK).write_text(mark)
    with pytest.raises(OutputExistsError, match=r"theirs was not made by a command of geneformer-hf"):
        require_free(tmp_path / "theirs", overwrite=True, made_by="evaluate")


def test_another_models_folder_is_not_replaced(tmp_path, model_folder):
    export_checkpoint(model_folder, tmp_path / "plain")
    other = tmp_path / "other"
    other.mkdir()
    for path in model_folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    export_checkpoint(model_folder, tmp_path / "plain", overwrite=True)
    with pytest.raises(OutputExistsError, match=r"plain was made by `export` of .*model, and this is `export` of .*other"):
        export_checkpoint(other, tmp_path / "plain", overwrite=True)
    with pytest.raises(OutputError, match="which writing there would replace"):
        export_checkpoint(model_folder, model_folder, overwrite=True)
    with pytest.raises(OutputExistsError, match="other was not made by a command"):
        export_checkpoint(model_folder, other, overwrite=True)


@pytest.mark.parametrize("command", ["embed", "predict", "evaluate", "tokenize", "attention", "perturb", "qc", "medians", "stats"])
def test_overwriting_an_input_is_refused(command, tmp_path, h5ad, model_folder, capsys):
    donors, biotypes = tmp_path / "donors.csv", tmp_path / "biotypes.csv"
    donors.write_text("cell_id,donor\n")
    biotypes.write_text("ensembl_id,biotype\n")
    table = tmp_path / "t.parquet"
    pd.DataFrame({"cell_id": ["a"]}).to_parquet(table)
    model = ["--model", str(model_folder)]
    calls = {
        "embed": [[str(h5ad), *model, "--output", str(h5ad)]],
        "predict": [[str(h5ad), *model, "--output", str(h5ad)]],
        "evaluate": [[str(h5ad), *model, "--labels", "cell_type", "--output", str(out)] for out in (model_folder, tmp_path)],
        "tokenize": [[str(h5ad), *model, "--output", str(model_folder)]],
        "attention": [[str(h5ad), *model, "--output", str(model_folder)]],
        "perturb": [
            [str(h5ad), *model, "--kind", "delete", "--genes", "all", "--output", str(tmp_path / "v.parquet"), "--state-vectors", str(tmp_path / "v.parquet")]
        ],
        "qc": [[str(h5ad), "--gene-biotypes", str(biotypes), "--output", str(biotypes)]],
        "medians": [[str(h5ad), "--gene-biotypes", str(biotypes), "--output", str(biotypes)]],
        "stats": [[str(table), "--mode", "effects", "--donors", str(donors), "--output", str(donors)]],
    }[command]
    (tmp_path / "v.parquet").write_text("vectors")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for call in calls:
        assert main([command, *call, "--overwrite"]) == 1
        assert "which writing there would replace" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_dictionaries_are_inputs(tmp_path, model_folder):
    (tmp_path / "dictionaries").mkdir()
    (tmp_path / "dictionaries" / "x.pkl").write_text("1")
    # As published: without a tokenizer.
    (model_folder / "gene_table.json").unlink()
    with pytest.raises(OutputError, match="dictionaries is the input"):
        convert_checkpoint(model_folder, tmp_path / "dictionaries", dictionaries=tmp_path / "dictionaries", overwrite=True)


def test_names_on_the_hub_are_no_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    require_apart("lab", ["lab/model", None])
    (tmp_path / "lab" / "model").mkdir(parents=True)
    with pytest.raises(OutputError, match="lab holds the input lab/model"):
        require_apart("lab", ["lab/model"])


KILLED = """
import os, signal, sys, time
from pathlib import Path
from geneformer_hf.outputs import new_file, new_folder
make = new_file(Path(sys.argv[1])) if sys.argv[2] == "file" else new_folder(Path(sys.argv[1]), made_by="test")
with make as partial:
    print("working", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_leftovers_of_a_killed_run_go_and_those_of_a_live_one_stay(kind, tmp_path):
    output = tmp_path / "out [1]"

    def start():
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(output), kind], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "working\n"
        return process

    killed, alive = start(), start()
    try:
        assert len(list(tmp_path.glob(".out*.partial"))) == 2
        killed.send_signal(signal.SIGKILL)
        killed.wait(20)
        with new_file(output) as partial:
            # Of the one that lives, and our own.
            assert len(list(tmp_path.glob(".out*.partial"))) == 2
            partial.write_text("1")
        assert len(list(tmp_path.glob(".out*.partial"))) == 1
    finally:
        for process in (killed, alive):
            process.kill()
            process.wait(20)
            process.stdout.close()
    with new_file(output, overwrite=True) as partial:
        partial.write_text("2")
    assert inside(tmp_path) == ["out [1]"]


def test_an_output_that_a_killed_run_had_moved_aside_is_put_back(tmp_path, ours):
    moved = tmp_path / ".ours.abcd1234.old"
    moved.mkdir()
    (moved / "lock").touch()
    ours.rename(moved / "ours")
    with pytest.raises(OutputExistsError), new_folder(tmp_path / "ours", made_by="evaluate"):
        pass
    assert (tmp_path / "ours" / "report.html").read_text() == "1"
    assert inside(tmp_path) == ["ours"]


def test_resumable_outputs_carry_the_mark_too(tmp_path, genes, tokenizer):
    path = write(make_cells(genes, 6), tmp_path / "a.h5ad")
    tokenize_corpus([path], tmp_path / "out", tokenizer=tokenizer)
    assert json.loads((tmp_path / "out" / MARK).read_text())["made_by"] == "tokenize"
    tokenize_corpus([path], tmp_path / "out", tokenizer=tokenizer, overwrite=True)
    (tmp_path / "out" / "mine.txt").write_text("1")
    with pytest.raises(OutputExistsError, match=r"mine\.txt"):
        tokenize_corpus([path], tmp_path / "out", tokenizer=tokenizer, overwrite=True)


def test_a_resumable_output_that_appeared_meanwhile_is_left(tmp_path):
    with unfinished(tmp_path / "out.json") as work:
        (work.folder / "done").write_text("ours")
        (tmp_path / "out.json").write_text("theirs")
        with pytest.raises(OutputExistsError):
            work.put_in_place(work.folder / "done")
    assert (tmp_path / "out.json").read_text() == "theirs"


def test_one_run_in_a_training_folder(tmp_path):
    with only_run(tmp_path / "run", is_main=True):
        (tmp_path / "run" / "x").write_text("1")
        start = time.monotonic()
        with pytest.raises(OutputError, match=r"another run is training in .*run"), only_run(tmp_path / "run", is_main=True):
            pass
        assert time.monotonic() - start < 5
        # The other processes of the same run.
        with only_run(tmp_path / "run", is_main=False):
            pass
    with only_run(tmp_path / "run", is_main=True):
        pass
    assert inside(tmp_path / "run") == [LOCK_FILE, "x"]


def test_a_run_that_is_refused_leaves_no_folder(tmp_path):
    with pytest.raises(RuntimeError), only_run(tmp_path / "run", is_main=True):
        raise RuntimeError
    assert not (tmp_path / "run").exists()


def test_folders_of_the_user_with_like_names_stay(tmp_path):
    for name in (".out.backup.old", ".out.v2.abcd1234.old", ".out.abcd1234.old", ".out.mine.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("1")
    with new_folder(tmp_path / "out", made_by="test"):
        pass
    assert len(list(tmp_path.glob(".out*/precious"))) == 4


@pytest.mark.parametrize("what", ["folder", "file"])
def test_overwriting_a_file_does_not_remove_a_folder_that_appeared(what, tmp_path):
    with pytest.raises(OutputExistsError, match="is a folder"), new_file(tmp_path / "out", overwrite=True) as partial:
        partial.write_text("ours")
        (tmp_path / "out").mkdir()
        if what == "file":
            (tmp_path / "out" / "precious").write_text("1")
    assert inside(tmp_path / "out") == (["precious"] if what == "file" else [])


def test_a_file_in_the_place_of_a_folder_is_refused_before_the_work(tmp_path):
    (tmp_path / "out").write_text("1")
    with pytest.raises(OutputExistsError, match="out is a file, and a folder is to be written there"):
        require_free(tmp_path / "out", overwrite=True, made_by="tokenize")
