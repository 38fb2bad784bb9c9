"""Tokenize many files with several processes, resumable: run it again after any interruption and it goes on.

python examples/tokenize_corpus.py "cells/*.h5ad" geneformer-v2 tokens
"""

import json
import sys

from geneformer_hf import GeneformerTokenizer, tokenize_corpus


def main(files: str, folder: str, output: str) -> None:
    tokenizer = GeneformerTokenizer.from_pretrained(folder)
    dataset = tokenize_corpus(files, output, tokenizer=tokenizer, num_proc=2, skip_bad_files=True)
    report = json.loads(dataset.info.description)
    print(f"{len(dataset):,} cells of {len(report['files'])} files -> {output}; {len(report['skipped_files'])} files skipped")


if __name__ == "__main__":
    main(*sys.argv[1:])
