"""Embed cells with a converted checkpoint and keep the result in the AnnData.

python examples/embed_pbmc.py cells.h5ad geneformer-v2 embedded.h5ad
"""

import sys

import anndata
from transformers import AutoModelForMaskedLM, AutoTokenizer

import geneformer_hf


def main(cells: str, folder: str, output: str) -> None:
    adata = anndata.read_h5ad(cells)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder)
    adata.obsm["X_geneformer"] = geneformer_hf.embed_cells(model, adata, tokenizer=tokenizer)
    adata.write_h5ad(output)
    print(f"{adata.n_obs:,} cells, {adata.obsm['X_geneformer'].shape[1]} dimensions -> {output}")


if __name__ == "__main__":
    main(*sys.argv[1:])
