"""Is a checkpoint any good on your cells? Set it beside an untrained model and plain expression.

python examples/evaluate_checkpoints.py cells.h5ad cell_type batch report geneformer-v2 [another-checkpoint ...]
"""

import sys
from pathlib import Path

from geneformer_hf import evaluate_cells
from geneformer_hf.analysis.evaluation_report import write_evaluation


def main(cells: str, labels: str, batch: str, report: str, *models: str) -> None:
    found = evaluate_cells(list(models), cells, labels=labels, batch=batch)
    print(found.table.set_index("name")[["avg_bio", "avg_batch", "overall", "knn_macro_f1"]].round(3).to_string())
    print(found.verdict())
    Path(report).mkdir()
    write_evaluation(found, Path(report), title=cells, settings={"labels": labels, "batch": batch, "models": list(models)})


if __name__ == "__main__":
    main(*sys.argv[1:])
