"""Examples and how-tos of sharing, against the stand-in."""

import re

import anndata
import pytest

from geneformer_hf import GeneformerTokenizer
from tests.conftest import make_cells
from tests.hub.test_published import published  # noqa: F401 - a fixture
from tests.test_examples import ARGUMENTS, ROOT, folder, run  # noqa: F401 - a fixture


def test_share_model(hub, tune, tmp_path, labelled):
    labelled.write_h5ad(tmp_path / "cells.h5ad")
    printed = run([ROOT / "examples" / "share_model.py"], tmp_path, tune().folder, *ARGUMENTS["share_model.py"][1:])
    assert "model of " in printed
    assert "the same labels as from the folder: True" in printed
    assert hub.repositories["model", "lab/pbmc-types"].private


def test_share_dataset(hub, folder):  # noqa: F811
    printed = run([ROOT / "examples" / "share_dataset.py"], folder, *ARGUMENTS["share_dataset.py"])
    assert "30 cells, embedded: (30, 16)" in printed
    assert re.search(r"the first cell of the stream: cell0, \d+ tokens", printed)


def test_load_published(hub, published, tmp_path, tokenizer):  # noqa: F811
    from tests.conftest import ensembl

    make_cells([ensembl(i) for i in range(1, 16)], 8).write_h5ad(tmp_path / "cells.h5ad")
    printed = run([ROOT / "examples" / "load_published.py"], tmp_path, *ARGUMENTS["load_published.py"])
    assert "ctheodoris/Geneformer/Geneformer-V1-10M (revision f45a6c7" in printed
    assert "(8, 16); the same embeddings: True" in printed


def test_the_how_to_of_sharing(hub, published, tune, tmp_path, folder, tokenizer, labelled):  # noqa: F811
    text = (ROOT / "docs" / "sharing.md").read_text()
    run(["-m", "geneformer_hf", "tokenize"], folder, "cells.h5ad", "--model", "geneformer-v2", "--output", "tokens")
    labelled.write_h5ad(folder / "new.h5ad")
    tune("run")
    (block,) = re.findall(r"```bash\n(.*?)```", text, re.S)
    for line in block.splitlines()[1:]:
        run(["-m", "geneformer_hf"], folder, *line.split("  #")[0].split()[1:])
    assert (folder / "predicted.csv").is_file()
    shared, by_name = re.findall(r"```python\n(.*?)```", text, re.S)
    printed = run(["-c", shared], folder)
    assert "(30, 16)" in printed
    assert "GeneformerForMaskedLM" in printed
    assert GeneformerTokenizer.from_pretrained(folder / "again").get_vocab() == tokenizer.get_vocab()
    run(["-c", by_name + "\nassert len(tokenizer) == model.config.vocab_size"], folder)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cell_pipelines.py", r"30 cells, 16 dimensions(.*\n)+.*genes were hidden"),
        ("export_onnx.py", r"head\.onnx: \de-0\d from torch\nencoder: embeddings 0\.00% .*\nencoder_int8: embeddings \d"),
    ],
)
def test_examples_without_a_network(folder, name, expected):  # noqa: F811
    printed = run([ROOT / "examples" / name], folder, *ARGUMENTS[name])
    assert re.search(expected, printed), printed


def test_the_how_tos_of_pipelines_and_exporting(folder):  # noqa: F811
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "pipelines.md").read_text(), re.S)
    assert "(30, 16) ['cell_id', 'position'" in run(["-c", block], folder)
    text = (ROOT / "docs" / "exporting.md").read_text()
    for line in re.findall(r"```bash\n(.*?)```", text, re.S)[0].splitlines():
        run(["-m", "geneformer_hf"], folder, *line.split("  #")[0].split()[1:])
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert "(30, 16)" in run(["-c", block + "\nprint(embedded.shape, logits.shape)"], folder)
    assert anndata.read_h5ad(folder / "cells.h5ad").n_obs == 30
