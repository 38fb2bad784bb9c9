"""`geneformer-hf convert`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from .command import Command, add_overwrite, describe_size


class Convert(Command):
    """Turn a published checkpoint into a folder that opens with the Auto classes; every tensor and token id is compared."""

    name = "convert"
    help = "published checkpoint -> folder for the Auto classes"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("source", help="preset name (such as Geneformer-V2-104M), Hub id, or folder")
        parser.add_argument("output", type=Path, help="new folder")
        parser.add_argument("--subfolder", help="checkpoint within the repository or clone")
        parser.add_argument("--revision", help="commit, branch or tag on the Hub (default: newest)")
        parser.add_argument(
            "--dictionaries",
            type=Path,
            metavar="DIR",
            help="folder with token_dictionary*.pkl, gene_median_dictionary*.pkl, gene_name_id_dict*.pkl and ensembl_mapping_dict*.pkl (default: found in the source)",
        )
        parser.add_argument(
            "--allow-unknown-dictionaries", action="store_true", help="accept dictionaries whose SHA-256 is not a published one (default: refuse)"
        )
        parser.add_argument("--id-classes", type=Path, metavar="FILE", help="of a fine-tuned classifier: its id_class_dict.pkl, which names its classes")
        parser.add_argument("--label-column", metavar="COL", help="of a fine-tuned classifier: what it predicts, for the columns of predictions")
        add_overwrite(parser)

    def run(self, args: Namespace) -> int:
        from ..hub.conversion import convert_checkpoint

        done = convert_checkpoint(
            args.source,
            args.output,
            subfolder=args.subfolder,
            revision=args.revision,
            dictionaries=args.dictionaries,
            allow_unknown_dictionaries=args.allow_unknown_dictionaries,
            id_classes=args.id_classes,
            label_column=args.label_column,
            overwrite=args.overwrite,
        )
        version = f"{done.version} vocabulary" if done.version else "own vocabulary"
        print(f"{done.architecture}, {version} of {done.n_genes:,} genes: {done.n_tensors} tensors and all token ids equal the source.")
        print(
            f"{done.output} ({describe_size(done.output)}) opens with AutoModelForMaskedLM and AutoTokenizer after `import geneformer_hf`."
            if done.architecture.endswith("MaskedLM")
            else f"{done.output} ({describe_size(done.output)})"
        )
        return 0
