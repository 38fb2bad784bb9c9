"""A small corpus and runs of a second."""

from __future__ import annotations

from pathlib import Path

import anndata
import datasets
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from geneformer_hf import GeneformerFineTuningArguments, GeneformerForMaskedLM, GeneformerPretrainingArguments, finetune, pretrain
from tests.conftest import tiny_config

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64, "initializer_range": 0.2}
NO_DROPOUT = SHAPE | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def make_tokens(n: int, seed: int = 0, low: int = 4, high: int = 64) -> datasets.Dataset:
    """Cells of 5 to 50 genes; those of up to 30 hold one half of the vocabulary alone, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    cells = []
    for _ in range(n):
        genes = low + rng.permutation(high - low)
        half = (low + high) // 2
        order = np.argsort(genes >= half if rng.random() < 0.5 else genes < half, kind="stable")
        cells.append([2, *genes[order][: rng.integers(5, 51 if rng.random() < 0.2 else 20)].tolist(), 3])
    return datasets.Dataset.from_dict({"input_ids": cells, "length": [len(cell) for cell in cells]})


@pytest.fixture(scope="session")
def tokens() -> datasets.Dataset:
    return make_tokens(100)


@pytest.fixture(scope="session")
def other_tokens() -> datasets.Dataset:
    return make_tokens(60, seed=9, low=30)


@pytest.fixture
def settings(tmp_path):
    """Settings of a run of 24 steps, in a folder of this test."""

    def make(name="run", **more):
        usual = {
            "output_dir": str(tmp_path / name), "shape": "gf-6L-30M-i2048", "shape_overrides": NO_DROPOUT, "per_device_train_batch_size": 8, "num_train_epochs": 2,
            "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "held_out": 0.1, "eval_strategy": "no",
        }  # fmt: skip
        return usual | more

    return make


@pytest.fixture
def run(settings, tokens, tokenizer):
    """Train on the small corpus; keyword arguments are settings."""

    def go(name="run", *, data=None, eval_data=None, eval_paths=None, model=None, callbacks=(), **more):
        # A model that is given needs no shape.
        given = {"shape": None, "shape_overrides": None} if model is not None or "from_checkpoint" in more else {}
        arguments = GeneformerPretrainingArguments(**(settings(name, **(given | more | {"eval_data": eval_paths}))))
        found = tokens if data is None else data or None
        return pretrain(arguments, found, eval_data=eval_data, tokenizer=tokenizer, model=model, callbacks=callbacks)

    return go


def losses(found) -> list[float]:
    return [float(entry["loss"]) for entry in found.history if "loss" in entry]


def norms(found) -> list[float]:
    return [float(entry["grad_norm"]) for entry in found.history if "grad_norm" in entry]


def make_labelled(genes: list[str], n: int = 120, seed: int = 0) -> anndata.AnnData:
    """Cells of three types, each with twenty genes of its own that it expresses most; six donors, an age that one gene follows, two markers."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 3, n)
    rates = np.full((n, len(genes)), 0.4)
    for i, kind in enumerate(kinds.tolist()):
        rates[i, kind * 20 : kind * 20 + 20] = 6.0
    age = rng.uniform(20, 80, n)
    counts = sp.csr_matrix(rng.poisson(rates).astype(np.float32))
    names = np.array(["B", "NK", "T"])[kinds]
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(names),
            "donor": pd.Categorical([f"d{i}" for i in rng.integers(0, 6, n)]),
            "age": kinds * 20.0 + 30 + rng.normal(0, 1, n),
            "sex": pd.Categorical(rng.choice(["f", "m"], n)),
            "is_lymphoid": (kinds > 0).astype(int),
            "is_t": (kinds == 2).astype(int),
            "years": age,
        },
        index=[f"cell{i}" for i in range(n)],
    )
    return anndata.AnnData(counts, obs, pd.DataFrame(index=genes))


@pytest.fixture(scope="session")
def labelled(genes) -> anndata.AnnData:
    return make_labelled(genes)


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer) -> Path:
    """A pretrained model, as far as anybody here can tell."""
    folder = tmp_path_factory.mktemp("base") / "model"
    torch.manual_seed(3)
    GeneformerForMaskedLM(tiny_config(tokenizer, num_hidden_layers=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tune(tmp_path, base, labelled):
    """Fine-tune on the labelled cells; keyword arguments are settings."""

    def go(name="run", *, cells=None, callbacks=(), validation_data=None, test_data=None, gene_classes=None, **more):
        usual = {
            "output_dir": str(tmp_path / name), "from_checkpoint": str(base), "label": None if gene_classes is not None or "gene_classes" in more else ["cell_type"], "num_train_epochs": 3,
            "per_device_train_batch_size": 8, "learning_rate": 1e-2, "disable_tqdm": True, "logging_steps": 1, "baselines": False,
        }  # fmt: skip
        arguments = GeneformerFineTuningArguments(**(usual | ({"gene_classes": "given"} if gene_classes is not None else {}) | more))
        found = labelled if cells is None else None if cells is False else cells
        return finetune(arguments, found, validation_data=validation_data, test_data=test_data, gene_classes=gene_classes, callbacks=callbacks)

    return go
