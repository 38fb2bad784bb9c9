"""`geneformer-hf medians`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from .command import Command, add_overwrite, add_reading


class Medians(Command):
    """Fit the gene table of a new vocabulary: exact non-zero medians over the cells of some files."""

    name = "medians"
    help = ".h5ad files -> gene_table.json"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("files", nargs="+", help=".h5ad files; globs and folders are sorted")
        parser.add_argument("--output", required=True, type=Path, help="new JSON file")
        parser.add_argument("--no-special-tokens", action="store_true", help="a vocabulary without <cls> and <eos>, as V1 (default: with, as V2)")
        add_reading(parser)
        add_overwrite(parser)

    def run(self, args: Namespace) -> int:
        from ..data.medians import fit_gene_table
        from ..outputs import new_file, require_free

        require_free(args.output, overwrite=args.overwrite)
        table = fit_gene_table(args.files, special_tokens=not args.no_special_tokens, gene_ids=args.gene_ids, counts_layer=args.counts_layer, progress=True)
        with new_file(args.output, overwrite=args.overwrite) as partial:
            partial.write_text(table.to_json(), encoding="utf-8")
        print(f"{len(table):,} {table.species} genes, {table.source}, written to {args.output}.")
        print(
            f"Use it: GeneformerTokenizer(gene_table=GeneTable.load({str(args.output)!r}){'' if args.no_special_tokens else ', cls_token=' + repr('<cls>') + ', eos_token=' + repr('<eos>')})"
        )
        return 0
