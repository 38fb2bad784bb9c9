"""Checkpoints by datasets: one table that can be cut off, gone on with and added to.

python examples/benchmark_checkpoints.py table cell_type batch cells.h5ad geneformer-v2 [another-checkpoint ...]
"""

import sys

from geneformer_hf import BenchmarkDataset, benchmark


def main(output: str, labels: str, batch: str, cells: str, *models: str) -> None:
    table = benchmark(list(models), [BenchmarkDataset(path=cells, labels=labels, batch=batch)], output)
    print(table[["dataset", "name", "avg_bio", "overall", "knn_macro_f1"]].round(3).to_string(index=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
