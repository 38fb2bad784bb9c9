"""How good a small model's embeddings are on real cells it has never seen, beside an untrained model and simple baselines. About two hours on two cores.

    python benchmarks/real_evaluate.py pretrain WORK       # one model for each size of corpus, the same steps for all; no evaluated cell is in a corpus
    python benchmarks/real_evaluate.py cells WORK          # labels, batches, label transfer: every model on every set of cells, and the curve over sizes
    python benchmarks/real_evaluate.py genes WORK          # context specificity, modules, masked genes, ranks
    python benchmarks/real_evaluate.py attention WORK      # transcription factors in the attention networks

Needs the folder of shared data (GENEFORMER_HF_SHARED). Prints and draws every figure, whichever way it came out.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

import anndata
import datasets
import numpy as np

from geneformer_hf import GeneformerPretrainingArguments, GeneformerTokenizer, load_cells, pretrain
from geneformer_hf.models.dictionaries import find_dictionaries

DATA = Path(os.environ.get("GENEFORMER_HF_SHARED", Path(__file__).parents[2] / "shared")).resolve() / "data"
EVALUATED = (
    "sc_mixology/sc_mixology_3cl_celseq2_dropseq",
    "sc_mixology/sc_mixology_5cl_celseq2_3plates",
    "pbmc_integration/pbmc_integration_3batch",
    "kang_ifnb/kang_ctrl_stim_2000",
    "kang_ifnb/kang_labelled_1267genes",
    "placenta_cellxgene/placenta_cellxgene",
)
CORPUS = (
    "pbmc_frozen_donorA/pbmc_frozen_donorA",
    "gut_crohn_scp1884/gut_crohn_scp1884",
    "cardio_scgps/cardio_day2_recovered_counts",
    "cardio_scgps/cardio_day5_recovered_counts",
    "pbmc_10x_protein_400/pbmc_10k_protein_v3_200",
    "pbmc_10x_protein_400/pbmc_5k_protein_v3_200",
)
SIZES = (None, 2000, 700, 200)
"""Cells of each corpus; None: all of them."""
STEPS = 1600
SHAPE = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 256, "max_position_embeddings": 512, "hidden_dropout_prob": 0.0,
         "attention_probs_dropout_prob": 0.0}  # fmt: skip


def barcodes(names: Any) -> set[str]:
    return {code for name in names for code in re.findall(r"[ACGT]{14,16}", str(name))}


def corpus_without_evaluated_cells(tokenizer: GeneformerTokenizer) -> datasets.Dataset:
    """Cells whose barcode no evaluated cell has, and whose ranked genes are those of none: some evaluated cells have no barcode."""
    codes, contents = set(), set()
    for name in EVALUATED:
        adata = anndata.read_h5ad(DATA / f"{name}.h5ad", backed="r")
        codes |= barcodes([*adata.obs_names, *adata.obs.get("orig_cell", []), *adata.obs.get("barcode", [])])
        contents |= {tuple(cell) for cell in load_cells(DATA / f"{name}.h5ad", tokenizer=tokenizer, obs="none")["input_ids"][:]}
    parts = []
    for name in CORPUS:
        cells = load_cells(DATA / f"{name}.h5ad", tokenizer=tokenizer, obs="none")
        kept = [
            i
            for i, (cell, tokens) in enumerate(zip(cells["cell_id"][:], cells["input_ids"][:], strict=True))
            if not barcodes([cell]) & codes and tuple(tokens) not in contents
        ]
        print(f"{name}: {len(kept):,} of {len(cells):,} cells are not among the evaluated ones, by barcode and by content")
        parts.append(cells.select(kept))
    return datasets.concatenate_datasets(parts)


def folder_of(work: Path, size: int | None) -> Path:
    return work / f"pretrained-{size or 'all'}"


def pretrain_models(work: Path) -> None:
    tokenizer = GeneformerTokenizer.from_dictionaries(find_dictionaries(DATA / "geneformer_dicts_v2", 20_275), model_max_length=512)
    corpus = corpus_without_evaluated_cells(tokenizer)
    order = np.random.default_rng(0).permutation(len(corpus))
    for size in SIZES:
        if (folder_of(work, size) / "model").is_dir():
            continue
        cells = corpus.select(np.sort(order[:size]))
        arguments = GeneformerPretrainingArguments(
            output_dir=str(folder_of(work, size)), shape="gf-12L-95M-i4096", shape_overrides=SHAPE, per_device_train_batch_size=16, max_steps=STEPS, learning_rate=2e-3,
            lr_scheduler_type="cosine", warmup_steps=0.05, weight_decay=0.01, held_out=0.05, logging_steps=50, save_steps=400, seed=0,
        )  # fmt: skip
        found = pretrain(arguments, cells, tokenizer=tokenizer).figures["held_out"]["cells"]
        print(
            f"{len(cells):,} cells: loss at <mask> {found['after']['loss_at_mask']:.2f}; gene frequency {found['baselines']['gene_frequency_at_mask']:.2f}",
            flush=True,
        )


PARTS = {"pretrain": pretrain_models}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("work", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    PARTS[args.part](args.work)


if __name__ == "__main__":
    main()
