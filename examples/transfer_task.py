"""A published task from its recipe: what it needs, what was published, and what this checkpoint gives.

python examples/transfer_task.py dosage-sensitivity geneformer-v2 cells.h5ad genes.csv run
"""

import sys

from geneformer_hf import load_task, run_task


def main(name: str, model: str, cells: str, genes: str, output: str) -> None:
    task = load_task(name)
    print(f"{task.title}. Published: {task.published}.")
    found = run_task(task, model, cells=cells, genes=genes, output=output, settings={"attention_dropout": 0.0})
    for what, figures in found.figures["heads"]["gene_class"].items():
        print(f"AUC {figures['roc_auc']:.2f}  {what}")


if __name__ == "__main__":
    main(*sys.argv[1:])
