"""Classify genes by their context, tested on genes that were not learnt: python classify_genes.py CELLS.h5ad MODEL GENES.csv OUTPUT

GENES.csv has a column of genes (Ensembl ids or symbols) and one of classes.
"""

import sys

from geneformer_hf import GeneformerFineTuningArguments, finetune


def main(cells: str, model: str, genes: str, output: str) -> None:
    arguments = GeneformerFineTuningArguments(
        output_dir=output, from_checkpoint=model, train_data=[cells], gene_classes=genes, n_folds=3, num_train_epochs=1, learning_rate=1e-3
    )
    run = finetune(arguments)
    for name, figures in run.figures["heads"]["gene_class"].items():
        print(f"ROC AUC {figures['roc_auc']:.2f} over {figures['n']} genes  {name}")
    print(run.predictions[["ensembl_id", "n_cells", "fold", "gene_class_true", "gene_class_predicted"]].head(3))


if __name__ == "__main__":
    main(*sys.argv[1:])
