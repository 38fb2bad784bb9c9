"""Every example and every Python block of the README runs, as its own process, on a small model."""

import re
import subprocess
import sys
from pathlib import Path

import anndata
import datasets
import numpy as np
import pytest

from geneformer_hf import GeneformerTokenizer
from geneformer_hf.genes import human_genes
from tests.conftest import make_cells

ROOT = Path(__file__).parents[1]
ARGUMENTS = {
    "embed_pbmc.py": ["cells.h5ad", "geneformer-v2", "out.h5ad"],
    "tokenize_files.py": ["*.h5ad", "geneformer-v2", "tokens"],
    "own_vocabulary.py": ["cells.h5ad", "mine"],
    "predict_hidden_genes.py": ["cells.h5ad", "geneformer-v2"],
    "filter_cells.py": ["cells.h5ad", "checked.h5ad"],
    "stream_batches.py": ["*.h5ad", "geneformer-v2"],
    "tokenize_corpus.py": ["*.h5ad", "geneformer-v2", "tokens"],
}


@pytest.fixture
def folder(h5ad, model_folder, tmp_path):
    model_folder.rename(tmp_path / "geneformer-v2")
    return tmp_path


def run(code, folder, *arguments):
    done = subprocess.run([sys.executable, *code, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested():
    assert {p.name for p in (ROOT / "examples").glob("*.py")} == set(ARGUMENTS)


def test_embed_pbmc(folder):
    assert "30 cells, 16 dimensions" in run([ROOT / "examples" / "embed_pbmc.py"], folder, *ARGUMENTS["embed_pbmc.py"])
    assert anndata.read_h5ad(folder / "out.h5ad").obsm["X_geneformer"].shape == (30, 16)


def test_tokenize_files(folder):
    assert "30 cells -> tokens" in run([ROOT / "examples" / "tokenize_files.py"], folder, *ARGUMENTS["tokenize_files.py"])
    assert len(datasets.load_from_disk(str(folder / "tokens"))) == 30


def test_own_vocabulary(folder):
    assert "60 genes, medians of 30 cells" in run([ROOT / "examples" / "own_vocabulary.py"], folder, *ARGUMENTS["own_vocabulary.py"])
    assert len(GeneformerTokenizer.from_pretrained(folder / "mine").gene_table) == 60


def test_predict_hidden_genes(folder):
    printed = run([ROOT / "examples" / "predict_hidden_genes.py"], folder, *ARGUMENTS["predict_hidden_genes.py"])
    assert re.search(r"hidden: ENSG\d{11}\n(?:.+  [01]\.\d{4}\n){5}", printed)


def test_filter_cells(folder):
    coding = sorted(gene for gene, kind in human_genes().biotype_of.items() if kind == "protein_coding")[:60]
    make_cells(coding, 30).write_h5ad(folder / "cells.h5ad")
    assert "30 of 30 cells pass -> checked.h5ad" in run([ROOT / "examples" / "filter_cells.py"], folder, *ARGUMENTS["filter_cells.py"])
    assert anndata.read_h5ad(folder / "checked.h5ad").obs["filter_pass"].all()


def test_stream_batches(folder):
    printed = run([ROOT / "examples" / "stream_batches.py"], folder, *ARGUMENTS["stream_batches.py"])
    assert "resumed: 22 cells left, none of them seen: True" in printed


def test_tokenize_corpus(folder):
    assert "30 cells of 1 files -> tokens; 0 files skipped" in run([ROOT / "examples" / "tokenize_corpus.py"], folder, *ARGUMENTS["tokenize_corpus.py"])
    assert len(datasets.load_from_disk(str(folder / "tokens"))) == 30


def test_the_stream_of_the_how_to(folder):
    """The block of docs/large_corpora.md, on a dataset made by the command before it."""
    run(["-m", "geneformer_hf.cli.main", "tokenize"], folder, "cells.h5ad", "--model", "geneformer-v2", "--output", "tokens")
    rows, batches = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "large_corpora.md").read_text(), re.S)
    assert run(["-c", rows.replace("...", "print(cell['cell_id'])")], folder).count("cell") == 90
    assert run(["-c", batches.replace("...", "print(len(batch['input_ids']))")], folder).split() == ["16", "14"]


def test_the_python_of_the_readme(folder):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 2
    assert all(sum(bool(line) for line in block.splitlines()) <= 5 for block in blocks)
    run(["-c", blocks[0] + "\nimport numpy; numpy.save('a.npy', adata.obsm['X_geneformer'])"], folder)
    run(["-c", blocks[1] + "\nimport numpy; numpy.save('b.npy', embeddings)"], folder)
    np.testing.assert_allclose(np.load(folder / "a.npy"), np.load(folder / "b.npy"), atol=1e-5)
    assert np.isfinite(np.load(folder / "a.npy")).all()


def test_the_commands_of_the_readme_exist():
    from geneformer_hf.cli.main import COMMANDS

    named = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), re.M))
    assert named == {command.name for command in COMMANDS}


def test_links_between_documents_lead_somewhere():
    for document in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
