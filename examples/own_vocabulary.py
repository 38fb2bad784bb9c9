"""Fit the gene table of a new vocabulary on your own cells and save a tokenizer with it.

python examples/own_vocabulary.py cells.h5ad my-tokenizer
"""

import sys

from geneformer_hf import GeneformerTokenizer, fit_gene_table


def main(cells: str, output: str) -> None:
    table = fit_gene_table(cells)
    GeneformerTokenizer(gene_table=table, cls_token="<cls>", eos_token="<eos>").save_pretrained(output)
    print(f"{len(table):,} genes, {table.source} -> {output}")


if __name__ == "__main__":
    main(*sys.argv[1:])
