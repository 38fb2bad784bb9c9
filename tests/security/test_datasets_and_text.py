"""Datasets that lead out of their folder, text that changes the document it stands in, YAML that grows, answers of a Hub that is none."""

import csv
import html
import io
import json
import os
import re
import types

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from markdown_it import MarkdownIt

from geneformer_hf import GeneformerForSequenceClassification, embed_cells, load_cells, pull_folder, push_folder, stream_tokens, tokenize_corpus
from geneformer_hf.cli.command import listed_genes
from geneformer_hf.cli.main import main
from geneformer_hf.cli.terminal import PrintableStream
from geneformer_hf.data import store_checks
from geneformer_hf.data.tokenized import open_tokenized
from geneformer_hf.errors import CellFileError, CheckpointError, HubError
from geneformer_hf.escaping import markdown
from geneformer_hf.input_files import load_yaml
from geneformer_hf.reports.cards import plain_card, with_base_model
from geneformer_hf.reports.csv_files import write_csv
from tests.conftest import make_cells, tiny_config, write


@pytest.fixture
def dataset(tmp_path, cells, tokenizer):
    load_cells(cells, tokenizer=tokenizer).save_to_disk(tmp_path / "cells")
    load_cells(make_cells(cells.var_names.tolist(), 9, seed=3), tokenizer=tokenizer).save_to_disk(tmp_path / "private")
    return tmp_path / "cells"


def edit_state(folder, **fields):
    path = folder / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


NAMES = ["../private/data-00000-of-00001.arrow", "/etc/passwd", "a\0b", "..", ".", "", "sub/x.arrow", "a\\b", 3, None, ["x"], {"a": 1}]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_shards_outside_the_folder_are_refused_before_they_are_opened(name, dataset, model, tokenizer, tmp_path, capsys, model_folder):
    edit_state(dataset, _data_files=[{"filename": name}])
    for door in (open_tokenized, lambda p: embed_cells(model, p, tokenizer=tokenizer), lambda p: list(stream_tokens(p))):
        with pytest.raises(CellFileError, match=r"state\.json, _data_files names the file .* Nothing of it was opened|holds a text with NUL"):
            door(dataset)
    assert main(["embed", str(dataset), "--model", str(model_folder), "--output", str(tmp_path / "out.parquet")]) == 1
    assert main(["info", str(dataset)]) == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"_data_files": None}, id="no_list"),
        pytest.param({"_data_files": "data-00000-of-00001.arrow"}, id="text"),
        pytest.param({"_data_files": ["data-00000-of-00001.arrow"]}, id="names_in_place_of_objects"),
        pytest.param({"_indices_data_files": [{"filename": "../private/x.arrow"}]}, id="indices"),
        pytest.param({"_format_type": "custom"}, id="a_format_that_calls"),
    ],
)
def test_state_of_another_shape_is_refused(fields, dataset):
    edit_state(dataset, **fields)
    with pytest.raises(CellFileError, match=r"state\.json"):
        open_tokenized(dataset)


def test_linked_shards_are_refused(dataset, tmp_path):
    shard = dataset / "data-00000-of-00001.arrow"
    shard.unlink()
    shard.symlink_to(tmp_path / "private" / "data-00000-of-00001.arrow")
    with pytest.raises(CellFileError, match=r"is a link to .*private.* outside the folder"):
        open_tokenized(dataset)


def test_pushing_a_dataset_publishes_no_other_folder(dataset, hub):
    edit_state(dataset, _data_files=[{"filename": NAMES[0]}])
    with pytest.raises(CellFileError, match="names the file"):
        push_folder(dataset, "lab/cells")
    assert not hub.repositories


