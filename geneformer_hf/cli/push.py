"""`geneformer-hf push`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from .command import Command


class Push(Command):
    """Put a model, an adapter, a tokenizer or a tokenized dataset on the Hub: a whole folder in one commit, without pickles, with a card."""

    name = "push"
    help = "folder -> the Hub"
    when_interrupted = "no commit was made; files that were sent are not sent again"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("folder", type=Path, help="of a model, an adapter, a tokenizer or a tokenized dataset")
        parser.add_argument("repository", metavar="REPO", help="its id on the Hub, such as name/model; made if it is not there")
        parser.add_argument("--private", action="store_true", default=None, help="make a new repository private (default: as the account is set)")
        parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to, made if it is not there (default: main)")
        parser.add_argument("--pr", action="store_true", help="open a pull request in place of a commit")
        parser.add_argument("--base", metavar="ID", help="of an adapter trained on a folder of this disk: where that model is on the Hub")
        parser.add_argument("--message", help="of the commit (default: says what it is)")

    def run(self, args: Namespace) -> int:
        from ..hub.sharing import push_folder

        done = push_folder(
            args.folder, args.repository, private=args.private, revision=args.revision, create_pr=args.pr, base=args.base, message=args.message
        )  # fmt: skip
        print(f"{done.url}: {done.kind} of {len(done.files)} files, {done.n_bytes / 1e6:,.1f} MB{'' if done.is_new else ', which was there already'}.")
        if done.base:
            print(f"Its base is {done.base}.")
        if done.left_out:
            print(f"Left here, as nothing of the kind is shared: {', '.join(done.left_out[:10])}{', …' if len(done.left_out) > 10 else ''}")
        return 0
