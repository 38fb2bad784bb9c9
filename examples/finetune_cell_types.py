"""Teach a model cell types and apply it to other cells: python finetune_cell_types.py CELLS.h5ad MODEL OUTPUT"""

import sys

import anndata

from geneformer_hf import GeneformerFineTuningArguments, finetune, predict


def main(cells: str, model: str, output: str) -> None:
    arguments = GeneformerFineTuningArguments(
        output_dir=output,
        from_checkpoint=model,
        train_data=[cells],
        label=["cell_type"],
        # Whole donors on one side, where there is such a column: group_column="donor_id"
        num_train_epochs=3,
        learning_rate=1e-3,
    )
    run = finetune(arguments)
    for name, figures in run.figures["heads"]["cell_type"].items():
        print(f"macro F1 {figures['macro_f1']:.2f}  {name}")
    adata = anndata.read_h5ad(cells)
    predict(run.folder, adata, progress=False).add_to(adata)
    print(adata.obs[["cell_type_predicted", "cell_type_probability", "cell_type_entropy"]].head(3))


if __name__ == "__main__":
    main(*sys.argv[1:])
