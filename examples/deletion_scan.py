"""Delete each gene of each cell, and see which ones the cells are held together by: python deletion_scan.py CELLS.h5ad MODEL OUTPUT.parquet PICTURE.png"""

import sys
from pathlib import Path

from geneformer_hf import InSilicoPerturber, Perturbation, perturbation_effects
from geneformer_hf.reports.perturbation_plots import plot_ranking


def main(cells: str, model: str, output: str, picture: str) -> None:
    perturber = InSilicoPerturber(model)
    everything = Perturbation.every("delete")
    print(perturber.plan(cells, everything).describe())
    # Stopped at any time, the same call goes on where it was.
    table = perturber.write(cells, everything, output)
    effects = perturbation_effects(table, gene_table=perturber.tokenizer.gene_table)
    # Likeness below that of other genes of the same cells: these move a cell most.
    print(effects[effects["effect"] < 0].head(10)[["Ensembl_ID", "Gene_name", "effect", "ci_low", "ci_high", "n_cells"]].to_string(index=False))
    names = effects["Gene_name"].fillna(effects["Ensembl_ID"])
    plot_ranking(effects["effect"], list(names), Path(picture), ylabel="likeness, against other genes of the same cells", title="each gene deleted")


if __name__ == "__main__":
    main(*sys.argv[1:])
