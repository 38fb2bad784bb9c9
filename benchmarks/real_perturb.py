"""In silico treatment, differentiation and regulation on real cells, with known genes looked up in the rankings, whatever comes out.

    python benchmarks/real_perturb.py kang WORK --model MODEL      # control -> interferon beta, in 200 control cells: interferon-stimulated genes
    python benchmarks/real_perturb.py treatment WORK --model MODEL # the same by a classifier: every gene of the cells put on top of 40 control cells
    python benchmarks/real_perturb.py cardio WORK --model MODEL    # day 2 -> day 5 of differentiation: every transcription factor put on top, cardiac ones among them
    python benchmarks/real_perturb.py precision WORK --model MODEL # every gene of 20 cells deleted in bf16 and in float32
    python benchmarks/real_perturb.py targets WORK --model MODEL   # which genes change when STAT1, IRF8 or SPI1 is deleted from monocyte-like cells

Needs the folder of shared data (GENEFORMER_HF_SHARED), and a model with V2's vocabulary, such as `benchmarks/real_finetune.py pretrain` makes. With --finetune
the model first learns to tell the two states apart, on other cells than those that are perturbed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import anndata
import numpy as np
from scipy.stats import spearmanr

from geneformer_hf import GeneformerFineTuningArguments, GeneformerTokenizer, InSilicoPerturber, Perturbation, StateShift, finetune

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("GENEFORMER_HF_SHARED", ROOT.parent / "shared")).resolve() / "data"

# Induced by type I interferon in blood cells: the genes every study of GSE96583 names, and more of the same families.
INTERFERON = [
    "ISG15",
    "ISG20",
    "IFI6",
    "IFI16",
    "IFI35",
    "IFI44",
    "IFI44L",
    "IFIT1",
    "IFIT2",
    "IFIT3",
    "IFITM1",
    "IFITM2",
    "IFITM3",
    "MX1",
    "MX2",
    "OAS1",
    "OAS2",
    "OAS3",
    "OASL",
    "STAT1",
    "STAT2",
    "IRF1",
    "IRF7",
    "LY6E",
    "BST2",
    "XAF1",
    "EPSTI1",
    "TNFSF10",
    "CXCL10",
    "CCL8",
    "RSAD2",
    "HERC5",
    "SAMD9L",
    "PLSCR1",
    "TRIM22",
    "PSMB9",
    "TAP1",
    "NMI",
    "SP110",
    "UBE2L6",
    "GBP1",
    "GBP4",
    "DDX58",
    "EIF2AK2",
    "PARP14",
]
CARDIAC = [
    "GATA4",
    "GATA5",
    "GATA6",
    "HAND1",
    "HAND2",
    "NKX2-5",
    "TBX5",
    "TBX20",
    "TBX3",
    "TBX2",
    "TBX18",
    "MEF2A",
    "MEF2C",
    "MEF2D",
    "ISL1",
    "MESP1",
    "MESP2",
    "EOMES",
    "MEIS1",
    "MEIS2",
    "FOXF1",
    "FOXH1",
    "FOXC1",
    "FOXC2",
    "SRF",
    "TEAD1",
    "HEY1",
    "HEY2",
    "IRX4",
    "IRX3",
    "PITX2",
    "PRRX1",
    "SMAD1",
    "SMAD4",
    "NFATC1",
    "ID2",
    "ZFPM2",
]
PERTURBED = {"kang": 200, "treatment": 40, "cardio": 60}


def example(name: str) -> ModuleType:
    """Return an example as a module: it is what is run here, on real cells."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_cells(work: Path, part: str) -> tuple[Path, Path, str, str, str]:
    """Write the cells to perturb, with as many of the goal, and those to learn from."""
    name, column, start, goal = {
        "treatment": ("kang_ifnb/kang_ctrl_stim_2000", "condition", "ctrl", "stim"),
        "kang": ("kang_ifnb/kang_ctrl_stim_2000", "condition", "ctrl", "stim"),
        "cardio": ("cardio_scgps/cardio_day2_day5_recovered_counts", "day", "2", "5"),
    }[part]
    cells = anndata.read_h5ad(DATA / f"{name}.h5ad")
    values = cells.obs[column].astype(str)
    rng = np.random.default_rng(0)
    chosen = np.concatenate([rng.permutation(np.flatnonzero(values == state))[: PERTURBED[part]] for state in (start, goal)])
    cells.obs[column] = values
    work.mkdir(parents=True, exist_ok=True)
    cells[np.sort(chosen)].copy().write_h5ad(work / f"{part}.h5ad")
    cells[np.setdiff1d(np.arange(cells.n_obs), chosen)].copy().write_h5ad(work / f"{part}_learnt.h5ad")
    return work / f"{part}.h5ad", work / f"{part}_learnt.h5ad", column, start, goal


