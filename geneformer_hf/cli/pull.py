"""`geneformer-hf pull`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from .command import Command, add_overwrite, describe_size

OPENS = {
    "model": "opens with the Auto classes after `import geneformer_hf`",
    "adapter": "opens with geneformer_hf.load_model",
    "tokenizer": "opens with AutoTokenizer after `import geneformer_hf`",
    "dataset": "opens with datasets.load_from_disk",
}


class Pull(Command):
    """Fetch a model, an adapter, a tokenizer or a dataset from the Hub into a folder: whole, every hash compared, without code or pickles."""

    name = "pull"
    help = "the Hub -> folder"
    when_interrupted = "whole files that came are kept; the same command goes on from there"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("repository", metavar="REPO", help="its id on the Hub, such as name/model")
        parser.add_argument("output", type=Path, metavar="FOLDER", help="new folder")
        parser.add_argument("--kind", choices=["model", "dataset"], help="if there is one of each by that name")
        parser.add_argument("--revision", help="commit, branch or tag (default: newest)")
        add_overwrite(parser)

    def run(self, args: Namespace) -> int:
        from ..hub.sharing import pull_folder

        done = pull_folder(args.repository, args.output, kind=args.kind, revision=args.revision, overwrite=args.overwrite)
        print(f"{done.output} ({describe_size(done.output)}): {done.kind} of {done.repository} at {done.revision[:12]}, {OPENS[done.kind]}.")
        if done.base:
            print(f"Its base is {done.base}, fetched when it is opened.")
        if done.left_out:
            print(f"Left there, as nothing of the kind is fetched: {', '.join(done.left_out[:10])}{', …' if len(done.left_out) > 10 else ''}")
        return 0
