"""What fine-tuning a small model gives on real cells: pretrained on some studies, tested on others. Hours on two cores; each part by itself takes minutes.

    python benchmarks/real_finetune.py pretrain WORK       # first; no evaluation cell is in the corpus, checked by barcode
    python benchmarks/real_finetune.py cells WORK          # full, LoRA, QLoRA, frozen: pbmc3k, tested on sorted cells of another study
    python benchmarks/real_finetune.py genes WORK          # dosage-sensitive transcription factors, 5 folds over genes
    python benchmarks/real_finetune.py heads WORK          # cell type and batch of pbmc_integration
    python benchmarks/real_finetune.py cardio WORK         # day 2 against day 5 of cardiac differentiation, 5 folds
    python benchmarks/real_finetune.py batch WORK          # classes alone, an adversarial head, contrast across batches (`integrate`)

Needs the folder of shared data (GENEFORMER_HF_SHARED). Prints every figure beside its baselines, whichever way it came out.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
from pathlib import Path
from typing import Any

import anndata
import datasets
import numpy as np
import torch
import torch.nn.functional as F

from geneformer_hf import (
    GeneformerConfig,
    GeneformerFineTuningArguments,
    GeneformerForMultiTaskClassification,
    GeneformerPretrainingArguments,
    GeneformerTokenizer,
    finetune,
    load_cells,
    pretrain,
)
from geneformer_hf.data.labels import class_ids
from geneformer_hf.data.packing import pack_cells
from geneformer_hf.models.adapters import open_weights
from geneformer_hf.models.attention import PACKED_ATTENTION
from geneformer_hf.models.contrast import contrast_across
from geneformer_hf.models.dictionaries import find_dictionaries
from geneformer_hf.models.pooling import pool_cells

DATA = Path(os.environ.get("GENEFORMER_HF_SHARED", Path(__file__).parents[2] / "shared")).resolve() / "data"
EVALUATED = (
    "pbmc_integration/pbmc_integration_3batch",
    "pbmc3k/pbmc3k_raw_annotated",
    "pbmc_sorted_zheng2017/pbmc_sorted_zheng2017",
    "pbmc_zheng68k_165/pbmc_zheng68k_165",
)
CORPUS = ("pbmc_frozen_donorA/pbmc_frozen_donorA", "kang_ifnb/kang_ctrl_stim_2000", "pbmc_10x_protein_400/pbmc_10k_protein_v3_200", "pbmc_10x_protein_400/pbmc_5k_protein_v3_200",
          "gut_crohn_scp1884/gut_crohn_scp1884", "placenta_cellxgene/placenta_cellxgene", "sc_mixology/sc_mixology_5cl_celseq2_3plates")  # fmt: skip
SHAPE = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 256, "max_position_embeddings": 512, "hidden_dropout_prob": 0.0,
         "attention_probs_dropout_prob": 0.0}  # fmt: skip
COMMON = {
    "num_train_epochs": 5,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "pooling": "mean",
    "seed": 0,
    "logging_steps": 20,
    "overwrite": True,
}


def barcodes(names: Any) -> set[str]:
    return {code for name in names for code in re.findall(r"[ACGT]{14,16}", str(name))}


def pretrain_small(work: Path) -> None:
    tokenizer = GeneformerTokenizer.from_dictionaries(find_dictionaries(DATA / "geneformer_dicts_v2", 20_275), model_max_length=512)
    evaluated: set[str] = set()
    for name in EVALUATED:
        adata = anndata.read_h5ad(DATA / f"{name}.h5ad", backed="r")
        evaluated |= barcodes([*adata.obs_names, *adata.obs.get("orig_cell", [])])
    parts = []
    for name in CORPUS:
        cells = load_cells(DATA / f"{name}.h5ad", tokenizer=tokenizer, obs="none")
        kept = [i for i, cell in enumerate(cells["cell_id"][:]) if not barcodes([cell]) & evaluated]
        print(f"{name}: {len(kept):,} of {len(cells):,} cells, whose barcodes no evaluation cell has")
        parts.append(cells.select(kept))
    arguments = GeneformerPretrainingArguments(
        output_dir=str(work / "pretrained"), shape="gf-12L-95M-i4096", shape_overrides=SHAPE, per_device_train_batch_size=16, num_train_epochs=5, learning_rate=2e-3,
        lr_scheduler_type="cosine", warmup_steps=0.05, weight_decay=0.01, held_out=0.05, logging_steps=20, save_steps=200, eval_strategy="steps", eval_steps=1000, seed=0,
    )  # fmt: skip
    found = pretrain(arguments, datasets.concatenate_datasets(parts), tokenizer=tokenizer).figures["held_out"]["cells"]
    print(
        f"loss at <mask> {found['after']['loss_at_mask']:.2f}; gene frequency {found['baselines']['gene_frequency_at_mask']:.2f}, by rank {found['baselines']['rank_frequency_at_mask']:.2f} nats"
    )


def tune(work: Path, name: str, **settings: Any) -> None:
    folder = work / name
    shutil.rmtree(folder, ignore_errors=True)
    arguments = GeneformerFineTuningArguments(**(COMMON | {"output_dir": str(folder), "from_checkpoint": str(work / "pretrained" / "model")} | settings))
    run = finetune(arguments)
    print(f"== {name}: {run.figures['trained_parameters']:,} parameters trained, {run.figures['seconds']:.0f} s")
    for head, found in run.figures["heads"].items():
        for what, one in found.items():
            spread = f" ± {np.std([fold['macro_f1'] for fold in one['folds']]):.3f}" if "folds" in one else ""
            shown = ", ".join(f"{key} {one[key]:.3f}" for key in ("accuracy", "balanced_accuracy", "macro_f1", "roc_auc"))
            print(f"  {head} | {what:60} {shown}{spread}")
    if "per_occurrence" in run.figures:
        print("  every gene in every cell:", {key: value for key, value in run.figures["per_occurrence"].items() if key != "confusion"})


def cells(work: Path) -> None:
    adata = anndata.read_h5ad(DATA / f"{EVALUATED[0]}.h5ad")
    adata[adata.obs["batch"] == "pbmc3k"].copy().write_h5ad(work / "pbmc3k.h5ad")
    adata[adata.obs["batch"] == "zheng2017_sorted"].copy().write_h5ad(work / "sorted.h5ad")
    shared = {"train_data": [str(work / "pbmc3k.h5ad")], "test_data": [str(work / "sorted.h5ad")], "label": ["cell_type"], "rare_threshold": 10}
    tune(work, "full", **shared)
    tune(work, "lora", **shared, adapter="lora", learning_rate=3e-3, baselines=False)
    tune(work, "qlora", **shared, adapter="lora", quantization="nf4", learning_rate=3e-3, baselines=False)
    tune(work, "frozen", **shared, freeze_layers=3, freeze_embeddings=True, learning_rate=3e-3, baselines=False)


def genes(work: Path) -> None:
    labels = str(DATA / "gene_labels" / "dosage_sensitivity_TFs.json")
    settings = {"num_train_epochs": 2, "learning_rate": 5e-4, "pooling": None}
    tune(work, "genes", train_data=[str(DATA / f"{EVALUATED[1]}.h5ad")], gene_classes=labels, n_folds=5, **settings)


def heads(work: Path) -> None:
    tune(work, "heads", train_data=[str(DATA / f"{EVALUATED[0]}.h5ad")], label=["cell_type", "batch"], rare_threshold=10)


def cardio(work: Path) -> None:
    tune(work, "cardio", train_data=[str(DATA / "cardio_scgps" / "cardio_day2_day5_recovered_counts.h5ad")], label=["day"], n_folds=5)


class BatchExperiment:
    """The same loop over the same cells for every way of hiding the batch; judged on a thousand held-out cells."""

    def __init__(self, work: Path) -> None:
        adata = anndata.read_h5ad(DATA / f"{EVALUATED[0]}.h5ad")
        adata = adata[adata.obs["cell_type"].isin(["B", "CD4 T", "CD8 T", "NK", "Monocyte"])].copy()
        self.folder = work / "pretrained" / "model"
        tokens = load_cells(adata, tokenizer=GeneformerTokenizer.from_pretrained(self.folder), obs="none")
        self.cells = [np.array(cell) for cell in tokens["input_ids"][:]]
        self.types, self.type_of = class_ids(adata.obs["cell_type"])
        self.batches, self.batch_of = class_ids(adata.obs["batch"])
        order = np.random.default_rng(0).permutation(len(self.cells))
        self.test, self.train = np.sort(order[:1000]), np.sort(order[1000:])

    def model(self) -> Any:
        torch.manual_seed(0)
        labels = {"batch": self.batches, "cell_type": self.types}
        config = GeneformerConfig.from_pretrained(self.folder, pooling="mean", task_labels=labels)
        model = open_weights(GeneformerForMultiTaskClassification, self.folder, config, quiet=True)
        model.set_attn_implementation(PACKED_ATTENTION)
        return model

    def hidden(self, model: Any, rows: np.ndarray) -> tuple[torch.Tensor, dict]:
        batch = pack_cells(np.array([len(self.cells[i]) for i in rows]), np.concatenate([self.cells[i] for i in rows]))
        return model.bert(**batch).last_hidden_state, batch

    def pooled(self, model: Any, hidden: torch.Tensor, batch: dict) -> torch.Tensor:
        return pool_cells(hidden, batch["input_ids"], None, batch["cu_seq_lens_q"], config=model.config)

    def run(self, kind: str, weight: float, epochs: int = 4, size: int = 48) -> Any:
        model, rng = self.model(), np.random.default_rng(1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.001)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=len(self.train) // size * epochs, pct_start=0.1)
        for _ in range(epochs):
            order = rng.permutation(self.train)
            for start in range(0, len(order) - size + 1, size):
                rows = order[start : start + size]
                model.train()
                hidden, batch = self.hidden(model, rows)
                pooled = self.pooled(model, hidden, batch)
                read = model.bert.pooler(pooled.unsqueeze(1))
                of_batch, of_type = model.classifiers[0](ReverseGradient.apply(read)), model.classifiers[1](read)
                types, batches = torch.from_numpy(self.type_of[rows]), torch.from_numpy(self.batch_of[rows])
                loss = F.cross_entropy(of_type, types)
                if kind == "adversarial":
                    loss = loss + weight * F.cross_entropy(of_batch, batches)
                if kind == "contrastive":
                    loss = loss + weight * contrast_across(pooled, types, batches) / len(types)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        return model

    def judge(self, model: Any, what: str) -> None:
        from sklearn.metrics import silhouette_score
        from sklearn.neighbors import NearestNeighbors

        model.eval()
        with torch.no_grad():
            parts = [self.pooled(model, *self.hidden(model, self.test[i : i + 50])) for i in range(0, len(self.test), 50)]
        vectors = torch.cat(parts).numpy()
        vectors = (vectors - vectors.mean(0)) / (vectors.std(0) + 1e-9)
        types, batches = self.type_of[self.test], self.batch_of[self.test]
        near = NearestNeighbors(n_neighbors=16).fit(vectors).kneighbors(vectors, return_distance=False)[:, 1:]
        right = np.mean([np.bincount(types[n], minlength=5).argmax() == t for n, t in zip(near, types, strict=True)])
        # Neighbours from other batches, against as many as random cells of the same type would be.
        found = np.mean([(batches[n] != b).mean() for n, b in zip(near, batches, strict=True)])
        chance = np.mean([(batches[types == t] != b).mean() for t, b in zip(types, batches, strict=True)])
        apart = np.mean([silhouette_score(vectors[types == t], batches[types == t]) for t in range(5)])
        print(
            f"{what:24} type of neighbours {right:.3f}  mixing of batches {found / chance:.3f}  silhouette of types {silhouette_score(vectors, types):.3f}, of batches within types {apart:.3f}"
        )


class ReverseGradient(torch.autograd.Function):
    """Passes values on and turns gradients round (Ganin et al. 2016, JMLR 17)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return -grad


def batch(work: Path) -> None:
    experiment = BatchExperiment(work)
    experiment.judge(experiment.model(), "checkpoint as it was")
    for kind, weight in (("classes alone", 0.0), ("adversarial", 0.3), ("adversarial", 1.0), ("contrastive", 0.3), ("contrastive", 1.0)):
        experiment.judge(experiment.run(kind, weight), f"{kind} {weight or ''}")


PARTS = {"pretrain": pretrain_small, "cells": cells, "genes": genes, "heads": heads, "cardio": cardio, "batch": batch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("work", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    PARTS[args.part](args.work)


if __name__ == "__main__":
    main()
