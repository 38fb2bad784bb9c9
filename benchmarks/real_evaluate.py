"""How good a small model's embeddings are on real cells it has never seen, beside an untrained model and simple baselines. About two hours on two cores.

    python benchmarks/real_evaluate.py pretrain WORK       # one model for each size of corpus, the same steps for all; no evaluated cell is in a corpus
    python benchmarks/real_evaluate.py cells WORK          # labels, batches, label transfer: every model on every set of cells, and the curve over sizes
    python benchmarks/real_evaluate.py why WORK            # where the spread of embeddings goes
    python benchmarks/real_evaluate.py genes WORK          # context specificity, modules, masked genes, ranks
    python benchmarks/real_evaluate.py attention WORK      # transcription factors in the attention networks
    python benchmarks/real_evaluate.py tasks WORK          # the published tasks whose labels are there, end to end

Needs the folder of shared data (GENEFORMER_HF_SHARED). Prints and draws every figure, whichever way it came out.
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
import pandas as pd
from scipy.stats import spearmanr

from geneformer_hf import (
    BenchmarkDataset,
    GeneformerConfig,
    GeneformerPretrainingArguments,
    GeneformerTokenizer,
    attention_network,
    benchmark,
    embed_cells,
    load_cells,
    load_task,
    pretrain,
    regulator_centrality,
    run_task,
)
from geneformer_hf.analysis.attention_report import regulators_in_words, write_attention
from geneformer_hf.analysis.gene_report import gene_classes_by_name, gene_section
from geneformer_hf.models.dictionaries import find_dictionaries
from geneformer_hf.models.loading import untrained_encoder
from geneformer_hf.reports.evaluation_plots import plot_curves

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
SIZES = (None, 2000, 700)
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
    (work / "corpus.txt").write_text(str(len(corpus)))
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


def sizes(work: Path) -> dict[int, Path]:
    """Models by the cells of their corpus, those held out included."""
    found = {}
    for size in SIZES:
        folder = folder_of(work, size) / "model"
        found[size or int((work / "corpus.txt").read_text())] = folder
    return dict(sorted(found.items(), reverse=True))


DATASETS = [
    BenchmarkDataset(path=str(DATA / f"{EVALUATED[0]}.h5ad"), labels="cell_type", batch="batch", name="3 cell lines, 2 protocols"),
    BenchmarkDataset(path=str(DATA / f"{EVALUATED[1]}.h5ad"), labels="cell_type", batch="batch", name="5 cell lines, 3 plates"),
    BenchmarkDataset(path=str(DATA / f"{EVALUATED[2]}.h5ad"), labels="cell_type", batch="batch", name="PBMC, 3 studies"),
    BenchmarkDataset(path=str(DATA / f"{EVALUATED[4]}.h5ad"), labels="cell_type", batch="condition", held_out="donor_id", name="PBMC types, IFN-beta"),
    BenchmarkDataset(path=str(DATA / f"{EVALUATED[3]}.h5ad"), labels="condition", held_out="donor_id", name="PBMC condition, 8 donors"),
    BenchmarkDataset(path=str(DATA / f"{EVALUATED[5]}.h5ad"), labels="cell_type", batch="donor_id", name="placenta, 26 donors"),
]
FIGURES = ("avg_bio", "avg_batch", "overall", "knn_macro_f1", "probe_macro_f1")


def cells(work: Path) -> None:
    models = sizes(work)
    table = benchmark({f"{n:,} cells": folder for n, folder in models.items()}, DATASETS, work / "benchmark", pooling="mean")
    for dataset, rows in table.groupby("dataset", sort=False):
        print(f"\n{dataset} ({rows['cells_judged'].max():,} cells)")
        shown = [figure for figure in FIGURES if rows[figure].notna().any()]
        print(rows.set_index("name")[shown].round(3).to_string())
        for note in sorted({note for notes in rows["notes"] for note in notes}):
            print(f"  {note}")
    for figure, what in (("avg_bio", "avg bio"), ("knn_macro_f1", "macro F1 of held-out labels, nearest neighbours")):
        points, lines = {}, {}
        for dataset, rows in table.groupby("dataset", sort=False):
            by_name = rows.set_index("name")[figure]
            points[dataset] = [(n, by_name[f"{n:,} cells"]) for n in models]
            others = {
                "PCA": next(v for name, v in by_name.items() if name.startswith("PCA")),
                "log counts": next(v for name, v in by_name.items() if name.startswith("log")),
            }
            lines[dataset] = others | {"untrained": by_name["untrained"]}
        plot_curves(points, lines, work / f"curve_{figure}.png", title=f"{what} against the cells of pretraining", xlabel="cells", ylabel=what)


def why(work: Path) -> None:
    """Where the spread of embeddings goes: the share of the first component, and what it follows."""
    model = next(iter(sizes(work).values()))
    untrained = untrained_encoder(GeneformerConfig.from_pretrained(model), 0)
    for dataset in DATASETS[:4]:
        adata = anndata.read_h5ad(dataset.path)
        detected = np.asarray((adata.X > 0).sum(axis=1)).ravel()
        for name, one in (("pretrained", model), ("untrained", untrained)):
            vectors = embed_cells(one, adata, tokenizer=GeneformerTokenizer.from_pretrained(model), pooling="mean", progress=False)
            centred = vectors - vectors.mean(axis=0)
            left, singular, _ = np.linalg.svd(centred, full_matrices=False)
            follows = abs(spearmanr(left[:, 0], detected).statistic)
            print(
                f"{dataset.shown:28} {name:11} first component {singular[0] ** 2 / (singular**2).sum():.2f} of the spread, rank correlation with genes detected {follows:.2f}"
            )


def genes(work: Path) -> None:
    model = next(iter(sizes(work).values()))
    pictures = work / "genes"
    pictures.mkdir(exist_ok=True)
    classes = {"transcription factors": (DATA / "gene_labels" / "allTFs_hg38.txt").read_text().split(), "stably expressed": (DATA / "gene_labels" / "scmerge_human_scSEG_ensembl.txt").read_text().split(),
               **gene_classes_by_name(GeneformerTokenizer.from_pretrained(model).gene_table)}  # fmt: skip
    section, figures = gene_section("pretrained", model, DATA / f"{EVALUATED[2]}.h5ad", pictures, labels="cell_type", classes=classes, pooling="mean")
    print(section.verdict)
    for name in ("hidden_by_class", "hidden_by_rank", "neighbours_of_classes", "rank_contributions"):
        print(f"\n{name}\n{pd.DataFrame(figures[name]).round(4).to_string(index=False)}")
    table = pd.DataFrame(figures["context_specificity"])
    stable = set(classes["stably expressed"])
    for name, held in (("stably expressed", table["ensembl_id"].isin(stable)), ("other", ~table["ensembl_id"].isin(stable))):
        print(f"{name}: {held.sum()} genes, between {table.loc[held, 'between'].mean():.4f}, permuted {table.loc[held, 'null_mean'].mean():.4f}")


def attention(work: Path) -> None:
    factors = (DATA / "gene_labels" / "allTFs_hg38.txt").read_text().split()
    models: dict[str, Any] = {"pretrained": next(iter(sizes(work).values()))}
    tokenizer = GeneformerTokenizer.from_pretrained(models["pretrained"])
    models["untrained"] = untrained_encoder(GeneformerConfig.from_pretrained(models["pretrained"]), 0)
    for name, model in models.items():
        network = attention_network(model, DATA / f"{EVALUATED[2]}.h5ad", tokenizer=tokenizer)
        compared = regulator_centrality(network, factors, table=tokenizer.gene_table)
        folder = work / f"attention-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_attention(network, folder, title=name, settings={}, regulators=compared, names=factors)
        print(f"\n{name}: {regulators_in_words(compared)}\n{compared.round(3).to_string(index=False)}\n{network.centrality().head(10).round(2).to_string()}")


def tasks(work: Path) -> None:
    """The recipes with a learning rate and epochs for so small a model; what is published was learnt by models of millions of cells."""
    model = next(iter(sizes(work).values()))
    quick = {"attention_dropout": 0.0, "dropout": 0.0, "disable_tqdm": True, "overwrite": True}
    given = {
        "dosage-sensitivity": {"cells": DATA / "pbmc3k/pbmc3k_raw_annotated.h5ad", "genes": DATA / "gene_labels/dosage_sensitivity_TFs.json", "settings": quick | {"learning_rate": 5e-4, "num_train_epochs": 2}},
        "cell-annotation": {"cells": DATA / "pbmc3k/pbmc3k_raw_annotated.h5ad", "settings": quick | {"learning_rate": 1e-3, "num_train_epochs": 5, "pooling": "mean", "leave_out": {"cell_type": ["unassigned"]}}},
        "differentiation": {"cells": DATA / "cardio_scgps/cardio_day2_day5_recovered_counts.h5ad", "settings": quick | {"learning_rate": 1e-3, "num_train_epochs": 3, "pooling": "mean"}},
        "batch-integration": {"cells": DATA / f"{EVALUATED[0]}.h5ad", "settings": {"pooling": "mean"}, "overwrite": True},
    }  # fmt: skip
    for name, options in given.items():
        found = run_task(name, model, output=work / f"task-{name}", **options)
        print(f"\n{name}; published: {load_task(name).published}")
        if name == "batch-integration":
            print(found.table.set_index("name")[list(FIGURES)].round(3).to_string())
            continue
        for head, by_name in found.figures["heads"].items():
            for what, one in by_name.items():
                print(f"  {head} | {what:60} accuracy {one['accuracy']:.3f} macro F1 {one['macro_f1']:.3f} AUC {one['roc_auc']:.3f}")


PARTS = {"pretrain": pretrain_models, "cells": cells, "why": why, "genes": genes, "attention": attention, "tasks": tasks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("work", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    PARTS[args.part](args.work)


if __name__ == "__main__":
    main()