def precision(work: Path, model: str) -> None:
    """Print how far half precision is off, beside how far deleting a gene goes."""
    cells = anndata.read_h5ad(write_cells(work, "kang")[0])[:20].copy()
    for pooling in ("mean", "cls"):
        full, half = (
            InSilicoPerturber(model, pooling=pooling, dtype=dtype).run(cells, Perturbation.every("delete"))["value"].to_numpy() for dtype in ("float32", "bf16")
        )
        rho = float(spearmanr(full, half).statistic)
        print(
            f"{pooling}: {len(full):,} values, bf16 off by {np.abs(full - half).max():.1e} at most; rank correlation {rho:.3f}; median effect {np.median(1 - full):.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["kang", "treatment", "cardio", "precision", "targets"])
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--finetune", action="store_true")
    args = parser.parse_args()
    if args.part == "targets":
        cells, *_ = write_cells(args.work, "kang")
        factors = ("ENSG00000115415", "ENSG00000140968", "ENSG00000066336")
        example("affected_genes").main(str(cells), args.model, str(args.work / "affected.csv"), str(args.work / "affected.png"), *factors)
        return
    if args.part == "precision":
        precision(args.work, args.model)
        return
    cells, learnt, column, start, goal = write_cells(args.work, args.part)
    model = args.model
    if args.finetune or args.part == "treatment":
        model = str(args.work / f"{args.part}_model")
        arguments = GeneformerFineTuningArguments(
            output_dir=model,
            from_checkpoint=args.model,
            train_data=[str(learnt)],
            label=[column],
            pooling="cls",
            num_train_epochs=3,
            learning_rate=5e-4,
            seed=0,
            overwrite=True,
        )
        for what, found in finetune(arguments).figures["heads"][column].items():
            print(f"  {what}: accuracy {found['accuracy']:.3f}")
        model = str(Path(model) / "model")
    table = GeneformerTokenizer.from_pretrained(args.model).gene_table
    known = CARDIAC if args.part == "cardio" else INTERFERON
    ranked = example("goal_states").rank
    if args.part == "treatment":
        adata = anndata.read_h5ad(cells)
        names = set(adata.var_names[np.asarray((adata.X > 0).mean(axis=0)).ravel() >= 0.05]) | set(known)
        print(f"\ntreatment: {len(names):,} genes, each put on top of every {start} cell; probability of {goal}")
        wanted = Perturbation.each("overexpress", genes_named(table, names))
        only_start = adata[adata.obs[column] == start].copy()
        ranked(only_start, InSilicoPerturber(model, readout="probability"), "probability", goal, wanted, args.work / "treatment", known)
        return
    states = StateShift(column=column, start=start, goal=goal)
    for kind in ("overexpress",) if args.part == "cardio" else ("overexpress", "delete"):
        wanted = Perturbation.every(kind)
        if args.part == "cardio":
            # Hardly any of them is among the genes that both days were measured for: they come from outside, as in reprogramming.
            factors = {line.strip() for line in (DATA / "gene_labels" / "allTFs_hg38.txt").read_text().split()} | set(CARDIAC)
            wanted = Perturbation.each(kind, genes_named(table, factors))
        print(f"\n{args.part}, {kind}, {start} -> {goal}{', fine-tuned' if args.finetune else ''}")
        folder = args.work / f"{args.part}_{kind}{'_tuned' if args.finetune else ''}"
        ranked(str(cells), InSilicoPerturber(model, states=states), "state", goal, wanted, folder, known)


def genes_named(table: Any, names: set[str]) -> list[str]:
    return [gene for gene, name in zip(table.ensembl_ids, table.symbols, strict=True) if name in names]


if __name__ == "__main__":
    main()
