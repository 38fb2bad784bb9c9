"""What does a model make of genes: which know their cell, which lie together, which are found when they are hidden, and which ranks count.

python examples/genes_in_context.py cells.h5ad geneformer-v2 cell_type modules.h5ad
"""

import sys

from geneformer_hf import GeneformerTokenizer, context_specificity, embed_genes, gene_modules, hide_genes, rank_contributions


def main(cells: str, model: str, labels: str, output: str) -> None:
    specific = context_specificity(model, cells, labels=labels, least_cells=5)
    print(specific[["symbol", "n_cells", "between", "null_mean", "q_value"]].head().to_string(index=False))
    table = GeneformerTokenizer.from_pretrained(model).gene_table
    modules = gene_modules(embed_genes(model, cells), table=table, least_cells=5)
    print(modules.obs["module"].value_counts().head().to_string())
    modules.write_h5ad(output)
    hidden = hide_genes(model, cells)
    print(hidden.by_class({"ribosomal": [s for s in table.symbols if s.startswith(("RPL", "RPS"))]}).round(3).to_string(index=False))
    print(rank_contributions(model, cells).round(5).to_string(index=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
