"""Estimate what deleting each gene does, and run the most promising ones of each cell: python screen_genes.py CELLS.h5ad MODEL OUTPUT.parquet"""

import sys

from geneformer_hf import InSilicoPerturber, Perturbation, perturbation_effects, screening_quality


def main(cells: str, model: str, output: str) -> None:
    perturber = InSilicoPerturber(model)
    table = perturber.write(cells, Perturbation.screen("delete", top=10), output)
    # Some cells were run in whole, so that one sees how far estimates are to be trusted.
    print(screening_quality(table, top=10).describe())
    ranking = perturbation_effects(table, readout="estimated_cell", n_permutations=0, gene_table=perturber.tokenizer.gene_table)
    print(ranking[["Ensembl_ID", "effect", "n_cells"]].head(5).to_string(index=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
