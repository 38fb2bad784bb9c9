"""Do transcription factors receive more attention than other genes of like rank? And the network, for Cytoscape and scanpy.

python examples/attention_regulators.py cells.h5ad geneformer-v2 factors.txt network.h5ad network.graphml
"""

import sys
from pathlib import Path

from geneformer_hf import GeneformerTokenizer, attention_network, iter_attention, regulator_centrality


def main(cells: str, model: str, factors: str, output: str, graph: str) -> None:
    one = next(iter_attention(model, cells, layers=[-1]))
    top = one.weights[0].mean(axis=0).sum(axis=0).argmax()
    print(f"{one.cell_id}: {len(one.names)} tokens; most attention goes to {one.names[top]}")
    network = attention_network(model, cells)
    network.to_anndata().write_h5ad(output)
    network.write_graphml(graph)
    compared = regulator_centrality(network, Path(factors).read_text().split(), table=GeneformerTokenizer.from_pretrained(model).gene_table)
    print(compared[["layer", "head", "auc", "auc_matched", "p_matched"]].round(3).to_string(index=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
