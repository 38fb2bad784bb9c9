"""Tokenize files larger than memory into a dataset and look at what was read.

python examples/tokenize_files.py "cells/*.h5ad" geneformer-v2 tokens
"""

import json
import sys

from geneformer_hf import GeneformerTokenizer, load_cells


def main(files: str, folder: str, output: str) -> None:
    dataset = load_cells(files, tokenizer=GeneformerTokenizer.from_pretrained(folder), num_proc=2)
    dataset.save_to_disk(output)
    report = json.loads(dataset.info.description)
    for file in report["files"]:
        print(f"{file['cells']:,} cells, counts in {file['counts']}; {file['genes']}")
    print(f"{len(dataset):,} cells -> {output}")


if __name__ == "__main__":
    main(*sys.argv[1:])
