"""Fixtures: a small vocabulary, random cells, tiny models, files in every layout."""

from __future__ import annotations

import os

# Before anything imports huggingface_hub or torch.
from tests.hub import HUB, Hub  # isort: split

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from geneformer_hf import GeneformerConfig, GeneformerForMaskedLM, GeneformerTokenizer, GeneTable
from geneformer_hf.models import places

N_GENES = 60


def pytest_collection_modifyitems(items):
    for item in items:
        if "shared" in item.keywords and not shared_folder().is_dir():
            item.add_marker(pytest.mark.skip(reason=f"no shared data at {shared_folder()} (GENEFORMER_HF_SHARED)"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def shared_folder() -> Path:
    return Path(os.environ.get("GENEFORMER_HF_SHARED", Path(__file__).parents[1] / ".." / "shared")).resolve()


@pytest.fixture
def shared() -> Path:
    return shared_folder()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Datasets are cached in the test's own folder."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets-cache")
    datasets.disable_progress_bars()


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Hub:
    """The stand-in, empty; this process is online, logged in, and has a cache of its own."""
    import datasets
    import huggingface_hub

    HUB.clear()
    places._checked.clear()
    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    # The client waits longer and longer between its tries.
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    return HUB


@pytest.fixture
def offline(monkeypatch):
    """Call it, and this process may not ask the Hub any more."""
    import datasets
    import huggingface_hub

    def switch():
        for module in (huggingface_hub.constants, datasets.config):
            monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)

    return switch


def ensembl(i: int) -> str:
    return f"ENSG{i:011d}"


@pytest.fixture(scope="session")
def genes() -> list[str]:
    return [ensembl(i) for i in range(1, N_GENES + 1)]


@pytest.fixture(scope="session")
def table(genes) -> GeneTable:
    """Gene i is token i + 4; the first four have equal medians, so ties occur."""
    medians = np.random.default_rng(0).lognormal(0, 1, N_GENES)
    medians[:4] = 1.0
    return GeneTable(genes, range(4, N_GENES + 4), medians, [f"SYM{i}" for i in range(N_GENES)], {ensembl(9001): genes[0], "OLDSYM": genes[1]})


@pytest.fixture(scope="session")
def v1_tokenizer(genes) -> GeneformerTokenizer:
    return GeneformerTokenizer(gene_table=GeneTable(genes, range(2, N_GENES + 2), np.linspace(0.5, 3, N_GENES)), model_max_length=64)


@pytest.fixture(scope="session")
def tokenizer(table) -> GeneformerTokenizer:
    return GeneformerTokenizer(gene_table=table, cls_token="<cls>", eos_token="<eos>", model_max_length=64)


def tiny_config(tokenizer: GeneformerTokenizer, **overrides) -> GeneformerConfig:
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    ids = {"cls_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.eos_token_id}
    return GeneformerConfig(vocab_size=len(tokenizer), vocabulary_fingerprint=tokenizer.gene_table.fingerprint, **(shape | ids | overrides))


@pytest.fixture(scope="session")
def model(tokenizer) -> GeneformerForMaskedLM:
    torch.manual_seed(0)
    return GeneformerForMaskedLM(tiny_config(tokenizer)).eval()


@pytest.fixture(scope="session")
def v1_model(v1_tokenizer) -> GeneformerForMaskedLM:
    torch.manual_seed(1)
    return GeneformerForMaskedLM(tiny_config(v1_tokenizer)).eval()


@pytest.fixture
def model_folder(tmp_path, model, tokenizer) -> Path:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def random_counts(n: int, g: int, seed: int = 0, density: float = 0.4) -> sp.csr_matrix:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(4, (n, g)) * (rng.random((n, g)) < density)
    return sp.csr_matrix(counts.astype(np.float32))


def with_row(counts: sp.csr_matrix, row: int, value: float) -> sp.csr_matrix:
    """Set every gene of one cell."""
    dense = counts.toarray()
    dense[row] = value
    return sp.csr_matrix(dense)


def make_cells(genes: list[str], n: int = 30, seed: int = 0, **obs) -> anndata.AnnData:
    counts = random_counts(n, len(genes), seed)
    frame = pd.DataFrame(obs or {"cell_type": pd.Categorical(["B", "T", "NK"] * (n // 3) + ["B"] * (n % 3))}, index=[f"cell{i}" for i in range(n)])
    return anndata.AnnData(counts, frame, pd.DataFrame(index=genes))


@pytest.fixture
def cells(genes) -> anndata.AnnData:
    return make_cells(genes)


def write(adata: anndata.AnnData, path: Path, layout: str = "csr") -> Path:
    adata = adata.copy()
    if layout == "csc":
        adata.X = sp.csc_matrix(adata.X)
    elif layout == "dense":
        adata.X = adata.X.toarray()
    adata.write_h5ad(path, compression="gzip" if layout == "gzip" else None)
    return path


@pytest.fixture
def h5ad(tmp_path, cells) -> Path:
    return write(cells, tmp_path / "cells.h5ad")
