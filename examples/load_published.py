"""Embed cells with a published checkpoint by its name, and keep a converted copy for the Auto classes.

python examples/load_published.py cells.h5ad Geneformer-V1-10M geneformer-v1
"""

import sys

from transformers import AutoModelForMaskedLM, AutoTokenizer

from geneformer_hf import GeneformerForMaskedLM, GeneformerTokenizer, convert_checkpoint, embed_cells

cells, name, folder = sys.argv[1:4]

# Weights by their hash, dictionaries through the restricted reader; both from the cache the second time.
model, tokenizer = GeneformerForMaskedLM.from_pretrained(name), GeneformerTokenizer.from_pretrained(name)
print(f"{model.place}: {model.num_parameters():,} parameters, {len(tokenizer.gene_table):,} genes")
direct = embed_cells(model, cells, tokenizer=tokenizer)

done = convert_checkpoint(name, folder)
print(f"{done.n_tensors} tensors and all token ids equal the source")
converted = embed_cells(AutoModelForMaskedLM.from_pretrained(folder), cells, tokenizer=AutoTokenizer.from_pretrained(folder))
print(f"{converted.shape}; the same embeddings: {(direct == converted).all()}")
