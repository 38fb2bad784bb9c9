"""`geneformer-hf attention`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from .command import KINDS, Command, add_overwrite, add_reading, listed_genes, positive


class Attention(Command):
    """Average the attention between genes over cells: a sparse network for each layer and head.

    Writes network.h5ad (obsp: one graph for each layer and head, and their mean), network.graphml (the mean), centrality.csv, received.csv, report.html and
    pictures/ into a new folder; with --regulators also regulators.csv, whether they receive more attention than other genes.
    """

    name = "attention"
    help = "which genes attend to which, mean over cells: networks, regulators, one report"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("input", type=Path, help=f"raw counts ({KINDS}), or folder of a tokenized dataset")
        parser.add_argument("--model", required=True, help="checkpoint: folder or Hub id")
        parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="new folder")
        parser.add_argument(
            "--genes", metavar="LIST|FILE", help="genes of the network, separated by commas, or a file with one a line (default: those in most cells)"
        )
        parser.add_argument("--n-genes", type=positive, default=500, metavar="N", help="without --genes: so many (default: 500)")
        parser.add_argument("--regulators", metavar="LIST|FILE", help="genes to compare with all others, such as transcription factors")
        parser.add_argument("--layers", type=int, nargs="+", metavar="L", help="layers, 0 the first, -1 the last (default: all)")
        parser.add_argument("--edges", type=positive, default=20, metavar="N", help="strongest targets of each gene to keep (default: 20)")
        parser.add_argument("--least-cells", type=positive, default=5, metavar="N", help="pairs and genes of fewer cells are left out (default: 5)")
        parser.add_argument("--device", help="where to compute (default: the accelerator if there is one)")
        add_reading(parser)
        add_overwrite(parser)

    def run(self, args: Namespace) -> int:
        from ..analysis.attention_networks import attention_network, regulator_centrality
        from ..analysis.attention_report import regulators_in_words, write_attention
        from ..models.loading import load_model, tokenizer_of
        from ..outputs import new_folder, require_apart, require_free
        from ..reports.plots import require_plots

        require_plots()
        require_apart(args.output, [args.input, args.model, args.genes, args.regulators])
        require_free(args.output, overwrite=args.overwrite, made_by="attention")
        genes = listed_genes(args.genes) if args.genes else None
        regulators = listed_genes(args.regulators, "--regulators") if args.regulators else None
        model = load_model(args.model, device=args.device)
        tokenizer = tokenizer_of(model)
        network = attention_network(
            model, args.input, genes=genes, n_genes=args.n_genes, layers=args.layers, edges=args.edges, least_cells=args.least_cells, tokenizer=tokenizer,
            device=args.device, gene_ids=args.gene_ids, counts_layer=args.counts_layer, genome=args.genome,
        )  # fmt: skip
        compared = None if regulators is None else regulator_centrality(network, regulators, table=tokenizer.gene_table)
        settings = {"input": args.input.name, "model": str(args.model), "genes": args.genes or f"the {args.n_genes:,} in most cells", "regulators": args.regulators,
                    "layers": args.layers or "all", "edges": args.edges, "least_cells": args.least_cells}  # fmt: skip
        with new_folder(args.output, made_by="attention", overwrite=args.overwrite) as partial:
            write_attention(network, partial, title=f"Attention in {args.input.name}", settings=settings, regulators=compared, names=regulators or ())
        print(f"{network.n_cells:,} cells, {len(network.genes):,} genes, {len(network.weights)} heads.")
        top = network.centrality().head(8)
        print(f"Most attended: {', '.join(f'{row.symbol or gene} ({row.received:.2f})' for gene, row in top.iterrows())}; 1 is uniform.")
        if compared is not None:
            print(regulators_in_words(compared))
        print(f"Networks, tables and pictures: {args.output}. Look at {args.output / 'report.html'}")
        return 0
