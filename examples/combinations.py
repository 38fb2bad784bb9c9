"""Do two genes together do more than the sum of both? python combinations.py CELLS.h5ad MODEL OUTPUT.csv GENE GENE …"""

import sys

from geneformer_hf import InSilicoPerturber, Perturbation, cooperativity


def main(cells: str, model: str, output: str, *genes: str) -> None:
    perturber = InSilicoPerturber(model)
    table = perturber.run(cells, Perturbation.pairs("delete", list(genes)))
    pairs = cooperativity(table, gene_table=perturber.tokenizer.gene_table)
    pairs.to_csv(output, index=False)
    print(pairs[["Ensembl_ID_1", "Ensembl_ID_2", "sum_of_shifts", "combined_shift", "excess", "n_cells"]].to_string(index=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