def test_columns_that_name_files_are_refused(tmp_path, dataset):
    (tmp_path / "secret.png").write_bytes(b"not for you")
    columns = {"input_ids": [[2, 5, 3]], "photo": [str(tmp_path / "secret.png")]}
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32")), "photo": datasets.Image()})
    hostile = datasets.Dataset.from_dict(columns, features=features)
    hostile.save_to_disk(tmp_path / "hostile")
    info = dict(zip(("info",), [{"features": features.to_dict()}], strict=True))
    schema = pa.schema(
        [("input_ids", pa.list_(pa.int32())), ("photo", features.arrow_schema.field("photo").type)], {"huggingface": json.dumps({"info": info["info"]})}
    )
    pq.write_table(
        pa.table({"input_ids": columns["input_ids"], "photo": [{"bytes": None, "path": columns["photo"][0]}]}, schema=schema), tmp_path / "x.parquet"
    )
    for path in (tmp_path / "hostile", tmp_path / "x.parquet"):
        for door in (open_tokenized, stream_tokens):
            with pytest.raises(CellFileError, match="a column of type 'Image', which opens files that its values name"):
                door(path)


def test_a_type_that_is_no_feature_is_refused_before_it_is_made(dataset):
    path = dataset / "dataset_info.json"
    info = json.loads(path.read_text())
    info["features"]["length"] = {"_type": "BytesIO"}
    path.write_text(json.dumps(info))
    with pytest.raises(CellFileError, match="a column of type 'BytesIO'"):
        open_tokenized(dataset)


def test_splits_outside_the_folder_are_refused(tmp_path, dataset, capsys):
    (tmp_path / "several").mkdir()
    (tmp_path / "several" / "dataset_dict.json").write_text(json.dumps({"splits": ["../private"]}))
    with pytest.raises(CellFileError, match=r"dataset_dict\.json, splits names the file '\.\./private'"):
        push_folder(tmp_path / "several", "lab/cells")
    assert main(["info", str(tmp_path / "several")]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_a_pipe_in_the_place_of_a_shard_is_refused_at_once(dataset):
    shard = dataset / "data-00000-of-00001.arrow"
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(CellFileError, match="named pipe"):
        open_tokenized(dataset)


@pytest.mark.parametrize("name", ["cells.parquet", "data-00000-of-00001.arrow"])
def test_a_pipe_in_a_stream_is_refused_at_once(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(CellFileError, match="named pipe"):
        stream_tokens(tmp_path / name)


@pytest.mark.parametrize(
    "report", ["5", "[1]", "[" * 200_000, '{"encoding": "2", "files": 5}', '{"encoding": "2", "files": [{"cells": "x"}], "left_out_by_filter_pass": []}'],
    ids=["number", "list", "deep", "files", "cells"],
)  # fmt: skip
def test_a_report_of_another_shape_is_no_report(report, dataset, capsys):
    path = dataset / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"description": report}))
    assert main(["info", str(dataset)]) == 0
    assert "Tokenized dataset" in capsys.readouterr().out


HOSTILE = "<script>alert(1)</script>\n# Owned\n[click](javascript:alert(1)) ![x](http://x/y.png) `a` | b"


def test_names_in_a_dataset_card_stay_text(tmp_path, genes, tokenizer):
    folder = tmp_path / "<img src=x onerror=alert(1)> | [a](javascript:b)"
    folder.mkdir()
    cells = make_cells(genes, 6, cell_type=["B"] * 6)
    cells.obs[HOSTILE] = 1.0
    path = write(cells, folder / "# cells [x](javascript:y).h5ad")
    tokenize_corpus([path], tmp_path / "out", tokenizer=tokenizer)
    html = rendered((tmp_path / "out" / "README.md").read_text())
    assert "alert(1)" in html
    assert "javascript:y" in html
    assert not re.findall(r"<(?:script|img|a)[ >]|<h1>Owned", html)
    assert len(re.findall(r"<tr>", html)) == 4


def rendered(card: str) -> str:
    """The text of a card as a forge shows it, HTML in it included."""
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": True}).enable("table").render(card.split("---\n", 2)[2])


def test_a_model_card_shows_hostile_names_as_text():
    html = rendered(plain_card("model", None, name=HOSTILE, base="[b](javascript:c)"))
    assert html.startswith("<h1>&lt;script&gt;alert(1)&lt;/script&gt; # Owned [click](javascript:alert(1)) ![x](http://x/y.png) `a` | b</h1>")
    assert "of [b](javascript:c), shared" in html


