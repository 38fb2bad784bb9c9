"""The demo as a newcomer runs it, and checkpoints of the published shapes on real cells."""

import json
import subprocess
import sys

import anndata
import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from geneformer_hf import GeneformerConfig
from tests import reference
from tests.tolerances import NAIVE_TWIN

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def command(*arguments, timeout=900):
    done = subprocess.run([sys.executable, "-m", "geneformer_hf.cli.main", *map(str, arguments)], capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_demo(tmp_path):
    printed = command("demo", "--output", tmp_path / "demo")
    folder = tmp_path / "demo"
    assert sorted(p.name for p in folder.iterdir()) == [
        ".geneformer_hf.json",
        "classifier",
        "figures.json",
        "loss.png",
        "model",
        "pbmc_geneformer.h5ad",
        "umap_cell_type.png",
    ]
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["loss_model"] < figures["loss_gene_frequency"] - 1
    assert figures["loss_rank_frequency"] < figures["loss_gene_frequency"]
    assert 0.25 < figures["accuracy_majority"] < 0.4
    for name in ("untrained", "trained"):
        assert figures["accuracy_majority"] < figures[f"accuracy_{name}"] < 1
    assert "does not make good embeddings" in printed
    assert figures["accuracy_finetuned"] > figures["accuracy_majority"] + 0.15
    assert figures["accuracy_regression"] > figures["accuracy_majority"] + 0.3
    report = json.loads((folder / "classifier" / "figures.json").read_text())
    assert report["heads"]["cell_type"]["this model"]["accuracy"] == figures["accuracy_finetuned"]
    adata = anndata.read_h5ad(folder / "pbmc_geneformer.h5ad")
    assert adata.obsm["X_geneformer"].shape == (700, 128)
    assert np.isfinite(adata.obsm["X_umap"]).all()
    # The three commands it proposes, but for the one that needs a network.
    lines = printed[printed.index("Try next") :].splitlines()[1:]
    proposed = [line.split("#")[0].split()[1:] for line in lines if line.strip()]
    assert [words[0] for words in proposed] == ["info", "embed", "predict", "convert"]
    command(*proposed[0])
    for words in proposed[1:3]:
        command(*[str(tmp_path / word) if word in ("embedded.h5ad", "predicted.h5ad") else word for word in words])
    assert np.abs(anndata.read_h5ad(tmp_path / "embedded.h5ad").obsm["X_geneformer"] - adata.obsm["X_geneformer"]).max() < 1e-5
    predicted = anndata.read_h5ad(tmp_path / "predicted.h5ad").obs
    held_out = predicted[predicted["held_out"]]
    assert (held_out["cell_type_predicted"].astype(str) == held_out["cell_type"].astype(str)).mean() == pytest.approx(figures["accuracy_finetuned"])


def test_the_demo_repeats_with_its_seed(tmp_path):
    figures = []
    for name in ("a", "b"):
        command("demo", "--output", tmp_path / name, "--epochs", "1", "--seed", "3")
        figures.append(json.loads((tmp_path / name / "figures.json").read_text()))
    assert figures[0] == pytest.approx(figures[1], abs=1e-4)


@pytest.mark.shared
@pytest.mark.parametrize(("preset", "version"), [("Geneformer-V1-10M", "v1"), ("Geneformer-V2-104M", "v2")])
def test_published_shapes_with_the_real_dictionaries_embed_real_cells(preset, version, shared, tmp_path):
    """Random weights of the published shape, the real dictionaries, real cells: convert, open, embed, compare."""
    config = GeneformerConfig.from_preset(preset)
    known = BertConfig().to_dict()
    torch.manual_seed(0)
    plain = BertForMaskedLM(BertConfig(**{k: v for k, v in config.to_dict().items() if k in known and k not in ("model_type", "architectures")})).eval()
    plain.save_pretrained(tmp_path / preset)
    printed = command("convert", tmp_path / preset, tmp_path / "converted", "--dictionaries", shared / "data" / f"geneformer_dicts_{version}")
    assert "all token ids equal the source" in printed
    adata = anndata.read_h5ad(shared / "data" / "pbmc3k" / "pbmc3k_raw_annotated.h5ad")
    # Minutes of each; the other cells are embedded by the benchmarks.
    adata = adata[: 600 if version == "v1" else 60].copy()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    command("tokenize", tmp_path / "cells.h5ad", "--model", tmp_path / "converted", "--output", tmp_path / "tokens")
    command("embed", tmp_path / "cells.h5ad", "--model", tmp_path / "converted", "--output", tmp_path / "out.h5ad")
    embedded = anndata.read_h5ad(tmp_path / "out.h5ad").obsm["X_geneformer"]
    assert embedded.shape == (adata.n_obs, config.hidden_size)
    assert np.isfinite(embedded).all()
    import datasets

    tokens = datasets.load_from_disk(str(tmp_path / "tokens"))
    plain.config.cls_token_id, plain.config.eos_token_id = config.cls_token_id, config.eos_token_id
    pooling = "mean" if version == "v1" else "cls"
    for row in (0, 7, adata.n_obs - 1):
        expected = reference.embed_cell(plain, tokens[row]["input_ids"], -2, pooling)
        np.testing.assert_allclose(embedded[row], expected, atol=NAIVE_TWIN)
