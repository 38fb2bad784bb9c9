"""`geneformer-hf export`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from .command import Command, add_overwrite, describe_size


class Export(Command):
    """Write a checkpoint as a plain BERT folder, which opens without this package, or for ONNX Runtime; an adapter merged into its base; cells as an scDL archive."""

    name = "export"
    help = "checkpoint -> plain BERT folder or ONNX; adapter -> merged checkpoint; cells -> scDL archive"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("model", help="folder or Hub id of a checkpoint; for scdl a file of cells")
        parser.add_argument("output", type=Path, help="new folder")
        parser.add_argument(
            "--format",
            choices=["bert", "onnx", "merged", "scdl"],
            default="bert",
            help="bert; onnx: encoder and head for ONNX Runtime; merged: an adapter and its base as one checkpoint; scdl: cells for bionemo-scdl (default: bert)",
        )
        parser.add_argument("--int8", action="store_true", help="with onnx: also an encoder in 8 bits, smaller and faster on CPUs, less exact")
        add_overwrite(parser)

    def run(self, args: Namespace) -> int:
        from ..errors import SettingError
        from ..hub.export import export_checkpoint, merge_adapter

        if args.int8 and args.format != "onnx":
            msg = f"--int8 is for --format onnx, and the format is {args.format}."
            raise SettingError(msg)
        if args.format == "onnx":
            from ..hub.onnx_export import export_onnx

            done = export_onnx(args.model, args.output, int8=args.int8, overwrite=args.overwrite)
            print(f"{done.output} ({describe_size(done.output)}) holds {', '.join(name for name in done.files if name.endswith('.onnx'))}.")
            print(f"Largest difference from torch: {done.error:.1e} of the largest number.")
            if done.int8_error is not None:
                print(f"In 8 bits the vectors of tokens lie {done.int8_error:.1%} off, on random cells.")
            return 0
        if args.format == "scdl":
            from ..data.readers import open_cells
            from ..data.scdl import write_scdl

            cells = open_cells(args.model)
            output = write_scdl(cells, args.output, overwrite=args.overwrite)
            print(f"{output} ({describe_size(output)}) holds {cells.n_cells:,} cells, counts of {cells.counts_described}.")
            return 0
        if args.format == "merged":
            output = merge_adapter(args.model, args.output, overwrite=args.overwrite)
            print(f"{output} ({describe_size(output)}) is the adapter and its base as one checkpoint.")
            return 0
        output = export_checkpoint(args.model, args.output, overwrite=args.overwrite)
        print(f"{output} ({describe_size(output)}) is a plain BERT checkpoint in the published layout; all tensors equal.")
        return 0
