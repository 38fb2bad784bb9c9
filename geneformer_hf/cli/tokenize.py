"""`geneformer-hf tokenize`."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from .command import Command, add_overwrite, add_reading, describe_size, positive


class Tokenize(Command):
    """Turn .h5ad files of raw counts into a tokenized dataset; the folder opens with datasets.load_from_disk."""

    name = "tokenize"
    help = ".h5ad files -> tokenized dataset"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("files", nargs="+", help=".h5ad files, in the order of their rows; globs and folders are sorted")
        parser.add_argument("--model", required=True, help="converted checkpoint (folder or Hub id) whose tokenizer to use")
        parser.add_argument("--output", required=True, type=Path, help="new folder")
        parser.add_argument("--obs", nargs="*", metavar="COL", help="columns of obs to keep (default: all; --obs alone: none)")
        add_reading(parser)
        parser.add_argument("--keep-counts", action="store_true", help="also keep counts per 10,000 beside each token (default: no)")
        parser.add_argument("--num-proc", type=positive, default=1, metavar="N", help="processes (default: 1)")
        add_overwrite(parser)

    def run(self, args: Namespace) -> int:
        import tempfile

        from ..data.builder import load_cells
        from ..models.loading import load_tokenizer
        from ..outputs import new_folder, require_free

        require_free(args.output, overwrite=args.overwrite)
        tokenizer = load_tokenizer(args.model)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        # The cache lies beside the output, on the disk that has to hold the dataset anyway, and goes when it is written.
        with tempfile.TemporaryDirectory(prefix=f".{args.output.name}.", suffix=".cache", dir=args.output.parent) as cache_dir:
            dataset = load_cells(
                args.files,
                tokenizer=tokenizer,
                obs="all" if args.obs is None else args.obs,
                gene_ids=args.gene_ids,
                counts_layer=args.counts_layer,
                keep_counts=args.keep_counts,
                num_proc=args.num_proc if args.num_proc > 1 else None,
                cache_dir=cache_dir,
            )
            report = json.loads(dataset.info.description)
            lengths = dataset.with_format("numpy")["length"][:]
            with new_folder(args.output, overwrite=args.overwrite) as partial:
                dataset.save_to_disk(partial)
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
    for file in report["files"]:
        print(f"{file['file']}: {file['cells']:,} cells, counts in {file['counts']}; {file['genes']}.")


def print_left_out(report: dict) -> None:
    """Print what `load_cells` left out."""
    if report["left_out_by_filter_pass"]:
        print(f"Left out: {report['left_out_by_filter_pass']:,} cells with filter_pass 0.")
    if report["left_out_without_genes"]:
        print(f"Left out: {report['left_out_without_genes']:,} cells without any gene of the vocabulary.")
