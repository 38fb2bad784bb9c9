"""Which genes change most when a transcription factor is deleted: python affected_genes.py CELLS.h5ad MODEL OUTPUT.csv PICTURE.png FACTOR [FACTOR …]"""

import sys
from pathlib import Path

from geneformer_hf import InSilicoPerturber, Perturbation, perturbation_statistics
from geneformer_hf.reports.perturbation_plots import plot_affected_genes


def main(cells: str, model: str, output: str, picture: str, *factors: str) -> None:
    perturber = InSilicoPerturber(model, readout="gene", pooling="mean")
    table = perturber.run(cells, Perturbation.each("delete", list(factors)))
    affected = perturbation_statistics(table, "aggregate_gene_shifts", gene_table=perturber.tokenizer.gene_table)
    affected = affected[(affected["Affected"] != "cell_emb") & (affected["N_Detections"] >= 3)].sort_values("Cosine_sim_mean")
    affected.to_csv(output, index=False)
    print(affected[["Ensembl_ID", "Affected_Ensembl_ID", "Affected_gene_name", "Cosine_sim_mean", "N_Detections"]].head(10).to_string(index=False))
    plot_affected_genes(affected, Path(picture))


if __name__ == "__main__":
    main(*sys.argv[1:])
