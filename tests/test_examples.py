"""Every example and every Python block of the README runs, as its own process, on a small model."""

import re
import subprocess
import sys
from pathlib import Path

import anndata
import datasets
import numpy as np
import pytest

from geneformer_hf import GeneformerPretrainingArguments, GeneformerTokenizer, load_cells
from geneformer_hf.genes import human_genes
from geneformer_hf.training.configs import read_config
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
    "pretrain.py": ["tokens", "geneformer-v2", "run"],
    "continue_pretraining.py": ["geneformer-v2", "new", "old", "tuned"],
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


def test_pretrain(folder):
    run([ROOT / "examples" / "tokenize_files.py"], folder, *ARGUMENTS["tokenize_files.py"])
    printed = run([ROOT / "examples" / "pretrain.py"], folder, *ARGUMENTS["pretrain.py"])
    assert re.search(r"held-out loss \d\.\d\d; gene frequency \d\.\d\d nats\nGeneformerForMaskedLM in run.model", printed)


def test_continue_pretraining(folder, tokenizer):
    for name, seed in (("new", 1), ("old", 2)):
        load_cells(make_cells(list(tokenizer.gene_table.ensembl_ids), 30, seed=seed), tokenizer=tokenizer, cache_dir=folder / "cache").save_to_disk(
            folder / name
        )
    printed = run([ROOT / "examples" / "continue_pretraining.py"], folder, *ARGUMENTS["continue_pretraining.py"])
    assert re.fullmatch(r"(?:(?:new|old): held-out loss \d\.\d{3} before, \d\.\d{3} after\n){2}", printed)


def test_the_yaml_of_the_how_to(folder):
    """The first block of docs/pretraining.md, with a smaller shape, and the one that names datasets."""
    run(["-m", "geneformer_hf", "tokenize"], folder, "cells.h5ad", "--model", "geneformer-v2", "--output", "tokens")
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "pretraining.md").read_text(), re.S)
    (folder / "run.yaml").write_text(blocks[0].replace("held_out: 1000", "held_out: 5"))
    small = '{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}'
    printed = run(["-m", "geneformer_hf", "pretrain"], folder, "--config", "run.yaml", "--shape_overrides", small, "--max_steps", "2")
    assert "5 held-out cells" in printed
    for number, block in enumerate(blocks[1:]):
        (folder / f"{number}.yaml").write_text(block)
        assert read_config(folder / f"{number}.yaml", GeneformerPretrainingArguments)


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