def test_control_characters_do_not_reach_a_terminal(tmp_path, genes, capsys):
    name = "x\x1b[2J\x1b]0;owned\x07\u202e"
    path = write(make_cells(genes, 6, **{name: np.arange(6.0)}), tmp_path / "cells.h5ad")
    assert main(["info", str(path)]) == 0
    assert main(["info", str(tmp_path / "\x1b[2Jgone.h5ad")]) == 1
    out, err = capsys.readouterr()
    assert "x\\x1b[2J\\x1b]0;owned\\x07\\u202e" in out
    assert "\\x1b[2Jgone.h5ad" in err
    assert not {"\x1b", "\x07", "\u202e"} & set(out + err)


def test_progress_bars_still_draw_over_themselves():
    stream = io.StringIO()
    PrintableStream(stream).write("\r 50%|\x1b[31m|")
    assert stream.getvalue() == "\r 50%|\\x1b[31m|"


def test_formulas_in_csv_files_are_text(tmp_path):
    table = pd.DataFrame(
        {"name": ["=1+1", "+cmd|x", "-2+3", "@SUM(A1)", "\t=1", "CD4+ T", "-1.5", None], "value": [-1.0, 2, 3, 4, 5, 6, 7, 8], "=bad": 1},
        index=pd.Index(["=a", *"bcdefgh"], name="cell"),
    )
    write_csv(table, tmp_path / "t.csv")
    rows = list(csv.reader((tmp_path / "t.csv").read_text().splitlines()))
    assert rows[0] == ["cell", "name", "value", "'=bad"]
    assert [row[1] for row in rows[1:]] == ["'=1+1", "'+cmd|x", "'-2+3", "'@SUM(A1)", "'\t=1", "CD4+ T", "-1.5", ""]
    assert [row[0] for row in rows[1:3]] == ["'=a", "b"]
    assert rows[1][2] == "-1.0"
    assert table["name"].iloc[0] == "=1+1"


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]", "[" * 100_000, "? " * 100_000], ids=["aliases", "itself", "deep", "keys"])
def test_yaml_that_grows_without_bound_is_refused(text, tmp_path, capsys):
    with pytest.raises(CellFileError, match="settings"):
        load_yaml(text, "settings")
    (tmp_path / "run.yaml").write_text(text)
    for command in ("pretrain", "finetune", "benchmark"):
        assert main([command, "--config", str(tmp_path / "run.yaml"), "--output_dir" if command != "benchmark" else "--output", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert "run.yaml" in error
        assert "Traceback" not in error


@pytest.mark.parametrize(
    "text", ["a: " + "1:" * 300_000 + "1", "seed: 0x" + "f" * 6000, "a: !!bool x", "a: !!timestamp x", "a: 1" + "0" * 5000], ids=lambda t: t[:12]
)
def test_yaml_values_that_take_forever_or_are_none_are_refused(text):
    with pytest.raises(CellFileError, match=r"holds a number of|is not valid YAML"):
        load_yaml(text, "w")


def test_labels_of_rows_are_no_formulas():
    for index in (pd.CategoricalIndex(["=i", "j"]), pd.Index(["=i", "j"], dtype="string"), pd.MultiIndex.from_tuples([("=i", 1), ("j", 2)])):
        text = write_csv(pd.DataFrame({"a": [" =1", "\n@x"]}, index=index.rename("=idx" if index.nlevels == 1 else ["=idx", "n"])))
        rows = list(csv.reader(io.StringIO(text)))
        assert rows[0][0] == "'=idx"
        assert rows[1][0] == "'=i"
        assert [row[-1] for row in rows[1:]] == ["' =1", "'\n@x"]


def test_predictions_of_cells_named_as_formulas_are_text(tokenizer, genes, tmp_path):
    GeneformerForSequenceClassification(tiny_config(tokenizer, num_labels=3, pooling="mean")).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    cells = make_cells(genes, 3)
    cells.obs_names = ["=cmd|x0", "@a", "c"]
    path = write(cells, tmp_path / "cells.h5ad")
    assert main(["predict", str(path), "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out.csv")]) == 0
    rows = list(csv.reader(io.StringIO((tmp_path / "out.csv").read_text())))
    assert [row[0] for row in rows[1:]] == ["'=cmd|x0", "'@a", "c"]


def test_front_matter_with_the_ends_of_lines_of_windows_is_bounded():
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    text = f"---\n{bomb}---\nx"
    for card in (text, text.replace("\n", "\r\n"), "\ufeff" + text):
        with pytest.raises(CheckpointError, match="aliases"):
            with_base_model(card, "lab/x")


def test_yaml_with_a_few_aliases_is_read():
    assert load_yaml("a: &a {x: 1}\nb: *a\nc: [*a, *a]", "settings") == {"a": {"x": 1}, "b": {"x": 1}, "c": [{"x": 1}, {"x": 1}]}


def test_front_matter_that_grows_is_refused():
    with pytest.raises(CheckpointError, match=r"values, .* levels deep, once its aliases"):
        with_base_model(f"---\n{BOMB}---\n\ntext\n", "lab/base")


def test_an_answer_of_the_hub_without_an_id_is_refused(hub, model_folder, tmp_path, monkeypatch):
    push_folder(model_folder, "lab/model")
    import huggingface_hub.hf_api as client

    real = client.ModelInfo.__init__
    monkeypatch.setattr(client.ModelInfo, "__init__", lambda self, **fields: real(self, **{k: v for k, v in fields.items() if k != "id"}))
    with pytest.raises(HubError, match=r"lab/model .*: the answer of the Hub lacks what the client expects \(KeyError: 'id'\)"):
        pull_folder("lab/model", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


HOSTILE_TYPES = {
    "a_function_of_pyarrow": {"dtype": "show_info", "_type": "Value"},
    "another_one": {"dtype": "get_library_dirs", "_type": "Value"},
    "no_text": {"dtype": 5, "_type": "Value"},
    "a_list": {"dtype": ["string"], "_type": "Value"},
    "a_file_of_labels": {"names_file": "/etc/passwd", "_type": "ClassLabel"},
    "no_labels": {"_type": "ClassLabel"},
    "labels_twice": {"names": ["a", "a"], "_type": "ClassLabel"},
    "an_image_in_a_list": {"feature": {"_type": "Image"}, "_type": "List"},
    "a_list_of_nothing": {"_type": "List"},
    "an_unknown_type": {"_type": "Nope"},
    "a_type_that_is_a_list": {"_type": ["Value"]},
    "text": "int32",
}


@pytest.mark.parametrize("name", list(HOSTILE_TYPES))
def test_types_that_call_functions_or_open_files_are_refused_wherever_they_stand(name, dataset, tmp_path, capfd):
    description = {"info": {"features": {"input_ids": {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"}, "odd": HOSTILE_TYPES[name]}}}
    table = pa.table({"input_ids": [[2, 5, 3]], "odd": ["a"]}).replace_schema_metadata({"huggingface": json.dumps(description)})
    pq.write_table(table, tmp_path / "x.parquet")
    info = json.loads((dataset / "dataset_info.json").read_text())
    (dataset / "dataset_info.json").write_text(json.dumps(info | {"features": description["info"]["features"]}))
    described = tmp_path / "described"
    described.mkdir()
    (described / "state.json").write_text((dataset / "state.json").read_text())
    with pa.OSFile(str(described / "data-00000-of-00001.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    for path in (tmp_path / "x.parquet", dataset, described):
        for door in (open_tokenized, stream_tokens):
            with pytest.raises(CellFileError, match="odd"):
                door(path)
    # pyarrow's show_info prints.
    assert "pyarrow" not in capfd.readouterr().out


def test_types_that_hold_values_are_read(tmp_path):
    features = datasets.Features(
        {"input_ids": datasets.List(datasets.Value("uint16")), "time": datasets.Value("timestamp[us, tz=Europe/Berlin]"), "x": {"y": datasets.Value("decimal128(10, 2)")},
         "kind": datasets.ClassLabel(names=["a"]), "day": datasets.Value("date32"), "m": datasets.Array2D((1, 2), "float32"), "_type": datasets.Value("bool")}
    )  # fmt: skip
    row = {"input_ids": [1], "time": None, "x": {"y": None}, "kind": 0, "day": None, "m": [[1.0, 2.0]], "_type": True}
    datasets.Dataset.from_list([row], features=features).save_to_disk(tmp_path / "a")
    assert open_tokenized(tmp_path / "a").features == features


DAMAGES = {
    "fifo": (os.mkfifo, r"is a named pipe \(FIFO\)"),
    "loop": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a character device"),
    "binary": (lambda path: path.write_bytes(b"\xff\xfe\0"), "utf-8"),
    "wide": (lambda path: path.write_bytes(b"x," * 20_000), "20,001 columns in its first line|holds a list|expected|not in"),
    "empty": (lambda path: path.write_bytes(b""), "empty|No columns|no genes|expected"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("door", ["medians", "qc", "stats", "perturb", "benchmark"])
def test_files_beside_the_cells_are_checked_too(door, damage, genes, model_folder, tmp_path, capsys):
    make, expected = DAMAGES[damage]
    cells, side, output = str(write(make_cells(genes, 4), tmp_path / "cells.h5ad")), tmp_path / "side.csv", tmp_path / "out.csv"
    make(side)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "table.parquet")
    arguments = {
        "medians": ["medians", cells, "--gene-biotypes", str(side), "--output", str(tmp_path / "out.json")],
        "qc": ["qc", cells, "--no-doublets", "--gene-biotypes", str(side), "--output", str(output)],
        "stats": ["stats", str(tmp_path / "table.parquet"), "--mode", "effects", "--donors", str(side), "--output", str(output)],
        "perturb": ["perturb", cells, "--model", str(model_folder), "--kind", "delete", "--genes", str(side), "--plan-only"],
        "benchmark": ["benchmark", "--config", str(side), "--output", str(output)],
    }
    before = set(tmp_path.rglob("*"))
    assert main(arguments[door]) == 1
    assert re.search(expected, message := capsys.readouterr().err), message
    assert len(message) < 3000
    assert set(tmp_path.rglob("*")) == before


def test_a_list_of_genes_longer_than_a_file_name(genes):
    assert listed_genes(",".join(genes)) == genes


def test_info_names_a_pipe(tmp_path, capsys):
    os.mkfifo(tmp_path / "cells.h5ad")
    assert main(["info", str(tmp_path / "cells.h5ad")]) == 1
    assert "cells.h5ad is a named pipe (FIFO)" in capsys.readouterr().err


def test_a_row_of_more_ids_than_memory_is_refused(tmp_path, monkeypatch):
    # 600 bytes that stand for a million ids.
    pq.write_table(pa.table({"input_ids": [np.zeros(10**6, np.int64)], "length": [10**6]}), tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").stat().st_size < 10_000
    assert len(next(iter(stream_tokens(tmp_path / "x.parquet")))["input_ids"]) == 10**6
    monkeypatch.setattr(store_checks.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=10**7))
    with pytest.raises(CellFileError, match=r"x\.parquet: row group 0 of 1 cells and 1,000,001 values would take 0\.0 GB of memory"):
        stream_tokens(tmp_path / "x.parquet")


def test_pages_of_parquet_that_are_damaged_are_named(tmp_path):
    pq.write_table(pa.table({"input_ids": [list(range(1000))], "length": [1000]}), tmp_path / "x.parquet", compression="gzip")
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    content[60:200] = bytes(140)
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(CellFileError, match=r"x\.parquet: row group 0 cannot be read"):
        list(stream_tokens(tmp_path / "x.parquet"))


MARKDOWN = (
    *(
        "___",
        "*em*",
        "_em_",
        "__b__",
        "a_b_c",
        "cell_type_",
        "~~x~~",
        "https://evil.example/a_b",
        "www.evil.example",
        "me@evil.example",
        "***",
        "---",
        "1. x",
        "# h",
    ),
    *(
        "+ x",
        "HLA-DR*04:01",
        "\\*",
        "![x](y)",
        "[x](javascript:y)",
        "<b>",
        "&amp;",
        "`x`",
        "a|b",
        "CD4+ T",
        "2) x",
        "~~~",
        "```",
        "===",
        "x  \ny",
        "[^1]: n",
        "- [ ] x",
    ),
)


@pytest.mark.parametrize("text", MARKDOWN)
def test_any_text_is_shown_as_it_is(text):
    shown = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown(text))
    assert re.fullmatch(r"<p>(.*)</p>\n", shown)[1] == html.escape(" ".join(text.split()), quote=False)
    # What GitHub and the Hub make a link of by themselves.
    assert not re.search(r"https?://|www\.|\w@\w", markdown(text))
