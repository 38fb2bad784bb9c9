"""`geneformer-hf tokenize`."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from .command import KINDS, Command, add_overwrite, add_reading, add_skipping, add_workers, describe_size, options_of


class Tokenize(Command):
    """Turn files of raw counts into a tokenized dataset; the folder opens with datasets.load_from_disk.

    Stopped or killed, the same command goes on where it was."""

    name = "tokenize"
    help = "files of cells -> tokenized dataset"
    when_interrupted = "the same command goes on where it was"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("files", nargs="+", help=f"{KINDS}, in the order of their rows; globs and folders are sorted")
        parser.add_argument("--model", required=True, help="converted checkpoint (folder or Hub id) whose tokenizer to use")
        parser.add_argument("--output", required=True, type=Path, help="new folder")
        parser.add_argument("--obs", nargs="*", metavar="COL", help="columns of obs to keep (default: all; --obs alone: none)")
        add_reading(parser)
        parser.add_argument("--keep-counts", action="store_true", help="also keep counts per 10,000 beside each token (default: no)")
        add_workers(parser)
        add_skipping(parser)
        add_overwrite(parser)

    def run(self, args: Namespace) -> int:
        from ..data.corpus import tokenize_corpus
        from ..data.files import find_files
        from ..models.loading import load_tokenizer
        from ..outputs import require_apart, require_free

        require_apart(args.output, [args.model, *find_files(args.files)])
        require_free(args.output, overwrite=args.overwrite, made_by="tokenize")
        tokenizer = load_tokenizer(args.model)
        dataset = tokenize_corpus(
            args.files,
            args.output,
            tokenizer=tokenizer,
            obs="all" if args.obs is None else args.obs,
            keep_counts=args.keep_counts,
            **options_of(args),
            overwrite=args.overwrite,
        )
        report = json.loads(dataset.info.description)
        lengths = dataset.with_format("numpy")["length"][:]
        # What was left out has been said as a warning.
        print_files(report)
        if len(lengths):
            n_full = int((lengths == tokenizer.model_max_length).sum())
            print(
                f"Tokens per cell: {int(lengths.min()):,} to {int(lengths.max()):,}, median {int(sorted(lengths)[len(lengths) // 2]):,}; {n_full:,} cells fill the {tokenizer.model_max_length:,} there is room for."
            )
        print(f"{report['cells']:,} cells written to {args.output} ({describe_size(args.output)}).")
        return 0


def print_files(report: dict) -> None:
    """Print what `load_cells` read."""
    files = report.get("files")
    for file in files if isinstance(files, list) else []:
        if isinstance(file, dict) and isinstance(file.get("cells"), int):
            print(f"{file.get('file')}: {file['cells']:,} cells, counts in {file.get('counts')}; {file.get('genes')}.")


def print_left_out(report: dict) -> None:
    """Print what `load_cells` left out."""
    for name, what in (("left_out_by_filter_pass", "with filter_pass 0"), ("left_out_without_genes", "without any gene of the vocabulary")):
        if isinstance(n := report.get(name), int) and n:
            print(f"Left out: {n:,} cells {what}.")
