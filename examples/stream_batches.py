"""Stream shuffled training batches straight from files of counts, stop in the middle, and go on with the next cell.

python examples/stream_batches.py "cells/*.h5ad" geneformer-v2
"""

import sys

from geneformer_hf import GeneformerTokenizer, stream_cells
from geneformer_hf.data.collators import DataCollatorForMaskedGenes


def main(files: str, folder: str) -> None:
    tokenizer = GeneformerTokenizer.from_pretrained(folder)
    collate = DataCollatorForMaskedGenes(tokenizer)
    stream = stream_cells(files, tokenizer=tokenizer, shuffle=True, seed=0)
    rows = iter(stream)
    first = [next(rows) for _ in range(8)]
    print(f"first batch {tuple(collate(first)['input_ids'].shape)}, cells {', '.join(row['cell_id'] for row in first[:3])}, …")
    state = stream.state_dict()

    later = stream_cells(files, tokenizer=tokenizer, shuffle=True, seed=0)
    later.load_state_dict(state)
    rest = list(later)
    print(f"resumed: {len(rest)} cells left, none of them seen: {not {r['cell_id'] for r in first} & {r['cell_id'] for r in rest}}")


if __name__ == "__main__":
    main(*sys.argv[1:])
