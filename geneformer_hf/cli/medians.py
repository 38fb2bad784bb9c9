"""`geneformer-hf medians`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from ..errors import ColumnNotFoundError
from .command import KINDS, Command, add_overwrite, add_reading, add_skipping, add_workers, options_of


class Medians(Command):
    """Fit the gene table of a new vocabulary, of any species: non-zero medians over the cells of any number of files.

    Stopped or killed, the same command goes on where it was.
    """

    name = "medians"
    help = "files of cells -> gene table and tokenizer of a new vocabulary"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("files", nargs="+", help=f"{KINDS}; globs and folders are sorted")
        parser.add_argument("--output", required=True, type=Path, help="new JSON file")
        parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="also write a tokenizer with this vocabulary: new folder")
        parser.add_argument("--no-special-tokens", action="store_true", help="a vocabulary without <cls> and <eos>, as V1 (default: with, as V2)")
        parser.add_argument(
            "--biotypes", nargs="+", metavar="TYPE", help="genes of these types only; published vocabularies: protein_coding miRNA (default: all)"
        )
        parser.add_argument(
            "--gene-biotypes", type=Path, metavar="FILE", help="CSV with the columns ensembl_id and biotype (default: GENCODE's, for human genes)"
        )
        add_reading(parser)
        add_workers(parser)
        add_skipping(parser)
        add_overwrite(parser)

    def run(self, args: Namespace) -> int:
        from ..data.files import find_files
        from ..data.medians import fit_gene_table
        from ..models.tokenization_geneformer import GeneformerTokenizer
        from ..outputs import new_folder, require_apart, require_free, unfinished

        require_apart(args.output, [*find_files(args.files), args.gene_biotypes])
        if args.tokenizer is not None:
            require_free(args.tokenizer, overwrite=args.overwrite, made_by="medians")
            require_apart(args.tokenizer, [args.output, *find_files(args.files), args.gene_biotypes])
        gene_biotypes = None if args.gene_biotypes is None else read_biotypes(args.gene_biotypes)
        with unfinished(args.output, overwrite=args.overwrite) as work:
            table = fit_gene_table(
                args.files,
                special_tokens=not args.no_special_tokens,
                biotypes=args.biotypes,
                gene_biotypes=gene_biotypes,
                **options_of(args),
                work=work,
            )
            whole = work.folder / args.output.name
            whole.write_text(table.to_json(), encoding="utf-8")
            work.put_in_place(whole)
        print(f"{len(table):,} {table.species} genes, {table.source}, written to {args.output}.")
        tokens: dict[str, Any] = {} if args.no_special_tokens else {"cls_token": "<cls>", "eos_token": "<eos>"}
        if args.tokenizer is not None:
            with new_folder(args.tokenizer, made_by="medians", overwrite=args.overwrite) as folder:
                GeneformerTokenizer(gene_table=table, **tokens).save_pretrained(folder)
            print(f"Tokenizer written to {args.tokenizer}: AutoTokenizer.from_pretrained({str(args.tokenizer)!r})")
        else:
            options = "".join(f", {name}={token!r}" for name, token in tokens.items())
            print(f"Use it: GeneformerTokenizer(gene_table=GeneTable.load({str(args.output)!r}){options})")
        return 0


def read_biotypes(path: Path) -> dict[str, str]:
    """Read Ensembl id to biotype from a CSV file.

    Raises:
        CellFileError: if it cannot be read.
        ColumnNotFoundError: if it has other columns.
    """
    from ..data.tables import read_text_table
    from ..gene_ids import canonical_id

    rows = read_text_table(path)
    missing = [name for name in ("ensembl_id", "biotype") if name not in rows]
    if missing:
        msg = f"{path} has no column {' or '.join(missing)}. Found: {', '.join(map(str, rows.columns[:20]))}. Expected a CSV file with a header."
        raise ColumnNotFoundError(msg)
    rows = rows[["ensembl_id", "biotype"]].dropna()
    return {canonical_id(gene.strip()) or gene.strip(): biotype.strip() for gene, biotype in zip(rows["ensembl_id"], rows["biotype"], strict=True)}
