"""`geneformer-hf export`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from .command import Command, add_overwrite, describe_size


class Export(Command):
    """Write a checkpoint as a plain BERT folder, which opens without this package; or an adapter merged into its base."""

    name = "export"
    help = "checkpoint -> plain BERT folder; adapter -> merged checkpoint"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("model", help="folder or Hub id")
        parser.add_argument("output", type=Path, help="new folder")
        parser.add_argument(
            "--format", choices=["bert", "merged"], default="bert", help="bert, or merged: an adapter and its base as one checkpoint (default: bert)"
        )
        add_overwrite(parser)

    def run(self, args: Namespace) -> int:
        from ..hub.export import export_checkpoint, merge_adapter

        if args.format == "merged":
            output = merge_adapter(args.model, args.output, overwrite=args.overwrite)
            print(f"{output} ({describe_size(output)}) is the adapter and its base as one checkpoint.")
            return 0
        output = export_checkpoint(args.model, args.output, overwrite=args.overwrite)
        print(f"{output} ({describe_size(output)}) is a plain BERT checkpoint in the published layout; all tensors equal.")
        return 0
