"""`geneformer-hf export`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from .command import Command, add_overwrite, describe_size


class Export(Command):
    """Write a checkpoint as a plain BERT folder, which opens without this package."""

    name = "export"
    help = "checkpoint -> plain BERT folder"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("model", help="folder or Hub id")
        parser.add_argument("output", type=Path, help="new folder")
        parser.add_argument("--format", choices=["bert"], default="bert", help="default: bert")
        add_overwrite(parser)

    def run(self, args: Namespace) -> int:
        from ..hub.export import export_checkpoint

        output = export_checkpoint(args.model, args.output, overwrite=args.overwrite)
        print(f"{output} ({describe_size(output)}) is a plain BERT checkpoint in the published layout; all tensors equal.")
        return 0
