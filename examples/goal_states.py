"""Which genes bring cells of one state nearer to another, and are known ones among them?

    python goal_states.py CELLS.h5ad MODEL COLUMN START GOAL KIND OUTPUT [KNOWN_GENE …]

KIND is delete or overexpress; OUTPUT a new folder for the table, the ranking and a picture.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import mannwhitneyu

from geneformer_hf import InSilicoPerturber, Perturbation, StateShift, perturbation_effects
from geneformer_hf.reports.perturbation_plots import plot_volcano


def main(cells: str, model: str, column: str, start: str, goal: str, kind: str, output: str, *known: str) -> None:
    perturber = InSilicoPerturber(model, states=StateShift(column=column, start=start, goal=goal))
    rank(cells, perturber, "state", goal, Perturbation.every(kind), Path(output), known)


def rank(cells: Any, perturber: InSilicoPerturber, readout: str, goal: str, perturbations: Any, folder: Path, known: Sequence[str] = ()) -> None:
    folder.mkdir(exist_ok=True)
    table = perturber.write(cells, perturbations, folder / "shifts.parquet")
    effects = perturbation_effects(table, readout=readout, target=goal, gene_table=perturber.tokenizer.gene_table)
    # Genes of a few cells have large effects by chance.
    effects = effects[effects["n_cells"] >= 6].sort_values("effect", ascending=False).reset_index(drop=True)
    effects.to_csv(folder / "ranking.csv", index=False)
    names = effects["Gene_name"].fillna(effects["Ensembl_ID"])
    print(f"{len(effects):,} genes; nearest to {goal}: {', '.join(names.head(10))}")
    among = names.isin(known) | effects["Ensembl_ID"].isin(known)
    plot_volcano(
        effects["effect"], effects["fdr_paired"], list(names), folder / "ranking.png", xlabel=f"nearer to {goal}, against other genes of the same cells",
        ylabel="-log10 FDR", title=f"{len(effects):,} genes", known=list(among),
    )  # fmt: skip
    if among.any() and not among.all():
        area = mannwhitneyu(effects["effect"][among], effects["effect"][~among]).statistic / (among.sum() * (~among).sum())
        print(f"{among.sum()} of {len(known)} known genes can be ranked; they stand above {area:.0%} of the others (by chance 50%)")
        print("  ".join(f"{name} {place:,}" for place, name in zip(effects.index[among] + 1, names[among], strict=True)))


if __name__ == "__main__":
    main(*sys.argv[1:])
