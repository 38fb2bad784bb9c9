"""The pipelines of transformers over cells: embeddings, and genes that are hidden and asked for.

python examples/cell_pipelines.py cells.h5ad geneformer-v2
"""

import sys

from transformers import pipeline

import geneformer_hf  # registers the pipelines

cells, model = sys.argv[1:3]

vectors = pipeline("cell-embedding", model=model)(cells)
print(f"{vectors.shape[0]} cells, {vectors.shape[1]} dimensions, of {', '.join(vectors.index[:3])}, …")

hidden = pipeline("masked-gene-prediction", model=model)(cells, share=0.1, seed=0)
found = (hidden["place"] == 1).mean()
print(f"{len(hidden)} genes were hidden; the likeliest gene was the right one for {found:.1%}, with geneformer_hf {geneformer_hf.__version__}")
print(hidden[["cell_id", "position", "symbol", "probability", "place"]].head())
