"""Tokenize cells, put the dataset on the Hub, and use it from there, as a whole and as a stream.

python examples/share_dataset.py cells.h5ad geneformer-v2 lab/tokens
"""

import sys

import datasets

from geneformer_hf import GeneformerTokenizer, embed_cells, load_cells, push_folder

cells, model, repository = sys.argv[1:4]

load_cells(cells, tokenizer=GeneformerTokenizer.from_pretrained(model)).save_to_disk("shared-tokens")
print(push_folder("shared-tokens", repository).url)

# The card names the vocabulary, so a model of another one would refuse these cells.
dataset = datasets.load_dataset(repository, split="train")
print(f"{len(dataset)} cells, embedded: {embed_cells(model, dataset).shape}")
first = next(iter(datasets.load_dataset(repository, split="train", streaming=True)))
print(f"the first cell of the stream: {first['cell_id']}, {first['length']} tokens")
